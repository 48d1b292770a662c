"""The frozen towers against open_clip and SAM-Med2D's form; the feature cache: never stale, never half-written, bounded."""
import os
import time

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

import encoders
from common import LIGHT, InputError, seeded
from data import open_dataset
from encoders import FeatureCache, fill
from medsegr import Config, MedSegR


# ---------------------------------------------------------------------------------------------------------------------
# The feature cache

class Encoder:
    """Stands for a model: counts the images that it encodes."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images):
        self.calls += len(images)
        return images.float().mean(1, keepdim=True)


def pictures(n, seed=0):
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_second_time_is_read(tmp_path):
    encode, images = Encoder(), pictures(5)
    first = FeatureCache(tmp_path, "key")(images, encode)
    again = FeatureCache(tmp_path, "key")(images.flip(0), encode).flip(0)
    assert encode.calls == 5 and torch.equal(first, again)
    torch.testing.assert_close(first, encode(images), rtol=1e-3, atol=0.1)
    assert torch.equal(first, FeatureCache(None, "key")(images, encode))  # the same without a cache


def test_other_pixels_or_key_are_encoded_anew(tmp_path):
    encode, images = Encoder(), pictures(1)
    FeatureCache(tmp_path, "key")(images, encode)
    images[0, 2, 7, 7] += 1
    assert torch.equal(FeatureCache(tmp_path, "key")(images, encode), encode(images).half().float())
    FeatureCache(tmp_path, "other")(images, encode)
    assert encode.calls == 4


def test_damaged_entry_is_encoded_anew(tmp_path):
    encode, images = Encoder(), pictures(3)
    cache = FeatureCache(tmp_path, "key")
    expected = cache(images, encode)
    files = sorted(tmp_path.glob("*/*.npy"))
    files[0].write_bytes(files[0].read_bytes()[:50])
    files[1].write_bytes(b"")
    files[2].write_bytes(np.random.default_rng(0).bytes(200))
    assert torch.equal(FeatureCache(tmp_path, "key")(images, encode), expected)
    assert encode.calls == 6


def test_size_limit(tmp_path):
    encode, size = Encoder(), 16 * 16 * 2 + 128
    limit = 10.5 * size / 1e9
    size_now = lambda: sum(f.stat().st_size for f in tmp_path.glob("*/*.npy"))
    cache = FeatureCache(tmp_path, "old", limit)
    cache(pictures(30), encode)
    assert 0 < size_now() <= limit * 1e9
    for f in tmp_path.glob("*/*.npy"):
        os.utime(f, (time.time() - 1000,) * 2)
    new = FeatureCache(tmp_path, "new", limit)
    new(pictures(8, 1), encode)
    assert size_now() <= limit * 1e9 and len(list(tmp_path.glob("new/*.npy"))) == 8  # old ones made room
    new(pictures(20, 2), encode)
    calls = encode.calls
    new(pictures(8, 1), encode)
    assert encode.calls == calls, "what this run has used must stay"


def test_the_limit_is_that_of_all_processes_together(tmp_path):
    encode, size = Encoder(), 16 * 16 * 2 + 128
    caches = [FeatureCache(tmp_path, "key", 10.5 * size / 1e9) for _ in range(3)]
    for n, image in enumerate(pictures(30)):
        caches[n % 3](image[None], encode)
    assert len(list(tmp_path.glob("*/*.npy"))) == 10


def test_a_folder_that_cannot_be_made_is_said_and_done_without(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache, encode, images = FeatureCache(tmp_path / "file" / "cache", "key"), Encoder(), pictures(2)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(tmp_path / "file" / "cache") in said
    cache(images, encode)
    assert torch.equal(cache(images, encode), encode(images).half().float()) and cache.read(images[0]) is None
    fill(cache, 2, lambda i: 1 / 0, encode)
    assert not capsys.readouterr().out


class Samples:
    """Stands for a data set: sample(i) and stamp(i) of n images; counts those that are read."""

    def __init__(self, n, seed=0):
        self.images, self.read, self.stamp = pictures(n, seed), 0, "image {} of yesterday".format

    def __call__(self, i):
        self.read += 1
        return type("Sample", (), dict(image=self.images[i].permute(1, 2, 0).numpy()))


def test_fill_leaves_nothing_to_encode(tmp_path):
    samples, encode, cache = Samples(7), Encoder(), FeatureCache(tmp_path, "key")
    for rank in range(2):
        fill(cache, 7, samples, encode, rank, 2)
    assert encode.calls == 7
    cache(samples.images, encode)
    fill(cache, 7, samples, encode)
    assert encode.calls == 7 and samples.read == 14


def test_a_restart_reads_only_what_has_changed(tmp_path):
    samples, encode = Samples(7), Encoder()
    start = lambda: fill(FeatureCache(tmp_path, "key"), 7, samples, encode, stamp=samples.stamp)
    start()
    start()
    assert encode.calls == samples.read == 7
    samples.images[2] = 255 - samples.images[2]
    samples.stamp = lambda i: f"image {i} of {'today' if i in (2, 3) else 'yesterday'}"
    start()
    assert encode.calls == 8 and samples.read == 9  # image 3 is what it was under another stamp
    FeatureCache(tmp_path, "key").path(samples.images[5]).unlink()
    start()
    assert encode.calls == 9 and samples.read == 10
    samples.images[0] = 255 - samples.images[0]  # even a stamp that lies leads to no wrong features
    start()
    assert FeatureCache(tmp_path, "key").read(samples.images[0]) is None
    fill(FeatureCache(tmp_path, "other key"), 7, samples, encode, stamp=samples.stamp)
    assert encode.calls == 16


def test_a_restart_marks_what_it_does_not_read_as_used(tmp_path):
    samples, encode, size = Samples(8), Encoder(), 16 * 16 * 2 + 128
    fill(FeatureCache(tmp_path, "key"), 8, samples, encode, stamp=samples.stamp)
    for file in tmp_path.glob("key/*"):
        os.utime(file, (time.time() - 1000,) * 2, follow_symlinks=False)
    cache = FeatureCache(tmp_path, "key", 9.5 * size / 1e9)
    fill(cache, 8, samples, encode, stamp=samples.stamp)
    cache(pictures(5, 1), encode)
    assert all(cache.path(image).is_file() for image in samples.images)


def test_a_full_cache_ends_the_encoding_ahead(tmp_path, capsys):
    samples, encode, size = Samples(20), Encoder(), 16 * 16 * 2 + 128
    cache = FeatureCache(tmp_path, "key", 10.5 * size / 1e9)
    fill(cache, 20, samples, encode, stamp=samples.stamp)
    kept = len(list(tmp_path.glob("*/*.npy")))
    assert 8 < kept < 11 and encode.calls == kept + 1
    fill(cache, 20, samples, encode)
    assert encode.calls == samples.read == kept + 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "full" in said and "--cache-gb" in said
    assert cache.read(samples.images[0]) is not None and cache.read(samples.images[15]) is None


@pytest.mark.parametrize("name", ["kvasir", "sa-med2d", "demo"])
def test_stamps_of_data_sets(name, real_data, linked, tmp_path):
    """They tell images apart, and a file from what it was before it was written again."""
    if name == "demo":
        assert open_dataset("demo").stamp(0) is None
        return
    root = linked("sa-med2d-mini") if name == "sa-med2d" else real_data / "kvasir"
    dataset = open_dataset(name, root)
    stamps = [dataset.stamp(i) for i in range(len(dataset))]
    assert len(set(stamps)) == len(dataset) > 2 and stamps == [
        open_dataset(name, root).stamp(i) for i in range(len(dataset))]
    copy = tmp_path / "copy.png"
    copy.write_bytes(dataset.source.file(0).read_bytes())
    dataset.source.file = lambda i: copy
    assert dataset.stamp(0) != stamps[0]
    dataset.source.file = lambda i: tmp_path / "missing.png"
    assert dataset.stamp(0) is None


# if these numbers change by more than rounding, raise encoders.ENCODING_VERSION: features on disk are then not found
ENCODINGS = dict(lite_medsam=[-0.5391, 0.2056, -0.2725, -1.1842, 0.7003, -0.6606, -0.2873, -1.2879],
                 vit_b=[0.8236, 0.544, 0.3975, -0.5192, 2.0629, 0.7034, -1.3107, -0.8793],
                 sam_med2d=[0.9813, 1.5491, 0.2695, -0.8653, 0.5349, 0.1031, -2.2769, -0.2912])


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["lite_medsam", "vit_b", "sam_med2d"])
def test_encodings_are_those_of_this_version(backbone):
    """Features of a fixed image from an encoder with drawn weights, SAM's resized from 256 to 96 pixels."""
    S = 96
    model = MedSegR(Config(backbone=backbone, sam_checkpoint="random", branches=("sam",), image_size=S)).eval()
    encoder = model.sam.image_encoder
    if backbone != "lite_medsam":
        encoders.resize_vit(encoder, 256)
    for name, p in encoder.named_parameters():
        scale = 1 if "biases" in name or "rel_pos" in name else 0.03
        p.copy_(torch.from_numpy(scale * seeded(name).standard_normal(p.shape) + (p.dim() == 1 and "weight" in name)))
    if backbone != "lite_medsam":
        encoders.resize_vit(encoder, S)
    features = model.encode_image(torch.from_numpy(seeded("image").integers(0, 256, (1, 3, S, S), np.uint8)))[0]
    np.testing.assert_allclose(features[::32, 1, 2], ENCODINGS[backbone], rtol=1e-3, atol=1e-3)
    assert encoders.ENCODING_VERSION == 1


@torch.no_grad()
@pytest.mark.parametrize("S", [32, 60, 96])  # windows of 7 and 14: 60 / 4 fills whole ones of neither
def test_tiny_vit_is_the_packages_own(S, monkeypatch):
    """Its modules one after the other, as their own forward has them, in float32 to rounding: with GELU in oneDNN's
    products and, as on other processors, without; of a batch as of its images; in bfloat16 no worse than its own."""
    model = MedSegR(Config(backbone="lite_medsam", branches=("sam",), image_size=S)).eval()
    encoder, grid = model.sam.image_encoder, S // 4
    x = torch.from_numpy(seeded(S).random((2, 3, S, S), np.float32))

    def own(x):
        x = encoder.patch_embed(x)
        for layer in encoder.layers:
            x = layer(x)
        return encoder.neck(x.transpose(1, 2).unflatten(2, (grid, grid)))

    near = lambda a, b: (a.float() - b).norm() / b.norm()
    expected, found = own(x), encoders.tiny_vit(encoder, x)
    assert near(found, expected) < 1e-5 and found.is_contiguous(memory_format=torch.channels_last)
    assert near(encoders.tiny_vit(encoder, x[1:]), expected[1:]) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        lower, own_lower = encoders.tiny_vit(encoder, x), own(x)
    assert near(lower, expected) < 1.2 * near(own_lower, expected)
    monkeypatch.setattr(encoders, "fusing", lambda: False)
    assert near(encoders.tiny_vit(encoder, x), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert near(encoders.tiny_vit(encoder, x), expected) < 1.2 * near(own_lower, expected)


def test_key_knows_what_the_features_depend_on():
    keys = [MedSegR(Config(**LIGHT, branches=("sam",), **c)).features_key() for c in (
        dict(image_size=64), dict(image_size=96), dict(image_size=64, normalize="sam"),
        dict(image_size=64, feature_grid=8), dict(image_size=64, sam_checkpoint="random"))]
    assert len(set(keys)) == len(keys)
    assert keys[0] == MedSegR(Config(**LIGHT, image_size=64, priors=("texture",))).features_key()


# ---------------------------------------------------------------------------------------------------------------------
# The towers

@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "MobileCLIP-S1"])  # the second one's tokens all see each other
def test_clip_tokens_are_open_clips(name):
    """Equation 1: the token at the end of the text, projected, is what open_clip's encode_text returns."""
    encoder = encoders.TextEncoder(f"{name}:random")
    texts = ["posterior to the stomach", "a homogeneous organ of intermediate brightness", "oval"]
    ids = open_clip.tokenize(texts)
    tokens, valid = encoder(texts)
    assert tokens.shape == (3, 77, 512) and valid.sum(1).tolist() == (ids.argmax(1) + 1).tolist()
    end = tokens[torch.arange(3), ids.argmax(1)] @ encoder.tower.text_projection
    with torch.no_grad():
        if name == "MobileCLIP-S1":
            expected = encoder.tower(ids)
        else:
            clip = open_clip.create_model(name).eval()
            for part in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
                setattr(clip, part, getattr(encoder.tower, part))
            expected = clip.encode_text(ids)
        torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-4)
    assert tokens[~valid].abs().max() == 0


def test_tokens_of_the_last_texts_are_kept(monkeypatch):
    monkeypatch.setattr(encoders, "KEPT_TEXTS", 3)
    encoder = encoders.TextEncoder("minilm")
    encoder.kept.clear()
    for text in ("a", "b", "c", "a", "d", "e"):
        tokens = encoder.tokens(text)
        assert len(tokens) == 3 and torch.equal(tokens, encoder([text])[0][0, :3])  # with a start and an end
    assert [text for text, _ in encoder.kept] == ["a", "d", "e"]


@pytest.mark.parametrize("spec", ["minilm", "ViT-B-16-quickgelu:random"])
def test_texts_encoded_ahead_are_those_of_one_by_one(spec, monkeypatch):
    """To rounding, whatever the lengths that come together; no more are kept than `tokens` keeps."""
    encoder = encoders.TextEncoder(spec)
    encoder.kept.clear()
    texts = [" ".join(["liver", "dark", "left"] * n)[:4 + 9 * n] for n in range(1, 9)]
    alone = [encoder.tokens(text).clone() for text in texts]
    encoder.kept.clear()
    encoder.keep([*texts, texts[0]], batch=3)
    assert len(encoder.kept) == len(texts)
    monkeypatch.setattr(encoders.TextEncoder, "forward", None)  # all of them are there
    for text, one in zip(texts, alone):
        torch.testing.assert_close(encoder.tokens(text), one, rtol=1e-4, atol=1e-4)
    encoder.kept.clear()


def test_minilm_tokens_are_its_own():
    """Their mean is the sentence embedding, which knows more than words: organs are nearer to organs."""
    encoder = encoders.TextEncoder("minilm")
    tokens, valid = encoder(["the liver", "the spleen", "a train ticket to Paris"])
    assert tokens.shape == (3, 77, 384) and tokens[~valid].abs().max() == 0
    pooled = F.normalize(tokens.sum(1) / valid.sum(1, keepdim=True), dim=1)
    expected = encoder.tower(encoder.tokenizer(["the liver", "the spleen", "a train ticket to Paris"]))
    torch.testing.assert_close(pooled, F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.1


def sam_med2d(path):
    """A checkpoint of random numbers with SAM-Med2D's names and its pickled optimizer."""
    config = Config(backbone="sam_med2d", sam_checkpoint="random", branches=("sam",), image_size=64)
    model = MedSegR(config)
    state = {}
    encoders.resize_vit(model.sam.image_encoder, 256)
    torch.manual_seed(3)
    for name, value in model.sam.state_dict().items():
        state[name] = value + 0.02 * torch.randn_like(value)
    optimizer = torch.optim.Adam(model.sam.mask_decoder.parameters(), lr=1e-4)
    torch.save(dict(model=state, optimizer=optimizer), path)
    return state


def test_sam_med2d(tmp_path):
    """Its adapters stand beside the MLP of every block. (Features and masks were compared with its own code: equal to
    2e-6 of 4.5; that code is not needed here.)"""
    state = sam_med2d(tmp_path / "b.pth")
    names = {k for k in state if ".Adapter." in k}
    assert names == {f"image_encoder.blocks.{i}.Adapter.{n}" for i in range(12) for n in (
        "channel.0.weight", "channel.2.weight", "spatial.0.weight", "spatial.2.weight", "norm.weight", "norm.bias")}
    assert state["image_encoder.pos_embed"].shape == (1, 16, 16, 768)
    assert state["image_encoder.blocks.2.attn.rel_pos_h"].shape[0] == 31  # of its global attention; windows have 27
    model = MedSegR(Config(backbone="sam_med2d", sam_checkpoint=str(tmp_path / "b.pth"), branches=("sam",))).eval()
    block, y = model.sam.image_encoder.blocks[2], torch.randn(1, 16, 16, 768)  # one with global attention
    with torch.no_grad():
        before = y + block.attn(block.norm1(y))
        y, x = block(y), block.norm2(before)
        mlp = block.mlp.lin2(F.gelu(block.mlp.lin1(x)))
        a, s = block.Adapter, x.permute(0, 3, 1, 2)
        weights = torch.sigmoid(F.linear(F.relu(F.linear(s.mean((2, 3)), a.channel[0].weight)), a.channel[2].weight))
        mixed = F.relu(F.conv2d(weights[..., None, None] * s, a.spatial[0].weight, stride=2, padding=1))
        mixed = F.relu(F.conv_transpose2d(mixed, a.spatial[2].weight, stride=2, padding=1)).permute(0, 2, 3, 1)
        expected = before + mlp + F.layer_norm(x + mixed, (768,), a.norm.weight, a.norm.bias)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        blue = torch.zeros(1, 3, 256, 256)
        blue[:, 2] = 255
        features = model.encode_image(blue)  # what was blue is its first channel
        x = (blue.flip(1) - torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / torch.tensor(
            [58.395, 57.12, 57.375])[:, None, None]
        torch.testing.assert_close(features, model.sam.image_encoder(x))
    with pytest.raises(InputError, match="sam-med2d_b.pth"):
        MedSegR(Config(backbone="sam_med2d"))


@pytest.mark.parametrize("backbone, names", [
    ("lite_medsam", ["layers.1.blocks.0.attn.attention_biases", "layers.3.blocks.1.attn.norm.weight",
                     "layers.2.blocks.5.attn.qkv.weight", "layers.1.blocks.1.attn.proj.bias"]),
    ("sam_med2d", ["blocks.3.attn.rel_pos_h", "blocks.0.attn.qkv.weight", "blocks.11.mlp.lin1.bias",
                   "blocks.5.norm2.weight", "blocks.7.Adapter.spatial.2.weight", "pos_embed"])])
def test_trained_encoders_keep_their_names(backbone, names):
    """Checkpoints hold these names, and every one of these parameters has a gradient."""
    model = MedSegR(Config(backbone=backbone, sam_checkpoint="random", branches=("sam",), image_size=64,
                           tune_encoder="all"))
    trained = {n.removeprefix("sam.image_encoder."): p for n, p in model.trained().items() if "image_encoder" in n}
    assert set(names) <= trained.keys() and not any("idxs" in n for n in model.state_dict())
    model.encode_image(torch.rand(1, 3, 64, 64) * 255).square().sum().backward()
    assert [n for n, p in trained.items() if p.grad is None] == []
    lora = MedSegR(Config(backbone=backbone, sam_checkpoint="random", branches=("sam",), image_size=64,
                          tune_encoder="lora")).trained()
    qkv = next(n for n in names if "qkv" in n).removesuffix(".weight")
    assert {f"sam.image_encoder.{qkv}.parametrizations.weight.0.{m}" for m in "AB"} <= lora.keys()


@pytest.mark.parametrize("make", ["missing", "truncated", "other model", "pickled code"])
def test_wrong_sam_checkpoint_is_named(tmp_path, make):
    path = tmp_path / "sam.pth"
    if make == "truncated":
        torch.save({"a": torch.randn(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif make == "other model":
        torch.save({"image_encoder.pos_embed": torch.zeros(3)}, path)
    elif make == "pickled code":
        import os
        import pickle
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)
        path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="sam.pth"):
        MedSegR(Config(**LIGHT, sam_checkpoint=str(path)))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("spec", ["ViT-B-16-quickgelu", "no-such-model:random", "ViT-B-16-quickgelu:/no/such/file.pt"])
def test_wrong_text_encoder_is_named(spec):
    with pytest.raises(InputError, match="--clip"):
        encoders.TextEncoder(spec)


@pytest.mark.parametrize("flags", [dict(backbone="vit_b", clip="minilm"), dict(LIGHT, clip="ViT-B-16-quickgelu:openai")])
def test_where_nothing_can_be_downloaded_the_light_pair_is_named(flags, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("open_clip.create_model", refuse)
    with pytest.raises(InputError, match="--light"):
        MedSegR(Config(**flags, image_size=64))


@pytest.mark.parametrize("spec", ["minilm", "ViT-B-16-quickgelu:random"])
def test_words_beyond_the_context_are_named(spec, capsys):
    """Just those that change nothing, once a text."""
    tower = encoders.TextEncoder(spec)
    text = " ".join(f"word{i}" if i % 7 else "hemidiaphragm," for i in range(60))
    cut = tower.beyond(text)
    read = text.removesuffix(cut)
    assert cut and read != text and tower.beyond(read) == "" == tower.beyond("short") == tower.beyond("")
    assert torch.equal(tower.tokenizer([text]), tower.tokenizer([read + cut.split()[0] + " nothing of that"]))
    capsys.readouterr()
    for _ in range(2):
        tower.kept.clear()
        tower.tokens(text), tower.tokens(read.strip())
    said = capsys.readouterr().out
    assert torch.isfinite(tower(["M\udcfcller"])[0]).all()  # a Latin-1 byte of the command line
    assert said.count(f'"{cut}"') == 1 and said.count("cut off") == 1 and "77 tokens" in said

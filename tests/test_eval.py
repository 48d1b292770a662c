"""Evaluation: the metrics against medpy, the merging of answers, prompts, and bad input."""
import sys

import medpy.metric.binary as medpy
import numpy as np
import pytest
import torch

import eval as evaluation
from common import InputError
from data import Texts, open_dataset
from medsegr import Config, MedSegR, ModelError
from readers import ORGANS


def random_volume(rng, shape=(6, 40, 36)):
    """A label map of a few boxes."""
    label = np.zeros(shape, np.uint8)
    for i in rng.permutation(np.arange(1, 9))[:6]:
        low = [int(rng.integers(0, n - 3)) for n in shape]
        label[tuple(slice(a, a + int(rng.integers(2, max(3, n // 2)))) for a, n in zip(low, shape))] = i
    return label


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_medpys(seed):
    """Uncropped, on volumes with organs at the border, missing on one side, on the other, on both."""
    rng = np.random.default_rng(seed)
    truth, prediction = random_volume(rng), random_volume(rng)
    half = truth == prediction[:, ::-1]
    prediction[half] = truth[half]
    scores = evaluation.score_labels(prediction, truth, ORGANS)
    for i, name in enumerate(ORGANS, 1):
        a, b, s = prediction == i, truth == i, scores[name]
        if a.any() and b.any():
            assert s["dice"] == s["dice_strict"] == pytest.approx(medpy.dc(a, b), abs=1e-12)
            assert s["hd95"] == s["hd95_strict"] == pytest.approx(medpy.hd95(a, b), abs=1e-9)
        elif a.any():
            assert (s["dice"], s["hd95"]) == (1, 0) and s["dice_strict"] == 0  # TransUNet's rule
        elif b.any():
            assert (s["dice"], s["hd95"]) == (0, 0) and s["hd95_strict"] == pytest.approx(np.linalg.norm(truth.shape))
        else:
            assert (s["dice"], s["hd95"]) == (0, 0) and s["dice_strict"] is None


def test_table_is_the_mean_over_cases_then_organs():
    full = np.repeat(np.arange(9, dtype=np.uint8), 4).reshape(1, 9, 4)
    none = np.zeros_like(full)
    cases = {"a": evaluation.score_labels(full, full, ORGANS), "b": evaluation.score_labels(none, full, ORGANS)}
    table = evaluation.summarise(cases, ORGANS)
    assert table["liver"]["dice"] == 0.5 and table["mean"]["dice_strict"] == 0.5
    cases["c"] = evaluation.score_labels(none, none, ORGANS)  # strict: says nothing
    table = evaluation.summarise(cases, ORGANS)
    assert table["mean"]["dice"] == pytest.approx(1 / 3) and table["mean"]["dice_strict"] == 0.5


def test_the_most_certain_answer_wins():
    logits = torch.full((3, 4, 4), -1.0)
    logits[0, 0], logits[1, 0, 0], logits[2, 3] = 2.0, 3.0, 0.5
    label = evaluation.label_map(["right kidney", "liver", "pancreas"], logits, (4, 4), ORGANS)
    assert label[0].tolist() == [5, 2, 2, 2] and label[3].tolist() == [8] * 4 and not label[1:3].any()
    assert evaluation.label_map(["right kidney", "liver", "pancreas"], logits, (9, 6), ORGANS).shape == (9, 6)
    assert not evaluation.label_map([], torch.zeros(0, 4, 4), (5, 5), ORGANS).any()


@pytest.fixture(scope="module")
def small():
    return MedSegR(Config(image_size=64, feature_grid=8)).eval()


def test_prompts_ask_for_what_is_there_and_do_not_depend_on_order(small):
    dataset, texts = open_dataset("demo", split="test", image_size=64, limit=4), Texts("demo")
    features = [small.encode_image(torch.from_numpy(s.image).permute(2, 0, 1)[None]) for s in dataset]
    asks = lambda i, prompt, seed=0: evaluation.ask(small, features[i], dataset[i], texts, prompt, 3, seed)
    for prompt in ("none", "point", "box"):
        forward = [asks(i, prompt) for i in range(4)]
        for i in reversed(range(4)):
            asked, logits = asks(i, prompt)
            present = [t for t, mask in zip(dataset[i].targets, dataset[i].masks) if mask.any()]
            assert set(asked) == set(ORGANS) if prompt == "none" else asked == present
            assert logits.shape == (len(asked), 64, 64)
            assert torch.equal(logits, forward[i][1])
    assert not torch.equal(asks(0, "point")[1], asks(0, "point", seed=1)[1])


def test_lite_medsam_on_real_ct(real_data, tmp_path):
    """The untouched backbone with boxes, on real slices: wrong preprocessing or coordinates would show here."""
    sys.path.insert(0, str(real_data))
    from layout import EIGHT, case
    image, label, _ = case("0010")
    lut = np.zeros(14, np.uint8)
    lut[list(EIGHT)] = list(EIGHT.values())
    import h5py
    (tmp_path / "test_vol_h5").mkdir()
    with h5py.File(tmp_path / "test_vol_h5/case0010.npy.h5", "w") as f:
        f["image"], f["label"] = image[60:100:10] / np.float32(255), lut[label[60:100:10]]
    dataset = open_dataset("synapse", tmp_path, "test", 256)
    model = MedSegR(Config(branches=("sam",))).eval()
    cases, _ = evaluation.evaluate(evaluation.Predictor(model, Texts("synapse"), "box"), dataset, progress=False)
    table = evaluation.summarise(cases, ORGANS)
    assert table["mean"]["dice_strict"] > 0.85, table


@pytest.mark.parametrize("flags,named", [
    (["--checkpoint", "out"], "--image-size"), (["--prompt", "none"], "--prompt none"),
    (["--dataset", "brats"], "--dataset brats"), (["--dataset", "synapse", "--data", "/no/data"], "/no/data"),
    (["--prompt", "lasso"], "--prompt lasso"), (["--points", "0"], "--points 0"), (["--limit", "x"], "--limit"),
    (["--split", "dev"], "dev"), (["--json", "/proc/x/y.json"], "/proc/x"), (["--plots", "/proc/x"], "/proc/x"),
    (["--backbone", "vgg"], "--backbone"), (["--precision", "fp8"], "--precision fp8")])
def test_bad_flags_are_named(flags, named, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", "sam", "--prompt", "box", "--image-size", "64",
                                      "--limit", "1", "--cache", "none", *flags])
    with pytest.raises((InputError, ModelError)) as e:
        evaluation.main()
    assert named in str(e.value)


def test_nothing_trained_yet_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(InputError, match="python train.py"):
        evaluation.main()


def test_a_missing_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", str(tmp_path / "missing")])
    with pytest.raises(ModelError, match="missing.*train.py"):
        evaluation.main()


def test_the_newest_checkpoint_is_taken(tmp_path):
    import os
    for age, name in ((100, "old/last"), (50, "new/best"), (80, "last")):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
        os.utime(file, (1e9 - age,) * 2)
    assert evaluation.newest_checkpoint(tmp_path) == tmp_path / "new"

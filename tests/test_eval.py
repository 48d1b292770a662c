"""Evaluation: the metrics against medpy, the merging of answers, prompts, and bad input."""
import json
import os
import subprocess
import sys

import medpy.metric.binary as medpy
import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from common import InputError
from conftest import ROOT
from data import Texts, open_dataset
from medsegr import Config, MedSegR
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


def scores_of(cases):
    """{case: {class: score()}} -> Scores"""
    scores = evaluation.Scores()
    for i, (case, classes) in enumerate(cases.items()):
        for name, numbers in classes.items():
            scores.add(i, case, name, "ct", numbers)
    return scores


def test_table_is_the_mean_over_cases_then_organs():
    full = np.repeat(np.arange(9, dtype=np.uint8), 4).reshape(1, 9, 4)
    none = np.zeros_like(full)
    cases = {"a": evaluation.score_labels(full, full, ORGANS), "b": evaluation.score_labels(none, full, ORGANS)}
    summarise = lambda: evaluation.summarise(scores_of(cases), scores_of(cases).name)
    table = summarise()
    assert table["liver"]["dice"] == 0.5 and table["mean"]["dice_strict"] == 0.5 and table["liver"]["cases"] == 2
    low, high = table["liver"]["ci_strict"]
    assert low == 0 and high == 1 and table["mean"]["ci_strict"] == (low, high)
    cases["c"] = evaluation.score_labels(none, none, ORGANS)  # strict: says nothing
    table = summarise()
    assert table["mean"]["dice"] == pytest.approx(1 / 3) and table["mean"]["dice_strict"] == 0.5
    assert table["mean"]["cases"] == 3 and "hd95_mm" not in table["mean"]


def test_an_empty_table():
    table = evaluation.summarise(evaluation.Scores(), [])
    assert table["mean"]["dice_strict"] is None and table["mean"]["cases"] == 0
    evaluation.print_table(table, "nothing")


def test_means_of_groups_equal_plain_loops():
    """Modalities over targets, several per image and case, some without a value: against a loop in float64."""
    rng, scores = np.random.default_rng(0), evaluation.Scores()
    for i in range(60):
        for _ in range(rng.integers(1, 4)):
            value = None if rng.random() < 0.2 else float(rng.random())
            scores.add(i, f"case{i // 3}", "x", ("ct", "mr", "pet")[rng.integers(3)], dict(dice_strict=value))
    table = evaluation.summarise(scores, scores.modality)
    means = []
    for m in dict.fromkeys(scores.modality):
        values = [v for v, name in zip(scores["dice_strict"], scores.modality) if name == m and v == v]
        means.append(sum(values) / len(values))
        assert table[m]["dice_strict"] == pytest.approx(means[-1], abs=1e-12)
        low, high = table[m]["ci_strict"]
        assert low < means[-1] < high
    assert table["mean"]["dice_strict"] == pytest.approx(sum(means) / 3, abs=1e-12)


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
    predictor = evaluation.Predictor(model, Texts("synapse"), "box")
    (tmp_path / "spacing.json").write_text('{"case0010": [3.0, 2.0, 2.0]}')
    volumes, targets = evaluation.evaluate(predictor, dataset, progress=False)
    table = evaluation.summarise(volumes, volumes.name)
    assert table["mean"]["dice_strict"] > 0.85, table
    # millimetres: of the same borders
    mm = evaluation.summarise(volumes, volumes.name)["mean"]["hd95_strict_mm"]
    assert table["mean"]["hd95_strict"] < mm < 3.1 * table["mean"]["hd95_strict"]
    # the slices' structures, each with what figure 3 needs
    assert 0 < len(targets) == sum(len(dataset[i].targets) for i in range(len(dataset)))
    assert (targets["area"] > 0).all() and targets["overlap"].max() > 0.2 and np.isnan(targets["hd95"]).all()


@pytest.mark.parametrize("flags,named", [
    (["--checkpoint", "out"], "--image-size"), (["--prompt", "none"], "--prompt none"),
    (["--dataset", "brats"], "--dataset brats"), (["--dataset", "synapse", "--data", "/no/data"], "/no/data"),
    (["--prompt", "lasso"], "--prompt lasso"), (["--points", "0"], "--points 0"), (["--limit", "x"], "--limit"),
    (["--split", "dev"], "dev"), (["--json", "/proc/x/y.json"], "/proc/x"), (["--plots", "/proc/x"], "/proc/x"),
    (["--backbone", "vgg"], "--backbone"), (["--precision", "fp8"], "--precision fp8"),
    (["--text", "loud"], "--text loud"), (["--beside", "sam"], "--plots"), (["--", "--lr", "1"], "--tables"),
    (["--dataset", "kvasir", "--data", "tests", "--text", "wrong"], "tests"),
    (["--tables", "9"], "--tables 9"), (["--tables", "none.json"], "none.json")])
def test_bad_flags_are_named(flags, named, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", "sam", "--prompt", "box", "--image-size", "64",
                                      "--limit", "1", "--cache", "none", *flags])
    with pytest.raises(InputError) as e:
        evaluation.main()
    assert named in str(e.value)


def test_nothing_trained_yet_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(InputError, match="python train.py"):
        evaluation.main()


def test_a_missing_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", str(tmp_path / "missing")])
    with pytest.raises(InputError, match="missing.*train.py"):
        evaluation.main()


def test_the_newest_checkpoint_is_taken(tmp_path):
    import os
    for age, name in ((100, "old/last"), (50, "new/best"), (80, "last")):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
        os.utime(file, (1e9 - age,) * 2)
    assert evaluation.newest_checkpoint(tmp_path) == tmp_path / "new"


def test_texts_otherwise_than_they_should_be():
    texts, pairs = Texts("demo"), [(name, "ct") for name in ORGANS]
    own = [texts(name, "ct") for name in ORGANS]
    assert [evaluation.Rephrased(texts, "wrong", pairs)(name, "ct") for name in ORGANS] == own[1:] + own[:1]
    reworded = [evaluation.Rephrased(texts, "reworded", pairs)(name, "ct") for name in ORGANS]
    assert all(a[k] != b[k] and b[k] in texts.wordings(n, "ct", k) for n, a, b in zip(ORGANS, own, reworded) for k in a)
    assert set(evaluation.Rephrased(texts, "empty", pairs)("liver", "ct").values()) == {""}
    with pytest.raises(InputError, match="--text wrong"):
        evaluation.Rephrased(Texts("kvasir"), "wrong", [("polyp", "endoscopy")])


class Noise:
    """A predictor that guesses, the same for the same sample; dies after `lives` images."""
    prompt, lives = "none", 10 ** 9

    def prepare(self, sample):
        return sample

    def __call__(self, sample):
        self.lives -= 1
        if self.lives < 0:
            raise KeyboardInterrupt
        rng = torch.Generator().manual_seed(int(sample.masks.sum()))
        names = [*sample.targets, *sample.absent]
        return names, torch.randn(len(names), 16, 16, generator=rng) - 1


def test_a_killed_evaluation_goes_on(tmp_path):
    """Killed again and again, on other numbers of processes, with a torn last line: the same scores."""
    dataset = open_dataset("demo", split="test", image_size=64, limit=9)
    whole = evaluation.evaluate(Noise(), dataset, progress=False)
    assert sorted(set(whole[1].row)) == list(range(9)) and len(whole[0]) == 72
    path, asked = tmp_path / "x.json", 0
    for world, rank in ((1, 0), (2, 1), (3, 2), (1, 0)):
        predictor = Noise()
        predictor.lives = 10 ** 9 if asked == 3 else 2
        journal = evaluation.Journal(path, rank, "these settings")
        journal.begin()
        try:  # what evaluate() does on one rank
            for first, end in evaluation.cases_of(dataset)[rank::world]:
                if first not in journal.done:
                    journal.add(first, *evaluation.evaluate_case(predictor, dataset, first, end))
        except KeyboardInterrupt:
            journal.file.write('{"first": 8, "volu')
        journal.file.close()
        asked += 1
    journal = evaluation.Journal(path, 0, "these settings")
    assert journal.done == set(range(9))
    again = evaluation.evaluate(Noise(), dataset, journal, progress=False)
    assert [scores.columns(str) for scores in again] == [scores.columns(str) for scores in whole]
    assert evaluation.Journal(path, 0, "other settings").done == set()
    journal.remove()
    assert not list(tmp_path.glob("*.partial"))


def test_processes_find_the_same_numbers(tmp_path, small):
    """The command with torchrun on two processes, and on one; volumes would be shared out in the same way."""
    from medsegr import save_checkpoint
    save_checkpoint(small, tmp_path / "last.safetensors", dataset="demo")
    flags = [str(ROOT / "eval.py"), "--checkpoint", str(tmp_path), "--prompt", "none", "--limit", "5", "--cache", "none"]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    for name, launch in (("one", ["-W", "ignore"]), ("two", ["-m", "torch.distributed.run", "--standalone",
                                                             "--nproc_per_node", "2"])):
        run = subprocess.run([sys.executable, *launch, *flags, "--json", str(tmp_path / f"{name}.json")], env=env,
                             text=True, capture_output=True)
        assert run.returncode == 0, run.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two and len(one["volumes"]["case"]) == 40 and not list(tmp_path.glob("*.partial"))


def test_pictures_of_two_models(tmp_path, small, monkeypatch, capsys):
    """Best, median and worst case by rule, with SAM beside; the scores name the rows."""
    from medsegr import save_checkpoint
    save_checkpoint(small, tmp_path / "last.safetensors", dataset="demo")
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", str(tmp_path), "--prompt", "box", "--limit", "3",
                                      "--cache", "none", "--plots", str(tmp_path / "p"), "--beside", "sam"])
    evaluation.main()
    picture = Image.open(tmp_path / "p/demo-box.png")
    assert picture.size[0] > 1200 and "strict Dice" in capsys.readouterr().out
    scores = evaluation.Scores()
    for row, dice in enumerate((0.2, 0.9, None, 0.5)):
        scores.add(row, f"c{row}", "liver", "ct", dict(dice_strict=dice))
    assert evaluation.typical(scores) == [("best case", 0.9, 1), ("median case", 0.5, 3), ("worst case", 0.2, 0)]
    part = scores.where(lambda i: i == 3)
    assert evaluation.typical(part) == [("best case", 0.5, 3)] and evaluation.typical(evaluation.Scores()) == []

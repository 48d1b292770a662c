"""Training: the loss, the batches, resuming, several processes, and that the texts steer."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from conftest import ROOT
from common import InputError, seeded
from data import Batch, Texts, open_dataset
from medsegr import Config, MedSegR, ModelError, load_checkpoint

QUICK = ["--dataset", "demo", "--image-size", "64", "--batch-size", "2", "--limit", "8", "--val-slices", "2"]


def python(*args, env=None, **kwargs):
    """Runs a script of the repository in a process of its own."""
    return subprocess.run([sys.executable, "-W", "ignore", *map(str, args)], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, **(env or {})}, **kwargs)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


# ---------------------------------------------------------------------------------------------------------------------

def test_loss_is_its_formula():
    logits, masks = torch.randn(3, 8, 8, dtype=torch.float64), torch.rand(3, 8, 8) > 0.5
    masks[2] = False
    logits[2] = -3
    iou = torch.rand(3, dtype=torch.float64)
    focal = dice = error = 0.0
    for m in range(3):
        p, t = logits[m].sigmoid(), masks[m].double()
        positive = -0.25 * (1 - p) ** 2 * p.log() * t
        negative = -0.75 * p ** 2 * (1 - p).log() * (1 - t)
        focal += (positive + negative).mean() / 3
        dice += (1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)) / 3
        union = ((p > 0.5) | masks[m]).sum()
        true = ((p > 0.5) & masks[m]).sum() / union if union else 1.0  # rightly empty
        error += (iou[m] - true) ** 2 / 3
    loss, parts = train.segmentation_loss(logits, iou, masks)
    for ours, theirs in ((parts["focal"], focal), (parts["dice"], dice), (parts["iou"], error),
                         (loss, 20 * focal + dice + error)):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


def test_a_step_without_targets_changes_nothing():
    """Images of which every mask is too small leave nothing to ask for; the mean of nothing would be NaN for good."""
    model = MedSegR(Config(image_size=64, feature_grid=8))
    empty = torch.zeros(0, 64, 64, dtype=torch.bool)
    logits, iou = model(None, torch.zeros(0, dtype=torch.int64), [], features=torch.randn(2, 256, 8, 8))
    loss, parts = train.segmentation_loss(logits, iou, empty)
    loss.backward()
    assert loss.item() == 0 and all(float(part) == 0 for part in parts.values())
    assert all(p.grad is None or not p.grad.any() for p in model.trained().values())


@pytest.mark.parametrize("seed", range(5))
def test_jitter_moves_features_and_masks_alike(seed):
    """Where the features are the image of the masks they still are after it."""
    x, y = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy")
    masks = torch.stack([((x - a) / 16) ** 2 + ((y - b) / 11) ** 2 < 1 for a, b in ((25, 30), (38, 33), (30, 40))])
    index = torch.tensor([0, 1, 0])
    features = F.avg_pool2d(torch.stack([masks[[0, 2]].float(), masks[[1, 1]].float()]), 2)
    batch = Batch(None, index, masks, [{}] * 3, ["a", "b", "c"])
    moved, after = train.jitter(features, batch, np.random.default_rng(seed), 0.1)
    for m, (b, c) in enumerate(((0, 0), (1, 0), (0, 1))):
        from_features = F.interpolate(moved[b, c][None, None], (64, 64), mode="bilinear")[0, 0] > 0.5
        overlap = 2 * (from_features & after.masks[m]).sum() / (from_features.sum() + after.masks[m].sum())
        assert overlap > 0.95 and not torch.equal(after.masks[m], masks[m])
    same, unmoved = train.jitter(features, batch, np.random.default_rng(seed), 0.0)
    torch.testing.assert_close(same, features, atol=1e-4, rtol=1e-4)
    assert torch.equal(unmoved.masks, masks)


def test_learning_rate_rises_and_falls():
    rates = [train.learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0 < rates[-1] < 0.05
    assert rates[55] == pytest.approx(0.5 ** 0.9)


class Numbers(list):
    """A data set whose samples are their numbers, with the view that is asked for."""

    def __init__(self, n):
        super().__init__(range(n))

    def view(self, i, number, texts):
        return i if texts is None else (i, number)


@pytest.mark.parametrize("n,batch,world", [(10, 3, 1), (10, 3, 2), (7, 2, 4), (12, 4, 3), (5, 8, 2)])
def test_an_epoch_visits_every_sample_once(n, batch, world):
    ranks = [train.Batches(Numbers(n), batch, rank, world, seed=1, first=0, last=0) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        steps = [[r[epoch * r.per_epoch + i] for i in range(r.per_epoch)] for r in ranks]
        seen = [x for rank in steps for rows in rank for x in rows]
        assert all(rows for rank in steps for rows in rank), "a rank without a batch would make the others wait"
        assert set(seen) == set(range(n)) and len(seen) <= n + world
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_views_take_turns():
    """With two views an image comes as it is and in each of its variations within three epochs."""
    batches = train.Batches(Numbers(6), 3, 0, 1, seed=1, first=0, last=6, views=2, texts="texts")
    seen = [sample for i in range(6) for sample in batches[i]]
    assert sorted(seen) == [(i, view) for i in range(6) for view in range(3)]
    assert {view for _, view in seen[:6]} == {0, 1, 2}  # not all of them the same in one epoch


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, cache_folder):
    flags = [*QUICK, "--feature-grid", "8", "--prompt", "mixed", "--workers", "0", "--cache", str(cache_folder)]
    for out, rounds in (("whole", [[]]), ("parts", [["--stop", "4"], ["--resume"]])):
        for extra in rounds:
            argv = ["train.py", *flags, "--max-steps", "8", "--out", str(tmp_path / out)]
            stop = None
            if extra[:1] == ["--stop"]:
                stop, extra = int(extra[1]), []
            run_main(train, argv + extra, stop_after=stop)
    whole, parts = (load_file(tmp_path / out / "last.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    log = (tmp_path / "parts" / "log.csv").read_text().splitlines()
    steps = [line.split(",")[0] for line in log[1:] if line.split(",")[3]]
    assert steps == sorted(set(steps), key=int) and steps[-1] == "8"


class Killed(Exception):
    pass


def run_main(module, argv, stop_after=None):
    """main() with a command line; stop_after: dies, as if killed, at the beginning of a step."""
    before, rate = sys.argv, train.learning_rate

    def maybe_die(step, *rest):
        if step == stop_after:
            raise Killed
        return rate(step, *rest)
    try:
        sys.argv, train.learning_rate = argv, maybe_die
        module.main()
        assert stop_after is None
    except Killed:
        pass
    finally:
        sys.argv, train.learning_rate = before, rate


def test_two_processes(tmp_path, cache_folder):
    """torchrun on CPUs with gloo: both ranks train and the result is one model."""
    done = python("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29000 + os.getpid() % 1000,
                  "train.py", *QUICK, "--feature-grid", 8, "--max-steps", 3, "--workers", 0, "--out", tmp_path,
                  "--cache", cache_folder, env=dict(OMP_NUM_THREADS="1"), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 process(es) on cpu" in done.stdout and done.stdout.count("best validation Dice") == 1
    model, record = load_checkpoint(tmp_path)
    assert record["step"] == 2 or record["step"] == 3
    assert not list(tmp_path.glob("*.part"))


# ---------------------------------------------------------------------------------------------------------------------
# The texts steer

@pytest.fixture(scope="session")
def demo_run(tmp_path_factory, cache_folder):
    """A model trained as in `make demo`, two or three minutes, without prompts."""
    out = tmp_path_factory.mktemp("demo")
    done = python("train.py", "--dataset", "demo", "--image-size", 128, "--feature-grid", 16, "--batch-size", 8,
                  "--max-steps", 160, "--warmup", 20, "--cache", cache_folder, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def dice(a, b):
    return float(2 * (a & b).sum() / max(1, int(a.sum() + b.sum())))


@torch.no_grad()
def answers(model, text_of, asked_for):
    """Mean Dice of what the texts of `text_of` find with the masks of `asked_for`, over demo images with both."""
    dataset = open_dataset("demo", split="test", image_size=model.config.image_size, limit=16)
    texts, values = Texts("demo"), []
    for sample in dataset:
        if text_of in sample.targets and asked_for in sample.targets:
            features = model.encode_image(torch.from_numpy(sample.image).permute(2, 0, 1)[None])
            priors = model.encode_attributes([texts(text_of, "ct")])
            logits = model.decode(features, torch.tensor([0]), priors)[0]
            logits = F.interpolate(logits[None], sample.masks.shape[-2:], mode="bilinear")[0, 0]
            values.append(dice(logits.numpy() > 0, sample.masks[sample.targets.index(asked_for)]))
    return float(np.mean(values))


def test_the_text_decides_what_is_found(demo_run):
    """In the liver's place, the spleen's text finds the spleen and not the liver; and the other way round."""
    model, _ = load_checkpoint(demo_run / "last.safetensors")
    found = {(t, o): answers(model, t, o) for t in ("liver", "spleen") for o in ("liver", "spleen")}
    print(found)
    assert found["liver", "liver"] > 0.7 and found["liver", "spleen"] < 0.1
    assert found["spleen", "spleen"] > 0.5 and found["spleen", "liver"] < 0.1


def test_evaluation_of_the_demo(demo_run, tmp_path, cache_folder):
    """The table, its JSON and the picture; and what an untrained model cannot do."""
    out = tmp_path / "new folder" / "table.json"
    done = python("eval.py", "--checkpoint", demo_run / "last.safetensors", "--json", out,
                  "--plots", tmp_path / "plots", "--cache", cache_folder)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["dataset"] == "demo" and result["prompt"] == "none" and len(result["cases"]) == 32
    assert result["table"]["liver"]["dice_strict"] > 0.5 and result["table"]["mean"]["dice_strict"] > 0.25
    assert f"{result['table']['liver']['dice']:.4f}" in done.stdout
    picture = (tmp_path / "plots" / "demo-none.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("flags,named", [
    (["--dataset", "brats"], "--dataset brats"), (["--dataset", "synapse", "--data", "/no/such"], "/no/such"),
    (["--prompt", "scribble"], "--prompt scribble"), (["--backbone", "vgg"], "--backbone vgg"),
    (["--fraction", "0"], "--fraction 0"), (["--max-steps", "0"], "--max-steps 0"), (["--lr", "-1"], "--lr -1"),
    (["--priors", "colour"], "--priors colour"), (["--batch-size", "two"], "--batch-size"), (["--what"], "--what"),
    (["--branches", "sem", "--no-cognitive"], "--branches sem"), (["--image-size", "33"], "--image-size 33"),
    (["--sam-checkpoint", "/no/file.pth"], "/no/file.pth"), (["--clip", "nonsense:x"], "--clip nonsense:x"),
    (["--precision", "int8"], "--precision int8"), (["--out", "/proc/none"], "/proc"),
    (["--resume"], "training.safetensors"), (["--attributes-file", "/no/texts.json"], "/no/texts.json")])
def test_bad_flags_are_named(flags, named, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *QUICK, "--cache", "none", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises((InputError, ModelError)) as e:
        train.main()
    assert named in str(e.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_exit_status_and_one_line(tmp_path):
    done = python("train.py", "--dataset", "brats")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "demo, synapse" in done.stderr


def test_damaged_training_state_is_named(tmp_path):
    (tmp_path / "training.safetensors").write_bytes(b"damaged")
    model = MedSegR(Config(branches=("sam",), image_size=64))
    optimizer = torch.optim.AdamW(model.trained().values())
    with pytest.raises(InputError, match="damaged"):
        train.load_training(tmp_path / "training.safetensors", model, optimizer)


def test_steps_draw_the_same_whatever_came_before():
    assert seeded("step", 0, 5, 1).random() == seeded("step", 0, 5, 1).random() != seeded("step", 0, 5, 0).random()

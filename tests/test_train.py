"""Training: the loss, the batches, resuming, several processes, and that the texts steer."""
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import losses
import train
from conftest import ROOT
from common import LIGHT, InputError, Signals
from data import open_dataset
from inference import Predictor
from losses import segmentation_loss
from medsegr import Config, MedSegR
from runs import load_checkpoint, read_log
from texts import Texts

QUICK = ["--dataset", "demo", "--light", "--image-size", "64", "--batch-size", "2", "--limit", "8", "--val-slices", "2"]


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
    loss, parts = segmentation_loss(logits, iou, masks)
    for ours, theirs in zip((*parts, loss), (focal, dice, error, 20 * focal + dice + error)):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4)
    of_more, _ = segmentation_loss(logits, iou, masks, count=12, weights=(3, 2, 1))
    assert float(of_more) == pytest.approx(float(3 * focal + 2 * dice + error) / 4, rel=1e-4)


def test_a_step_without_targets_changes_nothing():
    """Images of which every mask is too small leave nothing to ask for; the mean of nothing would be NaN for good."""
    model = MedSegR(Config(**LIGHT, image_size=64, feature_grid=8))
    empty = torch.zeros(0, 64, 64, dtype=torch.bool)
    logits, iou = model.decode(torch.randn(2, 256, 8, 8), torch.zeros(0, dtype=torch.int64), model.encode_attributes([]))
    loss, parts = segmentation_loss(logits, iou, empty)
    loss.backward()
    assert loss.item() == 0 and not parts.any()
    assert all(p.grad is None or not p.grad.any() for p in model.trained().values())


def test_learning_rate_rises_and_falls():
    rates = [train.learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0 < rates[-1] < 0.05
    assert rates[55] == pytest.approx(0.5 ** 0.9)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

TINY = [*QUICK, "--feature-grid", "4", "--branches", "sem", "sam", "--priors", "--epochs", "3", "--rounds", "2",
        "--align", "--val-every", "3", "--prompt", "mixed", "--save-minutes", "0"]  # 12 steps, all saved


def log_rows(out):
    with open(out / "log.csv") as f:
        return [{k: row[k] for k in ("step", "loss", "focal", "dice", "iou", "dense", "contrast", "val_dice", "val_dice_held")} for row in csv.DictReader(f)]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, cache_folder):
    out = tmp_path_factory.mktemp("undisturbed")
    started = time.time()
    done = python("train.py", *TINY, "--cache", cache_folder, "--out", out, env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    return out, time.time() - started


def same_weights(a, b, name="last.safetensors"):
    a, b = load_file(a / name), load_file(b / name)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_killed_twenty_times_it_ends_in_the_same_bits(undisturbed, tmp_path, cache_folder):
    """SIGKILL, twenty times in one run: in the middle of steps, of writing checkpoints and of validation."""
    whole, _ = undisturbed
    done = python("tests/killed.py", 20, *TINY, "--cache", cache_folder, "--out", tmp_path,
                  env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kills = re.findall(r"^killed at .*", done.stdout, re.MULTILINE)
    assert len(kills) == 20 and len(set(kills)) > 5, kills
    assert same_weights(whole, tmp_path) and same_weights(whole, tmp_path, "best.safetensors")
    assert log_rows(whole) == log_rows(tmp_path)
    assert len(json.loads((tmp_path / "run.json").read_text())["runs"]) >= 2


@pytest.mark.parametrize("number, group", [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_saves_first(number, group, undisturbed, tmp_path, cache_folder):
    """It ends soon, says where, and goes on to the same bits; also where the signal goes to the loader's processes too,
    and to the main one twice, as `timeout` and batch systems send it."""
    whole, seconds = undisturbed
    flags = [*TINY, "--save-minutes", "100", "--cache", cache_folder, "--out", tmp_path]
    run = subprocess.Popen([sys.executable, "-W", "ignore", "train.py", *map(str, flags)], cwd=ROOT, text=True,
                           stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    while not (tmp_path / "log.csv").is_file() or "\n3," not in (tmp_path / "log.csv").read_text():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.send_signal(number)
    if group:
        os.killpg(run.pid, number)
    message = run.stderr.read().splitlines()[-1]
    assert run.wait(60) == 128 + number and signal.Signals(number).name in message and "--resume" in message, message
    assert "Traceback" not in message
    done = python("train.py", *flags, "--resume", env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and "resumed at step" in done.stdout, done.stderr[-2000:]
    assert same_weights(whole, tmp_path) and log_rows(whole) == log_rows(tmp_path)


def test_two_processes_train_what_one_does(undisturbed, tmp_path, cache_folder):
    """torchrun on CPUs with gloo, half the batch each: the loss, the weights, the validation of one, to rounding."""
    whole, _ = undisturbed
    done = python("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29000 + os.getpid() % 1000,
                  "train.py", *TINY, "--batch-size", 1, "--out", tmp_path, "--cache", cache_folder,
                  env=dict(OMP_NUM_THREADS="1"), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 process(es) on cpu" in done.stdout and done.stdout.count("best validation Dice") == 1
    assert_equal_to_rounding(whole, tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_two_processes_tune_the_encoder_as_one_does(tmp_path):
    """Three images in batches of two: in every other step the second process has none, and must not wait for ever."""
    flags = [*QUICK, "--limit", "3", "--feature-grid", "4", "--branches", "sam", "--tune-encoder", "lora",
             "--max-steps", "4", "--cache", "none", "--workers", "0", "--jitter", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = python("train.py", *flags, "--out", one, env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    done = python("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 27000 + os.getpid() % 1000,
                  "train.py", *flags, "--batch-size", 1, "--out", two, env=dict(OMP_NUM_THREADS="1"), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal_to_rounding(one, two)


def test_a_second_signal_at_once_is_the_same_request(monkeypatch):
    """Later it is meant: then the handler takes it that was there before."""
    taken = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    with Signals() as signals:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert signals.seen == signal.SIGTERM and signals.name() == "SIGTERM" and not taken
        monkeypatch.setattr(time, "monotonic", lambda: signals.at + 3)
        signal.raise_signal(signal.SIGTERM)
        assert taken == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, before)


def test_another_run_starts_from_a_checkpoint(undisturbed, tmp_path, cache_folder, capsys):
    whole, _ = undisturbed
    run_main(["--max-steps", "1", "--lr", "1e-12", "--init", whole, "--cache", cache_folder, "--out", tmp_path])
    assert "of the model's" in capsys.readouterr().out
    start, end = load_file(whole / "best.safetensors"), load_file(tmp_path / "last.safetensors")
    assert all(torch.allclose(start[n], end[n], atol=1e-6) for n in start)


def test_accumulated_batches_are_one_larger_batch(undisturbed, tmp_path, cache_folder):
    whole, _ = undisturbed
    done = python("train.py", *TINY, "--batch-size", 1, "--accumulate", 2, "--out", tmp_path, "--cache", cache_folder,
                  env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal_to_rounding(whole, tmp_path)


def assert_equal_to_rounding(one, two):
    for a, b in zip(log_rows(one), log_rows(two), strict=True):
        assert a["step"] == b["step"]
        for k in a.keys() - {"step"}:
            assert (a[k] == b[k] == "") or float(a[k]) == pytest.approx(float(b[k]), rel=2e-3, abs=1e-4), (k, a, b)
    a, b = load_file(one / "last.safetensors"), load_file(two / "last.safetensors")
    for name in a:  # AdamW divides by the size of a gradient, so that rounding may turn a step where it is next to zero
        apart = (a[name] - b[name]).norm() / a[name].norm().clamp(min=1e-3)
        assert apart < 5e-3, (name, apart)


def test_a_rank_that_fails_ends_the_run(tmp_path, cache_folder):
    """One line of the reason, no hang, nothing half-written."""
    (tmp_path / "texts.json").write_text("{}")
    done = python("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 28000 + os.getpid() % 1000,
                  "tests/failing_rank.py", *TINY, "--batch-size", 1, "--out", tmp_path, "--cache", cache_folder,
                  env=dict(OMP_NUM_THREADS="1"), timeout=200)
    assert done.returncode != 0 and "slice 3: damaged" in done.stderr
    assert not list(tmp_path.glob("*.part"))


def test_nothing_to_resume_starts_anew(tmp_path, cache_folder, capsys):
    run_main(["--max-steps", "1", "--decoder-lr", "0.1", "--resume", "--cache", cache_folder, "--out", tmp_path])
    said = capsys.readouterr()
    assert "starting anew" in said.out and "--decoder-lr-scale" in said.out  # the old name works, with a word
    run_main(["--max-steps", "2", "--resume", "--lr", "0.002", "--cache", cache_folder, "--out", tmp_path])
    out = capsys.readouterr().out
    assert "resumed at step 1, with --lr 0.002 (was 0.001), --max-steps 2 (was 1)" in out or "--lr 0.002" in out
    run_main(["--max-steps", "2", "--resume", "--cache", cache_folder, "--out", tmp_path])
    assert "already trained for 2 steps" in capsys.readouterr().out
    before = (tmp_path / "training.safetensors").read_bytes()
    run_main(["--max-steps", "1", "--cache", cache_folder, "--out", tmp_path])  # without --resume: another run
    assert "held a run already" in capsys.readouterr().out
    assert (tmp_path / "training.old.safetensors").read_bytes() == before
    run_main(["--max-steps", "1", "--resume", "--cache", cache_folder, "--out", tmp_path])
    assert "already trained for 1 steps" in capsys.readouterr().out


def run_main(flags, monkeypatch=None):
    before = sys.argv
    try:
        tiny = [flag for flag in TINY if flag != "--align" or "--branches" not in flags]  # which needs T_attr
        sys.argv = ["train.py", *map(str, [*tiny, "--workers", "0", *flags])]
        train.main()
    finally:
        sys.argv = before


def test_steps_without_a_finite_gradient_are_skipped_and_counted(tmp_path, cache_folder, monkeypatch):
    loss, calls = losses.segmentation_loss, []

    def sometimes_nan(*args, **kwargs):
        calls.append(1)
        value, parts = loss(*args, **kwargs)
        return value * (float("nan") if len(calls) in bad else 1.0), parts

    monkeypatch.setattr(losses, "segmentation_loss", sometimes_nan)
    bad = {3, 4}  # both rounds of the second step
    run_main(["--max-steps", "4", "--cache", cache_folder, "--out", tmp_path])
    with open(tmp_path / "log.csv") as f:
        rows = list(csv.DictReader(f))
    assert rows[-2]["skipped"] == "1" and math.isfinite(float(rows[-2]["loss"]))
    assert all(v.isfinite().all() for v in load_file(tmp_path / "last.safetensors").values())
    before = (tmp_path / "last.safetensors").read_bytes()
    bad = range(10 ** 6)
    with pytest.raises(InputError, match="no finite gradient in the last 20 steps.*--lr"):
        run_main(["--epochs", "99", "--val-every", "1000", "--resume", "--cache", cache_folder, "--out", tmp_path])
    assert (tmp_path / "last.safetensors").read_bytes() == before
    row = read_log(tmp_path / "log.csv")[-1]  # of ten steps that were all skipped: no loss, rather than 0
    assert row["step"] == 20 and math.isnan(row["loss"])


def test_a_full_disk_is_said_at_the_start_and_harms_nothing(tmp_path, cache_folder, monkeypatch):
    run_main(["--max-steps", "1", "--cache", cache_folder, "--out", tmp_path])
    before = {f.name: f.read_bytes() for f in tmp_path.glob("*.safetensors")}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 10 ** 9 - 1000, 1000))
        with pytest.raises(InputError, match="make room"):
            run_main(["--max-steps", "2", "--resume", "--cache", cache_folder, "--out", tmp_path])
    # full only later: the system refuses files of more than 1 MB
    done = python("-c", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); import train; from "
                  "common import run; run(train.main)", *TINY, "--max-steps", 2, "--resume",
                  "--cache", cache_folder, "--out", tmp_path)
    assert done.returncode == 2 and "training.safetensors" in done.stderr.splitlines()[-1], done.stderr[-500:]
    assert {f.name: f.read_bytes() for f in tmp_path.glob("*.safetensors")} == before
    assert not list(tmp_path.glob("*.part"))


def test_record_of_a_run(undisturbed):
    out, _ = undisturbed
    record = json.loads((out / "run.json").read_text())["runs"]
    assert len(record) == 1 and record[0]["arguments"]["rounds"] == 2 and record[0]["packages"]["torch"]
    assert len(record[0]["data"]) == 32 and record[0]["processes"] == 1
    rows = read_log(out / "log.csv")
    assert all(r["images_per_s"] > 0 and r["memory_mb"] > 100 for r in rows if "loss" in r)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_ten_real_slices_are_learnt_by_heart(linked, tmp_path, cache_folder):
    """Two to three minutes. What does not fit its training images to the last pixels has an error somewhere."""
    root, flags = linked("sa-med2d-mini"), ["--limit", "10", "--image-size", "64"]
    done = python("train.py", "--light", "--dataset", "sa-med2d", "--data", root, *flags, "--prompt", "box", "--batch-size", 10,
                  "--targets", 2, "--jitter", 0, "--weight-decay", 0, "--contrastive-loss", 0, "--lr", 2e-3,
                  "--decoder-lr-scale", 1, "--warmup", 10, "--max-steps", 150, "--val-every", 1000, "--val-slices", 1,
                  "--cache", cache_folder, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    model, _ = load_checkpoint(tmp_path / "last.safetensors")
    dataset, found = open_dataset("sa-med2d", root, "train", 64, limit=10), []
    predictor = Predictor(model, Texts("sa-med2d"), "box")
    for i in range(10):
        sample = dataset[i]
        names, logits = predictor(sample)
        for logit, mask in zip(logits.numpy(), sample.masks[sample.masks.any((1, 2))], strict=True):
            found.append(dice(logit > 0, mask))
    assert len(found) >= 10 and np.mean(found) >= 0.98, found


@pytest.mark.parametrize("how", ["lora", "all"])
def test_the_encoder_can_be_tuned(how, tmp_path):
    """It starts as the frozen one, changes, and comes back from its checkpoint."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    run_main(["--max-steps", "2", "--warmup", "1", "--tune-encoder", how, "--branches", "sam", "--cache", "none",
              "--out", tmp_path])
    frozen = MedSegR(Config(**LIGHT, branches=("sam",), image_size=64, feature_grid=4)).eval()
    start = MedSegR(Config(**LIGHT, branches=("sam",), image_size=64, feature_grid=4, tune_encoder=how)).eval()
    tuned, _ = load_checkpoint(tmp_path)
    with torch.no_grad():
        same, other = frozen.encode_image(images), tuned.encode_image(images)
        torch.testing.assert_close(start.encode_image(images), same)
    assert (other - same).abs().max() > 1e-5
    assert len({m.features_key() for m in (frozen, start, tuned)}) == 3
    names = [n for n in tuned.trained() if n.startswith("sam.image_encoder.")]
    share = sum(tuned.trained()[n].numel() for n in names)
    share /= sum(p.numel() for p in tuned.sam.image_encoder.parameters())
    assert (share > 0.99) if how == "all" else (0 < share < 0.05)


def test_the_dense_map_alone_learns_without_targets(tmp_path, cache_folder):
    """--targets 0: what decodes masks stays as it was, to the last bit; and it starts another run."""
    flags = ["--prompt", "none", "--cache", cache_folder, "--adapter", "--drop-words", "0.3"]
    run_main([*flags, "--max-steps", "1", "--lr", "1e-12", "--out", tmp_path / "still"])
    run_main([*flags, "--max-steps", "3", "--targets", "0", "--out", tmp_path / "dense"])
    before, after = (load_file(tmp_path / out / "last.safetensors") for out in ("still", "dense"))
    moved = {name.split(".")[0] for name in after if (after[name] - before[name]).abs().max() > 1e-6}
    assert moved == {"adapter", "align", "cognitive"}
    assert torch.equal(after["align.to_mask.weight"], torch.zeros_like(after["align.to_mask.weight"]))
    rows = [r for r in read_log(tmp_path / "dense" / "log.csv") if "loss" in r]
    assert rows and all(r["dense"] > 0 and r["dice"] == 0 for r in rows)
    run_main([*flags, "--max-steps", "4", "--targets", "0", "--resume", "--out", tmp_path / "dense"])
    run_main([*flags, "--max-steps", "2", "--init", tmp_path / "dense", "--out", tmp_path / "masks"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains(precision, tmp_path, cache_folder):
    run_main(["--max-steps", "2", "--precision", precision, "--cache", cache_folder, "--out", tmp_path])
    rows = [r for r in read_log(tmp_path / "log.csv") if "loss" in r]
    assert all(math.isfinite(r["loss"]) for r in rows) and rows[-1]["skipped"] < 2
    assert all(v.dtype == torch.float32 for v in load_file(tmp_path / "last.safetensors").values())


# ---------------------------------------------------------------------------------------------------------------------
# The texts steer

@pytest.fixture(scope="session")
def demo_run(tmp_path_factory, cache_folder):
    """A model trained as in `make demo`, but for fewer steps: two or three minutes, without prompts."""
    out = tmp_path_factory.mktemp("demo")
    done = python("train.py", "--dataset", "demo", "--light", "--image-size", 128, "--feature-grid", 16, "--batch-size", 8,
                  "--max-steps", 100, "--warmup", 20, "--val-every", 100, "--cache", cache_folder, "--out", out)
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
    for text, other in (("liver", "spleen"), ("spleen", "liver")):  # after a run this short, rounding moves them by 0.1
        assert found[text, text] > 0.5 and found[text, other] < found[text, text] / 3


def test_evaluation_of_the_demo(demo_run, tmp_path, cache_folder):
    """The table, its JSON and the picture; and what an untrained model cannot do."""
    out = tmp_path / "new folder" / "table.json"
    done = python("eval.py", "--checkpoint", demo_run / "last.safetensors", "--json", out,
                  "--plots", tmp_path / "plots", "--cache", cache_folder)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["dataset"] == "demo" and result["prompt"] == "none" and len(set(result["volumes"]["case"])) == 32
    assert result["table"]["liver"]["dice_strict"] > 0.5 and result["table"]["mean"]["dice_strict"] > 0.25
    assert f"{result['table']['liver']['dice']:.4f}" in done.stdout
    picture = (tmp_path / "plots" / "demo-none.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("flags,named", [
    (["--dataset", "brats"], "--dataset brats"), (["--dataset", "synapse", "--data", "/no/such"], "/no/such"),
    (["--prompt", "scribble"], "--prompt"), (["--backbone", "vgg"], "--backbone vgg"),
    (["--fraction", "0"], "--fraction 0"), (["--max-steps", "0"], "--max-steps 0"), (["--lr", "-1"], "--lr -1"),
    (["--priors", "colour"], "--priors colour"), (["--batch-size", "two"], "--batch-size"), (["--what"], "--what"),
    (["--branches", "sem", "--no-cognitive"], "--branches sem"), (["--image-size", "33"], "--image-size 33"),
    (["--sam-checkpoint", "/no/file.pth"], "/no/file.pth"), (["--clip", "nonsense:x"], "--clip nonsense:x"),
    (["--precision", "int8"], "--precision"), (["--out", "/proc/none"], "/proc"),
    (["--tune-encoder", "half"], "--tune-encoder"), (["--rounds", "0"], "--rounds 0"), (["--init", "/no/run"], "--init /no/run"),
    (["--targets", "0"], "--align"), (["--targets", "0", "--align", "--dense-loss", "0"], "--dense-loss"),
    (["--seed", "-1"], "--seed"), (["--seed", "1" + 19 * "0"], "--seed"),
    (["--loss-weights", "0", "0", "0"], "--loss-weights"), (["--attributes-file", "/no/texts.json"], "/no/texts.json")])
def test_bad_flags_are_named(flags, named, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *QUICK, "--cache", "none", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(InputError) as e:
        train.main()
    assert named in str(e.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_exit_status_and_one_line(tmp_path):
    done = python("train.py", "--dataset", "brats")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "demo, synapse" in done.stderr


def test_training_on_nothing_does_not_end_well(tmp_path):
    """Masks that are all empty: the last line says so, and not how good the model is."""
    from PIL import Image
    from test_sa_med2d import write
    write(tmp_path, cases=4)
    for mask in (tmp_path / "masks").iterdir():
        Image.new("L", Image.open(mask).size).save(mask)
    words = {name: {kind: ["text"] for kind in ("position", "texture", "shape")} for name in ("liver", "left kidney", "polyp")}
    (tmp_path / "a.json").write_text(json.dumps({"sa-med2d": words, "demo": words}))
    with pytest.raises(InputError, match="none of the 2 steps had a structure") as e:
        run_main(["--dataset", "sa-med2d", "--data", tmp_path, "--attributes-file", tmp_path / "a.json", "--light", "--cache",
                  "none", "--image-size", 64, "--feature-grid", 4, "--max-steps", 2, "--batch-size", 2, "--workers", 0,
                  "--prompt", "box", "--val-slices", 1, "--out", tmp_path / "o"])
    assert "data.py stats" in str(e.value) and "\n" not in str(e.value)

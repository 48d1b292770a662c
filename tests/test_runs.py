"""runs.py: what is saved comes back, and what is damaged is named."""
import csv
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from common import LIGHT, InputError
from conftest import fails
from medsegr import Config, MedSegR
from runs import (default_checkpoint, load_checkpoint, load_training, newest_checkpoint, save_checkpoint,
                  save_training)
from test_medsegr import FIVE, INDEX, perturb, small


def test_checkpoint_returns_what_was_saved(tmp_path):
    model = small(priors=("position", "shape")).eval()
    perturb(model)
    save_checkpoint(model, tmp_path / "best.safetensors", step=7)
    again, record = load_checkpoint(tmp_path)
    assert record == {"step": 7} and again.config == model.config
    features = torch.randn(3, 256, 16, 16)
    with torch.no_grad():
        for a, b in zip(*(m.decode(features, INDEX, m.encode_attributes(FIVE)) for m in (model, again))):
            assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.part"))


def test_shipped_weights_are_small_and_give_the_same_answers(tmp_path):
    """Heads whose weights have the rank that is kept lose nothing but float16's rounding."""
    model = small().eval()
    perturb(model)
    with torch.no_grad():
        for name, p in model.perceptual.named_parameters():
            if p.dim() == 2:  # as after training: nothing behind the 30th token, and of low rank
                p.copy_(0.1 * torch.randn(len(p), 4) @ torch.randn(4, p.shape[1]))
                p[:, 30 * model.clip.width:] = 0
    arguments = dict(lr=0.1, data=str(tmp_path), out=str(tmp_path), init=None, cache=str(tmp_path))
    save_checkpoint(model, tmp_path / "out" / "best.safetensors", step=7, arguments=arguments)
    runs.ship(tmp_path / "out", tmp_path / "weights" / "one.safetensors")
    again, record = load_checkpoint(tmp_path / "weights" / "one.safetensors")
    assert record == {"step": 7, "arguments": {"lr": 0.1}} and again.config == model.config
    assert not any(str(tmp_path).encode() in f.read_bytes() for f in (tmp_path / "weights").iterdir())
    sizes = [(tmp_path / file).stat().st_size for file in ("out/best.safetensors", "weights/one.safetensors")]
    assert sizes[1] < sizes[0] / 2
    features = torch.randn(3, 256, 16, 16)
    with torch.no_grad():
        for a, b in zip(*(m.decode(features, INDEX, m.encode_attributes(FIVE)) for m in (model, again))):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(a.abs().max()))
    start = small()
    runs.init_from(tmp_path / "weights" / "one.safetensors", start)


def test_checkpoints_of_one_folder_have_a_config_each(tmp_path):
    """As in weights/, where they are float16 too."""
    for name, priors in (("a", ("shape",)), ("b", ("texture",))):
        save_checkpoint(small(priors=priors), tmp_path / f"{name}.safetensors")
        (tmp_path / "config.json").rename(tmp_path / f"{name}.json")
        save_file({k: v.half() for k, v in load_file(tmp_path / f"{name}.safetensors").items()},
                  tmp_path / f"{name}.safetensors")
    model, record = load_checkpoint(tmp_path / "a.safetensors")
    assert model.config.priors == ("shape",) and record == {}
    assert load_checkpoint(tmp_path / "b.safetensors")[0].config.priors == ("texture",)
    assert {p.dtype for p in model.trained().values()} == {torch.float32}


def break_checkpoint(folder, how):
    file, config = folder / "best.safetensors", folder / "config.json"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif how == "not safetensors":
        file.write_bytes(b"\x80\x04 a pickle")
    elif how == "no config":
        config.unlink()
    elif how == "config damaged":
        config.write_text(config.read_text()[:40])
    else:
        saved = json.loads(config.read_text())
        if how == "other switches":
            saved["config"]["priors"] = ["position"]
        elif how == "other backbone weights":
            saved["config"]["sam_checkpoint"] = "random"
        elif how == "unknown backbone":
            saved["config"]["backbone"] = "vit_x"
        config.write_text(json.dumps(saved))


@pytest.mark.parametrize("how", ["truncated", "not safetensors", "no config", "config damaged", "other switches",
                                 "other backbone weights", "unknown backbone"])
def test_wrong_checkpoint_is_named(tmp_path, how):
    save_checkpoint(small(), tmp_path / "best.safetensors")
    break_checkpoint(tmp_path, how)
    with pytest.raises(InputError, match="--checkpoint|--backbone") as e:
        load_checkpoint(tmp_path)
    assert "\n" not in str(e.value)


def test_missing_checkpoint_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="train.py"):
        load_checkpoint(tmp_path)


def test_the_newest_checkpoint_is_taken(tmp_path):
    for age, name in ((100, "old/last"), (50, "new/best"), (80, "last")):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
        os.utime(file, (1e9 - age,) * 2)
    assert newest_checkpoint(tmp_path) == default_checkpoint(out=tmp_path) == tmp_path / "new"


def test_without_a_run_the_shipped_weights_are_taken(tmp_path, monkeypatch):
    """Those for CT, or those for the rest; without them, too, it is said what to run."""
    monkeypatch.setattr(runs, "WEIGHTS", tmp_path / "weights")
    for modality in ("ct", "mr"):
        with pytest.raises(InputError, match="train.py"):
            default_checkpoint(modality, tmp_path / "out")
    ct, general = (runs.WEIGHTS / f"{name}.safetensors" for name in ("abdomen-ct", "general"))
    save_checkpoint(small(), ct, dataset="synapse")
    assert default_checkpoint("ct", tmp_path / "out") == ct
    with pytest.raises(InputError, match="--checkpoint"):
        default_checkpoint("mr", tmp_path / "out")
    save_checkpoint(small(), general, dataset="sa-med2d")
    assert [default_checkpoint(modality, tmp_path / "out") for modality in ("ct", "pet")] == [ct, general]


def test_damaged_training_state_is_named(tmp_path):
    (tmp_path / "training.safetensors").write_bytes(b"damaged")
    model = MedSegR(Config(**LIGHT, branches=("sam",), image_size=64))
    optimizer = torch.optim.AdamW(model.trained().values())
    with pytest.raises(InputError, match="damaged"):
        load_training(tmp_path / "training.safetensors", model, optimizer)


@pytest.mark.parametrize("before, now", [(False, True), (True, False), (True, True)])
def test_a_run_goes_on_in_another_precision(before, now, tmp_path):
    """float16 alone scales its gradients; where it comes later, its scale starts as always."""
    model = small()
    optimizer, scaler = torch.optim.AdamW(model.trained().values()), torch.amp.GradScaler("cpu", 8.0, enabled=before)
    about = dict(arguments={}, data="x")
    save_training(tmp_path / "training.safetensors", model, optimizer, scaler=scaler.state_dict(), step=3, **about)
    progress, later = dict(step=0), torch.amp.GradScaler("cpu", 4.0, enabled=now)
    runs.begin(tmp_path, True, 0, model, optimizer, later, progress, about)
    assert progress == dict(step=3) and later.get_scale() == (8.0 if before and now else 4.0 if now else 1.0)


def test_the_log_goes_on_and_a_full_disk_is_one_line(tmp_path):
    log = runs.Log(tmp_path, 0)
    log.add(step=1, epoch=0, loss=0.5), log.add(step=2, epoch=0, loss=0.25)
    again = runs.Log(tmp_path, 1)
    again.add(step=2, epoch=0, loss=0.125)
    assert [row["loss"] for row in runs.read_log(tmp_path / "log.csv")] == [0.5, 0.125]
    again.file = open("/dev/full", "w")
    again.writer = csv.DictWriter(again.file, runs.COLUMNS)
    fails(lambda: again.add(step=3, epoch=0), tmp_path / "log.csv", "No space left")


def test_hidden_folders_hold_no_newest_checkpoint(tmp_path):
    for name in (".Trash", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.safetensors").touch()
        assert name == "run" or pytest.raises(InputError, newest_checkpoint, tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "run"

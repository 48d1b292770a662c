"""The benchmark: its peers compute what the operators do, and its output and errors are usable."""
import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.build_sam import _build_sam

import bench
import encoders
import medsegr
from benches import operators, speed, timing, training
from common import InputError
from conftest import ROOT
from ops import reference


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny tensors, and a machine that may be busy: threads would mostly wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that a test starts
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peers():
    for title, ours, make, functions, directions in operators.OPERATORS:
        for name, f in functions.items():
            yield pytest.param(getattr(reference, ours.__name__), make, f, directions[-1], id=f"{title}: {name}")


@pytest.mark.parametrize("definition,make,f,wanted", list(peers()))
@pytest.mark.parametrize("seed", range(5))
def test_peers_equal_the_definition(definition, make, f, wanted, seed):
    torch.manual_seed(seed)
    M, C, H, W = (int(n) for n in torch.randint(1, 10, (4,)))
    kind = dict(dtype=torch.float64, device="cpu")
    inputs = make(M + 8 * (seed % 2), C, H, W, k=(1, 3, 5, 7, 3)[seed], **kind)
    truth = operators.call(definition, inputs, (), None)()
    torch.testing.assert_close(operators.call(f, inputs, (), None)(), truth)
    up = torch.randn(truth[0].shape, **kind)
    truth = operators.call(definition, inputs, wanted, up)()
    torch.testing.assert_close(operators.call(f, inputs, wanted, up)(), truth)


def script(*args):
    return subprocess.run([sys.executable, "-W", "ignore", "bench.py", *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True)


def test_ops_in_a_process_of_its_own(tmp_path):
    run = script("ops", "--grids", 4, "--targets", 1, 9, "--channels", 8, "--repeats", 3, "--device", "cpu",
                 "--json", tmp_path / "ops.json")
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "ops.json").read_text())
    assert record["operators"] in run.stdout and len(record["tables"]) == 7
    for title, rows in record["tables"].items():
        assert title in run.stdout and [row["M"] for row in rows] == [1, 9]
        for row in rows:
            assert ("its ratio" in row) == ("deform" in title)
            assert all(math.isfinite(row[key]) and row[key] > 0 for key in row if key != "composition")
            assert row["ratio"] == pytest.approx(row["ms"] / row["ours ms"])


def test_what_fails_or_is_slow(monkeypatch, capsys):
    """A peer that fails is named and has no time, ours may not; what is slow keeps its first time."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "ops", "--device", "cpu", "--repeats", "1"])
    args, calls = bench.parse(), {"quick": 0, "slow": 0}

    def fail():
        raise RuntimeError("no kernel\nfor this")

    count = lambda name: calls.update({name: calls[name] + 1})
    ms, peak = timing.measure(dict(quick=lambda: count("quick"), slow=lambda: count("slow") or timing.time.sleep(0.2),
                                   peer=fail), args, slow=0.1)
    assert ms.keys() == {"quick", "slow"} and ms["slow"] > 199 and calls["slow"] == 1 < calls["quick"] and not peak
    assert "peer: no kernel for this" in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        timing.measure(dict(ours=fail), args)


def test_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(medsegr, "Config", partial(medsegr.Config, image_size=64))
    monkeypatch.setattr(sys, "argv", ["bench.py", "model", "--feature-grid", "4", "--repeats", "1",
                                      "--device", "cpu", "--json", str(tmp_path / "model.json")])
    bench.main()
    rows, = json.loads((tmp_path / "model.json").read_text())["tables"].values()
    assert len(rows) == 3 and "training step" in capsys.readouterr().out
    for row in rows:
        assert row["ratio"] > 0 and row["largest difference"] < 1e-3 * row["of"]


def test_train(tmp_path, monkeypatch, capsys):
    """In this process, where the model is small; the naive way leaves the package's attention to no other model."""
    monkeypatch.setattr(medsegr, "Config", partial(medsegr.Config, image_size=64, feature_grid=8))
    monkeypatch.setattr(training, "in_a_process", lambda f, *args, **options: f(*args, **options))
    monkeypatch.setattr(sys, "argv", ["bench.py", "train", "--backbones", "lite_medsam", "--batch-size", "2",
                                      "--targets", "3", "--repeats", "2", "--device", "cpu",
                                      "--json", str(tmp_path / "train.json")])
    before = encoders.ViTAttention, medsegr.tiny_vit
    bench.main()
    rows, = json.loads((tmp_path / "train.json").read_text())["tables"].values()
    assert [row[""] for row in rows] == list(training.WAYS) and "2 images with 3 targets" in capsys.readouterr().out
    assert (encoders.ViTAttention, medsegr.tiny_vit) == before and rows[0]["ratio"] == 1
    for row in rows:
        assert row["s a step"] * row["ratio"] == pytest.approx(rows[0]["s a step"]) and row["memory, MB"] > 100


def test_in_a_process():
    assert timing.in_a_process(os.getpid) != os.getpid()


def test_speed(tmp_path, monkeypatch, capsys):
    """Every row, with ViTs of one block and one text encoder; SAM's own stays at 1024 x 1024, LiteMedSAM at 256 x 256."""
    tiny = partial(_build_sam, encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=1,
                   encoder_global_attn_indexes=[0])
    monkeypatch.setitem(sam_model_registry, "vit_b", tiny)
    monkeypatch.setattr(speed, "Config", lambda **row: medsegr.Config(
        **row | dict(clip="minilm", image_size=256 if row["backbone"] == "lite_medsam" else 64)))
    monkeypatch.setattr(sys, "argv", ["bench.py", "speed", "--batches", "1", "--repeats", "1", "--device", "cpu",
                                      "--dtype", "bfloat16", "--json", str(tmp_path / "speed.json")])
    bench.main()
    ours, paper = json.loads((tmp_path / "speed.json").read_text())["tables"].values()
    assert [row[""] for row in ours] == list(speed.ROWS) and paper[-1]["images/s"] == 48
    assert all(row["tuned, M"] > 0 and row["images/s, batch 1"] > 0 for row in ours)
    assert all(row["images/s, batch 1, bfloat16"] > 0 for row in ours if row[""] != speed.ONNX)
    assert "compare the ratios" in capsys.readouterr().out


def test_data(tmp_path):
    run = script("data", "demo", "--images", 3, "--image-size", 64, "--repeats", 1, "--json", tmp_path / "data.json")
    assert run.returncode == 0, run.stderr
    rows, = json.loads((tmp_path / "data.json").read_text())["tables"].values()
    assert [row.pop("workers") for row in rows][:3] == [0, 1, 2]
    for rates in rows:
        assert rates.keys() == {"images/s"} and min(rates.values()) > 0


def test_eval_beside_medpy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "eval", "demo", "--volumes", "2", "--json", str(tmp_path / "x.json")])
    bench.main()
    rows, = json.loads((tmp_path / "x.json").read_text())["tables"].values()
    assert len(rows) == 8 and all(row["difference"] < 1e-9 and row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize("flags,named", [
    (["train", "--peer", "nowhere"], "--peer"), (["data", "moon"], "moon"), (["eval", "kvasir"], "kvasir"),
    (["ops", "--grids", "0"], "--grids 0"), (["ops", "--dtype", "fp8"], "--dtype"), (["pace"], "pace"),
    (["model", "--grids", "4"], "--grids"), (["ops", "--json", "/proc/x/y.json"], "/proc/x"), ([], "command"),
    pytest.param(["ops", "--device", "cuda"], "--device cuda",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"))])
def test_bad_flags_are_named(flags, named, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(InputError, match=named):
        bench.main()


def test_a_bad_flag_is_one_line():
    run = script("ops", "--targets", "many")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--targets many" in run.stderr, run.stderr

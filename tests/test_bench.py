"""The benchmark: its peers compute what the operators do, and its output and errors are usable."""
import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch

import bench
from benches import operators
import medsegr
from conftest import ROOT
from common import InputError
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
    for title, ours, make, compositions, torchvisions, directions in operators.OPERATORS:
        named = {n: f for n, (f, *_) in compositions.items()} | ({"torchvision": torchvisions} if torchvisions else {})
        for name, f in named.items():
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


def test_a_wrong_peer_is_not_timed(monkeypatch):
    title, ours, make, compositions, *rest = operators.OPERATORS[0]
    wrong = {"half": (lambda x, weight, gate, index: 0.5 * reference.dynamic_conv2d(x, weight, gate, index), 4, 8)}
    monkeypatch.setattr(operators, "OPERATORS", [(title, ours, make, wrong, *rest)])
    with pytest.raises(RuntimeError, match="half is wrong"):
        operators.check(torch.device("cpu"), torch.float32)


def script(*args):
    return subprocess.run([sys.executable, "-W", "ignore", "bench.py", *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True)


def test_ops_in_a_process_of_its_own(tmp_path):
    run = script("ops", "--quick", "--grids", 4, "--targets", 1, 9, "--channels", 8, "--repeats", 3, "--device", "cpu",
                 "--json", tmp_path / "ops.json")
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "ops.json").read_text())
    assert record["ours"] in run.stdout and len(record["tables"]) == 7
    for table in record["tables"]:
        assert table["title"] in run.stdout and [row["targets"] for row in table["rows"]] == [1, 9]
        for row in table["rows"]:
            assert row["times"].keys() >= {"ours", "copy", row["best"]}
            ratios = [row["best_ratio"], row["ours_per_copy"], row["of_copy_bandwidth"]]
            ratios += [row["torchvision_ratio"]] if "deform" in table["title"] else []
            assert all(math.isfinite(r) and r > 0 for r in ratios)
            fastest = min(t["ms"] for n, t in row["times"].items() if n not in ("ours", "copy", "torchvision"))
            assert row["best_ratio"] == pytest.approx(fastest / row["times"]["ours"]["ms"])
        least = min(row["best_ratio"] for row in table["rows"])
        assert table["summary"]["best_ratio"]["min"] == least <= table["summary"]["best_ratio"]["geometric_mean"]


def test_what_would_take_too_much_is_left_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "ops", "--quick", "--device", "cpu", "--repeats", "1"])
    monkeypatch.setattr(operators, "MEMORY", 20_000)
    args, (_, ours, make, compositions, peer, _) = bench.parse(), operators.OPERATORS[-1]
    inputs = make(2, 4, 5, 5, dtype=torch.float32, device="cpu")  # 800 bytes
    row = operators.bench_shape(ours, inputs, compositions, peer, ("x",), {"torchvision": 1.0}, args)
    assert "GiB" in row["left_out"].pop("gather") and "200.0 s" in row["left_out"].pop("torchvision")
    assert not row["left_out"] and row["torchvision_ratio"] is None


def test_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(medsegr, "Config", partial(medsegr.Config, image_size=64))
    monkeypatch.setattr(sys, "argv", ["bench.py", "model", "--quick", "--feature-grid", "4", "--repeats", "1",
                                      "--device", "cpu", "--json", str(tmp_path / "model.json")])
    bench.main()
    record = json.loads((tmp_path / "model.json").read_text())
    rows = [v for v in record.values() if isinstance(v, dict)]
    assert len(rows) == 3 and "training step" in capsys.readouterr().out
    for row in rows:
        assert row["ratio"] > 0 and row["difference"] < 1e-3 * row["largest"]


PEER = """
import json
import numpy as np
from PIL import Image

class TrainingDataset:
    def __init__(self, folder, image_size, mask_num, requires_name):
        self.pairs = list(json.load(open(f"{folder}/image2label_train.json")).items())
        assert image_size == 64 and not requires_name

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image, masks = self.pairs[i]
        assert np.asarray(Image.open(image)).shape == (256, 256, 3)
        return [np.asarray(Image.open(mask)).max() == 255 for mask in masks]
"""


def test_data_beside_a_peer(tmp_path):
    (tmp_path / "DataLoader.py").write_text(PEER)
    run = script("data", "demo", "--images", 3, "--image-size", 64, "--quick", "--repeats", 1, "--peer", tmp_path,
                 "--json", tmp_path / "data.json")
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "data.json").read_text())["demo"]
    assert {"one process", "1 worker", "2 workers"} <= record.keys() and "ratio" in run.stdout
    for rates in record.values():
        assert rates.keys() == {"ours", "ours, varied", "SAM-Med2D's"} and min(rates.values()) > 0


@pytest.mark.parametrize("flags,named", [
    (["data", "--peer", "nowhere"], "--peer nowhere"), (["data", "moon"], "moon"),
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

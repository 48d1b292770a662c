"""data.py stats: what it counts, and that everything wrong with the files is named once, with exit status 1."""
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from test_readers import kits19, kvasir, synapse, write_npz


def stats(*flags):
    """-> (exit status, stdout, stderr) of data.py stats."""
    done = subprocess.run([sys.executable, "-W", "ignore", "data.py", "stats", *map(str, flags)], cwd=ROOT, text=True,
                          capture_output=True)
    return done.returncode, done.stdout, done.stderr


def test_counts(tmp_path):
    truth = kvasir(tmp_path / "kvasir", [f"cju{i}" for i in range(10)])
    out = tmp_path / "new" / "stats.json"
    status, text, error = stats("--dataset", "kvasir", "--data", tmp_path / "kvasir", "--json", out,
                                "--sheet", tmp_path / "sheet.png", "--workers", 2)
    assert status == 0 and "kvasir: nothing wrong" in text, text + error
    result = json.loads(out.read_text())
    assert {s: r["images"] for s, r in result["splits"].items()} == dict(train=7, val=1, test=2)
    areas = sorted(mask.mean() for mask in truth.values())
    counted = [result["splits"][s]["area_quantiles"] for s in result["splits"]]
    assert min(q[0] for q in counted) == pytest.approx(areas[0])
    assert max(q[4] for q in counted) == pytest.approx(areas[-1])
    polyp = result["splits"]["train"]["classes"]["polyp"]
    assert polyp["targets"] == 7 and polyp["small"] == 0 and polyp["box_overlap"] == 0
    assert result["splits"]["train"]["sizes"] == {"30 x 44": 7}
    assert np.array(Image.open(tmp_path / "sheet.png")).std() > 20


def test_demo_and_kits19(tmp_path):
    status, text, error = stats("--dataset", "demo", "--limit", 3, "--overlap", 0.9)
    assert status == 0 and "gallbladder" in text, error
    kits19(tmp_path)
    status, text, error = stats("--dataset", "kits19", "--data", tmp_path, "--axes", "z")
    assert status == 0 and "20 x" not in text and "24 x 30 (20)" in text, text + error


def test_everything_wrong_is_named(tmp_path):
    rng = np.random.default_rng(0)
    synapse(tmp_path, shape=(16, 16))
    bad = [write_npz(tmp_path, "0005", 0, rng.random((16, 16)), np.full((16, 16), 13)),
           write_npz(tmp_path, "0005", 1, np.full((16, 16), np.nan), np.zeros((16, 16))),
           write_npz(tmp_path, "0006", 2, rng.random((16, 16)), np.zeros((16, 17)))]
    bad[2].write_bytes(bad[2].read_bytes()[:100])
    flat = write_npz(tmp_path, "0006", 0, np.full((16, 16), 0.5), np.ones((16, 16)))
    twin = rng.random((16, 16))
    for case in ("0006", "0010"):
        write_npz(tmp_path, case, 1, twin, np.ones((16, 16)))
    (tmp_path / "texts.json").write_text(json.dumps({"synapse": {}}))
    status, text, error = stats("--dataset", "synapse", "--data", tmp_path,
                                "--attributes-file", tmp_path / "texts.json", "--json", tmp_path / "s.json")
    lines = [line for line in text.splitlines() if line.startswith("wrong: ")]
    for path in bad:
        assert sum(str(path) in line for line in lines) == 1, lines
    assert sum(flat.stem in line and "equal" in line for line in lines) == 1
    assert sum("case0010_slice001 (val): the same pixels as case0006_slice001 (train)" in line for line in lines) == 1
    assert sum("no texts for synapse's class" in line for line in lines) == 8
    assert status == 1 and len(lines) == 13 and "13 wrong" in text and error.count("Traceback") == 0
    assert json.loads((tmp_path / "s.json").read_text())["wrong"] == [line[7:] for line in lines]


@pytest.mark.parametrize("flags,named", [
    ([], "--dataset"), (["--dataset", "brats"], "--dataset brats"), (["--dataset", "kvasir", "--data", "/no"], "/no"),
    (["--dataset", "demo", "--json", "/proc/x/y.json"], "/proc/x"),
    (["--dataset", "demo", "--limit", "0"], "--limit 0")])
def test_bad_flags(flags, named):
    status, text, error = stats(*flags)
    assert status == 2 and error.count("\n") == 1 and named in error, error


def test_an_unreadable_split_is_wrong_and_the_others_are_counted(tmp_path):
    synapse(tmp_path, h5=(), shape=(16, 16))
    status, text, _ = stats("--dataset", "synapse", "--data", tmp_path)
    assert status == 1 and "wrong: " in text and "test_vol_h5" in text and "\ntrain\n" in text

"""common.py: one line on stderr and exit status 2 for what a user can cause."""
import sys
from unittest import mock

import pytest

import common
import data
from conftest import fails


@pytest.mark.parametrize("body, status, words", [
    ("raise common.InputError('--x: bad\\nvalue; give a good one')", 2, "t.py: --x: bad value; give a good one"),
    ("raise OSError('disk')", 2, "t.py: disk"),
    ("raise KeyboardInterrupt", 130, "t.py: interrupted"),
    ("common.Parser().parse_args(['--nothere'])", 2, "t.py: unrecognized arguments: --nothere; --help lists the flags"),
    ("data.open_dataset('synapse', 'missing')", 2, "t.py: missing: no such folder"),
])
def test_run(tmp_path, monkeypatch, capsys, body, status, words):
    def main():
        exec(body, {"common": common, "data": data})

    monkeypatch.setattr(sys, "argv", ["folder/t.py"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        common.run(main, OSError)
    out, err = capsys.readouterr()
    assert e.value.code == status and out == "" and err.startswith(words) and err.count("\n") == 1


@pytest.mark.parametrize("kind, good, bad, words", [
    (common.number(0, 1), {"0": 0, "1": 1, "0.25": 0.25}, ["-1", "1.1", "nan", "inf", "x", ""],
     "a number, at least 0 and at most 1"),
    (common.number(high=3, above=0), {"3": 3, "1e-9": 1e-9}, ["0", "3.1"], "a number, above 0 and at most 3"),
    (common.number(), {"-7.5": -7.5}, ["inf", "one"], "a number;"),
    (common.positive_int, {"1": 1, "12": 12}, ["0", "-3", "1.5", "1e3"], "a whole number, at least 1")])
def test_ranges_of_flags(kind, good, bad, words):
    parser = common.Parser()
    parser.add_argument("--n", type=kind)
    for text, value in good.items():
        found = parser.parse_args([f"--n={text}"]).n
        assert found == value and type(found) is type(kind("1"))
    for text in bad:
        fails(lambda: parser.parse_args([f"--n={text}"]), f"--n {text}: give ", words)


def test_a_lock(tmp_path):
    """Held by one at a time; where the system has none, everybody has it."""
    with common.locked(tmp_path / "lock") as ours, common.locked(tmp_path / "lock", wait=False) as theirs:
        assert ours and not theirs
    with common.locked(tmp_path / "lock", wait=False) as free:
        assert free
    with mock.patch.dict(sys.modules, fcntl=None), common.locked(tmp_path / "lock") as ours:
        with common.locked(tmp_path / "lock", wait=False) as theirs:
            assert ours and theirs


def test_json_and_folders(tmp_path):
    for bad in ("", "{", "[1]", "3", "[" * 100_000):
        (tmp_path / "a.json").write_text(bad)
        fails(lambda: common.read_json(tmp_path / "a.json", "delete it"), "a.json", "; delete it")
    for name in ("b.png", "a.png", "._b.png", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in common.visible(tmp_path, "*.png")] == ["a.png", "b.png"]
    assert common.visible(tmp_path / "nothere") == []

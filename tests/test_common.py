"""common.py: one line on stderr and exit status 2 for what a user can cause."""
import errno
import multiprocessing
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


def write_often(path, letter, size, count, failed):
    for _ in range(count):
        try:
            with common.whole(path) as file:
                for _ in range(20):
                    file.write(letter * (size // 20))
        except common.InputError:
            failed.value += 1


def test_two_writers_of_one_file(tmp_path):
    """What lies there is always the whole of one of them, and neither fails."""
    path, contents = tmp_path / "x.bin", {b"a": 600_000, b"b": 400_000}
    spawn = multiprocessing.get_context("fork")
    failed = spawn.Value("i", 0)
    writers = [spawn.Process(target=write_often, args=(path, *content, 40, failed)) for content in contents.items()]
    [writer.start() for writer in writers]
    while any(writer.is_alive() for writer in writers):
        if path.is_file():
            found = path.read_bytes()
            assert found in [letter * size for letter, size in contents.items()]
    assert not failed.value and [file.name for file in tmp_path.iterdir()] == ["x.bin"]


def test_writing(tmp_path):
    """Whole or not at all, under the longest name, where there are no locks, and in one line where it cannot be."""
    for name, modules in (("a", {}), ("n" * 250, {}), ("b", dict(fcntl=None))):
        with mock.patch.dict(sys.modules, modules):
            common.write_atomically(tmp_path / name, b"old")
            with pytest.raises(KeyError), common.whole(tmp_path / name) as file:
                file.write(b"new")
                raise KeyError
            assert (tmp_path / name).read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3
    fails(lambda: common.write_atomically(tmp_path / "none/x", b""), tmp_path / "none/x", "cannot be written")
    fails(lambda: common.write_atomically(tmp_path / ("n" * 260), b""), "too long")

    def full():
        with common.writing(tmp_path / "log"):
            raise OSError(errno.ENOSPC, "No space left on device")
    fails(full, tmp_path / "log", "No space left on device", "make room")


@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EPIPE, 141)])
def test_what_the_system_refuses_is_one_line(monkeypatch, capfd, number, status):
    def main():
        raise OSError(number, "refused", "some/file")
    monkeypatch.setattr(sys, "argv", ["t.py"])
    monkeypatch.setattr("os.dup2", lambda *a: None)
    with pytest.raises(SystemExit) as e:
        common.run(main)
    assert e.value.code == status and capfd.readouterr().err.count("\n") == (status == 2)

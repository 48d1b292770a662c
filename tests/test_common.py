"""common.py: one line on stderr and exit status 2 for what a user can cause."""
import sys

import pytest

import common
import data


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

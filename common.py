"""What every script needs: one-line errors, flags, seeds, and files that are written whole or not at all."""
import argparse
import ctypes
import hashlib
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np


class InputError(ValueError):
    """Bad input: one line that names the file or flag and the remedy; scripts print it and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is an InputError, so that a script prints one line instead of its whole usage."""

    def error(self, message):
        raise InputError(message + "; --help lists the flags")


def keep_freed_memory():
    """Asks glibc to reuse large blocks instead of returning each to the system, whose fresh pages cost a CPU more time
    than many an operator: images are encoded a third faster. Elsewhere it does nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    for option, size in ((m_mmap_threshold, 2 ** 30), (m_trim_threshold, 2 ** 31 - 1), (m_top_pad, 2 ** 28)):
        mallopt(option, size)


def run(main, *errors):
    """Calls main(). InputError and the exception classes `errors` become one line on stderr and exit status 2."""
    script = Path(sys.argv[0]).name
    keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (InputError, *errors) as e:
        print(f"{script}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


def seeded(*parts):
    """A generator that depends on `parts` alone (blake2b of their str): not on order, worker or PYTHONHASHSEED."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as text ({e}); check the path and write it as UTF-8") from None


def make_folder(folder):
    """Makes a folder for results; InputError now, not after an hour of work, if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise InputError(f"{folder}: cannot be written to ({e.strerror}); choose another place") from None


@contextmanager
def whole(path):
    """A binary file to write to, which appears at `path` when all is in it, or never. InputError if it cannot."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w+b") as file:
            yield file
        os.replace(part, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e}); make room, or choose another place") from None
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path, content):
    """Bytes to PATH, all or nothing."""
    with whole(path) as file:
        file.write(content)

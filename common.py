"""The ground that everything else stands on, and that itself imports nothing of ours: one-line errors, flags, seeds,
processes, and files that are written whole or not at all."""
import argparse
import contextlib
import ctypes
import hashlib
import math
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ATTRIBUTES = ("position", "texture", "shape")  # what a structure's three texts speak of


class InputError(ValueError):
    """Bad input: one line that names the file or flag and the remedy; scripts print it and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is an InputError, so that a script prints one line instead of its whole usage."""

    def error(self, message):
        raise InputError(message + "; --help lists the flags")


def number(low, high=math.inf, kind=float):
    """For argparse's type=: a number from low to high, of kind int a whole one; its error names the range."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: give {what} "
                                             + (f"of at least {low}" if high == math.inf else f"from {low} to {high}"))
        return value
    return convert


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


# ---------------------------------------------------------------------------------------------------------------------
# Files

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


@contextlib.contextmanager
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


@contextlib.contextmanager
def locked(path):
    """Waits until no other process holds PATH's lock; where locks are not supported, does not wait."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Processes, and the flags of the scripts that run in several

def start_processes():
    """-> rank, world size, device; joins torchrun's process group: NCCL between GPUs, gloo between CPUs."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), torch.device("cuda", local) if cuda else torch.device("cpu")


def total(*values):
    """Numbers, each summed over all processes, as a list of floats."""
    if not dist.is_initialized():
        return [float(v) for v in values]
    sums = torch.tensor(values, dtype=torch.float64)  # on the CPU: a GPU need not wait for them
    dist.all_reduce(sums)
    return sums.tolist()


def add_runtime_flags(parser):
    """The flags that train.py and eval.py share."""
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--precision", default=precision, help="float32, bfloat16 or float16 (autocast)")
    parser.add_argument("--cache", default="cache", help="folder for image features; none: keep none")
    parser.add_argument("--cache-gb", type=float, default=20.0, help="size limit of that folder")


def check_runtime_flags(args):
    if args.precision not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--precision {args.precision}: choose float32, bfloat16 or float16")
    args.cache = None if args.cache == "none" else args.cache

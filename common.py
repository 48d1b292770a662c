"""The ground that everything else stands on, and that itself imports nothing of ours: one-line errors, flags, seeds,
processes, and files that are written whole or not at all."""
import argparse
import codecs
import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ATTRIBUTES = ("position", "texture", "shape")  # what a structure's three texts speak of
MODALITIES = ("ct", "mr", "pet", "ultrasound", "x-ray", "endoscopy", "dermoscopy", "fundus")  # the paper's eight
LIGHT = dict(backbone="lite_medsam", clip="minilm")  # of medsegr.Config: the pair that needs no download


class InputError(ValueError):
    """Bad input: one line that names the file or flag and the remedy; scripts print it and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is an InputError, so that a script prints one line instead of its whole usage."""

    def error(self, message):
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)  # "argument --n: 0: give more" -> "--n 0: give more"
        raise InputError(message + "; --help lists the flags")


def number(low=-math.inf, high=math.inf, kind=float, above=-math.inf):
    """For argparse's `type=`: a function text -> float (or int, with kind) within low..high and above `above`; its
    error says which numbers it takes."""
    bounds = [f"above {above}"] if above > -math.inf else [f"at least {low}"] if low > -math.inf else []
    bounds += [f"at most {high}"] if high < math.inf else []
    takes = ("a whole number" if kind is int else "a number") + (f", {' and '.join(bounds)}" if bounds else "")

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and value > above):
            raise argparse.ArgumentTypeError(f"{text}: give {takes}")
        return value
    return parse


positive_int = number(1, kind=int)


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


# the system's own refusals: no room (or quota, or limit on a file's size), a disk that may only be read, another's file
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def run(main, *errors):
    """Calls main(). InputError, the exception classes `errors`, and a file that the system refuses to write where
    nobody else has said so become one line on stderr and exit status 2."""
    script = Path(sys.argv[0]).name
    keep_freed_memory()
    codecs.register_error("printed", print_anyway)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="printed")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, *errors) as e:
        print(f"{script}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if e.errno not in REFUSED:
            raise
        print(f"{script}: {e.filename or 'a file'}: the system refuses it ({e.strerror}); make room, or let this user "
              "read and write there", file=sys.stderr)
        sys.exit(2)


def print_anyway(error):
    """For codecs: a file name's bytes that are no text are printed as they are, so that the printed path exists; what
    the terminal's encoding lacks as its number."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


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


def read_json(path, remedy="correct it"):
    """The JSON object in a file, as a dict; InputError with the remedy where there is none."""
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise InputError(f"{path}: damaged or not JSON ({e}); {remedy}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object {{...}}; {remedy}")
    return found


def visible(folder, pattern="*"):
    """The paths in a folder but hidden ones, sorted: macOS leaves a ._NAME beside every NAME that it copies."""
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


def make_folder(folder):
    """Makes a folder for results; InputError now, not after an hour of work, if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise InputError(f"{folder}: cannot be written to ({e.strerror}); choose another place") from None


@contextlib.contextmanager
def writing(path):
    """InputError, in one line that names `path`, if the system refuses what is written within."""
    try:
        yield
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e}); make room, or choose another place") from None


@contextlib.contextmanager
def whole(path):
    """A binary file to write to, which appears at `path` when all is in it, or never. InputError if it cannot.

    Processes that write into one folder take turns, so that two that write one path leave the file of the later one.
    """
    path = Path(path)
    with writing(path), alone_in(path.parent) as alone:
        part = path.with_name(path.name + (".part" if alone else f".{os.getpid()}.part"))
        try:
            with open(part, "w+b") as file:
                yield file
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_atomically(path, content):
    """Bytes to PATH, all or nothing."""
    with whole(path) as file:
        file.write(content)


def lock(file, wait=True):
    """Locks an open file or descriptor until it is closed -> True; False where another process holds it, without
    `wait`; None where locks are not supported (Windows, some network disks)."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None


@contextlib.contextmanager
def locked(path, wait=True):
    """Holds PATH's lock and yields True; without `wait` yields False where another process holds it. Where locks are
    not supported it yields True at once."""
    with open(path, "w") as file:
        yield lock(file, wait) is not False


@contextlib.contextmanager
def alone_in(folder):
    """Waits until no other process is in here for this folder, and yields True; False where locks are not supported."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        yield False
        return
    try:
        yield bool(lock(descriptor))
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Signals

class Stopped(Exception):
    """A signal asked this run to end."""


class Signals:
    """Remembers SIGTERM and SIGINT instead of dying of them. A second one kills, unless it comes within two seconds:
    `timeout` and batch systems signal a process and its group, which is one request."""

    seen, at = None, 0.0

    def __enter__(self):
        self.before = {n: signal.signal(n, self) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        if self.seen is None:
            self.seen, self.at = number, time.monotonic()
        elif time.monotonic() - self.at > 2:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)

    def name(self):
        return signal.Signals(self.seen).name if self.seen else "another process was stopped"

    def check(self):
        if self.seen:
            raise Stopped


def leave_group(worker):
    """For the loader's processes: a signal to the whole group is for the main one to decide on, which ends them."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


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


def add_model_flags(parser):
    """The flags of train.py and eval.py that choose what the model stands on."""
    add = parser.add_argument
    add("--light", action="store_true", help="the pair that needs no download: --backbone lite_medsam --clip minilm")
    add("--backbone", help="vit_b (default), vit_l, vit_h, lite_medsam or sam_med2d")
    add("--sam-checkpoint", help="weights of the backbone (default: its own)")
    add("--clip", help="text encoder: minilm, or NAME:TAG or NAME:FILE of open_clip (default: CLIP ViT-B/16)")
    add("--image-size", type=positive_int, help="pixels (default: 256 for lite_medsam and sam_med2d, 224 for ViT)")
    add("--normalize", choices=("sam", "minmax"), help="mean and std, or min-max (MedSAM's); default: the backbone's")


def model_options(args):
    """What add_model_flags says, as fields of medsegr.Config; what is left to its defaults is left out."""
    given = ("backbone", "sam_checkpoint", "clip", "image_size", "normalize")
    return (LIGHT if args.light else {}) | {k: getattr(args, k) for k in given if getattr(args, k) is not None}


def add_target_flags(parser):
    """The flags of predict.py and export.py that say which model is asked for what."""
    add = parser.add_argument
    add("--checkpoint", help="a .safetensors file or its folder (default: newest in out, else weights/'s for the "
        "modality)")
    add("--target", action="append", help="a class whose texts attributes.json has; may be given several times")
    for kind in ATTRIBUTES:
        add(f"--{kind}", help=f"in place of --target: the structure's {kind} in your own words")
    add("--dataset", help="whose texts --target takes (default: the checkpoint's)")
    add("--attributes-file", help="a JSON file of texts in place of attributes.json")


def add_precision_flag(parser, auto=False):
    """auto: the default is what is faster, see inference.choose_precision."""
    kinds, default = ("float32", "bfloat16", "float16"), "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--precision", default="auto" if auto else default, choices=("auto",) * auto + kinds,
                        help="of the computation (autocast)" + "; auto: the faster one, by a trial" * auto
                             + "; default here: %(default)s")


def add_runtime_flags(parser):
    """The flags that train.py and eval.py share; "none" as --cache becomes None."""
    add = parser.add_argument
    add_precision_flag(parser)
    add("--cache", default="cache", type=lambda folder: None if folder == "none" else folder,
        help="folder for image features; none: keep none")
    add("--cache-gb", type=number(0), default=20.0, help="size limit of that folder")

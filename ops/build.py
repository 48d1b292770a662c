"""Builds the operators' C++ and CUDA code on first use, into torch's extension cache (TORCH_EXTENSIONS_DIR).

A build's folder is named by the torch version and a hash of the sources and of the machine's instruction set or GPUs,
so that a stale one cannot be loaded. The library appears there by renaming, and the lock is the kernel's (flock): a
process that is killed while building leaves neither half a library nor a lock.
"""
import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"  # where no GPU is visible


class BuildError(RuntimeError):
    """One line: why there is no compiled extension, and the remedy."""


@functools.cache
def load(kind):
    """kind "cpu" or "cuda": builds the extension if need be and loads it, so that torch.ops.medsegr has its kernels.

    Processes that come while another one builds wait for it and share its library, or its failure. -> the library's
    path. BuildError if it cannot be built.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler ({compiler}) was found; install g++, or name one with CXX")
    flags, target = (cpu_flags if kind == "cpu" else cuda_flags)()
    sources = sorted(HERE.glob("*.cpp" if kind == "cpu" else "*.cu"))
    digest = hashlib.blake2b(digest_size=8)
    for file in [*sources, *HERE.glob(f"{kind}.h")]:
        digest.update(file.read_bytes())
    digest.update(" ".join([*flags, target, platform.python_version()]).encode())
    name = re.sub(r"\W", "_", f"medsegr_{kind}_torch{torch.__version__}_{digest.hexdigest()}")
    folder, started = build_root() / name, time.time()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        library, failure = folder / f"{name}.so", folder / "failure.txt"
        if not library.is_file():
            with locked(folder / "lock"):
                if failure.is_file() and failure.stat().st_mtime >= started:  # of the process that we waited for
                    raise BuildError(failure.read_text())
                if not library.is_file():
                    compile_library(name, sources, flags, target, kind, library, failure)
        torch.ops.load_library(str(library))
    except OSError as e:
        raise BuildError(f"{folder}: {e}; delete it, or name another place with TORCH_EXTENSIONS_DIR") from None
    return library


def cpp_extension():
    """torch's module, imported late, since that takes a while, and silently: it would report every absent GPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension
    return cpp_extension


def build_root():
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension().get_default_build_root())


@contextlib.contextmanager
def locked(path):
    """Waits until no other process holds PATH's lock; where locks are not supported, does not wait."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_library(name, sources, flags, target, kind, library, failure):
    """Runs ninja in a temporary folder and moves the library to its place; BuildError, also kept in `failure`."""
    torch_build = cpp_extension()
    print(f"building MedSeg-R's operators for {kind}, once, about half a minute", file=sys.stderr, flush=True)
    environment = {"TORCH_CUDA_ARCH_LIST": target} if kind == "cuda" else {}
    if kind == "cuda":
        torch_build.CUDA_HOME = cuda_home()
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            torch_build.load(name, [str(s) for s in sources], extra_cflags=flags, extra_cuda_cflags=flags,
                             build_directory=folder, is_python_module=False)
            built, = Path(folder).glob("*.so")
            os.replace(built, library)
        failure.unlink(missing_ok=True)
    except (RuntimeError, ImportError, subprocess.SubprocessError) as e:
        text = " ".join(str(e).split()) if "error:" not in str(e) else re.search(r"[^\n]*error:[^\n]*", str(e))[0]
        text = f"building {name} failed: {text[:300]}; install a newer g++ (or, for CUDA, a toolkit as torch's)"
        failure.write_text(text)
        raise BuildError(text) from None
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def cpu_flags():
    """-> compiler flags and the name of this machine's instruction set, which -march=native stands for."""
    # at::parallel_for is inline and needs OpenMP; torch's own runtime then serves it, so none is linked
    flags = ["-O3", "-fopenmp", "-Wno-psabi"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags += ["-march=native", "-fno-math-errno"]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"^(flags|Features)\s*:(.*)", text, re.MULTILINE)
        return flags, " ".join(sorted(found[2].split())) if found else platform.processor()
    return flags, platform.processor()


def cuda_flags():
    """-> compiler flags and the architectures: of the visible GPUs, or else of the usual ones."""
    if cuda_home() is None:
        raise BuildError("no nvcc was found; install the CUDA toolkit "
                         f"{torch.version.cuda or ''}, put nvcc on the PATH or name its folder with CUDA_HOME")
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return ["-O3"], os.environ["TORCH_CUDA_ARCH_LIST"]
    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ["-O3"], ";".join(f"{a}.{b}" for a, b in sorted(visible)) or ARCHITECTURES


@functools.cache
def cuda_home():
    """The toolkit's folder or None. Where nvcc is a wrapper script, its folder is not the toolkit's: nvcc is asked."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return str(Path(top[1].strip()).resolve()) if top else str(Path(nvcc).resolve().parents[1])

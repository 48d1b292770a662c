"""Builds the operators' C++ and CUDA code on first use, in torch's extension cache (TORCH_EXTENSIONS_DIR).

A library's name holds the torch version and a hash of the sources and of what they are compiled for, so that a stale
one cannot be loaded. It is built in a temporary folder and moved when it is complete, and the lock is the kernel's
(flock): a process that is killed while building leaves neither half a library nor a lock.
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
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
USUAL = ((8, 0), (8, 6), (8, 9), (9, 0))  # compute capabilities to build for where no GPU is visible


class BuildError(RuntimeError):
    """One line: why there is no compiled extension, and the remedy."""


def load(kind):
    """kind "cpu" or "cuda": builds the extension if need be and loads it, so that torch.ops.medsegr has its kernels.

    Processes that come while another one builds wait for it and share its library. -> the library's path. BuildError if
    it cannot be built.
    """
    flags, target = cpu_flags() if kind == "cpu" else cuda_flags()
    sources = sorted(HERE.glob("*.cpp" if kind == "cpu" else "*.cu"))
    parts = [*(file.read_bytes() for file in [*sources, *sorted(HERE.glob("*.h"))]),
             *(str(part).encode() for part in (flags, target, platform.python_version()))]
    digest = hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()
    name = re.sub(r"\W", "_", f"medsegr_{kind}_torch{torch.__version__}_{digest}")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension().get_default_build_root()) / name
    library = folder / f"{name}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock") if not library.is_file() else contextlib.nullcontext():
            if not library.is_file():
                compile_library(kind, sources, flags, library)
        torch.ops.load_library(library)
    except OSError as e:
        raise BuildError(f"{folder}: {e}; delete it, or name another place with TORCH_EXTENSIONS_DIR") from None
    return library


def cpp_extension():
    """torch's module, imported late and silently: it would report every absent GPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension
    return cpp_extension


@contextlib.contextmanager
def locked(path):
    """Waits until no other process holds PATH's lock; where there is no flock (Windows), does not wait."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_library(kind, sources, flags, library):
    """torch's own build, in a temporary folder; the library is then moved to its place."""
    compiler, name, extension = os.environ.get("CXX", "c++"), library.stem, cpp_extension()
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler ({compiler}) was found; install g++, or name one with CXX")
    if kind == "cuda":
        extension.CUDA_HOME = cuda_home()
    with contextlib.suppress(ImportError):  # the package's, also where the environment is not activated
        import ninja
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    print(f"building MedSeg-R's operators for {kind}, once, about half a minute", file=sys.stderr, flush=True)
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            extension.load(name, [str(s) for s in sources], extra_cflags=flags, extra_cuda_cflags=flags,
                           build_directory=folder, is_python_module=False)
            built, = Path(folder).glob("*.so")  # in one process torch numbers the libraries of the same name
            os.replace(built, library)
    except (RuntimeError, ValueError, LookupError, ImportError, subprocess.SubprocessError) as e:
        line = re.search(r".*(error:|fatal ).*", str(e))
        given = kind == "cuda" and os.environ.get("TORCH_CUDA_ARCH_LIST")
        remedy = f"correct TORCH_CUDA_ARCH_LIST={given}, or leave it out" if given else \
            "install a newer g++ (or, for CUDA, a toolkit as torch's)"
        said = " ".join((line[0] if line else str(e)).split())[:300]
        raise BuildError(f"building {name} failed: {said}; {remedy}") from None


def cpu_flags():
    """-> compiler flags and the machine's instruction set, which -march=native stands for."""
    # at::parallel_for is inline and needs OpenMP; torch's own runtime then serves it, so none is linked
    flags = ["-O3", "-fopenmp", "-Wno-psabi"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags += ["-march=native", "-fno-math-errno"]
    with contextlib.suppress(OSError, TypeError):
        return flags, re.search(r"^(flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    return flags, platform.processor()


def cuda_flags():
    """-> compiler flags and TORCH_CUDA_ARCH_LIST, which torch reads; without it the flags name the visible GPUs."""
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return ["-O3"], given
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())} or USUAL
    return ["-O3", *(f"-gencode=arch=compute_{major}{minor},code={code}_{major}{minor}"
                     for major, minor in sorted(gpus) for code in ("sm", "compute"))], ""


@functools.cache
def cuda_home():
    """The toolkit's folder. Where nvcc is a wrapper script, that is not nvcc's own: nvcc is asked."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise BuildError(f"no nvcc was found; install the CUDA toolkit {torch.version.cuda or ''}, put nvcc on the "
                         "PATH or name its folder with CUDA_HOME")
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return str(Path(top[1].strip()).resolve()) if top else str(Path(nvcc).resolve().parents[1])

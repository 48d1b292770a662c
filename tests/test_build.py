"""Building the operators: several processes, one of them killed, no compiler, a broken source, a toolkit behind a
wrapper. A one-line library stands for the real sources, which tests/test_ops.py builds."""
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import ops
from conftest import ROOT
from ops import build, reference

LOAD = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ops import build; from pathlib import Path; " \
       "build.HERE = Path(sys.argv[1]); print(build.load('cpu'))"


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A folder of sources that build in a second, a cache of its own, and a compiler that writes down its calls."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "probe.cpp").write_text('extern "C" int medsegr_probe() { return 7; }\n')
    compiler = tmp_path / "compiler"
    # where there is a file "slow", linking writes half a library, says so in "half", and takes a minute
    compiler.write_text(f'#!/bin/sh\necho call >> {tmp_path}/calls\n'
                        f'case "$*" in *-shared*) if [ -f {tmp_path}/slow ]; then for last; do :; done\n'
                        f'echo half > "$last"; touch {tmp_path}/half; sleep 60; fi;; esac\n'
                        f'exec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "HERE", sources)
    return sources


def start(sources):
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", LOAD, sources], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def compilations(sources):
    calls = sources.parent / "calls"
    return calls.read_text().count("call") if calls.is_file() else 0


def test_processes_share_one_build(probe):
    done = [p.communicate(timeout=120) for p in [start(probe) for _ in range(3)]]
    assert len({out for out, _ in done}) == 1 and done[0][0].strip().endswith(".so"), done
    calls = compilations(probe)
    assert build.load("cpu").is_file()  # nor does a later one build again
    assert compilations(probe) == calls <= 4, "one process compiles, links and asks for the version; the others wait"
    assert not list(build.load("cpu").parent.glob("tmp*"))


def test_a_killed_build_does_not_block_the_next(probe):
    """Killed while the library is half written."""
    slow = probe.parent / "slow"
    slow.touch()
    builder = start(probe)
    deadline = time.time() + 60
    while not (probe.parent / "half").is_file():
        assert time.time() < deadline and builder.poll() is None
        time.sleep(0.1)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.communicate()
    slow.unlink()
    started = time.time()
    assert build.load("cpu").is_file()
    assert time.time() - started < 50


def test_the_name_tells_versions_and_sources_apart(probe):
    first = build.load("cpu")
    assert "torch" + torch.__version__.split("+")[0].replace(".", "_") in first.name
    (probe / "probe.cpp").write_text('extern "C" int medsegr_probe() { return 8; }\n')
    second = build.load("cpu")
    (probe / "shared.h").touch()
    assert len({first, second, build.load("cpu")}) == 3


def test_a_failure_is_one_line(probe):
    (probe / "probe.cpp").write_text("this is not C++\n")
    with pytest.raises(build.BuildError, match="error:") as e:
        build.load("cpu")
    assert "\n" not in str(e.value)
    (probe / "probe.cpp").write_text("nor is this\n")
    done = [p.communicate(timeout=120) for p in [start(probe) for _ in range(2)]]
    assert all("BuildError" in err and "error:" in err for _, err in done)


def test_without_flock_every_process_builds_for_itself(probe, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    assert build.load("cpu").is_file()


@pytest.mark.parametrize("architectures", ["banana", "99.9", "9.0;sm_90", ";"])
def test_unknown_architectures_end_in_the_fallback(probe, monkeypatch, architectures):
    (probe / "probe.cu").touch()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")  # torch looks at the list before it looks for nvcc
    monkeypatch.setattr(ops, "built", functools.cache(ops.built.__wrapped__))
    build.cuda_home.cache_clear()
    with pytest.warns(UserWarning, match=f"plain PyTorch on cuda.*TORCH_CUDA_ARCH_LIST={architectures}") as warned:
        assert not ops.compiled("cuda") and not ops.compiled("cuda")
    build.cuda_home.cache_clear()
    assert len(warned) == 1 and "\n" not in str(warned[0].message)


def test_what_nvcc_says_of_an_architecture_is_the_line(probe, monkeypatch):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    (probe / "probe.cu").touch()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "3.5")  # torch knows it, a recent nvcc no longer does
    with pytest.raises(build.BuildError, match="compute_35.*TORCH_CUDA_ARCH_LIST=3.5, or leave it out") as e:
        build.load("cuda")
    assert "\n" not in str(e.value)


def test_an_unwritable_cache_is_named(probe, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nothing")
    with pytest.raises(build.BuildError, match="/proc/nothing.*TORCH_EXTENSIONS_DIR"):
        build.load("cpu")


def test_without_a_compiler_the_reference_takes_over(probe, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(ops, "built", functools.cache(ops.built.__wrapped__))
    x, weight = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 3)
    with pytest.warns(UserWarning, match="plain PyTorch.*no-such-compiler.*install g\\+\\+") as warned:
        y = ops.dynamic_conv2d(x, weight)
        ops.deform_conv2d(x, torch.zeros(2, 18, 1, 1), weight)
    assert len(warned) == 1, "said once"
    assert torch.equal(y, reference.dynamic_conv2d(x, weight))


def test_the_toolkit_is_found_behind_a_wrapper(tmp_path, monkeypatch):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    (tmp_path / "nvcc").write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    build.cuda_home.cache_clear()
    home = build.cuda_home()
    build.cuda_home.cache_clear()
    assert os.path.isfile(f"{home}/bin/nvcc") and os.path.isdir(f"{home}/include") and str(tmp_path) not in home


def arguments(call):
    """The arguments of a call in C++, from behind its bracket to the one that closes it."""
    depth, quoted, found = 0, False, [""]
    for before, c in zip(" " + call, call):
        quoted ^= c == '"' and before != "\\"
        depth += 0 if quoted else (c in "([{") - (c in ")]}")
        if depth < 0:
            return found
        found = [*found, ""] if c == "," and not depth and not quoted else [*found[:-1], found[-1] + c]


def test_messages_are_one_string():
    """More parts are put together in a stream, which crashed on a GPU machine, see ops/cuda.h."""
    assert arguments('a == f(b, c), "d, \\", e", g) + h') == ["a == f(b, c)", ' "d, \\", e"', " g"]
    calls = [call for file in [*ROOT.glob("ops/*.[ch]*"), *ROOT.glob("tests/*.h")]
             for call in re.split(r"TORCH_CHECK(?:_VALUE|_INDEX)?\(", file.read_text())[1:]]
    assert len(calls) > 15
    for call in calls:
        assert len(arguments(call)) == 2 and '"' in arguments(call)[1], call[:150]


def test_architectures(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [f"-gencode=arch=compute_{n},code=sm_{n}" in build.cuda_flags()[0] for n in (75, 80, 86, 89, 90)] == [
        False, True, True, True, True]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 6), (9, 0))[i])
    assert [flag.split(",code=")[1] for flag in build.cuda_flags()[0][1:]] == [
        "sm_86", "compute_86", "sm_90", "compute_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert build.cuda_flags() == (["-O3"], "7.5"), "which torch reads"
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    build.cuda_home.cache_clear()
    with pytest.raises(build.BuildError, match="nvcc.*CUDA_HOME"):
        build.cuda_home()

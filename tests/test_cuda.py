"""The CUDA operators against their definitions in float64: emulated on the CPU (host_cuda.h), and on a GPU if there is.

The same tests run on both: [emulated] and [cuda].
"""
import hashlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ops
from ops import build, reference

HERE, OPS = Path(__file__).parent, Path(ops.__file__).parent
NAMES = ("dynamic_conv2d", "dynamic_conv2d_backward", "deform_conv2d", "deform_conv2d_backward")
LOW = (torch.float32, torch.float16, torch.bfloat16)

# Kernels with the mistakes that the emulation has to notice
MISTAKES = """
namespace medsegr {
__global__ void some_wait(float*) { if (threadIdx.x < 7) { __syncthreads(); } }
__global__ void wait_apart(float*) {
  if (threadIdx.x < 7) { __syncthreads(); }
  else { __syncthreads(); }
}
__global__ void past_the_tensor(float* y) { y[32 + threadIdx.x] = 1; }
__global__ void past_shared_memory(float*) { shared_memory<float>()[32 + threadIdx.x] = 1; }
__global__ void no_barrier(float* y) {
  shared_memory<float>()[threadIdx.x] = 1;
  y[threadIdx.x] = shared_memory<float>()[31 - threadIdx.x];
}
at::Tensor mistake(const at::Tensor& x, int64_t which) {
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor y = x.new_empty({32});
  void (*const kernels[])(float*) = {some_wait, wait_apart, past_the_tensor, past_shared_memory, no_barrier};
  launch("mistake", kernels[which], dim3(1), 32, 128, y.data_ptr<float>());
  return y;
}
TORCH_LIBRARY_IMPL(medsegr_host, CPU, m) { m.impl("mistake", mistake); }
}
"""


SLOW = reference.dynamic_conv2d


def quick_reference(x, weight, gate=None, index=None):
    """reference.dynamic_conv2d with targets, not all channels of all targets, as groups: seconds instead of minutes."""
    reference.check_dynamic(x, weight, gate, index)
    x = x if index is None else x[index]
    x = (x if gate is None else gate[:, None] * x).transpose(0, 1)
    return F.conv2d(x, weight[:, None], padding=weight.shape[-1] // 2, groups=len(weight)).transpose(0, 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(reference, "dynamic_conv2d", quick_reference)


class Kernels(NamedTuple):
    ops: object
    device: str
    dtypes: tuple


@pytest.fixture(scope="session")
def host():
    """torch.ops.medsegr_host: ops/*.cu compiled by g++ for the CPU, once for the same sources."""
    library = torch.library.Library("medsegr_host", "DEF")
    for name in NAMES:
        library.define(str(getattr(torch.ops.medsegr, name).default._schema).removeprefix("medsegr::"))
    library.define("mistake(Tensor x, int which) -> Tensor")
    kernels = sorted(OPS.glob("*.cu"))
    files = (*kernels, *sorted(OPS.glob("*.h")), HERE / "host_cuda.h")
    text = [torch.__version__, MISTAKES] + [p.read_text() for p in files]
    name = "medsegr_host_" + hashlib.blake2b("\n".join(text).encode(), digest_size=8).hexdigest()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or build.cpp_extension().get_default_build_root()) / name
    folder.mkdir(parents=True, exist_ok=True)
    with build.locked(folder / "lock"):
        if not (folder / "host.so").is_file():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                sources = [Path(scratch) / f"{p.stem}.cpp" for p in kernels]
                for source, kernel in zip(sources, kernels):
                    source.write_text(f'#include "{kernel}"\n' + MISTAKES * (kernel is kernels[0]))
                flags = ["-O1", "-w", "-DMEDSEGR_HOST", "-include", str(HERE / "host_cuda.h")]
                build.cpp_extension().load(name, [str(s) for s in sources], extra_cflags=flags,
                                           build_directory=scratch, is_python_module=False)
                os.replace(Path(scratch) / f"{name}.so", folder / "host.so")
    torch.ops.load_library(str(folder / "host.so"))
    yield torch.ops.medsegr_host
    library._destroy()


@pytest.fixture(params=["emulated", "cuda"])
def kernels(request):
    if request.param == "emulated":
        return Kernels(request.getfixturevalue("host"), "cpu", (torch.float64, *LOW))
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    build.load("cuda")
    return Kernels(torch.ops.medsegr, "cuda", LOW)


def fenced(t, device):
    """t with NaN (or an index of no image) before and after it in memory, so that reading there is noticed."""
    if t is None or t.numel() == 0:
        return t if t is None else t.to(device)
    fence = torch.full((64,), float("nan") if t.is_floating_point() else -1, dtype=t.dtype)
    return torch.cat([fence, t.flatten(), fence]).to(device)[64:-64].view(t.shape)


def compare(got, want):
    """Equal but for one rounding to the dtype of got, and sums in float32 (or float64 for float64)."""
    wide = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32)
    scale = want.abs().max().item() if want.numel() else 0
    torch.testing.assert_close(got.cpu().double(), want.detach(), rtol=torch.finfo(got.dtype).eps,
                               atol=max(30 * wide.eps * scale, torch.finfo(got.dtype).tiny))


def check(kernels, name, dtype, x, *others, index=None):
    """Forward and backward of an operator for x in dtype; others: weight and gate, or offset and weight, in float64.

    An input that is None has no gradient.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = (dtype, *[wide] * len(others))
    inputs = [None if t is None else t.to(kind) for t, kind in zip((x, *others), kinds)]
    exact = [None if t is None else t.to(torch.float64, copy=True).requires_grad_() for t in inputs]
    extra = (index,) if name == "dynamic_conv2d" else ()
    want = getattr(reference, name)(*exact, *extra)
    up = torch.randn(want.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    asked = [t for t in exact if t is not None]
    grads = iter(torch.autograd.grad(want, asked, up.double()) if want.requires_grad else map(torch.zeros_like, asked))

    inputs = [fenced(t, kernels.device) for t in inputs] + [fenced(t, kernels.device) for t in extra]
    got = getattr(kernels.ops, name)(*inputs)
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    compare(got, want)
    needs = [t is not None for t in exact]
    found = getattr(kernels.ops, f"{name}_backward")(fenced(up, kernels.device), *inputs, *needs)
    for t, kind, need in zip(found, kinds, needs):
        assert t.dtype == kind
        compare(t, next(grads) if need else torch.empty(0, dtype=torch.float64))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dynamic_inputs(seed, B, M, C, H, W, k):
    index = torch.randint(0, B, (M,), generator=torch.Generator().manual_seed(seed))  # repeats, and gaps if M is small
    return dict(x=draw(seed, B, C, H, W), weight=draw(seed + 1, M, k, k), gate=draw(seed + 2, M, H, W), index=index)


def test_the_quick_reference_is_the_reference():
    c = dynamic_inputs(0, 2, 5, 3, 6, 4, 5)
    torch.testing.assert_close(quick_reference(**c), SLOW(**c))
    torch.testing.assert_close(quick_reference(c["x"], c["weight"][:2]), SLOW(c["x"], c["weight"][:2]))


@pytest.mark.parametrize("seed", range(32))
def test_dynamic_conv2d(kernels, seed):
    rng = np.random.default_rng(seed)
    B, M, C, H, W = (int(n) for n in rng.integers(1, [4, 6, 8, 24, 24]))
    k = int(rng.choice([1, 3, 5, 7, 9, 11]))
    c = dynamic_inputs(seed, B, M, C, H, W, k)
    index = c["index"] if seed % 3 else None
    x = c["x"] if seed % 3 else draw(seed, M, C, H, W)
    check(kernels, "dynamic_conv2d", kernels.dtypes[seed % len(kernels.dtypes)], x, c["weight"],
          c["gate"] if seed % 2 else None, index=index)


@pytest.mark.parametrize("shape", [
    (2, 3, 2, 70, 65, 7), (1, 2, 1, 17, 130, 3), (1, 1, 2, 150, 3, 11),    # planes larger than a tile
    (1, 2, 1, 40, 40, 31),                                                 # a kernel that needs smaller tiles
    (3, 8, 256, 14, 14, 7), (5, 40, 110, 2, 3, 3), (1, 150, 16, 4, 4, 5),  # several planes in a block
    (2, 3, 7, 1, 1, 9), (1, 2, 3, 1, 40, 5)], ids=str)
def test_dynamic_conv2d_in_tiles_and_groups(kernels, shape):
    c = dynamic_inputs(0, *shape)
    check(kernels, "dynamic_conv2d", torch.float32, c["x"], c["weight"], c["gate"], index=c["index"])


def deform_inputs(seed, M, C, H, W, k, shared, reach):
    offset = reach * (2 * torch.rand(M, 2 * k * k, *((1, 1) if shared else (H, W)), dtype=torch.float64,
                                     generator=torch.Generator().manual_seed(seed)) - 1)
    return draw(seed, M, C, H, W), offset, draw(seed + 1, M, k, k)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per pixel"])
@pytest.mark.parametrize("seed", range(30))
def test_deform_conv2d(kernels, seed, shared):
    rng = np.random.default_rng(seed)
    M, C, H, W = (int(n) for n in rng.integers(1, [5, 20, 20, 24]))
    reach = (0.9, 1.9, 2.9, 8, 50)[seed % 5]  # within the dense kernels of all sizes; beyond; mostly outside
    x, offset, weight = deform_inputs(seed, M, C, H, W, int(rng.choice([1, 3, 3, 5, 7])), shared, reach)
    if seed % 7 == 0:
        offset = offset.round()  # whole pixels, where bilinear interpolation has a kink
    if seed % 6 == 0 and reach < 8:
        offset[: M // 2] *= 9  # near and far targets together
    check(kernels, "deform_conv2d", kernels.dtypes[seed % len(kernels.dtypes)], x, offset, weight)


@pytest.mark.parametrize("shape", [
    (2, 2, 70, 65, 3, True), (2, 2, 70, 65, 3, False),   # planes larger than a tile
    (24, 100, 4, 5, 3, True), (40, 110, 2, 3, 3, True),  # several planes in a block
    (2, 64, 14, 14, 3, False), (3, 5, 6, 7, 11, True)], ids=str)
def test_deform_conv2d_in_tiles_and_groups(kernels, shape):
    for reach in (1, 5):
        check(kernels, "deform_conv2d", torch.float32, *deform_inputs(0, *shape, reach))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per pixel"])
def test_deform_conv2d_survives_any_offset(kernels, shared):
    """Not finite: NaN. Finite and far outside: the tap reads nothing."""
    x, offset, weight = deform_inputs(0, 6, 3, 5, 4, 3, shared, 0.5)
    values = (float("nan"), float("inf"), -float("inf"), 1e30, -2.0 ** 31)
    for m, value in enumerate(values):
        offset[m, 7] = value
    inputs = [fenced(t.float(), kernels.device) for t in (x, offset, weight)]
    y = kernels.ops.deform_conv2d(*inputs).cpu()
    assert y[:3].isnan().all()
    nothing = weight.clone()
    nothing[:5, 1, 0] = 0  # of the tap whose dx was set
    offset[:5, 7] = 0
    torch.testing.assert_close(y[3:].double(), reference.deform_conv2d(x, offset, nothing)[3:], rtol=1e-5, atol=1e-5)
    kernels.ops.deform_conv2d_backward(inputs[0], *inputs, True, True, True)


def test_no_targets_no_channels_no_pixels(kernels):
    z = lambda *shape: torch.zeros(*shape, device=kernels.device)
    index = torch.zeros(0, dtype=torch.int64, device=kernels.device)
    for x, M, gate in ((z(2, 3, 4, 5), 0, z(0, 4, 5)), (z(2, 0, 4, 5), 2, z(2, 4, 5)), (z(2, 3, 0, 5), 2, z(2, 0, 5))):
        weight, at = z(M, 7, 7), index if M == 0 else None
        y = kernels.ops.dynamic_conv2d(x, weight, gate, at)
        assert y.shape == (M, *x.shape[1:])
        found = kernels.ops.dynamic_conv2d_backward(y, x, weight, gate, at, True, True, True)
        assert [t.shape for t in found] == [x.shape, weight.shape, gate.shape] and not any(t.any() for t in found)
        x, weight = x[:M], z(M, 3, 3)
        for offset in (z(M, 18, 1, 1), z(M, 18, *x.shape[2:])):
            y = kernels.ops.deform_conv2d(x, offset, weight)
            assert y.shape == x.shape
            found = kernels.ops.deform_conv2d_backward(y, x, offset, weight, True, True, True)
            assert [t.shape for t in found] == [x.shape, offset.shape, weight.shape] and not any(t.any() for t in found)


def test_images_without_a_target_have_no_gradient(kernels):
    c = dynamic_inputs(0, 4, 2, 3, 5, 6, 3)
    check(kernels, "dynamic_conv2d", torch.float32, c["x"], c["weight"], c["gate"], index=torch.tensor([2, 2]))


def test_strides(kernels):
    """Inputs that are not contiguous, and the gradient of a sum, which is one number for all."""
    to = lambda t: t.float().to(kernels.device)
    x, weight = to(draw(0, 5, 4, 3, 2)).permute(3, 1, 2, 0), to(draw(1, 3, 3, 2)).permute(2, 1, 0)
    gate, offset = to(draw(2, 2, 5, 3)).mT, to(draw(3, 18, 1, 1, 1)).transpose(0, 1).expand(2, -1, 3, 5)
    up = torch.ones(1, device=kernels.device).expand(2, 4, 3, 5)
    for name, inputs in (("dynamic_conv2d", (x, weight, gate, None)), ("deform_conv2d", (x, offset, weight)),
                         ("deform_conv2d", (x, offset[..., :1, :1], weight))):
        packed = [t if t is None else t.contiguous() for t in inputs]
        assert not all(t is None or t.is_contiguous() for t in inputs)
        forward, backward = getattr(kernels.ops, name), getattr(kernels.ops, f"{name}_backward")
        torch.testing.assert_close(forward(*inputs), forward(*packed), rtol=0, atol=0)
        for a, b in zip(backward(up, *inputs, True, True, True), backward(up.contiguous(), *packed, True, True, True)):
            torch.testing.assert_close(a, b)


def test_only_what_is_needed(kernels):
    c = {n: t if n == "index" else t.float() for n, t in dynamic_inputs(0, 2, 3, 4, 5, 6, 3).items()}
    x, offset, weight = (t.float() for t in deform_inputs(0, 3, 4, 5, 6, 3, True, 1))
    for name, inputs in (("dynamic_conv2d", (c["x"], c["weight"], c["gate"], c["index"])),
                         ("deform_conv2d", (x, offset, weight)),
                         ("deform_conv2d", (x, offset.expand(3, 18, 5, 6), weight))):
        inputs = [t.to(kernels.device) for t in inputs]
        up = torch.ones(3, 4, 5, 6, device=kernels.device)
        backward = getattr(kernels.ops, f"{name}_backward")
        all_of_them = backward(up, *inputs, True, True, True)
        for wanted in range(3):
            found = backward(up, *inputs, *(i == wanted for i in range(3)))
            assert len({id(t) for t in found}) == 3, "no result may be another one"
            for i, t in enumerate(found):
                torch.testing.assert_close(t, all_of_them[i] if i == wanted else t.new_empty(0))


def test_sums_do_not_depend_on_chance(kernels):
    """Only the gradient of x for offsets of their own at each pixel does, and says so."""
    c = {n: t if n == "index" else t.float() for n, t in dynamic_inputs(0, 2, 9, 30, 9, 8, 5).items()}
    x, offset, weight = (t.float() for t in deform_inputs(0, 9, 30, 9, 8, 3, True, 1))
    up, before = draw(5, 9, 30, 9, 8).float(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for name, inputs in (("dynamic_conv2d", (c["x"], c["weight"], c["gate"], c["index"])),
                             ("deform_conv2d", (x, offset, weight)), ("deform_conv2d", (x, 9 * offset, weight))):
            inputs = [t.to(kernels.device) for t in (up, *inputs)]
            run = lambda: getattr(kernels.ops, f"{name}_backward")(*inputs, True, True, True)
            assert all(torch.equal(a, b) for a, b in zip(run(), run()))
        inputs = [t.to(kernels.device) for t in (up, x, offset.expand(9, 18, 9, 8), weight)]
        assert kernels.ops.deform_conv2d_backward(*inputs, False, True, True)[1].shape == (9, 18, 9, 8)
        with pytest.raises(RuntimeError, match="medsegr::deform_conv2d_backward"):
            kernels.ops.deform_conv2d_backward(*inputs, True, True, True)
    finally:
        torch.use_deterministic_algorithms(before)


def test_wrong_arguments_are_refused(kernels):
    z = lambda *shape, **kind: torch.zeros(*shape, device=kernels.device, **kind)
    x, index, needs = z(2, 3, 4, 5), z(2, dtype=torch.int64), (True, True, False)
    for name, *inputs in (("dynamic_conv2d", x, z(2, 4, 4), None, None), ("dynamic_conv2d", x, z(3, 3, 3), None, None),
                          ("dynamic_conv2d", x, z(2, 3, 3), z(2, 5, 4), None),
                          ("dynamic_conv2d", x, z(2, 3, 3), None, index.int()),
                          ("dynamic_conv2d", x, z(2, 3, 3, dtype=torch.float16), None, None),
                          ("dynamic_conv2d", x, z(2, 201, 201), None, None),
                          ("dynamic_conv2d", x[:0], z(2, 3, 3), None, index),
                          ("dynamic_conv2d", x.int(), z(2, 3, 3), None, None),
                          ("deform_conv2d", x.int(), z(2, 18, 1, 1), z(2, 3, 3)),
                          ("dynamic_conv2d_backward", z(2, 3, 5, 4), x, z(2, 3, 3), None, None, *needs),
                          ("deform_conv2d", x, z(2, 18, 4, 4), z(2, 3, 3)),
                          ("deform_conv2d", x, z(2, 8, 1, 1), z(2, 2, 2)),
                          ("deform_conv2d", x, z(2, 18, 1, 1), z(2, 3, 3).half()),
                          ("deform_conv2d_backward", z(2, 3, 4, 4), x, z(2, 18, 1, 1), z(2, 3, 3), *needs)):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            getattr(kernels.ops, name)(*inputs)


def test_an_index_of_no_image_is_noticed(host):
    for bad in (2, -1):
        index = torch.tensor([0, bad])
        with pytest.raises(RuntimeError, match="device assertion"):
            host.dynamic_conv2d(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 3), None, index)
        for needs in ((True, False, False), (False, True, False)):
            with pytest.raises(RuntimeError, match="device assertion"):
                host.dynamic_conv2d_backward(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 3),
                                             None, index, *needs)


def test_many_targets(host):
    """More than the 65,535 that a grid's second and third dimension can have."""
    x, weight = draw(0, 66000, 1, 1, 1), draw(1, 66000, 1, 1)
    torch.testing.assert_close(host.dynamic_conv2d(x, weight, None, None), x * weight[..., None])


def test_the_emulation_notices_mistakes(host):
    messages = "7 of 32 threads wait", "barriers of line", "outside of a tensor", "past its shared memory"
    for which, message in enumerate(messages):
        with pytest.raises(RuntimeError, match=message):
            host.mistake(torch.zeros(1), which)
    assert host.mistake(torch.zeros(1), 4).isnan().any()


def test_builds_and_loads_without_a_gpu(monkeypatch):
    if build.cuda_home() is None:
        pytest.skip("no nvcc")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # one architecture only: quicker
    build.load("cuda")
    for name in NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"medsegr::{name}", "CUDA")

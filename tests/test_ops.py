"""The operators, compiled and in plain PyTorch: against their definitions in float64, gradcheck, opcheck,
torch.compile, and torchvision where their domains meet."""
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import ops
from ops import reference

# the compiled operators and their plain definitions meet the same tests
VERSIONS = {"compiled": ops, "reference": reference}
# rounding of one sum of products, relative to its largest term, in each dtype
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=VERSIONS)
def version(request):
    if request.param == "compiled":
        assert ops.compiled("cpu"), "this machine has a compiler, so the extension must build"
    return VERSIONS[request.param]


def random_case(seed, dtype=torch.float64, biggest=9, kernels=(1, 3, 5, 7, 9), multiples=1):
    """Shapes, a kernel size and tensors drawn from a seed; index repeats some images and leaves some out."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    B, M, C = (int(n) for n in rng.integers(1, 4, 3))
    H, W = (multiples * int(rng.integers(1, biggest)) for _ in "HW")
    k = int(rng.choice(kernels))
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    # the kernels take these as float32 or float64; rounded, so that the float64 reference sees the same numbers
    wide = lambda *shape: draw(*shape).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return SimpleNamespace(
        x=draw(B, C, H, W), weight=wide(M, k, k), gate=wide(M, H, W), xm=draw(M, C, H, W),
        index=torch.from_numpy(rng.integers(0, B, M)), offset=2 * wide(M, 2 * k * k, H, W),
        shared=2 * wide(M, 2 * k * k, 1, 1), far=30 * wide(M, 2 * k * k, 1, 1))


def leaves(*tensors, dtype=None):
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def assert_close(ours, truth, dtype):
    """Up to rounding in `dtype`, relative to the largest number of the truth."""
    assert ours.shape == truth.shape
    if truth.numel():
        error = (ours.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-6)
        assert error < ROUNDING[dtype], f"{error:.2e}"


def value_and_gradients(function, inputs, seed=0):
    y = function(*inputs)
    up = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if inputs[0].is_contiguous(memory_format=torch.channels_last):  # so is the gradient then, in the model
        up = up.contiguous(memory_format=torch.channels_last)
    return y, *torch.autograd.grad(y, inputs, up.to(y.dtype))


def slow_dynamic(x, weight, gate, index):
    """The sum of the definition, pixel by pixel."""
    M, k = weight.shape[:2]
    _, C, H, W = x.shape
    out = torch.zeros(M, C, H, W, dtype=x.dtype)
    for m in range(M):
        padded = F.pad(gate[m] * x[index[m]], [k // 2] * 4)
        for i in range(H):
            for j in range(W):
                out[m, :, i, j] = (padded[:, i:i + k, j:j + k] * weight[m]).sum((1, 2))
    return out


@pytest.mark.parametrize("seed", range(15))
def test_dynamic_conv2d_is_its_definition(version, seed):
    c = random_case(seed)
    expected = slow_dynamic(c.x, c.weight, c.gate, c.index)
    torch.testing.assert_close(version.dynamic_conv2d(c.x, c.weight, c.gate, c.index), expected)
    ones, every = torch.ones_like(c.gate), torch.arange(len(c.weight))
    torch.testing.assert_close(version.dynamic_conv2d(c.x, c.weight, None, c.index),
                               slow_dynamic(c.x, c.weight, ones, c.index))
    torch.testing.assert_close(version.dynamic_conv2d(c.xm, c.weight), slow_dynamic(c.xm, c.weight, ones, every))


def torchvision_deform(x, offset, weight):
    """torchvision's operator on targets folded into channels and groups."""
    M, C, H, W = x.shape
    k = weight.shape[-1]
    y = torchvision.ops.deform_conv2d(x.reshape(1, M * C, H, W), offset.expand(M, -1, H, W).reshape(1, -1, H, W),
                                      weight[:, None].repeat_interleave(C, 0), padding=k // 2)
    return y.view(M, C, H, W)


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("offsets", ["offset", "shared", "far"])
def test_deform_conv2d_is_torchvisions(version, seed, offsets):
    c = random_case(seed)
    inputs = leaves(c.xm, getattr(c, offsets), c.weight)
    for ours, theirs in zip(value_and_gradients(version.deform_conv2d, inputs),
                            value_and_gradients(torchvision_deform, inputs)):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_at_the_start_is_torchvisions(version):
    """Training starts at whole-pixel offsets, where bilinear interpolation has a kink and a side must be chosen."""
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    weight = torch.randn(2, 3, 3, dtype=torch.float64)
    for value in (0.0, 1.0, -2.0, 5.0):
        for H, W in ((1, 1), (6, 5)):
            offset = torch.full((2, 18, H, W), value, dtype=torch.float64, requires_grad=True)
            ours = torch.autograd.grad(version.deform_conv2d(x, offset, weight).square().sum(), offset)[0]
            theirs = torch.autograd.grad(torchvision_deform(x, offset, weight).square().sum(), offset)[0]
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("seed", range(4))
def test_gradients(version, seed):
    c = random_case(seed, biggest=5, kernels=(1, 3))
    assert torch.autograd.gradcheck(lambda x, w, g: version.dynamic_conv2d(x, w, g, c.index),
                                    leaves(c.x, c.weight, c.gate))
    for offset in (c.offset, c.shared, c.far):
        assert torch.autograd.gradcheck(version.deform_conv2d, leaves(c.xm, offset, c.weight))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("seed", range(14))
def test_every_dtype_is_the_float64_reference_rounded(dtype, seed):
    """Sizes about and above a SIMD register and a strip of rows, the last four of whole ones, both layouts in memory;
    values and the gradient of every input."""
    c = random_case(100 + seed, dtype, biggest=40) if seed < 10 else random_case(seed, dtype, biggest=4, multiples=16)
    if seed % 2:
        c.x, c.xm = (x.contiguous(memory_format=torch.channels_last) for x in (c.x, c.xm))
    for function, truth, tensors in (
            (lambda x, w, g: ops.dynamic_conv2d(x, w, g, c.index),
             lambda x, w, g: reference.dynamic_conv2d(x, w, g, c.index), (c.x, c.weight, c.gate)),
            (ops.dynamic_conv2d, reference.dynamic_conv2d, (c.xm, c.weight)),
            *((ops.deform_conv2d, reference.deform_conv2d, (c.xm, o, c.weight)) for o in (c.offset, c.shared, c.far))):
        ours = value_and_gradients(function, leaves(*tensors))
        theirs = value_and_gradients(truth, leaves(*tensors, dtype=torch.float64))
        assert ours[0].dtype == dtype and [g.dtype for g in ours[1:]] == [t.dtype for t in tensors]
        for a, b in zip(ours, theirs):
            assert_close(a, b, dtype)


@pytest.mark.parametrize("k", [11, 13])
def test_kernels_larger_than_those_compiled(k):
    c, generator = random_case(1, biggest=30), torch.Generator().manual_seed(0)
    weight = torch.randn(len(c.weight), k, k, generator=generator, dtype=torch.float64)
    inputs = leaves(c.x, weight, c.gate)
    for a, b in zip(*(value_and_gradients(lambda x, w, g: version.dynamic_conv2d(x, w, g, c.index), inputs)
                      for version in VERSIONS.values())):
        torch.testing.assert_close(a, b)


def test_only_what_is_asked_for_is_computed():
    """Each subset of the inputs that ask for a gradient gives that gradient, the same as all together."""
    c = random_case(7)
    for function, tensors in ((lambda x, w, g: ops.dynamic_conv2d(x, w, g, c.index), (c.x, c.weight, c.gate)),
                              *((ops.deform_conv2d, (c.xm, o, c.weight)) for o in (c.offset, c.shared, c.far))):
        everything = value_and_gradients(function, leaves(*tensors))[1:]
        for bits in range(1, 8):
            inputs = [t.detach().clone().requires_grad_(bool(bits >> i & 1)) for i, t in enumerate(tensors)]
            y = function(*inputs)
            up = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            y.backward(up)
            for t, full in zip(inputs, everything):
                assert t.grad is None if not t.requires_grad else torch.equal(t.grad, full)


def test_shared_offsets_equal_the_same_offset_everywhere(version):
    c = random_case(3)
    M, n = c.shared.shape[:2]
    for shared in (c.shared, c.far):
        everywhere = shared.expand(M, n, *c.xm.shape[-2:])
        torch.testing.assert_close(version.deform_conv2d(c.xm, shared, c.weight),
                                   version.deform_conv2d(c.xm, everywhere, c.weight))


def test_no_targets_and_strides(version):
    x = torch.randn(2, 5, 4, 3).transpose(1, 3)  # [2,3,4,5], not contiguous
    none = torch.zeros(0, dtype=torch.int64)
    kernels = torch.zeros(0, 7, 7, requires_grad=True)
    y = version.dynamic_conv2d(x, kernels, None, none)
    assert y.shape == (0, 3, 4, 5)
    y.sum().backward()
    assert kernels.grad.shape == (0, 7, 7)
    assert version.deform_conv2d(x[:0], torch.zeros(0, 18, 1, 1), torch.zeros(0, 3, 3)).shape == (0, 3, 4, 5)
    weight, offset = torch.randn(3, 3, 2).permute(2, 1, 0), torch.randn(18, 2, 1, 1).transpose(0, 1)
    for call, inputs in ((version.dynamic_conv2d, (x, weight)), (version.deform_conv2d, (x, offset, weight))):
        torch.testing.assert_close(call(*inputs), call(*(t.contiguous() for t in inputs)))


def test_images_that_no_target_reads_get_no_gradient():
    x, weight = torch.randn(4, 2, 5, 6, requires_grad=True), torch.randn(3, 3, 3)
    ops.dynamic_conv2d(x, weight, None, torch.tensor([2, 0, 2])).sum().backward()
    assert x.grad[[0, 2]].abs().sum() > 0 and not x.grad[[1, 3]].any()


def test_a_number_that_is_none_stays_one():
    """NaN in an offset reaches the result instead of a wild address."""
    x, weight = torch.randn(1, 3, 6, 6), torch.ones(1, 3, 3)
    for value in (float("nan"), float("inf"), 1e30, -1e30):
        for shape in ((1, 18, 1, 1), (1, 18, 6, 6)):
            offset = torch.zeros(shape)
            offset[0, 4] = value
            y = ops.deform_conv2d(x, offset, weight)
            assert y.isfinite().all() == (abs(value) == 1e30)


@pytest.mark.parametrize("call", [
    lambda o, x: o.dynamic_conv2d(x, torch.zeros(2, 4, 4)), lambda o, x: o.dynamic_conv2d(x, torch.zeros(3, 3, 3)),
    lambda o, x: o.dynamic_conv2d(x, torch.zeros(2, 3, 3), torch.zeros(2, 5, 4)),
    lambda o, x: o.dynamic_conv2d(x[0], torch.zeros(3, 3, 3)),
    lambda o, x: o.deform_conv2d(x, torch.zeros(2, 18, 4, 4), torch.zeros(2, 3, 3)),
    lambda o, x: o.deform_conv2d(x, torch.zeros(2, 18, 1, 1), torch.zeros(2, 2, 2)),
    lambda o, x: o.deform_conv2d(x[0], torch.zeros(2, 18, 1, 1), torch.zeros(2, 3, 3))])
def test_wrong_shapes_are_refused(version, call):
    with pytest.raises(ValueError, match="must be|kernels for"):
        call(version, torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("wrong", [-1, 2, 2 ** 40])
def test_an_index_beyond_the_images_is_refused(wrong):
    with pytest.raises(IndexError, match="not one of 2 images"):
        ops.dynamic_conv2d(torch.zeros(2, 3, 4, 5), torch.zeros(1, 3, 3), None, torch.tensor([wrong]))


def test_debug_names_a_bad_index_before_any_kernel_runs(monkeypatch):
    monkeypatch.setattr(ops, "DEBUG", True)
    monkeypatch.setattr(ops, "compiled", lambda *a: pytest.fail("too late"))
    with pytest.raises(IndexError, match="index -1 is not one of 2 images"):
        ops.dynamic_conv2d(torch.zeros(2, 3, 4, 5), torch.zeros(3, 3, 3), None, torch.tensor([0, -1, 1]))


@pytest.mark.parametrize("seed", range(3))
def test_opcheck(seed):
    """Schema, fake kernels, autograd registration and ahead-of-time dispatch, as torch itself checks them."""
    c = random_case(seed)
    assert ops.compiled("cpu")
    torch.library.opcheck(torch.ops.medsegr.dynamic_conv2d.default, (*leaves(c.x, c.weight, c.gate), c.index))
    torch.library.opcheck(torch.ops.medsegr.dynamic_conv2d.default, (*leaves(c.xm, c.weight), None, None))
    y, needs = ops.dynamic_conv2d(c.x, c.weight, c.gate, c.index), ((True, True, False), (False, False, True))
    for needed in needs:
        torch.library.opcheck(torch.ops.medsegr.dynamic_conv2d_backward.default,
                              (y, c.x, c.weight, c.gate, c.index, *needed))
    for offset in (c.offset, c.shared):
        torch.library.opcheck(torch.ops.medsegr.deform_conv2d.default, leaves(c.xm, offset, c.weight))
        for needed in needs:
            torch.library.opcheck(torch.ops.medsegr.deform_conv2d_backward.default,
                                  (c.xm, c.xm, offset, c.weight, *needed))


def test_compile_does_not_break():
    """torch.compile with fullgraph gives the same values and gradients. aot_eager: everything but code generation."""
    c = random_case(5)

    def both(x, weight, gate, offset, kernel):
        return ops.deform_conv2d(ops.dynamic_conv2d(x, weight, gate, c.index).relu(), offset, kernel)
    inputs = leaves(c.x, c.weight, c.gate, torch.randn(len(c.weight), 18, 1, 1, dtype=torch.float64),
                    torch.randn(len(c.weight), 3, 3, dtype=torch.float64))
    traced = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(traced, inputs), value_and_gradients(both, inputs)):
        torch.testing.assert_close(a, b)


def test_autocast_is_as_for_torchs_convolutions():
    x, offset, weight = torch.randn(1, 3, 8, 8), torch.randn(1, 18, 1, 1), torch.randn(1, 3, 3, requires_grad=True)
    for scope in (contextlib.nullcontext, ops.reference_only):
        with torch.autocast("cpu", torch.bfloat16), scope():
            assert F.conv2d(x, weight.expand(1, 3, 3, 3)).dtype == torch.bfloat16
            for y in (ops.dynamic_conv2d(x, weight), ops.deform_conv2d(x, offset, weight)):
                assert y.dtype == torch.bfloat16
                y.float().sum().backward()
                assert weight.grad.dtype == torch.float32


def test_threads_do_not_change_the_sums():
    """Bit for bit: channels are shared out by their number, not by the threads'."""
    x, before = torch.randn(2, 70, 20, 20), torch.get_num_threads()
    inputs = leaves(x, torch.randn(2, 7, 7), torch.rand(2, 20, 20))
    deformed = leaves(x, torch.randn(2, 18, 20, 20), torch.randn(2, 3, 3))
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([*value_and_gradients(ops.dynamic_conv2d, inputs),
                          *value_and_gradients(ops.deform_conv2d, deformed)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))

"""The operators against their definitions in float64, gradcheck, and torchvision where their domains meet."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from ops import deform_conv2d, dynamic_conv2d


def random_case(seed):
    """Shapes, a kernel size and float64 tensors drawn from a seed."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    B, M, C = (int(n) for n in rng.integers(1, 4, 3))
    H, W, k = int(rng.integers(1, 9)), int(rng.integers(1, 9)), int(rng.choice([1, 3, 5, 7, 9]))
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return dict(x=draw(B, C, H, W), weight=draw(M, k, k), gate=draw(M, H, W), xm=draw(M, C, H, W),
                index=torch.from_numpy(rng.integers(0, B, M)), offset=2 * draw(M, 2 * k * k, H, W),
                shared=2 * draw(M, 2 * k * k, 1, 1))


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


@pytest.mark.parametrize("seed", range(25))
def test_dynamic_conv2d_is_its_definition(seed):
    c = random_case(seed)
    expected = slow_dynamic(c["x"], c["weight"], c["gate"], c["index"])
    torch.testing.assert_close(dynamic_conv2d(c["x"], c["weight"], c["gate"], c["index"]), expected)
    ones = torch.ones_like(c["gate"])
    torch.testing.assert_close(dynamic_conv2d(c["x"], c["weight"], None, c["index"]),
                               slow_dynamic(c["x"], c["weight"], ones, c["index"]))
    every = torch.arange(len(c["weight"]))
    torch.testing.assert_close(dynamic_conv2d(c["xm"], c["weight"]), slow_dynamic(c["xm"], c["weight"], ones, every))


def torchvision_deform(x, offset, weight):
    """torchvision's operator on targets folded into channels and groups."""
    M, C, H, W = x.shape
    k = weight.shape[-1]
    y = torchvision.ops.deform_conv2d(x.reshape(1, M * C, H, W), offset.expand(M, -1, H, W).reshape(1, -1, H, W),
                                      weight[:, None].repeat_interleave(C, 0), padding=k // 2)
    return y.view(M, C, H, W)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("offsets", ["offset", "shared"])
def test_deform_conv2d_is_torchvisions(seed, offsets):
    c = random_case(seed)
    inputs = [c[n].requires_grad_() for n in ("xm", offsets, "weight")]
    ours, theirs = deform_conv2d(*inputs), torchvision_deform(*inputs)
    torch.testing.assert_close(ours, theirs)
    up = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(seed))
    for a, b in zip(torch.autograd.grad(ours, inputs, up), torch.autograd.grad(theirs, inputs, up)):
        torch.testing.assert_close(a, b)


def test_the_gradient_at_the_start_is_torchvisions():
    """Training starts at whole-pixel offsets, where bilinear interpolation has a kink and a side must be chosen."""
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    weight = torch.randn(2, 3, 3, dtype=torch.float64)
    for value in (0.0, 1.0, -2.0):
        offset = torch.full((2, 18, 1, 1), value, dtype=torch.float64, requires_grad=True)
        ours = torch.autograd.grad(deform_conv2d(x, offset, weight).square().sum(), offset)[0]
        theirs = torch.autograd.grad(torchvision_deform(x, offset, weight).square().sum(), offset)[0]
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("seed", range(4))
def test_gradients(seed):
    c = random_case(seed)
    weight = c["weight"].requires_grad_()
    x, gate, xm = c["x"].requires_grad_(), c["gate"].requires_grad_(), c["xm"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, g: dynamic_conv2d(x, w, g, c["index"]), (x, weight, gate))
    for offset in (c["offset"], c["shared"]):
        assert torch.autograd.gradcheck(deform_conv2d, (xm, offset.requires_grad_(), weight))


def test_shared_offsets_equal_the_same_offset_everywhere():
    c = random_case(3)
    M, n = c["shared"].shape[:2]
    everywhere = c["shared"].expand(M, n, *c["xm"].shape[-2:])
    torch.testing.assert_close(deform_conv2d(c["xm"], c["shared"], c["weight"]),
                               deform_conv2d(c["xm"], everywhere, c["weight"]))


def test_no_targets_and_strides():
    x = torch.randn(2, 5, 4, 3).transpose(1, 3)  # [2,3,4,5], not contiguous
    none = torch.zeros(0, dtype=torch.int64)
    assert dynamic_conv2d(x, torch.zeros(0, 7, 7), None, none).shape == (0, 3, 4, 5)
    assert deform_conv2d(x[:0], torch.zeros(0, 18, 1, 1), torch.zeros(0, 3, 3)).shape == (0, 3, 4, 5)
    weight = torch.randn(2, 3, 3)
    assert torch.equal(dynamic_conv2d(x, weight), dynamic_conv2d(x.contiguous(), weight))


@pytest.mark.parametrize("call", [
    lambda x: dynamic_conv2d(x, torch.zeros(2, 4, 4)), lambda x: dynamic_conv2d(x, torch.zeros(3, 3, 3)),
    lambda x: deform_conv2d(x, torch.zeros(2, 18, 4, 4), torch.zeros(2, 3, 3)),
    lambda x: deform_conv2d(x, torch.zeros(2, 18, 1, 1), torch.zeros(2, 2, 2))])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(ValueError, match="must be|kernels for"):
        call(torch.zeros(2, 3, 4, 5))

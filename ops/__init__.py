"""The two operators of MedSeg-R, compiled on first use (build.py), with their definition in reference.py.

dynamic_conv2d: one kernel per target on every channel of that target's image, gate and index included.
deform_conv2d: deformable convolution with one kernel and one set of offsets per target.

Both are registered as torch.ops.medsegr.*, with autograd and fake kernels, so that torch.compile does not break at
them. The result has the dtype of x; sums are in float32 (float64 for float64), which is also the dtype in which the
kernels take weight, gate and offset. Where nothing can be compiled, one warning says why and plain PyTorch runs.
"""
import contextlib
import os
import warnings
from functools import cache, partial

import torch

from . import build, reference

__all__ = ["deform_conv2d", "dynamic_conv2d", "reference_only"]

DEBUG = bool(os.environ.get("MEDSEGR_DEBUG"))  # look at every index before a kernel does, which waits for the GPU

library = torch.library.Library("medsegr", "DEF")
library.define("dynamic_conv2d(Tensor x, Tensor weight, Tensor? gate, Tensor? index) -> Tensor")
library.define("dynamic_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? gate, Tensor? index, "
               "bool need_x, bool need_weight, bool need_gate) -> (Tensor, Tensor, Tensor)")
library.define("deform_conv2d(Tensor x, Tensor offset, Tensor weight) -> Tensor")
library.define("deform_conv2d_backward(Tensor grad, Tensor x, Tensor offset, Tensor weight, "
               "bool need_x, bool need_offset, bool need_weight) -> (Tensor, Tensor, Tensor)")
kernels = torch.ops.medsegr


def dynamic_conv2d(x, weight, gate=None, index=None):
    """y[m, c] = conv(gate[m] * x[index[m], c], weight[m]), zero padding k // 2; reference.dynamic_conv2d says more.

    x [B,C,H,W]; weight [M,k,k], k odd; gate [M,H,W] or None; index int64 [M] or None (M = B) -> [M,C,H,W].
    """
    reference.check_dynamic(x, weight, gate, index)
    if DEBUG and index is not None:
        check_index(index, len(x))
    x, sums = autocast(x)
    if not compiled(x.device.type, x.dtype):
        return reference.dynamic_conv2d(x, weight, gate, index)
    return kernels.dynamic_conv2d(x, weight.to(sums), None if gate is None else gate.to(sums), index)


def deform_conv2d(x, offset, weight):
    """y[m, c, p] = sum_n weight[m, n] * x[m, c, p + p_n + offset[m, n, p]]; reference.deform_conv2d says more.

    x [M,C,H,W]; offset [M,2kk,H,W] or [M,2kk,1,1] (dy and dx of each tap); weight [M,k,k], k odd -> [M,C,H,W].
    """
    reference.check_deform(x, offset, weight)
    x, sums = autocast(x)
    if not compiled(x.device.type, x.dtype):
        return reference.deform_conv2d(x, offset, weight)
    return kernels.deform_conv2d(x, offset.to(sums), weight.to(sums))


def check_index(index, images):
    """IndexError that names a number which is none of 0 ... images - 1; CUDA's own answer is a device-side assert."""
    wrong = index[(index < 0) | (index >= images)].tolist()
    if wrong:
        raise IndexError(f"dynamic_conv2d: index {wrong[0]} is not one of {images} images")


def autocast(x):
    """-> x, under autocast in the lower precision, as for torch's own convolutions; and the dtype of the sums."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return x, torch.float64 if x.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Compiled or not

forced = []  # not empty inside reference_only()


@torch.compiler.assume_constant_result
def compiled(kind, dtype=torch.float32):
    """Whether there is an extension for a kind of device that takes this dtype; the first call builds it."""
    return not forced and (kind == "cpu" or kind == "cuda" and dtype != torch.float64) and built(kind)


@cache
def built(kind):
    try:
        build.load(kind)
    except build.BuildError as e:
        warnings.warn(f"MedSeg-R's operators run in plain PyTorch on {kind}, several times slower: {e}", stacklevel=4)
        return False
    return True


@contextlib.contextmanager
def reference_only():
    """Inside, both operators are their plain PyTorch definitions: for comparisons."""
    forced.append(True)
    try:
        yield
    finally:
        forced.pop()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes for torch.compile, and autograd

def grads(tensors, needs):
    """The shapes of the gradients, which are contiguous; empty where one is not asked for."""
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip(tensors, needs))


@torch.library.register_fake("medsegr::dynamic_conv2d", lib=library)
def _(x, weight, gate, index):
    return x.new_empty(len(weight), *x.shape[1:])


@torch.library.register_fake("medsegr::dynamic_conv2d_backward", lib=library)
def _(grad, x, weight, gate, index, *needs):
    return grads((x, weight, weight.new_empty(len(weight), *x.shape[2:])), needs)


@torch.library.register_fake("medsegr::deform_conv2d", lib=library)
def _(x, offset, weight):
    return x.new_empty(x.shape)


@torch.library.register_fake("medsegr::deform_conv2d_backward", lib=library)
def _(grad, x, offset, weight, *needs):
    return grads((x, offset, weight), needs)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(kernel, ctx, grad):
    """The gradients of the first three inputs; a fourth is an index, which has none."""
    needs = ctx.needs_input_grad
    found = kernel(grad, *ctx.saved_tensors, *needs[:3])
    return *(g if need else None for g, need in zip(found, needs)), *[None] * (len(needs) - 3)


for name in ("dynamic_conv2d", "deform_conv2d"):
    torch.library.register_autograd(f"medsegr::{name}", partial(backward, getattr(kernels, f"{name}_backward")),
                                    setup_context=save, lib=library)

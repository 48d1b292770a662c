"""bench.py ops: both operators against the fastest composition of plain PyTorch, torchvision, and a copy."""
from functools import partial
from itertools import product

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from scipy.stats import gmean

import ops
from benches.timing import measure, show
from ops import reference


# ---------------------------------------------------------------------------------------------------------------------
# dynamic_conv2d in plain PyTorch: two convolutions, x [M,C,H,W] and weight [M,k,k] -> [M,C,H,W]

def grouped(x, weight, memory_format=torch.contiguous_format):
    """Every channel of every target is a group of its own, as in ops/reference.py."""
    weight = weight[:, None].repeat_interleave(x.shape[1], 0)
    folded = x.flatten(0, 1)[None].contiguous(memory_format=memory_format)
    return F.conv2d(folded, weight, padding=weight.shape[-1] // 2, groups=len(weight)).view(x.shape)


def transposed(x, weight):
    """The channels become the batch and the targets the channels: no kernel is repeated."""
    return F.conv2d(x.transpose(0, 1), weight[:, None], padding=weight.shape[-1] // 2, groups=len(x)).transpose(0, 1)


CONV2D = {"grouped conv2d": grouped, "conv2d, targets as channels": transposed,
          "grouped conv2d, channels_last": partial(grouped, memory_format=torch.channels_last)}


def dynamic(x, weight, gate, index, conv):
    return conv(gate[:, None] * x[index], weight)


# ---------------------------------------------------------------------------------------------------------------------
# deform_conv2d in plain PyTorch: x [M,C,H,W], offset [M,2kk,H|1,W|1], weight [M,k,k] -> [M,C,H,W]

def precise(t):
    """float32 at least: bfloat16 cannot tell a position of 63 from 63.2."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def dense(x, offset, weight, conv):
    """Offsets that are shared over space make an ordinary, larger kernel; its size is read back from the device."""
    tap, k, offset = torch.arange(weight[0].numel(), device=x.device), weight.shape[-1], precise(offset)[..., 0, 0]
    kernel = reference.dense_kernel(tap // k - k // 2 + offset[:, 0::2], tap % k - k // 2 + offset[:, 1::2], weight)
    return conv(x, kernel.to(x.dtype))


def grid_sampled(x, offset, weight):
    """One F.grid_sample per tap."""
    (H, W), k, source, offset, y = x.shape[-2:], weight.shape[-1], precise(x), precise(offset), 0
    rows, columns = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)
    for n in range(k * k):
        at_y = (rows + n // k - k // 2 + offset[:, 2 * n]).expand(-1, H, W)
        at_x = (columns + n % k - k // 2 + offset[:, 2 * n + 1]).expand(-1, H, W)
        at = torch.stack([(2 * at_x + 1) / W - 1, (2 * at_y + 1) / H - 1], -1)  # pixels -> grid_sample's -1 to 1
        y = y + weight[:, n // k, n % k, None, None, None] * F.grid_sample(source, at, align_corners=False)
    return y.to(x.dtype)


def folded_torchvision(x, offset, weight):
    """torchvision's operator, which has one kernel per channel and one offset per group: targets become groups."""
    C, H, W = x.shape[1:]
    offset, weight = offset.expand(-1, -1, H, W).flatten(0, 1)[None], weight[:, None].repeat_interleave(C, 0)
    y = torchvision.ops.deform_conv2d(x.flatten(0, 1)[None], offset, weight, padding=weight.shape[-1] // 2)
    return y.view(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and calls

def dynamic_inputs(M, C, H, W, k=7, **kind):
    """The arguments of dynamic_conv2d: eight targets per image."""
    B = max(1, M // 8)
    return dict(x=torch.rand(B, C, H, W, **kind) - 0.5, weight=torch.randn(M, k, k, **kind) / k,
                gate=2 * torch.rand(M, H, W, **kind), index=torch.arange(M, device=kind["device"]) * B // M)


def deform_inputs(M, C, H, W, k=3, shared=False, **kind):
    """The arguments of deform_conv2d. Offsets are uniform within 1 pixel: larger ones would slow the dense kernel."""
    offset = 2 * torch.rand(M, 2 * k * k, *((1, 1) if shared else (H, W)), **kind) - 1
    return dict(x=torch.rand(M, C, H, W, **kind) - 0.5, offset=offset, weight=torch.randn(M, k, k, **kind) / k)


PER_PIXEL = {"grid_sample per tap": grid_sampled, "torchvision": folded_torchvision}
DEFORM = ((), ("x", "offset", "weight"))
OPERATORS = (  # title, ours, inputs, peers, sets of inputs whose gradients are taken
    ("dynamic_conv2d, 7 x 7, gate and index", ops.dynamic_conv2d, dynamic_inputs,
     {n: partial(dynamic, conv=f) for n, f in CONV2D.items()}, ((), ("weight", "gate"), ("x", "weight", "gate"))),
    ("deform_conv2d, 3 x 3, shared offsets", ops.deform_conv2d, partial(deform_inputs, shared=True),
     {n.replace("conv2d", "dense kernel"): partial(dense, conv=f) for n, f in CONV2D.items()} | PER_PIXEL, DEFORM),
    ("deform_conv2d, 3 x 3, offsets per pixel", ops.deform_conv2d, deform_inputs, PER_PIXEL, DEFORM))


def call(f, inputs, wanted, up):
    """-> a function of nothing: [f's output], or the gradients of the inputs named in `wanted`, given the output's."""
    inputs = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}

    def forward():
        with torch.no_grad():
            return [f(*inputs.values())]
    return forward if not wanted else lambda: torch.autograd.grad(f(*inputs.values()), [inputs[n] for n in wanted], up)


# ---------------------------------------------------------------------------------------------------------------------
# The tables

def bench_ops(args):
    tables = {}
    for title, ours, make, peers, directions in OPERATORS:
        for wanted in directions:
            rows = []
            for grid, M in product(args.grids, args.targets):
                inputs = make(M, args.channels, grid, grid, dtype=getattr(torch, args.dtype), device=args.device)
                rows.append(dict(grid=grid, M=M) | bench_shape(ours, inputs, peers, wanted, args))
            tables |= show(f"{title}, forward" + " + backward to " * bool(wanted) + ", ".join(wanted), rows)
            ratios = pd.DataFrame(rows).filter(like="ratio")
            means = ratios.apply(gmean, nan_policy="omit")
            print(pd.DataFrame({"at least": ratios.min(), "geometric mean": means}).round(2))
    return tables


def bench_shape(ours, inputs, peers, wanted, args):
    """One row. "of copy bw": what has to move, inputs and output once; backward as much again, the output's gradient in
    its place, and the gradients of the inputs."""
    y = ours(**inputs)
    target = torch.empty_like(y)
    calls = {name: call(f, inputs, wanted, y) for name, f in dict(ours=ours, **peers).items()}
    ms, peak = measure(calls | dict(copy=lambda: target.copy_(y)), args)
    moved = sum(t.nbytes for t in (*inputs.values(), y)) * (2 if wanted else 1) + sum(inputs[n].nbytes for n in wanted)
    best = min(ms.keys() & peers.keys() - {"torchvision"}, key=ms.get)
    row = {"ours ms": ms["ours"], "copy ms": ms["copy"], "of copy bw": moved / (2 * y.nbytes) * ms["copy"] / ms["ours"],
           "composition": best, "ms": ms[best], "ratio": ms[best] / ms["ours"]}
    if peak:
        row["memory"] = peak[best] / peak["ours"]
    if "torchvision" in ms:
        row |= {"torchvision ms": ms["torchvision"], "its ratio": ms["torchvision"] / ms["ours"]}
    return row

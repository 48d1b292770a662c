"""bench.py ops: both operators against the fastest composition of plain PyTorch, torchvision, and a copy."""
import statistics
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
import torchvision

import ops
from benches.timing import measure
from ops import reference

MEMORY = 8 * 2 ** 30  # bytes: a composition that needs more is left out


# ---------------------------------------------------------------------------------------------------------------------
# dynamic_conv2d in plain PyTorch: four convolutions, x [M,C,H,W] and weight [M,k,k] -> [M,C,H,W]

def grouped(x, weight, memory_format=torch.contiguous_format):
    """Every channel of every target is a group of its own, as in ops/reference.py."""
    weight = weight[:, None].repeat_interleave(x.shape[1], 0)
    folded = x.flatten(0, 1)[None].contiguous(memory_format=memory_format)
    return F.conv2d(folded, weight, padding=weight.shape[-1] // 2, groups=len(weight)).view(x.shape)


def transposed(x, weight):
    """The channels become the batch and the targets the channels: no kernel is repeated."""
    return F.conv2d(x.transpose(0, 1), weight[:, None], padding=weight.shape[-1] // 2, groups=len(x)).transpose(0, 1)


def unfolded(x, weight):
    """All k*k neighbours of every pixel side by side, then one product."""
    columns = F.unfold(x.flatten(0, 1)[:, None], weight.shape[-1], padding=weight.shape[-1] // 2)  # [M*C,kk,HW]
    return torch.einsum("mcnp,mn->mcp", columns.unflatten(0, x.shape[:2]), weight.flatten(1)).view(x.shape)


def shifted(x, weight):
    """The sum of k*k shifted images."""
    (H, W), k = x.shape[-2:], weight.shape[-1]
    padded = F.pad(x, [k // 2] * 4)
    return sum(weight[:, i, j, None, None, None] * padded[..., i:i + H, j:j + W] for i in range(k) for j in range(k))


def dynamic(x, weight, gate, index, conv):
    return conv(gate[:, None] * x[index], weight)


# name -> function, and how many tensors of the output's size it holds at once: forward, forward + backward
CONV2D = {"grouped conv2d": grouped, "conv2d, targets as channels": transposed,
          "grouped conv2d, channels_last": partial(grouped, memory_format=torch.channels_last)}
DYNAMIC = {n: (partial(dynamic, conv=f), 4, 8) for n, f in CONV2D.items()}
DYNAMIC |= {"unfold + einsum": (partial(dynamic, conv=unfolded), 2 * 49, 4 * 49),
            "sum of shifts": (partial(dynamic, conv=shifted), 5, 8)}


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


def gathered(x, offset, weight):
    """Four gathers per tap, as in ops/reference.py."""
    return reference.deform_conv2d(x, precise(offset).expand(-1, -1, *x.shape[-2:]), weight).to(x.dtype)


def folded_torchvision(x, offset, weight):
    """torchvision's operator, which has one kernel per channel and one offset per group: targets become groups."""
    C, H, W = x.shape[1:]
    offset, weight = offset.expand(-1, -1, H, W).flatten(0, 1)[None], weight[:, None].repeat_interleave(C, 0)
    y = torchvision.ops.deform_conv2d(x.flatten(0, 1)[None], offset, weight, padding=weight.shape[-1] // 2)
    return y.view(x.shape)


PER_PIXEL = {"grid_sample per tap": (grid_sampled, 5, 14), "gather": (gathered, 6, 50)}
SHARED = {n.replace("conv2d", "dense kernel"): (partial(dense, conv=f), 4, 8) for n, f in CONV2D.items()} | PER_PIXEL


# ---------------------------------------------------------------------------------------------------------------------
# Inputs, and that all peers compute the same

def dynamic_inputs(M, C, H, W, k=7, **kind):
    """The arguments of dynamic_conv2d: eight targets per image."""
    B = max(1, M // 8)
    return dict(x=torch.rand(B, C, H, W, **kind) - 0.5, weight=torch.randn(M, k, k, **kind) / k,
                gate=2 * torch.rand(M, H, W, **kind), index=torch.arange(M, device=kind["device"]) * B // M)


def deform_inputs(M, C, H, W, k=3, shared=False, **kind):
    """The arguments of deform_conv2d. Offsets are uniform within 1 pixel: larger ones would slow the dense kernel."""
    offset = 2 * torch.rand(M, 2 * k * k, *((1, 1) if shared else (H, W)), **kind) - 1
    return dict(x=torch.rand(M, C, H, W, **kind) - 0.5, offset=offset, weight=torch.randn(M, k, k, **kind) / k)


OPERATORS = (  # title, ours, inputs, compositions, torchvision's, sets of inputs whose gradients are taken
    ("dynamic_conv2d, 7 x 7, gate and index", ops.dynamic_conv2d, dynamic_inputs, DYNAMIC, None,
     ((), ("weight", "gate"), ("x", "weight", "gate"))),
    ("deform_conv2d, 3 x 3, shared offsets", ops.deform_conv2d, partial(deform_inputs, shared=True), SHARED,
     folded_torchvision, ((), ("x", "offset", "weight"))),
    ("deform_conv2d, 3 x 3, offsets per pixel", ops.deform_conv2d, deform_inputs, PER_PIXEL, folded_torchvision,
     ((), ("x", "offset", "weight"))))


def call(f, inputs, wanted, up):
    """-> a function of nothing: [f's output], or the gradients of the inputs named in `wanted`, given the output's."""
    inputs = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}

    def forward():
        with torch.no_grad():
            return [f(*inputs.values())]
    return forward if not wanted else lambda: torch.autograd.grad(f(*inputs.values()), [inputs[n] for n in wanted], up)


def check(device, dtype):
    """Every peer equals the definition in float64, ours in its own precision; ours is compiled here if need be."""
    cast = lambda inputs, dtype: {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    torch.manual_seed(0)
    for title, ours, make, compositions, peer, directions in OPERATORS:
        exact = make(3, 4, 9, 7, dtype=torch.float64, device=device)
        up, low = torch.randn(3, 4, 9, 7, device=device).to(dtype), cast(exact, dtype)
        peers = {n: (f, exact, 1e-9) for n, (f, *_) in compositions.items()}
        peers |= dict(torchvision=(peer, exact, 1e-9)) if peer else {}
        peers |= dict(ours=(ours, low, max(1e-5, 8 * torch.finfo(dtype).eps)))
        for wanted in directions:
            for name, (f, inputs, tolerance) in peers.items():
                truth = call(getattr(reference, ours.__name__), cast(inputs, torch.float64), wanted, up.double())()
                for a, b in zip(call(f, inputs, wanted, up.to(inputs["x"].dtype))(), truth):
                    error = float((a.double() - b).abs().max() / b.abs().max())
                    if not error < tolerance:
                        raise RuntimeError(f"{title}: {name} is wrong by {error:.1g} of the largest value")


# ---------------------------------------------------------------------------------------------------------------------
# The tables

COLUMNS = "{:>4}{:>4}{:>10}{:>10}{:>10}{:>11}  {:<36}{:>10}{:>8}{:>8}{:>16}{:>8}".format
HEADER = COLUMNS("grid", "M", "ours ms", "copy ms", "ours/copy", "of copy bw", "fastest composition", "ms", "ratio",
                 "memory", "torchvision ms", "ratio")


def bench_ops(args):
    device, dtype, tables = torch.device(args.device), getattr(torch, args.dtype), []
    check(device, dtype)
    for title, ours, make, compositions, peer, directions in OPERATORS:
        for wanted in directions:
            name, rows, pace = f"{title}, forward" + " + backward to " * bool(wanted) + ", ".join(wanted), [], {}
            print(f"\n{name}\n" + HEADER)
            for grid, M in product(args.grids or ((14, 32) if args.quick else (14, 16, 32, 64)),
                                   args.targets or ((1, 8) if args.quick else (1, 8, 96))):
                inputs = make(M, args.channels, grid, grid, dtype=dtype, device=device)
                row = bench_shape(ours, inputs, compositions, peer, wanted, pace, args)
                rows.append(dict(grid=grid, targets=M, **row))
                print_row(rows[-1])
            tables.append(dict(title=name, rows=rows, summary=summarise(rows)))
    return dict(channels=args.channels, tables=tables)


def bench_shape(ours, inputs, compositions, peer, wanted, pace, args):
    """One row. `pace`, seconds per number of the output at a smaller shape, spares what would take too long."""
    y = ours(**inputs)
    target, left_out, patience = torch.empty_like(y), {}, 2 if args.quick else 30
    calls = dict(ours=call(ours, inputs, wanted, y), copy=lambda: target.copy_(y))
    fastest = min((pace[n] for n in compositions if n in pace), default=0) * y.numel()
    for name, (f, *tensors) in (compositions | (dict(torchvision=(peer, 0, 0)) if peer else {})).items():
        need, t = tensors[bool(wanted)] * y.nbytes, pace.get(name, 0) * y.numel()
        if need > MEMORY:
            left_out[name] = f"would take about {need / 2 ** 30:.0f} GiB"
        elif t > patience or name in compositions and t > max(patience / 20, 3 * fastest):
            left_out[name] = f"would take about {t:.1f} s"
        else:
            calls[name] = call(f, inputs, wanted, y)
    times, failed = measure(calls, args, compositions)
    if y.numel() >= 2 ** 18:  # below that much of the time is overhead
        pace.update({n: t["ms"] / 1000 / y.numel() for n, t in times.items()})
    best = min((n for n in compositions if n in times), key=lambda n: times[n]["ms"], default=None)
    ratio = lambda name, key="ms": times[name][key] / times["ours"][key] if key in times.get(name, {}) else None
    # what has to move: inputs and output once; backward as much again, the output's gradient in its place, and the
    # gradients of the inputs
    moved = sum(t.nbytes for t in (*inputs.values(), y)) * (2 if wanted else 1) + sum(inputs[n].nbytes for n in wanted)
    return dict(images=len(inputs["x"]), times=times, left_out=left_out | failed, best=best, best_ratio=ratio(best),
                memory_ratio=ratio(best, "peak_mb"), torchvision_ratio=ratio("torchvision"),
                ours_per_copy=1 / ratio("copy"), of_copy_bandwidth=moved / (2 * y.nbytes) * ratio("copy"))


def print_row(row):
    ms = {n: f"{t['ms']:.3f}" for n, t in row["times"].items()}
    ratio = lambda key: "-" if row[key] is None else f"{row[key]:.2f}"
    print(COLUMNS(row["grid"], row["targets"], ms["ours"], ms["copy"], ratio("ours_per_copy"),
                  f"{row['of_copy_bandwidth']:.0%}", row["best"] or "-", ms.get(row["best"], "-"), ratio("best_ratio"),
                  ratio("memory_ratio"), ms.get("torchvision", "-"), ratio("torchvision_ratio")), flush=True)
    if row["left_out"]:
        print(" " * 10 + "left out: " + "; ".join(f"{name}, {why}" for name, why in row["left_out"].items()))


def summarise(rows):
    """The smallest and the geometric mean of each ratio, over the rows that have it."""
    summary = {}
    for key, name in (("best_ratio", "fastest composition"), ("torchvision_ratio", "torchvision")):
        if values := [r[key] for r in rows if r[key]]:
            found = summary[key] = dict(
                rows=len(values), min=min(values), geometric_mean=statistics.geometric_mean(values))
            print("ratio to {}: at least {min:.2f}, geometric mean {geometric_mean:.2f}, {rows} shapes".format(
                name, **found))
    return summary

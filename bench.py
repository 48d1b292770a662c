"""Speed and memory of MedSeg-R's own parts against their peers, as ratios that anyone can repeat.

    python bench.py ops                 both operators against plain PyTorch, torchvision and a copy; nine minutes
    python bench.py ops --quick         few shapes, for a first look
    python bench.py ops --device cuda --dtype bfloat16 --json ops.json
    python bench.py model               a training step and a decode, operators compiled against reference
    python bench.py index               the index of SA-Med2D-20M against Python's lists, on a generated JSON file

Times are medians. What is compared takes turns within one loop, so that a machine that is busy for a while is busy for
all of it; still, measure on an idle one. A ratio is the peer's time, or on a GPU its peak memory, over ours: above 1
ours is better. "copy" is y.copy_(x) of the output's size; "of copy bw" is the rate at which ours moves what it must
(inputs and outputs, once), over the copy's rate.
"""
import argparse
import json
import os
import pickle
import platform
import re
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

import medsegr
import ops
from common import InputError, Parser, run
from data import Texts
from readers import ORGANS
from sa_med2d import CLASS_IDS, ORIGINAL, SAMed2D
from eval import autocast, make_folder, write_atomically
from ops import reference
from train import segmentation_loss

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
# Timing

def timed(f, device, n=1):
    """Seconds per call of n calls."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
    started = time.perf_counter()
    for _ in range(n):
        f()
    if device.type == "cuda":
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / n
    return (time.perf_counter() - started) / n


def measure(calls, args, rivals=(), slow=3):
    """{name: function} -> {name: dict(ms, min_ms, max_ms, samples[, peak_mb])}, {name: why there is none}.

    A first round warms up and sorts out: what takes over `slow` seconds keeps its one time, and of the rivals only
    those near the fastest go on. The rest takes turns of a millisecond or more, 3 times or more, for most of a second.
    """
    device, times, failed, peak = torch.device(args.device), {}, {}, {}
    for name, f in calls.items():
        try:
            if device.type == "cuda":
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            times[name] = [timed(f, device)]
            if device.type == "cuda":
                peak[name] = dict(peak_mb=(torch.cuda.max_memory_allocated() - held) / 2 ** 20)
            if times[name][0] < 1:
                times[name] = [timed(f, device, max(1, int(5e-3 / times[name][0])))]
        except RuntimeError as e:  # no kernel for this dtype, or out of memory
            if name == "ours":
                raise
            failed[name] = " ".join(str(e).split())[:100]
    limit = dict.fromkeys(rivals, 1.5 * min((times[n][0] for n in rivals if n in times), default=0))
    turns = {n: max(1, int(1e-3 / t[0])) for n, t in times.items() if t[0] <= min(slow, limit.get(n, slow))}
    lap = sum(times[name][0] * n for name, n in turns.items())
    samples = {name: [] for name in turns}
    for _ in range(min(args.repeats, max(3, int((0.2 if args.quick else 0.7) / max(lap, 1e-9))))):
        for name, n in turns.items():
            samples[name].append(timed(calls[name], device, n))
    return {name: dict(ms=1000 * statistics.median(t), min_ms=1000 * min(t), max_ms=1000 * max(t), samples=len(t),
                       **peak.get(name, {})) for name, t in (times | samples).items()}, failed


# ---------------------------------------------------------------------------------------------------------------------
# bench.py ops

def bench_ops(args):
    """both operators against the fastest composition of plain PyTorch, torchvision, and a copy of their output"""
    device, dtype, tables = torch.device(args.device), getattr(torch, args.dtype), []
    check(device, dtype)
    for title, ours, make, compositions, peer, directions in OPERATORS:
        for wanted in directions:
            name, rows, pace = f"{title}, forward" + " + backward to " * bool(wanted) + ", ".join(wanted), [], {}
            print(f"\n{name}\n{'grid':>4}{'M':>4}{'ours ms':>10}{'copy ms':>10}{'ours/copy':>10}"
                  f"{'of copy bw':>11}  {'fastest composition':<36}{'ms':>10}{'ratio':>8}{'memory':>8}"
                  f"{'torchvision ms':>16}{'ratio':>8}")
            for grid in args.grids or ((14, 32) if args.quick else (14, 16, 32, 64)):
                for M in args.targets or ((1, 8) if args.quick else (1, 8, 96)):
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
    expected = {n: p * y.numel() for n, p in pace.items()}
    fastest = min((expected[n] for n in compositions if n in expected), default=0)
    for name, (f, *tensors) in (compositions | (dict(torchvision=(peer, 0, 0)) if peer else {})).items():
        need, t = tensors[bool(wanted)] * y.nbytes, expected.get(name, 0)
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
    show = lambda v, width, digits=2: f"{'-' if v is None else f'{v:.{digits}f}':>{width}}"
    ms = lambda name, width=10: show(row["times"].get(name, {}).get("ms"), width, 3)
    print(f"{row['grid']:>4}{row['targets']:>4}{ms('ours')}{ms('copy')}{show(row['ours_per_copy'], 10)}"
          f"{row['of_copy_bandwidth']:>11.0%}  {row['best'] or '-':<36}{ms(row['best'])}{show(row['best_ratio'], 8)}"
          f"{show(row['memory_ratio'], 8)}{ms('torchvision', 16)}{show(row['torchvision_ratio'], 8)}", flush=True)
    if row["left_out"]:
        print(" " * 10 + "left out: " + "; ".join(f"{name}, {why}" for name, why in row["left_out"].items()))


def summarise(rows):
    """The smallest and the geometric mean of each ratio, over the rows that have it."""
    summary, parts = {}, []
    for key in ("best_ratio", "torchvision_ratio"):
        if values := [r[key] for r in rows if r[key]]:
            summary[key] = dict(rows=len(values), min=min(values), geometric_mean=statistics.geometric_mean(values))
            parts.append("{} {min:.2f} or more, geometric mean {geometric_mean:.2f}, {rows} shapes".format(
                "fastest composition" if key == "best_ratio" else "torchvision", **summary[key]))
    print("ratios: " + "; ".join(parts))
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# bench.py model

def bench_model(args):
    """a training step and a decode, with the compiled operators and with ops/reference.py"""
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = medsegr.MedSegR(medsegr.Config(feature_grid=args.feature_grid)).to(device)
    for head in model.perceptual.children():  # untrained heads would give kernels that do nothing
        torch.nn.init.normal_(head.linear.weight)
    S, g, attributes = model.config.image_size, model.config.feature_grid, Texts("demo")
    texts = [attributes(name, "ct") for name in ORGANS]
    features, masks = torch.randn(4, 256, g, g, device=device), torch.rand(16, S, S, device=device) < 0.3
    index, first = torch.arange(16, device=device) // 4, torch.zeros(8, dtype=torch.int64, device=device)
    priors = medsegr.Priors(*(p.detach() for p in model.encode_attributes(texts)))

    def step():
        model.zero_grad(set_to_none=True)
        with autocast(device, args.dtype):
            logits, iou = model(None, index, texts * 2, features=features)
        loss, _ = segmentation_loss(logits, iou, masks)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def without_gradients(f):
        with autocast(device, args.dtype):
            return f(features[:1], first, priors)

    def plain(f):
        with ops.reference_only():
            return f()

    print(f"\n{g} x {g} features{'ours ms':>33}{'reference ms':>14}{'ratio':>8}{'largest difference':>20}{'of':>10}")
    record = dict(feature_grid=g)
    for name, f in {"training step, 4 images, 16 targets": step,
                    "decode, 1 image, 8 targets": partial(without_gradients, lambda *a: model.decode(*a)[0]),
                    "its part with both operators": partial(without_gradients, medsegr.modulate)}.items():
        ours, theirs = f().float(), plain(f).float()
        times, _ = measure(dict(ours=f, reference=partial(plain, f)), args, slow=60)
        row = dict(times=times, ratio=times["reference"]["ms"] / times["ours"]["ms"],
                   difference=float((ours - theirs).abs().max()), largest=float(theirs.abs().max()))
        print(f"{name:<39}{times['ours']['ms']:>10.2f}{times['reference']['ms']:>14.2f}{row['ratio']:>8.2f}"
              f"{row['difference']:>20.1e}{row['largest']:>10.3g}", flush=True)
        record[name] = row
    return record


# ---------------------------------------------------------------------------------------------------------------------
# bench.py index

WORKERS, TOUCHES = 4, 20_000


def bench_index(args):
    """the index of SA-Med2D-20M against Python's lists, on a generated JSON file"""
    if not Path("/proc/self/smaps_rollup").is_file():
        raise InputError("bench.py index: memory is read from /proc/self/smaps_rollup, which is not here; use Linux")
    if args.folder:
        make_folder(args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        masks = write_data_set(root, args.images)
        size = (root / ORIGINAL).stat().st_size / 1e6
        print(f"{args.images} images, {masks} masks, {size:.1f} MB of JSON", flush=True)
        build = in_a_process(build_index, root)
        build["mb_per_s"] = size / build["seconds"]
        build["mb"] = sum(f.stat().st_size for f in (root / "index").iterdir()) / 1e6
        print("index: built in {seconds:.1f} s, {mb_per_s:.1f} MB/s, peak {peak_mb:.0f} MB, of which "
              "{before_mb:.0f} MB before; {mb:.1f} MB on disk".format(**build))
        record = dict(images=args.images, masks=masks, json_mb=size, build=build, ours=in_a_process(use_index, root))
        print("index: opened in {open_s:.3f} s; {key_us:.1f} us per key, {masks_us:.1f} us per list of masks; "
              "{pickle_bytes} bytes to send to a worker".format(**record["ours"]))
        show_workers("index", record["ours"]["workers"])
        if args.images <= args.naive_up_to:
            record["naive"] = in_a_process(use_lists, root)
            print("lists: read in {seconds:.1f} s, peak {peak_mb:.0f} MB, of which {before_mb:.0f} MB before".format(
                **record["naive"]))
            show_workers("lists", record["naive"]["workers"])
    return record


def write_data_set(root, n):
    """SAMed2D_v1.json with n images, and its class ids, without any image -> number of masks.

    60 sources, every fourth of pictures that are a case each, the others of volumes with 40 slices along each axis; an
    image has 4.28 masks on average, as in SA-Med2D-20M.
    """
    (root / CLASS_IDS).write_text(json.dumps({f"class {i}": f"{i:04d}" for i in range(1, 220)}))
    counts = 1 + np.random.default_rng(0).poisson(3.28, n)
    starts = [-(-n * source // 60) for source in range(61)]
    with open(root / ORIGINAL, "w") as f:
        for source in range(60):
            for row in range(starts[source], starts[source + 1]):
                j = row - starts[source]
                if source % 4 == 3:
                    stem = f"dermoscopy_00--Pictures_{source:02d}--ISIC_{j:07d}--2d_none"
                else:
                    stem = f"ct_00--Challenge_{source:02d}--case_{j // 120:05d}--{'xyz'[j // 40 % 3]}_{j % 40:04d}"
                masks = [f'"masks/{stem}--{(7 * source + m) % 219 + 1:04d}_000.png"' for m in range(counts[row])]
                f.write(("," if row else "{") + f'\n"images/{stem}.png": [\n' + ",\n".join(masks) + "\n]")
        f.write("\n}\n")
    return int(counts.sum())


def in_a_process(f, *args):
    """f(*args) in a fresh process, so that its memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


def memory():
    """MB of this process: now and at most; of the pages in memory, those no other process has, and those of them that
    cannot be dropped and read again from a file."""
    kb = {k: int(v) for path in ("status", "smaps_rollup")
          for k, v in re.findall(r"^(\w+):\s*(\d+) kB", Path(f"/proc/self/{path}").read_text(), re.MULTILINE)}
    return dict(rss=kb["Rss"] / 1e3, private=(kb["Private_Clean"] + kb["Private_Dirty"]) / 1e3,
                dirty=kb["Private_Dirty"] / 1e3,
                peak=kb["VmHWM"] / 1e3)  # getrusage's ru_maxrss would begin at that of the parent process


def build_index(root):
    before, started = memory()["rss"], time.perf_counter()
    SAMed2D(root, "train")
    return dict(seconds=time.perf_counter() - started, before_mb=before, peak_mb=memory()["peak"])


def use_index(root):
    started = time.perf_counter()
    source = SAMed2D(root, "train")
    opened, spent = time.perf_counter() - started, {}
    rows = np.random.default_rng(1).integers(0, len(source), 10 * TOUCHES).tolist()
    for name in ("key", "masks"):
        started = time.perf_counter()
        for row in rows:
            getattr(source, name)(row)
        spent[f"{name}_us"] = (time.perf_counter() - started) / len(rows) * 1e6
    return dict(open_s=opened, **spent, pickle_bytes=len(pickle.dumps(source)),
                workers={kind: in_workers(Touched(source), kind) for kind in ("fork", "spawn")})


def use_lists(root):
    """As SAM-Med2D's own loader reads it."""
    before, started = memory()["rss"], time.perf_counter()
    with open(root / ORIGINAL) as f:
        read = json.load(f)
    pairs = Pairs(list(read.keys()), list(read.values()))
    return dict(seconds=time.perf_counter() - started, before_mb=before, peak_mb=memory()["peak"],
                workers=dict(fork=in_workers(Touched(pairs), "fork")))


class Pairs:
    """Image and mask paths as lists, with SAMed2D's names."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def key(self, i):
        return self.images[i]

    def masks(self, i):
        return list(self.labels[i])


class Touched(torch.utils.data.Dataset):
    """Item w: by how much this process grows when it looks up TOUCHES random entries, in MB."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return WORKERS

    def __getitem__(self, worker):
        before, rng = memory(), np.random.default_rng(worker)
        for row in rng.integers(0, len(self.source), TOUCHES).tolist():
            self.source.key(row), self.source.masks(row)
        after = memory()
        return {kind: after[kind] - before[kind] for kind in ("rss", "private", "dirty")}


def in_workers(touched, kind):
    """[growth of each of WORKERS DataLoader workers]; kind: fork or spawn."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than this machine has cores
    return list(torch.utils.data.DataLoader(touched, batch_size=None, num_workers=WORKERS,
                                            multiprocessing_context=kind))


def show_workers(name, workers):
    for kind, rows in workers.items():
        most = {key: max(row[key] for row in rows) for key in rows[0]}
        print("{}: {} workers by {} that look up {} entries each grow by at most {rss:.1f} MB, {private:.1f} MB of it "
              "shared with no other process, {dirty:.1f} MB not with the file either".format(
                  name, WORKERS, kind, TOUCHES, **most))


# ---------------------------------------------------------------------------------------------------------------------

COMMANDS = dict(ops=bench_ops, model=bench_model, index=bench_index)
FLAGS = dict(ops={"--grids": dict(nargs="+", help="H = W (default: 14 16 32 64, with --quick 14 32)"),
                  "--targets": dict(nargs="+", help="M (default: 1 8 96, with --quick 1 8)"),
                  "--channels": dict(default=256)},
             model={"--feature-grid": dict(default=32, help="H = W")},
             index={"--images": dict(default=100_000, help="SA-Med2D-20M has 4,600,000"),
                    "--folder": dict(type=str, help="for a folder of its own that is removed again (default: /tmp)"),
                    "--naive-up-to": dict(default=1_000_000, help="images; lists of more are not tried: 4,600,000 "
                                                                  "take 10 GB")})


def at_least_1(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers of at least 1")
    return int(text)


def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, f in COMMANDS.items():
        add = commands.add_parser(name, help=f.__doc__, description=f.__doc__).add_argument
        for flag, options in FLAGS[name].items():
            add(flag, **{"type": at_least_1, **options})
        add("--json", help="write every number to this file")
        if name == "index":
            continue
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
        add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        add("--repeats", type=at_least_1, default=50, help="at most; fewer where they take long")
        add("--quick", action="store_true", help="a first look")
    args = parser.parse_args()
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU; leave --device out")
    if args.json:
        make_folder(Path(args.json).parent)
    return args


def environment(args):
    """What the numbers depend on; printed as the first line."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    device, date = (names or [platform.machine()])[0], datetime.now(timezone.utc).isoformat(timespec="seconds")
    if args.command == "index":
        print(f"{device}, {date}")
        return dict(command=args.command, device=device, cpus=os.cpu_count(), date=date)
    device = torch.cuda.get_device_name() if args.device == "cuda" else device
    record = dict(command=args.command, device=device, threads=torch.get_num_threads(), torch=torch.__version__,
                  torchvision=torchvision.__version__, dtype=args.dtype,
                  ours="compiled" if ops.compiled(args.device) else "ops/reference.py", date=date)
    print("{device}, {threads} threads, torch {torch}, {dtype}, {date}; ours: {ours}".format(**record))
    return record


def main():
    args = parse()
    record = environment(args) | COMMANDS[args.command](args)
    if args.json:
        write_atomically(args.json, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    run(main, medsegr.ModelError, torch.OutOfMemoryError)

"""bench.py model: a training step and a decode, with the compiled operators and with ops/reference.py.
bench.py train: a training step on cached features, without a cache, the naive way, and SAM-Med2D's."""
import json
import statistics
import subprocess
import sys
from functools import partial

import torch

import encoders
import medsegr
import ops
from benches.timing import in_a_process, measure, memory, timed
from common import LIGHT, InputError
from data import Batch
from inference import autocast
from losses import Objective, segmentation_loss
from readers.synapse import ORGANS
from texts import Texts


def bench_model(args):
    torch.manual_seed(0)
    device, g = torch.device(args.device), args.feature_grid
    model = medsegr.MedSegR(medsegr.Config(**LIGHT, feature_grid=g)).to(device)
    for head in model.perceptual.children():  # untrained heads would give kernels that do nothing
        torch.nn.init.normal_(head.linear.weight)
    S, attributes = model.config.image_size, Texts("demo")
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

    columns, record = "{:<39}{:>10}{:>14}{:>8}{:>20}{:>10}".format, dict(feature_grid=g)
    print("", columns(f"{g} x {g} features", "ours ms", "reference ms", "ratio", "largest difference", "of"), sep="\n")
    for name, f in {"training step, 4 images, 16 targets": step,
                    "decode, 1 image, 8 targets": partial(without_gradients, lambda *a: model.decode(*a)[0]),
                    "its part with both operators": partial(without_gradients, medsegr.modulate)}.items():
        ours, theirs = f().float(), plain(f).float()
        times, _ = measure(dict(ours=f, reference=partial(plain, f)), args, slow=60)
        ms = [times[n]["ms"] for n in ("ours", "reference")]
        row = record[name] = dict(times=times, ratio=ms[1] / ms[0], difference=float((ours - theirs).abs().max()),
                                  largest=float(theirs.abs().max()))
        print(columns(name, *(f"{t:.2f}" for t in (*ms, row["ratio"])), f"{row['difference']:.1e}",
                      f"{row['largest']:.3g}"), flush=True)
    return record


# ---------------------------------------------------------------------------------------------------------------------
# bench.py train: each in a process of its own, one after the other

COLUMNS = "{:<48}{:>10}{:>10}{:>8}{:>12}".format


def bench_train(args):
    record = {}
    for backbone in args.backbones:
        ours = partial(in_a_process, steps, args, backbone)
        record[backbone] = show_steps(f"{backbone}, one round of prompts", args, {
            "naive: each target encoded, SAM's attention": partial(ours, cached=False, naive=True),
            "encoded in every step": partial(ours, cached=False), "cached features": ours})
    if args.peer:
        size, ours = 256, partial(in_a_process, steps, args, "vit_b", size=256)
        record["SAM-Med2D"] = show_steps(f"vit_b at {size} x {size}, nine rounds of prompts", args, {
            "SAM-Med2D": partial(peer_steps, args, size),
            "encoded in every step": partial(ours, rounds=9, cached=False),
            "cached features": partial(ours, rounds=9), "cached features, one round": ours})
    return record


def repeats(args):
    return min(args.repeats, 2 if args.quick else 7)


def show_steps(title, args, rows):
    """{name: function -> seconds of steps, MB} -> {name: what was measured}, printed; ratio: to the first's time."""
    print(f"\n{title}, {args.batch_size} images with {args.targets} targets each",
          COLUMNS("", "s a step", "images/s", "ratio", "memory, MB"), sep="\n")
    done = {}
    for name, measured in rows.items():
        times, peak = measured()
        s = statistics.median(times)
        row = done[name] = dict(s=s, min_s=min(times), max_s=max(times), samples=len(times), peak_mb=peak,
                                images_per_s=args.batch_size / s)
        row["ratio"] = next(iter(done.values()))["s"] / s
        print(COLUMNS(name, f"{s:.3f}", f"{row['images_per_s']:.2f}", f"{row['ratio']:.2f}", f"{peak:.0f}"), flush=True)
    return done


def steps(args, backbone, size=None, rounds=1, cached=True, naive=False):
    """Trains on random images of random structures -> seconds of each step, MB at most (a GPU's, or resident)."""
    device, B, T = torch.device(args.device), args.batch_size, args.targets
    torch.manual_seed(0)
    weights = None if backbone == "lite_medsam" else "random"  # as fast as SAM's
    if naive:  # the packages' own attention stays in place of ours; this process does nothing else
        encoders.ViTAttention = encoders.WindowAttention = lambda attention: attention
    model = medsegr.MedSegR(medsegr.Config(backbone, weights, "minilm", image_size=size)).to(device)
    S, texts, index = model.config.image_size, [Texts("demo")(name, "ct") for name in ORGANS], torch.arange(B * T) // T
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.7]]).repeat(B * T, 1) * S
    batch = Batch(torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8), index, torch.zeros(B * T, S, S).bool(),
                  [texts[m % len(texts)] for m in range(B * T)], [], boxes=boxes,
                  clicks=torch.rand(B * T, 8, 9)).to(device)
    batch.masks[:, int(0.3 * S):int(0.7 * S), int(0.2 * S):int(0.6 * S)] = True
    if naive:
        batch.images, batch.index = batch.images[batch.index], torch.arange(B * T, device=device)
    objective = Objective(model, (20.0, 1.0, 1.0), 0.0, 0.0)
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-4)
    clicks = (1, 3, 5, 9, 3, 0, 5, 0)[:rounds - 1]

    def encode(part):
        return torch.cat([model.encode_image(images) for images in batch.images.split(part)])

    stored = encode(1).half() if cached else None

    def step():
        with autocast(device, args.dtype):
            features = stored.float() if cached else encode(1 if device.type == "cpu" else 16)  # as the cache encodes
            loss, _ = objective(batch, features, B * T, B, clicks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()

    timed(step)
    times = [timed(step) for _ in range(repeats(args))]
    return times, torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else memory()["peak"]


# run in the folder of SAM-Med2D, whose modules have names that ours have too
PEER = """
import json, sys, time, types
from argparse import Namespace
apex = types.ModuleType("apex")
apex.amp = None
sys.modules["apex"] = apex  # needed for mixed precision alone
import torch
import train

class Quiet(list):
    def set_postfix(self, **kwargs):
        pass

train.tqdm = Quiet
B, T, S, device, repeats = json.loads(sys.argv[1])
torch.manual_seed(0)
args = Namespace(image_size=S, sam_checkpoint=None, encoder_adapter=True, device=device, mask_num=T, use_amp=False,
                 multimask=True, metrics=["iou", "dice"], iter_point=8, point_list=[1, 3, 5, 9], work_dir=".",
                 run_name="")
model = train.sam_model_registry["vit_b"](args).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
label = torch.zeros(B, T, 1, S, S)
label[..., int(0.3 * S):int(0.7 * S), int(0.2 * S):int(0.6 * S)] = 1
times = []
for _ in range(1 + repeats):
    loader = [dict(image=torch.randn(B, 1, 3, S, S), label=label.clone(),
                   boxes=torch.tensor([0.2, 0.3, 0.6, 0.7]).repeat(B, T, 1, 1) * S,
                   point_coords=torch.full((B, T, 1, 2), 0.45 * S), point_labels=torch.ones(B, T, 1, dtype=torch.int))]
    started = time.perf_counter()
    train.train_one_epoch(args, model, optimizer, loader, 0, train.FocalDiceloss_IoULoss())
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - started)
peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else int(
    open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e3
print(json.dumps([times[1:], peak]))
"""


def peer_steps(args, size):
    """SAM-Med2D's own train_one_epoch on one batch, with its adapters and its nine optimiser steps."""
    settings = json.dumps([args.batch_size, args.targets, size, args.device, repeats(args)])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PEER, settings], cwd=args.peer, text=True,
                          capture_output=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"--peer {args.peer}: its training step failed ({why}); it needs opencv-python-headless, "
                         "albumentations and scikit-image")
    return json.loads(done.stdout.splitlines()[-1])

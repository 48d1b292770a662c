"""bench.py model: a training step and a decode, with the compiled operators and with ops/reference.py.
bench.py train: a training step on cached features, without a cache, the naive way, and SAM-Med2D's."""
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import encoders
import medsegr
import ops
from benches.timing import in_a_process, measure, memory
from common import InputError
from data import Batch
from inference import autocast
from readers.synapse import ORGANS
from texts import Texts
from train import Objective, segmentation_loss


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
# bench.py train

def bench_train(args):
    """images a second and memory of training steps; each in a process of its own, one after the other"""
    record = {}
    for backbone in args.backbones:
        print(f"\n{backbone}, {args.batch_size} images with {args.targets} targets each\n"
              f"{'':<48}{'s a step':>10}{'images/s':>10}{'ratio':>8}{'memory, MB':>12}")
        rows = {"naive: each target encoded, SAM's attention": dict(cached=False, naive=True),
                "encoded in every step": dict(cached=False), "cached features": {},
                "cached features, texts not cut to their length": dict(padded=True)}
        rows = {name: partial(in_a_process, steps, vars(args) | dict(backbone=backbone), kind)
                for name, kind in rows.items()}
        record[backbone] = show_steps(rows, args)
    if args.peer:
        size = 256
        print(f"\nvit_b at {size} x {size}, {args.batch_size} images with {args.targets} targets each, nine rounds of "
              f"prompts\n{'':<48}{'s a step':>10}{'images/s':>10}{'ratio':>8}{'memory, MB':>12}")
        settings = vars(args) | dict(backbone="vit_b")
        ours = partial(in_a_process, steps, settings)
        rows = {"SAM-Med2D": partial(peer_steps, args, size),
                "encoded in every step": partial(ours, dict(size=size, rounds=9, cached=False)),
                "cached features": partial(ours, dict(size=size, rounds=9)),
                "cached features, one round": partial(ours, dict(size=size))}
        record["SAM-Med2D"] = show_steps(rows, args)
    return record


def show_steps(rows, args):
    """{name: function that measures} -> {name: what it measured}, printed; ratio: the first one's time over each."""
    done = {}
    for name, measured in rows.items():
        row = done[name] = measured()
        row["images_per_s"], row["ratio"] = args.batch_size / row["s"], next(iter(done.values()))["s"] / row["s"]
        print(f"{name:<48}{row['s']:>10.3f}{row['images_per_s']:>10.2f}{row['ratio']:>8.2f}{row['peak_mb']:>12.0f}",
              flush=True)
    return done


def steps(settings, kind):
    """Trains on random images of random structures -> median seconds of a step, peak memory (a GPU's, or resident)."""
    size, rounds, cached, naive, padded = (kind.get(k, default) for k, default in (
        ("size", None), ("rounds", 1), ("cached", True), ("naive", False), ("padded", False)))
    device, B, T = torch.device(settings["device"]), settings["batch_size"], settings["targets"]
    torch.manual_seed(0)
    weights = None if settings["backbone"] == "lite_medsam" else "random"  # as fast as SAM's
    if naive:  # the packages' own attention stays in place of ours; this process does nothing else
        encoders.ViTAttention = encoders.WindowAttention = lambda attention: attention
    model = medsegr.MedSegR(medsegr.Config(settings["backbone"], weights, image_size=size)).to(device)
    S, texts = model.config.image_size, [Texts("demo")(name, "ct") for name in ORGANS]
    index = torch.arange(B * T) // T
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.7]]).repeat(B * T, 1) * S
    batch = Batch(torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8), index, torch.zeros(B * T, S, S).bool(),
                  [texts[m % len(texts)] for m in range(B * T)], [], boxes=boxes,
                  clicks=torch.rand(B * T, 8, 9)).to(device)
    batch.masks[:, int(0.3 * S):int(0.7 * S), int(0.2 * S):int(0.6 * S)] = True
    if padded:  # so the cognitive stage computes all of the text encoder's context
        model.encode_attributes(batch.texts)
        model.clip.kept = {key: (tokens, valid, len(valid)) for key, (tokens, valid, _) in model.clip.kept.items()}
    if naive:
        batch.images, batch.index = batch.images[batch.index], torch.arange(B * T, device=device)
    objective = Objective(model, (20.0, 1.0, 1.0))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    clicks = [(1, 3, 5, 9, 3, 0, 5, 0)[n] for n in range(rounds - 1)]

    part = 1 if device.type == "cpu" else 16  # as encoders.FeatureCache encodes
    stored = torch.cat([model.encode_image(batch.images[n:n + 1]) for n in range(B)]).half() if cached else None

    def step():
        with autocast(device, settings["dtype"]):
            features = stored.float() if cached else torch.cat(
                [model.encode_image(batch.images[n:n + part]) for n in range(0, len(batch.images), part)])
            loss, _ = objective(batch, features, B * T, clicks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()

    return timed_steps(step, settings["repeats"], settings["quick"], device)


def timed_steps(step, repeats, quick, device=torch.device("cpu")):
    step()
    times = []
    for _ in range(min(repeats, 2 if quick else 7)):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else memory()["peak"]
    return dict(s=statistics.median(times), min_s=min(times), max_s=max(times), samples=len(times), peak_mb=peak)


# run in the folder of SAM-Med2D, whose modules have names that ours have too
PEER = """
import json, statistics, sys, time, types
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
settings = json.loads(sys.argv[1])
B, T, S = settings["batch_size"], settings["targets"], settings["size"]
torch.manual_seed(0)
args = Namespace(image_size=S, sam_checkpoint=None, encoder_adapter=True, device=settings["device"], mask_num=T,
                 use_amp=False, multimask=True, metrics=["iou", "dice"], iter_point=8, point_list=[1, 3, 5, 9],
                 work_dir=".", run_name="")
model = train.sam_model_registry["vit_b"](args).to(args.device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
label = torch.zeros(B, T, 1, S, S)
label[..., int(0.3 * S):int(0.7 * S), int(0.2 * S):int(0.6 * S)] = 1

def batch():
    return dict(image=torch.randn(B, 1, 3, S, S), label=label.clone(),
                boxes=torch.tensor([0.2, 0.3, 0.6, 0.7]).repeat(B, T, 1, 1) * S,
                point_coords=torch.full((B, T, 1, 2), 0.45 * S), point_labels=torch.ones(B, T, 1, dtype=torch.int))

times = []
for _ in range(1 + min(settings["repeats"], 2 if settings["quick"] else 7)):
    loader = [batch()]
    started = time.perf_counter()
    train.train_one_epoch(args, model, optimizer, loader, 0, train.FocalDiceloss_IoULoss())
    if args.device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - started)
status = open("/proc/self/status").read()
peak = torch.cuda.max_memory_allocated() / 1e6 if args.device == "cuda" else int(
    status.split("VmHWM:")[1].split()[0]) / 1e3
times = times[1:]
print("RESULT", json.dumps(dict(s=statistics.median(times), min_s=min(times), max_s=max(times), samples=len(times),
                                peak_mb=peak)))
"""


def peer_steps(args, size):
    """SAM-Med2D's own train_one_epoch on one batch, with its adapters and its nine optimiser steps."""
    if not (Path(args.peer) / "DataLoader.py").is_file():
        raise InputError(f"--peer {args.peer}: holds no DataLoader.py; clone github.com/OpenGVLab/SAM-Med2D there")
    settings = {k: getattr(args, k) for k in ("batch_size", "targets", "device", "repeats", "quick")} | dict(size=size)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PEER, json.dumps(settings)], cwd=args.peer, text=True,
                          capture_output=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"--peer {args.peer}: its training step failed ({why}); it needs opencv-python-headless, "
                         "albumentations and scikit-image")
    return json.loads(lines[0].removeprefix("RESULT "))

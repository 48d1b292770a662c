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
from benches.timing import in_a_process, measure, peak_mb, show, timed
from common import LIGHT, InputError
from data import Batch
from inference import autocast
from losses import Objective, segmentation_loss
from readers.synapse import ORGANS
from texts import Texts

TEXTS = [Texts("demo")(name, "ct") for name in ORGANS]


def bench_model(args):
    torch.manual_seed(0)
    device, g = torch.device(args.device), args.feature_grid
    model = medsegr.MedSegR(medsegr.Config(**LIGHT, feature_grid=g)).to(device)
    for head in model.perceptual.children():  # untrained heads would give kernels that do nothing
        torch.nn.init.normal_(head.linear.weight)
    S = model.config.image_size
    features, masks = torch.randn(4, 256, g, g, device=device), torch.rand(16, S, S, device=device) < 0.3
    index, first = torch.arange(16, device=device) // 4, torch.zeros(8, dtype=torch.int64, device=device)
    priors = medsegr.Priors(*(p.detach() for p in model.encode_attributes(TEXTS)))

    def step():
        model.zero_grad(set_to_none=True)
        with autocast(device, args.dtype):
            logits, iou = model(None, index, TEXTS * 2, features=features)
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

    rows = []
    for name, f in {"training step, 4 images, 16 targets": step,
                    "decode, 1 image, 8 targets": partial(without_gradients, lambda *a: model.decode(*a)[0]),
                    "its part with both operators": partial(without_gradients, medsegr.modulate)}.items():
        ours, theirs = f().float(), plain(f).float()
        ms, _ = measure(dict(ours=f, reference=partial(plain, f)), args, slow=60)
        rows.append({"": name, "ours ms": ms["ours"], "reference ms": ms["reference"],
                     "ratio": ms["reference"] / ms["ours"], "largest difference": float((ours - theirs).abs().max()),
                     "of": float(theirs.abs().max())})
    return show(f"{g} x {g} features", rows)


# ---------------------------------------------------------------------------------------------------------------------
# bench.py train: each in a process of its own, one after the other

def bench_train(args):
    tables = {}
    for backbone in args.backbones:
        ours = partial(in_a_process, steps, args, backbone)
        tables |= show_steps(f"{backbone}, one round of prompts", args, {
            "naive: each target encoded, SAM's attention": partial(ours, cached=False, naive=True),
            "encoded in every step": partial(ours, cached=False), "cached features": ours})
    if args.peer:
        ours = partial(in_a_process, steps, args, "vit_b", size=256)
        tables |= show_steps("vit_b at 256 x 256, nine rounds of prompts", args, {
            "SAM-Med2D": partial(peer_steps, args, 256),
            "encoded in every step": partial(ours, rounds=9, cached=False),
            "cached features": partial(ours, rounds=9), "cached features, one round": ours})
    return tables


def show_steps(title, args, functions):
    """{name: function -> seconds of steps, MB} -> {title: rows}; ratio: the first one's time over the row's."""
    rows = []
    for name, measured in functions.items():
        times, memory = measured()
        rows.append({"": name, "s a step": statistics.median(times), "memory, MB": memory})
        rows[-1]["ratio"] = rows[0]["s a step"] / rows[-1]["s a step"]
    return show(f"{title}, {args.batch_size} images with {args.targets} targets each", rows)


def packages_tiny_vit(encoder, x):
    """LiteMedSAM's image encoder by its package's own forward, [B,3,S,S] -> [B,256,S/4,S/4]."""
    x = encoder.patch_embed(x.contiguous(memory_format=torch.channels_last))
    grid = x.shape[-1] // 4
    for layer in encoder.layers:
        x = layer(x)
    return encoder.neck(x.transpose(1, 2).unflatten(2, (grid, grid))).contiguous()


def steps(args, backbone, size=None, rounds=1, cached=True, naive=False):
    """Trains on random images of random structures -> seconds of each step, MB at most (a GPU's, or resident)."""
    device, B, T = torch.device(args.device), args.batch_size, args.targets
    torch.manual_seed(0)
    weights = None if backbone == "lite_medsam" else "random"  # as fast as SAM's
    if naive:  # the packages' own attention stays in place of ours; this process does nothing else
        encoders.ViTAttention, medsegr.tiny_vit = lambda attention: attention, packages_tiny_vit
    model = medsegr.MedSegR(medsegr.Config(backbone, weights, "minilm", image_size=size)).to(device)
    S, index = model.config.image_size, torch.arange(B * T) // T
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.7]]).repeat(B * T, 1) * S
    batch = Batch(torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8), index, torch.zeros(B * T, S, S).bool(),
                  [TEXTS[m % len(TEXTS)] for m in range(B * T)], [], boxes=boxes,
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
    return [timed(step) for _ in range(args.repeats)], peak_mb(device)


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
    settings = json.dumps([args.batch_size, args.targets, size, args.device, args.repeats])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PEER, settings], cwd=args.peer, text=True,
                          capture_output=True)
    if done.returncode:
        raise InputError(f"--peer {args.peer}: its training step failed ({done.stderr.strip()[-200:]}); it needs "
                         "opencv-python-headless, albumentations and scikit-image")
    return json.loads(done.stdout.splitlines()[-1])

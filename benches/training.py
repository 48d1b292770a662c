"""bench.py model: a training step and a decode, with the compiled operators and with ops/reference.py.
bench.py train: a training step on cached features, without a cache, and the naive way."""
import statistics
from functools import partial
from unittest import mock

import torch

import encoders
import medsegr
import ops
from benches.timing import in_a_process, measure, show, timed
from common import LIGHT
from data import Batch
from inference import autocast
from losses import Objective, segmentation_loss
from readers.synapse import ORGANS
from runs import memory_mb
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
            logits, iou = model.decode(features, index, model.encode_attributes(TEXTS * 2))
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
# bench.py train: each way in a process of its own, one after the other

def bench_train(args):
    tables = {}
    for backbone in args.backbones:
        rows = []
        for name, way in WAYS.items():
            times, memory = in_a_process(way, args, backbone)
            rows.append({"": name, "s a step": statistics.median(times), "memory, MB": memory})
            rows[-1]["ratio"] = rows[0]["s a step"] / rows[-1]["s a step"]  # the naive one's time over this one's
        tables |= show(f"{backbone}, {args.batch_size} images with {args.targets} targets each", rows)
    return tables


def packages_tiny_vit(encoder, x):
    """LiteMedSAM's image encoder by its package's own forward, [B,3,S,S] -> [B,256,S/4,S/4]."""
    x = encoder.patch_embed(x.contiguous(memory_format=torch.channels_last))
    grid = x.shape[-1] // 4
    for layer in encoder.layers:
        x = layer(x)
    return encoder.neck(x.transpose(1, 2).unflatten(2, (grid, grid))).contiguous()


def naive_steps(args, backbone):
    """steps() with every target's image encoded for itself, by the packages' own code."""
    theirs = {name: lambda attention: attention for name in ("ViTAttention", "TokensToPixels", "PixelsToTokens")}
    with mock.patch.multiple(encoders, **theirs), mock.patch.object(medsegr, "tiny_vit", packages_tiny_vit):
        return steps(args, backbone, cached=False, naive=True)


def steps(args, backbone, cached=True, naive=False):
    """Trains on random images of random structures -> seconds of each step, MB at most (a GPU's, or resident)."""
    device, B, T = torch.device(args.device), args.batch_size, args.targets
    torch.manual_seed(0)
    weights = None if backbone == "lite_medsam" else "random"  # as fast as SAM's
    model = medsegr.MedSegR(medsegr.Config(backbone, weights, "minilm")).to(device)
    S, index = model.config.image_size, torch.arange(B * T) // T
    batch = Batch(torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8), index, torch.zeros(B * T, S, S).bool(),
                  [TEXTS[m % len(TEXTS)] for m in range(B * T)], [],
                  boxes=torch.tensor([[0.2, 0.3, 0.6, 0.7]]).repeat(B * T, 1) * S).to(device)
    batch.masks[:, int(0.3 * S):int(0.7 * S), int(0.2 * S):int(0.6 * S)] = True
    if naive:
        batch.images, batch.index = batch.images[batch.index], torch.arange(B * T, device=device)
    objective = Objective(model, (20.0, 1.0, 1.0), 0.0, 0.0)
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-4)

    def encode(part):
        return torch.cat([model.encode_image(images) for images in batch.images.split(part)])

    stored = encode(1).half() if cached else None

    def step():
        with autocast(device, args.dtype):
            features = stored.float() if cached else encode(1 if device.type == "cpu" else 16)  # as the cache encodes
            loss, _ = objective(batch, features, B * T, B)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()

    timed(step)
    return [timed(step) for _ in range(args.repeats)], memory_mb(device)


WAYS = {"naive: each target encoded, the packages' own code": naive_steps,
        "encoded in every step": partial(steps, cached=False), "cached features": steps}

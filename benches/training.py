"""bench.py model: a training step and a decode, with the compiled operators and with ops/reference.py."""
from functools import partial

import torch

import medsegr
import ops
from benches.timing import measure
from data import Texts
from eval import autocast
from readers import ORGANS
from train import segmentation_loss


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

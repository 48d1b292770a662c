"""Evaluates a checkpoint, or the untouched backbone, volume by volume.

    python eval.py --dataset synapse --prompt none
    python eval.py --checkpoint sam --prompt box --json box.json --plots plots

Without a prompt every organ is asked for by its text, and the answers are merged into one label map. With a point or a
box, which are cut from the truth, only the organs that a slice holds are asked for.
"""
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from medpy.metric.binary import hd95
from tqdm import tqdm

from cache import FeatureCache
from data import (PROMPTS, InputError, Parser, attribute_texts, box_prompt, load_attributes, open_dataset, point_prompt,
                  prompt_rng, run, to_original)
from medsegr import Config, MedSegR, ModelError, load_checkpoint

# Okabe and Ito's colours, told apart by the colour-blind, and two more
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff", "#999999", "#8c510a")


# ---------------------------------------------------------------------------------------------------------------------
# Asking a model for the structures of a slice

def autocast(device, precision):
    """bfloat16 or float16 autocast on the device; float32: none."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


@torch.no_grad()
def ask(model, features, sample, key, attributes, prompt, points=1, seed=0):
    """Features [1,C,H,W] of one sample -> (indices of the classes asked for [n], mask logits float32 [n,S,S]).

    prompt "none" asks for every class, "point" and "box" for those with a mask; prompts depend on key, class and seed
    alone. key: the sample's name in its data set.
    """
    asked = [t for t in range(len(sample.targets)) if prompt == "none" or sample.masks[t].any()]
    S = sample.masks.shape[-1]
    if not asked:
        return [], torch.zeros(0, S, S)
    boxes = locations = None
    if prompt == "box":
        boxes = torch.from_numpy(np.stack([box_prompt(sample.masks[t]) for t in asked])).to(model.device)
    elif prompt == "point":
        pairs = [point_prompt(sample.masks[t], points, prompt_rng(key, sample.targets[t], seed)) for t in asked]
        locations = tuple(torch.from_numpy(np.stack(x)).to(model.device) for x in zip(*pairs))
    priors = model.encode_attributes([attribute_texts(attributes, sample.targets[t]) for t in asked])
    index = torch.zeros(len(asked), dtype=torch.int64, device=model.device)
    logits, _ = model.decode(features.to(model.device), index, priors, locations, boxes)
    return asked, F.interpolate(logits.float()[:, None], (S, S), mode="bilinear", align_corners=False)[:, 0]


def label_map(asked, logits, size):
    """Logits [n,S,S] of the classes `asked` -> uint8 [H,W] on the original grid: the most certain class, 0 for none."""
    if not asked:
        return np.zeros(size, np.uint8)
    best, which = to_original(logits, size).max(0)
    label = torch.tensor(asked, device=which.device)[which] + 1
    return torch.where(best > 0, label, 0).to(torch.uint8).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

def surface_distance(a, b):
    """medpy's HD95 in voxels of two bool arrays that are not empty; cropped to both, which does not change it."""
    where = np.nonzero(a | b)
    crop = tuple(slice(max(0, w.min() - 1), w.max() + 2) for w in where)
    return float(hd95(a[crop], b[crop]))


def score(prediction, truth, classes):
    """Label maps uint8 of one case -> {class: {dice, hd95, dice_strict, hd95_strict}}; None: not counted.

    dice and hd95 follow TransUNet: a prediction without truth counts as (1, 0), any other empty pair, even a rightly
    empty one, as (0, 0). The strict ones skip a class that is rightly empty and otherwise give an empty side Dice 0
    and the diagonal of the volume. HD95 in voxels.
    """
    diagonal, scores = float(np.linalg.norm(prediction.shape)), {}
    for i, name in enumerate(classes, 1):
        a, b = prediction == i, truth == i
        dice = 2 * float((a & b).sum()) / max(1, int(a.sum() + b.sum()))
        if a.any() and b.any():
            distance = surface_distance(a, b)
            scores[name] = dict(dice=dice, hd95=distance, dice_strict=dice, hd95_strict=distance)
        else:
            strict = (0.0, diagonal) if a.any() or b.any() else (None, None)
            scores[name] = dict(dice=float(a.any()), hd95=0.0, dice_strict=strict[0], hd95_strict=strict[1])
    return scores


METRICS = ("dice", "hd95", "dice_strict", "hd95_strict")


def mean(values):
    """Of the values that are counted; None if there are none."""
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def summarise(cases, classes):
    """{case: score()} -> {class: {metric: mean over cases}} and, under "mean", the mean over classes."""
    table = {c: {m: mean(case[c][m] for case in cases.values()) for m in METRICS} for c in classes}
    table["mean"] = {m: mean(table[c][m] for c in classes) for m in METRICS}
    return table


def print_table(table, cases, prompt):
    show = lambda v, digits: "-" if v is None else f"{v:.{digits}f}"
    print(f"\n{'prompt: ' + prompt:<16}{'Dice':>8}{'HD95':>8}{'strict Dice':>14}{'HD95':>8}{'cases':>8}")
    for name, row in table.items():
        present = "" if name == "mean" else sum(c[name]["dice_strict"] is not None for c in cases.values())
        print(f"{name:<16}{show(row['dice'], 4):>8}{show(row['hd95'], 2):>8}{show(row['dice_strict'], 4):>14}"
              f"{show(row['hd95_strict'], 2):>8}{present:>8}")
    print("Dice, HD95 in voxels: TransUNet's convention; strict: an empty side costs everything (README, Metrics)\n")


# ---------------------------------------------------------------------------------------------------------------------
# Overlays

def overlay(axis, image, label, classes, title=None):
    """Draws a slice uint8 [H,W,3] with filled, outlined organs of a label map [H,W]."""
    from matplotlib.colors import to_rgb
    shown = image / 255.0
    for i in range(1, len(classes) + 1):
        inside = label == i
        edge = inside & ~np.all([np.roll(inside, step, axis) for axis in (0, 1) for step in (1, -1)], axis=0)
        colour = np.array(to_rgb(COLOURS[(i - 1) % len(COLOURS)]))
        shown[inside] = 0.65 * shown[inside] + 0.35 * colour
        shown[edge] = colour
    axis.imshow(shown, interpolation="nearest")
    axis.set_xticks([]), axis.set_yticks([])
    if title:
        axis.set_title(title, fontsize=10)


def draw_examples(examples, classes, path, title):
    """examples: (Dice, case, slice, image, truth, prediction) of each case -> a PNG of the best, median, worst case."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    ranked = sorted(examples, key=lambda e: e[:2], reverse=True)
    rows = dict.fromkeys((0, len(ranked) // 2, len(ranked) - 1))
    names = ["best", "median", "worst"] if len(rows) == 3 else ["best", "worst"] if len(rows) == 2 else ["only"]
    figure, axes = plt.subplots(len(rows), 3, figsize=(9, 3.1 * len(rows) + 0.9), squeeze=False)
    for axis, row, name in zip(axes, rows, names):
        dice, case, number, image, truth, prediction = ranked[row]
        overlay(axis[0], image, np.zeros_like(truth), classes, f"{case}, slice {number}")
        overlay(axis[1], image, truth, classes, "truth")
        overlay(axis[2], image, prediction, classes, f"prediction, Dice {dice:.2f}")
        axis[0].set_ylabel(f"{name} case")
    seen = [i for i in range(1, len(classes) + 1) if any((e[4] == i).any() or (e[5] == i).any() for e in examples)]
    handles = [Patch(facecolor=COLOURS[(i - 1) % len(COLOURS)], edgecolor="black", label=classes[i - 1]) for i in seen]
    figure.legend(handles=handles, loc="lower center", ncol=4, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.75 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------

def evaluate(model, dataset, attributes, prompt, points=1, seed=0, cache=None, precision="float32", progress=True):
    """-> ({case: score()}, examples for draw_examples). The slices of a case are neighbours in the data set."""
    model.eval()
    cache = cache or FeatureCache(None, "")
    cases, examples, slices = {}, [], []
    rows = range(len(dataset))
    for i in tqdm(rows, f"evaluating, prompt {prompt}", unit="slice", disable=not progress, mininterval=1):
        sample = dataset[i]
        image = torch.from_numpy(sample.image).permute(2, 0, 1)[None].contiguous()
        with autocast(model.device, precision):
            asked, logits = ask(model, cache(image, model.encode_image), sample, dataset.keys[i], attributes, prompt,
                                points, seed)
        slices.append((sample, label_map(asked, logits, sample.size)))
        if i + 1 == len(dataset) or dataset.cases[i + 1] != sample.case:
            prediction, truth = np.stack([p for _, p in slices]), np.stack([s.label for s, _ in slices])
            cases[sample.case] = score(prediction, truth, dataset.classes)
            examples.append(example(slices, cases[sample.case]))
            slices = []
    return cases, examples


def example(slices, scores):
    """The slice of a case that shows most classes, then most of them, as draw_examples takes it."""
    sample, prediction = max(slices, key=lambda s: (len(np.unique(s[0].label)), (s[0].label > 0).sum()))
    image = torch.from_numpy(sample.image).permute(2, 0, 1)
    image = to_original(image, sample.size).round().byte().permute(1, 2, 0).numpy()
    return (mean(s["dice_strict"] for s in scores.values()) or 0.0, sample.case, sample.slice, image, sample.label,
            prediction)


def newest_checkpoint(out="out"):
    """The folder of the run in `out`, or in a folder below it, that wrote a checkpoint last."""
    files = [f for pattern in ("best", "last", "*/best", "*/last") for f in Path(out).glob(f"{pattern}.safetensors")]
    if not files:
        raise InputError(f"{out}: no checkpoint yet; train one first with: python train.py --dataset demo, "
                         "or name one with --checkpoint")
    return max(files, key=lambda f: f.stat().st_mtime).parent


def build_model(args):
    """-> (model, the checkpoint's record) for --checkpoint; "sam": the untouched backbone."""
    given = {k: getattr(args, k) for k in ("sam_checkpoint", "clip") if getattr(args, k)}
    if args.checkpoint != "sam":
        for flag in ("backbone", "image_size", "normalize"):
            if getattr(args, flag):
                raise InputError(f"--{flag.replace('_', '-')}: a checkpoint has its own; leave it out, "
                                 "or evaluate the untouched backbone with --checkpoint sam")
        return load_checkpoint(args.checkpoint or newest_checkpoint(), **given)
    if args.prompt == "none":
        raise InputError("--checkpoint sam --prompt none: without text and prompt SAM cannot know what is asked for; "
                         "give --prompt point or box")
    given |= {k: getattr(args, k) for k in ("backbone", "image_size", "normalize") if getattr(args, k)}
    return MedSegR(Config(branches=("sam",), **given)).eval(), {}


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", help="a .safetensors file or its folder; sam: the untouched backbone (default: newest in out)")
    add("--dataset", help="demo or synapse (default: the checkpoint's)")
    add("--data", help="folder of the data (default: data/<dataset>)")
    add("--split", default="test", help="test or val")
    add("--prompt", default="none", help="none, point or box")
    add("--points", type=int, default=1, help="points per target, with --prompt point")
    add("--limit", type=int, help="only the first N slices")
    add("--seed", type=int, default=0, help="of the points")
    add("--json", help="write every number to this file")
    add("--plots", help="write overlays to this folder")
    add("--attributes", help="a JSON file of texts in place of attributes.json")
    add("--backbone"), add("--image-size", type=int), add("--normalize")
    add("--sam-checkpoint"), add("--clip")
    add_runtime_flags(parser)
    args = parser.parse_args()
    check_runtime_flags(args)
    if args.prompt not in PROMPTS:
        raise InputError(f"--prompt {args.prompt}: choose from {', '.join(PROMPTS)}")
    if args.points < 1:
        raise InputError(f"--points {args.points}: give at least 1")
    model, record = build_model(args)
    args.dataset = args.dataset or record.get("dataset") or "demo"
    dataset = open_dataset(args.dataset, args.data, args.split, model.config.image_size, limit=args.limit)
    attributes = load_attributes(args.dataset, *[args.attributes] if args.attributes else [])
    if args.json:
        make_folder(Path(args.json).parent)
    if args.plots:
        make_folder(args.plots)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(model.describe())
    cache = FeatureCache(args.cache, f"{model.features_key()}-{args.precision}", args.cache_gb)
    cases, examples = evaluate(model, dataset, attributes, args.prompt, args.points, args.seed, cache, args.precision)
    table = summarise(cases, dataset.classes)
    print_table(table, cases, args.prompt)
    if args.json:
        result = dict(checkpoint=str(args.checkpoint or "newest"), dataset=args.dataset, split=args.split,
                      prompt=args.prompt, points=args.points, seed=args.seed, limit=args.limit, step=record.get("step"),
                      precision=args.precision, model=model.describe(), table=table, cases=cases)
        write_atomically(args.json, json.dumps(result, indent=1).encode())
    if args.plots:
        path = Path(args.plots) / f"{args.dataset}-{args.prompt}.png"
        draw_examples(examples, dataset.classes, path, f"{args.dataset}, {len(cases)} {args.split} cases, "
                      f"prompt: {args.prompt}")
        print(f"wrote {path}")


def add_runtime_flags(parser):
    """The flags that train.py and eval.py share."""
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--precision", default=precision, help="float32 or bfloat16 (autocast)")
    parser.add_argument("--cache", default="cache", help="folder for image features; none: keep none")
    parser.add_argument("--cache-gb", type=float, default=20.0, help="size limit of that folder")


def check_runtime_flags(args):
    if args.precision not in ("float32", "bfloat16"):
        raise InputError(f"--precision {args.precision}: choose float32 or bfloat16")
    args.cache = None if args.cache == "none" else args.cache


def make_folder(folder):
    """Makes a folder for results; InputError now, not after an hour of work, if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise InputError(f"{folder}: cannot be written to ({e.strerror}); choose another place") from None


def write_atomically(path, content):
    """Bytes to PATH, all or nothing."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


if __name__ == "__main__":
    run(main, ModelError)

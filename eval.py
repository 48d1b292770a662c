"""Evaluates a checkpoint, or the untouched backbone, volume by volume.

    python eval.py --dataset synapse --prompt none
    python eval.py --checkpoint sam --prompt box --json box.json --plots plots

Without a prompt every organ is asked for by its text, and the answers are merged into one label map. With a point or a
box, which are cut from the truth, only the organs that a slice holds are asked for.
"""
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import plots
from cache import FeatureCache
from common import InputError, Parser, make_folder, run, write_atomically
from data import (PROMPTS, Texts, add_data_flags, box_prompt, knobs, merge_instances, open_dataset, point_prompt,
                  prompt_rng, to_original)
from medsegr import Config, MedSegR, ModelError, load_checkpoint
from metrics import METRICS, score, score_labels

# ---------------------------------------------------------------------------------------------------------------------
# Asking a model for the structures of a slice

def autocast(device, precision):
    """bfloat16 or float16 autocast on the device; float32: none."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


@torch.no_grad()
def ask(model, features, sample, texts, prompt, points=1, seed=0):
    """Features [1,C,H,W] of one sample -> (class names asked for, n of them; mask logits float32 [n,S,S]).

    prompt "none" asks for the classes that the sample has or is known to lack, "point" and "box" for each target with a
    mask, in order. Prompts depend on the sample's key, the target's name and number, and the seed alone.
    """
    asked = [t for t in range(len(sample.targets)) if prompt == "none" or sample.masks[t].any()]
    names = [sample.targets[t] for t in asked] + [*sample.absent] * (prompt == "none")
    S = sample.masks.shape[-1]
    if not names:
        return [], torch.zeros(0, S, S)
    boxes = locations = None
    if prompt == "box":
        boxes = torch.from_numpy(np.stack([box_prompt(sample.masks[t]) for t in asked])).to(model.device)
    elif prompt == "point":
        before = [sample.targets[:t].count(sample.targets[t]) for t in asked]  # instances of the same name
        rngs = [prompt_rng(sample.key, sample.targets[t] + (f" {n}" if n else ""), seed) for t, n in zip(asked, before)]
        pairs = [point_prompt(sample.masks[t], points, rng) for t, rng in zip(asked, rngs)]
        locations = tuple(torch.from_numpy(np.stack(x)).to(model.device) for x in zip(*pairs))
    priors = model.encode_attributes([texts(name, sample.modality, sample) for name in names])
    index = torch.zeros(len(names), dtype=torch.int64, device=model.device)
    logits, _ = model.decode(features.to(model.device), index, priors, locations, boxes)
    return names, F.interpolate(logits.float()[:, None], (S, S), mode="bilinear", align_corners=False)[:, 0]


def label_map(names, logits, size, classes):
    """Logits [n,S,S] of the classes asked for -> uint8 [H,W] on the original grid: the most certain one, 0 for none."""
    if not names:
        return np.zeros(size, np.uint8)
    best, which = to_original(logits, size).max(0)
    label = torch.tensor([classes.index(name) + 1 for name in names], device=which.device)[which]
    return torch.where(best > 0, label, 0).to(torch.uint8).cpu().numpy()


def true_label_map(sample, classes):
    """uint8 [H,W] of a sample whose masks do not overlap."""
    label = np.zeros(sample.size, np.uint8)
    for name, mask in zip(sample.targets, sample.truth):
        label[mask] = classes.index(name) + 1
    return label


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

def score_masks(answers):
    """[(class, prediction, truth)] of one image -> {class: score()}, the mean over the instances of a class."""
    scores = {}
    for name, prediction, truth in answers:
        scores.setdefault(name, []).append(score(prediction, truth))
    return {name: {m: mean(s[m] for s in each) for m in METRICS} for name, each in scores.items()}


def mean(values):
    """Of the values that are counted; None if there are none."""
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def summarise(cases, classes):
    """{case: {class: score()}} -> {class: {metric: mean over cases}} and, under "mean", the mean over classes."""
    seen = [c for c in classes if any(c in case for case in cases.values())]
    table = {c: {m: mean(case[c][m] for case in cases.values() if c in case) for m in METRICS} for c in seen}
    table["mean"] = {m: mean(table[c][m] for c in seen) for m in METRICS}
    return table


def print_table(table, cases, prompt):
    show = lambda v, digits: "-" if v is None else f"{v:.{digits}f}"
    print(f"\n{'prompt: ' + prompt:<16}{'Dice':>8}{'HD95':>8}{'strict Dice':>14}{'HD95':>8}{'cases':>8}")
    for name, row in table.items():
        present = "" if name == "mean" else sum(c.get(name, {}).get("dice_strict") is not None for c in cases.values())
        print(f"{name:<16}{show(row['dice'], 4):>8}{show(row['hd95'], 2):>8}{show(row['dice_strict'], 4):>14}"
              f"{show(row['hd95_strict'], 2):>8}{present:>8}")
    print("Dice, HD95 in voxels: TransUNet's convention; strict: an empty side costs everything (README, Metrics)\n")


# ---------------------------------------------------------------------------------------------------------------------
# Asking for all of a data set

class Predictor:
    """A model with how it is asked: predictor(sample) -> (class names, mask logits [n,S,S])."""

    def __init__(self, model, texts, prompt, points=1, seed=0, cache=None, precision="float32"):
        self.model, self.texts, self.prompt, self.points, self.seed = model.eval(), texts, prompt, points, seed
        self.cache, self.precision = cache or FeatureCache(None, ""), precision

    def prepare(self, sample):
        """Without a prompt the instances of a class are one target."""
        return merge_instances(sample) if self.prompt == "none" else sample

    @torch.no_grad()
    def __call__(self, sample):
        image = torch.from_numpy(sample.image).permute(2, 0, 1)[None].contiguous()
        with autocast(self.model.device, self.precision):
            features = self.cache(image, self.model.encode_image)
            return ask(self.model, features, sample, self.texts, self.prompt, self.points, self.seed)


def answers(names, logits, sample):
    """-> [(class, prediction, truth)], bool [H,W] each, of every target of a sample and every absent class asked for.

    A target that was not asked for, because nothing of it is left on the model's grid, counts as not found.
    """
    nothing, pairs = np.zeros(sample.size, bool), []
    found = list(zip(names, (to_original(logits, sample.size) > 0).cpu().numpy()))
    for name, truth in zip(sample.targets, sample.truth):
        at = next((i for i, (asked, _) in enumerate(found) if asked == name), None)
        pairs.append((name, nothing if at is None else found.pop(at)[1], truth))
    return pairs + [(name, mask, nothing) for name, mask in found]


def evaluate(predictor, dataset, progress=True):
    """-> ({case: {class: score()}}, {case: the row that shows it best}).

    A case is a volume, whose slices are neighbours in the data set, or else an image of its own, named by its key.
    """
    cases, rows, slices = {}, {}, []
    for i in tqdm(range(len(dataset)), f"evaluating, prompt {predictor.prompt}", unit="image", disable=not progress,
                  mininterval=1):
        sample = predictor.prepare(dataset[i])
        names, logits = predictor(sample)
        if not dataset.volumes:
            cases[sample.key], rows[sample.key] = score_masks(answers(names, logits, sample)), i
            continue
        truth = true_label_map(sample, dataset.classes)
        slices.append((label_map(names, logits, sample.size, dataset.classes), truth, i))
        if i + 1 == len(dataset) or dataset.case(i + 1) != sample.case:
            prediction, truth = (np.stack([s[k] for s in slices]) for k in (0, 1))
            cases[sample.case] = score_labels(prediction, truth, dataset.classes)
            # the slice with most classes, then with most of them
            rows[sample.case] = max(slices, key=lambda s: (len(np.unique(s[1])), (s[1] > 0).sum()))[2]
            slices = []
    return cases, rows


def typical(cases):
    """{case: scores} -> [(name, mean strict Dice, case)] of the best, median and worst case."""
    dice = {case: mean(s["dice_strict"] for s in scores.values()) for case, scores in cases.items()}
    ranked = sorted(((v, case) for case, v in dice.items() if v is not None), reverse=True)
    rows = dict.fromkeys((0, len(ranked) // 2, len(ranked) - 1)) if ranked else ()
    names = ["best case", "median case", "worst case"] if len(rows) == 3 else ["best case", "worst case"][:len(rows)]
    return [(name, *ranked[row]) for name, row in zip(names, rows)]


def draw_typical(predictor, dataset, cases, rows, path, title):
    """A PNG of image, truth and prediction of the best, median and worst case."""
    panels = []
    for name, dice, case in typical(cases):
        sample = predictor.prepare(dataset[rows[case]])
        names, logits = predictor(sample)
        prediction = [(asked, mask) for asked, mask, _ in answers(names, logits, sample)]
        if dataset.volumes:
            label = label_map(names, logits, sample.size, dataset.classes)
            prediction = [(asked, label == i) for i, asked in enumerate(dataset.classes, 1)]
        image = torch.from_numpy(sample.image).permute(2, 0, 1)
        image = to_original(image, sample.size).round().byte().permute(1, 2, 0).numpy()
        panels.append((name, sample.key, image, list(zip(sample.targets, sample.truth)), f"prediction, Dice {dice:.2f}",
                       [(asked, mask) for asked, mask in prediction if mask.any()]))
    plots.examples(panels, path, title)


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
    add_data_flags(parser)
    add("--split", default="test", help="test or val")
    add("--prompt", default="none", help="none, point or box")
    add("--points", type=int, default=1, help="points per target, with --prompt point")
    add("--limit", type=int, help="only the first N slices")
    add("--seed", type=int, default=0, help="of the points")
    add("--json", help="write every number to this file")
    add("--plots", help="write overlays to this folder")
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
    size = model.config.image_size
    dataset = open_dataset(args.dataset, args.data, args.split, size, limit=args.limit, **knobs(args))
    texts = Texts(args.dataset, args.attributes_file, args.texts)
    texts.check(dataset.source.pairs)
    if args.json:
        make_folder(Path(args.json).parent)
    if args.plots:
        make_folder(args.plots)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(model.describe())
    cache = FeatureCache(args.cache, f"{model.features_key()}-{args.precision}", args.cache_gb)
    predictor = Predictor(model, texts, args.prompt, args.points, args.seed, cache, args.precision)
    cases, rows = evaluate(predictor, dataset)
    table = summarise(cases, dataset.classes)
    print_table(table, cases, args.prompt)
    if args.json:
        result = dict(checkpoint=str(args.checkpoint or "newest"), dataset=args.dataset, split=args.split,
                      prompt=args.prompt, points=args.points, seed=args.seed, limit=args.limit, step=record.get("step"),
                      precision=args.precision, model=model.describe(), table=table, cases=cases)
        write_atomically(args.json, json.dumps(result, indent=1).encode())
    if args.plots:
        path = Path(args.plots) / f"{args.dataset}-{args.prompt}.png"
        draw_typical(predictor, dataset, cases, rows, path, f"{args.dataset}, {len(cases)} {args.split} cases, "
                     f"prompt: {args.prompt}")
        print(f"wrote {path}")


def add_runtime_flags(parser):
    """The flags that train.py and eval.py share."""
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--precision", default=precision, help="float32, bfloat16 or float16 (autocast)")
    parser.add_argument("--cache", default="cache", help="folder for image features; none: keep none")
    parser.add_argument("--cache-gb", type=float, default=20.0, help="size limit of that folder")


def check_runtime_flags(args):
    if args.precision not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--precision {args.precision}: choose float32, bfloat16 or float16")
    args.cache = None if args.cache == "none" else args.cache


if __name__ == "__main__":
    run(main, ModelError)

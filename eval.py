"""Evaluates a checkpoint, or the untouched backbone, volume by volume.

    python eval.py --dataset synapse --prompt none
    python eval.py --checkpoint sam --prompt box --json box.json --plots plots

Without a prompt every organ is asked for by its text, and the answers are merged into one label map. With a point or a
box, which are cut from the truth, only the organs that a slice holds are asked for.
"""
import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import plots
from common import (InputError, Parser, add_model_flags, add_runtime_flags, make_folder, model_options, number, run,
                    start_processes, write_atomically)
from data import PROMPTS, SPLITS, add_data_flags, dataset_options, open_dataset, open_texts
from encoders import FeatureCache, fingerprint
from inference import UNSURE, Predictor, answers, by_class, label_maps, largest_components, original_image, predict
from medsegr import Config, MedSegR
from metrics import (NUMBERS, Journal, dice, iou, overlap_rate, print_table, score, score_labels, score_table,
                     summarise, with_none)
from runs import dataset_fingerprint, load_checkpoint, newest_checkpoint
from texts import TEXTS, Rephrased, own_texts

# ---------------------------------------------------------------------------------------------------------------------
# All of a data set

def evaluate_case(predictor, dataset, images, step=lambda: None, largest_component=False):
    """The images of a case, numbers -> the rows of its volume and of its targets, as metrics.score_table takes them."""
    maps, rows, known = [], [], []  # known: not of slices labelled "ignore", where nothing is looked for
    for i in images:
        sample = predictor.prepare(dataset[i])
        if dataset.volumes:
            known.append(bool(sample.targets or sample.absent))
            maps.append(label_maps(predictor, sample, dataset.classes))
        else:  # an image is a case of its own
            found = [answers(*predictor(sample), sample)]
        step()
    about = dict(case=sample.case, modality=sample.modality)
    if dataset.volumes:
        prediction, truth = map(np.stack, zip(*maps))
        if largest_component:
            prediction[known] = largest_components(prediction[known])
        found = ([each for each in by_class(a, b, dataset.classes) if each[2].any()] for a, b in zip(prediction, truth))
        # the slice with most classes, then with most of them
        shown = images[max(range(len(truth)), key=lambda z: (len(np.unique(truth[z])), (truth[z] > 0).sum()))]
        spacing = dataset.source.spacing(sample.case)
        mm = score_labels(prediction, truth, dataset.classes, spacing) if spacing else {}
        for name, numbers in score_labels(prediction, truth, dataset.classes).items():
            numbers |= {f"{k}_mm": mm[name][k] for k in ("hd95", "hd95_strict") if mm}
            rows.append(dict(image=shown, volume=True, target=name, **about, **numbers))
    for i, masks in zip(images, found):
        overlap = overlap_rate(np.array([truth for *_, truth in masks]), [name for name, *_ in masks])
        for (name, a, b), rate in zip(masks, overlap):
            numbers = dict(dice_strict=dice(a, b), iou_strict=iou(a, b)) if dataset.volumes else score(a, b)
            numbers |= dict(area=float(b.mean()), overlap=float(rate))
            rows.append(dict(image=i, volume=False, target=name, **about, **numbers))
    return rows


def cases_of(dataset):
    """[[number of each image] of each case], the longest first: a volume's slices are neighbours."""
    cases = groupby(range(len(dataset)), dataset.case if dataset.volumes else None)
    return sorted((list(images) for _, images in cases), key=len, reverse=True)


def evaluate(predictor, dataset, journal=None, rank=0, world=1, progress=True, largest_component=False):
    """-> (scores of the volumes, scores of the targets), score_tables, on rank 0; the cases are shared out among the
    processes.

    A case is a volume, or else an image of its own. A data set without volumes has no rows in the first.
    largest_component: of each class in a volume, that part alone.
    """
    journal = journal or Journal()
    if world > 1:
        dist.barrier()  # all have read what is there
    journal.begin()
    todo = [images for images in cases_of(dataset)[rank::world] if images[0] not in journal.cases]
    with tqdm(total=sum(map(len, todo)), desc=f"evaluating, prompt {predictor.prompt}", unit="image",
              disable=not progress or rank > 0, mininterval=1) as bar:
        for images in todo:
            journal.add(images[0], evaluate_case(predictor, dataset, images, bar.update, largest_component))
    parts = [journal.cases]
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(journal.cases, parts)
    scores = score_table([row for cases in parts or () for rows in cases.values() for row in rows])
    return scores[scores["volume"]], scores[~scores["volume"]]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def typical(scores):
    """score_table -> {"best case": its image, "median case": ..., "worst case": ...} by mean strict Dice of the cases;
    fewer where there are fewer cases with a Dice."""
    dice = scores.groupby("image")["dice_strict"].mean().dropna()  # an image stands for its case
    ranked = dice.sort_values(ascending=False, kind="stable").index.tolist()
    if not ranked:
        return {}
    names = {ranked[len(ranked) // 2]: "median case"} | {ranked[-1]: "worst case"} | {ranked[0]: "best case"}
    return {names[image]: image for image in ranked if image in names}


def draw_typical(predictor, dataset, scores, path, title):
    """A PNG of image, truth and predicted masks in the best, median and worst case of `scores`; nothing where none has
    a Dice."""
    pictures = []
    for note, row in typical(scores).items():
        sample = predictor.prepare(dataset[row])
        image, found = original_image(sample), predict(predictor, sample, dataset)
        values = [value for value in (dice(a, b) for _, a, b in found) if value is not None]
        pictures += [(f"{note}: {sample.key}", image, []), ("truth", image, list(zip(sample.targets, sample.truth))),
                     (f"Dice {np.mean(values):.2f}" if values else "nothing to find", image,
                      [(name, a) for name, a, _ in found if a.any()])]
    if pictures:
        plots.contact_sheet(pictures, path, title, columns=3, inches=3)
        print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------

def build_model(args):
    """-> (model, the checkpoint's record); --checkpoint sam: the untouched backbone, of the flags."""
    given = model_options(args)
    if args.checkpoint == "sam":
        if args.prompt == "none":
            raise InputError("sam --prompt none: without text and prompt SAM cannot know what is asked for; "
                             "give --prompt point or box")
        return MedSegR(Config(branches=("sam",), **given)).eval(), {}
    for flag in ("backbone", "image_size", "normalize"):
        if flag in given:
            raise InputError(f"--{flag.replace('_', '-')}: a checkpoint has its own; leave it out, "
                             "or evaluate the untouched backbone with --checkpoint sam")
    return load_checkpoint(args.checkpoint or newest_checkpoint(), sam_checkpoint=args.sam_checkpoint, clip=args.clip)


def as_trained(args, record):
    """Gives the flags of the data that were left out the values that the checkpoint was trained with: of other folds
    the cases to test on may have been trained on -> lines that say so."""
    trained, before = record.get("arguments", {}), vars(args).copy()
    names = (trained.get("dataset") or record.get("dataset") or "").split(",")
    here = args.dataset in names
    if here and not args.data:
        root = dict(zip(names, (trained.get("data") or "").split(","))).get(args.dataset)
        args.data = root if root and Path(root).is_dir() else None  # it may be of another machine
        own = own_texts(record, args.dataset) if args.data else None
        args.attributes_file = args.attributes_file or (own if own and Path(own).is_file() else None)
    for name, value in dataset_options(args).items() if here else ():
        setattr(args, name, trained.get(name) if value is None else value)
    said = flags_of(args, *(name for name, value in before.items() if getattr(args, name) != value))
    said = ["as the checkpoint was trained: " + " ".join(said)] if said else []
    if args.dataset == "folder":
        args.fold, fold = args.fold or 0, trained.get("fold") or 0
        if here and trained and args.fold != fold:
            said.append(f"trained with --fold {fold}: cases of fold {args.fold} may have been trained on")
    return said


def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", help="a .safetensors file or its folder; sam: the untouched backbone (default: newest in out)")
    add_data_flags(parser)
    add("--split", default="test", choices=SPLITS)
    add("--prompt", default="none", choices=PROMPTS)
    add("--points", type=number(1, kind=int), default=1, help="points per target, with --prompt point")
    add("--text", default="own", choices=TEXTS, help="how far does Dice fall with others? wrong: the next class's")
    add("--mean-wordings", type=number(1, 100, int), metavar="N",
        help="the mean over up to N wordings of a class's texts")
    add("--largest-component", action="store_true", help="of each class in a volume, keep the largest part alone")
    add("--min-iou", type=number(0, 1), default=0.0,
        help=f"a target's answer counts as none where the model expects a lower IoU of it; predict.py's is {UNSURE}")
    add("--limit", type=int, help="only the first N slices")
    add("--seed", type=number(0, 2 ** 63 - 1, int), default=0, help="of the points and the bootstrap")
    add("--json", help="write every number to this file")
    add("--plots", help="write overlays to this folder")
    add_model_flags(parser)
    add_runtime_flags(parser)
    group = parser.add_argument_group("rows of tables 3 to 6 and figure 6 (paper/ablations.py)")
    group.add_argument("--tables", nargs="+", help="3 4 5 6 baselines figure6, or a JSON file of rows")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    group.add_argument("--out", default="out/tables")
    group.add_argument("train_flags", nargs="*", metavar="-- flags of train.py")
    args = parser.parse_args()
    if args.mean_wordings and args.text != "own":
        raise InputError(f"--mean-wordings: is for a class's own texts, not for --text {args.text}; leave one out")
    if args.train_flags and not args.tables:
        raise InputError(f"{args.train_flags[0]}: flags behind -- go to train.py, with --tables")
    return args


def flags_of(args, *names):
    """The command line that gives these arguments their values."""
    given = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return [part for flag, value in given.items() if value is not None and value is not False
            for part in ((flag,) if value is True else (flag, str(value)))]


def main():
    args = parse()
    if args.tables:
        from paper.ablations import run_tables
        args.cache = args.cache or "none"
        both = flags_of(args, "dataset", "data", "axes", "fold", "overlap", "contrast", "size", "attributes_file",
                        "texts", "precision", "cache", "cache_gb", "prompt", "points")
        return run_tables(args.tables, args.seeds, args.out, both, flags_of(
            args, "split", "limit", "text", "mean_wordings", "largest_component", "min_iou"), args.train_flags)
    rank, world, device = start_processes()
    model, record = build_model(args)
    args.dataset = args.dataset or record.get("dataset") or "demo"
    if (said := as_trained(args, record)) and rank == 0:
        print(*said, sep="\n")
    dataset = open_dataset(args.dataset, args.data, args.split, model.config.image_size, limit=args.limit,
                           **dataset_options(args))
    texts = open_texts(args)
    texts.check(dataset.source.pairs)
    if (unused := texts.unused([dataset.source])) and rank == 0:
        print(unused)
    if args.largest_component and not dataset.volumes:
        raise InputError(f"--largest-component: {args.dataset} has no volumes; leave it out")
    words = json.dumps([texts.classes, list(texts.images.items())])
    if args.text != "own":
        texts = Rephrased(texts, args.text, dataset.source.pairs)
    for folder in (args.json and Path(args.json).parent, args.plots):
        make_folder(folder) if folder else None
    cache = FeatureCache(args.cache, f"{model.features_key()}-{args.precision}", args.cache_gb)
    predictor = Predictor(model.to(device), texts, args.prompt, args.points, args.seed, cache, args.precision,
                          args.mean_wordings or 1, args.min_iou)
    about = dict(checkpoint=str(args.checkpoint or "newest"), dataset=args.dataset, split=args.split,
                 prompt=args.prompt, points=args.points, text=args.text, attributes_file=args.attributes_file,
                 mean_wordings=args.mean_wordings, largest_component=args.largest_component, min_iou=args.min_iou,
                 seed=args.seed, limit=args.limit, step=record.get("step"), precision=args.precision,
                 model=model.describe(), images=len(dataset), **dataset_options(args))
    settings = about | dict(data=[str(args.data), dataset_fingerprint(dataset)], words=words,
                            config=asdict(model.config), features=model.features_key(),
                            weights=fingerprint(model.trained()))
    journal = Journal(args.json, rank, json.dumps(settings))
    if rank == 0:
        print(model.describe())
    volumes, targets = evaluate(predictor, dataset, journal, rank, world, largest_component=args.largest_component)
    if rank == 0:
        show(args, about, predictor, dataset, volumes, targets)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        journal.remove()


def columns(scores, dataset):
    """score_table -> {column: list} for JSON, with the images' keys; numbers that no row has are left out."""
    scores = scores.drop(columns=["volume", *(c for c in NUMBERS if scores[c].isna().all())])
    return with_none(scores.assign(image=[dataset.key(i) for i in scores["image"]])).to_dict("list")


def show(args, about, predictor, dataset, volumes, targets):
    """Prints the tables, writes the JSON and the pictures."""
    scores = volumes if dataset.volumes else targets
    table = summarise(scores, "target", args.seed)
    how = f"prompt: {args.prompt}" + (f", mean of up to {args.mean_wordings} wordings" if args.mean_wordings else "")
    print_table({c: table[c] for c in (*dataset.classes, "mean") if c in table},
                how + ", largest component" * args.largest_component)
    several = targets["modality"].nunique() > 1
    by_modality = summarise(targets, "modality", args.seed) if several else None
    if several:
        print_table(by_modality, "by modality")
    if args.json:
        parts = about | dict(table=table, modalities=by_modality,
                             volumes=columns(volumes, dataset) if len(volumes) else None,
                             targets=columns(targets, dataset))
        lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in parts.items())
        write_atomically(args.json, "{{\n{}\n}}\n".format(",\n".join(lines)).encode())
    for modality, part in scores.groupby("modality") if args.plots else ():
        name = args.dataset + f", {modality}" * several
        of = f"{part['case'].nunique()} {args.split} {'volumes' if dataset.volumes else 'cases'}"
        draw_typical(predictor, dataset, part, Path(args.plots) / f"{args.dataset}-{args.prompt}"
                     f"{f'-{modality}' * several}.png", f"{name}: of {of}, {how}"
                     + ", before --largest-component" * args.largest_component)


if __name__ == "__main__":
    run(main)

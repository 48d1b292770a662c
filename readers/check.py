"""data.py stats: what a data set holds, and everything that is wrong with its files, named one by one."""
import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from common import ATTRIBUTES, InputError, make_folder, write_atomically
from metrics import SMALL, overlap_rate
from readers.pictures import SPLITS


def inspect(dataset, i):
    """What there is to say about image i of a split, and what is wrong with it, as a dict."""
    source, row = dataset.source, dataset.row(i)
    record = dict(key=source.key(row), case=source.case(row), wrong=[], targets=[])
    # strict: also what the reader would pass over in training
    for options in ({"strict": True}, {}) if source.name == "sa-med2d" else ({},):
        try:
            raw = source.read(row, **options)
            break
        except InputError as e:
            record["wrong"].append(str(e))
    else:
        return record
    record |= dict(modality=raw.modality, size="{} x {}".format(*raw.image.shape))
    pixels = np.ascontiguousarray(raw.image)
    if pixels.min() < pixels.max():
        record["digest"] = hashlib.blake2b(pixels, digest_size=8).digest()
    elif len(raw.masks):
        record["wrong"].append(f"{record['key']}: has masks, but all its pixels are equal; restore the image")
    if len(raw.masks):
        shared = (raw.masks & (raw.masks.sum(0) > 1)).any((1, 2))
        measured = raw.masks.mean((1, 2)), overlap_rate(raw.masks), shared
        record["targets"] = list(zip(raw.targets, *(values.tolist() for values in measured)))
    return record


def summary(images, targets):
    """DataFrames of count() -> the numbers of these images and targets; the same of each modality and each class."""
    of = lambda images, own: dict(
        images=len(images), cases=images["case"].nunique(), targets=len(own),
        area_quantiles=own["area"].quantile([0, 0.25, 0.5, 0.75, 1]).tolist() if len(own) else None,
        small=int((own["area"] < SMALL).sum()), box_overlap=float(own["rate"].mean()) if len(own) else None,
        sharing_pixels=int(own["shared"].sum()), sizes=images["size"].value_counts().to_dict())
    parts = {m: (part, targets[targets["modality"] == m]) for m, part in images.groupby("modality")}
    return of(images, targets) | dict(
        modalities={modality: of(*part) for modality, part in parts.items()},
        classes={c: of(images.loc[own["image"].unique()], own) for c, own in targets.groupby("class")})


def count(records, name, seen):
    """The records of a split -> (its numbers, what is wrong, up to 24 rows that show it: the largest of each class).

    seen: {digest: (split, key)} of all images so far, to find those on two sides of the split.
    """
    wrong, images, targets = [], [], []
    for i, record in enumerate(records):
        wrong += record["wrong"]
        first = seen.setdefault(record["digest"], (name, record["key"])) if "digest" in record else (name, "")
        # one file may serve two splits: Synapse's validation volumes
        if first[0] != name and first[1] != record["key"]:
            wrong.append(f"{record['key']} ({name}): the same pixels as {first[1]} ({first[0]}), on two sides of the "
                         "split; take one out")
        images.append((record["case"], record.get("modality"), record.get("size")))
        targets += [(i, record["modality"], *target) for target in record["targets"]]
    images = pd.DataFrame(images, columns=["case", "modality", "size"])
    targets = pd.DataFrame(targets, columns=["image", "modality", "class", "area", "rate", "shared"])
    each = max(1, 24 // max(1, targets["class"].nunique()))
    largest = targets.sort_values("area").groupby("class").tail(each)["image"].unique()[:24].tolist()
    return summary(images, targets), wrong, largest


def stats(args, open_split, open_texts):
    """`data.py stats`: prints the tables and what is wrong -> 0, or 1 if anything is.

    open_split("train") -> the Dataset of a split, open_texts(its source) -> its Texts; InputError for what is wrong
    with them.
    """
    for path in (args.json, args.sheet):
        if path:
            make_folder(Path(path).parent)
    wrong, splits, tiles, seen = [], {}, [], {}

    def tried(f, *inputs):
        try:
            return f(*inputs)
        except InputError as e:
            wrong.append(str(e))

    for split in SPLITS:
        if (dataset := tried(open_split, split)) is None:
            continue
        if not splits:
            texts = open_texts(dataset.source)
            wrong += getattr(dataset.source, "problems", ())
            for pair in dataset.source.pairs if not texts.images else ():
                for kind in ATTRIBUTES:
                    tried(texts.wordings, *pair, kind)
        loader = torch.utils.data.DataLoader(range(len(dataset)), batch_size=None, num_workers=args.workers,
                                             collate_fn=partial(inspect, dataset))
        bar = tqdm(loader, f"reading {split}", unit="image", mininterval=1)
        splits[split], found, rows = count(bar, split, seen)
        wrong += found
        if args.sheet and not tiles:
            tiles = [(s.key, s.image, list(zip(s.targets, s.masks))) for s in map(dataset.__getitem__, rows)]
    wrong = list(dict.fromkeys(wrong))
    if not splits:
        raise InputError(wrong[0])
    for split, numbers in splits.items():
        show(split, numbers)
    print("\narea: of the image. small: below 5 % of it. box overlap: how much of a target's box lies in the boxes of\n"
          "other targets, on average. sharing_pixels: targets that share pixels with another.")
    print("\n".join(f"wrong: {line}" for line in wrong) + f"\n{args.dataset}: {len(wrong) or 'nothing'} wrong")
    if args.json:
        result = dict(dataset=args.dataset, splits=splits, wrong=wrong)
        write_atomically(args.json, json.dumps(result, indent=1).encode())
    if tiles:
        from plots import contact_sheet
        contact_sheet(tiles, args.sheet, f"{args.dataset}, {len(tiles)} images of {next(iter(splits))}")
        print(f"wrote {args.sheet}")
    return 1 if wrong else 0


def show(split, numbers):
    """Prints the table of a split, a row for all, each modality and each class."""
    table = pd.DataFrame({"all": numbers, **numbers["modalities"], **numbers["classes"]}).T
    table["median area %"] = [100 * area[2] if area else np.nan for area in table["area_quantiles"]]
    table["box overlap %"] = 100 * table["box_overlap"].astype(float)
    columns = ["images", "cases", "targets", "median area %", "small", "box overlap %", "sharing_pixels"]
    print(f"\n{split}\n" + table[columns].to_string(float_format="{:.2f}".format, na_rep="-"))
    print("H x W:", ", ".join(f"{size} ({n})" for size, n in list(numbers["sizes"].items())[:6]))

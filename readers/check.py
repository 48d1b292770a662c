"""data.py stats: what a data set holds, and everything that is wrong with its files, named one by one."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from common import InputError, make_folder, write_atomically
from metrics import SMALL, overlap_rate
from readers.pictures import SPLITS


class Records(torch.utils.data.Dataset):
    """Item i: what there is to say about image i of a split, and what is wrong with it, as a dict."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        source, row = self.dataset.source, self.dataset.row(i)
        record = dict(key=source.key(row), case=source.case(row), wrong=[], targets=[])
        # strict: also what the reader would pass over in training
        for options in ({"strict": True}, {}) if source.name == "sa-med2d" else ({},):
            try:
                picture = source.read(row, **options)
                break
            except InputError as e:
                record["wrong"].append(str(e))
        else:
            return record
        record |= dict(modality=picture.modality, size="{} x {}".format(*picture.image.shape))
        pixels = np.ascontiguousarray(picture.image)
        if pixels.min() < pixels.max():
            record["digest"] = hashlib.blake2b(pixels, digest_size=8).digest()
        elif len(picture.masks):
            record["wrong"].append(f"{record['key']}: has masks, but all its pixels are equal; restore the image")
        if len(picture.masks):
            shared = (picture.masks & (picture.masks.sum(0) > 1)).any((1, 2))
            record["targets"] = list(zip(picture.targets, picture.masks.mean((1, 2)).tolist(),
                                         map(float, overlap_rate(picture.masks)), shared.tolist()))
        return record


def summary(images, targets):
    """DataFrames of count() -> the numbers of these images and targets."""
    areas = targets["area"]
    return dict(images=len(images), cases=images["case"].nunique(), targets=len(areas),
                area_quantiles=areas.quantile([0, 0.25, 0.5, 0.75, 1]).tolist() if len(areas) else None,
                small=int((areas < SMALL).sum()), box_overlap=float(targets["rate"].mean()) if len(areas) else None,
                sharing_pixels=int(targets["shared"].sum()), sizes=images["size"].value_counts().to_dict())


def count(records, name, seen):
    """The records of a split -> (its numbers, what is wrong, the rows that show it: the largest of each class, others).

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
    modalities = {modality: summary(rows, targets[targets["modality"] == modality])
                  for modality, rows in images.groupby("modality")}
    classes = {c: summary(images.loc[rows["image"].unique()], rows) for c, rows in targets.groupby("class")}
    largest = {c: rows["image"][rows["area"].idxmax()] for c, rows in targets.groupby("class")}
    rare_first = sorted(largest, key=lambda c: classes[c]["images"])
    others = targets["image"].unique()
    spread = others[np.linspace(0, len(others) - 1, 24).astype(int)] if len(others) else []
    rows = dict.fromkeys(map(int, [*(largest[c] for c in rare_first), *spread]))
    return dict(**summary(images, targets), modalities=modalities, classes=classes), wrong, list(rows)[:24]


def check_texts(texts, source):
    """One line for every class of the data set that lacks a text."""
    wrong = []
    for pair in source.pairs:
        try:
            texts.check([pair])
        except InputError as e:
            wrong.append(str(e))
    return wrong


def stats(args, open_split, open_texts):
    """`data.py stats`: prints the tables and what is wrong -> 0, or 1 if anything is.

    open_split("train") -> the Dataset of a split, open_texts() -> its Texts; InputError for what is wrong with them.
    """
    for path in (args.json, args.sheet):
        if path:
            make_folder(Path(path).parent)
    wrong, splits, tiles, seen = [], {}, [], {}
    for split in SPLITS:
        try:
            dataset = open_split(split)
        except InputError as e:
            wrong.append(str(e))
            continue
        if not splits:
            wrong += [*getattr(dataset.source, "problems", ()), *check_texts(open_texts(), dataset.source)]
        loader = torch.utils.data.DataLoader(Records(dataset), batch_size=None, num_workers=args.workers)
        bar = tqdm(loader, f"reading {split}", unit="image", mininterval=1)
        splits[split], found, rows = count(bar, split, seen)
        wrong += found
        if args.sheet and not tiles:
            tiles = [(s.key, s.image, list(zip(s.targets, s.masks))) for s in map(dataset.__getitem__, rows)]
    wrong = list(dict.fromkeys(wrong))
    if not splits:
        raise InputError(wrong[0])
    show(splits)
    for line in wrong:
        print(f"wrong: {line}")
    print(f"{args.dataset}: {len(wrong) or 'nothing'} wrong")
    if args.json:
        result = dict(dataset=args.dataset, splits=splits, wrong=wrong)
        write_atomically(args.json, json.dumps(result, indent=1).encode())
    if tiles:
        from plots import contact_sheet
        contact_sheet(tiles, args.sheet, f"{args.dataset}, {len(tiles)} images of {next(iter(splits))}")
        print(f"wrote {args.sheet}")
    return 1 if wrong else 0


def show(splits):
    """Prints the tables."""
    percent = lambda x: "-" if x is None else f"{100 * x:.2f}"
    head = (f"{'images':>8}{'cases':>8}{'targets':>9}{'median area %':>15}{'small':>8}"
            f"{'box overlap %':>15}{'sharing':>9}")
    for split, numbers in splits.items():
        print(f"\n{split:<28}{head}")
        for name, row in {"all": numbers, **numbers["modalities"], **numbers["classes"]}.items():
            area = row["area_quantiles"] and row["area_quantiles"][2]
            print(f"{name[:27]:<28}{row['images']:>8}{row['cases']:>8}{row['targets']:>9}{percent(area):>15}"
                  f"{row['small']:>8}{percent(row['box_overlap']):>15}{row['sharing_pixels']:>9}")
        sizes = [f"{size} ({n})" for size, n in numbers["sizes"].items()]
        print("sizes, H x W: " + ", ".join(sizes[:6]) + (f", and {len(sizes) - 6} others" if len(sizes) > 6 else ""))
    print("\narea: of the image. small: below 5 % of it. box overlap: how much of a target's box lies in the boxes of\n"
          "other targets, on average. sharing: targets that share pixels with another.")

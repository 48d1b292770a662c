"""bench.py data: how many images a second one process and several workers load, and SAM-Med2D's loader beside it."""
import json
import os
import sys
import tempfile
import warnings
from collections import deque
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from benches.timing import measure
from common import InputError, seeded
from data import add_prompts, make_batch, open_dataset
from texts import Texts

MASKS = 5  # per image: SAM-Med2D's default
WORKERS, PEER = (1, 2, 4), "SAM-Med2D's"


class Loaded(Dataset):
    """Item i: an image as a training step wants it, up to MASKS targets, their texts, a box for each."""

    def __init__(self, dataset, texts, images, view):
        self.dataset, self.texts, self.images, self.view = dataset, texts, images, view

    def __len__(self):
        return self.images

    def __getitem__(self, i):
        rng, sample = seeded("bench", i), self.dataset.view(i, self.view, self.texts)
        return add_prompts(make_batch([sample], self.texts, rng, MASKS, 0.0), "box", rng)


def bench_data(args):
    """-> {data set: rates}; every loader reads the same images with all their masks still in the disk's cache."""
    peer = sam_med2d(args.peer) if args.peer else None
    torch.set_num_threads(1)  # a worker process has one
    record = {}
    print("\nimages a second; as a ratio: ours over SAM-Med2D's" if peer else "\nimages a second")
    for name, folder in args.sets:
        dataset, texts = open_dataset(name, folder, "train", args.image_size), Texts(name)
        texts.check(dataset.source.pairs)
        images = min(args.images, len(dataset))
        with tempfile.TemporaryDirectory() as copy:
            loaders = {"ours": Loaded(dataset, texts, images, 0), "ours, varied": Loaded(dataset, texts, images, 1)}
            if peer:
                rows = export(dataset, images, Path(copy))
                loaders[PEER] = peer(copy, args.image_size, mask_num=MASKS, requires_name=False)
                if rows < images:  # those without any mask, which its loader cannot read
                    loaders = {k: Subset(v, range(rows)) for k, v in loaders.items()}
            record[name] = rates(loaders, args)
    return record


def rates(loaders, args):
    """{name: Dataset} -> {"one process" or "n workers": {name: images a second}}, printed."""
    result = {}
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than there are cores
    for workers in (0, *(w for w in WORKERS if w <= 2 * os.cpu_count())):
        # the first pass, which warms up, also starts the workers; a deque of length 0 keeps nothing
        passes = {name: partial(deque, DataLoader(dataset, batch_size=None, num_workers=workers,
                                                  persistent_workers=workers > 0), maxlen=0)
                  for name, dataset in loaders.items()}
        times, failed = measure(passes, args, slow=120)
        if failed:
            raise InputError("; ".join(f"{name} loader: {why}" for name, why in failed.items()))
        what = f"{workers} worker{'s' * (workers > 1)}" if workers else "one process"
        rate = result[what] = {name: len(loaders[name]) / t["ms"] * 1000 for name, t in times.items()}
        print(f"{what:<12}", ", ".join(f"{name} {r:.1f}" for name, r in rate.items())
              + (f", ratio {rate['ours'] / rate[PEER]:.2f}" if PEER in rate else ""), flush=True)
    return result


def sam_med2d(folder):
    """The class TrainingDataset of a clone of SAM-Med2D."""
    sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings(action="ignore"):
            return import_module("DataLoader").TrainingDataset
    except ImportError as e:
        raise InputError(f"--peer {folder}: {e}; install opencv-python-headless, albumentations and scikit-image, "
                         "which its loader needs") from None
    finally:
        sys.path.remove(folder)


def export(dataset, images, folder):
    """The first images that have masks, in SAM-Med2D's own form -> how many."""
    pairs = {}
    for i in range(images):
        picture = dataset.source.read(dataset.row(i))
        if not len(picture.masks):
            continue
        image = np.atleast_3d(picture.image)
        image = image if image.dtype == np.uint8 else (image.clip(0, 1) * 255).astype(np.uint8)
        files = [str(folder / f"{i}_{t}.png") for t in range(len(picture.masks) + 1)]
        masks = [mask.astype(np.uint8) * 255 for mask in picture.masks]
        for file, pixels in zip(files, [np.broadcast_to(image, (*image.shape[:2], 3)), *masks]):
            Image.fromarray(np.ascontiguousarray(pixels)).save(file)
        pairs[files[0]] = files[1:]
    (folder / "image2label_train.json").write_text(json.dumps(pairs))
    return len(pairs)

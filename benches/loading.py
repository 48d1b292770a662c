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

from benches.timing import measure, show
from common import InputError, seeded
from data import add_prompts, make_batch, open_dataset
from texts import Texts

MASKS = 5  # per image: SAM-Med2D's default


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
    """Images a second; every loader reads the same images with all their masks still in the disk's cache."""
    torch.set_num_threads(1)  # a worker process has one
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than there are cores
    dataset, texts = open_dataset(args.dataset, args.data, "train", args.image_size), Texts(args.dataset)
    images, rows = min(args.images, len(dataset)), []
    with tempfile.TemporaryDirectory() as copy:
        loaders = {"ours": Loaded(dataset, texts, images, 0), "ours, varied": Loaded(dataset, texts, images, 1)}
        if args.peer:
            count = export(dataset, images, Path(copy))
            loaders["SAM-Med2D's"] = sam_med2d(args.peer)(copy, args.image_size, mask_num=MASKS, requires_name=False)
            if count < images:  # those without any mask, which its loader cannot read
                loaders = {k: Subset(v, range(count)) for k, v in loaders.items()}
        for workers in (0, *(w for w in (1, 2, 4) if w <= 2 * os.cpu_count())):
            # the first pass, which warms up, also starts the workers; a deque of length 0 keeps nothing
            ms, _ = measure({name: partial(deque, DataLoader(loader, batch_size=None, num_workers=workers,
                                                             persistent_workers=workers > 0), maxlen=0)
                             for name, loader in loaders.items()}, args, slow=120)
            rows.append(dict(workers=workers) | {name: 1000 * len(loaders[name]) / t for name, t in ms.items()})
    return show(f"{args.dataset}, images a second", rows)


def sam_med2d(folder):
    """The class TrainingDataset of a clone of SAM-Med2D."""
    sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings(action="ignore"):
            return import_module("DataLoader").TrainingDataset
    except ImportError as e:
        raise InputError(f"--peer {folder}: {e}; clone github.com/OpenGVLab/SAM-Med2D there, and install "
                         "opencv-python-headless, albumentations and scikit-image, which its loader needs") from None
    finally:
        sys.path.remove(folder)


def export(dataset, images, folder):
    """The first images that have masks, in SAM-Med2D's own form -> how many."""
    pairs = {}
    for i in range(images):
        raw = dataset.source.read(dataset.row(i))
        if not len(raw.masks):
            continue
        image = np.atleast_3d(raw.image)
        image = image if image.dtype == np.uint8 else (image.clip(0, 1) * 255).astype(np.uint8)
        files = [str(folder / f"{i}_{t}.png") for t in range(len(raw.masks) + 1)]
        for file, pixels in zip(files, [np.broadcast_to(image, (*image.shape[:2], 3)), *raw.masks]):
            Image.fromarray(np.ascontiguousarray(pixels)).save(file)
        pairs[files[0]] = files[1:]
    (folder / "image2label_train.json").write_text(json.dumps(pairs))
    return len(pairs)

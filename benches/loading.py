"""bench.py data: how many images a second one process and several workers load."""
import os
import warnings
from collections import deque
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from benches.timing import measure, show
from common import seeded
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
    """Images a second, as they are and varied; all of them are still in the disk's cache when they are timed."""
    torch.set_num_threads(1)  # a worker process has one
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than there are cores
    dataset, texts = open_dataset(args.dataset, args.data, "train", args.image_size), Texts(args.dataset)
    images, rows = min(args.images, len(dataset)), []
    for workers in (0, *(w for w in (1, 2, 4) if w <= 2 * os.cpu_count())):
        # the first pass, which warms up, also starts the workers; a deque of length 0 keeps nothing
        ms, _ = measure({name: partial(deque, DataLoader(Loaded(dataset, texts, images, view), batch_size=None,
                                                         num_workers=workers, persistent_workers=workers > 0), maxlen=0)
                         for view, name in enumerate(("as they are", "varied"))}, args, slow=120)
        rows.append(dict(workers=workers) | {name: 1000 * images / t for name, t in ms.items()})
    return show(f"{args.dataset}, images a second", rows)

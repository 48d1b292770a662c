"""bench.py data: how many images a second one process and several workers load."""
import os
import warnings
from collections import deque
from functools import partial

import torch
from torch.utils.data import DataLoader

from benches.timing import measure, show
from common import seeded
from data import add_prompts, make_batch, open_dataset
from texts import Texts

MASKS = 5  # per image: SAM-Med2D's default


def load(dataset, texts, i):
    """Image i as a training step wants it, up to MASKS targets, their texts, a box for each."""
    rng, sample = seeded("bench", i), dataset[i]
    return add_prompts(make_batch([sample], texts, rng, MASKS, 0.0), "box", rng)


def bench_data(args):
    """Images a second; all of them are still in the disk's cache when they are timed."""
    torch.set_num_threads(1)  # a worker process has one
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than there are cores
    dataset, texts = open_dataset(args.dataset, args.data, "train", args.image_size), Texts(args.dataset)
    images, rows = min(args.images, len(dataset)), []
    for workers in (0, *(w for w in (1, 2, 4) if w <= 2 * os.cpu_count())):
        # the first pass, which warms up, also starts the workers; a deque of length 0 keeps nothing
        ms, _ = measure({"ours": partial(deque, DataLoader(
            range(images), batch_size=None, collate_fn=partial(load, dataset, texts), num_workers=workers,
            persistent_workers=workers > 0), maxlen=0)}, args, slow=120)
        rows.append({"workers": workers, "images/s": 1000 * images / ms["ours"]})
    return show(f"{args.dataset}, images a second", rows)

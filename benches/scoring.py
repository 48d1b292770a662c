"""bench.py eval: Dice and HD95 of whole volumes, ours against medpy as TransUNet calls it; the values must be equal."""
import time

import medpy.metric.binary as medpy
import numpy as np
from scipy.ndimage import binary_erosion
from tqdm import tqdm

from common import InputError
from data import open_dataset
from metrics import score_labels


def predictions(truth, classes):
    """{name: label map}: a truth shifted, eroded, without some structures, and with noise at every border."""
    eroded, rng = np.zeros_like(truth), np.random.default_rng(0)
    for i in range(1, classes + 1):
        eroded[binary_erosion(truth == i, iterations=2)] = i
    present = [i for i in range(1, classes + 1) if (truth == i).any()]
    dropped = np.where(np.isin(truth, present[::3]), 0, truth).astype(truth.dtype)
    jagged = np.where(rng.random(truth.shape) < 0.3, np.roll(truth, 2, -1), truth)
    return dict(shifted=np.roll(truth, (1, 3, -2), (0, 1, 2)), eroded=eroded, dropped=dropped, jagged=jagged)


def medpys(prediction, truth, classes):
    """{class: (Dice, HD95)} of TransUNet's rule: medpy on the whole volume, one structure after the other."""
    found = {}
    for i, name in enumerate(classes, 1):
        a, b = prediction == i, truth == i
        if a.any() and b.any():
            found[name] = medpy.dc(a, b), medpy.hd95(a, b)
        else:
            found[name] = (1.0, 0.0) if a.any() else (0.0, 0.0)
    return found


def bench_eval(args):
    """-> {data set: seconds per volume}"""
    record = {}
    for name, folder in args.sets:
        dataset = open_dataset(name, folder, args.split, 256)
        if not dataset.volumes:
            raise InputError(f"{name}: holds no volumes to score; give synapse=DIR")
        volumes = {}
        for i in tqdm(range(len(dataset)), f"reading {name}", mininterval=1):
            sample = dataset[i]
            label = np.zeros(sample.size, np.uint8)
            for target, mask in zip(sample.targets, sample.truth):
                label[mask] = dataset.classes.index(target) + 1
            if sample.case in volumes or len(volumes) < args.volumes:
                volumes.setdefault(sample.case, []).append(label)
        seconds, largest = {}, 0.0
        for case, slices in volumes.items():
            truth = np.stack(slices)
            for kind, prediction in predictions(truth, len(dataset.classes)).items():
                times = [time.perf_counter()]
                ours = score_labels(prediction, truth, dataset.classes)
                times.append(time.perf_counter())
                theirs = medpys(prediction, truth, dataset.classes)
                times.append(time.perf_counter())
                seconds.setdefault(kind, []).append(np.diff(times))
                largest = max(largest, *(abs(ours[c][m] - v) for c, pair in theirs.items()
                                         for m, v in zip(("dice", "hd95"), pair)))
                if largest > 1e-9:
                    raise RuntimeError(f"{case}, {kind}: ours differs from medpy by {largest}")
        shapes = ", ".join("x".join(map(str, np.shape(s))) for s in volumes.values())
        print(f"\n{name}, {len(volumes)} volumes ({shapes}), {len(dataset.classes)} classes; s per volume"
              f"\n{'prediction':<12}{'ours':>8}{'medpy':>8}{'ratio':>8}")
        record[name] = dict(volumes=shapes, largest_difference=largest, seconds={})
        for kind, pairs in seconds.items():
            ours, theirs = np.mean(pairs, 0)
            record[name]["seconds"][kind] = dict(ours=ours, medpy=theirs, ratio=theirs / ours)
            print(f"{kind:<12}{ours:>8.3f}{theirs:>8.2f}{theirs / ours:>8.1f}")
        print(f"largest difference of a Dice or HD95: {largest:.1e}")
    return record

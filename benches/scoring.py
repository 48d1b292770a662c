"""bench.py eval: Dice and HD95 of whole volumes, ours against medpy as TransUNet calls it; the values must be equal."""
from itertools import groupby, islice

import medpy.metric.binary as medpy
import numpy as np
from scipy.ndimage import binary_erosion

from benches.timing import show, timed
from common import InputError
from data import open_dataset
from metrics import score_labels


def predictions(truth, classes):
    """{name: label map}: a truth shifted, eroded, without some structures, and with noise at every border."""
    eroded, rng = np.zeros_like(truth), np.random.default_rng(0)
    for i in range(1, classes + 1):
        eroded[binary_erosion(truth == i, iterations=2)] = i
    dropped = np.where(truth % 3 == 1, 0, truth).astype(truth.dtype)
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


def volumes(dataset):
    """-> the truth of each volume, one after the other: (its case, label map uint8 [D,H,W])."""
    for case, images in groupby(range(len(dataset)), dataset.case):
        slices = []
        for sample in map(dataset.__getitem__, images):
            slices.append(np.zeros(sample.size, np.uint8))
            for target, mask in zip(sample.targets, sample.truth):
                slices[-1][mask] = dataset.classes.index(target) + 1
        yield case, np.stack(slices)


def bench_eval(args):
    dataset, rows, results = open_dataset(args.dataset, args.data, args.split, 256), [], {}
    if not dataset.volumes:
        raise InputError(f"{args.dataset}: holds no volumes to score; give synapse")
    scorers = dict(ours=lambda *pair: {c: (s["dice"], s["hd95"]) for c, s in score_labels(*pair).items()}, medpy=medpys)
    for case, truth in islice(volumes(dataset), args.volumes):
        for kind, prediction in predictions(truth, len(dataset.classes)).items():
            s = {name: timed(lambda: results.update({name: score(prediction, truth, dataset.classes)}))
                 for name, score in scorers.items()}
            difference = np.abs(np.subtract(*(list(found.values()) for found in results.values()))).max()
            rows.append(dict(case=case, prediction=kind, **s, ratio=s["medpy"] / s["ours"], difference=difference))
    if max(row["difference"] for row in rows) > 1e-9:
        raise RuntimeError(f"ours differs from medpy: {rows}")
    return show(f"{args.dataset}, {' x '.join(map(str, truth.shape))} voxels; s per volume", rows)

"""How good a mask is: Dice, IoU and HD95 of a pair or a whole label map; what is said about many of them, as a table
with intervals; and how an evaluation survives a kill.

Masks are bool arrays of any dimension, prediction and truth on one grid. Distances are in voxels, or in mm with
`spacing`: the mm from one voxel to the next along each axis of the array, or one number for all axes.
"""
import glob
import hashlib
import json
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import binary_erosion, find_objects
from scipy.sparse import csr_array
from scipy.spatial import cKDTree

from common import InputError, writing

# ---------------------------------------------------------------------------------------------------------------------
# One pair of masks

def dice(a, b):
    """2 |a and b| / (|a| + |b|); None if both are empty."""
    check_shapes(a, b)
    both = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / both if both else None


def iou(a, b):
    """|a and b| / |a or b|; None if both are empty."""
    check_shapes(a, b)
    either = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / either if either else None


def hd95(a, b, spacing=None):
    """medpy's HD95: the 95th percentile of the surface distances of both directions together; None if a side is empty.

    Others take the larger one of two percentiles, which is another number.
    """
    check_shapes(a, b)
    step = voxel_size(a, spacing)
    if not (a.any() and b.any()):
        return None
    # the voxels with a face to the outside; beyond the array is outside, as it is for medpy
    p, q = (np.argwhere(mask ^ binary_erosion(mask)) * step for mask in (a, b))
    # balancing costs more than it gains on a grid, whose points are spread evenly
    trees = {"balanced_tree": False, "compact_nodes": False}
    distances = cKDTree(q, **trees).query(p)[0], cKDTree(p, **trees).query(q)[0]
    return float(np.percentile(np.concatenate(distances), 95))


def voxel_size(mask, spacing):
    """float64 [D]; ones, so voxels, without a spacing."""
    step = np.asarray(1 if spacing is None else spacing, float)
    if step.shape not in ((), (mask.ndim,)) or not (np.isfinite(step) & (step > 0)).all():
        raise InputError(f"spacing {spacing}: give {mask.ndim} numbers above 0, the mm between voxels along each axis")
    return np.broadcast_to(step, mask.ndim)


def check_shapes(a, b):
    if a.shape != b.shape:
        raise InputError(f"prediction {a.shape} and truth {b.shape} differ in shape; bring both onto one grid")


# ---------------------------------------------------------------------------------------------------------------------
# One case: each pair by both conventions

METRICS = ("dice", "iou", "hd95", "dice_strict", "iou_strict", "hd95_strict")


def score(prediction, truth, spacing=None):
    """One structure -> {metric: float or None}, as score_labels() of a class."""
    return score_labels(prediction.view(np.uint8), truth.view(np.uint8), ("structure",), spacing)["structure"]


def score_labels(prediction, truth, classes, spacing=None):
    """Label maps uint8 of one case, where i + 1 stands for classes[i] -> {class: {metric: float or None}}, see METRICS.

    dice, iou and hd95 follow TransUNet: a prediction without truth counts as (1, 1, 0), any other empty pair, even a
    rightly empty one, as (0, 0, 0). The strict ones skip a rightly empty pair (None) and otherwise give an empty side
    Dice 0, IoU 0 and the diagonal of the array.
    """
    check_shapes(prediction, truth)
    diagonal, scores = float(np.linalg.norm(truth.shape * voxel_size(truth, spacing))), {}
    boxes = find_objects(np.stack((prediction, truth)), len(classes))  # each around a class on both sides
    for i, (name, box) in enumerate(zip(classes, boxes), 1):
        a, b = (labels[box[1:]] == i if box else np.zeros(0, bool) for labels in (prediction, truth))
        if a.any() and b.any():
            numbers = (dice(a, b), iou(a, b), hd95(a, b, spacing)) * 2
        elif a.any():
            numbers = 1.0, 1.0, 0.0, 0.0, 0.0, diagonal
        elif b.any():
            numbers = 0.0, 0.0, 0.0, 0.0, 0.0, diagonal
        else:
            numbers = 0.0, 0.0, 0.0, None, None, None
        scores[name] = dict(zip(METRICS, numbers))
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# How small a target is, and how crowded its image

SMALL = 0.05  # of the image's area: the paper's small objects


def overlap_rate(masks, names=None):
    """Masks bool [T,H,W] -> float64 [T]: the share of a target's bounding box that the boxes of the others cover.

    The measure along figure 3, left, which the paper does not define. It speaks of adjacent structures and of confusion
    between classes; their masks share no pixel, but their boxes do. With the T class names, boxes of the same class do
    not count. An empty mask has no box, and the rate 0.
    """
    names = range(len(masks)) if names is None else names
    boxes = [next(iter(find_objects(mask.view(np.uint8))), None) for mask in masks]
    covered = {name: np.zeros(masks.shape[1:], bool) for name in names}
    for name, box in zip(names, boxes):
        if box:
            covered[name][box] = True
    classes = sum(covered.values(), np.zeros(masks.shape[1:], np.uint16))  # how many cover each pixel
    return np.array([(classes[box] > 1).mean() if box else 0.0 for box in boxes])


# ---------------------------------------------------------------------------------------------------------------------
# Many cases: a DataFrame with a row per case and class of a volume, or per target of an image

MM = ("hd95_mm", "hd95_strict_mm")  # where the data set knows its voxels' size
NUMBERS = (*METRICS, *MM, "area", "overlap")  # the share of the image, and overlap_rate


def score_table(rows):
    """[{column: value}] -> DataFrame, in the order of the images; None and what is not there become NaN.

    image: its number in the data set; for a volume that of the slice that shows it best. volume: whether the row is of
    a volume. case, target (its class), modality: str. NUMBERS: float64.
    """
    table = pd.DataFrame(rows, columns=["image", "volume", "case", "target", "modality", *NUMBERS])
    kinds = dict(image=int, volume=bool) | dict.fromkeys(NUMBERS, float)
    return table.astype(kinds).sort_values("image", kind="stable", ignore_index=True)


def bootstrap_means(sums, counts, seed=0, n=2000, level=0.95):
    """Percentile bootstrap of the means of K groups over cases, which are resampled for all groups together.

    sums, counts [cases,K], dense or sparse: of the values that a case has in a group, and how many they are -> K + 1
    intervals (low, high), between which `level` of n resampled means lie: of each group's mean over all its values, and
    of the mean over the groups. None for a group of fewer than two cases, which say nothing about their spread.
    """
    cases, rng = sums.shape[0], np.random.default_rng(seed)
    if cases < 2:
        return [None] * (sums.shape[1] + 1)
    sums, counts = csr_array(sums), csr_array(counts)  # most cases of a large data set lack most of its classes
    means, block = [], max(1, 2 ** 22 // cases)  # of draws at a time: 32 MB
    for start in range(0, n, block):
        size = min(block, n - start)
        drawn = rng.integers(cases, size=(size, cases)) + cases * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).T  # how often each case is drawn
        with np.errstate(invalid="ignore"):  # a group of which no case was drawn
            means.append((sums.T @ times / (counts.T @ times)).T)
    means, several = np.concatenate(means), (counts > 0).sum(0) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # groups, and draws, without any value
        groups = np.column_stack([means, np.nanmean(means, 1)])
        edges = np.nanquantile(groups, ((1 - level) / 2, (1 + level) / 2), axis=0)
    known = np.append(several, several.any()) & ~np.isnan(edges[0])
    return [tuple(map(float, pair)) if k else None for pair, k in zip(edges.T, known)]


def summarise(scores, column, seed=0):
    """A score_table, by the classes ("target") or modalities in a column -> {group: {metric: mean over its rows, "ci"
    and "ci_strict": of Dice, "cases": how many have a strict Dice}} and, under "mean", of the groups' means.

    Rows that a metric does not count are skipped. The intervals are bootstrapped over the cases (bootstrap_means),
    whose structures stay together.
    """
    metrics = [m for m in (*METRICS, *MM) if m in METRICS or scores[m].notna().any()]
    means = scores.groupby(column, sort=False)[metrics].mean()
    means.loc["mean"] = means.mean()
    table = with_none(means).to_dict("index")
    (group, names), (case, cases) = pd.factorize(scores[column]), pd.factorize(scores["case"])
    for metric, interval in (("dice", "ci"), ("dice_strict", "ci_strict")):
        known = scores[metric].notna().to_numpy()
        # sparse: a data set of 20 million masks has cases by the million, each with a few of its classes
        sums, counts = (csr_array((values, (case[known], group[known])), (len(cases), len(names)))
                        for values in (scores[metric].to_numpy()[known], np.ones(known.sum())))
        n = [*(counts > 0).sum(0), len(cases)]
        for name, found, each in zip([*names, "mean"], bootstrap_means(sums, counts, seed), n):
            table[name] |= {interval: found, "cases": int(each)}
    return table


def with_none(table):
    """A DataFrame with None for NaN, as JSON wants it."""
    return table.astype(object).where(table.notna(), None)


PRINTED = dict(dice=("Dice", 4), hd95=("HD95", 2), dice_strict=("strict Dice", 4), ci_strict=("95 % interval", 3),
               hd95_strict=("HD95", 2), hd95_strict_mm=("in mm", 2), iou_strict=("IoU", 4), cases=("cases", 0))


def print_table(table, title):
    """What summarise() found: {column: (its head, digits)} are PRINTED, millimetres only where they are known."""
    def cell(value, digits):
        return "-" if value is None else " - ".join(f"{v:.{digits}f}" for v in np.atleast_1d(value))
    shown = {column: how for column, how in PRINTED.items() if column in table["mean"]}
    cells = [[cell(row[column], digits) for column, (_, digits) in shown.items()] for row in table.values()]
    print(f"\n{title}\n" + pd.DataFrame(cells, list(table)).to_string(header=[head for head, _ in shown.values()]))
    print("Dice, HD95 in voxels: TransUNet's convention; strict: an empty side costs everything (docs/metrics.md)\n")


class Journal:
    """The rows of an evaluation's cases so far, {number of its first image: rows}. With a path they are also kept in
    PATH.*.partial, a line for each case, so that a killed evaluation goes on, on as many processes as one likes. What
    was evaluated otherwise, with other `settings`, is not gone on with."""

    def __init__(self, path=None, rank=0, settings=""):
        self.path, self.rank, self.file, self.cases = path and Path(path), rank, None, {}
        self.key = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        for line in (line for part in self.parts() for line in part.read_text(errors="replace").split("\n")):
            with suppress(ValueError, TypeError):  # torn by a kill; where a machine went down there may be anything
                key, first, rows = json.loads(line)
                if key == self.key:
                    self.cases[first] = rows if rank == 0 else []  # all are gathered there

    def parts(self):
        """The files of all processes, of this start and of earlier ones."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.*.partial")) if self.path else []

    def begin(self):
        """When every process has read the files: opens that of this process."""
        if self.path:
            with writing(self.path):
                self.file = open(f"{self.path}.{self.rank}.partial", "a")
                print(file=self.file, flush=True)  # ends a line that is torn

    def add(self, first, rows):
        """Of the case that begins with image `first`."""
        self.cases[first] = rows
        if self.file:
            with writing(self.path):
                print(json.dumps([self.key, first, rows]), file=self.file, flush=True)

    def remove(self):
        """When the result is written."""
        if self.file:
            self.file.close()
            for part in self.parts():
                part.unlink(missing_ok=True)

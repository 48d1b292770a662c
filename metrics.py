"""How good a mask is: Dice, IoU and HD95 of a pair or a whole label map; what is said about many of them; and what an
evaluation found, as columns, its tables, and how it survives a kill.

Masks are bool arrays of any dimension, prediction and truth on one grid. Distances are in voxels, or in mm with
`spacing`: the mm from one voxel to the next along each axis of the array, or one number for all axes.
"""
import json
import warnings
from array import array
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects
from scipy.sparse import coo_array, csr_array
from scipy.spatial import cKDTree

from common import InputError, write_atomically

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
    boxes = bounding_box(a), bounding_box(b)
    if None in boxes:
        return None
    box = union(*boxes)
    p, q, shape = border(a[box]), border(b[box]), [side.stop - side.start for side in box]
    distances = nearest(p, q, step, shape), nearest(q, p, step, shape)
    return float(np.percentile(np.concatenate(distances), 95))


def nearest(points, others, step, shape):
    """Border voxels int [n,D] and [m,D] of a grid of this shape -> float64 [n], from each point to the nearest other.

    The neighbours are looked up first: few borders that are worth a comparison are further apart. The others are asked
    from a tree, at 1 to 4 microseconds a point; the distance transform takes 0.3 a voxel, and is cheaper where one side
    fills the grid with noise.
    """
    distances, left = look_around(points, others, step, shape)
    if 10 * len(left) > np.prod(shape):
        elsewhere = np.ones(shape, bool)
        elsewhere[tuple(others.T)] = False
        return distance_transform_edt(elsewhere, sampling=step)[tuple(points.T)]
    if len(left):
        # balancing costs more than it gains on a grid, whose points are spread evenly
        tree = cKDTree(others * step, balanced_tree=False, compact_nodes=False)
        distances[left] = tree.query(points[left] * step)[0]
    return distances


def look_around(points, others, step, shape):
    """-> (float64 [n], known for the points with an other one near by; int: the points without)."""
    distances, left = np.empty(len(points)), np.arange(len(points))
    if len(points) < 1000:  # the tree is as quick
        return distances, left
    offsets, lengths = neighbours(tuple(step))
    margin = np.abs(offsets).max(0)
    grid = np.zeros(shape + 2 * margin, bool)
    grid[tuple((others + margin).T)] = True
    at, flat = np.ravel_multi_index((points + margin).T, grid.shape), grid.ravel()
    for jump, length in zip(offsets @ grid.strides, lengths):  # a bool is one byte, so strides count voxels
        miss = ~flat[at + jump]
        distances[left[~miss]] = length
        left, at = left[miss], at[miss]
        if not len(left):
            break
    return distances, left


@lru_cache(maxsize=64)
def neighbours(step):
    """Of a voxel: the 120 nearest, itself first -> (offsets int [n,D], lengths float64 [n]). Fewer, if one that lies
    further than 6 voxels away along some axis would come before."""
    offsets = np.indices((13,) * len(step)).reshape(len(step), -1).T - 6
    lengths = np.sqrt(((offsets * step) ** 2).sum(1))
    order = np.argsort(lengths, kind="stable")[:120]
    order = order[lengths[order] < 7 * min(step)]
    return offsets[order], lengths[order]


def border(mask):
    """int [n,D]: the voxels of a mask with a face to the outside. Beyond the array is outside, as it is for medpy."""
    # a voxel's neighbours are then at fixed steps, without wrapping
    padded = np.zeros([n + 2 for n in mask.shape], bool)
    padded[(slice(1, -1),) * mask.ndim] = mask
    flat = padded.ravel()
    core = flat.copy()
    for stride in padded.strides:
        core[stride:] &= flat[:-stride]
        core[:-stride] &= flat[stride:]
    return np.stack(np.unravel_index(np.flatnonzero(flat > core), padded.shape), 1) - 1


def bounding_box(mask):
    """A slice for each axis; None if the mask is empty."""
    box = ()
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(tuple(k for k in range(mask.ndim) if k != axis)))
        if not len(hit):
            return None
        box += slice(int(hit[0]), int(hit[-1]) + 1),
        mask = mask[(slice(None),) * axis + box[-1:]]  # less to look at for the axes to come
    return box


def union(box, other):
    return tuple(slice(min(s.start, t.start), max(s.stop, t.stop)) for s, t in zip(box, other))


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
    """One structure -> {metric: float or None}, see METRICS.

    dice, iou and hd95 follow TransUNet: a prediction without truth counts as (1, 1, 0), any other empty pair, even a
    rightly empty one, as (0, 0, 0). The strict ones skip a rightly empty pair (None) and otherwise give an empty side
    Dice 0, IoU 0 and the diagonal of the array.
    """
    check_shapes(prediction, truth)
    return score_boxes(prediction, truth, bounding_box(prediction), bounding_box(truth), spacing)


def score_labels(prediction, truth, classes, spacing=None):
    """Label maps uint8 of one case, where i + 1 stands for classes[i] -> {class: score()}."""
    check_shapes(prediction, truth)
    boxes = zip(label_boxes(prediction, len(classes)), label_boxes(truth, len(classes)))
    return {name: score_boxes(prediction, truth, *pair, spacing, label=i)
            for i, (name, pair) in enumerate(zip(classes, boxes), 1)}


def score_boxes(prediction, truth, box, true_box, spacing, label=True):
    """score() of the voxels equal to `label`, with the bounding box of each side; None: it is empty."""
    step = voxel_size(truth, spacing)
    if box and true_box:
        both = union(box, true_box)
        a, b = prediction[both] == label, truth[both] == label
        found = dice(a, b), iou(a, b), hd95(a, b, step)
        return dict(zip(METRICS, found + found))
    transunet = (1.0, 1.0, 0.0) if box else (0.0, 0.0, 0.0)
    strict = (0.0, 0.0, float(np.linalg.norm(truth.shape * step))) if box or true_box else (None, None, None)
    return dict(zip(METRICS, transunet + strict))


def label_boxes(labels, n):
    """The bounding boxes of labels 1..n; None for one that is not there. One pass for all, over what is not 0."""
    box = bounding_box(labels)
    found = find_objects(labels[box], n) if box else [None] * n
    return [inner and tuple(slice(o.start + s.start, o.start + s.stop) for o, s in zip(box, inner)) for inner in found]


# ---------------------------------------------------------------------------------------------------------------------
# Many cases

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
    means, rows = np.empty((n, sums.shape[1])), max(1, 2 ** 22 // cases)  # of draws at a time: 32 MB
    for start in range(0, n, rows):
        r = min(rows, n - start)
        drawn = rng.integers(cases, size=(r, cases)) + cases * np.arange(r)[:, None]
        times = np.bincount(drawn.ravel(), minlength=r * cases).reshape(r, cases).T  # how often each case is drawn
        with np.errstate(invalid="ignore"):  # a group of which no case was drawn
            means[start:start + r] = (sums.T @ times / (counts.T @ times)).T
    several = np.asarray((counts > 0).sum(0)) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # groups, and draws, without any value
        groups = np.column_stack([means, np.nanmean(means, 1)]) if sums.shape[1] else np.full((n, 1), np.nan)
        edges = np.nanquantile(groups, ((1 - level) / 2, (1 + level) / 2), axis=0)
    known = np.append(several, several.any()) & ~np.isnan(edges[0])
    return [tuple(map(float, pair)) if k else None for pair, k in zip(edges.T, known)]


# ---------------------------------------------------------------------------------------------------------------------
# How small a target is, and how crowded its image

SMALL = 0.05  # of the image's area: the paper's small objects


def overlap_rate(masks, names=None):
    """Masks bool [T,H,W] -> float64 [T]: the share of a target's bounding box that the boxes of the others cover.

    The measure along figure 3, left, which the paper does not define. It speaks of adjacent structures and of confusion
    between classes; their masks share no pixel, but their boxes do. With the T class names, boxes of the same class do
    not count. An empty mask has no box, and the rate 0.
    """
    boxes = [bounding_box(mask) for mask in masks]
    cover = np.zeros(masks.shape[1:], np.uint16)  # by how many classes
    groups = {}
    for t, box in enumerate(boxes):
        if box:
            groups.setdefault(names[t] if names else t, []).append(box)
    for group in groups.values():
        own = np.zeros(cover.shape, bool)
        for box in group:
            own[box] = True
        cover += own
    return np.array([(cover[box] > 1).mean() if box else 0.0 for box in boxes])


# ---------------------------------------------------------------------------------------------------------------------
# An evaluation

MM = ("hd95_mm", "hd95_strict_mm")  # where the data set knows its voxels' size
NUMBERS = (*METRICS, *MM, "area", "overlap")  # the share of the image, and overlap_rate


class Scores:
    """What came out, as columns: a row per case and class of a volume, or per target of an image.

    row: the number of the image in the data set; for a volume of the slice that shows it best. None is NaN here.
    """

    def __init__(self):
        self.row, self.case, self.name, self.modality = array("q"), [], [], []
        self.numbers = {column: array("d") for column in NUMBERS}

    def add(self, row, case, name, modality, numbers):
        self.row.append(row), self.case.append(case), self.name.append(name), self.modality.append(modality)
        for column, values in self.numbers.items():
            value = numbers.get(column)
            values.append(np.nan if value is None else value)

    def __len__(self):
        return len(self.row)

    def __getitem__(self, column):
        return np.array(self.numbers[column])

    def at(self, i):
        """Row i, as add() takes it."""
        numbers = {column: values[i] for column, values in self.numbers.items()}
        return self.row[i], self.case[i], self.name[i], self.modality[i], numbers

    def gather(self, parts):
        """Takes the rows of other Scores, in the order of the images."""
        places = [(part, i) for part in parts for i in range(len(part))]
        for n in np.argsort(np.concatenate([np.array(part.row) for part in parts]), kind="stable").tolist():
            part, i = places[n]
            self.add(*part.at(i))

    def where(self, keep):
        """The Scores of the rows i for which keep(i)."""
        kept = Scores()
        for i in filter(keep, range(len(self))):
            kept.add(*self.at(i))
        return kept

    def columns(self, key):
        """-> {column: list}, None for NaN; columns that are empty are left out."""
        plain = lambda values: [v if v == v else None for v in values]
        found = {column: plain(values) for column, values in self.numbers.items() if not np.isnan(self[column]).all()}
        return dict(image=[key(i) for i in self.row], case=self.case, target=self.name, modality=self.modality, **found)


def summarise(scores, groups, seed=0):
    """Scores -> {group: {metric: mean over its rows, "cases": n, "ci": of Dice}} and, under "mean", of the groups' means.

    groups: the class or the modality of each row. Rows that a metric does not count are skipped. The intervals are
    bootstrapped over the cases (bootstrap_means), whose structures stay together.
    """
    names = list(dict.fromkeys(groups))
    number, cases = ({v: i for i, v in enumerate(dict.fromkeys(x))} for x in (groups, scores.case))
    column, case = np.array([number[g] for g in groups], int), np.array([cases[c] for c in scores.case], int)
    table = {name: {} for name in [*names, "mean"]}
    for metric in (*METRICS, *MM):
        values = scores[metric]
        known = ~np.isnan(values)
        if not known.any() and metric in MM:
            continue
        # sparse: a data set of 20 million masks has cases by the million, each with a few of its classes
        table_of = lambda v: coo_array((v, (case[known], column[known])), (len(cases), len(names))).tocsr()
        sums, counts = table_of(values[known]), table_of(np.ones(known.sum()))
        n = np.asarray(counts.sum(0)).ravel()
        means = [float(v / m) if m else None for v, m in zip(np.asarray(sums.sum(0)).ravel(), n)]
        for name, value in zip([*names, "mean"], [*means, mean(means)]):
            table[name][metric] = value
        if metric in ("dice", "dice_strict"):
            for name, interval in zip([*names, "mean"], bootstrap_means(sums, counts, seed)):
                table[name][metric.replace("dice", "ci")] = interval
            for name, seen in zip(names, np.asarray((counts > 0).sum(0)).ravel()):
                table[name]["cases"] = int(seen)
    table["mean"]["cases"] = len(cases)
    return table


def mean(values):
    """Of the values that are counted; None if there are none."""
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def print_table(table, title):
    show = lambda v, digits: "-" if v is None else f"{v:.{digits}f}"
    width = max(16, *(len(name) + 2 for name in table), len(title) + 2)
    mm = "hd95_strict_mm" in table["mean"]
    print(f"\n{title:<{width}}{'Dice':>8}{'HD95':>8}{'strict Dice':>14}{'95 % interval':>18}{'HD95':>8}"
          + f"{'in mm':>8}" * mm + f"{'IoU':>8}{'cases':>8}")
    for name, row in table.items():
        low, high = row["ci_strict"] or (None, None)
        print(f"{name:<{width}}{show(row['dice'], 4):>8}{show(row['hd95'], 2):>8}{show(row['dice_strict'], 4):>14}"
              f"{show(low, 3) + ' - ' + show(high, 3) if low is not None else '-':>18}{show(row['hd95_strict'], 2):>8}"
              + f"{show(row.get('hd95_strict_mm'), 2):>8}" * mm + f"{show(row['iou_strict'], 4):>8}{row['cases']:>8}")
    print("Dice, HD95 in voxels: TransUNet's convention; strict: an empty side costs everything (README, Metrics)\n")


class Journal:
    """The Scores of the volumes and of the targets so far. With a path they are also kept in PATH.<rank>.partial, a
    line for each case, so that a killed evaluation goes on, on as many processes as one likes. `settings` is one line:
    what was evaluated otherwise is not gone on with."""

    def __init__(self, path=None, rank=0, settings=""):
        self.scores, self.done, self.lines, self.file = (Scores(), Scores()), set(), {}, None
        self.path, self.own, self.first_line = path and Path(path), f"{path}.{rank}.partial", f"{settings}\n"
        for part in self.parts():
            with open(part, errors="replace") as f:
                lines = [line for line in f if line.endswith("\n")]  # the last may be torn by a kill
            if lines and lines[0] == self.first_line:
                self.lines[str(part)] = lines
        for case in (json.loads(line) for lines in self.lines.values() for line in lines[1:]):
            if rank == 0 and case["first"] not in self.done:  # the rows are gathered there
                self.keep(case["volume"], case["targets"])
            self.done.add(case["first"])

    def parts(self):
        """The files of all processes."""
        return sorted(self.path.parent.glob(f"{self.path.name}.*.partial")) if self.path else []

    def begin(self):
        """When every process has read the files: this one's own, whole."""
        if self.path:
            write_atomically(self.own, "".join(self.lines.pop(self.own, [self.first_line])).encode())
            self.file, self.lines = open(self.own, "a"), {}

    def keep(self, volume, targets):
        for scores, rows in zip(self.scores, (volume, targets)):
            for row in rows:
                scores.add(*row)

    def add(self, first, volume, targets):
        self.keep(volume, targets)
        if self.file:
            print(json.dumps(dict(first=first, volume=volume, targets=targets)), file=self.file, flush=True)

    def remove(self):
        """When the result is written."""
        if self.file:
            self.file.close()
            for part in self.parts():
                part.unlink(missing_ok=True)

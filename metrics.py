"""How good a mask is: Dice, IoU and HD95 of a pair or a whole label map, and what is said about many of them.

Masks are bool arrays of any dimension, prediction and truth on one grid. Distances are in voxels, or in mm with
`spacing`: the mm from one voxel to the next along each axis of the array, or one number for all axes.
"""
from functools import lru_cache

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects
from scipy.sparse import csr_array
from scipy.spatial import cKDTree

from common import InputError

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
    distances = surface_distances(a, b, spacing)
    return float(np.percentile(np.concatenate(distances), 95)) if distances else None


def surface_distances(a, b, spacing=None):
    """-> (float64 [n], float64 [m]): how far each border voxel of a is from the border of b, and of b from that of a,
    both in the order of the array; None if a side is empty."""
    check_shapes(a, b)
    step = voxel_size(a, spacing)
    boxes = bounding_box(a), bounding_box(b)
    if None in boxes:
        return None
    box = union(*boxes)
    shape = [side.stop - side.start for side in box]
    p, q = border(a[box]), border(b[box])
    return nearest(p, q, step, shape), nearest(q, p, step, shape)


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

def bootstrap(values, seed=0, n=2000, level=0.95):
    """Percentile bootstrap of the mean over cases -> (low, high), which `level` of n resampled means lie between.

    None among the values is skipped; None for fewer than two cases, which say nothing about their spread. The same
    values and seed give the same interval.
    """
    values = np.array([v for v in values if v is not None], float)[:, None]
    return bootstrap_means(values, np.ones_like(values), seed, n, level)[0]


def bootstrap_means(sums, counts, seed=0, n=2000, level=0.95):
    """bootstrap() of K groups at once, whose cases are resampled together.

    sums, counts [cases,K], dense or sparse: of the values that a case has in a group, and how many they are -> K + 1
    intervals: of each group's mean over all its values, and of the mean over the groups. None for a group of fewer than
    two cases.
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
    groups = np.column_stack([means, nan_means(means)]) if sums.shape[1] else np.full((n, 1), np.nan)
    edges = np.full((2, groups.shape[1]), np.nan)
    known = np.append(several, several.any()) & ~np.isnan(groups).all(0)
    edges[:, known] = np.nanquantile(groups[:, known], ((1 - level) / 2, (1 + level) / 2), axis=0)
    return [tuple(map(float, pair)) if k else None for pair, k in zip(edges.T, known)]


def nan_means(rows):
    """The mean of each row over what is not NaN; NaN for a row without."""
    known = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return np.where(known, rows, 0).sum(1) / known.sum(1)


def bootstrap_difference(a, b, seed=0, n=2000, level=0.95):
    """bootstrap() of the mean of a - b, of two methods over the same cases in the same order; a case counts if both
    have a value."""
    if len(a) != len(b):
        raise InputError(f"{len(a)} cases against {len(b)}; a paired interval needs the same cases of both methods")
    return bootstrap([x - y for x, y in zip(a, b) if x is not None and y is not None], seed, n, level)


def pearson(x, y):
    """-> (r, slope, intercept) of the line through the points by least squares; r is 0 if y is constant. None for
    fewer than three points, or a constant x."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or x.min() == x.max():
        return None
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    r = 0.0 if y.min() == y.max() else (dx @ dy) / np.sqrt((dx @ dx) * (dy @ dy))
    return float(r), float(slope), float(y.mean() - slope * x.mean())


# ---------------------------------------------------------------------------------------------------------------------
# How crowded an image is

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

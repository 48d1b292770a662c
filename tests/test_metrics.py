"""metrics.py: HD95 is medpy's, on made and on real masks; empty sides; intervals that hold what they promise."""
import sys

import medpy.metric.binary as medpy
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_erosion

from conftest import fails
from metrics import (METRICS, Journal, bootstrap_means, dice, hd95, iou, overlap_rate, print_table, score, score_labels,
                     score_table, summarise)
from readers.synapse import ORGANS


def random_shape(rng, dimensions):
    return tuple(int(n) for n in rng.integers(1, 14 if dimensions == 2 else 9, dimensions))


def random_mask(rng, shape):
    """Never empty: noise of any density, a box, a voxel, two far voxels, everything, or everything but a voxel."""
    kind = rng.integers(6)
    mask = np.zeros(shape, bool)
    somewhere = lambda: tuple(int(rng.integers(n)) for n in shape)
    if kind == 0:
        mask = rng.random(shape) < rng.random()
    elif kind == 1:
        mask[tuple(slice(a, a + int(rng.integers(1, n + 1))) for a, n in zip(somewhere(), shape))] = True
    elif kind == 2:
        mask[0] = mask[somewhere()] = True
    elif kind >= 4:
        mask[:] = True
        mask[somewhere()] = kind == 4
    mask[somewhere()] |= kind == 3 or not mask.any()
    return mask


def random_spacing(rng, dimensions):
    return (None, float(rng.uniform(0.2, 5)), list(rng.uniform(0.2, 5, dimensions)))[rng.integers(3)]


@pytest.mark.parametrize("dimensions,seed", [(d, s) for d in (1, 2, 3, 4) for s in range(3)])
def test_hd95_is_medpys_on_small_masks(dimensions, seed):
    """Some 3000 pairs, most of them touching the edge of the array, some identical, some disjoint."""
    rng = np.random.default_rng((dimensions, seed))
    for _ in range(40 if dimensions == 4 else 320):
        shape, spacing = random_shape(rng, dimensions), random_spacing(rng, dimensions)
        a, b = random_mask(rng, shape), random_mask(rng, shape)
        if rng.random() < 0.1:
            b = a.copy()
        truth = medpy.hd95(a, b, voxelspacing=spacing)
        assert hd95(a, b, spacing) == pytest.approx(truth, abs=1e-9, rel=1e-9)
        assert hd95(b, a, spacing) == pytest.approx(truth, abs=1e-9, rel=1e-9)
        assert dice(a, b) == pytest.approx(medpy.dc(a, b), abs=1e-12)
        assert iou(a, b) == pytest.approx(medpy.jc(a, b), abs=1e-12)


def ball(shape, centre, radius):
    return sum((g - c) ** 2 for g, c in zip(np.indices(shape), centre)) <= radius ** 2


@pytest.mark.parametrize("spacing", [None, (5, 1.2, 1.2), (0.5, 2, 1), (1, 1, 30), (1, 100, 100)])
def test_hd95_is_medpys_on_larger_masks(spacing):
    rng, shape = np.random.default_rng(0), (24, 60, 60)
    noise, speckle = rng.random(shape) < 0.5, rng.random(shape) < 0.03
    one, other = ball(shape, (12, 30, 30), 16), ball(shape, (9, 33, 28), 14)
    corner, far = ball(shape, (0, 0, 0), 20), ball(shape, (23, 59, 59), 20)
    pairs = [(one, other), (corner, far), (noise, far), (noise, ~noise), (speckle, one), (one ^ speckle, other),
             (noise & one, one), (np.ones(shape, bool), one), (one, one)]
    for a, b in pairs:
        assert hd95(a, b, spacing) == pytest.approx(medpy.hd95(a, b, voxelspacing=spacing), abs=1e-9, rel=1e-9)
    for a, b in ((noise[0], far[23]), (noise[1], noise[0]), (one[12], other[12])):  # an image
        flat = spacing and spacing[1:]
        assert hd95(a, b, flat) == pytest.approx(medpy.hd95(a, b, voxelspacing=flat), abs=1e-9, rel=1e-9)


def test_masks_in_any_memory_order():
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 8, 9, 10)) < 0.3
    truth = hd95(a, b)
    assert hd95(np.asfortranarray(a), b) == hd95(a[::-1], b[::-1]) == hd95(a.transpose(2, 0, 1), b.transpose(2, 0, 1)) \
        == truth


# ---------------------------------------------------------------------------------------------------------------------

def test_empty_sides():
    none, some = np.zeros((3, 4, 12), bool), np.zeros((3, 4, 12), bool)
    some[1, 2, 3:5] = True
    assert dice(none, none) is None and iou(none, none) is None and dice(none, some) == iou(some, none) == 0
    assert hd95(none, none) is None and hd95(none, some) is None
    numbers = lambda *pair, **spacing: tuple(score(*pair, **spacing)[m] for m in METRICS)
    assert METRICS == ("dice", "iou", "hd95", "dice_strict", "iou_strict", "hd95_strict")
    assert numbers(some, none) == (1, 1, 0, 0, 0, 13)  # 3, 4, 12: the diagonal is 13
    assert numbers(none, some) == (0, 0, 0, 0, 0, 13)
    assert numbers(none, none) == (0, 0, 0, None, None, None)
    assert numbers(some, some) == (1, 1, 0, 1, 1, 0)
    assert numbers(some, none, spacing=2) == (1, 1, 0, 0, 0, 26)
    assert numbers(none, some, spacing=(4, 3, 1 / 12))[5] == pytest.approx(np.sqrt(144 + 144 + 1))


@pytest.mark.parametrize("seed", range(6))
def test_a_label_map_is_scored_as_its_masks(seed):
    """With organs at the edge, missing on one side, on the other, on both, and ids beyond the classes."""
    rng = np.random.default_rng(seed)
    shape = (5, 20, 17) if seed % 2 else (30, 31)
    volumes = np.zeros((2, *shape), np.uint8)
    for volume in volumes:
        for i in rng.permutation(np.arange(1, 11))[:7]:
            low = [int(rng.integers(0, n)) for n in shape]
            volume[tuple(slice(a, a + int(rng.integers(1, n))) for a, n in zip(low, shape))] = i
    spacing = random_spacing(rng, len(shape))
    scores = score_labels(*volumes, ORGANS, spacing)
    assert list(scores) == list(ORGANS)
    for i, name in enumerate(ORGANS, 1):
        a, b = volumes == i
        assert scores[name] == score(a, b, spacing)
        if a.any() and b.any():
            assert scores[name]["hd95"] == pytest.approx(medpy.hd95(a, b, voxelspacing=spacing), abs=1e-9)
            assert scores[name]["dice"] == scores[name]["dice_strict"] == pytest.approx(medpy.dc(a, b), abs=1e-12)
            assert scores[name]["iou"] == scores[name]["iou_strict"] == pytest.approx(medpy.jc(a, b), abs=1e-12)


def test_bad_input_is_named_in_one_line():
    a, b = np.ones((4, 4, 4), bool), np.ones((4, 4, 5), bool)
    for call in (dice, iou, hd95, score, lambda p, t: score_labels(p, t, ORGANS)):
        fails(lambda: call(a, b), "prediction", "(4, 4, 4)", "truth", "(4, 4, 5)", "grid")
    for spacing in (0, -1, np.nan, np.inf, (1, 2), (1, 2, 0), (1, 2, 3, 4)):
        for call in (hd95, score, lambda p, t, s: score(p, ~t, s),
                     lambda p, t, s: score_labels(p.astype(np.uint8), t.astype(np.uint8), ORGANS, s)):
            fails(lambda: call(a, a, spacing), "spacing", spacing, "3 numbers", "mm")


# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real_case(real_data):
    """Label maps of eight organs [D,256,256] and the spacing along their axes."""
    sys.path.insert(0, str(real_data))
    from layout import EIGHT, case
    lut = np.zeros(14, np.uint8)
    lut[list(EIGHT)] = list(EIGHT.values())

    def read(name):
        _, label, spacing = case(name)
        return lut[label], tuple(spacing[::-1])
    return read


@pytest.mark.parametrize("name", ["0028", "0037"])
def test_real_organs(real_case, name):
    """Odd organs shifted, even ones eroded, one dropped; medpy on crops, once on the whole volume."""
    truth, spacing = real_case(name)
    prediction = np.zeros_like(truth)
    for i in range(1, 8):  # the pancreas is not found
        mask = truth == i
        prediction[np.roll(mask, (1, 3, -2), (0, 1, 2)) if i % 2 else binary_erosion(mask, iterations=2)] = i
    for step in (None, spacing):
        scores = score_labels(prediction, truth, ORGANS, step)
        diagonal = np.linalg.norm(np.multiply(truth.shape, step or 1))
        assert list(scores["pancreas"].values()) == [0, 0, 0, 0, 0, pytest.approx(diagonal)]
        for i, organ in enumerate(ORGANS[:7], 1):
            crop = tuple(slice(w.min(), w.max() + 1) for w in np.nonzero((prediction == i) | (truth == i)))
            a, b = prediction[crop] == i, truth[crop] == i
            assert scores[organ]["hd95"] == pytest.approx(medpy.hd95(a, b, voxelspacing=step), abs=1e-9)
            assert scores[organ]["dice"] == pytest.approx(medpy.dc(a, b), abs=1e-12)
    a, b = prediction == 4, truth == 4
    assert hd95(a, b, spacing) == pytest.approx(medpy.hd95(a, b, voxelspacing=spacing), abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------

def bootstrap(values, *how, **more):
    """The interval of one group, of which each case has one value."""
    values = np.array([v for v in values if v is not None], float)[:, None]
    return bootstrap_means(values, np.ones_like(values), *how, **more)[0]


def test_bootstrap_is_repeatable_and_skips_what_is_missing():
    values = np.random.default_rng(0).normal(size=30).tolist()
    low, high = bootstrap(values)
    assert low < np.mean(values) < high and (low, high) == bootstrap(values) == bootstrap(values + [None, None])
    assert bootstrap(values, seed=1) != (low, high)
    assert bootstrap([]) is None and bootstrap([None, 0.5]) is None and bootstrap([0.5, 0.5]) == (0.5, 0.5)
    narrow = bootstrap(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    many = np.random.default_rng(1).normal(size=5000)  # more draws than are made at a time
    low, high = bootstrap(many)
    assert high - low == pytest.approx(2 * 1.96 * many.std() / np.sqrt(5000), rel=0.1)
    assert (low + high) / 2 == pytest.approx(many.mean(), abs=0.003)


@pytest.mark.parametrize("draw,mean", [(lambda rng: rng.normal(3, 2, 40), 3), (lambda rng: rng.random(40), 0.5),
                                       (lambda rng: rng.beta(8, 2, 40), 0.8), (lambda rng: rng.random(40) < 0.7, 0.7)])
def test_bootstrap_covers(draw, mean):
    """Of 500 intervals 95 % should hold the truth: 469 to 481 expected, less some, as percentile intervals of 40
    values are a little short."""
    rng = np.random.default_rng(4)
    held = sum(low <= mean <= high for low, high in (bootstrap(draw(rng), seed, n=500) for seed in range(500)))
    assert 455 <= held <= 488


def test_groups_of_cases_are_resampled_together():
    """A group's interval is bootstrap()'s of its own cases; several values of a case stay together."""
    rng = np.random.default_rng(8)
    values = rng.random((12, 3))
    each = bootstrap_means(values, np.ones_like(values))
    assert each[0] == pytest.approx(bootstrap(values[:, 0])) and len(each) == 4
    assert each[3] == pytest.approx(bootstrap(values.mean(1)))  # all there: the groups' mean is that of each case
    counts = rng.integers(1, 4, (12, 3))
    assert bootstrap_means(values * counts, counts * 1.0)[0] != each[0]
    again = bootstrap_means(np.repeat(values[:, :1], 2, 1), np.ones((12, 2)))
    # the same values twice say no more than once
    assert again[0] == pytest.approx(again[1]) and again[0] == pytest.approx(again[2])
    sparse = np.zeros((12, 3))
    sparse[0, 1] = sparse[:, 2] = 1
    empty, single, full, mean = bootstrap_means(values * sparse, sparse)
    assert empty is None and single is None and mean is not None
    assert full == pytest.approx(bootstrap(values[:, 2]))
    assert bootstrap_means(np.ones((1, 2)), np.ones((1, 2))) == [None] * 3


# ---------------------------------------------------------------------------------------------------------------------

def boxes_of(shape, *boxes):
    masks = np.zeros((len(boxes), *shape), bool)
    for mask, (top, left, bottom, right) in zip(masks, boxes):
        mask[top:bottom, left:right] = True
    return masks


def test_overlap_rate_by_hand():
    masks = boxes_of((20, 20), (0, 0, 10, 10), (5, 0, 15, 10), (0, 5, 10, 15), (16, 16, 20, 20))
    # half of the first from below, half from the right, a quarter by both
    assert overlap_rate(masks).tolist() == [0.75, 0.5, 0.5, 0]
    assert overlap_rate(masks, ["a", "a", "b", "b"]).tolist() == [0.5, 0.25, 0.5, 0]
    assert overlap_rate(masks, ["a"] * 4).tolist() == [0, 0, 0, 0]
    ring = boxes_of((9, 9), (0, 0, 9, 9), (3, 3, 6, 6))  # one inside the other's hole shares no pixel with it
    ring[0, 1:8, 1:8] = False
    assert overlap_rate(ring).tolist() == [1 / 9, 1]
    assert overlap_rate(np.zeros((0, 4, 4), bool)).tolist() == []
    assert overlap_rate(np.concatenate((masks[:1], masks[:1] & False))).tolist() == [0, 0]


def test_overlap_rate_of_random_masks():
    rng = np.random.default_rng(7)
    for _ in range(100):
        masks = rng.random((int(rng.integers(1, 7)), 12, 15)) < rng.choice([0.0, 0.02, 0.1])
        names = [str(n) for n in rng.integers(0, 3, len(masks))]
        for groups, rates in ((range(len(masks)), overlap_rate(masks)), (names, overlap_rate(masks, names))):
            full = np.zeros_like(masks)
            for box, mask in zip(full, masks):
                if mask.any():
                    low, high = np.argwhere(mask).min(0), np.argwhere(mask).max(0)
                    box[low[0]:high[0] + 1, low[1]:high[1] + 1] = True
            for t, rate in enumerate(rates):
                others = [full[k] for k in range(len(masks)) if groups[k] != groups[t]]
                covered = np.any(others, 0) & full[t] if others else full[t] & False
                assert rate == pytest.approx(covered.sum() / max(1, full[t].sum()))


# ---------------------------------------------------------------------------------------------------------------------
# An evaluation

def random_volume(rng, shape=(6, 40, 36)):
    """A label map of a few boxes."""
    label = np.zeros(shape, np.uint8)
    for i in rng.permutation(np.arange(1, 9))[:6]:
        low = [int(rng.integers(0, n - 3)) for n in shape]
        label[tuple(slice(a, a + int(rng.integers(2, max(3, n // 2)))) for a, n in zip(low, shape))] = i
    return label


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_medpys(seed):
    """Uncropped, on volumes with organs at the border, missing on one side, on the other, on both."""
    rng = np.random.default_rng(seed)
    truth, prediction = random_volume(rng), random_volume(rng)
    half = truth == prediction[:, ::-1]
    prediction[half] = truth[half]
    scores = score_labels(prediction, truth, ORGANS)
    for i, name in enumerate(ORGANS, 1):
        a, b, s = prediction == i, truth == i, scores[name]
        if a.any() and b.any():
            assert s["dice"] == s["dice_strict"] == pytest.approx(medpy.dc(a, b), abs=1e-12)
            assert s["hd95"] == s["hd95_strict"] == pytest.approx(medpy.hd95(a, b), abs=1e-9)
        elif a.any():
            assert (s["dice"], s["hd95"]) == (1, 0) and s["dice_strict"] == 0  # TransUNet's rule
        elif b.any():
            assert (s["dice"], s["hd95"]) == (0, 0) and s["hd95_strict"] == pytest.approx(np.linalg.norm(truth.shape))
        else:
            assert (s["dice"], s["hd95"]) == (0, 0) and s["dice_strict"] is None


def row_of(image, case, target, modality="ct", **numbers):
    return dict(image=image, volume=False, case=case, target=target, modality=modality, **numbers)


def scores_of(cases):
    """{case: {class: score()}} -> score_table"""
    return score_table([row_of(i, case, name, **numbers) for i, (case, classes) in enumerate(cases.items())
                        for name, numbers in classes.items()])


def test_table_is_the_mean_over_cases_then_organs():
    full = np.repeat(np.arange(9, dtype=np.uint8), 4).reshape(1, 9, 4)
    none = np.zeros_like(full)
    cases = {"a": score_labels(full, full, ORGANS), "b": score_labels(none, full, ORGANS)}
    tabulate = lambda: summarise(scores_of(cases), "target")
    table = tabulate()
    assert table["liver"]["dice"] == 0.5 and table["mean"]["dice_strict"] == 0.5 and table["liver"]["cases"] == 2
    low, high = table["liver"]["ci_strict"]
    assert low == 0 and high == 1 and table["mean"]["ci_strict"] == (low, high)
    cases["c"] = score_labels(none, none, ORGANS)  # strict: says nothing
    table = tabulate()
    assert table["mean"]["dice"] == pytest.approx(1 / 3) and table["mean"]["dice_strict"] == 0.5
    assert table["mean"]["cases"] == 3 and "hd95_mm" not in table["mean"]


def test_an_empty_table():
    table = summarise(score_table([]), "target")
    assert table["mean"]["dice_strict"] is None and table["mean"]["cases"] == 0
    print_table(table, "nothing")


def test_means_of_groups_equal_plain_loops():
    """Modalities over targets, several per image and case, some without a value: against a loop in float64."""
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        for _ in range(rng.integers(1, 4)):
            value = None if rng.random() < 0.2 else float(rng.random())
            rows.append(row_of(i, f"case{i // 3}", "x", ("ct", "mr", "pet")[rng.integers(3)], dice_strict=value))
    table = summarise(score_table(rows), "modality")
    means = []
    for m in dict.fromkeys(row["modality"] for row in rows):
        values = [row["dice_strict"] for row in rows if row["modality"] == m and row["dice_strict"] is not None]
        means.append(sum(values) / len(values))
        assert table[m]["dice_strict"] == pytest.approx(means[-1], abs=1e-12)
        low, high = table[m]["ci_strict"]
        assert low < means[-1] < high
    assert table["mean"]["dice_strict"] == pytest.approx(sum(means) / 3, abs=1e-12)


def test_rows_of_several_processes_are_gathered_in_order():
    rng = np.random.default_rng(0)
    rows = [row_of(i, f"case{i}", target, dice=float(rng.random())) for i in range(30) for target in ("a", "b")]
    mixed = [row for part in (2, 0, 1) for row in rows if row["image"] % 3 == part]
    pd.testing.assert_frame_equal(score_table(mixed), score_table(rows))
    assert score_table(mixed)["dice"].tolist() == [row["dice"] for row in rows]


def test_partial_files_of_any_name(tmp_path):
    """Brackets in the name; a line of nothing but zeros, as a machine that went down leaves it; a full disk."""
    for name in ("e[1].json", "*.json"):
        journal = Journal(tmp_path / name, settings="{}")
        journal.begin()
        journal.add(3, [dict(dice=1.0)])
        journal.file.close()
        part, = journal.parts()
        part.write_text(part.read_text() + "\0\0\n3\n{}\n" + f'["{journal.key}", [], []]\n')
        again = Journal(tmp_path / name, settings="{}")
        assert again.cases == {3: [dict(dice=1.0)]} and Journal(tmp_path / name, 1, "{}").cases == {3: []}
        again.file = open("/dev/full", "w")
        fails(lambda: again.add(4, []), name.strip("*"), "No space left")
        again.file = part.open()
        again.remove()
        assert not part.exists()

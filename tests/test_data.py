"""data.py: samples on the model's grid, variations, prompts, batches; every sample once, the same draws whoever draws
them, prompts where they belong."""
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from common import ATTRIBUTES
from conftest import ROOT, fails
from data import (CLICKS, Batches, add_prompts, box_prompt, correction_points, draw_jitter, draw_pairs, make_batch,
                  make_sample, move, open_dataset, point_prompt, prompt_rng, to_original)
from encoders import FeatureCache
from readers.pictures import RawSample
from readers.synapse import ORGANS
from texts import Texts

KNOWN = Texts("synapse")
SAMPLES = [open_dataset("demo", image_size=64)[i] for i in range(4)]


# --- samples


def test_to_original():
    rng = np.random.default_rng(0)
    for _ in range(10):
        t, h, w = rng.integers(1, 9), *rng.integers(8, 90, 2)
        flat = to_original(torch.full((int(t), 32, 32), 0.5), (h, w))
        assert flat.shape == (t, h, w) and torch.allclose(flat, torch.tensor(0.5))
    x = torch.randn(2, 24, 24)
    assert torch.allclose(to_original(x, (24, 24)), x, atol=1e-6)
    assert to_original(x[:0], (5, 7)).shape == (0, 5, 7)
    half = torch.zeros(1, 32, 32)
    half[..., 16:] = 1  # the right half stays the right half
    assert (to_original(half, (40, 80))[0] > 0.5).sum(1).eq(40).all()


# --- prompts


def random_mask(rng):
    """A filled rectangle with some pixels knocked out, on a grid whose sides differ."""
    h, w = rng.integers(1, 60, 2)
    mask = np.zeros((h, w), bool)
    y, x = sorted(rng.integers(0, h, 2)), sorted(rng.integers(0, w, 2))
    mask[y[0]:y[1] + 1, x[0]:x[1] + 1] = True
    mask &= rng.random((h, w)) < 0.9
    mask[y[0], x[0]] = True
    return mask


def test_boxes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = random_mask(rng)
        ys, xs = np.nonzero(mask)
        box = box_prompt(mask)
        assert box.dtype == np.float32 and box.tolist() == [xs.min(), ys.min(), xs.max(), ys.max()]
        noisy = box_prompt(mask, rng)
        most = min(5, (box[2:] - box[:2]).min() / 2)
        assert abs(noisy - box).max() <= most and np.array_equal(noisy, np.round(noisy))
        assert 0 <= noisy[0] <= noisy[2] < mask.shape[1] and 0 <= noisy[1] <= noisy[3] < mask.shape[0]
    mask = np.zeros((100, 100), bool)
    mask[40:60, 30:70] = True
    shifts = np.array([box_prompt(mask, rng) - box_prompt(mask) for _ in range(400)])
    assert set(np.unique(shifts)) == set(range(-5, 6)) and abs(shifts.mean()) < 0.5
    with pytest.raises(ValueError):
        box_prompt(np.zeros((5, 5), bool))


def test_points():
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask, n = random_mask(rng), int(rng.integers(1, 12))
        points, labels = point_prompt(mask, n, rng)
        assert points.shape == (n, 2) and points.dtype == np.float32
        assert labels.dtype == np.int64 and labels.tolist() == [1] * n
        assert all(mask[int(y), int(x)] for x, y in points)
        if mask.sum() >= n:
            assert len({tuple(p) for p in points}) == n
    mask = np.zeros((10, 40), bool)
    mask[2, 33] = True
    assert point_prompt(mask, 3, rng)[0].tolist() == [[33, 2]] * 3  # (x, y), and repeated where it must
    with pytest.raises(ValueError):
        point_prompt(np.zeros((5, 5), bool), 1, rng)


def test_prompt_rng():
    draw = lambda *parts: prompt_rng(*parts).integers(2 ** 60)
    assert draw("case0005_slice012", "liver", 0) == draw("case0005_slice012", "liver", 0)
    keys = [(k, t, s) for k in ("a_slice000", "a_slice001") for t in ORGANS for s in range(3)]
    assert len({draw(*k) for k in keys}) == len(keys)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; " \
           "print(data.prompt_rng('a', 'liver', 1).integers(2 ** 60))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(other.stdout) == draw("a", "liver", 1)  # another process, another hash seed


# --- texts

# --- batches


def batch_of(samples, prompt, rng, max_targets=4, absent=0.25, points=1, noise=True):
    return add_prompts(make_batch(samples, KNOWN, rng, max_targets, absent), prompt, rng, points, noise)


@pytest.mark.parametrize("prompt", ["none", "point", "box"])
def test_batches(prompt):
    for seed in range(25):
        rng = np.random.default_rng(seed)
        samples = [SAMPLES[i] for i in rng.permutation(4)[:rng.integers(1, 5)]]
        n, most = int(rng.integers(1, 4)), int(rng.integers(1, 9))
        batch = batch_of(samples, prompt, rng, max_targets=most, points=n)
        m = len(batch.targets)
        assert batch.images.shape == (len(samples), 3, 64, 64) and batch.images.dtype == torch.uint8
        assert batch.index.dtype == torch.int64 and batch.masks.dtype == torch.bool
        assert batch.index.shape == (m,) and batch.masks.shape == (m, 64, 64) and len(batch.texts) == m
        assert torch.bincount(batch.index, minlength=len(samples)).max() <= most
        assert len(set(zip(batch.index.tolist(), batch.targets))) == m  # without replacement
        assert batch.points is None or batch.boxes is None
        assert prompt == ("box" if batch.boxes is not None else "point" if batch.points else "none")
        for b, sample in enumerate(samples):
            assert np.array_equal(batch.images[b].permute(1, 2, 0).numpy(), sample.image)
        for i, (b, target, texts) in enumerate(zip(batch.index.tolist(), batch.targets, batch.texts)):
            sample = samples[b]
            mask = sample.masks[sample.targets.index(target)] if target in sample.targets else np.zeros((64, 64), bool)
            assert np.array_equal(batch.masks[i].numpy(), mask)
            assert all(texts[kind] in KNOWN.wordings(target, "ct", kind) for kind in ATTRIBUTES)
            if batch.boxes is not None:
                assert abs(batch.boxes[i].numpy() - box_prompt(mask)).max() <= 5
            if batch.points:
                assert all(mask[int(y), int(x)] for x, y in batch.points[0][i])
        if batch.boxes is not None:
            assert batch.boxes.shape == (m, 4) and batch.boxes.dtype == torch.float32
        if batch.points:
            assert batch.points[0].shape == (m, n, 2) and batch.points[1].shape == (m, n)
            assert batch.points[1].dtype == torch.int64 and batch.points[1].eq(1).all()


def test_absent_targets():
    sample = next(s for s in SAMPLES if s.absent)
    rng = np.random.default_rng(0)
    for absent in (0.0, 0.25, 1.0):
        batches = [batch_of([sample] * 4, "none", rng, max_targets=1, absent=absent) for _ in range(80)]
        empty = np.mean([not m.any() for b in batches for m in b.masks])
        assert abs(empty - absent) < 0.08
    assert batch_of([sample], "box", rng, absent=1.0).masks.any((1, 2)).all()
    exact = batch_of([sample], "box", rng, noise=False)
    assert all(np.array_equal(b, box_prompt(m)) for b, m in zip(exact.boxes.numpy(), exact.masks.numpy()))


def test_nonsense_has_an_empty_mask():
    rng = np.random.default_rng(0)
    known = {text for pair in SAMPLES[0].targets for kind in ATTRIBUTES for text in KNOWN.wordings(pair, "ct", kind)}
    for share in (0.0, 0.3, 1.0):
        batch = make_batch(SAMPLES * 40, KNOWN, rng, 2, 0.0, share)
        assert abs(batch.targets.count("") / len(batch.targets) - share) < 0.08
        for target, mask, texts in zip(batch.targets, batch.masks, batch.texts):
            assert mask.any() == bool(target) and set(texts) == set(ATTRIBUTES)
            assert target or not known & set(texts.values())
    slices = open_dataset("demo", image_size=64, limit=4)
    draw = lambda prompt: of(slices, prompt=prompt, nonsense=1.0, absent=0.0)[0][0]
    assert set(draw("none").targets) == {""} and "" not in draw("point").targets  # there a user points at something


def test_empty_batch():
    nothing = make_sample(RawSample(np.zeros((32, 32)), np.zeros((0, 32, 32), bool), (), ORGANS, "ct"), 32, "a", "a")
    rng = np.random.default_rng(0)
    box = batch_of([nothing], "box", rng)
    point = batch_of([nothing], "point", rng, points=3)
    assert box.masks.shape == (0, 32, 32) and box.boxes.shape == (0, 4) and box.index.shape == (0,)
    assert point.points[0].shape == (0, 3, 2) and point.points[1].shape == (0, 3) and point.targets == []
    fails(lambda: batch_of([nothing], "scribble", rng), "--prompt scribble")


# ---------------------------------------------------------------------------------------------------------------------
# The order of the samples, the draws of a step

ARGS = dict(seed=1, batch_size=2, accumulate=1, jitter=0.1, prompt="none", points=1, rounds=1, targets=4,
            absent=0.25, nonsense=0.0, align=True, dense_loss=1.0, contrastive_loss=0.5)


class Numbers(list):
    """Stands for a data set of n samples."""
    classes = ()

    def __init__(self, n):
        super().__init__(range(n))


def of(dataset, rank=0, world=1, first=0, last=100, **args):
    args = Namespace(**{**ARGS, **args})
    return Batches(dataset, Texts("demo"), FeatureCache(None, ""), args, rank, world, first, last)


@pytest.mark.parametrize("n,batch,accumulate,world", [(10, 3, 1, 1), (10, 3, 1, 2), (7, 2, 2, 4), (12, 4, 3, 3),
                                                      (5, 8, 1, 2), (100, 1, 1, 8)])
def test_an_epoch_visits_every_sample_once(n, batch, accumulate, world, monkeypatch):
    """All ranks together, whatever does not divide evenly, and in another order each time."""
    monkeypatch.setattr(Batches, "draw", lambda self, step, place, number, prompt: number)
    monkeypatch.setattr(Batches, "join", lambda self, samples, step, pairs: samples)
    ranks = [of(Numbers(n), rank, world, batch_size=batch, accumulate=accumulate) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        steps = [[r[epoch * r.per_epoch + i] for r in ranks] for i in range(ranks[0].per_epoch)]
        assert all(len(micro) == accumulate and max(map(len, micro)) <= batch for step in steps for micro in step)
        seen = [x for step in steps for micro in step for rows in micro for x in rows]
        assert sorted(seen) == list(range(n))
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_several_data_sets_are_drawn_from_equally_often(tmp_path):
    """Also where one is much smaller; each image is what it is in its own data set."""
    sets = [open_dataset("demo", image_size=64, limit=n, seed=n) for n in (7, 3)]
    joined = data.Joined(sets)
    assert len(joined) == 14 and joined.classes == sets[0].classes and joined.pairs == sets[0].pairs
    assert [joined.of(n) for n in range(5)] == [(sets[n % 2], n // 2) for n in range(5)]
    assert joined.of(13) == (sets[1], 0) and not joined.volumes and len(joined.sources) == 2
    for n in (0, 5, 13):
        dataset, i = joined.of(n)
        assert np.array_equal(joined[n].image, dataset[i].image) and dataset.key(i) in joined.key(n)
    fails(lambda: data.open_datasets("demo,demo"), "--dataset", "demo is named twice")
    fails(lambda: data.open_datasets("demo,kvasir", "here"), "--data", "1 folders for 2 data sets")
    fails(lambda: data.open_datasets("demo,unheard"), "unheard")
    assert isinstance(data.open_datasets("demo"), data.Dataset)
    with pytest.raises(IndexError):
        joined[14]
    batches = of(joined, batch_size=14)  # in three epochs each of the smaller one's comes equally often
    seen = [joined.of(n) for epoch in range(3) for n in batches.rows(epoch)]
    assert sorted(map(seen.count, set(seen))) == [3] * 7 + [7] * 3


def flat(batches):
    """One line per target of what was drawn, without the order."""
    return sorted((b.targets[m], *b.texts[m].values(), b.masks[m].sum().item(),
                   () if b.points is None else b.points[0][m].tolist(), () if b.boxes is None else b.boxes[m].tolist(),
                   b.theta[b.index[m]].tolist(), () if b.clicks is None else b.clicks[m].sum().item())
                  for b in batches for m in range(len(b.targets)))


def flat_structures(batches):
    """One line per image and structure of it: is it known, how much of it is there, in which words."""
    return sorted((*b.structures[k], *b.dense_texts[k].values(), b.dense_masks[i, k].sum().item(), *b.theta[i].flatten())
                  for b in batches for i, k in b.known.nonzero().tolist())


@pytest.mark.parametrize("prompt", ["none", "point", "box", "mixed"])
def test_draws_do_not_depend_on_who_draws(prompt):
    """One process, three, accumulated, resumed: the same targets, wordings, prompts and movements."""
    dataset = open_dataset("demo", image_size=64, limit=9)
    whole = of(dataset, batch_size=6, prompt=prompt, rounds=3, points=3)
    parts = [of(dataset, rank, 3, batch_size=1, accumulate=2, prompt=prompt, rounds=3, points=3) for rank in range(3)]
    resumed = of(dataset, first=3, batch_size=6, prompt=prompt, rounds=3, points=3)
    for step in range(4):
        one = flat(whole[step])
        assert one and one == flat([b for rank in parts for b in rank[step]])
        shares = [b for rank in parts for b in rank[step]]
        assert flat_structures(whole[step]) == flat_structures(shares)
        for first, *others in (rank[step] for rank in parts):  # the pairs of texts are one part's of a step
            assert first.contrast == whole[step][0].contrast and len(first.contrast) == 32
            assert not any(b.contrast for b in others)
        assert whole.clicks_of(step, 2) == parts[2].clicks_of(step, 2)
    assert flat(whole[3]) == flat(resumed[0])


def test_pairs_of_texts():
    """Two of each structure, in wordings to train with; the data set's own structures first."""
    names = [f"class {n}" for n in range(10)]
    concepts = {name: lambda rng, name=name: (name, int(rng.integers(1000))) for name in names}
    for own, expected in ((names[:6], 6), (names[:2], 2), (names, 8), ((), 0)):
        pairs = draw_pairs(concepts, own, np.random.default_rng(0), most=8)
        assert len(pairs) == 16 and all(a == b for (a, _), (b, _) in zip(pairs[::2], pairs[1::2]))
        drawn = [name for name, _ in pairs[::2]]
        assert len(set(drawn)) == 8 and sum(name in own for name in drawn) == expected
    assert len(draw_pairs(dict(a=concepts["class 1"]), ("a",), np.random.default_rng(0))) == 2
    texts = Texts("synapse").concepts()["liver"](np.random.default_rng(0))
    assert set(texts) == {"position", "texture", "shape"}


def test_a_process_without_a_share_has_an_empty_batch():
    dataset = open_dataset("demo", image_size=64, limit=1)
    empty, = of(dataset, rank=1, world=2, prompt="box")[0]
    assert len(empty.masks) == len(empty.images) == 0 and empty.texts == []


def test_rounds_of_clicks():
    """1, 3, 5 or 9 points, and none in the last round and in one before it."""
    some = of(Numbers(9), rounds=9)
    for step in range(50):
        clicks = [some.clicks_of(step, n) for n in range(1, 9)]
        assert clicks[-1] == 0 and clicks.count(0) == 2 and set(clicks) <= {0, *CLICKS}
    assert of(Numbers(9), rounds=2).clicks_of(0, 1) in CLICKS


@pytest.mark.parametrize("seed", range(20))
def test_correction_points(seed):
    """A click lands on an error, positive where something was missed; with nothing wrong, on the mask."""
    torch.manual_seed(seed)
    H, W = (int(n) for n in torch.randint(3, 30, (2,)))
    masks = torch.rand(6, H, W) < torch.tensor([0, 0.01, 0.3, 0.7, 1.0, 0.2])[:, None, None]
    prediction = masks ^ (torch.rand(6, H, W) < torch.tensor([0, 0.02, 0.5, 0, 0.01, 1.0])[:, None, None])
    draws = torch.rand(6, 5)
    draws[:, 0], draws[:, 1] = 0.0, 1.0 - 2 ** -24
    points, labels = correction_points(prediction, masks, draws)
    assert points.shape == (6, 5, 2) and points.dtype == torch.float32 and labels.dtype == torch.int64
    for m in range(6):
        wrong = prediction[m] ^ masks[m]
        for (x, y), label in zip(points[m].long(), labels[m]):
            if not wrong.any() and not masks[m].any():
                assert label == -1  # SAM's padding
            else:
                assert label == masks[m, y, x] and (wrong[y, x] if wrong.any() else label == 1)


def test_correction_points_are_uniform():
    masks, prediction = torch.zeros(1, 5, 7, dtype=torch.bool), torch.zeros(1, 5, 7, dtype=torch.bool)
    masks[0, 2, 1:5] = True
    points, labels = correction_points(prediction, masks, torch.arange(0, 1, 0.001)[None])
    assert torch.unique(points[0], dim=0, return_counts=True)[1].tolist() == [250] * 4 and labels.min() == 1


@pytest.mark.parametrize("seed", range(5))
def test_jitter_moves_features_and_masks_alike(seed):
    """Where the features are the image of the masks they still are after it."""
    x, y = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy")
    masks = torch.stack([((x - a) / 16) ** 2 + ((y - b) / 11) ** 2 < 1 for a, b in ((25, 30), (38, 33), (30, 40))])
    rng = np.random.default_rng(seed)
    theta = torch.stack([draw_jitter(rng, 0.1) for _ in range(3)])
    features = move(F.avg_pool2d(masks[:, None].float(), 2), theta)
    moved = move(masks[:, None].float(), theta, "nearest")[:, 0] > 0.5
    for m in range(3):
        from_features = F.interpolate(features[m][None], (64, 64), mode="bilinear")[0, 0] > 0.5
        assert 2 * (from_features & moved[m]).sum() / (from_features.sum() + moved[m].sum()) > 0.95
        assert not torch.equal(moved[m], masks[m])
    still = torch.stack([draw_jitter(rng, 0.0)] * 3)
    assert torch.equal(move(masks[:, None].float(), still, "nearest")[:, 0] > 0.5, masks)
    assert not len(move(torch.zeros(0, 4, 8, 8), torch.zeros(0, 2, 3)))

"""What a training step sees: every sample once, the same draws whoever draws them, prompts where they belong."""
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import batches
from batches import Batches, correction_points, draw_jitter, move
from cache import FeatureCache
from data import Texts, open_dataset

ARGS = dict(seed=1, views=0, batch_size=2, accumulate=1, jitter=0.1, prompt="none", points=1, rounds=1, targets=4,
            absent=0.25)


class Numbers(list):
    """Stands for a data set of n samples."""

    def __init__(self, n):
        super().__init__(range(n))


def of(dataset, rank=0, world=1, first=0, last=100, **args):
    args = Namespace(**{**ARGS, **args})
    return Batches(dataset, Texts("demo"), FeatureCache(None, ""), args, rank, world, first, last)


@pytest.mark.parametrize("n,batch,accumulate,world", [(10, 3, 1, 1), (10, 3, 1, 2), (7, 2, 2, 4), (12, 4, 3, 3),
                                                      (5, 8, 1, 2), (100, 1, 1, 8)])
def test_an_epoch_visits_every_sample_once(n, batch, accumulate, world, monkeypatch):
    """All ranks together, whatever does not divide evenly, and in another order each time."""
    monkeypatch.setattr(Batches, "draw", lambda self, step, place, number, view, prompt: number)
    monkeypatch.setattr(Batches, "join", lambda self, samples: samples)
    ranks = [of(Numbers(n), rank, world, batch_size=batch, accumulate=accumulate) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        steps = [[r[epoch * r.per_epoch + i] for r in ranks] for i in range(ranks[0].per_epoch)]
        assert all(len(micro) == accumulate and max(map(len, micro)) <= batch for step in steps for micro in step)
        seen = [x for step in steps for micro in step for rows in micro for x in rows]
        assert sorted(seen) == list(range(n))
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_views_take_turns():
    """With two views an image comes as it is and in each of its variations within three epochs."""
    some = of(Numbers(6), batch_size=3, views=2)
    seen = [pair for step in range(6) for pair in some.rows(step)]
    assert sorted(seen) == [(i, view) for i in range(6) for view in range(3)]
    assert {view for _, view in seen[:6]} == {0, 1, 2}  # not all of them the same in one epoch


def flat(batches):
    """One line per target of what was drawn, without the order."""
    return sorted((b.targets[m], *b.texts[m].values(), b.masks[m].sum().item(),
                   () if b.points is None else b.points[0][m].tolist(), () if b.boxes is None else b.boxes[m].tolist(),
                   b.theta[b.index[m]].tolist(), () if b.clicks is None else b.clicks[m].sum().item())
                  for b in batches for m in range(len(b.targets)))


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
        assert whole.clicks_of(step, 2) == parts[2].clicks_of(step, 2)
    assert flat(whole[3]) == flat(resumed[0])


def test_a_process_without_a_share_has_an_empty_batch():
    dataset = open_dataset("demo", image_size=64, limit=1)
    empty, = of(dataset, rank=1, world=2, prompt="box")[0]
    assert len(empty.masks) == len(empty.images) == 0 and empty.texts == []


def test_rounds_of_clicks():
    """1, 3, 5 or 9 points, and none in the last round and in one before it."""
    some = of(Numbers(9), rounds=9)
    for step in range(50):
        clicks = [some.clicks_of(step, n) for n in range(1, 9)]
        assert clicks[-1] == 0 and clicks.count(0) == 2 and set(clicks) <= {0, *batches.CLICKS}
    assert of(Numbers(9), rounds=2).clicks_of(0, 1) in batches.CLICKS


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

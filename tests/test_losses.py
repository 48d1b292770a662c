"""The losses: against formulas written out, what they may depend on, and that shares of a batch add up to the whole."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses import contrastive_loss, dense_loss


def random_case(rng, B=3, K=4, G=12):
    """Logits, masks that partly overlap, and which structures are known, at random."""
    logits = torch.from_numpy(rng.standard_normal((B, K, G // 2, G // 2))).requires_grad_()
    masks = torch.from_numpy(rng.random((B, K, G, G)) < 0.2)
    known = torch.from_numpy(rng.random((B, K)) < 0.8)
    known[0] = True
    return logits, masks & known[..., None, None], known


def written_out(logits, masks, known):
    """dense_loss pixel by pixel, in NumPy."""
    total = 0.0
    up = F.interpolate(logits.detach().float(), masks.shape[-2:], mode="bilinear").double().numpy()
    for x, m, k in zip(up, masks.numpy(), known.numpy()):
        p = 1 / (1 + np.exp(-x))
        binary = -np.where(m, np.log(p), np.log(1 - p)).mean((1, 2))
        rivals = np.concatenate([np.zeros_like(x[:1]), np.where(k[:, None, None], x, -np.inf)])
        soft = np.exp(rivals) / np.exp(rivals).sum(0)
        label = np.where(m.any(0), m.argmax(0) + 1, 0)
        entropy = -np.log(np.take_along_axis(soft, label[None], 0)[0])
        entropy = np.where(m.sum(0) > 1, 0, entropy).mean()
        dice = lambda q: 1 - (2 * (q * m).sum((1, 2)) + 1) / (q.sum((1, 2)) + m.sum((1, 2)) + 1)
        there = k & m.any((1, 2))
        mean = lambda v, which: v[which].mean() if which.any() else 0.0
        total += entropy + 2 * mean(binary, k) + (mean(dice(p), there) + mean(dice(soft[1:]), there)) / 2
    return total / len(masks)


@pytest.mark.parametrize("seed", range(5))
def test_the_dense_loss_is_its_formula(seed):
    logits, masks, known = random_case(np.random.default_rng(seed))
    assert dense_loss(logits, masks, known).item() == pytest.approx(written_out(logits, masks, known), rel=1e-4)


def test_what_is_not_known_of_an_image_is_not_learnt_from():
    logits, masks, known = random_case(np.random.default_rng(0))
    known[1, 1], known[1, 2] = True, False
    masks[1, 2] = False
    dense_loss(logits, masks, known).backward()
    assert not logits.grad[1, 2].any() and logits.grad[1, 1].any()


def test_shares_of_the_images_add_up():
    logits, masks, known = random_case(np.random.default_rng(1), B=5)
    parts = [dense_loss(logits[s], masks[s], known[s], count=5) for s in (slice(0, 2), slice(2, 5), slice(5, 5))]
    assert sum(parts).item() == pytest.approx(dense_loss(logits, masks, known).item(), rel=1e-6)


def test_a_right_answer_costs_little_and_a_wrong_one_much():
    masks = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    masks[0, 0, 2:8], masks[0, 1, 9:14] = True, True
    right = torch.where(masks, 20.0, -20.0)
    known = torch.ones(1, 2, dtype=torch.bool)
    assert dense_loss(right, masks, known) < 0.01 < 5 < dense_loss(-right, masks, known)


def test_the_contrastive_loss_is_its_formula():
    T = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0))
    z = F.layer_norm(T, (32,)).view(12, 32).double().numpy()
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    losses = []
    for i in range(12):
        others = [j for j in range(12) if j != i]
        s = np.exp(z[others] @ z[i] / 0.1)
        losses.append(-np.log(s[others.index(i ^ 1)] / s.sum()))
    assert contrastive_loss(T).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_contrastive_loss_parts_structures_that_had_grown_together():
    torch.manual_seed(0)
    T = (torch.randn(1, 1, 16) + 0.1 * torch.randn(8, 2, 16)).requires_grad_()
    optimizer = torch.optim.Adam([T], 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        contrastive_loss(T).backward()
        optimizer.step()
    z = F.normalize(F.layer_norm(T.detach(), (16,)), dim=2)
    between = z[:, 0] @ z[:, 0].T
    assert (between - torch.eye(8)).max() < 0.5 < 0.9 < (z[:, 0] * z[:, 1]).sum(1).min()

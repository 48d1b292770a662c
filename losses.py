"""What is learnt from: the paper names no loss, so these are chosen by measurement (docs/results.md).

    segmentation_loss   a mask and its predicted IoU, per target: SAM-Med2D's
    dense_loss          all structures of an image at once, for the map of beyond.DenseAlignment
    contrastive_loss    text alone: the wordings of a structure belong together, apart from all others'
    Objective           the model and all of these in one forward
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from data import correction_points

PARTS = ("focal", "dice", "iou", "dense", "contrast")  # of the loss, as the log names them


def segmentation_loss(logits, iou, masks, count=None, weights=(20.0, 1.0, 1.0)):
    """SAM-Med2D's loss, 20 focal + Dice + MSE of the predicted IoU, each taken per target and then averaged.

    logits float [M,h,w], iou [M], masks bool [M,S,S] -> the loss and its three parts [3]. `count` takes M's place where
    these are not all of a step's targets. An absent structure has an empty mask: its Dice term falls as the predicted
    area does, its IoU is 1 if nothing is predicted, else 0.
    """
    count = max(1, len(masks) if count is None else count)
    if not len(logits):  # no gradient, rather than the mean of nothing
        zero = 0.0 * (logits.sum() + iou.sum())
        return zero, torch.zeros(3, device=logits.device)
    truth = masks.float()
    logits = F.interpolate(logits.float()[:, None], masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    p, focal = logits.sigmoid(), sigmoid_focal_loss(logits, truth, alpha=0.25, gamma=2).mean((1, 2))
    dice = 1 - (2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)
    with torch.no_grad():
        predicted = logits > 0
        union = (predicted | masks).sum((1, 2))
        true_iou = torch.where(union > 0, (predicted & masks).sum((1, 2)) / union.clamp(min=1), 1.0)
    parts = torch.stack([focal, dice, (iou.float() - true_iou) ** 2], 1).sum(0) / count
    return (parts * parts.new_tensor(weights)).sum(), parts.detach()


def dense_loss(logits, masks, known, count=None):
    """All structures of an image at once: does each pixel agree with the texts of what lies there, and with no others?

    logits float [B,K,h,w] of DenseAlignment; masks bool [B,K,G,G]; known bool [B,K]: of which structures it is known
    whether they are there -> the loss, averaged over the images (`count` in place of B, as above). Each structure by
    itself (binary cross-entropy and Dice), and all that are known in competition, as in a label map (cross-entropy and
    Dice of their softmax beside a background of logit 0); pixels on which several lie are left out of that.
    """
    if not masks.numel():
        return 0.0 * logits.sum()
    G = masks.shape[-2:]
    logits = F.interpolate(logits.float(), G, mode="bilinear", align_corners=False)
    truth, there = masks.float(), known & masks.any((2, 3))
    among = lambda x, which: (x * which).sum(1) / which.sum(1).clamp(min=1)  # [B,K] -> [B], the mean of some
    dice = lambda p: 1 - (2 * (p * truth).sum((2, 3)) + 1) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1)
    binary = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
    rivals = F.pad(logits.masked_fill(~known[..., None, None], -1e4), (0, 0, 0, 0, 1, 0))  # the background first
    label = torch.where(truth.sum(1) > 1, -100, (masks.byte().argmax(1) + 1) * masks.any(1))
    rival = F.cross_entropy(rivals, label.long(), reduction="none").mean((1, 2))
    loss = (rival + 2 * among(binary, known) + 0.5 * among(dice(logits.sigmoid()), there)
            + 0.5 * among(dice(rivals.softmax(1)[:, 1:]), there))
    return loss.sum() / max(1, len(masks) if count is None else count)


def contrastive_loss(T_attr, temperature=0.1):
    """InfoNCE on T_attr [N,2,d], two wordings of each of N structures: nearer to each other than to all the others.

    Text alone, before any image is seen. Without it the priors of all structures grow together in training, and F_sem
    cannot tell organs apart (docs/results.md)."""
    z = F.normalize(F.layer_norm(T_attr.float(), T_attr.shape[-1:]).flatten(0, 1), dim=1)
    similar = (z @ z.T / temperature).fill_diagonal_(-1e4)
    return F.cross_entropy(similar, torch.arange(len(z), device=z.device) ^ 1)  # 0 and 1 belong together, 2 and 3, ...


class Objective(nn.Module):
    """Model and losses in one forward, as DistributedDataParallel needs it."""

    def __init__(self, model, weights, dense, contrast, decode=True, drop=0.0):
        super().__init__()
        self.model, self.weights, self.dense, self.contrast = model, weights, dense, contrast
        self.decode, self.drop = decode, drop  # whether masks are decoded; the share of the texts' tokens left out

    def forward(self, batch, features, count, images, clicks=(), world=1):
        """The loss of one Batch on features [B,C,H,W], and its parts [5] as in PARTS. count, images: the targets and
        the images of all processes together; world: how many processes compute the same term on texts.

        clicks: the number of points in each further round, in which SAM is shown its own last answer and points from
        its error (SAM-Med2D's interactive training). The rounds share encoding, texts and one backward pass, where
        SAM-Med2D takes an optimiser step for each.
        """
        model = self.model
        drop = (self.drop, batch.seed) if self.drop else None
        features, pixels = model.adapt_features(features)
        loss, parts = torch.zeros((), device=features.device), torch.zeros(3, device=features.device)
        if self.decode:
            loss, parts = self.decoding_loss(batch, features, pixels, count, clicks, drop)
        dense = contrast = loss.new_zeros(())
        if self.dense and model.align:
            dense = dense_loss(model.align(pixels, model.semantic_prior(batch.dense_texts, drop)), batch.dense_masks,
                               batch.known, images)
        if batch.contrast and model.cognitive:
            contrast = contrastive_loss(model.semantic_prior(batch.contrast, drop).unflatten(0, (-1, 2))) / world
        loss = loss + self.dense * dense + self.contrast * contrast
        return loss, torch.cat([parts, torch.stack([dense, contrast]).detach()])

    def decoding_loss(self, batch, features, pixels, count, clicks, drop):
        """Masks of the Batch's targets, round by round -> segmentation_loss of all rounds, their mean."""
        model = self.model
        priors = model.encode_attributes(batch.texts, drop=drop)
        x, steps = model.modulate_features(features, pixels, batch.index, priors)
        logits, iou = model.decode_masks(x, steps["text_map"], batch.points, batch.boxes)
        losses = [segmentation_loss(logits, iou, batch.masks, count, self.weights)]
        for n, clicked in enumerate(clicks):
            before, points = logits.detach(), None
            if clicked and len(before):
                size = batch.masks.shape[-2:]
                shown = F.interpolate(before.float()[:, None], size, mode="bilinear", align_corners=False)[:, 0] > 0
                points = correction_points(shown, batch.masks, batch.clicks[:, n, :clicked])
            logits, iou = model.decode_masks(x, steps["text_map"], points, None, before)
            losses.append(segmentation_loss(logits, iou, batch.masks, count, self.weights))
        return [sum(each) / len(losses) for each in zip(*losses)]

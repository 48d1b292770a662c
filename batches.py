"""What a training step sees: the order of the samples, the targets, texts and prompts drawn for each, as one batch.

Every draw depends on the seed, the step and the sample's place in it alone. So a run that was killed goes on with the
same draws, several processes draw together what one would have drawn, and worker processes can do all of it ahead.
"""
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from common import InputError, seeded
from data import PROMPTS, box_prompt, merge_instances, point_prompt

CLICKS = (1, 3, 5, 9)  # points per further round: SAM-Med2D's


@dataclass
class Batch:
    """B images and M targets, structures to find in them. M can be 0, and so can B, where a process has no share."""
    images: torch.Tensor | None  # uint8 [B, 3, S, S], RGB; None where all features are there
    index: torch.Tensor  # int64 [M]: the image of each target
    masks: torch.Tensor  # bool [M, S, S]
    texts: list  # M dicts of position, texture, shape
    targets: list  # M class names
    points: tuple | None = None  # (float32 [M, N, 2] (x, y), int64 [M, N])
    boxes: torch.Tensor | None = None  # float32 [M, 4]
    theta: torch.Tensor | None = None  # float32 [B, 2, 3]: how the features are yet to be moved, as the masks were
    features: torch.Tensor | None = None  # float16 [B, C, H, W], from the cache
    clicks: torch.Tensor | None = None  # float32 [M, rounds - 1, max(CLICKS)]: draws for the points of further rounds

    def map(self, f):
        """The Batch with f(tensor) in place of each tensor."""
        apply = lambda x: f(x) if torch.is_tensor(x) else tuple(map(f, x)) if isinstance(x, tuple) else x
        return replace(self, **{field.name: apply(getattr(self, field.name)) for field in fields(self)})

    def to(self, device):
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self):
        return self.map(torch.Tensor.pin_memory)


def draw_targets(sample, rng, max_targets, absent):
    """-> up to max_targets distinct (class, mask or None); each is an absent class with probability `absent`."""
    there, gone = rng.permutation(np.flatnonzero(sample.masks.any((1, 2)))), rng.permutation(len(sample.absent))
    there, gone, drawn = list(there), list(gone), []
    for _ in range(max_targets):
        if gone and rng.random() < absent:
            drawn.append((sample.absent[gone.pop()], None))
        elif there:
            t = there.pop()
            drawn.append((sample.targets[t], sample.masks[t]))
    return drawn


def make_batch(samples, texts, rng, max_targets=4, absent=0.1):
    """Samples -> Batch of targets, drawn per image, with texts in random wordings and no prompts yet.

    absent: the probability of drawing a structure that the image lacks; its empty mask teaches to say no. M can be 0
    where there is nothing to draw.
    """
    size = samples[0].masks.shape[-1]
    index, masks, targets, words = [], [], [], []
    for b, sample in enumerate(samples):
        for target, mask in draw_targets(sample, rng, max_targets, absent):
            index, targets = index + [b], targets + [target]
            masks.append(np.zeros((size, size), bool) if mask is None else mask)
            words.append(texts(target, sample.modality, sample, rng))
    return Batch(images=torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).contiguous(),
                 index=torch.tensor(index, dtype=torch.int64),
                 masks=torch.from_numpy(np.array(masks, bool).reshape(-1, size, size)), texts=words, targets=targets)


def add_prompts(batch, prompt, rng, points=1, noise=True):
    """The Batch with a prompt per target: none, point or box. noise: of the boxes.

    A box or a point needs something to lie on: targets with an empty mask are left out, so M may become 0.
    """
    if prompt not in PROMPTS:
        raise InputError(f"--prompt {prompt}: unknown; known are {', '.join(PROMPTS)}")
    if prompt == "none":
        return batch
    keep = batch.masks.any((1, 2)).nonzero()[:, 0]
    batch = replace(batch, index=batch.index[keep], masks=batch.masks[keep],
                    texts=[batch.texts[m] for m in keep], targets=[batch.targets[m] for m in keep])
    masks = batch.masks.numpy()
    if prompt == "box":
        boxes = [box_prompt(mask, rng if noise else None) for mask in masks]
        return replace(batch, boxes=torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4)))
    pairs = [point_prompt(mask, points, rng) for mask in masks]
    places = torch.from_numpy(np.array([xy for xy, _ in pairs], np.float32).reshape(-1, points, 2))
    return replace(batch, points=(places, torch.ones((len(pairs), points), dtype=torch.int64)))


def correction_points(prediction, masks, draws):
    """Where a user would click next: random pixels of the error, (x, y) and 1 for a missed pixel, 0 for a false one.

    prediction, masks bool [M,S,S]; draws [M,n], uniform in [0, 1), say which -> (float32 [M,n,2], int64 [M,n]), all on
    the masks' device. SAM-Med2D's simulation of interaction. Where nothing is wrong, pixels of the mask again; where
    the mask is empty too, points that SAM takes for padding, labelled -1.
    """
    wrong = prediction ^ masks
    places = torch.where(wrong.any((1, 2), True), wrong, masks).flatten(1)
    order = places.cumsum(1)  # the k-th of the places is where this becomes k
    k = (draws * order[:, -1:]).long() + 1
    at = torch.searchsorted(order, k).clamp(max=places.shape[1] - 1)
    labels = torch.where(order[:, -1:] > 0, masks.flatten(1).gather(1, at).long(), -1)
    width = masks.shape[-1]
    return torch.stack([at % width, at // width], -1).float(), labels


# ---------------------------------------------------------------------------------------------------------------------
# Jitter: cached features cannot be varied as images are, but moved

def draw_jitter(rng, size):
    """-> float32 [2,3] for F.affine_grid: moved, scaled and turned by up to `size` of the image. Nothing is mirrored:
    the texts speak of left and right."""
    scale, turn = np.exp(rng.uniform(-size, size)), rng.uniform(-size, size)
    cos, sin, shift = scale * np.cos(turn), scale * np.sin(turn), rng.uniform(-size, size, 2)
    return torch.tensor([[cos, -sin, shift[0]], [sin, cos, shift[1]]], dtype=torch.float32)


def move(x, theta, mode="bilinear"):
    """x [N,C,H,W] moved by theta [N,2,3]. The frozen encoders are nearly equivariant, so moving their features augments
    without encoding again."""
    if not len(x):
        return x
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x.dtype), mode, "zeros" if mode == "nearest" else "border", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------

class Batches(torch.utils.data.Dataset):
    """Item n is a list of `accumulate` Batches: what this rank does in step first + n.

    Every epoch is a seeded permutation; a step takes the next batch_size * accumulate * world samples of it, and the
    last step of an epoch what is left. With `views` an image comes in another of its variations in every epoch, and as
    it is in every (views + 1)th.
    """

    def __init__(self, dataset, texts, cache, args, rank=0, world=1, first=0, last=0):
        self.dataset, self.texts, self.cache, self.rank, self.world = dataset, texts, cache, rank, world
        self.seed, self.views, self.first, self.last = args.seed, args.views, first, last
        self.batch_size, self.accumulate, self.jitter = args.batch_size, args.accumulate, args.jitter
        self.prompt, self.points, self.rounds = args.prompt, args.points, args.rounds
        self.targets, self.absent = args.targets, args.absent
        self.per_step = self.batch_size * self.accumulate * world
        self.per_epoch, self.order = -(-len(dataset) // self.per_step), (None, None)

    def __len__(self):
        return self.last - self.first

    def __getitem__(self, n):
        step = self.first + n
        prompt = self.prompt_of(step)
        try:
            samples = [self.draw(step, place, *which, prompt) for place, which in enumerate(self.rows(step))
                       if place % self.world == self.rank]
        except InputError as e:  # carried out of the worker process as a value, or it would arrive as a traceback
            return e
        return [self.join(samples[n::self.accumulate]) for n in range(self.accumulate)]

    def rows(self, step):
        """[(number of the sample, of its view)] of a step, of all ranks together."""
        epoch, at = divmod(step, self.per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, seeded("order", self.seed, epoch).permutation(len(self.dataset))
        rows = self.order[1][at * self.per_step:(at + 1) * self.per_step].tolist()
        return [(j, (epoch + j) % (self.views + 1)) for j in rows]

    def prompt_of(self, step):
        """none, point or box; "mixed" is one of them per step, the same on all ranks."""
        return PROMPTS[seeded("prompt of step", self.seed, step).integers(3)] if self.prompt == "mixed" else self.prompt

    def clicks_of(self, step, n):
        """How many points the n-th further round of a step has; 0: none but the mask of the round before, as in one
        round in the middle and in the last one of SAM-Med2D."""
        rng, further = seeded("rounds", self.seed, step), self.rounds - 1
        bare = {further, int(rng.integers(1, max(2, further)))} if further > 1 else set()
        return 0 if n in bare else int(rng.choice(CLICKS, further)[n - 1])

    def draw(self, step, place, number, view, prompt):
        """The Batch of one sample."""
        rng, sample = seeded("draw", self.seed, step, place), self.dataset.view(number, view, self.texts)
        if prompt == "none":  # nothing tells one of several polyps from the others
            sample = merge_instances(sample)
        batch = make_batch([sample], self.texts, rng, self.targets, self.absent if prompt == "none" else 0.0)
        if self.jitter:
            batch.theta = draw_jitter(rng, self.jitter)[None]
            batch.masks = move(batch.masks[:, None].float(), batch.theta[batch.index], "nearest")[:, 0] > 0.5
        batch = add_prompts(batch, prompt, rng, self.points)
        if self.rounds > 1:
            batch.clicks = torch.from_numpy(rng.random((len(batch.masks), self.rounds - 1, max(CLICKS)), np.float32))
        batch.features = self.cache.read(batch.images[0])
        return batch

    def join(self, batches):
        """One Batch of several, each of one image; the images stay behind where all features are there."""
        if not batches:
            S = self.dataset.image_size
            return Batch(torch.zeros(0, 3, S, S, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64),
                         torch.zeros(0, S, S, dtype=torch.bool), [], [])
        cat = lambda name: torch.cat([getattr(b, name) for b in batches])
        have = all(b.features is not None for b in batches)
        return Batch(
            images=None if have else cat("images"), masks=cat("masks"), texts=sum((b.texts for b in batches), []),
            index=torch.cat([b.index + n for n, b in enumerate(batches)]),
            targets=sum((b.targets for b in batches), []),
            points=batches[0].points and tuple(torch.cat([b.points[n] for b in batches]) for n in (0, 1)),
            boxes=None if batches[0].boxes is None else cat("boxes"), theta=cat("theta") if self.jitter else None,
            features=torch.from_numpy(np.stack([b.features for b in batches])) if have else None,
            clicks=cat("clicks") if self.rounds > 1 else None)

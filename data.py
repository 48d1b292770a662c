"""Data: samples on the model's grid, the prompts cut from masks, and what a training step draws.

    python data.py stats --dataset kvasir --data DIR         counts, sizes, and everything that is wrong with the files
    python data.py prepare synapse RAW --out data/synapse    the challenge's NIfTI volumes to the slices that we read

The files are read in readers/, the texts in texts.py. Coordinates are (x, y) in pixels of the resized S x S grid, pixel
centres at integers.
"""
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import ATTRIBUTES, InputError, Parser, number, positive_int, run, seeded
from readers.demo import Demo
from readers.folder import Folder
from readers.kits19 import KiTS19
from readers.kvasir import Kvasir
from readers.pictures import SPLITS
from readers.sa_med2d import SAMed2D
from readers.synapse import Synapse
from texts import Texts, draw_nonsense, write_form

SOURCES = {source.name: source for source in (Demo, Synapse, SAMed2D, KiTS19, Kvasir, Folder)}
OPTIONS = {"demo": ("n", "overlap", "contrast", "size"), "kits19": ("axes",), "folder": ("fold",)}
PROMPTS = ("none", "point", "box")

# ---------------------------------------------------------------------------------------------------------------------
# Samples

@dataclass
class Sample:
    """An image on the S x S grid with T targets: masks that a target's name may share with others (instances)."""
    image: np.ndarray  # uint8 [S, S, 3], RGB
    masks: np.ndarray  # bool [T, S, S]
    targets: tuple[str, ...]  # the T class names
    absent: tuple[str, ...]  # classes that are known not to be here
    truth: np.ndarray  # bool [T, H, W]: the masks on the original grid
    modality: str  # ct, mr, pet, ultrasound, x-ray, endoscopy, dermoscopy, fundus
    case: str  # e.g. "case0005"; the slices of a volume share it
    key: str  # e.g. "case0005_slice012": the image's name, unique in its data set

    @property
    def size(self):
        """(H, W) of the original grid."""
        return self.truth.shape[1:]


def make_sample(raw, size, case, key):
    """readers.pictures.RawSample -> Sample on the size x size grid.

    An image that is not square is stretched to the square, as SAM-Med2D does: boxes and points live on the square grid,
    and `to_original` takes a prediction back. The image is resized with antialiasing; masks by nearest neighbour, which
    cannot invent a label between two others.
    """
    masks, (h, w) = raw.masks, raw.image.shape[:2]

    def unit(pixels):
        """-> float32 [1,1 or 3,H,W] in [0, 1]."""
        pixels = torch.from_numpy(np.array(np.atleast_3d(pixels))).permute(2, 0, 1)[None]
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()

    if (h, w) == (size, size):
        image = unit(raw.image)
    else:
        # first the width, strip by strip: a photograph's numbers would take a gigabyte together
        strips = (unit(raw.image[top:top + 256]) for top in range(0, h, 256))
        narrow = [F.interpolate(strip, (strip.shape[2], size), mode="bilinear", antialias=True) for strip in strips]
        image = F.interpolate(torch.cat(narrow, 2), (size, size), mode="bilinear", antialias=True)
        if len(masks):
            stretched = F.interpolate(torch.from_numpy(masks)[None].byte(), (size, size), mode="nearest-exact")
            masks = stretched[0].bool().numpy()
    image = (image[0].clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return Sample(np.ascontiguousarray(image), masks.reshape(-1, size, size), raw.targets, raw.absent,
                  raw.masks, raw.modality, case, key)


def to_original(x, size):
    """x float [T, S, S] (logits or probabilities) -> [T, H, W], bilinear: the only way back to the original grid."""
    if len(x) == 0:
        return x.new_zeros((0, *size))
    return F.interpolate(x[None].float(), tuple(size), mode="bilinear", align_corners=False)[0]


def merge_instances(sample):
    """The Sample with one mask per class name: without a prompt nothing tells one of several polyps from the others."""
    names = tuple(dict.fromkeys(sample.targets))
    if len(names) == len(sample.targets):
        return sample
    union = lambda masks: np.stack([masks[[t == name for t in sample.targets]].any(0) for name in names])
    return replace(sample, masks=union(sample.masks), truth=union(sample.truth), targets=names)


class Dataset:
    """The samples of a split, or the part of it that --fraction and --limit keep. Nothing here grows with the data."""

    def __init__(self, source, image_size, fraction, limit, seed):
        self.source, self.image_size, self.seed = source, image_size, seed
        self.name, self.classes, self.volumes = source.name, source.classes, source.volumes
        self.sources, self.pairs = [source], source.pairs
        self.kept = max(1, round(len(source) * fraction))
        self.step, self.phase = len(source) / self.kept, seeded("fraction", seed).random()
        self.length = min(self.kept, limit or self.kept)

    def __len__(self):
        return self.length

    def row(self, i):
        """Kept images are spread evenly over the split, from a phase that the seed draws."""
        if not 0 <= i < self.length:
            raise IndexError(i)
        return int((i + self.phase) * self.step)

    def key(self, i):
        return self.source.key(self.row(i))

    def case(self, i):
        return self.source.case(self.row(i))

    def stamp(self, i):
        """A string that changes whenever the file of image i does; None for a drawn image. With it features on disk are
        found without reading the image, see encoders.fill."""
        if not hasattr(self.source, "file"):
            return None
        try:
            status = self.source.file(self.row(i)).stat()
        except OSError:  # read() will say what is wrong
            return None
        return repr((self.key(i), status.st_size, status.st_mtime_ns))

    def __getitem__(self, i):
        row = self.row(i)
        return make_sample(self.source.read(row), self.image_size, self.source.case(row), self.source.key(row))


class Joined:
    """Several data sets as one to train with, each drawn from equally often: image n is the next one of data set
    n mod k, and a smaller one begins anew where it ends. Otherwise as Dataset."""
    volumes = False

    def __init__(self, datasets):
        self.datasets, self.image_size = datasets, datasets[0].image_size
        self.sources = [dataset.source for dataset in datasets]
        self.classes = tuple(dict.fromkeys(name for dataset in datasets for name in dataset.classes))
        self.pairs = tuple(dict.fromkeys(pair for dataset in datasets for pair in dataset.pairs))

    def __len__(self):
        return len(self.datasets) * max(map(len, self.datasets))

    def of(self, n):
        """-> (data set, number in it) of image n."""
        if not 0 <= n < len(self):
            raise IndexError(n)
        row, which = divmod(n, len(self.datasets))
        return self.datasets[which], row % len(self.datasets[which])

    def turned(self, n, epoch):
        """Image n -> what takes its place in an epoch, so that no image of a smaller data set is always the one that
        comes once more than others."""
        row, which = divmod(n, len(self.datasets))
        longest = len(self) // len(self.datasets)
        return (row + epoch * longest) % len(self.datasets[which]) * len(self.datasets) + which

    def key(self, n):
        dataset, i = self.of(n)
        return f"{dataset.name}/{dataset.key(i)}"

    def stamp(self, n):
        dataset, i = self.of(n)
        return dataset.stamp(i)

    def __getitem__(self, n):
        dataset, i = self.of(n)
        return dataset[i]


def open_datasets(names, roots=None, *args, **options):
    """open_dataset, of one name or of several with commas between them -> Dataset or Joined."""
    names, roots = names.split(","), roots.split(",") if roots else []
    if roots and len(roots) != len(names):
        raise InputError(f"--data: {len(roots)} folders for {len(names)} data sets; give one for each, with commas "
                         "between them")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--dataset: {twice[0]} is named twice; name it once")
    datasets = [open_dataset(name, root, *args, **options) for name, root in zip(names, roots or [None] * len(names))]
    return datasets[0] if len(datasets) == 1 else Joined(datasets)


def open_dataset(name, root=None, split="train", image_size=256, fraction=1.0, limit=None, seed=0, **options):
    """-> Dataset. `root`: the data's folder (default data/<name>). `options`: of OPTIONS; None is as if left out.

    `fraction` in (0, 1] keeps an evenly spread subset whose phase is drawn from `seed`; `limit` then the first N.
    """
    if name not in SOURCES:
        raise InputError(f"--dataset {name}: unknown data set; known are {', '.join(SOURCES)}")
    if split not in SPLITS:
        raise InputError(f"split {split}: unknown; known are {', '.join(SPLITS)}")
    if not 0 < fraction <= 1:
        raise InputError(f"--fraction {fraction}: give a number above 0 and at most 1")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: give at least 1")
    if image_size < 8:
        raise InputError(f"--image-size {image_size}: give at least 8 pixels")
    options = {option: value for option, value in options.items() if value is not None}
    unknown = set(options) - set(OPTIONS.get(name, ()))
    if unknown:
        raise InputError(f"--dataset {name} has no setting {', '.join(sorted(unknown))}; leave it out")
    if name == "demo":
        source = Demo(split, seed, **options)
    else:
        root = Path(root or Path("data") / name)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; name the one that holds {name} with --data DIR (docs/data.md: "
                             "how to get it)")
        source = SOURCES[name](root, split, **options)
    return Dataset(source, image_size, fraction, limit, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: cut from a mask

def prompt_rng(key, target, seed):
    """The generator of one sample's (`key`) and target's prompts: the same whatever the order and the workers."""
    return seeded("prompt", key, target, seed)


def box_prompt(mask, rng=None):
    """mask bool [S, S] -> float32 [4]: x0, y0, x1, y1, inclusive pixels. ValueError if the mask is empty.

    With rng every side is shifted by a whole number of pixels, uniform up to SAM-Med2D's bound, min(5, half of the
    shorter side), and clipped to the image; sides cannot cross.
    """
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        raise ValueError("an empty mask has no box")
    box = np.array([xs[0], ys[0], xs[-1], ys[-1]])
    if rng is not None:
        most = min(5, min(box[2] - box[0], box[3] - box[1]) // 2)
        h, w = mask.shape
        box = np.clip(box + rng.integers(-most, most + 1, 4), 0, [w - 1, h - 1, w - 1, h - 1])
    return box.astype(np.float32)


def point_prompt(mask, n, rng):
    """mask bool [S, S] -> (float32 [n, 2] (x, y), int64 [n] of ones): random pixels of it, distinct if it has n."""
    ys, xs = np.nonzero(mask)
    if not len(ys):
        raise ValueError("an empty mask has no point")
    pick = rng.choice(len(ys), n, replace=n > len(ys))
    return np.stack([xs[pick], ys[pick]], 1).astype(np.float32), np.ones(n, np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Batches: the targets, texts and prompts that a training step draws for its samples

CLICKS = (1, 3, 5, 9)  # points per further round: SAM-Med2D's


@dataclass
class Batch:
    """B images and M targets, structures to find in them. M can be 0, and so can B, where a process has no share."""
    images: torch.Tensor | None  # uint8 [B, 3, S, S], RGB; None where all features are there
    index: torch.Tensor  # int64 [M]: the image of each target
    masks: torch.Tensor  # bool [M, S, S]
    texts: list  # M dicts of position, texture, shape
    targets: list  # M class names; "" for nonsense
    points: tuple | None = None  # (float32 [M, N, 2] (x, y), int64 [M, N])
    boxes: torch.Tensor | None = None  # float32 [M, 4]
    theta: torch.Tensor | None = None  # float32 [B, 2, 3]: how the features are yet to be moved, as the masks were
    features: torch.Tensor | None = None  # float16 [B, C, H, W], from the cache
    clicks: torch.Tensor | None = None  # float32 [M, rounds - 1, max(CLICKS)]: draws for the points of further rounds
    # for the losses on all structures at once, and on text alone (losses.py); K structures, of all images together
    structures: list = field(default_factory=list)  # K pairs (class, modality)
    dense_texts: list = field(default_factory=list)  # K dicts of texts
    dense_masks: torch.Tensor | None = None  # bool [B, K, S/2, S/2]
    known: torch.Tensor | None = None  # bool [B, K]: whether it is known if the image has the structure
    seed: int = 0  # of the words that are dropped
    contrast: list = field(default_factory=list)  # 2N dicts of texts, two of each of N structures; once a step

    def __len__(self):
        """B."""
        return len(self.images if self.features is None else self.features)

    def map(self, change):
        """The Batch with change(tensor) in place of each tensor."""
        apply = lambda x: (change(x) if torch.is_tensor(x) else tuple(map(change, x)) if isinstance(x, tuple) else x)
        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

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


def make_batch(samples, texts, rng, max_targets=4, absent=0.1, nonsense=0.0):
    """Samples -> Batch of targets, drawn per image, with texts in random wordings and no prompts yet.

    absent: the probability of drawing a structure that the image lacks; its empty mask teaches to say no. nonsense: the
    probability that a target's texts are nonsense instead, and its mask empty. M can be 0 where there is nothing to
    draw.
    """
    size = samples[0].masks.shape[-1]
    index, masks, targets, words = [], [], [], []
    for b, sample in enumerate(samples):
        for target, mask in draw_targets(sample, rng, max_targets, absent):
            text = texts(target, sample.modality, sample, rng)
            if nonsense and rng.random() < nonsense:
                target, mask, text = "", None, draw_nonsense(rng)
            index, targets = index + [b], targets + [target]
            masks.append(np.zeros((size, size), bool) if mask is None else mask)
            words.append(text)
    return Batch(images=torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).contiguous(),
                 index=torch.tensor(index, dtype=torch.int64),
                 masks=torch.from_numpy(np.array(masks, bool).reshape(-1, size, size)), texts=words, targets=targets)


def add_structures(batch, sample):
    """Puts all that is known of one image's structures into its Batch: those that it has, and those that it lacks."""
    names = dict.fromkeys((*sample.targets, *sample.absent))
    batch.structures = [(name, sample.modality) for name in names]
    masks = np.zeros((1, len(names), *(n // 2 for n in sample.masks.shape[1:])), bool)
    for name, mask in zip(sample.targets, sample.masks):
        masks[0, list(names).index(name)] |= mask[::2, ::2]
    batch.dense_masks = torch.from_numpy(masks)
    batch.known = torch.ones(1, len(names), dtype=torch.bool)


def draw_pairs(concepts, classes, rng, most=16):
    """For the contrastive loss: two random texts, one after the other, of each of up to `most` of the structures of
    Texts.concepts(), first the data set's own `classes`."""
    names = [list(concepts)[i] for i in rng.permutation(len(concepts))]
    names.sort(key=lambda name: name not in classes)  # keeps the random order within both
    return [concepts[name](rng) for name in names[:most] for _ in range(2)]


def join_structures(batches, structures):
    """Batches of one image each -> dense_masks and known of all of them, for the K `structures`."""
    half = batches[0].dense_masks.shape[-2:]
    masks = torch.zeros(len(batches), len(structures), *half, dtype=torch.bool)
    known = torch.zeros(len(batches), len(structures), dtype=torch.bool)
    for b, batch in enumerate(batches):
        columns = [structures.index(s) for s in batch.structures]
        masks[b, columns], known[b, columns] = batch.dense_masks[0], True
    return masks, known


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
# The order of the samples. Every draw depends on the seed, the step and the sample's place in it alone. So a run that
# was killed goes on with the same draws, several processes draw together what one would have drawn, and worker
# processes can do all of it ahead.

class Batches(torch.utils.data.Dataset):
    """Item n is a list of `accumulate` Batches: what this rank does in step first + n.

    Every epoch is a seeded permutation; a step takes the next batch_size * accumulate * world samples of it, and the
    last step of an epoch what is left.
    """

    def __init__(self, dataset, texts, cache, args, rank=0, world=1, first=0, last=0):
        self.dataset, self.texts, self.cache, self.rank, self.world = dataset, texts, cache, rank, world
        self.seed, self.first, self.last = args.seed, first, last
        self.batch_size, self.accumulate, self.jitter = args.batch_size, args.accumulate, args.jitter
        self.prompt, self.points, self.rounds = args.prompt, args.points, args.rounds
        self.targets, self.absent, self.nonsense = args.targets, args.absent, args.nonsense
        self.dense = args.align and args.dense_loss > 0
        self.concepts = texts.concepts() if args.contrastive_loss else {}
        self.per_step = self.batch_size * self.accumulate * world
        self.per_epoch, self.order = -(-len(dataset) // self.per_step), (None, None)

    def __len__(self):
        return self.last - self.first

    def __getitem__(self, n):
        step = self.first + n
        prompt = self.prompt_of(step)
        samples = [self.draw(step, place, row, prompt) for place, row in enumerate(self.rows(step))
                   if place % self.world == self.rank]
        pairs = draw_pairs(self.concepts, self.dataset.classes, seeded("words", self.seed, step))
        return [self.join(samples[n::self.accumulate], step, [] if n else pairs) for n in range(self.accumulate)]

    def rows(self, step):
        """The numbers of the samples of a step, of all ranks together."""
        epoch, at = divmod(step, self.per_epoch)
        if self.order[0] != epoch:
            order = seeded("order", self.seed, epoch).permutation(len(self.dataset)).tolist()
            if isinstance(self.dataset, Joined):
                order = [self.dataset.turned(n, epoch) for n in order]
            self.order = epoch, order
        return self.order[1][at * self.per_step:(at + 1) * self.per_step]

    def prompt_of(self, step):
        """none, point or box; "mixed" is one of them per step, the same on all ranks."""
        return PROMPTS[seeded("prompt of step", self.seed, step).integers(3)] if self.prompt == "mixed" else self.prompt

    def clicks_of(self, step, n):
        """How many points the n-th further round of a step has; 0: none but the mask of the round before, as in one
        round in the middle and in the last one of SAM-Med2D."""
        rng, further = seeded("rounds", self.seed, step), self.rounds - 1
        bare = {further, int(rng.integers(1, max(2, further)))} if further > 1 else set()
        return 0 if n in bare else int(rng.choice(CLICKS, further)[n - 1])

    def draw(self, step, place, number, prompt):
        """The Batch of one sample."""
        rng, sample = seeded("draw", self.seed, step, place), self.dataset[number]
        if prompt == "none":  # nothing tells one of several polyps from the others
            sample = merge_instances(sample)
        batch = make_batch([sample], self.texts, rng, self.targets,
                           *(self.absent, self.nonsense) if prompt == "none" else (0.0, 0.0))
        if self.dense:
            add_structures(batch, sample)
        if self.jitter:
            batch.theta = draw_jitter(rng, self.jitter)[None]
            moved = lambda x, index: move(x[:, None].float(), batch.theta[index], "nearest")[:, 0] > 0.5
            batch.masks = moved(batch.masks, batch.index)
            if self.dense:
                batch.dense_masks = moved(batch.dense_masks[0], [0] * len(batch.structures))[None]
        batch = add_prompts(batch, prompt, rng, self.points)
        if self.rounds > 1:
            batch.clicks = torch.from_numpy(rng.random((len(batch.masks), self.rounds - 1, max(CLICKS)), np.float32))
        batch.features = self.cache.read(batch.images[0])
        return batch

    def join(self, batches, step, pairs):
        """One Batch of several, each of one image, and the pairs of texts that it has to compare; the images stay
        behind where all features are there."""
        seed = int(seeded("dropped", self.seed, step).integers(2 ** 31))
        if not batches:
            S = self.dataset.image_size
            return Batch(torch.zeros(0, 3, S, S, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64),
                         torch.zeros(0, S, S, dtype=torch.bool), [], [],
                         dense_masks=torch.zeros(0, 0, S // 2, S // 2, dtype=torch.bool),
                         known=torch.zeros(0, 0, dtype=torch.bool), contrast=pairs, seed=seed)
        structures = sorted({s for b in batches for s in b.structures})
        dense_masks, known = join_structures(batches, structures) if self.dense else (None, None)
        cat = lambda name: torch.cat([getattr(b, name) for b in batches])
        have = all(b.features is not None for b in batches)
        return Batch(
            images=None if have else cat("images"), masks=cat("masks"), texts=sum((b.texts for b in batches), []),
            index=torch.cat([b.index + n for n, b in enumerate(batches)]),
            targets=sum((b.targets for b in batches), []),
            points=batches[0].points and tuple(torch.cat([b.points[n] for b in batches]) for n in (0, 1)),
            boxes=None if batches[0].boxes is None else cat("boxes"), theta=cat("theta") if self.jitter else None,
            features=torch.from_numpy(np.stack([b.features for b in batches])) if have else None,
            clicks=cat("clicks") if self.rounds > 1 else None,
            structures=structures, dense_masks=dense_masks, known=known, contrast=pairs, seed=seed,
            # in the same words for all processes and parts of a step
            dense_texts=[self.texts(*s, rng=seeded("words", self.seed, step, *s)) for s in structures])


# ---------------------------------------------------------------------------------------------------------------------

def add_data_flags(parser):
    """The flags that say which data, in train.py, eval.py, and here."""
    add = parser.add_argument
    add("--dataset", help=", ".join(SOURCES) + "; in training several, with commas between them")
    add("--data", help="folder of the data (default: data/<dataset>)")
    add("--axes", choices=("xyz", "z"),
        help="kits19: xyz, slices along the three axes (default), or z, whole volumes of axial slices")
    add("--fold", type=number(0, kind=int), help="folder: which of splits_final.json (default 0)")
    add("--overlap", type=number(0, 1),
        help="demo: how far the organs are pushed into each other, 0 to 1 (default 0.3)")
    add("--contrast", type=number(0, 10), help="demo: factor on the organs' contrast, 0 to 10 (default 1)")
    add("--size", type=number(high=3, above=0), help="demo: factor on the organs' size, up to 3 (default 1)")
    add("--attributes-file", help="a JSON file of texts in place of attributes.json")
    add("--texts", help="a JSON lines file of texts for single images or cases")


def dataset_options(args):
    """The data set's own settings among the flags, as open_dataset takes them."""
    return {option: getattr(args, option) for option in ("axes", "fold", "overlap", "contrast", "size")}


def open_texts(args):
    """The Texts that the flags name, of several data sets the last one's. --dataset folder has its own in
    DIR/attributes.json, and this becomes the value of --attributes-file, so that a checkpoint remembers it."""
    if args.dataset == "folder" and not args.attributes_file:
        path = Path(args.data or "data/folder") / "attributes.json"
        if not path.is_file():
            raise InputError(f"{path}: missing; python data.py stats --dataset folder --data {path.parent} writes a "
                             "form for the texts of its classes")
        args.attributes_file = str(path)
    return Texts(args.dataset.split(",")[-1], args.attributes_file, args.texts)


def open_or_draft_texts(args, source):
    """open_texts(), but where the texts of --dataset folder are missing a form is written. What other data sets say of
    classes with the same names is taken for a start."""
    path = Path(args.data or "data/folder") / "attributes.json"
    if args.dataset == "folder" and not args.attributes_file and not path.exists():
        plain = {target: target.replace("_", " ").lower() for target in source.classes}
        drafts = {target: {kind: Texts(other.name).wordings(plain[target], modality, kind) for kind in ATTRIBUTES}
                  for target, modality in source.pairs
                  for other in (Kvasir, KiTS19, Synapse) if (plain[target], modality) in other.pairs}
        write_form(path, args.dataset, source.classes, drafts)
    return open_texts(args)


def main():
    from readers.check import stats
    from readers.prepare import prepare
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    counting = commands.add_parser("stats", help="counts, sizes, and everything that is wrong with the files")
    add_data_flags(counting)
    counting.add_argument("--json", help="write every number to this file")
    counting.add_argument("--sheet", help="draw a contact sheet of images with their masks to this PNG")
    counting.add_argument("--limit", type=positive_int, help="only the first N images of each split")
    counting.add_argument("--workers", type=number(0, kind=int), default=1, help="processes that read")
    preparing = commands.add_parser("prepare", help="the challenge's NIfTI volumes to the slices that we read")
    preparing.add_argument("dataset", help="synapse or kits19")
    preparing.add_argument("raw", help="the folder of the challenge's files")
    preparing.add_argument("--out", help="default: data/<dataset>")
    args = parser.parse_args()
    if args.command == "stats":
        if args.dataset is None:
            raise InputError("--dataset: name the data set")
        raise SystemExit(stats(args, lambda split: open_dataset(args.dataset, args.data, split, limit=args.limit,
                                                                **dataset_options(args)),
                               lambda source: open_or_draft_texts(args, source)))
    prepare(args.dataset, args.raw, args.out or Path("data") / args.dataset)


if __name__ == "__main__":
    run(main)

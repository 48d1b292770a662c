"""Data: slices and their masks, the prompts cut from masks, the clinical texts, and training batches.

Nothing is ever unpickled. Coordinates are (x, y) in pixels of the resized S x S grid, pixel centres at integers.
"""
import argparse
import ctypes
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from demo import draw

HERE = Path(__file__).resolve().parent
DATASETS = ("demo", "synapse")
SPLITS = ("train", "val", "test")
PROMPTS = ("none", "point", "box")
ATTRIBUTES = ("position", "texture", "shape")

# TransUNet's ids 1..8, in order; 0 is background
CLASSES = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
# the benchmark's 12 test cases; a checkpoint is never chosen by them, so three of the 18 others are held out
TEST_CASES = ("0001", "0002", "0003", "0004", "0008", "0022", "0025", "0029", "0032", "0035", "0036", "0038")
VAL_CASES = ("0010", "0028", "0037")


class InputError(ValueError):
    """Bad input: one line that names the file or flag and the remedy; scripts print it and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is an InputError, so that a script prints one line instead of its whole usage."""

    def error(self, message):
        raise InputError(message + "; --help lists the flags")


def keep_freed_memory():
    """Asks glibc to reuse large blocks instead of returning each to the system, whose fresh pages cost a CPU more time
    than many an operator: images are encoded a third faster. Elsewhere it does nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    for option, size in ((m_mmap_threshold, 2 ** 30), (m_trim_threshold, 2 ** 31 - 1), (m_top_pad, 2 ** 28)):
        mallopt(option, size)


def run(main, *errors):
    """Calls main(). InputError and the exception classes `errors` become one line on stderr and exit status 2."""
    script = Path(sys.argv[0]).name
    keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (InputError, *errors) as e:
        print(f"{script}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


def seeded(*parts):
    """A generator that depends on `parts` alone (blake2b of their str): not on order, worker or PYTHONHASHSEED."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


# ---------------------------------------------------------------------------------------------------------------------
# Samples and resizing

@dataclass
class Sample:
    image: np.ndarray  # uint8 [S, S, 3], RGB
    masks: np.ndarray  # bool [T, S, S], one per class of the data set, as in `targets`; an absent class is empty
    targets: tuple[str, ...]  # the T class names
    label: np.ndarray  # uint8 [H, W], the original grid: 0 background, i + 1 = targets[i]
    modality: str  # "ct"
    case: str  # e.g. "case0005"; the slices of a volume share it
    slice: int

    @property
    def size(self):
        """(H, W) of the original grid."""
        return self.label.shape


def make_sample(image, label, classes, size, **names):
    """image float [H, W] in [0, 1], label uint8 [H, W] -> Sample on the size x size grid.

    A non-square slice is stretched to the square, as SAM-Med2D does: boxes and points live on the square grid, and
    `to_original` takes a prediction back. The image is resized with antialiasing; labels by nearest neighbour, which
    cannot invent a label between two others.
    """
    image, stretched = torch.from_numpy(np.array(image, np.float32))[None, None], torch.from_numpy(label)[None, None]
    if label.shape != (size, size):
        image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
        stretched = F.interpolate(stretched, (size, size), mode="nearest-exact")
    gray = (image[0, 0].clamp(0, 1) * 255).round().byte().numpy()
    masks = stretched[0, 0].numpy() == np.arange(1, len(classes) + 1, dtype=np.uint8)[:, None, None]
    return Sample(np.repeat(gray[..., None], 3, axis=2), masks, classes, label, **names)


def to_original(x, size):
    """x float [T, S, S] (logits or probabilities) -> [T, H, W], bilinear: the only way back to the original grid."""
    if len(x) == 0:
        return x.new_zeros((0, *size))
    return F.interpolate(x[None].float(), tuple(size), mode="bilinear", align_corners=False)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Opening

def open_dataset(name, root=None, split="train", image_size=256, fraction=1.0, limit=None, seed=0, **knobs):
    """-> Demo or Synapse. `root`: the data's folder (default data/<name>). `knobs`: the demo's n, overlap, ...

    `fraction` in (0, 1] keeps an evenly spread subset whose phase is drawn from `seed`; `limit` then the first N.
    """
    if name not in DATASETS:
        raise InputError(f"--dataset {name}: unknown data set; known are {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise InputError(f"split {split}: unknown; known are {', '.join(SPLITS)}")
    if not 0 < fraction <= 1:
        raise InputError(f"--fraction {fraction}: give a number above 0 and at most 1")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: give at least 1")
    if image_size < 8:
        raise InputError(f"--image-size {image_size}: give at least 8 pixels")
    unknown = set(knobs) - ({"n", "overlap", "contrast", "size"} if name == "demo" else set())
    if unknown:
        raise InputError(f"--dataset {name} has no setting {', '.join(sorted(unknown))}; leave it out")
    if name == "demo":
        dataset = Demo(split, image_size, seed, **knobs)
    else:
        dataset = Synapse(root or Path("data") / name, split, image_size)
    n = len(dataset)
    k = max(1, round(n * fraction))
    keep = ((np.arange(k) + seeded("fraction", seed).random()) * n / k).astype(int)[:limit]
    for field in ("items", "cases", "keys"):
        setattr(dataset, field, [getattr(dataset, field)[i] for i in keep])
    return dataset


# ---------------------------------------------------------------------------------------------------------------------
# Synapse (BTCV in the layout of TransUNet)

class Synapse:
    """Slices of abdominal CT in TransUNet's layout; nothing but names and the headers of volumes is read on opening.

    root/train_npz/caseXXXX_sliceYYY.npz   image float [H, W] in [0, 1] (HU clipped to [-125, 275]), label [H, W] 0..8
    root/test_vol_h5/caseXXXX.npy.h5       image, label [D, H, W]
    root/lists_Synapse/{train,test_vol}.txt (or under root/lists/): optional, without them all files, sorted

    train: the cases of train_npz but VAL_CASES, TEST_CASES and whatever test_vol.txt names. val: VAL_CASES, wherever
    they lie; if there are none of them, the last sixth of the training cases. test: the volumes of test_vol.
    """
    name, classes, modality = "synapse", CLASSES, "ct"

    def __init__(self, root, split, image_size):
        self.root, self.image_size, self.opened = Path(root), image_size, None
        if not self.root.is_dir():
            raise InputError(f"{root}: no such folder; give the one that holds train_npz and test_vol_h5 "
                             "with --data DIR (README: how to get the data)")
        if split == "test":
            cases = self.named("test_vol", "test_vol_h5", ".npy.h5")
            self.items = [item for case in cases for item in self.volume_items(case)]
        else:
            self.items = self.train_or_val(split)
        self.cases = [case for case, _, _ in self.items]
        self.keys = [f"{case}_slice{number:03d}" for case, number, _ in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        case, number, path = self.items[i]
        image, label = self.read_slice(path, number) if path.suffix == ".h5" else read_npz(path)
        image, label = check_slice(image, label, path, len(self.classes))
        return make_sample(image, label, self.classes, self.image_size, modality="ct", case=case, slice=number)

    def __getstate__(self):
        return {**self.__dict__, "opened": None}  # an open HDF5 file cannot be pickled; every process opens its own

    def listed(self, kind):
        """(the list's path, its sorted names without suffixes), or (None, []) where there is no such list."""
        for path in (self.root / "lists_Synapse" / f"{kind}.txt", self.root / "lists/lists_Synapse" / f"{kind}.txt"):
            if path.is_file():
                names = {re.sub(r"(\.npz|\.npy\.h5)$", "", line) for line in read_text(path).split()}
                if not names:
                    raise InputError(f"{path}: names no file; fill the list, or delete it to use all files")
                return path, sorted(names)
        return None, []

    def named(self, kind, folder, suffix):
        """The names of the list `kind`, each checked to lie in `folder`; without a list every file there."""
        here = {p.name.removesuffix(suffix) for p in (self.root / folder).glob("*" + suffix)}
        path, names = self.listed(kind)
        if path is None and not here:
            raise InputError(f"{self.root / folder}: holds no {suffix} file; is --data {self.root} the Synapse folder?")
        for name in names:
            if name not in here:
                raise InputError(f"{self.root / folder / (name + suffix)}: missing, but {path} names it; "
                                 "restore the file or take its line out of the list")
        return names or sorted(here)

    def volume_path(self, case):
        return self.root / "test_vol_h5" / f"{case}.npy.h5"

    def slices(self):
        """(case, number, path) of every slice of train_npz, by case and number, but those of test cases."""
        folder, items = self.root / "train_npz", []
        if not folder.is_dir():
            return items  # a copy for evaluation only
        # validation cases count even if the list leaves them out
        val = {p.stem for case in VAL_CASES for p in folder.glob(f"case{case}_slice*.npz")}
        for name in val.union(self.named("train", "train_npz", ".npz")):
            match = re.fullmatch(r"(case\w+?)_slice(\d+)", name)
            if not match:
                raise InputError(f"{folder / name}.npz: not named like case0005_slice012.npz; rename or move it")
            items.append((match[1], int(match[2]), folder / f"{name}.npz"))
        test = {f"case{case}" for case in TEST_CASES}.union(self.listed("test_vol")[1])
        return sorted(item for item in items if item[0] not in test or item[0][4:] in VAL_CASES)

    def train_or_val(self, split):
        """The items of the split "train" or "val"; see the class."""
        slices = self.slices()
        cases = sorted({case for case, _, _ in slices})
        val = [f"case{case}" for case in VAL_CASES]
        val = [case for case in val if case in cases or self.volume_path(case).is_file()]
        if not val and len(cases) > 1:  # somebody else's cases
            val = cases[-max(1, len(cases) // 6):]
        train = [case for case in cases if case not in val]
        if not val or split == "train" and not train:
            raise InputError(f"{self.root / 'train_npz'}: {len(cases)} case(s) besides the test cases, {len(val)} for "
                             "validation; add cases, at least one to train on and one to validate on")
        if split == "train":
            return [item for item in slices if item[0] in train]
        npz = {case: [item for item in slices if item[0] == case] for case in val}
        return [item for case in val for item in npz[case] or self.volume_items(case)]

    def volume_items(self, case):
        path = self.volume_path(case)
        volume, self.opened = self.open_volume(path), None
        image, label = volume["image"].shape, volume["label"].shape
        volume.close()
        if len(image) != 3 or image != label or 0 in image:
            raise InputError(f"{path}: image {image} and label {label} should both be [D, H, W]; write it again")
        return [(case, i, path) for i in range(image[0])]

    def open_volume(self, path):
        """The HDF5 file, kept open until another is asked for; a handle from before a fork is not used."""
        if self.opened and self.opened[:2] == (path, os.getpid()):
            return self.opened[2]
        try:
            import h5py
        except ImportError:
            raise InputError(f"{path}: needs h5py to be read; pip install h5py") from None
        try:
            volume = h5py.File(path, "r")
        except OSError as e:
            raise InputError(f"{path}: truncated or not HDF5 ({e}); copy it again") from None
        for key in ("image", "label"):
            if not isinstance(volume.get(key), h5py.Dataset):
                raise InputError(f"{path}: no '{key}' in it; a test volume holds 'image' and 'label', [D, H, W] each")
        self.opened = path, os.getpid(), volume
        return volume

    def read_slice(self, path, number):
        volume = self.open_volume(path)
        try:
            return volume["image"][number], volume["label"][number]
        except (OSError, RuntimeError, ValueError, IndexError) as e:
            raise InputError(f"{path}: slice {number} cannot be read ({e}); copy the file again") from None


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as text ({e}); check the path and write it as UTF-8") from None


def read_npz(path):
    """-> image, label, as they lie in the .npz."""
    try:
        with np.load(path, allow_pickle=False) as f:
            missing = [key for key in ("image", "label") if key not in f.files]
            if not missing:
                return f["image"], f["label"]
    except Exception as e:  # damaged bytes make zipfile and numpy raise nearly anything
        raise InputError(f"{path}: truncated or not an .npz of plain arrays ({e}); copy it again") from None
    raise InputError(f"{path}: .npz without '{missing[0]}'; a slice holds 'image' and 'label', [H, W] each")


def check_slice(image, label, path, classes):
    """-> image as it is, label as uint8; InputError unless both are [H, W], finite and within their ranges."""
    for name, x in (("image", image), ("label", label)):
        if x.ndim != 2 or not x.size or x.dtype.kind not in "fiub":
            raise InputError(f"{path}: {name} is {x.dtype} {list(x.shape)}, but should be numbers [H, W]; "
                             "store one gray slice")
        if not np.isfinite(x).all():
            raise InputError(f"{path}: {name} holds NaN or infinity; replace these values")
    if image.shape != label.shape:
        raise InputError(f"{path}: image {image.shape} and label {label.shape} differ in size; store the same slice")
    if image.min() < -0.01 or image.max() > 1.01:
        raise InputError(f"{path}: image runs from {image.min():g} to {image.max():g}, but should lie in [0, 1]; "
                         "clip HU to [-125, 275] and scale that to [0, 1]")
    ids = np.unique(label)
    bad = [i for i in ids if not (0 <= i <= classes and i == int(i))]
    if bad:
        raise InputError(f"{path}: label id {bad[0]:g} is not one of 0..{classes}; BTCV's 13 ids must be mapped to the "
                         "eight: 1 2 3 4 6 7 8 11 -> 1 2 3 4 5 6 7 8, the others 0")
    return image, label.astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Demo: abdominal CT slices, drawn (demo.py)

class Demo:
    """Drawn abdominal CT slices on a 256 x 256 grid; image i of a split depends on (seed, split, i) and knobs.

    overlap: 0..1, pulls the organs towards each other, the front one wins. contrast: factor on the difference between
    organs and what lies behind them. size: factor on the organs' size. n: images (train 160, val 16, test 32).
    Spleen, liver, kidneys, bowel and vessels overlap in brightness, and each organ is absent in 15 % of the images.
    """
    name, classes, modality = "demo", CLASSES, "ct"

    def __init__(self, split="train", image_size=256, seed=0, n=None, overlap=0.3, contrast=1.0, size=1.0):
        for knob, value, good in (("overlap", overlap, 0 <= overlap <= 1), ("contrast", contrast, 0 <= contrast <= 10),
                                  ("size", size, 0 < size <= 3), ("n", n, n is None or n > 0)):
            if not good:
                raise InputError(f"demo's {knob} {value}: out of range; overlap 0..1, contrast 0..10, size 0..3, n > 0")
        self.split, self.image_size, self.seed = split, image_size, seed
        self.overlap, self.contrast, self.size = overlap, contrast, size
        self.items = list(range(n or {"train": 160, "val": 16, "test": 32}[split]))
        self.cases = [f"{split}{i:04d}" for i in self.items]
        self.keys = [f"{case}_slice000" for case in self.cases]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        rng = seeded("demo", self.seed, self.split, self.items[i])
        image, label = draw(rng, self.classes, self.overlap, self.contrast, self.size)
        return make_sample(image, label, self.classes, self.image_size, modality="ct", case=self.cases[i], slice=0)


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
# Texts

def load_attributes(name, path=HERE / "attributes.json"):
    """-> {class: {"position": [wordings], "texture": [...], "shape": [...]}} of data set `name`, from a JSON file.

    A string in place of a data set's entry names the data set whose texts it shares.
    """
    try:
        entries = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: not JSON ({e}); correct it") from None
    texts = entries.get(name) if isinstance(entries, dict) else None
    texts = entries.get(texts) if isinstance(texts, str) else texts
    form = '{"position": ["..."], "texture": ["..."], "shape": ["..."]}'
    if not isinstance(texts, dict):
        raise InputError(f'{path}: no texts for data set {name}; add "{name}": {{"<class>": {form}, ...}}')
    for target in dict.fromkeys([*(CLASSES if name in DATASETS else ()), *texts]):
        if not isinstance(texts.get(target), dict):
            raise InputError(f'{path}: no texts for {name}\'s class {target}; add under "{name}": "{target}": {form}')
        for kind in ATTRIBUTES:
            wordings = texts[target].get(kind)
            good = isinstance(wordings, list) and wordings and all(isinstance(w, str) and w.strip() for w in wordings)
            if not good:
                raise InputError(f'{path}: {name}, {target}, {kind}: empty or blank; give "{kind}": ["..."], '
                                 "a list of texts")
    return texts


def attribute_texts(attributes, target, rng=None):
    """-> {"position": str, "texture": str, "shape": str}: the first wordings, or with rng a random one of each."""
    if target not in attributes:
        raise InputError(f"{target}: no texts for it; known targets are {', '.join(attributes)}")
    return {kind: attributes[target][kind][0 if rng is None else rng.integers(len(attributes[target][kind]))]
            for kind in ATTRIBUTES}


# ---------------------------------------------------------------------------------------------------------------------
# Batches

@dataclass
class Batch:
    images: torch.Tensor  # uint8 [B, 3, S, S], RGB
    index: torch.Tensor  # int64 [M]: the image of each target
    masks: torch.Tensor  # bool [M, S, S]
    texts: list  # M dicts of position, texture, shape
    targets: list  # M class names
    points: tuple | None = None  # (float32 [M, N, 2] (x, y), int64 [M, N])
    boxes: torch.Tensor | None = None  # float32 [M, 4]

    def to(self, device):
        """The Batch with the tensors that a decoder reads on `device`; images stay."""
        move = lambda x: None if x is None else x.to(device)
        return replace(self, index=move(self.index), masks=move(self.masks), boxes=move(self.boxes),
                       points=self.points and tuple(map(move, self.points)))


def draw_targets(present, rng, max_targets, absent):
    """present bool [T] -> up to max_targets distinct indices; each is an absent class with probability `absent`."""
    there, gone = (list(rng.permutation(np.flatnonzero(p))) for p in (present, ~present))
    drawn = []
    for _ in range(max_targets):
        pool = gone if gone and rng.random() < absent else there
        drawn += [pool.pop()] if pool else []
    return drawn


def make_batch(samples, attributes, rng, max_targets=4, absent=0.25):
    """Samples -> Batch of targets, drawn per image, with texts in random wordings and no prompts yet.

    absent: the probability of drawing a structure that the image lacks; its empty mask teaches to say no. M can be 0
    where there is nothing to draw.
    """
    size = samples[0].masks.shape[-1]
    index, masks, targets = [], [], []
    for b, sample in enumerate(samples):
        for t in draw_targets(sample.masks.any((1, 2)), rng, max_targets, absent):
            index, masks, targets = index + [b], masks + [sample.masks[t]], targets + [sample.targets[t]]
    return Batch(images=torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).contiguous(),
                 index=torch.tensor(index, dtype=torch.int64),
                 masks=torch.from_numpy(np.array(masks, bool).reshape(-1, size, size)),
                 texts=[attribute_texts(attributes, target, rng) for target in targets], targets=targets)


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

"""The data sets, as their owners publish them: each class here lists the images of one and reads one at a time.

All have the same few names, so that data.py can treat them alike:

    name, classes       of the data set; classes is a tuple of names
    pairs               (class, modality), as they occur: the texts that are needed
    volumes             True: the images of a case are the slices of one volume, in order, and are scored together
    len(source)         images of the split
    source.key(i)       the name of image i, unique in the data set
    source.case(i)      the patient or volume that it belongs to
    source.spacing(case)    of volumes: (z, y, x), the mm between voxels; None where nobody knows
    source.read(i)      the Picture; InputError, in one line that names the file, for anything wrong with it

Nothing is ever unpickled.
"""
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from common import InputError, read_text, seeded
from demo import draw

# TransUNet's ids 1..8, in order; 0 is background
ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
# the benchmark's 12 test cases; a checkpoint is never chosen by them, so three of the 18 others are held out
TEST_CASES = ("0001", "0002", "0003", "0004", "0008", "0022", "0025", "0029", "0032", "0035", "0036", "0038")
VAL_CASES = ("0010", "0028", "0037")
# SAM-Med2D leaves out masks below this share of the image: 100 pixels at 256 x 256
SMALLEST = 0.00153
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class Picture:
    """One image on its own grid with the masks drawn on it."""
    image: np.ndarray  # uint8 [H,W] or [H,W,3] (RGB), or float [H,W] in [0, 1]
    masks: np.ndarray  # bool [T,H,W], none of them empty
    targets: tuple  # T class names; with instances the same name more than once
    absent: tuple  # classes that were looked for here and are not here
    modality: str  # ct, mr, pet, ultrasound, x-ray, endoscopy, dermoscopy, fundus


def from_labels(image, label, classes, modality):
    """image [H,W], label uint8 [H,W], where i + 1 stands for classes[i] -> Picture."""
    ids = [i for i in np.unique(label) if i]
    return Picture(image, label == np.array(ids, np.uint8).reshape(-1, 1, 1), tuple(classes[i - 1] for i in ids),
                   tuple(c for i, c in enumerate(classes, 1) if i not in ids), modality)


def without_small(picture):
    """The Picture without masks below SMALLEST; what they show is then neither a target nor absent."""
    keep = picture.masks.sum((1, 2)) >= SMALLEST * picture.masks[0].size if len(picture.masks) else []
    return replace(picture, masks=picture.masks[keep], targets=tuple(t for t, k in zip(picture.targets, keep) if k))


def split_cases(cases, split):
    """The cases of "train", "val" or "test": a fifth to test on, as the paper has it, and a twelfth of all held out for
    validation, drawn by a hash of the names; at least one each if there are three. Sorted."""
    cases = sorted(set(cases), key=lambda case: (hashlib.blake2b(case.encode()).digest(), case))
    test = max(round(0.2 * len(cases)), len(cases) > 2)
    val = test + max(round(len(cases) / 12), len(cases) > 1)
    return sorted({"test": cases[:test], "val": cases[test:val], "train": cases[val:]}[split])


def read_image(path, mode):
    """An 8-bit PNG or JPEG -> uint8 [H,W,3] ("RGB") or [H,W] ("L")."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise InputError(f"{path}: pixels of kind {image.mode}, but should be 8 bits gray or RGB; convert it")
            return np.array(image.convert(mode))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; restore the file, or take it out of the data set") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path}: truncated or not an image ({e}); copy it again") from None


def read_mask(path):
    """A PNG or JPEG of 0 and 255, with JPEG's noise, or of 0 and 1 -> bool [H,W]."""
    mask = read_image(path, "L")
    return mask > (127 if mask.max(initial=0) > 1 else 0)


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
    name, classes, volumes = "synapse", ORGANS, True
    pairs = tuple((organ, "ct") for organ in ORGANS)

    def __init__(self, root, split):
        self.root, self.opened, self.spacings = Path(root), None, None
        if not self.root.is_dir():
            raise InputError(f"{root}: no such folder; give the one that holds train_npz and test_vol_h5 "
                             "with --data DIR (README: how to get the data)")
        if split == "test":
            cases = self.named("test_vol", "test_vol_h5", ".npy.h5")
            self.items = [item for case in cases for item in self.volume_items(case)]
        else:
            self.items = self.train_or_val(split)

    def __len__(self):
        return len(self.items)

    def case(self, i):
        return self.items[i][0]

    def key(self, i):
        return f"{self.items[i][0]}_slice{self.items[i][1]:03d}"

    def spacing(self, case):
        """(z, y, x) in mm where `data.py prepare` has left it, else None: TransUNet's files do not hold it."""
        if self.spacings is None:
            path = self.root / "spacing.json"
            try:
                self.spacings = json.loads(read_text(path)) if path.is_file() else {}
            except json.JSONDecodeError:
                raise InputError(f"{path}: damaged; prepare the data again, or delete it: distances are then in voxels "
                                 "alone") from None
        return self.spacings.get(case)

    def read(self, i):
        _, number, path = self.items[i]
        image, label = self.read_slice(path, number) if path.suffix == ".h5" else read_npz(path)
        image, label = check_slice(image, label, path, len(self.classes))
        return from_labels(np.asarray(image, np.float32), label, self.classes, "ct")

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
# KiTS19

class KiTS19:
    """Kidneys and their tumors on CT, as `python data.py prepare kits19 RAW` lays the challenge's volumes out:

    root/case_00000/image.npy, label.npy   uint8 [D,H,W], mapped into memory; 1 kidney, 2 tumor
    root/case_00000/case.json              shape, spacing (z, y, x) in mm, pixels of each label per slice and axis

    axes "xyz": slices along all three axes as independent images, as the paper has it, with the rules of SAM-Med2D:
    masks below 0.153 % of a slice are left out, slices without a mask too, and so is an axis along which the shorter
    side of the slices is below half the longer one. axes "z": every axial slice, and they are scored as volumes.
    """
    name, classes = "kits19", ("kidney", "kidney tumor")
    pairs = (("kidney", "ct"), ("kidney tumor", "ct"))

    def __init__(self, root, split, axes="xyz"):
        if axes not in ("xyz", "z"):
            raise InputError(f"--axes {axes}: choose xyz, slices along the three axes, or z, axial slices only")
        self.root, self.volumes, self.opened = Path(root), axes == "z", None
        cases = [path.parent.name for path in self.root.glob("case_*/case.json")]
        if not cases:
            raise InputError(f"{root}: holds no case_*/case.json; turn the challenge's NIfTI volumes into it once "
                             f"with: python data.py prepare kits19 RAW --out {root}")
        chosen = split_cases(cases, split)
        if not chosen:
            raise InputError(f"{root}: {len(cases)} case(s) leave none for {split}; prepare at least three")
        self.items = [item for case in chosen for item in self.slices(case, axes)]

    def slices(self, case, axes):
        """(case, axis, number) of its slices, and nothing but its case.json is read for that."""
        path = self.root / case / "case.json"
        try:
            record = json.loads(read_text(path))
            shape, areas = record["shape"], record["areas"]
            if axes == "z":
                return [(case, 0, number) for number in range(shape[0])]
            items = []
            for axis, letter in enumerate("zyx"):
                sides = [n for a, n in enumerate(shape) if a != axis]
                if 2 * min(sides) >= max(sides):
                    large = (np.array(areas[letter]) >= SMALLEST * sides[0] * sides[1]).any(0)
                    items += [(case, axis, int(number)) for number in np.flatnonzero(large)]
            return items
        except (KeyError, IndexError, TypeError, ValueError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"{path}: damaged ({type(e).__name__}); delete the folder and prepare the case "
                             "again") from None

    def __len__(self):
        return len(self.items)

    def __getstate__(self):
        return {**self.__dict__, "opened": None}

    def case(self, i):
        return self.items[i][0]

    def spacing(self, case):
        """(z, y, x) in mm."""
        return json.loads(read_text(self.root / case / "case.json"))["spacing"]

    def key(self, i):
        case, axis, number = self.items[i]
        return f"{case}--{'zyx'[axis]}_{number:04d}"

    def read(self, i):
        case, axis, number = self.items[i]
        if not self.opened or self.opened[0] != case:
            self.opened = case, *(self.open_volume(case, kind) for kind in ("image", "label"))
        where = (slice(None),) * axis + (number,)
        image, label = (volume[where] for volume in self.opened[1:])
        label = np.ascontiguousarray(label)
        if label.max() > 2:
            raise InputError(f"{self.root / case / 'label.npy'}: label {label.max()} in {self.key(i)}, but only 0, 1 "
                             "and 2 exist; prepare the case again")
        picture = from_labels(np.ascontiguousarray(image), label, self.classes, "ct")
        return picture if self.volumes else without_small(picture)

    def open_volume(self, case, kind):
        path, shape = self.root / case / f"{kind}.npy", json.loads(read_text(self.root / case / "case.json"))["shape"]
        try:
            volume = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise InputError(f"{path}: missing or truncated ({e}); delete the folder and prepare the case "
                             "again") from None
        if volume.dtype != np.uint8 or list(volume.shape) != shape:
            raise InputError(f"{path}: is {volume.dtype} {list(volume.shape)}, but case.json says uint8 {shape}; "
                             "delete the folder and prepare the case again")
        return volume


# ---------------------------------------------------------------------------------------------------------------------
# Kvasir-SEG

class Kvasir:
    """Polyps in colonoscopy, as Kvasir-SEG is published: root/images/NAME.jpg and root/masks/NAME.jpg.

    The pictures carry no patient's name, so each is a case of its own. root/train.txt and root/test.txt, one NAME a
    line, are the split where both are there (the owners' 880 and 120: their val.txt is the test.txt here); or else a
    fifth is drawn to test on.
    """
    name, classes, volumes, pairs = "kvasir", ("polyp",), False, (("polyp", "endoscopy"),)

    def __init__(self, root, split):
        self.root = Path(root)
        self.files = {p.stem: p.name for p in (self.root / "images").glob("*") if p.suffix.lower() in SUFFIXES}
        if not self.files:
            raise InputError(f"{self.root / 'images'}: holds no .jpg or .png; is --data {root} the folder with "
                             "Kvasir-SEG's images/ and masks/?")
        if all((self.root / f"{kind}.txt").is_file() for kind in ("train", "test")):
            train = self.listed("train")
            val = split_cases(train, "val") or train[:1]
            self.items = dict(test=self.listed("test"), val=val, train=sorted(set(train) - set(val)))[split]
        else:
            self.items = split_cases(self.files, split)
        if not self.items:
            raise InputError(f"{root}: {len(self.files)} image(s) leave none for {split}; add more")

    def listed(self, kind):
        path = self.root / f"{kind}.txt"
        names = sorted({Path(line.strip()).stem for line in read_text(path).splitlines() if line.strip()})
        missing = [name for name in names if name not in self.files]
        if missing or not names:
            raise InputError(f"{path}: names {missing[0] if missing else 'no file'}, which is not in images/; correct "
                             "it, or delete train.txt and test.txt to have a fifth drawn to test on")
        return names

    def __len__(self):
        return len(self.items)

    def case(self, i):
        return self.items[i]

    key = case

    def read(self, i):
        name = self.files[self.items[i]]
        image, mask = read_image(self.root / "images" / name, "RGB"), read_mask(self.find_mask(name))
        if mask.shape != image.shape[:2]:
            raise InputError(f"{self.find_mask(name)}: {list(mask.shape)}, but its image is {list(image.shape[:2])}; "
                             "store both on one grid")
        if not mask.any():
            raise InputError(f"{self.find_mask(name)}: empty, but every image of Kvasir-SEG shows a polyp; restore it")
        return from_labels(image, mask.astype(np.uint8), self.classes, "endoscopy")

    def find_mask(self, name):
        """The mask may be a .png where the image is a .jpg."""
        same = self.root / "masks" / name
        return next((p for p in (same, *(same.with_suffix(s) for s in SUFFIXES)) if p.is_file()), same)


# ---------------------------------------------------------------------------------------------------------------------
# Demo: abdominal CT slices, drawn (demo.py)

class Demo:
    """Drawn abdominal CT slices on a 256 x 256 grid; image i of a split depends on (seed, split, i) and knobs.

    overlap: 0..1, pulls the organs towards each other, the front one wins. contrast: factor on the difference between
    organs and what lies behind them. size: factor on the organs' size. n: images (train 160, val 16, test 32).
    Spleen, liver, kidneys, bowel and vessels overlap in brightness, and each organ is absent in 15 % of the images.
    """
    name, classes, volumes = "demo", ORGANS, True
    pairs = tuple((organ, "ct") for organ in ORGANS)

    def __init__(self, split="train", seed=0, n=None, overlap=0.3, contrast=1.0, size=1.0):
        for knob, value, good in (("overlap", overlap, 0 <= overlap <= 1), ("contrast", contrast, 0 <= contrast <= 10),
                                  ("size", size, 0 < size <= 3), ("n", n, n is None or n > 0)):
            if not good:
                raise InputError(f"demo's {knob} {value}: out of range; overlap 0..1, contrast 0..10, size 0..3, n > 0")
        self.split, self.seed = split, seed
        self.overlap, self.contrast, self.size = overlap, contrast, size
        self.n = n or {"train": 160, "val": 16, "test": 32}[split]

    def __len__(self):
        return self.n

    def case(self, i):
        return f"{self.split}{i:04d}"

    def spacing(self, case):
        return None  # drawn, not scanned

    def key(self, i):
        return f"{self.split}{i:04d}_slice000"

    def read(self, i):
        rng = seeded("demo", self.seed, self.split, i)
        return from_labels(*draw(rng, self.classes, self.overlap, self.contrast, self.size), self.classes, "ct")


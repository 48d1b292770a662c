"""Synapse (BTCV in the layout of TransUNet): abdominal CT with eight organs."""
import os
import re
from pathlib import Path

import numpy as np

from common import InputError, read_json, read_text, visible
from readers import Listed, check_spacing
from readers.pictures import from_labels

# TransUNet's ids 1..8, in order; 0 is background
ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
# the benchmark's 12 test cases; a checkpoint is never chosen by them, so three of the 18 others are held out
TEST_CASES = ("0001", "0002", "0003", "0004", "0008", "0022", "0025", "0029", "0032", "0035", "0036", "0038")
VAL_CASES = ("0010", "0028", "0037")


class Synapse(Listed):
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
        self.root, self.spacings = Path(root), None
        if split == "test":
            cases = self.named("test_vol", "test_vol_h5", ".npy.h5")
            self.items = [item for case in cases for item in self.volume_items(case)]
        else:
            self.items = self.train_or_val(split)

    def key(self, i):
        return f"{self.items[i][0]}_slice{self.items[i][1]:03d}"

    def file(self, i):
        return self.items[i][2]

    def spacing(self, case):
        """(z, y, x) in mm where `data.py prepare` has left it, else None: TransUNet's files do not hold it."""
        path = self.root / "spacing.json"
        remedy = "prepare the data again, or delete it: distances are then in voxels alone"
        if self.spacings is None:
            self.spacings = read_json(path, remedy) if path.is_file() else {}
        mm = self.spacings.get(case)
        return None if mm is None else check_spacing(mm, case, path, remedy)

    def read(self, i):
        _, number, path = self.items[i]
        image, label = self.read_slice(path, number) if path.suffix == ".h5" else read_npz(path)
        image, label = check_slice(image, label, path, len(self.classes))
        return from_labels(np.asarray(image, np.float32), label, self.classes, "ct")

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
        here = {p.name.removesuffix(suffix) for p in visible(self.root / folder, "*" + suffix)}
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
        import h5py  # only those who read volumes wait for it
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

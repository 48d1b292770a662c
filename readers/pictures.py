"""What the readers of all data sets share: the RawSample that they return, how cases are split, PNG and JPEG files."""
import hashlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from common import InputError

SPLITS = ("train", "val", "test")
MODALITIES = ("ct", "mr", "pet", "ultrasound", "x-ray", "endoscopy", "dermoscopy", "fundus")  # the paper's eight
# SAM-Med2D leaves out masks below this share of the image: 100 pixels at 256 x 256
SMALLEST = 0.00153
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class RawSample:
    """One image on its own grid with the masks drawn on it."""
    image: np.ndarray  # uint8 [H,W] or [H,W,3] (RGB), or float [H,W] in [0, 1]
    masks: np.ndarray  # bool [T,H,W], none of them empty
    targets: tuple  # T class names; with instances the same name more than once
    absent: tuple  # classes that were looked for here and are not here
    modality: str  # one of MODALITIES, or "unknown"


def from_labels(image, label, classes, modality):
    """image [H,W], label uint8 [H,W], where i + 1 stands for classes[i] -> RawSample."""
    ids = [i for i in np.unique(label) if i]
    return RawSample(image, label == np.array(ids, np.uint8).reshape(-1, 1, 1), tuple(classes[i - 1] for i in ids),
                   tuple(c for i, c in enumerate(classes, 1) if i not in ids), modality)


def without_small(picture):
    """The RawSample without masks below SMALLEST; what they show is then neither a target nor absent."""
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
            stored = image.mode
            if stored in ("1", "L", "LA", "P", "RGB", "RGBA"):
                return np.array(image.convert(mode))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; restore the file, or take it out of the data set") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"{path}: truncated or not an image ({e}); copy it again") from None
    raise InputError(f"{path}: pixels of kind {stored}, but should be 8 bits gray or RGB; convert it")


def read_mask(path):
    """A PNG or JPEG of 0 and 255, with JPEG's noise, or of 0 and 1 -> bool [H,W]."""
    mask = read_image(path, "L")
    return mask > (127 if mask.max(initial=0) > 1 else 0)

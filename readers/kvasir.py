"""Kvasir-SEG: polyps in colonoscopy."""
from pathlib import Path

import numpy as np

from common import InputError, read_text, visible
from readers.pictures import SUFFIXES, from_labels, read_image, read_mask, split_cases


class Kvasir:
    """Polyps in colonoscopy, as Kvasir-SEG is published: root/images/NAME.jpg and root/masks/NAME.jpg.

    The pictures carry no patient's name, so each is a case of its own. root/train.txt and root/test.txt, one NAME a
    line, are the split where both are there (the owners' 880 and 120: their val.txt is the test.txt here); or else a
    fifth is drawn to test on.
    """
    name, classes, volumes, pairs = "kvasir", ("polyp",), False, (("polyp", "endoscopy"),)

    def __init__(self, root, split):
        self.root = Path(root)
        self.files = {p.stem: p.name for p in visible(self.root / "images") if p.suffix.lower() in SUFFIXES}
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
        names = sorted({Path(line.strip()).stem for line in read_text(path).split("\n") if line.strip()})
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

    def file(self, i):
        return self.root / "images" / self.files[self.items[i]]

    def read(self, i):
        name = self.files[self.items[i]]
        image, mask = read_image(self.file(i), "RGB"), read_mask(self.find_mask(name))
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

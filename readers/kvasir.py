"""Kvasir-SEG: polyps in colonoscopy."""
from pathlib import Path

import numpy as np

from common import InputError, read_text, visible
from readers.folder import hold_out
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
        self.files, self.masks = (pictures_of(self.root / kind) for kind in ("images", "masks"))
        if not self.files:
            raise InputError(f"{self.root / 'images'}: holds no .jpg or .png; is --data {root} the folder with "
                             "Kvasir-SEG's images/ and masks/?")
        self.problems = []  # of the files as a whole, for data.py stats
        if all((self.root / f"{kind}.txt").is_file() for kind in ("train", "test")):
            train, test = self.listed("train"), self.listed("test")
            both, neither = sorted(set(train) & set(test)), sorted(self.files.keys() - {*train, *test})
            if both:
                raise InputError(f"{self.root / 'test.txt'}: names {both[0]}, and so does train.txt; take it out of "
                                 "one of them")
            if neither:
                self.problems.append(f"{self.root / 'images' / self.files[neither[0]]}, one of {len(neither)} that "
                                     "neither train.txt nor test.txt names: is not used; add it to one of them")
            self.items = (hold_out(train) | dict(test=test))[split]
        else:
            self.items = split_cases(self.files, split)
        if not self.items:
            raise InputError(f"{root}: {len(self.files)} image(s) leave none for {split}; add more")

    def listed(self, kind):
        path = self.root / f"{kind}.txt"
        lines = (line.strip() for line in read_text(path).split("\n"))
        names = sorted({line if line in self.files else Path(line).stem for line in lines if line})
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
        name = self.items[i]
        path = self.root / "masks" / self.masks.get(name, self.files[name])  # a .png may go with a .jpg
        image, mask = read_image(self.file(i)), read_mask(path)
        if mask.shape != image.shape[:2]:
            raise InputError(f"{path}: {list(mask.shape)}, but its image is {list(image.shape[:2])}; store both on one "
                             "grid")
        if mask.all() or not mask.any():
            raise InputError(f"{path}: {'full' if mask.any() else 'empty'}, but every image of Kvasir-SEG shows a "
                             "polyp and what lies around it; restore the mask")
        return from_labels(image, mask.astype(np.uint8), self.classes, "endoscopy")


def pictures_of(folder):
    """{name without its suffix: file name} of the pictures in a folder, but hidden ones."""
    found = {}
    for path in visible(folder):
        if path.suffix.lower() in SUFFIXES and found.setdefault(path.stem, path.name) != path.name:
            raise InputError(f"{path}: {found[path.stem]} has the same name but for its suffix; rename one of them")
    return found

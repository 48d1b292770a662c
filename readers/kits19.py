"""KiTS19: kidneys and their tumors on CT, slices along three axes or whole volumes."""
from pathlib import Path

import numpy as np

from common import InputError, read_json
from readers import Listed, check_spacing
from readers.pictures import SMALLEST, from_labels, split_cases, without_small


AGAIN = "delete the folder and prepare the case again"


class KiTS19(Listed):
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
        self.root, self.volumes, self.records = Path(root), axes == "z", {}
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
        record = read_json(path, AGAIN)
        try:
            shape, areas = record["shape"], record["areas"]
            self.records[case] = shape, record["spacing"]
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
            raise InputError(f"{path}: damaged ({type(e).__name__}); {AGAIN}") from None

    def spacing(self, case):
        """(z, y, x) in mm."""
        return check_spacing(self.records[case][1], case, self.root / case / "case.json", AGAIN)

    def key(self, i):
        case, axis, number = self.items[i]
        return f"{case}--{'zyx'[axis]}_{number:04d}"

    def file(self, i):
        return self.root / self.case(i) / "image.npy"

    def read(self, i):
        case, axis, number = self.items[i]
        if not self.opened or self.opened[0] != case:
            self.opened = case, self.open_volume(case, "image"), self.open_volume(case, "label")
        where = (slice(None),) * axis + (number,)
        image, label = (volume[where] for volume in self.opened[1:])
        label = np.ascontiguousarray(label)
        if label.max() > 2:
            raise InputError(f"{self.root / case / 'label.npy'}: label {label.max()} in {self.key(i)}, but only 0, 1 "
                             "and 2 exist; prepare the case again")
        picture = from_labels(np.ascontiguousarray(image), label, self.classes, "ct")
        return picture if self.volumes else without_small(picture)

    def open_volume(self, case, kind):
        path, shape = self.root / case / f"{kind}.npy", self.records[case][0]
        try:
            volume = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise InputError(f"{path}: missing or truncated ({e}); {AGAIN}") from None
        if volume.dtype != np.uint8 or list(volume.shape) != shape:
            raise InputError(f"{path}: is {volume.dtype} {list(volume.shape)}, but case.json says uint8 {shape}; "
                             f"{AGAIN}")
        return volume

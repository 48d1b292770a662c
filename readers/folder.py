"""One's own data, in nnU-Net's raw layout: NIfTI volumes or pictures."""
import glob
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from common import MODALITIES, InputError, alone_in, make_folder, read_json, read_text, visible, whole
from readers import Listed
from readers.pictures import (NOISY, SUFFIXES, RawSample, deep_values, is_deep, opaque, opened, read_image, split_cases,
                              to_pixels, unreadable)

VERSION = 1  # of the prepared volumes: others are made anew
# what a channel's name begins with -> its modality
PREFIXES = {**dict(zip(MODALITIES, MODALITIES)), "t1": "mr", "t2": "mr", "flair": "mr", "adc": "mr", "dwi": "mr",
            "us": "ultrasound", "xray": "x-ray", "colonoscopy": "endoscopy"}


class Folder(Listed):
    """Images with their labels, as nnU-Net takes them:

    root/dataset.json        channel_names {"0": "CT"}, labels {"background": 0, "liver": 1, ...}, file_ending ".nii.gz"
    root/imagesTr/CASE_0000.nii.gz, root/labelsTr/CASE.nii.gz    or .nii; or pictures, such as .png
    root/imagesTs, root/labelsTs                                 to test on, if they are there
    root/splits_final.json                                       nnU-Net's folds, if they are there

    The slices of a volume are axial, upright, uint8: CT from -125 to 275 HU, others from the 0.5th to the 99.5th
    percentile. What dataset.json says besides, and nnU-Net passes over: "window": [LOW, HIGH] for volumes, "modality":
    one of pictures.MODALITIES, and "channel": which of several to read. Volumes are decoded once, into root/prepared,
    whose files are mapped into memory.

    A class may be a region, a list of ids. Where regions overlap, no label map can hold them, and the slices of a
    volume are independent images. Of an image with the label "ignore" nothing is known: it has neither targets nor
    absent ones.

    fold: of splits_final.json. With test images its two parts are for training and validation; without, its validation
    cases are for testing, since a checkpoint is chosen by validation, and that has a twelfth of the others. Without
    folds the cases are split as pictures.split_cases does. `problems`: files that are not used, a line each.
    """
    name = "folder"

    def __init__(self, root, split, fold=0):
        self.root, self.problems = Path(root), []
        where = self.root / "dataset.json"
        if not where.is_file():
            raise InputError(f"{where}: missing; write one as nnU-Net has it, see docs/own-data.md, or correct --data")
        self.about = read_json(where)
        self.ids, self.ignore = read_classes(self.about.get("labels"), where)
        self.classes = tuple(self.ids)
        self.ending = str(self.about.get("file_ending", ".nii.gz"))
        if self.ending.lower() not in (".nii", ".nii.gz", *SUFFIXES):
            raise InputError(f'{where}: file_ending "{self.ending}": read are .nii.gz, .nii and pictures, such as '
                             ".png; convert the files")
        self.nifti = self.ending.lower().startswith(".nii")
        apart = sum(map(len, self.ids.values())) == len(set().union(*self.ids.values()))
        self.volumes = self.nifti and apart
        self.channel, self.modality, self.window = read_channel(self.about, self.nifti, where)
        self.pairs = tuple((target, self.modality) for target in self.classes)
        chosen = self.split(split, fold)
        if not chosen:
            raise InputError(f"{root}: its cases leave none for {split}; add some")
        kind = "Ts" if split == "test" and self.tested else "Tr"
        self.paths = {case: self.paths_of(case, kind) for case in chosen}
        self.items = [(case, z) for case in chosen for z in range(self.depth(case) if self.nifti else 1)]

    # -----------------------------------------------------------------------------------------------------------------
    # Which cases there are

    def split(self, split, fold):
        """The cases of a split, sorted."""
        cases, self.tested = self.cases("Tr"), self.cases("Ts") if (self.root / "labelsTs").is_dir() else []
        path = self.root / "splits_final.json"
        if path.is_file():
            parts = read_fold(path, fold, cases)
            if unused := sorted(set(cases).difference(*parts.values())):
                self.problems.append(f"{path}: {unused[0]}, one of {len(unused)} in neither part of fold {fold}, is "
                                     "not used; add it to one of them")
            if not self.tested:
                parts = hold_out(parts["train"]) | dict(test=parts["val"])
        elif self.tested:
            parts = hold_out(cases)
        else:
            return split_cases(cases, split)
        if self.tested:
            parts["test"] = self.tested
        if both := sorted(set(parts["train"]) & set(parts["test"])):
            raise InputError(f"{self.root / 'imagesTs'}: holds {both[0]}, which is trained on as well; take it away, "
                             "or rename it if it is another patient")
        return sorted(set(parts[split]))  # a case that is named twice counts once

    def cases(self, kind):
        """The names of the cases in images`kind`, sorted; of "Ts" those with a label."""
        folder, cases = self.root / f"images{kind}", set()
        for path in visible(folder):
            match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(self.ending)}", path.name)
            if not match:
                self.problems.append(f"{path}: is not called CASE_0000{self.ending}: is not used; rename it")
            elif int(match[2]) and "channel" not in self.about:
                raise InputError(f"{path}: a second channel, but the model sees one image at a time; choose one with "
                                 f'"channel": 0 or {int(match[2])} in {self.root / "dataset.json"}')
            else:
                cases.add(match[1])
        labels = visible(self.root / f"labels{kind}", "*" + self.ending)
        labels = {path.name.removesuffix(self.ending) for path in labels}
        for case in sorted(labels - cases):
            self.problems.append(f"{self.paths_of(case, kind)[1]}: has no image {case}_{self.channel:04d}{self.ending} "
                                 f"in {folder}: is not used; restore it, or take the label away")
        if not cases:
            raise InputError(f"{folder}: holds no CASE_0000{self.ending}, as nnU-Net's raw data have it "
                             "(docs/own-data.md); rename the images, or correct file_ending in dataset.json")
        return sorted(cases & labels if kind == "Ts" else cases)

    def paths_of(self, case, kind):
        """-> the paths of its image, of its label, and of the prepared volume, whose name changes whenever those do."""
        image = self.root / f"images{kind}" / f"{case}_{self.channel:04d}{self.ending}"
        label = self.root / f"labels{kind}" / f"{case}{self.ending}"
        made_of = [VERSION, image.name, self.modality, self.window, self.ids, self.ignore]
        made_of += [(path.stat().st_size, path.stat().st_mtime_ns) for path in (image, label) if path.is_file()]
        digest = hashlib.blake2b(repr(made_of).encode(), digest_size=8).hexdigest()
        return image, label, self.root / "prepared" / image.parent.name / f"{case}-{digest}.npy"

    def depth(self, case):
        """How many axial slices its volume has; 1 where that cannot be read, and read() will say what is wrong."""
        from readers.volumes import read_grid  # here and below: only those who read volumes wait for nibabel
        try:
            return read_grid(self.paths[case][0]).shape[0]
        except InputError:
            return 1

    # -----------------------------------------------------------------------------------------------------------------
    # One image

    def key(self, i):
        case, z = self.items[i]
        return f"{case}_slice{z:03d}" if self.nifti else case

    def spacing(self, case):
        """(z, y, x) in mm."""
        from readers.volumes import read_grid
        return read_grid(self.paths[case][0]).spacing

    def file(self, i):
        return self.paths[self.case(i)][2 if self.nifti else 0]

    def read(self, i):
        case, z = self.items[i]
        if self.nifti:
            image, label = (np.array(volume[z]) for volume in self.open_volume(case))
        else:
            image, label = self.read_pictures(*self.paths[case][:2])
        found = set(np.unique(label).tolist())
        here = {target: sorted(found & ids) for target, ids in self.ids.items()} if self.ignore not in found else {}
        masks = [np.isin(label, ids) for ids in here.values() if ids]
        return RawSample(image, np.array(masks, bool).reshape(-1, *label.shape), tuple(t for t in here if here[t]),
                         tuple(t for t in here if not here[t]), self.modality)

    def read_pictures(self, image, label):
        pixels, ids = read_image(image), read_ids(label)
        if ids.shape != pixels.shape[:2]:
            raise InputError(f"{label}: {list(ids.shape)}, but its image is {list(pixels.shape[:2])}; store both on "
                             "one grid")
        return pixels, self.checked(ids, label)

    def open_volume(self, case):
        """uint8 [2,D,H,W], image and ids, mapped into memory. What is wrong with a volume is said of each of its
        slices, and found out once."""
        if not self.opened or self.opened[0] != case:
            try:
                self.opened = case, self.prepared(case)
            except InputError as e:
                self.opened = case, e
        if isinstance(self.opened[1], InputError):
            raise self.opened[1]
        return self.opened[1]

    def prepared(self, case):
        image, label, path = self.paths[case]
        for file in (image, label):
            if not file.is_file():
                raise unreadable(file, FileNotFoundError())
        with alone_in(image):  # another process may be at it
            if not path.is_file():
                self.prepare(image, label, path)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise InputError(f"{path}: truncated ({e}); delete it, it is made anew") from None

    def prepare(self, image, label, path):
        """Decodes an image and its label to `path`."""
        from readers.prepare import read_image, read_label, read_pair
        from readers.volumes import WINDOWS, read_nifti
        grids = read_pair(image, label)
        if self.modality == "ct" and not self.window:
            values = read_image(grids[0], WINDOWS["synapse"], np.uint8, "store HU, or give "
                                f'"window": [LOW, HIGH] in {self.root / "dataset.json"}')
        else:
            values = read_nifti(image, self.window, self.modality)[0]
        ids = self.checked(read_label(grids[1], np.arange(256, dtype=np.uint8), "store whole numbers"), label)
        make_folder(path.parent)
        for old in path.parent.glob(f"{glob.escape(path.stem[:-17])}-{'[0-9a-f]' * 16}.npy"):
            old.unlink(missing_ok=True)
        with whole(path) as file:
            np.save(file, np.stack([values, ids]))

    def checked(self, ids, path):
        """The ids as they are; InputError for one that dataset.json does not name."""
        unknown = set(np.unique(ids).tolist()).difference((0, self.ignore), *self.ids.values())
        if unknown:
            raise InputError(f"{path}: holds label {min(unknown)}, which dataset.json does not name; add it there, or "
                             "correct the file")
        return ids


# ---------------------------------------------------------------------------------------------------------------------
# dataset.json and splits_final.json

def read_classes(labels, path):
    """-> ({class: set of its ids}, the id of "ignore" or None), of "labels" in dataset.json: {name: id or list of ids};
    in that of nnU-Net's first version {id: name}."""
    if isinstance(labels, dict) and all(map(str.isdecimal, labels)):
        labels = {str(name): int(key) for key, name in labels.items()}
    ids = {name: value if isinstance(value, list) else [value]
           for name, value in (labels.items() if isinstance(labels, dict) else ())}
    if any(type(i) is not int or not 0 <= i < 256 for each in ids.values() for i in each):
        raise InputError(f'{path}: "labels" should be like {{"background": 0, "liver": 1}}, with whole numbers from 0 '
                         "to 255; correct it")
    ignore = next(iter(ids.pop("ignore", ())), None)
    ids = {name: set(each) for name, each in ids.items() if set(each) != {0}}
    if not ids or any(not each or each & {0, ignore} for each in ids.values()):
        raise InputError(f'{path}: "labels" should name one class or more besides the background, which is 0, and '
                         '"ignore", and none of them with the number of those; correct it')
    return ids, ignore


def read_channel(about, nifti, path):
    """-> (number of the channel, its modality, the window of its values or None), of what dataset.json says."""
    channel, modality, window = (about.get(key) for key in ("channel", "modality", "window"))
    if "channel" in about and (type(channel) is not int or not 0 <= channel < 10000):
        raise InputError(f'{path}: "channel" should be a number such as 0; correct it, or leave it out')
    names = about.get("channel_names") or modality  # called modality in nnU-Net's first version
    if not isinstance(modality, str):
        said = str(names.get(str(channel or 0), "")).lower() if isinstance(names, dict) else ""
        modality = next((found for start, found in PREFIXES.items() if said.startswith(start)), "unknown")
    elif modality not in MODALITIES:
        raise InputError(f'{path}: "modality": "{modality}": choose from {", ".join(MODALITIES)}')
    if window is not None:
        if not nifti:
            raise InputError(f'{path}: "window" is for volumes; pictures are shown as they are: leave it out')
        good = isinstance(window, list) and len(window) == 2 and all(type(x) in (int, float) for x in window)
        if not good or not window[0] < window[1]:
            raise InputError(f'{path}: "window" should be two numbers, [LOW, HIGH], black and white; correct it')
    return channel or 0, modality, window


def read_fold(path, fold, cases):
    """-> {"train": cases, "val": cases} of one fold of splits_final.json."""
    try:
        folds = json.loads(read_text(path))
        parts = {part: folds[fold][part] for part in ("train", "val")}
        unknown = sorted(set().union(*parts.values()) - set(cases))
    except IndexError:
        raise InputError(f"{path}: --fold {fold}: it has folds 0 to {len(folds) - 1}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f'{path}: damaged, or not [{{"train": [cases], "val": [cases]}}, ...] ({e}); copy nnU-Net\'s '
                         "again, or delete it") from None
    both = sorted(set(parts["train"]) & set(parts["val"]))
    if unknown or both:
        raise InputError(f"{path}: fold {fold} names {(unknown or both)[0]}, which "
                         + ("has no image in imagesTr" if unknown else "is in both parts") + "; correct it")
    return parts


def hold_out(cases):
    """Cases that may be trained on -> {"train", "val"}: a twelfth, or one, is held out for validation."""
    val = split_cases(cases, "val") or cases[:1]
    return dict(train=sorted(set(cases) - set(val)), val=val)


def read_ids(path):
    """A picture of labels -> uint8 [H,W]: what the file stores, gray values or indices into its palette, whether they
    are transparent or not."""
    with opened(path) as (image, halved):
        if image.format in NOISY or halved:
            raise InputError(f"{path}: a label of {image.format}, which changes values; store it as PNG, 8 bits gray")
        image = opaque(image)
        if is_deep(image):
            ids = deep_values(image)
        elif image.mode == "P":
            ids = np.asarray(image)
        else:
            ids = to_pixels(image)
            ids = ids if image.mode != "1" else ids // 255
    if ids.ndim == 3 and (ids == ids[..., :1]).all():
        ids = ids[..., 0]
    with np.errstate(invalid="ignore"):
        whole_numbers = ids.ndim == 2 and (ids == ids.astype(np.uint8)).all()
    if not whole_numbers:
        raise InputError(f"{path}: should hold the numbers of labels, 0 to 255, one a pixel; store it as PNG, 8 bits "
                         "gray")
    return ids.astype(np.uint8)

"""SA-Med2D-20M, and data in SAM-Med2D's own form, through an index that is built once and mapped into memory.

As Python's strings and lists, 4.6 million images and 19.7 million masks take gigabytes, and every worker process copies
them bit by bit. In the index a mask is a number of four bytes, and all processes share it. The folder ROOT/index:

    names.npy      uint8: the file names of the images, one after the other, in UTF-8
    name_at.npy    int64 [N + 1]: where each name begins, and where the last one ends
    suffix.npy     uint32: the masks, image after image; a number says what follows the image's stem in the mask's name
    mask_at.npy    int64 [N + 1]: where the masks of each image begin in suffix.npy
    group.npy      uint32 [N]: where each image comes from, a source and a modality
    train.npy, val.npy, test.npy    uint32: the images of each split, in the JSON's order
    index.json     the few suffixes and groups with their classes, and what is wrong with the JSON files
"""
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from array import array
from collections import Counter
from pathlib import Path

import ijson
import numpy as np
from tqdm import tqdm

from common import InputError, locked, read_json
from readers.pictures import MODALITIES, SMALLEST, SPLITS, SUFFIXES, Picture, read_image, read_mask, split_cases

ORIGINAL, CLASS_IDS = "SAMed2D_v1.json", "SAMed2D_v1_class_mapping_id.json"
TRAIN, TEST = "image2label_train.json", "label2image_test.json"
ARRAYS = dict(names=np.uint8, name_at=np.int64, suffix=np.uint32, mask_at=np.int64, group=np.uint32,
              **dict.fromkeys(SPLITS, np.uint32))
VERSION = 1  # of the index: another one is built anew
# what an image's name begins with -> its modality
PREFIXES = dict(zip(("ct_", "mr_", "pet_", "ultrasound_", "x_ray", "endoscopy_", "dermoscopy_", "fundus_photography"),
                    MODALITIES))
INVERTED = "ichallenge_adam_task2"  # a known defect: the masks of this source are 0 where they should be 255
LISTED = 1000  # problems that are named one by one
CHUNK = 100_000  # images that are looked at together: how little memory building takes
LEFT_OUT = 0  # the suffix that stands for a mask that could not be used: nobody knows what it shows
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\\\u2028\u2029]")  # in no file name here, so that a message is one line
MASK = re.compile(r"(?:--(?P<id>\d{1,9})|_(?P<words>[^/]+))_\d+\.(?:png|jpe?g)", re.I)


class SAMed2D:
    """The images of a split, each with its masks. Two layouts, in both of which only the base names matter:

    root/images/{modality}--{source}--{case}--{slice}.png, root/masks/{the image's stem}--{class id}_{number}.png,
    root/SAMed2D_v1.json {image: [masks]} and root/SAMed2D_v1_class_mapping_id.json {class: id}: as SA-Med2D-20M is
    published. A fifth of the cases of every source is for testing, a twelfth for validation (pictures.split_cases).

    root/images/{stem}.png, root/masks/{stem}_{class}_{number}.png, root/image2label_train.json {image: [masks]} and
    root/label2image_test.json {mask: image}, or one of the two: SAM-Med2D's own form. The case is the stem without its
    last number; a twelfth of the training cases is for validation. The modality is "unknown" and no class is known to
    be absent. Images named as in the first layout keep their source, case and modality.

    Images of other modalities than the eight of the paper are left out, and counted in `left_out`. `problems`: what is
    wrong in the JSON files, a line each.
    """
    name, volumes = "sa-med2d", False

    def __init__(self, root, split):
        self.root, self.split = Path(root), split
        self.stamp = stamp(self.root)
        self.open(load(self.root, self.stamp) or build(self.root, self.stamp))

    def open(self, index):
        tables, self.arrays = index
        self.rows, self.problems, self.left_out = self.arrays[self.split], tables["problems"], tables["left_out"]
        self.suffixes = tables["suffixes"]  # [[suffix, class]]
        self.groups = tables["groups"]  # [[source, modality, [classes]]]
        self.looked_for = tables["looked_for"]  # True: a class of the group that has no mask is absent
        self.pairs = sorted({(c, modality) for _, modality, classes in self.groups for c in classes})
        self.classes = tuple(sorted({c for c, _ in self.pairs}))
        if not len(self.rows):
            raise InputError(f"{self.root}: its JSON files leave no image for {self.split}; "
                             + (f"the first problem of them: {self.problems[0]}" if self.problems else "add cases"))

    def __getstate__(self):
        return dict(root=self.root, split=self.split, stamp=self.stamp)

    def __setstate__(self, state):
        """In another process: the same index or none, since rows are counted in it."""
        self.__dict__.update(state)
        index = load(self.root, self.stamp)
        if index is None:
            raise InputError(f"{self.root / 'index'}: was changed or deleted while in use; start again")
        self.open(index)

    def __len__(self):
        return len(self.rows)

    def image_name(self, i):
        at, row = self.arrays["name_at"], self.rows[i]
        return self.arrays["names"][at[row]:at[row + 1]].tobytes().decode()

    def group(self, i):
        """-> source, modality, list of the classes that occur anywhere in that source's images of that modality."""
        return self.groups[self.arrays["group"][self.rows[i]]]

    def masks(self, i):
        """[suffix, class] of each mask; (image's stem + suffix) is its file's name. LEFT_OUT's are among them."""
        at, row = self.arrays["mask_at"], self.rows[i]
        return [self.suffixes[s] for s in self.arrays["suffix"][at[row]:at[row + 1]].tolist()]

    def key(self, i):
        return self.image_name(i).rpartition(".")[0]

    def case(self, i):
        return describe(self.key(i))[1]

    def file(self, i):
        return self.root / "images" / self.image_name(i)

    def read(self, i, strict=False):
        """-> Picture. Masks that are empty or of another size than the image are passed over; strict: InputError.

        What they show is then neither a target nor absent; so it is with masks that are too small.
        """
        source, modality, classes = self.group(i)
        image = read_image(self.file(i), "RGB")
        masks, targets, here, known = [], [], set(), self.looked_for
        for suffix, target in self.masks(i):
            if target is None:
                known = False
                continue
            here.add(target)
            path = self.root / "masks" / (self.key(i) + suffix)
            mask = read_mask(path)
            if source.lower() == INVERTED:
                mask = ~mask
            if mask.shape != image.shape[:2]:
                wrong = f"{list(mask.shape)}, but its image is {list(image.shape[:2])}; store both on one grid"
            else:
                wrong = "" if mask.any() else "empty; take the mask out of the data set"
            if strict and wrong:
                raise InputError(f"{path}: {wrong}")
            if not wrong and mask.mean() >= SMALLEST:
                masks.append(mask)
                targets.append(target)
        masks = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)
        return Picture(image, masks, tuple(targets), tuple(c for c in classes if known and c not in here), modality)


# ---------------------------------------------------------------------------------------------------------------------
# Names

@functools.lru_cache(4096)
def modality_of(prefix):
    """One of MODALITIES, or None."""
    return next((name for start, name in PREFIXES.items() if prefix.startswith(start)), None)


def describe(stem):
    """An image's stem -> source, case, modality; outside SA-Med2D-20M "", the stem less its number, "unknown"."""
    parts = stem.split("--")
    if len(parts) < 4 or not all(parts):
        return "", re.sub(r"_\d+$", "", stem) or stem, "unknown"
    return parts[1], "--".join(parts[1:-1]), modality_of(parts[0])


@functools.lru_cache(4096)
def allowed(folder, kind, leading):
    """Is this the folder images or masks (kind)? With `leading` others may stand in front of it."""
    parts = folder.split("/")
    return parts[-1] == kind and (len(parts) == 1 or leading and parts[0] != "" and ".." not in parts)


# ---------------------------------------------------------------------------------------------------------------------
# Opening

def stamp(root):
    """What the index depends on, as it lies in the index: [VERSION, [name, bytes, mtime in ns] of each JSON file]."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds images/ and masks/ with --data DIR")
    names = [name for name in (ORIGINAL, TEST, TRAIN) if (root / name).is_file()]
    if not names:
        raise InputError(f"{root}: holds neither {ORIGINAL} nor {TRAIN} or {TEST}; is it the folder with images/ and "
                         "masks/?")
    if ORIGINAL in names and len(names) > 1:
        raise InputError(f"{root}: holds {names[0]} and {names[1]}, two ways to split it; move one of them away")
    if ORIGINAL in names and not (root / CLASS_IDS).is_file():
        raise InputError(f"{root / CLASS_IDS}: missing; it comes with {ORIGINAL} and says which class has which id")
    names += [CLASS_IDS] if (root / CLASS_IDS).is_file() else []
    status = [(root / name).stat() for name in names]
    return [VERSION, *([name, s.st_size, s.st_mtime_ns] for name, s in zip(names, status))]


def load(root, stamp):
    """-> index.json's tables and the arrays, mapped into memory; None if the index is missing, stale or damaged."""
    try:
        tables = json.loads((root / "index" / "index.json").read_bytes())
        if tables["stamp"] != stamp:
            return None
        arrays = {name: np.asarray(np.load(root / "index" / f"{name}.npy", mmap_mode="r", allow_pickle=False))
                  for name in ARRAYS}
        whole = all(arrays[name].dtype == dtype for name, dtype in ARRAYS.items()) \
            and {name: len(a) for name, a in arrays.items()} == tables["lengths"]
        return (tables, arrays) if whole else None
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None


def build(root, stamp):
    """load()'s answer, from an index that this process builds, or another one meanwhile."""
    try:
        with locked(root / "index.lock"):
            index = load(root, stamp)
            if index is None:
                tables, arrays = Indexer(root, stamp).build()
                save(root, tables, arrays)
                index = load(root, stamp)
    except OSError as e:
        raise InputError(f"{root / 'index'}: cannot be written ({e.strerror}); make room, let this user write to "
                         f"{root} for once, or put links to its files into a folder of your own") from None
    if index is None:
        raise InputError(f"{root / 'index'}: is damaged as soon as written; put the data on another disk")
    return index


def save(root, tables, arrays):
    """Writes the index whole or not at all."""
    for left in root.glob("index.part*"):  # by a kill; without locks it may be in use
        if time.time() - left.stat().st_mtime > 600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="index.part", dir=root) as part:
        folder = Path(part) / "index"
        folder.mkdir()
        for name, a in arrays.items():
            np.save(folder / f"{name}.npy", a, allow_pickle=False)
        (folder / "index.json").write_text(json.dumps(tables, ensure_ascii=False), encoding="utf-8")
        folder.chmod(root.stat().st_mode & 0o777)  # as open to others as the data
        shutil.rmtree(root / "index", ignore_errors=True)
        os.replace(folder, root / "index")


# ---------------------------------------------------------------------------------------------------------------------
# Building

def entries(path):
    """(key, value) of a JSON object, one after the other: the file may be larger than the memory."""
    try:
        with open(path, "rb") as f, tqdm(desc=f"indexing {path.name}", total=path.stat().st_size, unit="B",
                                         unit_scale=True, mininterval=1) as bar:
            start = f.read(1024)
            f.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)
            if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
                raise InputError(f"{path}: not a JSON object {{...}}; copy the file again")
            for entry in ijson.kvitems(f, "", buf_size=2 ** 20):
                yield entry
                if f.tell() != bar.n:
                    bar.update(f.tell() - bar.n)
    except (ijson.JSONError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: truncated or not JSON ({' '.join(str(e).split())[:80]}); copy the file "
                         "again") from None


def read_class_ids(path, problem):
    """{class: id} -> {id as int: class}; problem(kind, path, text) is called for what cannot be used of it."""
    ids = {}
    for name, number in read_json(path, "copy the file again").items():
        if not re.fullmatch(r"[0-9]{1,9}", str(number)) or not class_name(name):
            problem("class id", path, f"{quoted(name)} has the id {quoted(number)}; give a name an id like \"0001\"")
        elif ids.setdefault(int(number), class_name(name)) != class_name(name):
            problem("class id", path, f"{quoted(ids[int(number)])} and {quoted(name)} have the same id, {number}; the "
                    "first one is taken, correct the other")
    return ids


def class_name(text):
    """E.g. Left_Kidney -> left kidney."""
    return " ".join(text.replace("_", " ").lower().split())


def quoted(value):
    return repr(value)[:300]  # one line, whatever it is


class Indexer:
    """Reads the JSON files of a data set into packed columns, a row per image."""

    def __init__(self, root, stamp):
        self.root, self.stamp = root, stamp
        self.problems, self.counts, self.left_out = [], Counter(), Counter()
        self.ids = read_class_ids(root / CLASS_IDS, self.problem) if (root / CLASS_IDS).is_file() else {}
        self.numbers, self.suffixes = {"/": LEFT_OUT}, [("/", None)]  # suffix -> number, number -> suffix and class
        self.groups, self.cases, self.sources = {}, {}, {}  # (source, modality) and case -> number, source -> cases
        self.names, self.name_at, self.hashes = bytearray(), array("q", [0]), array("q")
        self.suffix, self.mask_at, self.group, self.case = array("I"), array("q", [0]), array("I"), array("I")

    def problem(self, kind, path, text):
        self.counts[kind] += 1
        if len(self.problems) < LISTED:
            self.problems.append(f"{path}: {text}")

    def build(self):
        """-> the tables of index.json, {name: array}."""
        names = [name for name, *_ in self.stamp[1:]]
        self.held = 0  # the cases of TEST, which is read first, are the first ones; TRAIN may not have them
        if ORIGINAL in names:
            self.read(self.root / ORIGINAL, leading=False)
        if TEST in names:
            self.read(self.root / TEST, leading=True)
            self.held = len(self.cases)
        if TRAIN in names:
            self.read(self.root / TRAIN, leading=True)
        if stamp(self.root) != self.stamp:
            raise InputError(f"{self.root / names[0]}: changed while it was read; start again")
        arrays = self.finish()
        groups = self.group_classes(arrays)
        if sum(self.counts.values()) > len(self.problems):
            self.problems.append(f"{self.root / names[0]}: more problems than the {len(self.problems)} above, in all: "
                                 + ", ".join(f"{n} x {kind}" for kind, n in self.counts.most_common()))
        tables = dict(stamp=self.stamp, lengths={name: len(a) for name, a in arrays.items()}, groups=groups,
                      suffixes=self.suffixes, looked_for=ORIGINAL in names,
                      problems=self.problems, counts=self.counts, left_out=self.left_out)
        print(f"{self.root}: indexed {len(arrays['group'])} images with {len(arrays['suffix'])} masks, "
              f"{sum(self.counts.values())} problems"
              + "".join(f"; left out: {n} images of {sub}" for sub, n in self.left_out.items()), file=sys.stderr)
        return tables, arrays

    def read(self, path, leading):
        """One JSON file; `leading`: folders may stand in front of images/ and masks/."""
        self.path, self.leading = path, leading
        kind, form = (str, "{mask: image}") if path.name == TEST else (list, "{image: [masks]}")
        images = {}  # TEST's masks by their image, {image: [masks]}: for that the whole file has to be read
        for key, value in entries(path):
            if not isinstance(value, kind):
                self.problem("entry", path, f"{quoted(key)}: {quoted(value)} is not of the form {form}; correct it")
            elif path.name == TEST:
                images.setdefault(value, []).append(key)
            else:
                self.add(key, value)
        for image, masks in images.items():
            self.add(image, masks)

    def add(self, path, masks):
        """A row, unless the image's name is unusable, its modality not one of ours, or its case held out."""
        folder, _, name = path.rpartition("/")
        stem, _, extension = name.rpartition(".")
        if not allowed(folder, "images", self.leading):
            return self.problem("path", self.path, f"{quoted(path)} lies outside images/; it is left out, correct it")
        source, case, modality = describe(stem)
        if not stem or f".{extension.lower()}" not in SUFFIXES or UNPRINTABLE.search(name) \
                or not self.leading and not source:
            return self.problem("image name", self.path, f"{quoted(path)} is not named like " + (
                "images/amos_0006_90.png" if self.leading else "images/ct_00--AMOS--0006--z_0090.png")
                + "; it is left out, rename it")
        if modality is None:
            self.left_out[stem.split("--")[0]] += 1
            return
        if self.cases.get(case, self.held) < self.held:
            return self.problem("case on both sides", self.path, f"{quoted(path)} is left out of training, since "
                                f"{TEST} has images of the same case; take it out of one of them")
        if case not in self.cases:
            self.cases[case] = len(self.cases)
            self.sources.setdefault(source, []).append(case)
        self.names += name.encode()
        self.name_at.append(len(self.names))
        self.hashes.append(hash(stem))
        self.group.append(self.groups.setdefault((source, modality), len(self.groups)))
        self.case.append(self.cases[case])
        numbers = [self.mask(mask, stem) for mask in masks]
        once = dict.fromkeys(numbers)
        if len(once) < len(numbers):
            for number in (n for n, count in Counter(numbers).items() if count > 1 and n != LEFT_OUT):
                self.problem("mask twice", self.path, f"{quoted(name)} has its mask {quoted(self.suffixes[number][0])} "
                             "twice; take one out")
        self.suffix.extend(once)
        self.mask_at.append(len(self.suffix))

    def mask(self, path, stem):
        """-> the number of the suffix of a mask's name, LEFT_OUT if it has none."""
        if not isinstance(path, str):
            self.problem("entry", self.path, f"{quoted(path)} among the masks of {quoted(stem)}; name their files")
            return LEFT_OUT
        folder, _, name = path.rpartition("/")
        if not allowed(folder, "masks", self.leading):
            self.problem("path", self.path, f"{quoted(path)} lies outside masks/; it is left out, correct it")
        elif not name.startswith(stem):
            self.problem("mask name", self.path, f"{quoted(path)} does not begin with its image's name, "
                         f"{quoted(stem)}; it is left out, rename it")
        else:
            number = self.numbers.get(name[len(stem):])
            return self.new_suffix(path, name[len(stem):]) if number is None else number
        return LEFT_OUT

    def new_suffix(self, path, suffix):
        match = MASK.fullmatch(suffix)
        if not match or UNPRINTABLE.search(suffix) or not match["id"] and not class_name(match["words"]):
            self.problem("mask name", self.path, f"{quoted(path)} does not go on after its image's name like "
                         "--0002_000.png or _liver_000.png; it is left out, rename it")
            return LEFT_OUT
        if match["id"] and int(match["id"]) not in self.ids:
            self.problem("class id", self.path, f"{quoted(path)} has the id {match['id']}, which {CLASS_IDS} lacks; it "
                         "is left out, add the id")
            return LEFT_OUT
        self.suffixes.append((suffix, self.ids[int(match["id"])] if match["id"] else class_name(match["words"])))
        return self.numbers.setdefault(suffix, len(self.numbers))

    def finish(self):
        """The columns without images that occur twice -> {name: array}. No copy is made where none does."""
        view = lambda column: np.frombuffer(column, column.typecode)
        lengths, suffix, group, case = np.diff(view(self.name_at)), view(self.suffix), view(self.group), view(self.case)
        counts = np.diff(view(self.mask_at))
        # two of five million names have the same 64 bits by chance once in a million builds
        keep = np.zeros(len(group), bool)
        keep[np.unique(view(self.hashes), return_index=True)[1]] = True  # where each occurs first
        if not keep.all():
            for row in np.flatnonzero(~keep):
                self.problem("image twice", self.path, f"{quoted(self.name(row))} occurs twice; the first one is "
                             "taken, take out the other")
            suffix, counts, at = suffix[np.repeat(keep, counts)], counts[keep], self.name_at
            lengths, group, case = lengths[keep], group[keep], case[keep]
            # in parts: millions of slices at once would take more memory than the names
            self.names = bytearray().join(
                b"".join([self.names[at[row]:at[row + 1]] for row in rows.tolist()])
                for rows in np.array_split(np.flatnonzero(keep), 1 + len(keep) // CHUNK))
        zero, sides = np.zeros(1, np.int64), self.sides(case)
        return dict(names=np.frombuffer(self.names, np.uint8), name_at=np.concatenate([zero, np.cumsum(lengths)]),
                    suffix=suffix, mask_at=np.concatenate([zero, np.cumsum(counts)]), group=group,
                    **{split: np.flatnonzero(sides == n).astype(np.uint32) for n, split in enumerate(SPLITS)})

    def name(self, row):
        return self.names[self.name_at[row]:self.name_at[row + 1]].decode()

    def sides(self, case):
        """case: the number of each row's -> uint8 per row, its place in SPLITS."""
        side = np.zeros(len(self.cases), np.uint8)
        for cases in self.sources.values():
            mine = [c for c in cases if self.cases[c] >= self.held]
            for split in ("val",) if self.path.name == TRAIN else ("val", "test"):
                side[[self.cases[c] for c in split_cases(mine, split)]] = SPLITS.index(split)
        side[:self.held] = SPLITS.index("test")
        return side[case]

    def group_classes(self, arrays):
        """-> [[source, modality, sorted classes that its images have a mask of]] of each group."""
        found = [set() for _ in self.groups]
        for at in range(0, len(arrays["group"]), CHUNK):
            mask_at = arrays["mask_at"][at:at + CHUNK + 1]
            group = np.repeat(arrays["group"][at:at + CHUNK], np.diff(mask_at)).astype(np.uint64)
            for pair in np.unique(group << np.uint64(32) | arrays["suffix"][mask_at[0]:mask_at[-1]]).tolist():
                found[pair >> 32].add(self.suffixes[pair & 0xffffffff][1])
        return [[*group, sorted(classes - {None})] for group, classes in zip(self.groups, found)]

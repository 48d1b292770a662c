"""SA-Med2D-20M, and data in SAM-Med2D's own form, through an index that is built once and mapped into memory.

As Python's strings and lists, 4.6 million images and 19.7 million masks take gigabytes, and every worker process copies
them bit by bit. ROOT/index.arrow is an Arrow file, whose pages all processes share. It has a row for each image, those
of a split together and in the JSON's order:

    name     the image's file name
    group    where it comes from: a number into `groups`, [[source, modality, classes]]
    masks    the masks' numbers into `suffixes`, [[what follows the image's stem in the mask's name, class]]

The metadata of its schema hold `groups`, `suffixes`, the rows of each split, and what is wrong with the JSON files.
"""
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import ijson
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from common import MODALITIES, InputError, locked, read_json, whole
from readers.pictures import SMALLEST, SPLITS, RawSample, read_image, read_mask, split_cases

ORIGINAL, CLASS_IDS = "SAMed2D_v1.json", "SAMed2D_v1_class_mapping_id.json"
TRAIN, TEST = "image2label_train.json", "label2image_test.json"
INDEX = "index.arrow"
COLUMNS = pa.schema(dict(name=pa.string(), group=pa.uint32(), masks=pa.list_(pa.uint32())))
VERSION = 1  # of the index: another one is built anew
# what an image's name begins with -> its modality
PREFIXES = dict(zip(("ct_", "mr_", "pet_", "ultrasound_", "x_ray", "endoscopy_", "dermoscopy_", "fundus_photography"),
                    MODALITIES))
INVERTED = "ichallenge_adam_task2"  # a known defect: the masks of this source are 0 where they should be 255
LISTED = 1000  # problems that are named one by one
CHUNK = 100_000  # images that are held as Python's objects while the index is built
LEFT_OUT = 0  # the suffix that stands for a mask that could not be used: nobody knows what it shows
# of a file name: what can be printed, so that a message is one line
LETTER = r"[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
IMAGE = re.compile(rf"images/(({LETTER}+)\.(?i:png|jpe?g))")
MASK = re.compile(rf"(?:--(?P<id>\d{{1,9}})|_(?P<words>{LETTER}+))_\d+\.(?i:png|jpe?g)")


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
        root = Path(root)
        now = stamp(root)
        if load(root, now) is None:
            build(root, now)
        self.open(root, split, now)

    def open(self, root, split, stamp):
        """In another process the same index or none, since rows are counted in it."""
        self.root, self.split, self.stamp = root, split, stamp
        if (index := load(root, stamp)) is None:
            raise InputError(f"{root / INDEX}: was changed, deleted or damaged while in use; start again")
        tables, rows = index
        rows = rows.slice(*tables["splits"][split])
        self.names, self.group_numbers, self.mask_numbers = rows.columns
        self.groups, self.suffixes = tables["groups"], tables["suffixes"]
        self.problems, self.left_out = tables["problems"], tables["left_out"]
        self.looked_for = tables["looked_for"]  # True: a class of the group that has no mask is absent
        self.pairs = sorted({(c, modality) for _, modality, classes in self.groups for c in classes})
        self.classes = tuple(sorted({c for c, _ in self.pairs}))
        if not len(rows):
            raise InputError(f"{root}: its JSON files leave no image for {split}; "
                             + (f"the first problem of them: {self.problems[0]}" if self.problems else "add cases"))

    def __getstate__(self):
        return self.root, self.split, self.stamp

    def __setstate__(self, state):
        self.open(*state)

    def __len__(self):
        return len(self.names)

    def group(self, i):
        """-> source, modality, list of the classes that occur anywhere in that source's images of that modality."""
        return self.groups[self.group_numbers[i].as_py()]

    def masks(self, i):
        """[suffix, class] of each mask; (image's stem + suffix) is its file's name. LEFT_OUT's are among them."""
        return [self.suffixes[number] for number in self.mask_numbers[i].as_py()]

    def key(self, i):
        return self.names[i].as_py().rpartition(".")[0]

    def case(self, i):
        return describe(self.key(i))[1]

    def file(self, i):
        return self.root / "images" / self.names[i].as_py()

    def read(self, i, strict=False):
        """-> RawSample. Masks that are empty or of another size than the image are passed over; strict: InputError.

        What they show is then neither a target nor absent; so it is with masks that are too small.
        """
        source, modality, classes = self.group(i)
        image = read_image(self.file(i))
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
            fits = mask.shape == image.shape[:2]
            if strict and not fits:
                raise InputError(f"{path}: {list(mask.shape)}, but its image is {list(image.shape[:2])}; store both on "
                                 "one grid")
            if strict and (mask.all() or not mask.any()):
                raise InputError(f"{path}: {'full' if mask.any() else 'empty'}; take the mask out of the data set")
            if fits and mask.mean() >= SMALLEST:
                masks.append(mask)
                targets.append(target)
        masks = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)
        return RawSample(image, masks, tuple(targets), tuple(c for c in classes if known and c not in here), modality)


# ---------------------------------------------------------------------------------------------------------------------
# Names

def describe(stem):
    """An image's stem -> source, case, modality, which is None where it is not one of MODALITIES; outside SA-Med2D-20M
    "", the stem less its number, "unknown"."""
    parts = stem.split("--")
    if len(parts) < 4 or not all(parts):
        return "", re.sub(r"_\d+$", "", stem) or stem, "unknown"
    modality = next((name for start, name in PREFIXES.items() if stem.startswith(start)), None)
    return parts[1], "--".join(parts[1:-1]), modality


# ---------------------------------------------------------------------------------------------------------------------
# Opening

def stamp(root):
    """What the index depends on, as it lies in the index: [VERSION, [name, bytes, mtime in ns] of each JSON file]."""
    names = [name for name in (ORIGINAL, TEST, TRAIN, CLASS_IDS) if (root / name).is_file()]
    if not {ORIGINAL, TEST, TRAIN} & set(names):
        raise InputError(f"{root}: holds neither {ORIGINAL} nor {TRAIN} or {TEST}; is it the folder with images/ and "
                         "masks/?")
    if ORIGINAL in names and names != [ORIGINAL, CLASS_IDS]:
        raise InputError(f"{root}: {ORIGINAL} needs {CLASS_IDS} beside it, which says which class has which id, and "
                         f"no other way to split it, as {TRAIN} and {TEST} are")
    status = [(root / name).stat() for name in names]
    return [VERSION, *([name, s.st_size, s.st_mtime_ns] for name, s in zip(names, status))]


def load(root, stamp):
    """-> the tables and the rows of the index, mapped into memory; None if it is missing, stale or damaged."""
    try:
        rows = pa.ipc.open_file(pa.memory_map(str(root / INDEX))).read_all()
        tables = json.loads(rows.schema.metadata[b"tables"])
        return (tables, rows) if tables["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def build(root, stamp):
    """Writes the index, unless another process does meanwhile."""
    try:
        with locked(root / "index.lock"):
            if load(root, stamp) is None:
                Indexer(root, stamp).build()
    except OSError as e:
        raise InputError(f"{root / INDEX}: cannot be written ({e.strerror}); make room, let this user write to "
                         f"{root} for once, or put links to its files into a folder of your own") from None


# ---------------------------------------------------------------------------------------------------------------------
# Building

def entries(path):
    """(key, value) of a JSON object, one after the other: the file may be larger than the memory."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")  # less the mark that Windows sets before UTF-8
            if not start.startswith(b"{"):
                raise InputError(f"{path}: not a JSON object {{...}}; copy the file again")
            file.seek(file.tell() - len(start))
            with tqdm.wrapattr(file, "read", path.stat().st_size, desc=f"indexing {path.name}", mininterval=1) as f:
                yield from ijson.kvitems(f, "", buf_size=2 ** 20)
    except (ijson.JSONError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: truncated or not JSON ({' '.join(str(e).split())[:80]}); copy the file "
                         "again") from None


def class_name(text):
    """E.g. Left_Kidney -> left kidney."""
    return " ".join(text.replace("_", " ").lower().split())


def quoted(value):
    return repr(value)[:300]  # one line, whatever it is


class Indexer:
    """Reads the JSON files of a data set into batches of rows, and writes them split by split."""

    def __init__(self, root, stamp):
        self.root, self.stamp, self.files = root, stamp, [name for name, *_ in stamp[1:]]
        self.problems, self.count, self.left_out = [], 0, Counter()
        self.numbers, self.suffixes = {}, [(None, None)]  # suffix -> number -> suffix and class; LEFT_OUT has neither
        self.groups = {}  # (source, modality) -> number, the numbers of its suffixes
        self.cases, self.sources = {}, defaultdict(list)  # case -> number, source -> cases that are yet to be split
        self.held = 0  # the first so many cases are TEST's, and TRAIN may not have them
        self.batches, self.rows = [], []  # rows with the numbers of their cases; those of the next batch
        self.seen = set()  # hashes of the images' stems

    def problem(self, text):
        self.count += 1
        if self.count <= LISTED:
            self.problems.append(f"{self.path}: {text}")

    def build(self):
        """Reads everything and writes the index."""
        self.path = self.root / CLASS_IDS
        self.ids = self.read_class_ids() if CLASS_IDS in self.files else {}
        for name in self.files:  # TEST before TRAIN
            self.path, self.leading = self.root / name, name != ORIGINAL
            if name != CLASS_IDS:
                self.read(test=name == TEST)
            if name == TEST:
                self.held = len(self.cases)
                self.sources.clear()
        self.pack()
        if stamp(self.root) != self.stamp:
            raise InputError(f"{self.path}: changed while it was read; start again")
        if self.count > LISTED:
            self.problems.append(f"{self.path}: {self.count - LISTED} more problems")
        self.write()

    def read_class_ids(self):
        """CLASS_IDS' {class: id} -> {id as int: class}."""
        ids = {}
        for name, number in read_json(self.path, "copy the file again").items():
            if not re.fullmatch(r"[0-9]{1,9}", str(number)) or not class_name(name):
                self.problem(f"{quoted(name)} has the id {quoted(number)}; give a name an id like \"0001\"")
            elif ids.setdefault(int(number), class_name(name)) != class_name(name):
                self.problem(f"{quoted(name)} has the id {number} of {quoted(ids[int(number)])}; correct one of them")
        return ids

    def read(self, test):
        """The JSON file at self.path; test: it is TEST."""
        kind, form = (str, "{mask: image}") if test else (list, "{image: [masks]}")
        images = defaultdict(list)  # TEST's, {image: [masks]}: for that the whole file has to be read
        for key, value in entries(self.path):
            if not isinstance(value, kind):
                self.problem(f"{quoted(key)}: {quoted(value)} is not of the form {form}; correct it")
            elif test:
                images[value].append(key)
            else:
                self.add(key, value)
        for image, masks in images.items():
            self.add(image, masks)

    def add(self, path, masks):
        """A row, unless the image's name is unusable, its modality not one of ours, or its case held out."""
        match = IMAGE.fullmatch(self.inner(path, "images"))
        name, stem = match.groups() if match else ("", "")
        source, case, modality = describe(stem)
        if not (stem if self.leading else source):
            like = "amos_0006_90.png" if self.leading else "ct_00--AMOS--0006--z_0090.png"
            self.problem(f"{quoted(path)} is not named like images/{like}; it is left out, rename it")
        elif modality is None:
            self.left_out[stem.split("--")[0]] += 1
        elif self.cases.get(case, self.held) < self.held:
            self.problem(f"{quoted(path)} is left out of training, since {TEST} has images of the same case; take it "
                         "out of one of them")
        elif hash(stem) in self.seen:  # two of five million names have the same 64 bits once in a million builds
            self.problem(f"{quoted(name)} occurs twice; the first one is taken, take out the other")
        else:
            self.seen.add(hash(stem))
            if case not in self.cases:
                self.cases[case] = len(self.cases)
                self.sources[source].append(case)
            numbers = list(dict.fromkeys(self.number_mask(mask, stem) for mask in masks))  # each once
            group, found = self.groups.setdefault((source, modality), (len(self.groups), set()))
            found.update(numbers)
            self.rows.append(dict(name=name, group=group, masks=numbers, case=self.cases[case]))
            if len(self.rows) == CHUNK:
                self.pack()

    def inner(self, path, kind):
        """The path from images/ or masks/ (kind) on: in SAM-Med2D's own form other folders may stand in front."""
        return path[path.rfind(f"/{kind}/") + 1:] if self.leading else path

    def pack(self):
        """The rows so far become a batch."""
        schema = COLUMNS.append(pa.field("case", pa.uint32()))
        self.batches.append(pa.RecordBatch.from_pylist(self.rows, schema))
        self.rows = []

    def number_mask(self, path, stem):
        """-> the number of the suffix of a mask's name, LEFT_OUT if it has none."""
        start, inner = f"masks/{stem}", self.inner(path, "masks") if isinstance(path, str) else ""
        suffix = inner[len(start):] if inner.startswith(start) else ""
        if suffix in self.numbers:
            return self.numbers[suffix]
        match = MASK.fullmatch(suffix)
        if not match or not match["id"] and not class_name(match["words"]):
            self.problem(f"{quoted(path)}, a mask of {quoted(stem)}, is not named like masks/, the image's name, and "
                         "--0002_000.png or _liver_000.png; it is left out, rename it")
            return LEFT_OUT
        if match["id"] and int(match["id"]) not in self.ids:
            self.problem(f"{quoted(path)} is left out, since {CLASS_IDS} lacks the id {match['id']}; add it")
            return LEFT_OUT
        self.numbers[suffix] = len(self.suffixes)
        self.suffixes.append((suffix, self.ids[int(match["id"])] if match["id"] else class_name(match["words"])))
        return self.numbers[suffix]

    def split(self):
        """-> uint8 for each case: the place of its split in SPLITS."""
        places = np.zeros(len(self.cases), np.uint8)
        places[:self.held] = SPLITS.index("test")
        for cases in self.sources.values():
            for split in ("val",) if TRAIN in self.files else ("val", "test"):
                places[[self.cases[case] for case in split_cases(cases, split)]] = SPLITS.index(split)
        return places

    def write(self):
        """The index's file, from all that was read."""
        places = self.split()
        batches = [(rows.select(COLUMNS.names), places[rows["case"].to_numpy()]) for rows in self.batches]
        lengths = sum(np.bincount(place, minlength=len(SPLITS)) for _, place in batches).tolist()
        groups = [[*group, sorted({self.suffixes[number][1] for number in found} - {None})]
                  for group, (_, found) in self.groups.items()]
        tables = dict(stamp=self.stamp, splits={s: [sum(lengths[:n]), lengths[n]] for n, s in enumerate(SPLITS)},
                      groups=groups, suffixes=self.suffixes, looked_for=ORIGINAL in self.files,
                      problems=self.problems, left_out=self.left_out)
        schema = COLUMNS.with_metadata(dict(tables=json.dumps(tables)))
        with whole(self.root / INDEX) as file, pa.ipc.new_file(file, schema) as writer:
            for n in range(len(SPLITS)):
                for rows, place in batches:
                    writer.write(rows.filter(pa.array(place == n)))
        print(f"{self.root}: indexed {sum(lengths)} images, {self.count} problems"
              + "".join(f"; left out: {n} images of {sub}" for sub, n in self.left_out.items()), file=sys.stderr)

"""The clinical texts: of every class (attributes.json), of single images (--texts), and otherwise than they should be.

    texts = Texts("synapse")
    texts("liver", "ct")            ->  {"position": "...", "texture": "...", "shape": "..."}: the first wordings
    texts("liver", "ct", rng=rng)   ->  random ones, as training draws them
    texts.held_out("liver", "ct")   ->  wordings that training never draws
"""
import json
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from common import ATTRIBUTES, InputError, read_json, read_text, write_atomically

HERE = Path(__file__).resolve().parent
FORM = '{"position": ["..."], "texture": ["..."], "shape": ["..."]}'
TEXTS = ("own", "reworded", "wrong", "empty")
KEYS = ("image", "target", *ATTRIBUTES, "source", "report", "reviewed")  # of a line of --texts; the last by report.py
NONSENSE = {  # sentences about things that are in no body
    "position": ("{}", "on the {}", "to the left of the {}", "at the upper right, behind the {}", "inside a {}"),
    "texture": ("{}", "bright and even, as of a {}", "dark with the grain of a {}", "made of {}"),
    "shape": ("{}", "round as a {}", "long and thin, a {}", "the outline of a {}")}


def split_wordings(wordings):
    """A list of wordings -> (those to train with, those held out: the last fifth of five or more)."""
    trained = len(wordings) - len(wordings) // 5
    return wordings[:trained], wordings[trained:]


class Texts:
    """The clinical texts of a data set's classes (attributes.json), and those of single images where a file has them.

    An attribute is a list of wordings, or {modality: list} where the look depends on it. A string in place of a whole
    data set names the one whose texts it shares. InputError, with the entry to add, for whatever is missing.
    """

    def __init__(self, name, path=None, per_image=None, entries=None):
        self.name, self.path = name, Path(path or HERE / "attributes.json")
        self.entries = entries = entries or read_entries(name, self.path)
        entry = entries.get(name)
        entry = entries.get(entry) if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise InputError(f'{self.path}: no texts for data set {name}, only for {", ".join(entries)}; add "{name}": '
                             f'{{"<class>": {FORM}, ...}}')
        self.classes = entry
        self.described = [other for other, value in entries.items() if isinstance(value, dict)]  # with texts of its own
        self.file, self.images = per_image, read_image_texts(per_image) if per_image else {}
        self.bare = 0.0  # training: the share of random draws that are the class's name alone, as a user may type it

    def check(self, pairs):
        """InputError unless every (class, modality) of a data set has its texts; those of single images aside."""
        for target, modality in pairs if not self.images else ():
            self(target, modality)

    def wordings(self, target, modality, kind):
        """The list of wordings of one attribute."""
        known = self.classes.get(target)
        if not isinstance(known, dict):
            known = known_names(target, self.classes)
            raise InputError(f'{self.path}: no texts for {self.name}\'s class {target}; it has {known}; give one of '
                             f'these, or add under "{self.name}": "{target}": {FORM}')
        texts = known.get(kind)
        where = f"{self.name}, {target}, {kind}"
        if isinstance(texts, dict):
            if modality not in texts:
                raise InputError(f'{self.path}: {where}: nothing for {modality}, only for {", ".join(texts)}; add '
                                 f'"{modality}": ["..."]')
            texts, where = texts[modality], f"{where}, {modality}"
        if not are_texts(texts):
            raise InputError(f'{self.path}: {where}: empty or blank; give "{kind}": ["..."], a list of texts')
        return texts

    def check_images(self, images, targets):
        """InputError if no text of single images is of one of these images (or cases) and targets, so that --texts
        would change nothing; says which of them have none."""
        pairs = [(image, target) for image in images for target in targets]
        lacking = [pair for pair in pairs if pair not in self.images]
        if self.images and len(lacking) == len(pairs):
            raise InputError(f"--texts {self.file}: has no line for {listed_pairs(pairs)}; it is of "
                             f"{listed_pairs(self.images)}; correct its image or target, or leave --texts out")
        if self.images and lacking:
            print(f"--texts {self.file}: has no line for {listed_pairs(lacking)}; the texts of the class are taken")

    def unused(self, sources):
        """A line about the texts of single images that are of no image, case or class of these data sets, as readers/
        gives them; "" if there are none."""
        if not self.images:
            return ""
        names = {name for source in sources for i in range(len(source)) for name in (source.key(i), source.case(i))}
        classes = {target for source in sources for target in source.classes}
        lost = [pair for pair in self.images if pair[0] not in names or pair[1] not in classes]
        if not lost:
            return ""
        return (f"--texts {self.file}: {len(lost)} of {len(self.images)} lines are of no image or class here: "
                f"{listed_pairs(lost)}; an image is called like {sources[0].key(0)}, a class like "
                f"{sources[0].classes[0]}")

    def own(self, target, sample):
        """The texts of this very image, and those of its case where it has none; {} where there are none, or no
        sample."""
        if sample is None:
            return {}
        return self.images.get((sample.case, target), {}) | self.images.get((sample.key, target), {})

    def choose(self, target, modality, sample, choice):
        """{attribute: choice(its wordings)}; those of the sample itself come before those of the class."""
        own = self.own(target, sample)
        return {kind: choice(own.get(kind) or self.wordings(target, modality, kind)) for kind in ATTRIBUTES}

    def __call__(self, target, modality, sample=None, rng=None, number=0):
        """{attribute: text}: each in the wording of this number, or with rng in a random one of those to train with."""
        def pick(wordings):
            trained, _ = split_wordings(wordings)
            return wordings[number % len(wordings)] if rng is None else trained[rng.integers(len(trained))]
        if rng is not None and self.bare and rng.random() < self.bare:
            return dict.fromkeys(ATTRIBUTES, target)
        return self.choose(target, modality, sample, pick)

    def held_out(self, target, modality, k=0, sample=None):
        """{attribute: text}: each in the k-th wording held out; where the list is too short for that, in its second."""
        def pick(wordings):
            held = split_wordings(wordings)[1] or wordings[1:2] or wordings
            return held[k % len(held)]
        return self.choose(target, modality, sample, pick)

    def every(self):
        """Every text of the file, and of single images."""
        return strings([self.entries[name] for name in self.described] + list(self.images.values()))

    def modalities(self, target):
        """The modalities that a class has texts for; [None] where nothing depends on it."""
        known = self.classes[target] if isinstance(self.classes[target], dict) else {}
        known = [texts for texts in known.values() if isinstance(texts, dict)]
        return [m for m in known[0] if all(m in texts for texts in known)] if known else [None]

    def concepts(self):
        """Every structure that the file has texts of, for any data set -> {class name: draw}, where draw(rng) is
        {attribute: text} in wordings to train with.

        What several data sets or modalities say of a name is said of one structure, and not to be told apart: each draw
        takes one of them. InputError for whatever is wrong with any data set's texts.
        """
        found = {}
        for name in self.described:
            texts = Texts(name, self.path, entries=self.entries)
            texts.bare = self.bare
            for target in texts.classes:
                for modality in texts.modalities(target):
                    texts.check([(target, modality)])
                    found.setdefault(target, []).append(partial(texts, target, modality))
        return {name: partial(draw_any, sources) for name, sources in found.items()}


def draw_nonsense(rng):
    """Random {attribute: text} about one to three of ImageNet's everyday things: there is nothing to find."""
    from torchvision.models import ResNet50_Weights  # only training asks, and it takes two seconds to load
    things = ResNet50_Weights.DEFAULT.meta["categories"]
    drawn = rng.choice(things, rng.integers(1, 4), replace=False)
    return {kind: rng.choice(forms).format(rng.choice(drawn)) for kind, forms in NONSENSE.items()}


def read_entries(name, path):
    """{data set: its entry} of a file. Those of --dataset folder stand in a file of their own, and attributes.json's
    are known besides: it may name one of them, and training tells its structures from theirs."""
    others = read_json(HERE / "attributes.json") if name == "folder" else {}
    return others | read_json(path)


def own_texts(record, dataset=None):
    """Where a checkpoint's record says that the texts of --dataset folder are; None of other data sets, and where
    another `dataset` is asked for."""
    own = record.get("dataset") == "folder" and dataset in (None, "folder")
    return record.get("arguments", {}).get("attributes_file") if own else None


def write_form(path, name, classes, drafts):
    """Writes a file of texts to fill in for the classes of a data set. drafts: {class: {attribute: wordings}}, for a
    start."""
    form = {target: drafts.get(target, {kind: [""] for kind in ATTRIBUTES}) for target in classes}
    write_atomically(path, json.dumps({name: form}, indent=1, ensure_ascii=False).encode())
    print(f"{path}: a form for the texts of {len(form)} classes; fill in or correct it"
          + (f" ({listed(drafts)}: drafted from attributes.json)" if drafts else ""))


def listed(names, most=8):
    """Names as a message has them."""
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def listed_pairs(pairs):
    """The same of (image, target)."""
    return listed(f"{target} of {image}" for image, target in pairs)


def known_names(name, names):
    """The names that there are, the ones like `name` first, for the message that this one is unknown."""
    close = get_close_matches(name.lower(), names, 3)
    return listed([*close, *(other for other in names if other not in close)], 12)


def draw_any(sources, rng):
    """The texts of one of several sources, functions of rng."""
    return sources[rng.integers(len(sources))](rng=rng)


def strings(value):
    """Every string in dicts and lists of whatever depth."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)


def are_texts(value):
    return isinstance(value, list) and value and all(isinstance(t, str) and t.strip() for t in value)


def read_image_texts(path):
    """JSON lines {"image": key or case, "target": class, "position": text or [texts], "texture": ..., "shape": ...},
    where attributes may be left out -> {(image, target): {attribute: [texts]}}."""
    found = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
            name = entry["image"], entry["target"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{where}: not {{"image": "...", "target": "...", "position": "...", "texture": "...", '
                             '"shape": "..."}; correct the line') from None
        texts = {kind: [entry[kind]] if isinstance(entry[kind], str) else entry[kind]
                 for kind in ATTRIBUTES if kind in entry}
        if not all(isinstance(part, str) for part in name):
            raise InputError(f"{where}: image and target should be texts; correct the line")
        unknown = [key for key in entry if key not in KEYS]
        if unknown or not any(kind in entry for kind in ATTRIBUTES):
            what = f"{unknown[0]} is not one of" if unknown else "says nothing; give one or more of"
            raise InputError(f"{where}: {what} {', '.join(ATTRIBUTES)}; correct the line")
        for kind, value in texts.items():
            if not are_texts(value):
                raise InputError(f"{where}: {kind} is empty or not text; write it, or leave {kind} out")
        if name in found:
            raise InputError(f"{where}: {name[1]} of {name[0]} for the second time; keep one of the lines")
        found[name] = texts
    if not found:
        raise InputError(f"{path}: holds no text; write a line, or leave the file out")
    return found


class Rephrased:
    """The texts of a data set, otherwise than they should be: how much does the model listen?

    reworded: in wordings that training never drew, see Texts.held_out; wrong: those of the next class of the data set
    that has texts for the modality; empty: none at all.
    """

    def __init__(self, texts, how, pairs):
        if how not in TEXTS:
            raise InputError(f"--text {how}: choose from {', '.join(TEXTS)}")
        self.texts, self.how, self.known = texts, how, {}
        for name, modality in pairs:
            self.known.setdefault(modality, {})[name] = None
        if how == "wrong" and any(len(names) < 2 for names in self.known.values()):
            raise InputError("--text wrong: there is a modality with a single class, so no other text; choose "
                             "reworded or empty")

    def __call__(self, name, modality, sample=None):
        if self.how == "empty":
            return dict.fromkeys(ATTRIBUTES, "")
        if self.how == "wrong":
            names = list(self.known[modality])
            return self.texts(names[(names.index(name) + 1) % len(names)], modality)
        return (self.texts.held_out if self.how == "reworded" else self.texts)(name, modality, sample=sample)

"""The clinical texts: of every class (attributes.json), of single images (--texts), and otherwise than they should be.

    texts = Texts("synapse")
    texts("liver", "ct")  ->  {"position": "...", "texture": "...", "shape": "..."}
"""
import json
from pathlib import Path

from common import ATTRIBUTES, InputError, read_text

HERE = Path(__file__).resolve().parent
FORM = '{"position": ["..."], "texture": ["..."], "shape": ["..."]}'
TEXTS = ("own", "reworded", "wrong", "empty")


class Texts:
    """The clinical texts of a data set's classes (attributes.json), and those of single images where a file has them.

    texts("liver", "ct") -> {"position": str, "texture": str, "shape": str}: the first wordings, or those of another
    number. With rng, random ones.
    An attribute is a list of wordings, or {modality: list} where the look depends on it. A string in place of a whole
    data set names the one whose texts it shares. InputError, with the entry to add, for whatever is missing.
    """

    def __init__(self, name, path=None, per_image=None):
        self.name, self.path = name, Path(path or HERE / "attributes.json")
        try:
            entries = json.loads(read_text(self.path))
        except json.JSONDecodeError as e:
            raise InputError(f"{self.path}: not JSON ({e}); correct it") from None
        entry = entries.get(name) if isinstance(entries, dict) else None
        entry = entries.get(entry) if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise InputError(f'{self.path}: no texts for data set {name}; add "{name}": {{"<class>": {FORM}, ...}}')
        self.classes = entry
        self.images = read_image_texts(per_image) if per_image else {}

    def check(self, pairs):
        """InputError unless every (class, modality) of a data set has its texts; those of single images aside."""
        for target, modality in pairs if not self.images else ():
            self(target, modality)

    def wordings(self, target, modality, kind):
        """The list of wordings of one attribute."""
        known = self.classes.get(target)
        if not isinstance(known, dict):
            raise InputError(f'{self.path}: no texts for {self.name}\'s class {target}; add under "{self.name}": '
                             f'"{target}": {FORM}')
        texts = known.get(kind)
        where = f"{self.name}, {target}, {kind}"
        if isinstance(texts, dict):
            if modality not in texts:
                raise InputError(f'{self.path}: {where}: nothing for {modality}, only for {", ".join(texts)}; add '
                                 f'"{modality}": ["..."]')
            texts, where = texts[modality], f"{where}, {modality}"
        if not (isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts)):
            raise InputError(f'{self.path}: {where}: empty or blank; give "{kind}": ["..."], a list of texts')
        return texts

    def own(self, target, sample):
        """The texts of this very image, or of its case."""
        return self.images.get((sample.key, target)) or self.images.get((sample.case, target)) or {}

    def __call__(self, target, modality, sample=None, rng=None, number=0):
        own = self.own(target, sample) if sample is not None else {}
        draw = lambda texts: texts[number % len(texts) if rng is None else rng.integers(len(texts))]
        return {kind: draw(own.get(kind) or self.wordings(target, modality, kind)) for kind in ATTRIBUTES}

    @property
    def has_held_out(self):
        return True

    def held_out(self, target, modality, k=0):
        return self(target, modality, number=-1 - k)

    def draw_pairs(self, rng, most=16):
        """Two random triples of texts, one after the other, of each of up to `most` structures -> a list of dicts."""
        names = list(self.classes)
        names = [names[i] for i in rng.permutation(len(names))[:most]]
        def draw(name):
            out = {}
            for kind in ATTRIBUTES:
                w = self.classes[name][kind]
                w = w if isinstance(w, list) else w[list(w)[rng.integers(len(w))]]
                out[kind] = w[rng.integers(len(w))]
            return out
        return [draw(name) for name in names for _ in range(2)]

    def all(self, sample):
        """The name and every wording of every class that the sample may be asked for."""
        for target in dict.fromkeys((*sample.targets, *sample.absent)):
            own = self.own(target, sample)
            yield target
            for kind in ATTRIBUTES:
                yield from own.get(kind) or self.wordings(target, sample.modality, kind)


def read_image_texts(path):
    """JSON lines {"image": key or case, "target": class, "position": text or [texts], "texture": ..., "shape": ...},
    where attributes may be left out -> {(image, target): {attribute: [texts]}}."""
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
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
        for kind, value in texts.items():
            if not (isinstance(value, list) and value and all(isinstance(t, str) and t.strip() for t in value)):
                raise InputError(f"{where}: {kind} is empty or not text; write it, or leave {kind} out")
        if name in found:
            raise InputError(f"{where}: {name[1]} of {name[0]} for the second time; keep one of the lines")
        found[name] = texts
    return found


class Rephrased:
    """The texts of a data set, otherwise than they should be: how much does the model listen?

    reworded: the second wording of each; wrong: those of the next class of the data set that has texts for the
    modality; empty: none at all.
    """

    def __init__(self, texts, how, pairs):
        if how not in TEXTS:
            raise InputError(f"--text {how}: choose from {', '.join(TEXTS)}")
        self.texts, self.how, self.known = texts, how, {}
        for name, modality in pairs:
            self.known.setdefault(modality, []).append(name)
        if how == "wrong" and any(len(set(names)) < 2 for names in self.known.values()):
            raise InputError("--text wrong: there is a modality with a single class, so no other text; choose "
                             "reworded or empty")

    def __call__(self, name, modality, sample=None):
        if self.how == "empty":
            return dict.fromkeys(ATTRIBUTES, "")
        if self.how == "wrong":
            names = list(dict.fromkeys(self.known[modality]))
            return self.texts(names[(names.index(name) + 1) % len(names)], modality)
        return self.texts(name, modality, sample, number=self.how == "reworded")


class HeldOut:
    """The texts of a data set in wordings that training never sees."""

    def __init__(self, texts):
        self.texts = texts

    def __call__(self, name, modality, sample=None):
        return self.texts.held_out(name, modality)

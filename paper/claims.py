"""The paper's claims about its texts, put to the test where they can fail: what is each text worth, and to whom?

    python -m paper.claims texts --checkpoint weights/abdomen-ct.safetensors --dataset synapse --data DIR \
        --json out/claims.json --page docs/claims.md

Each of some slices is encoded once and asked, without a prompt, for every structure in its own words, for some
nonsense, and for two structures that it holds in words that were changed in every way of `changed_texts`. Dice is of
all pixels of the slices together; each difference has an interval. A killed run goes on where it stopped when the
command is given again; a finished one is read back, and with more --slices it goes on from there.
"""
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (ATTRIBUTES, InputError, Parser, add_runtime_flags, make_folder, positive_int, read_json, read_text,
                    run, seeded, write_atomically)
from data import SPLITS, add_data_flags, box_prompt, dataset_options, merge_instances, open_dataset
from encoders import FeatureCache, fingerprint
from eval import as_trained
from inference import UNSURE, autocast
from medsegr import delta
from metrics import Journal
from paper.tables import markdown, show
from plots import COLOURS, matrices, plt, save
from runs import load_checkpoint
from texts import Texts

HERE = Path(__file__).parent
CHANGED = 2  # structures per slice that are asked for in changed words
NONSENSE = 4  # nonsense texts per slice
BLOCK = 16  # questions that are decoded at a time
ABSENT = 0.05  # share of the absent structures that may still be answered at the threshold
FEW = 5  # slices: of fewer no difference is called real
INTERVAL = (0.025, 0.975)  # the ends of 95 % of what a bootstrap draws


# ---------------------------------------------------------------------------------------------------------------------
# Questions

class Question(NamedTuple):
    """A target: some structure's texts, or the nonsense that stands for them."""
    name: str    # the structure that is meant; "" for nonsense
    how: str     # what was done to its texts
    other: str   # with which other structure's, or in which wording; "" where there is but one way
    texts: dict  # {attribute: text}


SWITCHED_OFF = ("A_pos switched off", "texture filter switched off", "shape filter switched off",
                "all three switched off", "T_attr: the mean structure's")


def mirrored(text):
    """The same text with left for right and right for left."""
    sides = dict(left="right", right="left", Left="Right", Right="Left")
    return re.sub(r"\b(left|right)\b", lambda side: sides[side[0]], text, flags=re.I)


def changed_texts(name, own, others, held_out, words, negated, rng):
    """Every question about one structure but that in its own words.

    own: {attribute: text}; others: {name: the same} of the other structures; held_out, words, negated: lists of the
    same of this structure, in other words.
    """
    put = lambda texts, *kinds: own | {kind: texts[kind] for kind in kinds}
    everywhere = lambda change: {kind: change(text) for kind, text in own.items()}
    nothing, other = dict.fromkeys(ATTRIBUTES, ""), str(rng.choice(list(others)))
    some = lambda wordings, n: [(str(i), wordings[i]) for i in rng.permutation(len(wordings))[:n]]
    found = [(f"{kind}: emptied", "", put(nothing, kind)) for kind in ATTRIBUTES]
    found += [("texture and shape: emptied", "", put(nothing, "texture", "shape")), ("all three: emptied", "", nothing)]
    found += [("position: another's", each, put(texts, "position")) for each, texts in others.items()]
    found += [(f"{' and '.join(kinds)}: another's", other, put(others[other], *kinds))
              for kinds in (["texture"], ["shape"], ["texture", "shape"])]
    found += [(how, "", own) for how in SWITCHED_OFF]
    found += [("held-out wordings", *each) for each in some(held_out, 2)]
    found += [("paper/words.json", *each) for each in some(words, 2)]
    found += [("told by what it is not", *each) for each in some(negated, 1)]
    found += [("its name alone", "", everywhere(lambda text: f"the {name}")),
              ("negated: \"not the ..., not ...\"", "", everywhere(lambda text: f"not the {name}, not {text}")),
              ("mirrored: left for right", "", everywhere(mirrored))]
    return [Question(name, *each) for each in found]


class Wordings:
    """All words that questions are made of: attributes.json (or the file `path`), words.json and hard_words.json."""

    def __init__(self, dataset, path=None):
        self.texts, self.words = Texts(dataset, path), Texts(dataset, HERE / "words.json")
        hard = read_json(HERE / "hard_words.json")
        self.negated, self.nonsense = hard["negated"], hard["nonsense"]

    def questions(self, sample, classes, chosen, seed=0):
        """-> [Question] of a slice: every class in its own words, nonsense, and the `chosen` classes in all others."""
        own = {name: self.texts(name, sample.modality) for name in classes}
        asked = [Question(name, "own", "", texts) for name, texts in own.items()]
        drawn = seeded("nonsense", seed, sample.key).permutation(len(self.nonsense))[:NONSENSE]
        asked += [Question("", "nonsense", str(k), self.nonsense[k]) for k in drawn]
        for name in chosen:
            others = {other: texts for other, texts in own.items() if other != name}
            held_out = [self.texts.held_out(name, sample.modality, k) for k in range(12)]
            words = [self.words(name, sample.modality, number=k) for k in range(12)]
            negated = [dict(zip(ATTRIBUTES, each)) for each in zip(*(self.negated[name][kind] for kind in ATTRIBUTES))]
            rng = seeded("words", seed, sample.key, name)
            asked += changed_texts(name, own[name], others, held_out, words, negated, rng)
        return asked


def choose_slices(present, n, seed=0):
    """present: {number of an image: names of the classes that it holds} -> [(image, classes to ask for in changed
    words)], n at most, in an order in which every class comes as often as can be; fewer stand at the start of more."""
    order = seeded("slices", seed).permutation([i for i, names in present.items() if names]).tolist()
    times, found = {name: 0 for names in present.values() for name in names}, []
    while order and len(found) < n:
        image = next(i for rarest in sorted(times, key=times.get) for i in order if rarest in present[i])
        chosen = sorted(present[image], key=times.get)[:CHANGED]
        times.update({name: times[name] + 1 for name in chosen})
        order.remove(image)
        found.append((image, chosen))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One slice

def switch_off(priors, hows, own):
    """Priors of M targets, and how each is asked: the identity, in place, of the operators that are switched off.
    own: the rows whose mean T_attr stands for no structure in particular."""
    for m, how in enumerate(hows):
        off = lambda operator: how in (f"{operator} switched off", "all three switched off")
        if off("A_pos") and priors.A_pos is not None:
            priors.A_pos[m] = 1
        if off("texture filter") and priors.texture is not None:
            priors.texture[m] = delta(7, priors.texture)
        if off("shape filter") and priors.shape_kernel is not None:
            priors.shape_kernel[m], priors.shape_offset[m] = delta(3, priors.shape_kernel), 0
        if how == "T_attr: the mean structure's" and priors.T_attr is not None:
            priors.T_attr[m] = priors.T_attr[own].mean(0)


@torch.no_grad()
def answer_all(model, features, asked):
    """Features [1,C,G,G] of an image, [Question] -> masks bool [M,S,S], predicted IoU float [M], A_pos [M,g,g]|None."""
    priors = model.encode_attributes([q.texts for q in asked], empty=True)
    hows = [q.how for q in asked]
    switch_off(priors, hows, [m for m, how in enumerate(hows) if how == "own"])
    S, masks, iou = model.config.image_size, [], []
    for rows in torch.arange(len(asked), device=model.device).split(BLOCK):
        logits, expected = model.decode(features.to(model.device), torch.zeros_like(rows), priors.take(rows))
        logits = F.interpolate(logits.float()[:, None], (S, S), mode="bilinear", align_corners=False)[:, 0]
        masks.append((logits > 0).cpu()), iou.append(expected.float().cpu())
    return torch.cat(masks).numpy(), torch.cat(iou).numpy(), priors.A_pos


def measure(model, features, sample, asked, classes):
    """-> a row for each question: what was asked, pixels of its mask, how many of them lie in each class of the truth,
    the predicted IoU; of a class in its own words also the share of A_pos's gain in each class's box, null where there
    is none. The first row holds the truth itself and the boxes' shares of the image."""
    S = model.config.image_size
    truth, box = np.zeros((2, len(classes), S, S), bool)
    for name, mask in zip(sample.targets, sample.masks):
        if mask.any():  # it may be too small for the model's grid
            k = classes.index(name)
            truth[k], (x0, y0, x1, y1) = mask, box_prompt(mask).astype(int)
            box[k, y0:y1 + 1, x0:x1 + 1] = True
    masks, iou, A_pos = answer_all(model, features, asked)
    about, held = dict(image=sample.key, case=sample.case), box.any((1, 2))

    def shares(weights):
        inside = (box * weights).sum((1, 2)) / weights.sum()
        return [float(x) if there else None for x, there in zip(inside, held)]

    rows = [about | dict(name="", how="truth", other="", size=0, iou=0.0, gain=shares(np.ones((S, S))),
                         inside=truth.sum((1, 2)).tolist())]
    inside = masks.reshape(len(asked), -1).astype(np.float32) @ truth.reshape(len(classes), -1).T.astype(np.float32)
    for m, q in enumerate(asked):
        gain = None
        if q.how == "own" and A_pos is not None:
            weights = F.interpolate(A_pos[m].float()[None, None], (S, S), mode="bilinear", align_corners=False)[0, 0]
            weights = (weights - 1).clamp(min=0).cpu().numpy()
            gain = shares(weights) if weights.any() else None
        rows.append(about | dict(name=q.name, how=q.how, other=q.other, size=int(masks[m].sum()), iou=float(iou[m]),
                                 inside=inside[m].astype(int).tolist(), gain=gain))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Dice, differences and their intervals

class Found:
    """The rows of N slices, of K classes. Dice needs two numbers of each: pixels in common, and of both together."""

    def __init__(self, rows, classes, seed=0, draws=2000):
        self.rows, self.classes = rows, list(classes)
        truths = [row for row in rows if row["how"] == "truth"]
        self.slices = {row["image"]: n for n, row in enumerate(truths)}
        self.truth = np.array([row["inside"] for row in truths])  # [N,K] pixels
        self.chance = np.array([row["gain"] for row in truths], float)  # [N,K] share of the image that the box has
        self.cases = np.array([row["case"] for row in truths])
        self.weights = two_stage(self.cases, draws, seed)  # [draws,N]

    def own(self, field):
        """A number of each answer to a class's own words, [N,K]; of "inside" and "gain", which have one for each class
        of the truth, [N,K,K]. NaN where there is none."""
        missing = [None] * len(self.classes)
        values = [missing if row[field] is None else row[field] for row in self.rows if row["how"] == "own"]
        values = np.array(values, float)  # a slice is asked for all classes, in their order
        return values.reshape(*self.truth.shape, *values.shape[1:])

    def counts(self, how, other=None):
        """-> pixels in common [N,K], pixels of answer and truth together [N,K], over the slices that hold the class and
        in which it was asked for so; 0 elsewhere."""
        both, sizes = np.zeros((2, *self.truth.shape))
        for row in self.rows:
            if row["how"] == how and row["name"] and other in (None, row["other"]):
                n, k = self.slices[row["image"]], self.classes.index(row["name"])
                both[n, k] += row["inside"][k]
                sizes[n, k] += row["size"] + self.truth[n, k]
        return both, sizes * (self.truth > 0)

    def swapped(self, j):
        """counts() of every class where all its texts are those of class j: class j's own answers."""
        return self.own("inside")[:, j], (self.own("size")[:, [j]] + self.truth) * (self.truth > 0)

    def compare(self, changed):
        """counts() -> Dice of it less that of its own words in the same slices: [K + 1] values (the last is the
        classes' mean), low and high ends of their 95 % intervals, and whether these leave 0 out (never of less than
        FEW slices)."""
        asked = changed[1] > 0
        own = [part * asked for part in self.counts("own")]
        difference = lambda weights: with_mean(dice(changed, weights) - dice(own, weights))
        low, high = pd.DataFrame(difference(self.weights)).quantile(INTERVAL).to_numpy()
        enough = np.append(asked.sum(0), asked.any(1).sum()) >= FEW
        return difference(np.ones((1, len(self.truth))))[0], low, high, ((low > 0) | (high < 0)) & enough

    def dice(self, counts):
        """[K + 1] Dice."""
        return with_mean(dice(counts, np.ones((1, len(self.truth)))))[0]


def two_stage(cases, draws, seed):
    """How often a bootstrap draws each slice, [draws,N]: cases with replacement, then slices of each drawn case."""
    rng, members = np.random.default_rng(seed), [np.flatnonzero(cases == case) for case in dict.fromkeys(cases)]
    times = np.zeros((draws, len(cases)), int)
    for row in times:
        for c in rng.integers(len(members), size=len(members)):
            row += np.bincount(rng.choice(members[c], len(members[c])), minlength=len(cases))
    return times


def dice(counts, weights):
    """Counts [N,K], weights [R,N] of the slices -> [R,K], NaN where a class is in no slice."""
    with np.errstate(invalid="ignore"):
        return 2 * (weights @ counts[0]) / (weights @ counts[1])


def with_mean(values):
    """[R,K] -> [R,K + 1]: and their mean, without those that are not known."""
    return np.column_stack([values, pd.DataFrame(values).mean(axis=1)])


# ---------------------------------------------------------------------------------------------------------------------
# Is something found that is not there?

class Scored(NamedTuple):
    """Answers with a score: the predicted IoU, 0 where the mask is empty."""
    score: np.ndarray  # [n]
    at: np.ndarray     # [n]: number of its slice


def scored(found, kind):
    """kind: "present" or "absent", classes in their own words; or "nonsense"."""
    if kind == "nonsense":
        rows = [row for row in found.rows if row["how"] == "nonsense"]
        return Scored(np.array([row["iou"] * (row["size"] > 0) for row in rows]),
                      np.array([found.slices[row["image"]] for row in rows], int))
    chosen = (found.truth > 0) == (kind == "present")
    return Scored((found.own("iou") * (found.own("size") > 0))[chosen], np.nonzero(chosen)[0])


def area_under_roc(yes, no, weights=None):
    """Scores [P] of what is there, [Q] of what is not -> the chance that one of the first is the higher; half of it
    where they are equal. weights: of both, [R,P] and [R,Q] -> [R]. NaN where one kind is lacking."""
    above = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
    if weights is None:
        return above.mean() if above.size else np.nan
    a, b = weights
    with np.errstate(invalid="ignore"):
        return ((a @ above) * b).sum(1) / (a.sum(1) * b.sum(1))


def threshold(absent, share=ABSENT):
    """The smallest score above which at most this share of the absent structures lies."""
    return float(np.sort(absent)[::-1][int(share * len(absent) + 1e-9)]) if len(absent) else 0.0


def dice_above(found, least):
    """Mean Dice over the classes, own words, of all slices, where answers up to a predicted IoU of `least` are dropped;
    a structure found where there is none counts."""
    kept = found.own("iou") > least
    both = (found.own("inside").diagonal(axis1=1, axis2=2) * kept).sum(0)
    sizes = (found.own("size") * kept + found.truth).sum(0)
    return float(np.nanmean(2 * both / np.where(sizes, sizes, np.nan)))


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def report(found):
    """-> (markdown of all tables, {name: what is drawn of it})."""
    names, own = found.classes, found.counts("own")
    hows = list(dict.fromkeys(row["how"] for row in found.rows if row["how"] not in ("truth", "own", "nonsense")))
    changes = {how: found.compare(found.counts(how)) for how in hows}
    swaps = [found.compare(found.swapped(j)) for j in range(len(names))]
    places = [found.compare(found.counts("position: another's", name)) for name in names]
    # [structure asked for, structure whose text it is]
    matrix = lambda each: (-np.array([x[0] for x in each]).T[:-1], np.array([x[3] for x in each]).T[:-1])
    swaps, places = matrix(swaps), matrix(places)
    signed = lambda value, real: show(value, "+.3f") + "*" * bool(real)
    lines = [["own words: Dice", *(show(x, ".3f") for x in found.dice(own))]]
    lines += [[how, *map(signed, value, real)] for how, (value, _, _, real) in changes.items()]
    lines += [[f"*slices, {what}*", *map(str, (counts[1] > 0).sum(0)), ""]
              for what, counts in (("own words", own), ("changed", found.counts(SWITCHED_OFF[0])))]
    text = ("**Table A.** Dice in its own words, and what each change adds to it or takes away, in the same slices. *: "
            f"the 95 % interval leaves 0 out (bootstrap over cases and their slices, {FEW} or more).\n\n"
            + markdown(["", *names, "mean"], lines))
    pointing, lift = position_table(found)
    text = "\n".join([text, swap_table(found, swaps, places), pointing, roc_table(found)])
    return text, dict(changes=changes, swaps=swaps, places=places, lift=lift)


def where_found(found, how, second):
    """Of the answers to `how`: the shares of all their pixels that lie in the structure that is meant, and in the one
    that second(row) names; of the slices that hold both. (nan, nan) where there is none."""
    sums = np.zeros(3)
    for row in found.rows:
        if row["how"] == how and (other := second(row)) in found.classes:
            truth, i, j = found.truth[found.slices[row["image"]]], *map(found.classes.index, (row["name"], other))
            if truth[i] and truth[j] and i != j:
                sums += row["inside"][i], row["inside"][j], row["size"]
    return sums[:2] / sums[2] if sums[2] else np.full(2, np.nan)


def swap_table(found, swaps, places):
    """Where the answer goes when the texts are another structure's."""
    lines = []
    for what, (lost, real) in (("all three texts another's", swaps), ("the position alone another's", places)):
        known = ~np.isnan(lost) & ~np.eye(len(lost), dtype=bool)
        if known.any():
            lines.append([what, *(show(f(lost[known]), ".3f") for f in (np.mean, np.min, np.max)),
                          f"{real[known].sum()} of {known.sum()}"])
    text = ("**Table B.** Dice lost by swapping, over all pairs of structures; the pairs are in the picture.\n\n"
            + markdown(["", "mean", "least", "most", "pairs with *"], lines))
    ways = {"position: another's": lambda row: row["other"],
            "mirrored: left for right": lambda row: mirrored(row["name"])}
    lines = [[how, *(show(100 * x, ".0f") for x in where_found(found, how, second))] for how, second in ways.items()]
    return text + ("\nOf the pixels that are then found, in slices that hold both, in percent:\n\n"
                   + markdown(["", "in the structure that is meant", "in the other one"], lines))


def position_table(found):
    """Does the position map point at its structure? -> (markdown, lift [K,K]: of the row's map in the column's box)."""
    gain = found.own("gain").swapaxes(0, 1)  # [map,N,box]
    known = ~np.isnan(found.chance)
    mean = lambda x, weights: (weights @ np.where(known, x, 0)) / np.maximum(weights @ known, 1e-9)
    once = np.ones((1, len(known)))
    chance = mean(found.chance, once)[0]
    lift = np.array([mean(x, once)[0] for x in gain]) / np.where(chance, chance, np.nan)
    lines = []
    for k, name in enumerate(found.classes):
        held = found.weights[found.weights @ known[:, k] > 0]  # draws in which the structure occurs at all
        low, high = pd.Series(mean(gain[k], held)[:, k] / mean(found.chance, held)[:, k]).quantile(INTERVAL)
        place = "-" if np.isnan(lift[k, k]) else f"{1 + (lift[:, k] > lift[k, k]).sum()} of {len(gain)}"
        lines.append([name, show(lift[k, k] * chance[k], ".3f"), show(chance[k], ".3f"), show(lift[k, k]),
                      f"{show(low)} - {show(high)}", place])
    return ("**Table C.** Share of A_pos's gain (what lies above 1) inside the structure's box, against chance, the "
            "box's share of the image; last, the place of its own map among all maps, by their gain in this box.\n\n"
            + markdown(["", "share of the gain", "chance", "ratio", "95 % interval", "place"], lines)), lift


def roc_table(found):
    """How often something is found that is not there, and the threshold on the predicted IoU."""
    kinds = {kind: scored(found, kind) for kind in ("present", "absent", "nonsense")}
    present, lines, percent = kinds["present"], [], lambda a, b: f"{a / b:.1%}" if b else "-"
    for kind in ("absent", "nonsense"):
        no = kinds[kind]
        draws = area_under_roc(present.score, no.score, (found.weights[:500, present.at], found.weights[:500, no.at]))
        low, high = (show(x, ".3f") for x in pd.Series(draws).quantile(INTERVAL))
        lines.append([f"present against {kind}", f"{len(present.score)}, {len(no.score)}",
                      percent((no.score > 0).sum(), len(no.score)),
                      show(area_under_roc(present.score, no.score), ".3f"), f"{low} - {high}"])
    text = ("**Table D.** Something found that is not there (any pixel); the predicted IoU as the score.\n\n"
            + markdown(["", "answers", "found all the same", "area under the ROC curve", "95 % interval"], lines))
    least = threshold(kinds["absent"].score)
    cells = lambda t: [percent((each.score > t).sum(), len(each.score)) for each in kinds.values()]
    steps = [("none", 0.0), ("predict.py's", UNSURE), *((f"{share:.0%} of the absent", threshold(
        kinds["absent"].score, share)) for share in (0.2, 0.1, ABSENT, 0.01))]
    lines = [[name, f"{t:.3f}", *cells(t), f"{dice_above(found, t):.3f}"] for name, t in steps]
    apart = [out_of_sample(found, kinds, case) for case in dict.fromkeys(found.cases)]
    if len(apart) > 1:
        sums = np.sum(apart, 0)
        lines.append([f"{ABSENT:.0%}, chosen on the other cases", "-", *(percent(*pair) for pair in sums), "-"])
    text += ("\n**Table E.** Answers are dropped unless their predicted IoU lies above a threshold; what is still "
             "answered, and the mean Dice over all slices, in which what is found in vain counts.\n\n"
             + markdown(["threshold for", "predicted IoU", *kinds, "Dice"], lines))
    return text + f"\nThe threshold at which {ABSENT:.0%} of the absent are still answered: {least:.3f}.\n"


def out_of_sample(found, kinds, case):
    """[(answered, all)] of each kind in a case, at the threshold of the other cases."""
    here = found.cases == case
    least = threshold(kinds["absent"].score[~here[kinds["absent"].at]])
    return [((each.score[here[each.at]] > least).sum(), here[each.at].sum()) for each in kinds.values()]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and the page

def draw(found, drawn, folder, stem):
    """FOLDER/STEM-emptied.png, -swapped.png, -position.png, -found.png."""
    names, path = found.classes, lambda what: Path(folder) / f"{stem}-{what}.png"

    def panel(title, hows):
        lost, real = (np.array([drawn["changes"][how][part] for how in hows]).T for part in (0, 3))
        return title, -lost, real, [*names, "mean"], hows

    hows = [how for how in drawn["changes"] if how.endswith("emptied")]
    matrices([panel("texts emptied", hows), panel("parts switched off", SWITCHED_OFF)], path("emptied"),
             "Dice lost (*: the 95 % interval leaves 0 out)")
    matrices([("all three texts are those of the column", *drawn["swaps"], names, names),
              ("the position text alone is that of the column", *drawn["places"], names, names)], path("swapped"),
             "Dice lost by the structure of the row (*: the 95 % interval leaves 0 out)")
    lift = drawn["lift"]
    matrices([("map of the row in the box of the column", lift, np.zeros(lift.shape, bool), names, names)],
             path("position"), "gain of A_pos, over chance (1)", high=max(2.0, np.nanmax(lift, initial=2.0)))
    draw_roc({kind: scored(found, kind).score for kind in ("present", "absent", "nonsense")}, path("found"))


def draw_roc(scores, path):
    """scores: {"present", "absent", "nonsense": [n]} -> a PNG of two curves."""
    figure, axis = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    for kind, line, colour in (("absent", "-", COLOURS[4]), ("nonsense", "--", COLOURS[5])):
        steps = np.unique(np.concatenate([scores["present"], scores[kind], [0.0]]))[::-1]
        share = lambda of: [0.0, *((scores[of] > t).mean() if len(scores[of]) else np.nan for t in steps)]
        area = area_under_roc(scores["present"], scores[kind])
        axis.plot(share(kind), share("present"), line, color=colour, marker=".", markersize=3,
                  label=f"against {kind}: area {area:.3f}")
    axis.set(xlabel="found though it is not there", ylabel="found where it is", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02),
             title="predicted IoU as the score")
    axis.legend(loc="lower right")
    save(figure, path)


START, END = "<!-- tables: python -m paper.claims texts -->", "<!-- end of the tables -->"


def fill_page(path, text):
    """Puts the text between the two marks of a page. InputError where it has none."""
    page = read_text(path)
    if START not in page or END not in page:
        raise InputError(f"{path}: lacks the lines {START} and {END}, between which tables are put; add them")
    before, after = page.split(START)[0], page.split(END)[1]
    write_atomically(path, f"{before}{START}\n\n{text}\n{END}{after}".encode())


# ---------------------------------------------------------------------------------------------------------------------

def measure_slices(model, dataset, wordings, args, cache, journal, done):
    """The rows of every chosen slice: of those that are done, and of the rest, which are measured now."""
    samples = lambda i: merge_instances(dataset[i])
    present = {i: [t for t, mask in zip(s.targets, s.masks) if mask.any()] for i in range(len(dataset))
               for s in [samples(i)]}
    chosen, rows = choose_slices(present, args.slices, args.seed), []
    if not chosen:
        raise InputError(f"--split {args.split}: no image of it holds a structure; choose another split")
    journal.begin()
    for i, names in tqdm(chosen, "asking", unit="slice", mininterval=1):
        if i not in done:
            sample = samples(i)
            image = torch.from_numpy(sample.image).permute(2, 0, 1)[None].contiguous()
            asked = wordings.questions(sample, dataset.classes, names, args.seed)
            with autocast(model.device, args.precision):
                features = cache(image, model.encode_image)
                done[i] = measure(model, features, sample, asked, list(dataset.classes))
            journal.add(i, done[i])
        rows += done[i]
    return rows


def heads_table(model, own):
    """How far the operators of each structure's own texts, {name: texts}, are from those that change nothing."""
    with torch.no_grad():
        p = model.encode_attributes(list(own.values()))
    filter7, filter3 = (delta(k, torch.empty(0)) for k in (7, 3))
    heads = {"A_pos, mean": (p.A_pos, 1, torch.mean), "A_pos, most": (p.A_pos, 1, torch.amax),
             "texture filter, sum": (p.texture, filter7, torch.sum),
             "shape filter, sum": (p.shape_kernel, filter3, torch.sum),
             "shape offsets, most": (p.shape_offset, 0, torch.amax)}
    cells = {head: of_all((x.float().cpu() - identity).abs().flatten(1), 1)
             for head, (x, identity, of_all) in heads.items() if x is not None}
    lines = [[name, *(show(float(values[k]), ".3f") for values in cells.values())] for k, name in enumerate(own)]
    return ("**Table F.** How far the operators of the structures' own texts are from the ones that change nothing: "
            "|A_pos - 1|, |filter - identity|, offsets in feature cells.\n\n" + markdown(["", *cells], lines))


def measure_texts(args):
    """what each text is worth, to which structure"""
    model, record = load_checkpoint(args.checkpoint)
    model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    args.dataset = name = args.dataset or record.get("dataset") or "synapse"
    for line in as_trained(args, record):
        print(line)
    dataset = open_dataset(name, args.data, args.split, model.config.image_size, **dataset_options(args))
    if len(dataset.classes) < 2:
        raise InputError(f"--dataset {name}: has one class, whose texts cannot be swapped; choose synapse")
    if model.clip is None:
        raise InputError(f"--checkpoint {args.checkpoint}: reads no texts; choose a model that does")
    if args.texts:
        raise InputError(f"--texts {args.texts}: the texts of the classes are what is measured; leave it out")
    wordings = Wordings(name, args.attributes_file)
    make_folder(Path(args.json).parent)
    settings = dict(weights=fingerprint(model.trained()), dataset=name, data=str(args.data), split=args.split,
                    options=dataset_options(args),
                    seed=args.seed, precision=args.precision, texts=str(args.attributes_file),
                    asked=[CHANGED, NONSENSE])
    journal, done = Journal(args.json, 0, json.dumps(settings)), {}
    if Path(args.json).is_file():
        before = read_json(args.json, "delete it, or choose another --json")
        if before.get("settings") == settings:
            done = {each["slice"]: each["rows"] for each in before["slices"]}
    done |= journal.cases
    cache = FeatureCache(args.cache, f"{model.features_key()}-{args.precision}", args.cache_gb)
    found = Found(measure_slices(model, dataset, wordings, args, cache, journal, done), dataset.classes, args.seed)
    write_atomically(args.json, json.dumps(dict(settings=settings, slices=[
        dict(slice=i, rows=rows) for i, rows in done.items()])).encode())
    journal.remove()
    text, drawn = report(found)
    own = {each: wordings.texts(each, modality) for each, modality in dataset.source.pairs}
    text = (f"{len(found.slices)} slices of {len(set(found.cases))} cases, {name}, {args.split}, no prompt, seed "
            f"{args.seed}, weights {settings['weights'][:8]}.\n\n{text}\n{heads_table(model, own)}")
    print(text)
    if args.page:
        fill_page(args.page, text)
        draw(found, drawn, Path(args.page).parent, Path(args.page).stem)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=("texts",), help=f"texts: {measure_texts.__doc__}")
    add("--checkpoint", default="weights/abdomen-ct.safetensors", help="a .safetensors file or its folder")
    add_data_flags(parser)
    add("--split", default="val", choices=SPLITS)
    add("--slices", type=positive_int, default=60, help="how many are asked about; default: %(default)s")
    add("--seed", type=int, default=0, help="of the choice of slices, of wordings, and of the bootstrap")
    add("--json", default="out/claims.json", help="every count; a run that has it is not repeated (%(default)s)")
    add("--page", help="a page of Markdown, whose tables are written anew; pictures are drawn beside it")
    add_runtime_flags(parser)
    args = parser.parse_args()
    measure_texts(args)


if __name__ == "__main__":
    run(main)

"""The paper's tables and figures from evaluations, beside the paper's own numbers (paper.json).

    python eval.py --checkpoint out/x --dataset sa-med2d --prompt box --json x-box.json          # and so on; then
    python paper.py table1 MedSeg-R=x-box.json MedSeg-R=x-point.json SAM=sam-box.json SAM=sam-point.json
    python paper.py table2 MedSeg-R=x-none.json
    python paper.py figure3 MedSeg-R=x-box.json SAM=sam-box.json ... --out figure3.png
    python paper.py figure4 MedSeg-R=x-none.json SAM=sam-box.json --out figure4.png
    python paper.py figure6 LABEL=x-1.json LABEL=x-3.json LABEL=x-5.json --tables out/tables/tables.json --out figure6.png

An evaluation is LABEL=FILE, a file that eval.py --json wrote; one label may have several prompts or numbers of points.
Tables 3 to 6 are trained by eval.py --tables, table 7 is measured by bench.py speed; figures 7 to 9 are drawn by eval.py
--plots.
"""
import json
from pathlib import Path

import numpy as np

import plots
from common import InputError, Parser, make_folder, read_text, run, write_atomically
from metrics import pearson
from readers.synapse import TEST_CASES

NUMBERS = json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))
MODALITIES = NUMBERS["table1"]["columns"][:-1]
SMALL = 0.05  # of the image's area: the paper's small objects
SA_MED2D_IMAGES = 900_000  # a fifth of SA-Med2D-20M, the paper's test images


def read_evaluations(named):
    """["LABEL=FILE"] -> [(label, what eval.py wrote)]."""
    found = []
    for item in named:
        label, _, path = item.partition("=")
        if not path:
            raise InputError(f"{item}: give LABEL=FILE, a file that eval.py --json wrote")
        try:
            evaluation = json.loads(read_text(path))
            evaluation["table"]["mean"], evaluation["targets"]["image"], evaluation["prompt"]
        except (ValueError, KeyError, TypeError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"{path}: not written by eval.py --json, or by an older one; evaluate again") from None
        found.append((label, evaluation))
    return found


def targets_of(evaluation, keep=None):
    """An evaluation's targets that lie in their image -> {column: array}, each [n]; keep: of the columns [n] -> [n]."""
    columns = {k: np.array(v, dtype=None if k in ("image", "case", "target", "modality") else float)
               for k, v in evaluation["targets"].items()}
    there = columns["area"] > 0
    columns = {k: v[there] for k, v in columns.items()}
    chosen = slice(None) if keep is None else keep(columns)
    return {k: v[chosen] for k, v in columns.items()}


def percent(value, digits=2):
    return "-" if value is None or np.isnan(value) else f"{100 * value:.{digits}f}"


def markdown(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|",
                      *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def by_modality(evaluation, keep=None):
    """-> {modality: (mean Dice over its targets, how many)} in the order of the paper's columns."""
    columns = targets_of(evaluation, keep)
    found = {m: columns["dice_strict"][columns["modality"] == m] for m in MODALITIES}
    return {m: (float(v.mean()) if len(v) else np.nan, len(v)) for m, v in found.items()}


def average(dice):
    known = [v for v, _ in dice.values() if not np.isnan(v)]
    return float(np.mean(known)) if known else np.nan


def table1(evaluations):
    """Dice per modality and their average, for points and boxes."""
    text = ""
    for prompt in ("point", "box", "none"):
        ours = [(label, by_modality(e), e) for label, e in evaluations if e["prompt"] == prompt]
        if not ours:
            continue
        same = all(e["dataset"] == "sa-med2d" and e["images"] >= SA_MED2D_IMAGES for *_, e in ours)
        rows = [[label, *(percent(v) for v, _ in dice.values()), percent(average(dice))] for label, dice, _ in ours]
        counts = ours[0][1]
        rows.append(["*masks*", *(str(n) for _, n in counts.values()), str(sum(n for _, n in counts.values()))])
        theirs = NUMBERS["table1"].get(prompt, {})
        star = "" if same else "*"
        rows += [[f"paper: {name}{star}", *(f"{v:.2f}" for v in values)] for name, values in theirs.items()]
        if theirs:
            label, dice, _ = ours[0]
            paper = dict(zip(NUMBERS["table1"]["columns"], theirs["MedSeg-R"]))
            difference = [100 * v - paper[m] for m, (v, _) in dice.items()] + [100 * average(dice) - paper["average"]]
            rows.append([f"{label} − paper's MedSeg-R{star}",
                         *("-" if np.isnan(d) else f"{d:+.2f}" for d in difference)])
        text += (f"**Table 1, prompt {prompt}**: Dice in percent, mean over the masks of {ours[0][2]['dataset']}, "
                 f"{ours[0][2]['split']} ({ours[0][2]['images']} images)\n\n"
                 + markdown(["", *MODALITIES, "average"], rows) + note(same) + "\n")
    return text or "no evaluation with a prompt among the files\n"


def note(same):
    return "" if same else "\n\\* on other data: no comparison of methods\n"


def table2(evaluations):
    """Dice of the eight organs, their mean, HD95 in voxels."""
    organs = NUMBERS["table2"]["columns"][:-2]
    rows, same = [], True
    for label, e in evaluations:
        if e["dataset"] not in ("synapse", "demo"):
            raise InputError(f"{label}: of {e['dataset']}, but table 2 is of Synapse's organs")
        same &= e["dataset"] == "synapse" and {c[4:] for c in e["volumes"]["case"]} == set(TEST_CASES)
        table = e["table"]
        for convention, suffix in (("", ""), (", strict", "_strict")):
            values = [table.get(c, {}).get(f"dice{suffix}") for c in (*organs, "mean")]
            rows.append([f"{label}, prompt {e['prompt']}{convention}", *(percent(v) for v in values),
                         "-" if table["mean"][f"hd95{suffix}"] is None else f"{table['mean'][f'hd95{suffix}']:.2f}"])
    star = "" if same else "*"
    theirs = NUMBERS["table2"]["rows"]
    rows += [[f"paper: {name}{star}", *(f"{v:.2f}" for v in values)] for name, values in theirs.items()]
    first = evaluations[0][1]["table"]
    ours = [first.get(c, {}).get("dice") for c in (*organs, "mean")]
    difference = [None if v is None else 100 * v - w for v, w in zip(ours, theirs["MedSeg-R"])]
    hd95 = first["mean"]["hd95"]
    difference.append(None if hd95 is None else hd95 - theirs["MedSeg-R"][-1])
    rows.append([f"{evaluations[0][0]} − paper's MedSeg-R{star}", *("-" if d is None else f"{d:+.2f}" for d in difference)])
    cases = len(set((evaluations[0][1]["volumes"] or evaluations[0][1]["targets"])["case"]))
    return (f"**Table 2**: Dice in percent, HD95 in voxels, means over {cases} volumes; TransUNet's convention and the "
            "strict one\n\n" + markdown(["", *organs, "mean", "HD95"], rows) + note(same)
            + f"\nThe paper: {NUMBERS['table2']['note']}.\n")


# ---------------------------------------------------------------------------------------------------------------------
# Figures

def several(columns):
    """Targets of images with two classes or more: elsewhere nothing can overlap."""
    classes = {}
    for image, target in zip(columns["image"], columns["target"]):
        classes.setdefault(image, set()).add(target)
    return np.array([len(classes[image]) > 1 for image in columns["image"]], bool)


def figure3(evaluations, path):
    """Left: Dice over the overlap rate; right: Dice of small objects per modality. A row for each prompt."""
    rows = []
    for prompt in ("box", "point", "none"):
        lines, spokes = {}, {}
        for label, e in evaluations:
            if e["prompt"] == prompt:
                crowd = targets_of(e, several)
                lines[label] = crowd["overlap"], crowd["dice_strict"]
                spokes[label] = by_modality(e, lambda columns: columns["area"] < SMALL)
        if lines:
            rows.append((prompt, lines, spokes))
    if not rows:
        raise InputError("no evaluation to draw")
    plots.overlap_and_small(rows, path)
    heads, body = ["prompt", "r", "slope", "targets", "small: average Dice", "small objects"], []
    for prompt, lines, spokes in rows:
        for label, (x, y) in lines.items():
            fit = pearson(x, y)
            body.append([f"{label}, {prompt}", *(["-", "-"] if fit is None else [f"{fit[0]:.2f}", f"{fit[1]:.2f}"]),
                         str(len(x)), percent(average(spokes[label])), str(sum(n for _, n in spokes[label].values()))])
        for name, (r, slope) in NUMBERS["figure3"]["overlap"].get(prompt, {}).items():
            small = NUMBERS["figure3"]["small"][prompt].get(name)
            body.append([f"paper: {name}*, {prompt}", f"{r:.2f}", f"{slope:.2f}", "-",
                         f"{small:.2f}" if small else "-", "-"])
    return (markdown(heads, body) + "\nOverlap rate: the share of a target's bounding box that boxes of other classes in "
            f"its image cover, over the images with two classes or more; small: below {SMALL:.0%} of the image.\n"
            + note(False))


def figure4(evaluations, path):
    """Box plots of Dice per class, over the cases."""
    boxes = {}
    for label, e in evaluations:
        columns = e["volumes"] or e["targets"]
        for target, dice in zip(columns["target"], columns["dice_strict"]):
            if dice is not None:
                boxes.setdefault(target, {}).setdefault(f"{label}, {e['prompt']}", []).append(dice)
    if not boxes:
        raise InputError("no evaluation to draw")
    unit = "volumes" if evaluations[0][1]["volumes"] else "images"
    plots.box_plots(boxes, path, f"{evaluations[0][1]['dataset']}: Dice (strict) of single {unit}")
    rows = [[f"{target}, {label}", str(len(v)), *(percent(q) for q in np.quantile(v, (0.25, 0.5, 0.75)))]
            for target, labels in boxes.items() for label, v in labels.items()]
    return markdown(["", unit, "first quartile", "median", "third quartile"], rows)


def figure6(evaluations, path, tables):
    """Left: Dice over the share of the training data; right: over the number of points."""
    fractions, points = {}, {}
    if tables:
        try:
            rows = json.loads(read_text(tables))["figure6"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{tables}: holds no figure6; make it with: python eval.py --tables figure6") from None
        fractions = {row: values for row, values in rows.items() if values}
    for label, e in evaluations:
        if e["prompt"] == "point":
            points.setdefault(label, {})[e["points"]] = e["table"]["mean"]["dice_strict"]
    if not fractions and not points:
        raise InputError("nothing to draw: give evaluations with --prompt point, or --tables FILE")
    plots.fractions_and_points(fractions, points, path)
    paper = NUMBERS["figure6"]
    rows = [[f"{row} of the training data", percent(np.mean(v)), f"± {100 * np.std(v, ddof=1):.2f}, {len(v)} seeds"
             if len(v) > 1 else "one seed", f"{paper['fraction'][row]:.2f}" if row in paper["fraction"] else "-"]
            for row, v in fractions.items()]
    rows += [[f"{label}, {n} point{'s' * (n > 1)}", percent(v), "", "-"] for label, line in points.items()
             for n, v in sorted(line.items())]
    return markdown(["", "Dice", "", "paper*"], rows) + note(False)


# ---------------------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("table1", table1), ("table2", table2), ("figure3", figure3), ("figure4", figure4),
                           ("figure6", figure6)):
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("evaluations", nargs="*" if name == "figure6" else "+", metavar="LABEL=FILE")
        command.add_argument("--out", help="a PNG" if name.startswith("figure") else "a markdown file")
        if name == "figure6":
            command.add_argument("--tables", help="the tables.json that eval.py --tables figure6 wrote")
    args = parser.parse_args()
    evaluations = read_evaluations(args.evaluations)
    if args.out:
        make_folder(Path(args.out).parent)
    if args.command.startswith("table"):
        text = dict(table1=table1, table2=table2)[args.command](evaluations)
        if args.out:
            write_atomically(args.out, text.encode())
    else:
        path = args.out or f"{args.command}.png"
        more = (args.tables,) if args.command == "figure6" else ()
        text = dict(figure3=figure3, figure4=figure4, figure6=figure6)[args.command](evaluations, path, *more)
        text += f"\nwrote {path}"
    print(text)


if __name__ == "__main__":
    run(main)

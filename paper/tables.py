"""The paper's tables 1 and 2 from evaluations, beside the paper's own numbers (paper.json).

    python eval.py --checkpoint out/x --dataset sa-med2d --prompt box --json x-box.json          # and so on; then
    python -m paper.tables table1 MedSeg-R=x-box.json MedSeg-R=x-point.json SAM=sam-box.json SAM=sam-point.json
    python -m paper.tables table2 MedSeg-R=x-none.json

An evaluation is LABEL=FILE, a file that eval.py --json wrote; one label may have several prompts or numbers of points.
Tables 3 to 6 are trained by eval.py --tables (ablations.py), table 7 is measured by bench.py speed.
"""
import json
from pathlib import Path

import numpy as np

from common import InputError, Parser, make_folder, read_text, run, write_atomically
from readers.synapse import TEST_CASES

NUMBERS = json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))
MODALITIES = NUMBERS["table1"]["columns"][:-1]
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

def add_command(commands, function, nargs, out):
    """The subcommand that calls `function`."""
    command = commands.add_parser(function.__name__, help=function.__doc__)
    command.add_argument("evaluations", nargs=nargs, metavar="LABEL=FILE")
    command.add_argument("--out", help=out)
    return command


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (table1, table2):
        add_command(commands, function, "+", "a markdown file")
    args = parser.parse_args()
    evaluations = read_evaluations(args.evaluations)
    if args.out:
        make_folder(Path(args.out).parent)
    text = dict(table1=table1, table2=table2)[args.command](evaluations)
    if args.out:
        write_atomically(args.out, text.encode())
    print(text)


if __name__ == "__main__":
    run(main)

"""The paper's tables 1 and 2 from evaluations, beside the paper's own numbers (paper.json).

    python eval.py --checkpoint out/x --dataset sa-med2d --prompt box --json x-box.json          # and so on; then
    python -m paper.tables table1 MedSeg-R=x-box.json MedSeg-R=x-point.json SAM=sam-box.json SAM=sam-point.json
    python -m paper.tables table2 MedSeg-R=x-none.json

An evaluation is LABEL=FILE, a file that eval.py --json wrote; one label may have several prompts or numbers of points.
Tables 3 to 6 are trained by eval.py --tables (ablations.py), table 7 is measured by bench.py speed.
"""
from pathlib import Path

import numpy as np

from common import InputError, Parser, make_folder, read_json, run, write_atomically
from readers.synapse import TEST_CASES

NUMBERS = read_json(Path(__file__).parent / "paper.json")
MODALITIES = NUMBERS["table1"]["columns"][:-1]
SA_MED2D_IMAGES = 900_000  # a fifth of SA-Med2D-20M, the paper's test images


def read_evaluations(items):
    """["LABEL=FILE"] -> [(label, what eval.py wrote)]."""
    found, remedy = [], "not written by eval.py --json, or by an older one; evaluate again"
    for item in items:
        label, _, path = item.partition("=")
        if not path:
            raise InputError(f"{item}: give LABEL=FILE, a file that eval.py --json wrote")
        evaluation = read_json(path, remedy)
        try:
            evaluation["table"]["mean"], evaluation["targets"]["image"], evaluation["prompt"]
        except (KeyError, TypeError):
            raise InputError(f"{path}: {remedy}") from None
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


def beside_the_papers(head, rows, same, papers, label, ours):
    """Markdown of our rows, the paper's, {method: numbers as printed}, and what `ours`, the numbers of `label`, differ
    by from its MedSeg-R. same: on the same data, so that they compare."""
    star = "" if same else "*"
    rows = rows + [[f"paper: {name}{star}", *(f"{v:.2f}" for v in values)] for name, values in papers.items()]
    if papers:
        pairs = zip(ours, papers["MedSeg-R"])
        rows.append([f"{label} − paper's MedSeg-R{star}",
                     *("-" if v is None or np.isnan(v) else f"{v - w:+.2f}" for v, w in pairs)])
    return markdown(["", *head], rows) + note(same)


def note(same):
    return "" if same else "\n\\* on other data: no comparison of methods\n"


def table1(evaluations):
    """Dice per modality and their average, for points and boxes."""
    text = ""
    for prompt in ("point", "box", "none"):
        ours = [(label, by_modality(e), e) for label, e in evaluations if e["prompt"] == prompt]
        if not ours:
            continue
        same = all(e["dataset"] == "sa-med2d" and e["images"] >= SA_MED2D_IMAGES for *_, e in ours)
        rows = [[label, *(percent(v) for v, _ in dice.values()), percent(average(dice))] for label, dice, _ in ours]
        label, dice, first = ours[0]
        counts = [n for _, n in dice.values()]
        rows.append(["*masks*", *map(str, counts), str(sum(counts))])
        text += (f"**Table 1, prompt {prompt}**: Dice in percent, mean over the masks of {first['dataset']}, "
                 f"{first['split']} ({first['images']} images)\n\n"
                 + beside_the_papers([*MODALITIES, "average"], rows, same, NUMBERS["table1"].get(prompt, {}), label,
                                     [*(100 * v for v, _ in dice.values()), 100 * average(dice)]) + "\n")
    return text or "no evaluation with a prompt among the files\n"


def table2(evaluations):
    """Dice of the eight organs, their mean, HD95 in voxels."""
    if not evaluations:
        raise InputError("no evaluation to show; give LABEL=FILE, a file that eval.py --json wrote")
    columns, rows, same = NUMBERS["table2"]["columns"][:-1], [], True
    for label, e in evaluations:
        if e["dataset"] not in ("synapse", "demo"):
            raise InputError(f"{label}: of {e['dataset']}, but table 2 is of Synapse's organs")
        same &= e["dataset"] == "synapse" and {c[4:] for c in e["volumes"]["case"]} == set(TEST_CASES)
        for convention, suffix in (("", ""), (", strict", "_strict")):
            values, hd95 = organs_of(e, columns, suffix)
            rows.append([f"{label}, prompt {e['prompt']}{convention}", *map(percent, values),
                         "-" if hd95 is None else f"{hd95:.2f}"])
    label, first = evaluations[0]
    values, hd95 = organs_of(first, columns, "")
    cases = len(set((first["volumes"] or first["targets"])["case"]))
    return (f"**Table 2**: Dice in percent, HD95 in voxels, means over {cases} volumes; TransUNet's convention and the "
            "strict one\n\n" + beside_the_papers([*columns, "HD95"], rows, same, NUMBERS["table2"]["rows"], label, [
                *(None if v is None else 100 * v for v in values), hd95])
            + f"\nThe paper: {NUMBERS['table2']['note']}.\n")


def organs_of(evaluation, columns, suffix):
    """-> (Dice of each of the columns, or None; mean HD95), by the convention with this suffix."""
    table = evaluation["table"]
    return [table.get(c, {}).get(f"dice{suffix}") for c in columns], table["mean"][f"hd95{suffix}"]


# ---------------------------------------------------------------------------------------------------------------------

def parse(doc, functions, out, flags={}):
    """The command line: a subcommand for each of the functions, with more flags {its name: {flag: help}} -> args, among
    them `function` and the evaluations, read."""
    parser = Parser(description=doc.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for function in functions:
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("evaluations", nargs="*", metavar="LABEL=FILE")
        command.add_argument("--out", help=out)
        for flag, meaning in flags.get(function.__name__, {}).items():
            command.add_argument(flag, help=meaning)
    args = parser.parse_args()
    args.evaluations = read_evaluations(args.evaluations)
    if args.out:
        make_folder(Path(args.out).parent)
    return args


def main():
    args = parse(__doc__, (table1, table2), "a markdown file")
    text = args.function(args.evaluations)
    if args.out:
        write_atomically(args.out, text.encode())
    print(text)


if __name__ == "__main__":
    run(main)

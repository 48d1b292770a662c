"""The paper's tables 1 and 2 from evaluations, beside the paper's own numbers (paper.json).

    python eval.py --checkpoint out/x --dataset sa-med2d --prompt box --json x-box.json          # and so on; then
    python -m paper.tables table1 MedSeg-R=x-box.json MedSeg-R=x-point.json SAM=sam-box.json SAM=sam-point.json
    python -m paper.tables table2 MedSeg-R=x-none.json

An evaluation is LABEL=FILE, a file that eval.py --json wrote; one label may have several prompts and,
in figure 6, several numbers of points. Tables 3 to 6 are trained by eval.py --tables (ablations.py), table 7 is
measured by bench.py speed.
"""
from pathlib import Path

import numpy as np
import pandas as pd

from common import InputError, Parser, make_folder, read_json, run, write_atomically
from readers.synapse import TEST_CASES

NUMBERS = read_json(Path(__file__).parent / "paper.json")
MODALITIES = NUMBERS["table1"]["columns"][:-1]
SA_MED2D_IMAGES = 900_000  # a fifth of SA-Med2D-20M, the paper's test images


def read_evaluations(items, several_points=False):
    """["LABEL=FILE"] -> [(label, what eval.py wrote, its "volumes" and "targets" as DataFrames)]. several_points: a
    label may have a prompt's evaluation for each number of points."""
    found, keys, remedy = [], set(), "not written by eval.py --json, or by an older one; evaluate again"
    for item in items:
        label, _, path = item.partition("=")
        if not path:
            raise InputError(f"{item}: give LABEL=FILE, a file that eval.py --json wrote")
        evaluation = read_json(path, remedy)
        try:
            evaluation["table"]["mean"], evaluation["targets"]["image"], evaluation["prompt"]
            for rows in ("volumes", "targets"):
                table = pd.DataFrame(evaluation[rows] or {})
                # columns of which no row has a number were left out
                evaluation[rows] = table.assign(**dict.fromkeys({"dice_strict", "area", "overlap"} - {*table}, np.nan))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: {remedy}") from None
        key = label, evaluation["prompt"], evaluation.get("points") if several_points else None
        if key in keys:
            raise InputError(f"{item}: {label} has another file with prompt {evaluation['prompt']}, and one of them is "
                             "shown; give each a label of its own")
        keys.add(key)
        found.append((label, evaluation))
    return found


def show(value, form=".2f"):
    """A number as a cell of a table; NaN, what is not known, is a dash."""
    return "-" if np.isnan(value) else format(value, form)


def markdown(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|",
                      *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def by_modality(targets):
    """Targets of an evaluation -> DataFrame of their mean Dice and how many they are, a row for each modality of the
    paper. Those that are not in their image do not count."""
    dice = targets[targets["area"] > 0].groupby("modality")["dice_strict"]
    return dice.agg(["mean", "count"]).reindex(MODALITIES).fillna({"count": 0}).astype({"count": int})


def beside_the_papers(head, rows, same, papers):
    """Markdown of our rows, {label: numbers or strings}, the paper's, {method: numbers}, and what the first of ours
    differs by from its MedSeg-R. same: on the same data, so that they compare."""
    star, (label, ours) = "" if same else "*", next(iter(rows.items()))
    rows = rows | {f"paper: {name}{star}": values for name, values in papers.items()}
    lines = [[name, *(v if isinstance(v, str) else show(v) for v in values)] for name, values in rows.items()]
    if papers:
        differences = np.array(ours, float) - papers["MedSeg-R"]
        lines.append([f"{label} − paper's MedSeg-R{star}", *(show(v, "+.2f") for v in differences)])
    return markdown(["", *head], lines) + note(same)


def note(same):
    return "" if same else "\n\\* on other data: no comparison of methods\n"


def table1(evaluations):
    """Dice per modality and their average, for points and boxes."""
    text = ""
    for prompt in ("point", "box", "none"):
        ours = [(label, by_modality(e["targets"]), e) for label, e in evaluations if e["prompt"] == prompt]
        if not ours:
            continue
        same = all(e["dataset"] == "sa-med2d" and e["images"] >= SA_MED2D_IMAGES for *_, e in ours)
        rows = {label: 100 * np.append(found["mean"], found["mean"].mean()) for label, found, _ in ours}
        _, found, first = ours[0]
        rows["*masks*"] = [str(n) for n in (*found["count"], found["count"].sum())]
        text += (f"**Table 1, prompt {prompt}**: Dice in percent, mean over the masks of {first['dataset']}, "
                 f"{first['split']} ({first['images']} images)\n\n"
                 + beside_the_papers([*MODALITIES, "average"], rows, same, NUMBERS["table1"].get(prompt, {})) + "\n")
    return text or "no evaluation with a prompt among the files\n"


def table2(evaluations):
    """Dice of the eight organs, their mean, HD95 in voxels."""
    if not evaluations:
        raise InputError("no evaluation to show; give LABEL=FILE, a file that eval.py --json wrote")
    columns, rows, same = NUMBERS["table2"]["columns"][:-1], {}, True
    for label, e in evaluations:
        if e["dataset"] not in ("synapse", "demo"):
            raise InputError(f"{label}: of {e['dataset']}, but table 2 is of Synapse's organs")
        same &= e["dataset"] == "synapse" and set(e["volumes"]["case"].str[4:]) == set(TEST_CASES)
        table = pd.DataFrame(e["table"], dtype=float)  # a column for each class and their mean; None: NaN
        for convention, suffix in (("", ""), (", strict", "_strict")):
            rows[f"{label}, prompt {e['prompt']}{convention}"] = np.append(
                100 * table.loc[f"dice{suffix}"].reindex(columns), table.loc[f"hd95{suffix}", "mean"])
    volumes = evaluations[0][1]["volumes"]["case"].nunique()
    return (f"**Table 2**: Dice in percent, HD95 in voxels, means over {volumes} volumes; TransUNet's convention and "
            "the strict one\n\n" + beside_the_papers([*columns, "HD95"], rows, same, NUMBERS["table2"]["rows"])
            + f"\nThe paper: {NUMBERS['table2']['note']}.\n")


# ---------------------------------------------------------------------------------------------------------------------

def parser_of(doc, functions, out):
    """The command line of this file and of figures.py: which of the functions, evaluations to read, where to write."""
    parser = Parser(description=doc.split("\n")[0])
    parser.add_argument("what", choices=functions, help="; ".join(f"{k}: {f.__doc__}" for k, f in functions.items()))
    parser.add_argument("evaluations", nargs="*", metavar="LABEL=FILE")
    parser.add_argument("--out", help=out)
    return parser


def main():
    functions = dict(table1=table1, table2=table2)
    args = parser_of(__doc__, functions, "a markdown file").parse_args()
    text = functions[args.what](read_evaluations(args.evaluations))
    if args.out:
        make_folder(Path(args.out).parent)
        write_atomically(args.out, text.encode())
    print(text)


if __name__ == "__main__":
    run(main)

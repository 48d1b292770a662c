"""eval.py --tables: trains and evaluates the rows of the paper's ablations, and rows of one's own.

    python eval.py --tables 3 4 5 6 --dataset kvasir --data DIR --seeds 0 1 2 --out out/tables -- --max-steps 400
    python eval.py --tables rows.json --dataset synapse ...      {"a name": ["--lr", "3e-4"], "another": [...]}

What stands behind "--" goes to train.py for every row. Every row and seed has a folder of its own under OUT, and a row
that stands in several tables is trained once. A killed run goes on where it stopped. The same command may run several
times at once, on one machine or on several that share OUT: each takes rows that nobody else has begun.
"""
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from common import ATTRIBUTES, InputError, locked, make_folder, read_json, write_atomically
from medsegr import BRANCHES
from metrics import bootstrap_means
from paper.tables import NUMBERS, markdown, show

ROOT = Path(__file__).resolve().parent.parent  # where train.py and eval.py lie
OFF = ("--branches", "sam")  # SAM with its decoder tuned: no text, no stage


def subsets(names, *flags):
    """{row: flags of train.py} of all subsets but the empty one, in the paper's order: one, two, all three, which is
    the full model and needs no flag."""
    chosen = [*combinations(names, 1), *combinations(names, 2)]
    return {"+".join(x): tuple(part for flag in flags for part in (flag, *x)) for x in chosen} | {"+".join(names): ()}


# table -> {the row's key in paper.json: flags of train.py}. In the paper, table 3's row without any text is table 5's
# without any stage, so a text that is left out there reaches neither stage; table 4's row without any prior is table
# 5's with the cognitive stage alone.
TABLES = {
    "3": {"none": OFF} | subsets(ATTRIBUTES, "--attributes", "--priors"),
    "4": {"none": ("--no-perceptual",)} | subsets(ATTRIBUTES, "--priors"),
    "5": {"none": OFF, "cognitive": ("--no-perceptual",), "perceptual": ("--no-cognitive",),
          "cognitive+perceptual": ("--no-caa",), "cognitive+perceptual+caa": ()},
    "6": subsets(BRANCHES, "--branches"),
    "baselines": {"SAM, decoder tuned": OFF, "one sentence for three texts": ("--sentence",), "MedSeg-R": ()},
    "figure6": {f"1/{n}": ("--fraction", str(1 / n)) for n in (16, 8, 4, 2)} | {"1/1": ()},
}


def read_rows(tables):
    """Names of TABLES or JSON files -> {table: {row: flags}}."""
    chosen = {}
    for name in tables:
        if name in TABLES:
            chosen[name] = TABLES[name]
            continue
        if not name.endswith(".json"):
            raise InputError(f"--tables {name}: unknown; give some of {' '.join(TABLES)}, or a JSON file of rows")
        form = 'write {"a name": ["--lr", "3e-4"], ...}, flags of train.py'
        rows = read_json(name, form)
        if not rows or not all(isinstance(flags, list) and all(isinstance(flag, str) for flag in flags)
                               for flags in rows.values()):
            raise InputError(f"{name}: not rows; {form}")
        chosen[Path(name).stem] = {row: tuple(flags) for row, flags in rows.items()}
    return chosen


def folder_name(flags):
    """A folder's name that says what a row is, and is the same for the same flags."""
    return "_".join(flags).replace("--", "").replace("/", "-").replace("_no-", "_no_") or "full"


def run_row(folder, seed, flags, data_flags, eval_flags, train_flags):
    """Trains and evaluates one row; what is done already stays. Raises InputError where a step fails."""
    commands = [
        ["train.py", *data_flags, *train_flags, *flags, "--seed", str(seed), "--out", str(folder), "--resume"],
        ["eval.py", *data_flags, *eval_flags, "--checkpoint", str(folder / "last.safetensors"), "--json",
         str(folder / "eval.json")]]
    for script, *rest in commands:
        with open(folder / "output.txt", "ab") as log:
            done = subprocess.run([sys.executable, ROOT / script, *rest], stdout=log, stderr=log)
        if done.returncode:
            last = (folder / "output.txt").read_text(errors="replace").strip().splitlines()[-1:]
            raise InputError(f"{folder}: {script} failed: {' '.join(last)[-300:]} (all of it: {folder}/output.txt)")
    for name in ("training", "best"):  # the last checkpoint was evaluated: nothing is chosen by what is evaluated
        (folder / f"{name}.safetensors").unlink(missing_ok=True)


def run_tables(tables, seeds, out, data_flags, eval_flags, train_flags):
    """Trains and evaluates what is missing, row by row and seed by seed, and writes OUT/tables.json and tables.md."""
    chosen, out = read_rows(tables), Path(out)
    for flag in (*train_flags, *(flag for rows in chosen.values() for flags in rows.values() for flag in flags)):
        if flag.partition("=")[0] in ("--seed", "--out"):
            raise InputError(f"{flag}: every row has a folder and seeds of its own; leave it out, and give --seeds, or "
                             "--out before the --")
    make_folder(out)
    settings = json.dumps(dict(data=data_flags, evaluation=eval_flags, training=train_flags), indent=1)
    path = out / "settings.json"
    if path.is_file() and path.read_text() != settings:
        raise InputError(f"{path}: its rows were made with other flags; give the same ones, or another --out")
    write_atomically(path, settings.encode())
    todo = {(seed, flags): None for seed in seeds for rows in chosen.values() for flags in rows.values()}
    elsewhere = 0
    for n, (seed, flags) in enumerate(todo, 1):
        folder = out / folder_name(flags) / f"seed{seed}"
        if (folder / "eval.json").is_file():
            continue
        make_folder(folder)
        with locked(folder / "lock", wait=False) as ours:  # freed by a kill
            if not ours:
                elsewhere += 1
            elif not (folder / "eval.json").is_file():  # or another process was quicker
                print(f"[{n}/{len(todo)}] seed {seed}: {' '.join(flags) or 'the full model'}", flush=True)
                run_row(folder, seed, flags, data_flags, eval_flags, train_flags)
    if elsewhere:
        print(f"{elsewhere} rows are being made by other processes; run the command again when they are done")
    report(chosen, seeds, out)


def report(chosen, seeds, out):
    """Prints and writes the tables of what is there."""
    text, numbers = "", {}
    for table, rows in chosen.items():
        found = {row: {seed: json.loads(f.read_text()) for seed in seeds
                       if (f := out / folder_name(flags) / f"seed{seed}" / "eval.json").is_file()}
                 for row, flags in rows.items()}
        numbers[table] = {row: [e["table"]["mean"]["dice_strict"] for e in each.values()]
                          for row, each in found.items()}
        about = next((e for each in found.values() for e in each.values()), {})
        full = found[list(rows)[-1]]
        apart = {row: (mean_difference(each, full), interval(each, full)) for row, each in found.items()}
        text += table_text(table, numbers[table], apart, about) + "\n"
    print(text)
    write_atomically(out / "tables.md", text.encode())
    write_atomically(out / "tables.json", json.dumps(numbers, indent=1).encode())


def mean_difference(row, full):
    """{seed: eval.json} of two rows -> the difference of their mean strict Dice, over the seeds that both have."""
    dice = np.array([[each[seed]["table"]["mean"]["dice_strict"] for seed in row.keys() & full.keys()]
                     for each in (row, full)], float)  # None, where nothing was to be found, is NaN
    return float(np.subtract(*dice.mean(1))) if dice.size else float("nan")


def interval(row, full):
    """{seed: eval.json} of two rows -> the 95 % interval of the difference of their mean strict Dice, or None where a
    data set has a single case. Paired bootstrap over the cases: each keeps its structures, and of each structure the
    difference, the mean over the seeds that both rows have."""
    parts = []
    for seed in row.keys() & full.keys():
        ours, theirs = (score_rows(e) for e in (row[seed], full[seed]))
        parts.append((ours - theirs).dropna())
    if not parts or all(part.empty for part in parts):
        return None
    difference = pd.concat(parts).groupby(level=["case", "target"]).agg(["sum", "count"])
    sums, counts = (difference[column].unstack().fillna(0).to_numpy() for column in ("sum", "count"))
    return bootstrap_means(sums, counts)[-1]


def score_rows(evaluation):
    """An eval.json -> strict Dice by (case, target, image, number among equal ones)."""
    table = pd.DataFrame(evaluation.get("volumes") or evaluation.get("targets") or {}, columns=[
        "case", "target", "image", "dice_strict"])
    keys = ["case", "target", "image"]
    if evaluation.get("volumes"):
        table["image"] = ""  # the slice that shows a volume best is no part of what it is
    table["n"] = table.groupby(keys).cumcount()
    return table.set_index([*keys, "n"])["dice_strict"].astype(float)


def table_text(table, numbers, apart, about):
    """Markdown: mean Dice over the seeds, its standard deviation, and how far each row lies from the last one, with its
    95 % interval (`apart`: over the seeds that both have), here and in the paper, whose data are others."""
    paper = NUMBERS["tables"].get(table)
    if not paper or paper["rows"].keys() != numbers.keys():
        paper = dict(datasets=(), rows={})
    heads = ["row", "Dice", "± sd", "seeds", "to the last row", "95 % interval",
             *(f"paper, {name}*" for name in paper["datasets"]), *("to the last row*" for _ in paper["datasets"])]
    dice = {row: 100 * pd.Series(values, dtype=float) for row, values in numbers.items()}  # NaN: of too few seeds
    full, rows = list(numbers)[-1], []
    for row, values in dice.items():
        difference, edges = apart[row] if row != full else (0.0, None)
        cells = [row, show(values.mean()), show(values.std()), str(len(values) or "-"), show(100 * difference, "+.2f"),
                 " to ".join(f"{100 * edge:+.2f}" for edge in edges) if edges else "-"]
        if row in paper["rows"]:
            theirs = np.array(paper["rows"][row])
            cells += [*map(show, theirs), *(show(v, "+.2f") for v in theirs - paper["rows"][full])]
        rows.append(cells)
    title = f"table {table}" if table.isdigit() else table
    return (f"**{title}**: {about.get('dataset')}, {about.get('split')}, prompt {about.get('prompt')}, "
            "mean Dice (strict)\n\n" + markdown(heads, rows)
            + ("\n\\* other data than ours: compare the differences\n" if paper["rows"] else ""))

"""eval.py --tables: trains and evaluates the rows of the paper's ablations, and rows of one's own.

    python eval.py --tables 3 4 5 6 --dataset kvasir --data DIR --seeds 0 1 2 --out out/tables -- --max-steps 400
    python eval.py --tables rows.json --dataset synapse ...      {"a name": ["--lr", "3e-4"], "another": [...]}

What stands behind "--" goes to train.py for every row. Every row and seed has a folder of its own under OUT, and a row
that stands in several tables is trained once. A killed run goes on where it stopped. The same command may run several
times at once, on one machine or on several that share OUT: each takes rows that nobody else has begun.
"""
import fcntl
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common import ATTRIBUTES, InputError, make_folder, read_text, write_atomically
from medsegr import BRANCHES
from paper.tables import NUMBERS

ROOT = Path(__file__).resolve().parent.parent  # where train.py and eval.py lie
OFF = ("--branches", "sam")  # SAM with its decoder tuned: no text, no stage


def subsets(names):
    """All subsets but the empty one, in the order of the paper's rows: one, two, all three."""
    a, b, c = names
    return [(a,), (b,), (c,), (a, b), (a, c), (b, c), (a, b, c)]


def without_empty(flag, chosen, every):
    """Flags of a row of tables 3, 4, 6; a row with all parts is the full model, whose flags are none."""
    return () if chosen == every else (flag, *chosen)


# table -> {the row's key in paper.json: flags of train.py}. In the paper, table 3's row without any text is table 5's
# without any stage, so a text that is left out there reaches neither stage; table 4's row without any prior is table
# 5's with the cognitive stage alone.
TABLES = {
    "3": {"none": OFF} | {"+".join(x): without_empty("--attributes", x, ATTRIBUTES) +
                          without_empty("--priors", x, ATTRIBUTES) for x in subsets(ATTRIBUTES)},
    "4": {"none": ("--no-perceptual",)} | {"+".join(x): without_empty("--priors", x, ATTRIBUTES)
                                           for x in subsets(ATTRIBUTES)},
    "5": {"none": OFF, "cognitive": ("--no-perceptual",), "perceptual": ("--no-cognitive",),
          "cognitive+perceptual": ("--no-caa",), "cognitive+perceptual+caa": ()},
    "6": {"+".join(x): without_empty("--branches", x, BRANCHES) for x in subsets(BRANCHES)},
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
        try:
            rows = json.loads(read_text(name))
            assert rows and all(isinstance(f, str) for flags in rows.values() for f in flags)
            chosen[Path(name).stem] = {row: tuple(flags) for row, flags in rows.items()}
        except (ValueError, AttributeError, TypeError, AssertionError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f'{name}: not rows; write {{"a name": ["--lr", "3e-4"], ...}}, flags of train.py') from None
    return chosen


def folder_name(flags):
    """A folder's name that says what a row is, and is the same for the same flags."""
    return "_".join(flags).replace("--", "").replace("/", "-").replace("_no-", "_no_") or "full"


@contextmanager
def taken(folder):
    """Whether this process has the folder for itself, as long as the block lasts; a kill frees it."""
    make_folder(folder)
    with open(folder / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False


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


def results(out, rows, seeds):
    """{row: [the evaluation of each seed that is done]}."""
    found = {}
    for row, flags in rows.items():
        files = [out / folder_name(flags) / f"seed{seed}" / "eval.json" for seed in seeds]
        found[row] = [json.loads(f.read_text()) for f in files if f.is_file()]
    return found


def run_tables(tables, seeds, out, data_flags, eval_flags, train_flags):
    """Trains and evaluates what is missing, row by row and seed by seed, and writes OUT/tables.json and tables.md."""
    chosen, out = read_rows(tables), Path(out)
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
        with taken(folder) as ours:
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
        found = results(out, rows, seeds)
        numbers[table] = {row: [e["table"]["mean"]["dice_strict"] for e in each] for row, each in found.items()}
        text += table_text(table, numbers[table], any_of(found)) + "\n"
    print(text)
    write_atomically(out / "tables.md", text.encode())
    write_atomically(out / "tables.json", json.dumps(numbers, indent=1).encode())


def any_of(found):
    return next((each[0] for each in found.values() if each), {})


def table_text(table, numbers, about):
    """Markdown: mean Dice over the seeds, its standard deviation, and how far each row lies from the last one, here and
    in the paper, whose data are others."""
    paper = NUMBERS["tables"].get(table, {})
    theirs = list(paper.get("datasets", ()))
    title = f"table {table}" if table.isdigit() else table
    lines = [f"**{title}**: {about.get('dataset')}, {about.get('split')}, prompt {about.get('prompt')}, "
             "mean Dice (strict)", "",
             "| " + " | ".join(["row", "Dice", "± sd", "seeds", "to the last row",
                                *(f"paper, {name}*" for name in theirs), *("to the last row*" for _ in theirs)]) + " |",
             "|---" + "|---:" * (4 + 2 * len(theirs)) + "|"]
    last = numbers[list(numbers)[-1]]
    for row, values in numbers.items():
        cells = [row, *(["-"] * 4 if not values else [
            f"{100 * np.mean(values):.2f}", f"{100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else "-",
            str(len(values)), f"{100 * (np.mean(values) - np.mean(last)):+.2f}" if last else "-"])]
        known = paper.get("rows", {}).get(row)
        cells += [f"{v:.2f}" for v in known] if known else ["-"] * len(theirs)
        full = paper.get("rows", {}).get(list(numbers)[-1])
        cells += [f"{v - w:+.2f}" for v, w in zip(known, full)] if known else ["-"] * len(theirs)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + ("\n\n\\* other data than ours: compare the differences\n" if theirs else "\n")

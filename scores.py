"""What an evaluation found, as columns; its tables; and how it survives a kill."""
import json
from array import array
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array

from common import write_atomically
from metrics import METRICS, bootstrap_means

MM = ("hd95_mm", "hd95_strict_mm")  # where the data set knows its voxels' size
NUMBERS = (*METRICS, *MM, "area", "overlap")  # the share of the image, and metrics.overlap_rate


class Scores:
    """What came out, as columns: a row per case and class of a volume, or per target of an image.

    row: the number of the image in the data set; for a volume of the slice that shows it best. None is NaN here.
    """

    def __init__(self):
        self.row, self.case, self.name, self.modality = array("q"), [], [], []
        self.numbers = {column: array("d") for column in NUMBERS}

    def add(self, row, case, name, modality, numbers):
        self.row.append(row), self.case.append(case), self.name.append(name), self.modality.append(modality)
        for column, values in self.numbers.items():
            value = numbers.get(column)
            values.append(np.nan if value is None else value)

    def __len__(self):
        return len(self.row)

    def __getitem__(self, column):
        return np.array(self.numbers[column])

    def gather(self, parts):
        """Takes the rows of other Scores, in the order of the images."""
        where = np.concatenate([np.array(p.row) for p in parts])
        for i in np.argsort(where, kind="stable").tolist():
            n = 0
            while i >= len(parts[n]):
                i, n = i - len(parts[n]), n + 1
            part = parts[n]
            self.add(part.row[i], part.case[i], part.name[i], part.modality[i],
                     {column: values[i] for column, values in part.numbers.items()})

    def where(self, keep):
        """The Scores of the rows i for which keep(i)."""
        part = Scores()
        for i in filter(keep, range(len(self))):
            part.add(self.row[i], self.case[i], self.name[i], self.modality[i],
                     {column: values[i] for column, values in self.numbers.items()})
        return part

    def columns(self, key):
        """-> {column: list}, None for NaN; columns that are empty are left out."""
        plain = lambda values: [v if v == v else None for v in values]
        found = {column: plain(values) for column, values in self.numbers.items() if not np.isnan(self[column]).all()}
        return dict(image=[key(i) for i in self.row], case=self.case, target=self.name, modality=self.modality, **found)


def summarise(scores, groups, seed=0):
    """Scores -> {group: {metric: mean over its rows, "cases": n, "ci": of Dice}} and, under "mean", of the groups' means.

    groups: the class or the modality of each row. Rows that a metric does not count are skipped. The intervals are
    bootstrapped over the cases (metrics.bootstrap_means), whose structures stay together.
    """
    names = list(dict.fromkeys(groups))
    number, cases = ({v: i for i, v in enumerate(dict.fromkeys(x))} for x in (groups, scores.case))
    column, case = np.array([number[g] for g in groups], int), np.array([cases[c] for c in scores.case], int)
    table = {name: {} for name in [*names, "mean"]}
    for metric in (*METRICS, *MM):
        values = scores[metric]
        known = ~np.isnan(values)
        if not known.any() and metric in MM:
            continue
        # sparse: a data set of 20 million masks has cases by the million, each with a few of its classes
        table_of = lambda v: coo_array((v, (case[known], column[known])), (len(cases), len(names))).tocsr()
        sums, counts = table_of(values[known]), table_of(np.ones(known.sum()))
        n = np.asarray(counts.sum(0)).ravel()
        means = [float(v / m) if m else None for v, m in zip(np.asarray(sums.sum(0)).ravel(), n)]
        for name, value in zip([*names, "mean"], [*means, mean(means)]):
            table[name][metric] = value
        if metric in ("dice", "dice_strict"):
            for name, interval in zip([*names, "mean"], bootstrap_means(sums, counts, seed)):
                table[name][metric.replace("dice", "ci")] = interval
            for name, seen in zip(names, np.asarray((counts > 0).sum(0)).ravel()):
                table[name]["cases"] = int(seen)
    table["mean"]["cases"] = len(cases)
    return table


def mean(values):
    """Of the values that are counted; None if there are none."""
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def print_table(table, title):
    show = lambda v, digits: "-" if v is None else f"{v:.{digits}f}"
    width = max(16, *(len(name) + 2 for name in table), len(title) + 2)
    mm = "hd95_strict_mm" in table["mean"]
    print(f"\n{title:<{width}}{'Dice':>8}{'HD95':>8}{'strict Dice':>14}{'95 % interval':>18}{'HD95':>8}"
          + f"{'in mm':>8}" * mm + f"{'IoU':>8}{'cases':>8}")
    for name, row in table.items():
        low, high = row["ci_strict"] or (None, None)
        print(f"{name:<{width}}{show(row['dice'], 4):>8}{show(row['hd95'], 2):>8}{show(row['dice_strict'], 4):>14}"
              f"{show(low, 3) + ' - ' + show(high, 3) if low is not None else '-':>18}{show(row['hd95_strict'], 2):>8}"
              + f"{show(row.get('hd95_strict_mm'), 2):>8}" * mm + f"{show(row['iou_strict'], 4):>8}{row['cases']:>8}")
    print("Dice, HD95 in voxels: TransUNet's convention; strict: an empty side costs everything (README, Metrics)\n")


class Journal:
    """The Scores of the volumes and of the targets so far. With a path they are also kept in PATH.<rank>.partial, a
    line for each case, so that a killed evaluation goes on, on as many processes as one likes. `settings` is one line:
    what was evaluated otherwise is not gone on with."""

    def __init__(self, path=None, rank=0, settings=""):
        self.scores, self.done, self.lines, self.file = (Scores(), Scores()), set(), {}, None
        self.path, self.own, self.first_line = path and Path(path), f"{path}.{rank}.partial", f"{settings}\n"
        for part in self.parts():
            with open(part, errors="replace") as f:
                lines = [line for line in f if line.endswith("\n")]  # the last may be torn by a kill
            if lines and lines[0] == self.first_line:
                self.lines[str(part)] = lines
        for case in (json.loads(line) for lines in self.lines.values() for line in lines[1:]):
            if case["first"] not in self.done:
                self.done.add(case["first"])
                self.keep(case["volume"], case["targets"]) if rank == 0 else None

    def parts(self):
        """The files of all processes."""
        return sorted(self.path.parent.glob(f"{self.path.name}.*.partial")) if self.path else []

    def begin(self):
        """When every process has read the files: this one's own, whole."""
        if self.path:
            write_atomically(self.own, "".join(self.lines.pop(self.own, [self.first_line])).encode())
            self.file, self.lines = open(self.own, "a"), {}

    def keep(self, volume, targets):
        for scores, rows in zip(self.scores, (volume, targets)):
            for row in rows:
                scores.add(*row)

    def add(self, first, volume, targets):
        self.keep(volume, targets)
        if self.file:
            print(json.dumps(dict(first=first, volume=volume, targets=targets)), file=self.file, flush=True)

    def remove(self):
        """When the result is written."""
        if self.file:
            self.file.close()
            for part in self.parts():
                part.unlink(missing_ok=True)

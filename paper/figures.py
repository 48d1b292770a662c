"""The paper's figures 3, 4 and 6 from evaluations, beside the paper's own numbers (paper.json).

    python -m paper.figures figure3 MedSeg-R=x-box.json SAM=sam-box.json ... --out figure3.png
    python -m paper.figures figure4 MedSeg-R=x-none.json SAM=sam-box.json --out figure4.png
    python -m paper.figures figure6 LABEL=x-1.json LABEL=x-3.json --tables out/tables/tables.json --out figure6.png

An evaluation is LABEL=FILE, as in tables.py; figures 7 to 9 are drawn by eval.py --plots.
"""
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import linregress

from common import InputError, make_folder, read_json, run
from metrics import SMALL
from paper.tables import NUMBERS, by_modality, markdown, note, parser_of, read_evaluations, show
from plots import COLOURS, plt, save

# methods differ by marker, line and hatch as well as by colour
STYLES = [dict(color=colour, marker=marker, linestyle=line) for colour, marker, line in zip(
    (COLOURS[4], COLOURS[5], COLOURS[2], COLOURS[6], "#000000"), "osD^v", ("-", "--", "-.", ":", (0, (5, 1))))]
HATCHES = ("", "///", "...", "xxx", "\\\\\\")


# ---------------------------------------------------------------------------------------------------------------------
# Figure 3: crowded images and small objects

def figure3(evaluations, path):
    """Dice over the overlap rate, and of small objects per modality."""
    prompts = [p for p in ("box", "point", "none") if any(e["prompt"] == p for _, e in evaluations)]
    if not prompts:
        raise InputError("no evaluation to draw")
    figure, body = plt.figure(figsize=(11, 4.6 * len(prompts)), layout="constrained"), []
    for at, prompt in enumerate(prompts):
        lines, spokes = {}, {}
        for label, e in evaluations:
            if e["prompt"] == prompt:
                targets = e["targets"][e["targets"]["area"] > 0]
                # in an image of a single class nothing can overlap
                crowd = targets[targets.groupby("image")["target"].transform("nunique") > 1]
                line, small = line_through(crowd["overlap"], crowd["dice_strict"]), targets[targets["area"] < SMALL]
                lines[label], spokes[label] = (crowd, line), by_modality(small)
                doublings = targets.assign(doublings=np.log2(targets["area"]))
                body.append([f"{label}, {prompt}", f"{line.rvalue:.2f}" if line else "-", slope(crowd, "overlap"),
                             str(len(crowd)), slope(doublings, "doublings"), show(100 * spokes[label]["mean"].mean()),
                             str(spokes[label]["count"].sum())])
        draw_overlap(figure.add_subplot(len(prompts), 2, 2 * at + 1), prompt, lines)
        draw_small(figure.add_subplot(len(prompts), 2, 2 * at + 2, projection="polar"), prompt, spokes)
        for name, (r, steep) in NUMBERS["figure3"]["overlap"].get(prompt, {}).items():
            small = NUMBERS["figure3"]["small"][prompt].get(name, np.nan)
            body.append([f"paper: {name}*, {prompt}", f"{r:.2f}", f"{steep:.2f}", "-", "-", show(small), "-"])
    save(figure, path)
    heads = ["prompt", "r", "slope", "targets", "per doubling of size", "small: average Dice", "small objects"]
    return (markdown(heads, body) + "\nOverlap rate: the share of a target's bounding box that boxes of other classes "
            "in its image cover, over the images with two classes or more. Slopes of Dice over it, and over log2 of a "
            f"target's area, with 95 % intervals (bootstrap over cases). Small: below {SMALL:.0%} of the image.\n"
            + note(False))


def line_through(x, y):
    """scipy's line by least squares, with slope, intercept and rvalue; None for fewer than three points, or one x."""
    return linregress(x, y) if len(x) > 2 and x.min() < x.max() else None


def slope(targets, column):
    """The slope of Dice over a column, by least squares, with its 95 % interval, as text; the bootstrap draws cases,
    whose targets stay together."""
    x, y = targets[column], targets["dice_strict"]
    sums = pd.DataFrame(dict(n=1.0, x=x, y=y, xx=x * x, xy=x * y)).groupby(targets["case"]).sum().to_numpy()
    if len(sums) < 3 or line_through(x, y) is None:
        return "-"
    times = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 2000)
    n, x, y, xx, xy = (np.vstack([np.ones(len(sums)), times]) @ sums).T  # the first is of all cases as they are
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of one x
        slopes = (n * xy - x * y) / (n * xx - x * x)
    return "{:.3f} ({:.3f} to {:.3f})".format(slopes[0], *np.nanquantile(slopes[1:], (0.025, 0.975)))


def draw_overlap(axis, prompt, lines):
    """Left: Dice over the overlap rate, a line and a marker for the mean of each tenth of the rates. lines: {method:
    (its targets, line_through() them)}."""
    for style, (label, (targets, line)) in zip(cycle(STYLES), lines.items()):
        x = targets["overlap"]
        means = targets.groupby((10 * x).clip(0, 9).astype(int))[["overlap", "dice_strict"]].mean()
        axis.plot(means["overlap"], means["dice_strict"], **style | dict(linestyle=""), markersize=5)
        if line:
            ends = np.array([x.min(), x.max()])
            axis.plot(ends, line.intercept + line.slope * ends, **style | dict(marker=""), linewidth=1.5)
            label = f"{label}: r = {line.rvalue:.2f}, slope {line.slope:.2f}"
        axis.plot([], [], **style, label=label)
    axis.set(xlabel="overlap rate (share of the box that boxes of other classes cover)", ylabel="Dice", ylim=(0, 1),
             xlim=(-0.02, 1.02), title=f"prompt {prompt}: {len(x)} targets; markers: means of tenths")
    axis.legend(loc="lower left")


def draw_small(axis, prompt, spokes):
    """Right: Dice of small objects, a spoke for each modality that has some. spokes: {method: by_modality() of the
    small ones}."""
    counts = next(iter(spokes.values()))["count"]
    names = [m for m in counts.index if any(found["count"][m] for found in spokes.values())]
    turn = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    for style, (label, found) in zip(cycle(STYLES), spokes.items()):
        values = found["mean"][names].tolist()
        axis.plot([*turn, *turn[:1]], [*values, *values[:1]], **style, label=label, markersize=4, linewidth=1.4)
    axis.set_xticks(turn, [f"{m}\n(n = {counts[m]})" for m in names], fontsize=8)
    axis.tick_params(axis="x", pad=12)
    axis.set(ylim=(0, 1), theta_offset=np.pi / 2, theta_direction=-1)
    axis.set_title(f"prompt {prompt}: Dice of small objects (below 5 % of the image)", fontsize=10, pad=22)
    axis.legend(loc="upper left", bbox_to_anchor=(-0.45, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Figure 4: the spread over the cases

def figure4(evaluations, path):
    """Box plots of Dice per class, over the cases."""
    tables = [(e["volumes"] if len(e["volumes"]) else e["targets"]).assign(method=f"{label}, {e['prompt']}")
              for label, e in evaluations]
    dice = pd.concat([table.dropna(subset="dice_strict") for table in tables]) if tables else ()
    if not len(dice):
        raise InputError("no evaluation to draw")
    first = evaluations[0][1]
    unit = "volumes" if len(first["volumes"]) else "images"
    dice = dice.sort_values("target", key=lambda names: pd.factorize(names)[0], kind="stable")  # as they come first
    boxes = dice.groupby(["target", "method"], sort=False)["dice_strict"]
    draw_boxes(boxes, path, f"{first['dataset']}: Dice (strict) of single {unit}")
    quartiles = 100 * boxes.quantile((0.25, 0.5, 0.75)).unstack()
    rows = [[", ".join(names), str(len(values)), *map(show, quartiles.loc[names])] for names, values in boxes]
    return markdown(["", unit, "first quartile", "median", "third quartile"], rows)


def draw_boxes(boxes, path, title):
    """boxes: the Dice of each case, grouped by class and method."""
    counts = boxes.size().unstack(sort=False)
    classes, methods = counts.axes
    figure, axis = plt.subplots(figsize=(max(6, 0.55 * len(classes) * (len(methods) + 0.8) + 1.2), 4.2),
                                layout="constrained")
    width = 0.8 / len(methods)
    for m, (method, style, hatch) in enumerate(zip(methods, cycle(STYLES), cycle(HATCHES))):
        places, values = zip(*((k + (m - (len(methods) - 1) / 2) * width, boxes.get_group((name, method)))
                               for k, name in enumerate(classes) if (name, method) in boxes.groups))
        axis.boxplot(values, positions=places, widths=0.85 * width, patch_artist=True, label=method,
                     medianprops=dict(color="black", linewidth=1.6), manage_ticks=False, flierprops=dict(markersize=3),
                     boxprops=dict(facecolor=(style["color"], 0.35), hatch=hatch, edgecolor=style["color"]))
    labels = [f"{name}\n(n = {n:.0f})" for name, n in counts.max(axis=1).items()]
    axis.set_xticks(range(len(classes)), labels, fontsize=8)
    axis.set(ylabel="Dice", ylim=(-0.03, 1.03), title=title)
    figure.legend(ncols=len(methods), loc="outside lower center")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 6: less data, more points

def figure6(evaluations, path, tables=None):
    """Left: Dice over the share of the training data, in the file `tables`; right: over the number of points."""
    rows = read_json(tables, "make it with: python eval.py --tables figure6").get("figure6", {}) if tables else {}
    fractions = {row: 100 * pd.Series(values, dtype=float) for row, values in rows.items() if values}
    points = pd.DataFrame([(label, e["points"], e["table"]["mean"]["dice_strict"]) for label, e in evaluations
                           if e["prompt"] == "point"], columns=["label", "n", "dice"]).astype({"dice": float})
    points = points.assign(dice=100 * points["dice"]).sort_values(["label", "n"])
    if not fractions and not len(points):
        raise InputError("nothing to draw: give evaluations with --prompt point, or --tables FILE, the tables.json "
                         "that eval.py --tables figure6 wrote")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    left.set_visible(bool(fractions)), right.set_visible(len(points) > 0)
    left.errorbar(range(len(fractions)), [v.mean() for v in fractions.values()],
                  [v.std() for v in fractions.values()], capsize=4, **STYLES[0])  # of one seed NaN: no bar
    left.set_xticks(range(len(fractions)), [f"{name}\n(n = {len(v)})" for name, v in fractions.items()])
    left.set(xlabel="share of the training data (n: seeds; bars: ± sd)", ylabel="mean Dice (strict), %", ylim=(0, 100))
    for style, (label, line) in zip(cycle(STYLES), points.groupby("label", sort=False)):
        right.plot(line["n"], line["dice"], **style, label=label)
    right.set(xlabel="points per target", ylabel="mean Dice (strict), %", ylim=(0, 100), xticks=points["n"].unique())
    figure.legend(loc="outside lower center", ncols=4)
    save(figure, path)
    paper = NUMBERS["figure6"]["fraction"]
    lines = [[f"{row} of the training data", show(v.mean()), f"± {show(v.std())}, seeds: {len(v)}",
              show(paper.get(row, np.nan))] for row, v in fractions.items()]
    lines += [[f"{label}, points: {n}", show(dice), "", "-"] for label, n, dice in points.itertuples(index=False)]
    return markdown(["", "Dice", "", "paper*"], lines) + note(False)


# ---------------------------------------------------------------------------------------------------------------------

def main():
    functions = dict(figure3=figure3, figure4=figure4, figure6=figure6)
    parser = parser_of(__doc__, functions, "a PNG (default: the figure's name)")
    parser.add_argument("--tables", help="for figure6: the tables.json that eval.py --tables figure6 wrote")
    args = parser.parse_args()
    path, more = args.out or f"{args.what}.png", (args.tables,) if args.what == "figure6" else ()
    make_folder(Path(path).parent)
    evaluations = read_evaluations(args.evaluations, several_points=args.what == "figure6")
    print(functions[args.what](evaluations, path, *more) + f"\nwrote {path}")


if __name__ == "__main__":
    run(main)

"""The paper's figures 3, 4 and 6 from evaluations, beside the paper's own numbers (paper.json).

    python -m paper.figures figure3 MedSeg-R=x-box.json SAM=sam-box.json ... --out figure3.png
    python -m paper.figures figure4 MedSeg-R=x-none.json SAM=sam-box.json --out figure4.png
    python -m paper.figures figure6 LABEL=x-1.json LABEL=x-3.json --tables out/tables/tables.json --out figure6.png

An evaluation is LABEL=FILE, as in tables.py; figures 7 to 9 are drawn by eval.py --plots.
"""
from itertools import cycle

import numpy as np
import pandas as pd
from scipy.stats import linregress

from common import InputError, read_json, run
from metrics import SMALL
from paper.tables import NUMBERS, by_modality, markdown, note, parse, show
from plots import COLOURS, plt

# ---------------------------------------------------------------------------------------------------------------------
# Drawing. Methods differ by marker, line and hatch as well as by colour

STYLES = [dict(color=colour, marker=marker, linestyle=line) for colour, marker, line in zip(
    (COLOURS[4], COLOURS[5], COLOURS[2], COLOURS[6], "#000000"), "osD^v", ("-", "--", "-.", ":", (0, (5, 1))))]
HATCHES = ("", "///", "...", "xxx", "\\\\\\")


def draw_overlap(axis, prompt, lines):
    """Figure 3, left: Dice over the overlap rate, a line and a marker for the mean of each tenth of the rates. lines:
    {method: (overlap rates [n], Dice [n], line_through() them)}."""
    for style, (label, (x, y, line)) in zip(cycle(STYLES), lines.items()):
        bins = np.clip((10 * x).astype(int), 0, 9)
        means = [(x[bins == b].mean(), y[bins == b].mean()) for b in np.unique(bins)]
        axis.plot(*zip(*means), linestyle="", marker=style["marker"], color=style["color"], markersize=5)
        if line:
            ends = np.array([x.min(), x.max()])
            axis.plot(ends, line.intercept + line.slope * ends, linestyle=style["linestyle"], color=style["color"],
                      linewidth=1.5)
            label = f"{label}: r = {line.rvalue:.2f}, slope {line.slope:.2f}"
        axis.plot([], [], **style, label=label)
    axis.set(xlabel="overlap rate (share of the box that boxes of other classes cover)", ylabel="Dice", ylim=(0, 1),
             xlim=(-0.02, 1.02), title=f"prompt {prompt}: {len(x)} targets; markers: means of tenths")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)


def draw_small(axis, prompt, spokes):
    """Figure 3, right: Dice of small objects, a spoke for each modality that has some. spokes: {method: by_modality()
    of the small ones}."""
    counts = next(iter(spokes.values()))["count"]
    names = [m for m in counts.index if any(found["count"][m] for found in spokes.values())]
    turn = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    for style, (label, found) in zip(cycle(STYLES), spokes.items()):
        values = found["mean"][names].tolist()
        axis.plot([*turn, *turn[:1]], [*values, *values[:1]], **style, label=label, markersize=4, linewidth=1.4)
    axis.set_xticks(turn, [f"{m}\n(n = {counts[m]})" for m in names], fontsize=8)
    axis.tick_params(axis="x", pad=12)
    axis.set(ylim=(0, 1), theta_offset=np.pi / 2, theta_direction=-1)
    axis.set_yticks([0.25, 0.5, 0.75, 1], ["0.25", "0.5", "0.75", "1"], fontsize=7, color="#555555")
    axis.set_title(f"prompt {prompt}: Dice of small objects (below 5 % of the image)", fontsize=10, pad=22)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(-0.45, 1.0))


def box_plots(boxes, path, title):
    """Figure 4. boxes: the Dice of each case, grouped by class and method; the cases are drawn as well."""
    counts = boxes.size().unstack(sort=False)
    classes, methods = counts.axes
    figure, axis = plt.subplots(figsize=(max(6, 0.55 * len(classes) * (len(methods) + 0.8) + 1.2), 4.2))
    width = 0.8 / len(methods)
    for m, (method, style, hatch) in enumerate(zip(methods, cycle(STYLES), cycle(HATCHES))):
        places, values = zip(*((k + (m - (len(methods) - 1) / 2) * width, boxes.get_group((name, method)))
                               for k, name in enumerate(classes) if (name, method) in boxes.groups))
        axis.boxplot(values, positions=places, widths=0.85 * width, patch_artist=True, showfliers=False, label=method,
                     medianprops=dict(color="black", linewidth=1.6), manage_ticks=False,
                     boxprops=dict(facecolor=(style["color"], 0.35), hatch=hatch, edgecolor=style["color"]))
        for place, each in zip(places, values):
            if len(each) <= 50:
                axis.plot(place + np.linspace(-0.2, 0.2, len(each)) * width, each, "o", color="black", markersize=3)
    labels = [f"{name}\n(n = {n:.0f})" for name, n in counts.max(axis=1).items()]
    axis.set_xticks(range(len(classes)), labels, fontsize=8)
    axis.set(ylabel="Dice", ylim=(-0.03, 1.03), title=title)
    axis.legend(frameon=False, fontsize=8, ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def fractions_and_points(fractions, points, path):
    """Figure 6. fractions: {"1/16": [Dice of each seed]}; points: {method: {number of points: Dice}}."""
    panels = bool(fractions) + bool(points)
    figure, axes = plt.subplots(1, panels, figsize=(4.8 * panels, 3.8), squeeze=False)
    if fractions:
        axis, at = axes[0, 0], np.arange(len(fractions))
        spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in fractions.values()]
        axis.errorbar(at, [np.mean(v) for v in fractions.values()], spread, capsize=4, **STYLES[0])
        axis.set_xticks(at, [f"{name}\n(n = {len(v)})" for name, v in fractions.items()])
        axis.set(xlabel="share of the training data (n: seeds; bars: ± sd)", ylabel="mean Dice (strict)", ylim=(0, None))
    if points:
        axis = axes[0, -1]
        for style, (label, line) in zip(cycle(STYLES), points.items()):
            axis.plot(*zip(*sorted(line.items())), **style, label=label)
        axis.set(xlabel="points per target", ylabel="mean Dice (strict)", ylim=(0, 1),
                 xticks=sorted({n for line in points.values() for n in line}))
        axis.legend(frameon=False, fontsize=8)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def line_through(x, y):
    """scipy's line by least squares, with slope, intercept and rvalue; None for fewer than three points, or one x."""
    return linregress(x, y) if len(x) > 2 and x.min() < x.max() else None


# ---------------------------------------------------------------------------------------------------------------------
# From evaluations

def figure3(evaluations, path):
    """Left: Dice over the overlap rate; right: Dice of small objects per modality. A row for each prompt."""
    prompts = [p for p in ("box", "point", "none") if any(e["prompt"] == p for _, e in evaluations)]
    if not prompts:
        raise InputError("no evaluation to draw")
    figure, body = plt.figure(figsize=(11, 4.6 * len(prompts))), []
    for at, prompt in enumerate(prompts):
        lines, spokes = {}, {}
        for label, e in evaluations:
            if e["prompt"] == prompt:
                targets = e["targets"][e["targets"]["area"] > 0]
                # in an image of a single class nothing can overlap
                crowd = targets[targets.groupby("image")["target"].transform("nunique") > 1]
                x, y = (crowd[column].to_numpy(float) for column in ("overlap", "dice_strict"))
                line, small = line_through(x, y), by_modality(targets[targets["area"] < SMALL])
                lines[label], spokes[label] = (x, y, line), small
                body.append([f"{label}, {prompt}", *([f"{line.rvalue:.2f}", f"{line.slope:.2f}"] if line else "--"),
                             str(len(x)), show(100 * small["mean"].mean()), str(small["count"].sum())])
        draw_overlap(figure.add_subplot(len(prompts), 2, 2 * at + 1), prompt, lines)
        draw_small(figure.add_subplot(len(prompts), 2, 2 * at + 2, projection="polar"), prompt, spokes)
        for name, (r, slope) in NUMBERS["figure3"]["overlap"].get(prompt, {}).items():
            small = NUMBERS["figure3"]["small"][prompt].get(name, np.nan)
            body.append([f"paper: {name}*, {prompt}", f"{r:.2f}", f"{slope:.2f}", "-", show(small), "-"])
    save(figure, path)
    heads = ["prompt", "r", "slope", "targets", "small: average Dice", "small objects"]
    return (markdown(heads, body) + "\nOverlap rate: the share of a target's bounding box that boxes of other classes in "
            f"its image cover, over the images with two classes or more; small: below {SMALL:.0%} of the image.\n"
            + note(False))


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
    box_plots(boxes, path, f"{first['dataset']}: Dice (strict) of single {unit}")
    quartiles = 100 * boxes.quantile((0.25, 0.5, 0.75)).unstack()
    rows = [[", ".join(names), str(len(values)), *map(show, quartiles.loc[names])] for names, values in boxes]
    return markdown(["", unit, "first quartile", "median", "third quartile"], rows)


def figure6(evaluations, path, tables):
    """Left: Dice over the share of the training data; right: over the number of points."""
    fractions, points = {}, {}
    if tables:
        remedy = "holds no figure6; make it with: python eval.py --tables figure6"
        rows = read_json(tables, remedy)
        if "figure6" not in rows:
            raise InputError(f"{tables}: {remedy}")
        fractions = {row: values for row, values in rows["figure6"].items() if values}
    for label, e in evaluations:
        if e["prompt"] == "point":
            points.setdefault(label, {})[e["points"]] = np.array(e["table"]["mean"]["dice_strict"], float)  # None: NaN
    if not fractions and not points:
        raise InputError("nothing to draw: give evaluations with --prompt point, or --tables FILE")
    fractions_and_points(fractions, points, path)
    paper = NUMBERS["figure6"]["fraction"]
    rows = [[f"{row} of the training data", show(100 * np.mean(v)), f"± {100 * np.std(v, ddof=1):.2f}, {len(v)} seeds"
             if len(v) > 1 else "one seed", show(paper.get(row, np.nan))] for row, v in fractions.items()]
    rows += [[f"{label}, {n} point{'s' * (n > 1)}", show(100 * v), "", "-"] for label, line in points.items()
             for n, v in sorted(line.items())]
    return markdown(["", "Dice", "", "paper*"], rows) + note(False)


# ---------------------------------------------------------------------------------------------------------------------

def main():
    args = parse(__doc__, (figure3, figure4, figure6), "a PNG (default: the figure's name)",
                 {"figure6": {"--tables": "the tables.json that eval.py --tables figure6 wrote"}})
    path = args.out or f"{args.command}.png"
    more = (args.tables,) if args.function is figure6 else ()
    print(args.function(args.evaluations, path, *more) + f"\nwrote {path}")


if __name__ == "__main__":
    run(main)

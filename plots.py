"""Pictures: masks over images, as every script draws them. Readable by the colour-blind."""
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from metrics import pearson  # noqa: E402

# Okabe and Ito's colours, told apart by the colour-blind, and two more
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff", "#999999", "#8c510a")


def colours(names):
    """{name: colour}, in the order of the names."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def overlay(axis, image, masks=(), palette=None, title=None):
    """Draws an image uint8 [H,W,3] with filled, outlined masks: pairs of a name in `palette` and bool [H,W]."""
    shown = image / 255.0
    for name, inside in masks:
        edge = inside & ~np.all([np.roll(inside, step, axis) for axis in (0, 1) for step in (1, -1)], axis=0)
        colour = np.array(to_rgb(palette[name]))
        shown[inside] = 0.65 * shown[inside] + 0.35 * colour
        shown[edge] = colour
    axis.imshow(shown, interpolation="nearest")
    axis.set_xticks([]), axis.set_yticks([])
    if title:
        axis.set_title(title, fontsize=9)


def legend(figure, palette, columns=4):
    """Names the colours below the panels; tight_layout leaves room for it."""
    handles = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in palette.items()]
    columns = min(columns, max(1, len(handles)))
    figure.legend(handles=handles, loc="lower center", ncol=columns, frameon=False, fontsize=9)
    rows = -(-len(handles) // columns)
    figure.tight_layout(rect=(0, (0.25 * rows + 0.15) / figure.get_figheight(), 1, 1))


def contact_sheet(pictures, path, title, columns=6):
    """pictures: (title, image uint8 [H,W,3], [(class, bool [H,W])]) -> a PNG of all of them with their masks."""
    palette = colours(name for _, _, masks in pictures for name, _ in masks)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.65 * rows + 0.8 + 0.07 * len(palette)),
                                squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, image, masks) in zip(axes.flat, pictures):
        short = name if len(name) <= 30 else name[:14] + "…" + name[-15:]
        overlay(axis, image, masks, palette, short)
        axis.title.set_fontsize(7)
    figure.suptitle(title, fontsize=11)
    legend(figure, palette, columns)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def examples(rows, path, title):
    """rows: (name, title, image, [(title, masks)]) -> a PNG with a row each: the image, then it with each of the masks."""
    palette = colours(name for *_, shown in rows for _, masks in shown for name, _ in masks)
    columns = 1 + max(len(shown) for *_, shown in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(3 * columns, 3.1 * len(rows) + 0.9), squeeze=False)
    for axis, (name, key, image, shown) in zip(axes, rows):
        short = key if len(key) <= 34 else key[:16] + "…" + key[-17:]
        overlay(axis[0], image, title=short)
        for a, (note, masks) in zip(axis[1:], shown):
            overlay(a, image, masks, palette, note)
        axis[0].set_ylabel(name)
    figure.suptitle(title, fontsize=11)
    legend(figure, palette)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def curves(rows, path, title):
    """rows of log.csv as record.read_log gives them -> a PNG: the loss and its parts, validation Dice, rate."""
    trained, checked = [r for r in rows if "loss" in r], [r for r in rows if "val_dice" in r]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    steps = [r["step"] for r in trained]
    for name, style, colour in (("loss", "-", "black"), ("focal", ":", COLOURS[5]), ("dice", "--", COLOURS[4]),
                                ("iou", "-.", COLOURS[2])):
        factor, label = (20, "20 × focal") if name == "focal" else (1, name)
        left.plot(steps, [factor * r[name] for r in trained], style, color=colour, label=label, linewidth=1.2)
    left.set(xlabel="step", ylabel="loss, mean of some 10 steps", ylim=(0, None))
    left.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    middle.plot([r["step"] for r in checked], [r["val_dice"] for r in checked], "o-", color=COLOURS[4], markersize=3)
    middle.set(xlabel="step", ylabel="validation Dice, pixels pooled", ylim=(0, 1))
    right.plot(steps, [r["lr"] for r in trained], color="black")
    right.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's figures. Methods differ by marker, line and hatch as well as by colour

STYLES = [dict(color=colour, marker=marker, linestyle=line) for colour, marker, line in zip(
    (COLOURS[4], COLOURS[5], COLOURS[2], COLOURS[6], "#000000"), "osD^v", ("-", "--", "-.", ":", (0, (5, 1))))]
HATCHES = ("", "///", "...", "xxx", "\\\\\\")


def overlap_and_small(rows, path):
    """Figure 3. rows: (prompt, {method: (overlap rates [n], Dice [n])}, {method: {modality: (Dice, n)}})."""
    figure = plt.figure(figsize=(11, 4.6 * len(rows)))
    for at, (prompt, lines, spokes) in enumerate(rows):
        axis = figure.add_subplot(len(rows), 2, 2 * at + 1)
        for style, (label, (x, y)) in zip(STYLES, lines.items()):
            fit, edges = pearson(x, y), np.linspace(0, 1, 11)
            bins = np.clip(np.digitize(x, edges) - 1, 0, 9)
            means = [(x[bins == b].mean(), y[bins == b].mean()) for b in range(10) if (bins == b).any()]
            axis.plot(*zip(*means), linestyle="", marker=style["marker"], color=style["color"], markersize=5)
            if fit:
                r, slope, start = fit
                ends = np.array([x.min(), x.max()])
                axis.plot(ends, start + slope * ends, linestyle=style["linestyle"], color=style["color"], linewidth=1.5)
                label = f"{label}: r = {r:.2f}, slope {slope:.2f}"
            axis.plot([], [], **style, label=label)
        axis.set(xlabel="overlap rate (share of the box that boxes of other classes cover)", ylabel="Dice", ylim=(0, 1),
                 xlim=(-0.02, 1.02), title=f"prompt {prompt}: {len(x)} targets; markers: means of tenths")
        axis.legend(frameon=False, fontsize=8, loc="lower left")
        axis.spines[["top", "right"]].set_visible(False)
        names = [m for m in next(iter(spokes.values())) if any(s[m][1] for s in spokes.values())]
        axis = figure.add_subplot(len(rows), 2, 2 * at + 2, projection="polar")
        turn = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
        for style, (label, dice) in zip(STYLES, spokes.items()):
            values = [dice[m][0] for m in names]
            axis.plot([*turn, turn[0]], [*values, values[0]], **style, label=label, markersize=4, linewidth=1.4)
        counts = next(iter(spokes.values()))
        axis.set_xticks(turn, [f"{m}\n(n = {counts[m][1]})" for m in names], fontsize=8)
        axis.tick_params(axis="x", pad=12)
        axis.set(ylim=(0, 1), theta_offset=np.pi / 2, theta_direction=-1)
        axis.set_yticks([0.25, 0.5, 0.75, 1], ["0.25", "0.5", "0.75", "1"], fontsize=7, color="#555555")
        axis.set_title(f"prompt {prompt}: Dice of small objects (below 5 % of the image)", fontsize=10, pad=22)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(-0.45, 1.0))
    save(figure, path)


def box_plots(boxes, path, title):
    """Figure 4. boxes: {class: {method: [Dice of each case]}}; the cases are drawn as well."""
    methods = list(dict.fromkeys(m for labels in boxes.values() for m in labels))
    figure, axis = plt.subplots(figsize=(max(6, 0.55 * len(boxes) * (len(methods) + 0.8) + 1.2), 4.2))
    width, handles = 0.8 / len(methods), []
    for m, method in enumerate(methods):
        colour, hatch = STYLES[m % len(STYLES)]["color"], HATCHES[m % len(HATCHES)]
        places = [k + (m - (len(methods) - 1) / 2) * width for k, labels in enumerate(boxes.values()) if method in labels]
        values = [labels[method] for labels in boxes.values() if method in labels]
        drawn = axis.boxplot(values, positions=places, widths=0.85 * width, patch_artist=True, showfliers=False,
                             medianprops=dict(color="black", linewidth=1.6), manage_ticks=False)
        for box in drawn["boxes"]:
            box.set(facecolor=(*to_rgb(colour), 0.35), hatch=hatch, edgecolor=colour)
        for place, each in zip(places, values):
            if len(each) <= 50:
                axis.plot(place + np.linspace(-0.2, 0.2, len(each)) * width, each, "o", color="black", markersize=3)
        handles.append(Patch(facecolor=(*to_rgb(colour), 0.35), hatch=hatch, edgecolor=colour, label=method))
    counts = [max(map(len, labels.values())) for labels in boxes.values()]
    axis.set_xticks(range(len(boxes)), [f"{name}\n(n = {n})" for name, n in zip(boxes, counts)], fontsize=8)
    axis.set(ylabel="Dice", ylim=(-0.03, 1.03), title=title)
    axis.legend(handles=handles, frameon=False, fontsize=8, ncols=len(methods), loc="upper center",
                bbox_to_anchor=(0.5, -0.16))
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def fractions_and_points(fractions, points, path):
    """Figure 6. fractions: {"1/16": [Dice of each seed]}; points: {method: {number of points: Dice}}."""
    figure, axes = plt.subplots(1, bool(fractions) + bool(points), figsize=(4.8 * (bool(fractions) + bool(points)), 3.8),
                                squeeze=False)
    axes = list(axes[0])
    if fractions:
        axis, at = axes.pop(0), np.arange(len(fractions))
        means, spread = [np.mean(v) for v in fractions.values()], [np.std(v, ddof=1) if len(v) > 1 else 0
                                                                    for v in fractions.values()]
        axis.errorbar(at, means, spread, capsize=4, **STYLES[0])
        axis.set_xticks(at, [f"{name}\n(n = {len(v)})" for name, v in fractions.items()])
        axis.set(xlabel="share of the training data (n: seeds; bars: ± sd)", ylabel="mean Dice (strict)", ylim=(0, None))
    if points:
        axis = axes.pop(0)
        for style, (label, line) in zip(STYLES, points.items()):
            axis.plot(sorted(line), [line[n] for n in sorted(line)], **style, label=label)
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

"""Pictures: masks over images, as every script draws them. Readable by the colour-blind."""
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

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
    """rows of log.csv as runs.read_log gives them -> a PNG: the loss and its parts, validation Dice, rate."""
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

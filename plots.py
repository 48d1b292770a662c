"""Pictures: masks over images, as every script draws them. Readable by the colour-blind."""
import textwrap
import warnings
from itertools import cycle

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})  # a name may hold dollar signs

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from common import whole  # noqa: E402

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "legend.fontsize": 8})
# Okabe and Ito's colours, told apart by the colour-blind, and two more
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff", "#999999", "#8c510a")


def overlay(axis, image, masks=(), palette=None, title=None, most=1024):
    """Draws an image uint8 [H,W,3] with filled, outlined masks: pairs of a name in `palette` and bool [H,W]. Of a large
    image every n-th pixel, up to `most` a side; the axes keep its pixels' numbers."""
    (h, w), step = image.shape[:2], -(-max(image.shape[:2]) // most)
    shown = image[::step, ::step] / 255.0
    for name, inside in masks:
        inside = inside[::step, ::step]
        edge = inside & ~np.all([np.roll(inside, step, axis) for axis in (0, 1) for step in (1, -1)], axis=0)
        colour = np.array(to_rgb(palette[name]))
        shown[inside] = 0.65 * shown[inside] + 0.35 * colour
        shown[edge] = colour
    axis.imshow(shown, interpolation="nearest", extent=(-0.5, w - 0.5, h - 0.5, -0.5))
    axis.set_xticks([]), axis.set_yticks([])
    if title:
        axis.set_title(title, fontsize=9)


def drawable(text):
    """A text as a picture can show it: bytes of another encoding and control characters become question marks."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "?" for c in text)


def save(figure, path, dpi=110):
    """The figure as a PNG, whole or not at all, at PATH or in an open file."""
    try:
        for text in figure.findobj(Text):
            if (shown := drawable(text.get_text())) != text.get_text():
                text.set_text(shown)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a letter that the font lacks, a name that is too long
            if hasattr(path, "write"):
                figure.savefig(path, dpi=dpi, format="png")
            else:
                with whole(path) as file:
                    figure.savefig(file, dpi=dpi, format="png")
    finally:
        figure.clear()  # its parts point at each other, and would stay until Python looks for such circles
        plt.close(figure)


def contact_sheet(pictures, path, title, columns=6, inches=2.4):
    """pictures: (title, image uint8 [H,W,3], [(class, bool [H,W])]) -> a PNG of all of them with their masks."""
    palette = dict(zip(dict.fromkeys(name for _, _, masks in pictures for name, _ in masks), cycle(COLOURS)))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", figsize=(
        inches * columns, (inches + 0.25) * rows + 0.8 + 0.07 * len(palette)))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, image, masks) in zip(axes.flat, pictures):
        overlay(axis, image, masks, palette, name if len(name) <= 38 else name[:18] + "…" + name[-19:])
        axis.title.set_fontsize(7)
    figure.suptitle(title, fontsize=11)
    # matplotlib passes over a label that begins with _
    handles = [Patch(facecolor=colour, edgecolor="black", label=f" {name}") for name, colour in palette.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    save(figure, path)


def curves(rows, path, title):
    """rows of log.csv as runs.read_log gives them -> a PNG: the loss and its parts, validation Dice, rate."""
    trained, checked = [r for r in rows if "loss" in r], [r for r in rows if "val_dice" in r]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps = [r["step"] for r in trained]
    for name, style, colour in (("loss", "-", "black"), ("focal", ":", COLOURS[5]), ("dice", "--", COLOURS[4]),
                                ("iou", "-.", COLOURS[2])):
        factor, label = (20, "20 × focal") if name == "focal" else (1, name)
        left.plot(steps, [factor * r[name] for r in trained], style, color=colour, label=label, linewidth=1.2)
    left.set(xlabel="step", ylabel="loss, mean of some 10 steps", ylim=(0, None))
    left.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    middle.plot([r["step"] for r in checked], [r["val_dice"] for r in checked], "o-", color=COLOURS[4], markersize=3)
    middle.set(xlabel="step", ylabel="validation Dice, pixels pooled", ylim=(0, 1))
    right.plot(steps, [r["lr"] for r in trained], color="black")
    right.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def matrices(panels, path, title, high=1.0):
    """panels: (title, values [R,C], bool [R,C]: marked with *, names of the rows, names of the columns) -> a PNG of all
    of them: from 0, white, to `high`, black, with the numbers in the cells; NaN is a dash."""
    figure, axes = plt.subplots(1, len(panels), squeeze=False, layout="constrained", figsize=(
        sum(1.9 + 0.62 * len(columns) for *_, columns in panels), 2.2 + 0.4 * max(len(panel[3]) for panel in panels)))
    for axis, (name, values, marked, rows, columns) in zip(axes.flat, panels):
        axis.imshow(np.nan_to_num(values), cmap="Greys", vmin=0, vmax=high, aspect="auto")
        for (r, c), value in np.ndenumerate(values):
            shown = "-" if np.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00") + "*" * bool(marked[r, c])
            axis.text(c, r, shown, ha="center", va="center", fontsize=8, color="white" if value > high / 2 else "black")
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.spines[:].set_visible(True)
        axis.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# One's own image

def prompts(axis, box=None, points=()):
    """Draws a box (x0, y0, x1, y1) and points ((x, y), label): + inside, x outside; white, with a black edge."""
    if box is not None:
        x0, y0, x1, y1 = box
        axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linestyle="--",
                                     path_effects=[withStroke(linewidth=2.5, foreground="black")]))
    for (x, y), label in points:
        axis.plot(x, y, marker="+" if label else "x", color="white", markersize=10, markeredgewidth=2,
                  path_effects=[withStroke(linewidth=4, foreground="black")])


def contour(axis, mask, **style):
    """The outline of a mask, if it has one."""
    if mask.any() and not mask.all() and min(mask.shape) > 1:
        axis.contour(mask, [0.5], **style)


def explanation(path, name, explained):
    """A PNG at PATH, or in an open file, of what its texts did to the structure `name`: of an inference.Explanation."""
    image, mask, figure = explained.image, explained.probability > 0.5, plt.figure(figsize=(14.5, 8.8))
    about = "about " if explained.step > 1 else ""  # of a large image there is not every pixel
    count = lambda inside: f"{about}{inside.sum() * explained.step ** 2} pixels"
    places = iter(figure.subplots(2, 4).flat)

    def agreement(other):
        both = mask.sum() + other.sum()
        return f"Dice with the mask {2 * (mask & other).sum() / both:.2f}" if both else "no mask either"

    def panel(kind, title):
        """The next axis; the title says what the mask of `kind` is without its operator, if it has one."""
        axis, missing = next(places), kind and kind not in explained.idle
        axis.axis("off")
        title = f"{kind}: switched off in this model" if missing else title + (
            f"; switched off: {agreement(explained.idle[kind])}" if kind else "")
        axis.set_title(textwrap.fill(title, 44), fontsize=9)
        return None if missing else axis

    def heat(kind, title, values, low, high, over=True):
        """`values` from low to high, over the image."""
        if axis := panel(kind, title):
            if over:
                axis.imshow(image, cmap="gray")
                contour(axis, mask, colors="white", linewidths=0.8)
            drawn = axis.imshow(values, cmap="cividis", vmin=low, vmax=high, alpha=0.65 if over else 1,
                                interpolation="nearest")
            figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.02)

    axis = panel(None, f"{name}: {count(mask)}; the model expects an IoU of {explained.iou:.2f}")
    overlay(axis, image, [(name, mask)] if mask.any() else [], {name: COLOURS[0]})
    prompts(axis, explained.box, explained.points)
    heat(None, "probability of each pixel (mask: above one half)", explained.probability, 0, 1)
    heat("position", "position: features are multiplied by this (1: left as they are)" + pointing(explained, mask),
         explained.A_pos, 0, 2)
    change = None if explained.texture is None else explained.texture - np.pad([[1]], 3)
    most = 1 if change is None else max(1e-6, np.abs(change).max())
    heat("texture", "texture: the 7 x 7 filter, less the one that changes nothing", change, -most, most, over=False)
    if axis := panel("shape", "shape: where the 3 x 3 filter looks around four places; size: weight, hollow: negative"):
        sampling(axis, mask, explained)
    for kind, other in explained.without.items():
        axis = panel(None, f"without the {kind} text: {count(other)} (dashed), {agreement(other)} (solid)")
        axis.imshow(image, cmap="gray")
        contour(axis, mask, colors="white", linestyles="solid", linewidths=1.5)
        contour(axis, other, colors=COLOURS[0], linestyles="dashed", linewidths=1.5)
    figure.suptitle(f"{name}: what its texts did", fontsize=13, y=0.985)
    lines = [textwrap.fill(f"{kind}: {text}", 190) for kind, text in explained.texts.items()]
    if explained.gate:
        lines += ["the gate, in the mask: " + ", ".join(f"{weight:.2f} of F_{branch}"
                                                       for branch, weight in explained.gate.items())]
    figure.text(0.03, 0.95, "\n".join(lines), fontsize=9, va="top")
    figure.subplots_adjust(0.03, 0.02, 0.94, 0.78, wspace=0.22, hspace=0.3)
    save(figure, path, dpi=100)


def pointing(explained, mask):
    """How much of what A_pos raises above 1 lies in the box around the mask, and how much would by chance; "" where
    there is no mask, or nothing is raised."""
    gain = 0 if explained.A_pos is None else np.clip(explained.A_pos - 1, 0, None)
    if not mask.any() or not np.any(gain):
        return ""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    share, chance = gain[box].sum() / gain.sum(), mask[box].size / mask.size
    return f"; {share:.0%} of the gain in the mask's box, {chance:.0%} by chance"


def sampling(axis, mask, explained):
    """The nine places, per output cell, that the deformable convolution reads, on the image; of four cells inside."""
    size = np.array(mask.shape)
    axis.imshow(explained.image, cmap="gray")
    inside = np.argwhere(mask if mask.any() else np.ones(size, bool))
    centres = inside[np.linspace(0, len(inside) - 1, 6).astype(int)[1:5]]  # spread over the mask, from top to bottom
    n = explained.shape_offset.shape[-1]
    offset = explained.shape_offset.reshape(9, 2, n, n)
    taps = np.array([(k // 3 - 1, k % 3 - 1) for k in range(9)])
    for colour, centre in zip(COLOURS, centres):
        row, column = (centre / size * n).astype(int)
        places = centre + 0.5 + (taps + offset[:, :, row, column]) * size / explained.cells
        for (y, x), weight in zip(places, explained.shape_kernel.ravel()):
            axis.plot([centre[1], x], [centre[0], y], color=colour, linewidth=0.6)
            axis.plot(x, y, "o", markersize=3 + 8 * min(1, abs(weight)), color=colour if weight >= 0 else "none",
                      markeredgecolor=colour)
        axis.plot(centre[1], centre[0], "+", color="white", markersize=7)
    axis.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))

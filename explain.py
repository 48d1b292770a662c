"""predict.py --explain: one picture of what the three texts of a target did to the image's features and its mask."""
import textwrap

import numpy as np
import torch

import plots
from common import ATTRIBUTES
from inference import predict_image
from medsegr import modulate
from metrics import dice
from plots import plt

MEANING = dict(fused="features changed by the texts", sem="their meaning, by channel attention", sam="SAM's own features")


def upsampled(grid, size):
    """float [G,G] -> [H,W], bilinear."""
    x = torch.as_tensor(grid)[None, None].float()
    return torch.nn.functional.interpolate(x, tuple(size), mode="bilinear", align_corners=False)[0, 0].cpu().numpy()


def without(triples, target, kind):
    """The texts with one of a target's emptied."""
    return [triple | {kind: ""} if t == target else triple for t, triple in enumerate(triples)]


@torch.no_grad()
def explain(model, image, answer, boxes, points, target, name, triples, path, precision="float32"):
    """Draws PATH, or an open file, for one target of predict_image()'s Answer: image uint8 [H,W,3], target its number,
    name its name."""
    size, priors, config = image.shape[:2], answer.priors, model.config
    probability = answer.probability[target]
    mask = probability > 0.5
    figure, axes = plt.subplots(3, 4, figsize=(14.5, 12.4))
    for axis in axes.flat:
        axis.set_xticks([]), axis.set_yticks([])
    palette = {name: plots.COLOURS[0]}

    def says(axis, title):
        axis.set_title(textwrap.fill(title, 44), fontsize=9)

    def missing(axis, title):
        axis.axis("off")
        says(axis, f"{title}: switched off in this model")

    def heat(axis, values, title, low, high, over=True):
        if over:
            axis.imshow(image, cmap="gray")
        drawn = axis.imshow(values, cmap="cividis", vmin=low, vmax=high, alpha=0.65 if over else 1,
                            interpolation="nearest")
        figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.02)
        if over:
            axis.contour(mask, [0.5], colors="white", linewidths=0.8) if mask.any() and not mask.all() else None
        says(axis, title)

    # the answer
    plots.overlay(axes[0, 0], image, [(name, mask)] if mask.any() else [], palette)
    says(axes[0, 0], f"{name}: {mask.sum()} pixels; the model expects an IoU of {answer.iou[target]:.2f}")
    if boxes is not None:
        x0, y0, x1, y1 = boxes[target]
        axes[0, 0].add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linestyle="--"))
    for (x, y), label in zip(points[0][target], points[1][target]) if points is not None else ():
        axes[0, 0].plot(x, y, marker="+" if label else "x", color="white", markersize=10, markeredgewidth=2)
    heat(axes[0, 1], probability, "probability of each pixel (mask: above one half)", 0, 1)

    # position, texture, shape
    if priors.A_pos is None:
        missing(axes[0, 2], "position")
    else:
        heat(axes[0, 2], upsampled(priors.A_pos[target], size), "position text: features are multiplied by this "
             "(1: left as they are, 0: suppressed, 2: doubled)", 0, 2)
    one, features = torch.zeros(1, dtype=torch.int64, device=model.device), answer.features
    alone = priors.take(slice(target, target + 1))
    if priors.texture is None:
        missing(axes[0, 3], "texture"), missing(axes[1, 0], "texture")
    else:
        kernel = priors.texture[target].float().cpu().numpy()
        change = kernel.copy()
        change[3, 3] -= 1
        most = max(1e-6, np.abs(change).max())
        heat(axes[0, 3], change, "texture text: the 7 x 7 filter it gives, less the one that changes nothing", -most,
             most, over=False)
        filtered = modulate(features, one, alone._replace(shape_kernel=None, shape_offset=None))
        plain = modulate(features, one, alone._replace(texture=None, shape_kernel=None, shape_offset=None))
        effect = (filtered - plain).float().norm(dim=1)[0] / plain.float().norm(dim=1)[0].clamp(min=1e-6)
        heat(axes[1, 0], upsampled(effect, size), "what that filter changes: relative change of the features", 0,
             max(1e-6, float(effect.max())))
    if priors.shape_offset is None:
        missing(axes[1, 1], "shape")
    else:
        draw_sampling(axes[1, 1], image, mask, alone, features.shape[-1])
        says(axes[1, 1], "shape text: where the 3 x 3 filter looks around four places; size: weight, hollow: negative")

    # the gate
    for axis, branch in zip(axes[1, 2:].tolist() + [axes[2, 0]], ("fused", "sem", "sam")):
        if answer.steps["gate"] is None or branch not in config.active_branches:
            missing(axis, branch)
        else:
            weights = answer.steps["gate"][target, config.active_branches.index(branch)].float()
            heat(axis, upsampled(weights, size), f"gate: share of F_{branch}, {MEANING[branch]}", 0, 1)

    # each text removed
    for axis, kind in zip(axes[2, 1:], ATTRIBUTES):
        other = predict_image(model, image, without(triples, target, kind), boxes, points, precision, features,
                              empty=True).probability[target] > 0.5
        axis.imshow(image, cmap="gray")
        for edge, colour, style in ((mask, "white", "solid"), (other, plots.COLOURS[0], "dashed")):
            axis.contour(edge, [0.5], colors=colour, linestyles=style, linewidths=1.5) if edge.any() and not edge.all() \
                else None
        same = dice(mask, other)
        says(axis, f"without the {kind} text (dashed): {other.sum()} pixels, Dice with the mask above (solid) "
             + ("-" if same is None else f"{same:.2f}"))
    lines = "\n".join(textwrap.fill(f"{kind}: {triples[target][kind]}", 190) for kind in ATTRIBUTES)
    figure.suptitle(f"{name}: what its texts did", fontsize=13, y=0.99)
    figure.text(0.03, 0.965, lines, fontsize=9, va="top")
    figure.subplots_adjust(0.03, 0.02, 0.94, 0.86, wspace=0.22, hspace=0.28)
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def draw_sampling(axis, image, mask, priors, G):
    """The nine places, per output cell, that the deformable convolution reads, on the image; of four cells inside."""
    h, w = image.shape[:2]
    axis.imshow(image, cmap="gray")
    cell = np.array([h / G, w / G])
    inside = np.argwhere(mask) if mask.any() else np.argwhere(np.ones((h, w), bool))
    centres = inside[np.linspace(0, len(inside) - 1, 6).astype(int)[1:5]]  # spread over the mask, from top to bottom
    n = priors.shape_offset.shape[-1]
    offset = priors.shape_offset[0].float().cpu().numpy().reshape(9, 2, n, n)
    weight = priors.shape_kernel[0].float().cpu().numpy().ravel()
    taps = np.array([(k // 3 - 1, k % 3 - 1) for k in range(9)])
    for colour, centre in zip(plots.COLOURS, centres):
        at = np.clip((centre / (h, w) * n).astype(int), 0, n - 1)
        places = (centre + 0.5) + (taps + offset[:, :, at[0], at[1]]) * cell
        for (y, x), v in zip(places, weight):
            axis.plot([centre[1], x], [centre[0], y], color=colour, linewidth=0.6)
            axis.plot(x, y, "o", markersize=3 + 8 * min(1, abs(v)), color=colour if v >= 0 else "none",
                      markeredgecolor=colour)
        axis.plot(centre[1], centre[0], "+", color="white", markersize=7)
    axis.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))

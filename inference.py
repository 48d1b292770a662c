"""How a model is asked: the structures of a sample or of one's own image, and the answers on the original grid.

    predictor = Predictor(model, texts, prompt="box")
    for name, found, truth in predict(predictor, sample, dataset): ...          training's validation, evaluation
    answer = predict_image(model, image, [texts("liver", "ct")])                one's own image, the page
"""
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import box_prompt, make_sample, merge_instances, point_prompt, prompt_rng, to_original
from encoders import FeatureCache
from readers.pictures import Picture


def autocast(device, precision):
    """bfloat16 or float16 autocast on the device; float32: none."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


# ---------------------------------------------------------------------------------------------------------------------
# The structures of a sample, with prompts cut from its truth

@torch.no_grad()
def ask(model, features, sample, texts, prompt, points=1, seed=0):
    """Features [1,C,H,W] of one sample -> (class names asked for, n of them; mask logits float32 [n,S,S]).

    prompt "none" asks for the classes that the sample has or is known to lack, "point" and "box" for each target with a
    mask, in order. Prompts depend on the sample's key, the target's name and number, and the seed alone.
    """
    asked = [t for t in range(len(sample.targets)) if prompt == "none" or sample.masks[t].any()]
    names = [sample.targets[t] for t in asked] + [*sample.absent] * (prompt == "none")
    S = sample.masks.shape[-1]
    if not names:
        return [], torch.zeros(0, S, S)
    boxes = locations = None
    if prompt == "box":
        boxes = torch.from_numpy(np.stack([box_prompt(sample.masks[t]) for t in asked])).to(model.device)
    elif prompt == "point":
        before = [sample.targets[:t].count(sample.targets[t]) for t in asked]  # instances of the same name
        rngs = [prompt_rng(sample.key, sample.targets[t] + (f" {n}" if n else ""), seed) for t, n in zip(asked, before)]
        pairs = [point_prompt(sample.masks[t], points, rng) for t, rng in zip(asked, rngs)]
        locations = tuple(torch.from_numpy(np.stack(x)).to(model.device) for x in zip(*pairs))
    priors = model.encode_attributes([texts(name, sample.modality, sample) for name in names],
                                     empty=getattr(texts, "how", None) == "empty")
    index = torch.zeros(len(names), dtype=torch.int64, device=model.device)
    logits, _ = model.decode(features.to(model.device), index, priors, locations, boxes)
    return names, F.interpolate(logits.float()[:, None], (S, S), mode="bilinear", align_corners=False)[:, 0]


def label_map(names, logits, size, classes):
    """Logits [n,S,S] of the classes asked for -> uint8 [H,W] on the original grid: the most certain one, 0 for none."""
    if not names:
        return np.zeros(size, np.uint8)
    best, which = to_original(logits, size).max(0)
    label = torch.tensor([classes.index(name) + 1 for name in names], device=which.device)[which]
    return torch.where(best > 0, label, 0).to(torch.uint8).cpu().numpy()


def true_label_map(sample, classes):
    """uint8 [H,W] of a sample whose masks do not overlap."""
    label = np.zeros(sample.size, np.uint8)
    for name, mask in zip(sample.targets, sample.truth):
        label[mask] = classes.index(name) + 1
    return label


class Predictor:
    """A model with how it is asked: predictor(sample) -> (class names, mask logits [n,S,S])."""

    def __init__(self, model, texts, prompt, points=1, seed=0, cache=None, precision="float32"):
        self.model, self.texts, self.prompt, self.points, self.seed = model.eval(), texts, prompt, points, seed
        self.cache, self.precision = cache or FeatureCache(None, ""), precision

    def prepare(self, sample):
        """Without a prompt the instances of a class are one target."""
        return merge_instances(sample) if self.prompt == "none" else sample

    @torch.no_grad()
    def __call__(self, sample):
        image = torch.from_numpy(sample.image).permute(2, 0, 1)[None].contiguous()
        with autocast(self.model.device, self.precision):
            features = self.cache(image, self.model.encode_image)
            return ask(self.model, features, sample, self.texts, self.prompt, self.points, self.seed)


def answers(names, logits, sample):
    """-> [(class, prediction, truth)], bool [H,W] each, of every target of a sample and every absent class asked for.

    A target that was not asked for, because nothing of it is left on the model's grid, counts as not found.
    """
    nothing, pairs = np.zeros(sample.size, bool), []
    found = list(zip(names, (to_original(logits, sample.size) > 0).cpu().numpy()))
    for name, truth in zip(sample.targets, sample.truth):
        at = next((i for i, (asked, _) in enumerate(found) if asked == name), None)
        pairs.append((name, nothing if at is None else found.pop(at)[1], truth))
    return pairs + [(name, mask, nothing) for name, mask in found]


def label_maps(predictor, sample, dataset):
    """uint8 [H,W] each: the predicted label map of a volume's slice and the true one."""
    return (label_map(*predictor(sample), sample.size, dataset.classes), true_label_map(sample, dataset.classes))


def by_class(prediction, truth, classes):
    """Two label maps -> answers(), of every class."""
    return [(name, prediction == i, truth == i) for i, name in enumerate(classes, 1)]


def predict(predictor, sample, dataset):
    """answers() of a sample. In a slice of a volume each pixel belongs to the most certain answer alone."""
    if dataset.volumes:
        return by_class(*label_maps(predictor, sample, dataset), dataset.classes)
    return answers(*predictor(sample), sample)


def original_image(sample):
    """uint8 [H,W,3]: a sample's image on its original grid."""
    image = to_original(torch.from_numpy(sample.image).permute(2, 0, 1), sample.size)
    return image.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# One's own image, with one's own prompts

class Answer(NamedTuple):
    """What the model says of the T targets of an image of H x W pixels, with G x G features."""
    probability: np.ndarray  # float32 [T,H,W]
    iou: np.ndarray  # float32 [T]: how good the model thinks its masks are
    priors: object  # medsegr.Priors of the targets
    steps: dict  # F_fused, F_sem [T,C,G,G] and gate [T,branches,G,G], see MedSegR.decode
    features: torch.Tensor  # F_SAM [1,C,G,G]


@torch.no_grad()
def predict_image(model, image, texts, boxes=None, points=None, precision="float32", features=None, empty=False):
    """Masks of several structures in one image, which is encoded once.

    image uint8 [H,W,3], RGB; texts: T dicts of position, texture and shape; boxes float [T,4], x0 y0 x1 y1, and points
    (float [T,N,2] (x, y), int [T,N]: 1 inside, 0 outside, -1 none), in pixels of the image -> Answer. `features`: of an
    earlier Answer. empty: allows empty texts.
    """
    size, S = image.shape[:2], model.config.image_size
    scale = np.array([S / size[1], S / size[0]], np.float32)
    to_grid = lambda xy: torch.from_numpy((np.asarray(xy, np.float32) + 0.5) * scale - 0.5).to(model.device)
    if boxes is not None:
        boxes = to_grid(np.reshape(boxes, (-1, 2, 2))).flatten(1)
    if points is not None:
        points = to_grid(points[0]), torch.as_tensor(np.asarray(points[1])).to(model.device)
    with autocast(model.device, precision):
        if features is None:
            nothing = np.zeros((0, *size), bool)
            square = make_sample(Picture(image, nothing, (), (), ""), S, "", "").image
            features = model.encode_image(torch.from_numpy(square).permute(2, 0, 1)[None])
        index = torch.zeros(len(texts), dtype=torch.int64, device=model.device)
        priors = model.encode_attributes(texts, empty=empty)
        logits, iou, steps = model.decode(features, index, priors, points, boxes, explain=True)
    logits = F.interpolate(logits.float()[:, None], (S, S), mode="bilinear", align_corners=False)[:, 0]
    probability = to_original(logits, size).sigmoid().cpu().numpy()
    return Answer(probability, iou.float().cpu().numpy(), priors, steps, features)


def merge(probability):
    """float [T,H,W] -> uint8 [H,W]: the number, from 1, of the most probable target above one half; 0 for none."""
    return np.where(probability.max(0) > 0.5, probability.argmax(0) + 1, 0).astype(np.uint8)

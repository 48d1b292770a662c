"""The one way to ask a model: features of an image, texts and prompts -> masks and label maps on the original grid.

    predictor = Predictor(model, texts, prompt="box")
    for name, found, truth in predict(predictor, sample, dataset): ...          training's validation, evaluation
    answer = predict_image(model, image, [texts("liver", "ct")])                one's own image, the page

Both decode with decode_targets, and merge_label_map makes one label map of several targets.
"""
import time
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from tqdm import tqdm

from data import box_prompt, make_sample, merge_instances, point_prompt, prompt_rng, to_original
from encoders import FeatureCache
from medsegr import Priors
from readers.pictures import RawSample


UNSURE = 0.4  # where there is no prompt, predict.py and the page drop masks of which the model expects a lower IoU


class Answer(NamedTuple):
    """What the model says of T targets of one image of H x W pixels, or of S x S, its own grid."""
    grid: torch.Tensor  # float32 [T,S,S]: logits on the model's grid
    size: tuple  # (H, W)
    iou: torch.Tensor  # float32 [T]: how good the model thinks its masks are
    priors: Priors  # of the targets
    steps: dict  # of the targets, see `explain` of MedSegR.decode
    features: torch.Tensor  # F_SAM [1,C,G,G]
    min_iou: float = 0.0  # a target of which the model expects less has an empty mask

    @property
    def logits(self):
        """float32 [T,H,W]: a mask is where they exceed 0. Of a photograph these are 200 MB a target."""
        return to_original(self.grid, self.size)

    def sure(self):
        """The same answer, whose logits are those of its masks: far below 0 where the target is dropped."""
        if not self.min_iou:
            return self
        return self._replace(grid=self.grid.masked_fill((self.iou < self.min_iou)[:, None, None], -100.0))

    @property
    def masks(self):
        """bool [T,H,W], one target after the other, so that memory is that of one target's logits."""
        masks = np.empty((len(self.grid), *self.size), bool)
        for mask, logits in zip(masks, self.sure().grid):
            mask[...] = (to_original(logits[None], self.size)[0] > 0).cpu().numpy()
        return masks

    @property
    def probability(self):
        """float32 [T,H,W]."""
        return self.logits.sigmoid().cpu().numpy()


def autocast(device, precision):
    """bfloat16 or float16 autocast on the device; float32: none."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


@torch.no_grad()
def choose_precision(model, precision="auto"):
    """"auto" -> "float32" or "bfloat16", whichever encodes an image faster here; says which. Processors with AMX take
    half the time in bfloat16, many others more. On a GPU bfloat16, without a trial; any other precision as it is."""
    if precision != "auto" or model.device.type != "cpu":
        return "bfloat16" if precision == "auto" else precision
    image, seconds = torch.zeros(1, 3, model.config.image_size, model.config.image_size), {}
    for kind in ("bfloat16", "float32"):  # the first is at a disadvantage: where both are alike, float32 is exact
        started = time.perf_counter()
        with autocast(model.device, kind):
            model.encode_image(image)
        seconds[kind] = time.perf_counter() - started
    fastest = min(seconds, key=seconds.get)
    print(f"precision {fastest}: an image takes {seconds['float32']:.2g} s in float32 here and "
          f"{seconds['bfloat16']:.2g} s in bfloat16")
    return fastest


def wordings(texts, n, *target):
    """Up to n different texts of a target, as `texts` takes it (class, modality, sample): the first wordings."""
    if n == 1:
        return [texts(*target)]
    found = [texts(*target, number=i) for i in range(n)]
    return [text for i, text in enumerate(found) if text not in found[:i]]


def as_lists(texts):
    """The wordings of each target: of one, a dict will do."""
    return [[words] if isinstance(words, dict) else words for words in texts]


def encode_texts(model, texts, empty=False):
    """The texts of T targets, see decode_targets -> Priors of all their wordings."""
    return model.encode_attributes([text for words in as_lists(texts) for text in words], empty=empty)


@torch.no_grad()
def decode_targets(model, features, texts, points=None, boxes=None, empty=False, priors=None):
    """Features [B,C,G,G] of B images, and T targets to find in each -> Answer on the model's grid, of B * T targets:
    first all of the first image.

    texts: of each target a dict of position, texture and shape, or a list of them: the logits are the mean over such
    wordings, priors and steps those of the first. points and boxes, of a single image, as MedSegR.decode takes them.
    empty: allows empty texts. priors: encode_texts of the same texts, by an earlier call.
    """
    texts, S, B, T = as_lists(texts), model.config.image_size, len(features), len(texts)
    wording = torch.tensor([t for t, words in enumerate(texts) for _ in words], dtype=torch.int64, device=model.device)
    of_each = lambda x: x.to(model.device)[wording]  # a target's prompts, for each of its wordings
    points, boxes = points and tuple(map(of_each, points)), None if boxes is None else of_each(boxes)
    priors = encode_texts(model, texts, empty) if priors is None else priors
    priors = priors.take(torch.arange(len(wording), device=model.device).repeat(B))
    image = torch.arange(B, device=model.device).repeat_interleave(len(wording))
    features = features.to(model.device)
    logits, iou, steps = model.decode(features, image, priors, points, boxes, explain=True)
    logits = F.interpolate(logits.float()[:, None], (S, S), mode="bilinear", align_corners=False)[:, 0]
    iou = iou.float()
    if len(wording) > T:
        target = wording.repeat(B) + T * image
        logits, iou = (torch.stack([x[target == t].mean(0) for t in range(B * T)]) for x in (logits, iou))
        first = torch.searchsorted(target, torch.arange(B * T, device=model.device))
        priors, steps = priors.take(first), {name: x if x is None else x[first] for name, x in steps.items()}
    return Answer(logits, (S, S), iou, priors, steps, features)


def merge_label_map(logits, labels):
    """Logits [T,H,W] of T targets and their labels -> uint8 [H,W]: that of the most certain target, 0 for none."""
    if not len(labels):
        return np.zeros(logits.shape[1:], np.uint8)
    best, which = logits.max(0)
    label = torch.tensor(labels, device=logits.device)[which]
    return torch.where(best > 0, label, 0).to(torch.uint8).cpu().numpy()


def largest_components(label):
    """Label map uint8 [D,H,W] -> the same with the largest part of each class alone; voxels of a part share faces."""
    kept = np.zeros_like(label)
    for i, box in enumerate(ndimage.find_objects(label), 1):
        if box:
            parts, _ = ndimage.label(label[box] == i)
            kept[box][parts == np.bincount(parts.ravel())[1:].argmax() + 1] = i
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# The structures of a sample, with prompts cut from its truth

def choose_targets(sample, prompt, n, seed):
    """-> names of the classes to ask for, points (float32 [T,n,2], int64 [T,n]) or None, boxes float32 [T,4] or None.

    prompt "none" asks for the classes that the sample has or is known to lack, "point" and "box" for each target with a
    mask, in order. Prompts depend on the sample's key, the target's name and number, and the seed alone.
    """
    asked = [t for t in range(len(sample.targets)) if prompt == "none" or sample.masks[t].any()]
    names, masks = [sample.targets[t] for t in asked], [sample.masks[t] for t in asked]
    if prompt == "none":
        return [*names, *sample.absent], None, None
    if not names:
        return [], None, None
    if prompt == "box":
        return names, None, torch.from_numpy(np.stack([box_prompt(mask) for mask in masks]))
    before = [sample.targets[:t].count(sample.targets[t]) for t in asked]  # instances of the same name
    rngs = [prompt_rng(sample.key, name + (f" {k}" if k else ""), seed) for name, k in zip(names, before)]
    pairs = [point_prompt(mask, n, rng) for mask, rng in zip(masks, rngs)]
    return names, tuple(torch.from_numpy(np.stack(x)) for x in zip(*pairs)), None


class Predictor:
    """A model with how it is asked: predictor(sample) -> (class names, mask logits [T,S,S]). wordings: the mean over up
    to so many of each class."""

    def __init__(self, model, texts, prompt, points=1, seed=0, cache=None, precision="float32", wordings=1,
                 min_iou=0.0):
        self.model, self.texts, self.prompt, self.points, self.seed = model.eval(), texts, prompt, points, seed
        self.cache, self.precision, self.wordings = cache or FeatureCache(None, ""), precision, wordings
        self.min_iou = min_iou  # see Answer

    def prepare(self, sample):
        """Without a prompt the instances of a class are one target."""
        return merge_instances(sample) if self.prompt == "none" else sample

    @torch.no_grad()
    def __call__(self, sample):
        image = torch.from_numpy(sample.image).permute(2, 0, 1)[None].contiguous()
        names, points, boxes = choose_targets(sample, self.prompt, self.points, self.seed)
        if not names:
            return [], torch.zeros(0, *sample.image.shape[:2])
        texts = [wordings(self.texts, self.wordings, name, sample.modality, sample) for name in names]
        empty = getattr(self.texts, "how", None) == "empty"
        with autocast(self.model.device, self.precision):
            features = self.cache(image, self.model.encode_image)
            answer = decode_targets(self.model, features, texts, points, boxes, empty)
            return names, answer._replace(min_iou=self.min_iou).sure().logits


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


def label_maps(predictor, sample, classes):
    """The predicted and the true label map of a volume's slice, uint8 [H,W] each; i + 1 stands for classes[i]."""
    names, logits = predictor(sample)
    prediction = merge_label_map(to_original(logits, sample.size), [classes.index(name) + 1 for name in names])
    truth = np.zeros(sample.size, np.uint8)
    for name, mask in zip(sample.targets, sample.truth):
        truth[mask] = classes.index(name) + 1
    return prediction, truth


def by_class(prediction, truth, classes):
    """Two label maps -> answers(), of every class."""
    return [(name, prediction == i, truth == i) for i, name in enumerate(classes, 1)]


def predict(predictor, sample, dataset):
    """answers() of a sample. In a slice of a volume each pixel belongs to the most certain answer alone."""
    if dataset.volumes:
        return by_class(*label_maps(predictor, sample, dataset.classes), dataset.classes)
    return answers(*predictor(sample), sample)


def original_image(sample):
    """uint8 [H,W,3]: a sample's image on its original grid."""
    image = to_original(torch.from_numpy(sample.image).permute(2, 0, 1), sample.size)
    return image.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# One's own image or volume, with one's own prompts

def encode_images(model, images):
    """Images of one size, uint8 [H,W,3] each -> features [B,C,G,G]."""
    nothing, S = np.zeros((0, *images[0].shape[:2]), bool), model.config.image_size
    squares = [make_sample(RawSample(image, nothing, (), (), ""), S, "", "").image for image in images]
    return model.encode_image(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2))


@torch.no_grad()
def predict_image(model, image, texts, boxes=None, points=None, precision="float32", features=None, empty=False,
                  min_iou=0.0, priors=None):
    """Masks of several structures in one image, which is encoded once -> Answer on the image's grid.

    image uint8 [H,W,3], RGB; texts as decode_targets takes them; boxes float [T,4], x0 y0 x1 y1, and points (float
    [T,N,2] (x, y), int [T,N]: 1 inside, 0 outside, -1 none), in pixels of the image. `features`: of an earlier Answer.
    empty: allows empty texts. min_iou: see Answer. priors: in place of those of the texts.
    """
    size, S = image.shape[:2], model.config.image_size
    scale = np.array([S / size[1], S / size[0]], np.float32)
    to_grid = lambda xy: torch.from_numpy((np.asarray(xy, np.float32) + 0.5) * scale - 0.5)
    if boxes is not None:
        boxes = to_grid(np.reshape(boxes, (-1, 2, 2))).flatten(1)
    if points is not None:
        points = to_grid(points[0]), torch.as_tensor(np.asarray(points[1]))
    with autocast(model.device, precision):
        features = encode_images(model, [image]) if features is None else features
        return decode_targets(model, features, texts, points, boxes, empty, priors)._replace(
            size=size, min_iou=min_iou)


def gray_image(volume, z):
    """One slice of a volume uint8 [D,H,W] as an image, uint8 [H,W,3]."""
    return np.repeat(volume[z][..., None], 3, 2)


@torch.no_grad()
def predict_volume(model, volume, texts, precision="float32", progress=True, batch=None, min_iou=0.0):
    """Slices uint8 [D,H,W] -> label uint8 [D,H,W] of the targets 1, 2, ..., and the IoU that the model expects of each,
    float [T]: the mean over all slices, weighted by what was found there; NaN where nothing was.

    `batch` slices at a time: by default one on a CPU, where more are no faster; on a GPU up to a million pixels and 64
    wordings. Nothing is found in slices that are black all over: air, or the margin of a volume that was turned or
    padded. progress: a bar, where stderr is a terminal. min_iou: of a slice, see Answer.
    """
    label, T, S = np.zeros(volume.shape, np.uint8), len(texts), model.config.image_size
    voxels, weighted = np.zeros(T), np.zeros(T)
    most = 1 if model.device.type == "cpu" else min(2 ** 20 // S ** 2, 64 // sum(map(len, as_lists(texts))))
    batch, filled = batch or max(1, most), np.flatnonzero(volume.any((1, 2)))
    with autocast(model.device, precision):
        priors = encode_texts(model, texts)
    hidden = None if progress else True  # None: where stderr is no terminal
    with tqdm(total=len(filled), desc="predicting", unit="slice", leave=None, disable=hidden) as bar:
        for start in range(0, len(filled), batch):
            rows = filled[start:start + batch]
            images = [gray_image(volume, z) for z in rows]
            with autocast(model.device, precision):
                answer = decode_targets(model, encode_images(model, images), texts, priors=priors)
            answer = answer._replace(min_iou=min_iou).sure()
            for z, grid, iou in zip(rows, answer.grid.split(T), answer.iou.split(T)):
                label[z] = merge_label_map(to_original(grid, volume.shape[1:]), range(1, T + 1))
                found = np.bincount(label[z].ravel(), minlength=T + 1)[1:]
                voxels, weighted = voxels + found, weighted + found * iou.cpu().numpy()
            bar.update(len(rows))
    with np.errstate(invalid="ignore"):
        return label, weighted / voxels


# ---------------------------------------------------------------------------------------------------------------------
# What the texts did

class Explanation(NamedTuple):
    """What the three texts of one target did to an image; None, or left out: switched off. H x W are its pixels, or,
    since this is for drawing, of a large image every step-th."""
    step: int
    image: np.ndarray  # uint8 [H,W,3]
    texts: dict  # {attribute: text}
    box: np.ndarray | None  # [4]: x0 y0 x1 y1
    points: list  # pairs of (x, y) and label
    probability: np.ndarray  # [H,W]
    iou: float  # that the model expects
    A_pos: np.ndarray | None  # [H,W] in (0, 2): the features are multiplied by it
    texture: np.ndarray | None  # [7,7]: the filter
    shape_kernel: np.ndarray | None  # [3,3]
    shape_offset: np.ndarray | None  # [18,n,n] in feature cells, dy and dx of each tap
    cells: int  # G: the features are G x G cells
    gate: dict  # {branch: its weight, the mean over the mask, or over the image if that is empty}
    without: dict  # {attribute: bool [H,W]}: the mask where that text is empty
    idle: dict  # {attribute: bool [H,W]}: the mask where the text is read, and its operator left out


OPERATORS = dict(position=("A_pos",), texture=("texture",), shape=("shape_kernel", "shape_offset"))  # in Priors


@torch.no_grad()
def explain(model, image, answer, target, texts, boxes=None, points=None, precision="float32", most=1024):
    """-> Explanation of one target, by its number, of predict_image's Answer to these texts and prompts, on the image's
    grid, or, where that has more than `most` pixels a side, on every n-th of them."""
    step = -(-max(image.shape[:2]) // most)
    image = image[tuple(slice(min(step // 2, side - 1), None, step) for side in image.shape[:2])]
    boxes, points = thinned(boxes, step), points and (thinned(points[0], step), points[1])
    on_image = lambda grid: to_original(grid[None].float(), image.shape[:2])[0].cpu().numpy()
    array = lambda x: None if x is None else x[0].float().cpu().numpy()
    texts, one = as_lists(texts), slice(target, target + 1)
    priors = answer.priors.take(one)
    probability = to_original(answer.grid[target][None], image.shape[:2])[0].sigmoid().cpu().numpy()
    inside = probability > 0.5 if (probability > 0.5).any() else np.ones_like(probability, bool)
    gate = {} if answer.steps["gate"] is None else {
        branch: float(on_image(weight)[inside].mean())
        for branch, weight in zip(model.config.active_branches, answer.steps["gate"][target])}
    ask = partial(predict_image, model, image, precision=precision, features=answer.features)
    without, idle = {}, {}
    for kind, parts in OPERATORS.items():
        emptied = [*texts[:target], [text | {kind: ""} for text in texts[target]], *texts[target + 1:]]
        without[kind] = ask(emptied, boxes, points, empty=True).masks[target]
        if getattr(priors, parts[0]) is not None:
            idle[kind] = ask([texts[target][:1]], None if boxes is None else boxes[one],
                             points and tuple(part[one] for part in points),
                             priors=priors._replace(**dict.fromkeys(parts))).masks[0]
    return Explanation(
        step=step, image=image, texts=texts[target][0], box=None if boxes is None else boxes[target],
        points=[] if points is None else list(zip(points[0][target], points[1][target])),
        probability=probability, iou=float(answer.iou[target]),
        A_pos=None if priors.A_pos is None else on_image(priors.A_pos[0]), texture=array(priors.texture),
        shape_kernel=array(priors.shape_kernel), shape_offset=array(priors.shape_offset),
        cells=answer.features.shape[-1], gate=gate, without=without, idle=idle)


def thinned(xy, step):
    """Pixel coordinates of an image -> those on every step-th of its pixels."""
    return xy if xy is None or step == 1 else (np.asarray(xy) - step // 2) / step

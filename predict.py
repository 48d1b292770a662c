"""Masks for your own image (PNG, JPEG), volume (NIfTI) or DICOM series, from texts, and with boxes or points.

    python predict.py scan.nii.gz --target liver --target spleen --out result
    python predict.py slice.png --position "upper left of the image" --texture "homogeneous" --shape "large wedge"
    python predict.py slice.png --target liver --box 20 60 130 190 --explain

An image gives OUT/NAME-TARGET.png masks and an overlay; a volume OUT/NAME-label.nii.gz, aligned with its input (same
shape, same affine; 1, 2, ... are the targets in order, see labels.json), and an overlay of three slices. --explain adds a
picture per target of what its texts did. As a function: inference.predict_image().
"""
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import plots
from common import (ATTRIBUTES, InputError, Parser, add_runtime_flags, check_runtime_flags, make_folder, run, whole,
                    write_atomically)
from data import VARIATION
from inference import merge, predict_image
from readers.pictures import read_image
from readers.volumes import read_dicom, read_nifti, write_nifti
from runs import load_checkpoint, newest_checkpoint
from texts import Texts

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

# ---------------------------------------------------------------------------------------------------------------------
# Volumes

def predict_volume(model, volume, texts, precision="float32", progress=True):
    """uint8 [D,H,W] -> label uint8 [D,H,W] of the targets 1, 2, ...: slice by slice, so that memory is that of one."""
    label = np.zeros(volume.shape, np.uint8)
    for z in tqdm(range(len(volume)), "predicting", unit="slice", disable=not progress, mininterval=1):
        image = np.repeat(volume[z][..., None], 3, 2)
        label[z] = merge(predict_image(model, image, texts, precision=precision).probability)
    return label


# ---------------------------------------------------------------------------------------------------------------------

def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("image", help="a PNG or JPEG, a NIfTI volume (.nii, .nii.gz), or the folder of a DICOM series")
    add("--checkpoint", help="a .safetensors file or its folder (default: newest in out)")
    add("--target", action="append", help="a class whose texts attributes.json has; may be given several times")
    for kind in ATTRIBUTES:
        add(f"--{kind}", help=f"in place of --target: the structure's {kind} in your own words")
    add("--dataset", help="whose texts --target takes (default: the checkpoint's)")
    add("--attributes-file", help="a JSON file of texts in place of attributes.json")
    add("--texts", help="a JSON lines file of texts for this image, as report.py writes it; NAME is the file's")
    add("--modality", default="ct", help=", ".join(VARIATION))
    add("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="values that become black and white")
    add("--box", type=float, nargs=4, action="append", metavar=("X0", "Y0", "X1", "Y1"), help="one per target, in pixels")
    add("--point", type=float, nargs="+", action="append", metavar="X Y [1|0]",
        help="in pixels, 1 inside (default) or 0 outside; with a single target")
    add("--slice", type=int, help="only this axial slice of a volume, from 0 at the feet; boxes and points need it")
    add("--explain", action="store_true", help="a picture per target of what its texts did")
    add("--out", default="out/predict")
    add("--sam-checkpoint"), add("--clip")
    add_runtime_flags(parser)
    args = parser.parse_args()
    check_runtime_flags(args)
    if args.modality not in VARIATION:
        raise InputError(f"--modality {args.modality}: choose from {', '.join(VARIATION)}")
    free = [kind for kind in ATTRIBUTES if getattr(args, kind)]
    if bool(args.target) == bool(free):
        raise InputError("say what to find: either --target NAME, or --position, --texture and --shape")
    if free and len(free) < 3:
        raise InputError(f"--{next(k for k in ATTRIBUTES if k not in free)}: missing; give all three texts, or --target")
    if args.box and len(args.box) != len(args.target or [0]):
        raise InputError(f"--box: {len(args.box)} boxes for {len(args.target or [0])} targets; give one for each")
    if args.point and len(args.target or [0]) > 1:
        raise InputError("--point: which of the targets does it mean? ask for one target at a time")
    if any(len(p) not in (2, 3) or p[2:] not in ([], [0], [1]) for p in args.point or ()):
        raise InputError("--point: give X Y, or X Y 1 (inside), or X Y 0 (outside)")
    return args


def check_prompts(args, size):
    """The boxes and points lie on an image of `size` (H, W); -> as predict_image takes them."""
    h, w = size
    for x0, y0, x1, y1 in args.box or ():
        if not (0 <= x0 <= x1 < w and 0 <= y0 <= y1 < h):
            raise InputError(f"--box {x0:g} {y0:g} {x1:g} {y1:g}: give x0 <= x1 below {w} and y0 <= y1 below {h}, the "
                             "image's pixels")
    for x, y, *_ in args.point or ():
        if not (0 <= x < w and 0 <= y < h):
            raise InputError(f"--point {x:g} {y:g}: outside of the image of {w} x {h} pixels")
    points = None
    if args.point:
        points = np.array([[p[:2] for p in args.point]], np.float32), np.array([[(p + [1])[2] for p in args.point]], int)
    return args.box and np.array(args.box, np.float32), points


def main():
    args = parse()
    path = Path(args.image)
    if not path.exists():
        raise InputError(f"{path}: no such file; give an image, a volume or the folder of a DICOM series")
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0] if path.is_file() else path.name
    given = {k: getattr(args, k) for k in ("sam_checkpoint", "clip") if getattr(args, k)}
    model, record = load_checkpoint(args.checkpoint or newest_checkpoint(), **given)
    texts = Texts(args.dataset or record.get("dataset") or "synapse", args.attributes_file, args.texts)
    names, this = args.target or ["target"], SimpleNamespace(key=name, case=name)
    triples = ([texts(target, args.modality, this) for target in names] if args.target
               else [{kind: getattr(args, kind) for kind in ATTRIBUTES}])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    grid = volume = None
    if path.is_dir():
        volume, grid = read_dicom(path, args.window, args.modality)
    elif path.name.endswith((".nii", ".nii.gz")):
        volume, grid = read_nifti(path, args.window, args.modality)
    elif path.suffix.lower() in IMAGES:
        image = read_image(path, "RGB")
    else:
        raise InputError(f"{path}: not a PNG, JPEG, NIfTI file (.nii, .nii.gz) or DICOM folder; convert it")
    if (args.box or args.point) and volume is not None and args.slice is None:
        raise InputError("--box and --point lie on one slice of a volume; say which with --slice")
    if args.slice is not None and (volume is None or not 0 <= args.slice < len(volume)):
        raise InputError(f"--slice {args.slice}: " + ("the image is no volume; leave it out" if volume is None else
                                                      f"the volume has slices 0 to {len(volume) - 1}"))
    out = Path(args.out)
    make_folder(out)
    print(model.describe())
    started = time.time()
    if volume is None or args.slice is not None:
        if volume is not None:
            image, name = np.repeat(volume[args.slice][..., None], 3, 2), f"{name}-slice{args.slice:03d}"
        boxes, points = check_prompts(args, image.shape[:2])
        answer = predict_image(model, image, triples, boxes, points, args.precision)
        for target, probability, iou in zip(names, answer.probability, answer.iou):
            mask = probability > 0.5
            save_mask(out / f"{name}-{target.replace(' ', '_')}.png", mask)
            print(f"{target}: {mask.sum()} pixels ({mask.mean():.1%} of the image), expected IoU {iou:.2f}")
        masks = [(target, p > 0.5) for target, p in zip(names, answer.probability)]
        plots.contact_sheet([(name, image, []), ("prediction", image, masks)], out / f"{name}-overlay.png", name, 2)
        shown = image, answer, boxes, points
    else:
        label = predict_volume(model, volume, triples, args.precision)
        write_nifti(out / f"{name}-label.nii.gz", label, grid)
        write_atomically(out / f"{name}-labels.json", json.dumps(dict(enumerate(names, 1)), indent=1).encode())
        sizes = {target: int((label == i).sum()) for i, target in enumerate(names, 1)}
        print(", ".join(f"{target}: {n} voxels" for target, n in sizes.items())
              + f"; {len(volume)} slices in {time.time() - started:.0f} s; wrote {out / name}-label.nii.gz")
        filled = np.flatnonzero((label > 0).any((1, 2)))
        # in the middle of what was found, and half way to both ends
        rows = np.unique(filled[len(filled) * np.array([1, 2, 3]) // 4]) if len(filled) else [len(volume) // 2]
        pictures = [(f"slice {z}", np.repeat(volume[z][..., None], 3, 2),
                     [(t, label[z] == i) for i, t in enumerate(names, 1) if (label[z] == i).any()]) for z in rows]
        plots.contact_sheet(pictures, out / f"{name}-overlay.png", name, 3)
        z = int(np.argmax((label > 0).sum((1, 2))))
        image, name = np.repeat(volume[z][..., None], 3, 2), f"{name}-slice{z:03d}"
        shown = image, predict_image(model, image, triples, precision=args.precision), None, None
    if args.explain:
        from explain import explain
        for i, target in enumerate(names):
            file = out / f"{name}-{target.replace(' ', '_')}-explained.png"
            explain(model, *shown, i, target, triples, file, args.precision)
            print(f"wrote {file}")


def save_mask(path, mask):
    """bool [H,W] -> a PNG of 0 and 255."""
    with whole(path) as file:
        Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG")


if __name__ == "__main__":
    run(main)

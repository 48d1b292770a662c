"""Masks for your own images (PNG, JPEG), volumes (NIfTI) or DICOM series, from texts, and with boxes or points.

    python predict.py scan.nii.gz --target liver --target spleen --out result
    python predict.py series/ --target liver --series 3 --out result
    python predict.py slice.png --position "upper left of the image" --texture "homogeneous" --shape "large wedge"
    python predict.py slice.png --target liver --box 20 60 130 190 --explain

An image gives OUT/NAME-TARGET.png masks and an overlay; a volume OUT/NAME-label.nii.gz, aligned with its input (same
shape, same affine; 1, 2, ... are the targets in order, see labels.json), and an overlay of three slices. --explain adds
a picture per target of what its texts did. OUT/NAME-input.json says whose results these are: those of another input are
never replaced. As a function: inference.predict_image().
"""
import json
import os
import re
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from common import (ATTRIBUTES, InputError, Parser, add_precision_flag, alone_in, make_folder, number, read_json, run,
                    visible, whole, write_atomically, writing)
from data import VARIATION
from readers.dicom import is_dicom, read_dicom
from readers.pictures import SUFFIXES, read_image
from readers.volumes import is_nifti, read_nifti, write_nifti
from texts import Texts


def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT",
        help="a PNG or JPEG, a NIfTI volume (.nii, .nii.gz), a DICOM file or the folder of a series")
    add("--checkpoint", help="a .safetensors file or its folder (default: newest in out, else, for CT, weights/'s)")
    add("--target", action="append", help="a class whose texts attributes.json has; may be given several times")
    for kind in ATTRIBUTES:
        add(f"--{kind}", help=f"in place of --target: the structure's {kind} in your own words")
    add("--dataset", help="whose texts --target takes (default: the checkpoint's)")
    add("--attributes-file", help="a JSON file of texts in place of attributes.json")
    add("--texts", help="a JSON lines file of texts for this image, as report.py writes it; NAME is the file's")
    add("--mean-wordings", type=number(1, 100, int), default=1, metavar="N",
        help="the mean over up to N wordings of a target's texts")
    add("--modality", default="ct", choices=VARIATION)
    add("--window", type=number(), nargs=2, metavar=("LOW", "HIGH"), help="values that become black and white")
    add("--series", help="which one of a DICOM folder, by its number or UID")
    add("--box", type=float, nargs=4, action="append", metavar=("X0", "Y0", "X1", "Y1"),
        help="one per target, in pixels")
    add("--point", type=float, nargs="+", action="append", metavar="X Y [1|0]",
        help="in pixels, 1 inside (default) or 0 outside; with a single target")
    add("--slice", type=int, help="only this axial slice of a volume, from 0 at the feet, or this frame of a film; "
        "boxes and points need it")
    add("--page", type=number(0, kind=int), help="which page of a TIFF, or frame of an animation, from 0")
    add("--largest-component", action="store_true", help="of a volume, keep the largest part of each target alone")
    add("--explain", action="store_true", help="a picture per target of what its texts did")
    add("--out", type=Path, default="out/predict")
    add("--onnx", metavar="FILE", help="what export.py has made, in place of a checkpoint: by onnxruntime")
    add("--sam-checkpoint"), add("--clip")
    add_precision_flag(parser, auto=True)
    args = parser.parse_args()
    free = [kind for kind in ATTRIBUTES if getattr(args, kind)]
    if bool(args.target) == bool(free):
        raise InputError("say what to find: either --target NAME, or --position, --texture and --shape")
    if free and len(free) < 3:
        missing = next(kind for kind in ATTRIBUTES if kind not in free)
        raise InputError(f"--{missing}: missing; give all three texts, or --target")
    if free and args.mean_wordings > 1:
        raise InputError("--mean-wordings: is for the texts of a --target; leave it out")
    for flag in ("texts", "dataset", "attributes_file") if free else ():
        if getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')}: is for the texts of a --target; leave it out")
    if args.window and args.window[0] >= args.window[1]:
        raise InputError(f"--window {args.window[0]:g} {args.window[1]:g}: black comes first; give LOW below HIGH")
    args.names = args.target or ["target"]
    files = ["overlay", *map(file_part, args.names), *(f"{file_part(t)}-explained" for t in args.names if args.explain)]
    for target in args.names:
        if files.count(file_part(target)) > 1:
            raise InputError(f"--target {target}: its results would be called {file_part(target)}, as others are; give "
                             "each target once, and rename it where two differ in signs alone")
    if args.onnx and (args.explain or args.checkpoint or args.sam_checkpoint or args.clip or args.precision != "auto"):
        raise InputError("--onnx: the file is the whole model, and its steps cannot be explained; leave out --explain, "
                         "--checkpoint, --sam-checkpoint, --clip and --precision")
    if args.box and len(args.box) != len(args.names):
        raise InputError(f"--box: {len(args.box)} boxes for {len(args.names)} targets; give one for each")
    if args.point and len(args.names) > 1:
        raise InputError("--point: which of the targets does it mean? ask for one target at a time")
    if any(len(p) not in (2, 3) or p[2:] not in ([], [0], [1]) for p in args.point or ()):
        raise InputError("--point: give X Y, or X Y 1 (inside), or X Y 0 (outside)")
    if (args.box or args.point) and len(args.inputs) > 1:
        raise InputError("--box and --point lie on one image; give a single INPUT with them")
    names = [name_of(path) for path in args.inputs]
    for path, name in zip(args.inputs, names):
        if not path.exists():
            raise InputError(f"{path}: no such file; give an image, a volume or the folder of a DICOM series")
        if names.count(name) > 1:
            raise InputError(f"{path}: results are named after their input, and another one is called {name}; give "
                             "them one at a time, each with an --out of its own")
        check_results(args, path)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The names of results

def name_of(path):
    """What an input's results are called: as its file without the suffix, or as its folder, also where that is `.`"""
    name = os.path.basename(os.path.abspath(path)) or "input"
    ends = next((end for end in (".nii.gz", ".nii", ".dcm", ".ppm", *SUFFIXES) if name.lower().endswith(end)), "")
    return name[:-len(ends)] or name if ends and not path.is_dir() else name


def file_part(target):
    """A target's name as a part of a file's name."""
    return re.sub(r'[\s/\\:*?"<>|\x00-\x1f]', "_", target)


def files_of(args, name):
    """The files in --out that have the names of an input's results."""
    targets = "|".join(re.escape(part) for part in ("overlay", *map(file_part, args.names)))
    kinds = rf"label\.nii\.gz|labels\.json|((slice|page)\d+-)?({targets})(-explained)?\.png"
    return [path for path in visible(args.out) if re.fullmatch(f"{re.escape(name)}-({kinds})", path.name)]


def source_of(args, path):
    """What results are of: a file or folder, of which there may be several series."""
    return os.path.abspath(path) + (f", series {args.series}" if args.series else "")


def check_results(args, path):
    """InputError if results of this input would replace those of another, or files of which nobody knows whose they are
    -> OUT/NAME-input.json and what is in it, {} where it is not there."""
    name, whose = name_of(path), source_of(args, path)
    record = args.out / f"{name}-input.json"
    known = read_json(record, "give another --out") if record.is_file() else {}
    if known and known.get("input") != whose:
        raise InputError(f"{path}: would replace the results of another input of this name, {known.get('input')}, in "
                         f"{args.out}; give another --out")
    for file in files_of(args, name) if not known else ():
        raise InputError(f"{file}: is there already, and nothing says that it is a result of {path}; move it away, or "
                         "give another --out")
    return record, known


@contextmanager
def claimed(args, path):
    """Writes OUT/NAME-input.json before the results of an input are made; it goes again if none could be made."""
    status = path.stat()
    now = dict(input=source_of(args, path), bytes=status.st_size, modified=status.st_mtime)
    with alone_in(args.out):  # another process may have begun since parse()
        record, before = check_results(args, path)
        with writing(record):
            record.write_text(json.dumps(now))
    if before and before != now:
        print(f"{path}: has changed since its last results in {args.out}, which are replaced")
    try:
        yield
    except BaseException:
        if not before and not files_of(args, name_of(path)):
            record.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# From input to results

def read_input(path, args):
    """-> (an image uint8 [H,W,3] or a volume uint8 [D,H,W], the volume's Grid or None, what is to be said of its
    values), by what the file holds, whatever it is called."""
    grid = window = None
    said, dicom = [], path.is_dir() or is_dicom(path)
    if dicom:
        pixels, grid, window = read_dicom(path, args.window, args.modality, args.series, args.slice)
    elif is_nifti(path):
        pixels, grid, window = read_nifti(path, args.window, args.modality)
    else:
        pixels = read_image(path, args.page, args.window, said.append)
    if window:
        said = [f"{path}: shown are its values from {window[0]:g} to {window[1]:g}"]
    if args.series and not dicom:
        raise InputError(f"--series {args.series}: {path} is not DICOM; leave it out")
    if args.window and not window and (dicom or grid):
        raise InputError(f"--window: {path} has colours, which are shown as they are; leave it out")
    if args.page is not None and (dicom or grid):
        raise InputError(f"--page: {path} is no picture file; give --slice, of a volume or a film")
    if args.slice is not None and not (dicom and not grid) and not (grid and 0 <= args.slice < len(pixels)):
        raise InputError(f"--slice {args.slice}: " + (f"the volume has slices 0 to {len(pixels) - 1}" if grid else
                                                      "the image is no volume; leave it out"))
    if (args.box or args.point) and grid and args.slice is None:
        if len(pixels) > 1:
            raise InputError("--box and --point lie on one slice of a volume; say which with --slice")
        args.slice = 0
    if args.largest_component and (not grid or args.slice is not None):
        raise InputError(f"--largest-component: is for whole volumes, not for an image such as {path}; leave it out")
    check_prompts(args, pixels.shape[1:] if grid else pixels.shape[:2])
    return pixels, grid, said


def check_prompts(args, size):
    """The boxes and points lie on an image of `size` (H, W); -> boxes, points as predict_image takes them."""
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
        places, labels = [p[:2] for p in args.point], [(p + [1])[2] for p in args.point]
        points = np.array([places], np.float32), np.array([labels], int)
    return args.box and np.array(args.box, np.float32), points


def write_image(args, name, image, answer):
    """A PNG of 0 and 255 for each target, and all of them over the image."""
    import plots
    masks = list(zip(args.names, answer.masks))
    for (target, mask), iou in zip(masks, answer.iou.tolist()):
        with whole(args.out / f"{name}-{file_part(target)}.png") as file:
            Image.fromarray(mask.view(np.uint8) * np.uint8(255)).save(file, format="PNG")
        print(f"{target}: {mask.sum()} pixels ({mask.mean():.1%} of the image), expected IoU {iou:.2f}")
    plots.contact_sheet([(name, image, []), ("prediction", image, masks)], args.out / f"{name}-overlay.png", name, 2,
                        inches=4)


def write_volume(args, name, volume, label, grid, seconds):
    """The label map, what its numbers mean, and three slices of it: amid what was found, and half way to both ends."""
    import plots
    from inference import gray_image
    write_nifti(args.out / f"{name}-label.nii.gz", label, grid)
    targets = dict(enumerate(args.names, 1))
    write_atomically(args.out / f"{name}-labels.json", json.dumps(targets, indent=1).encode())
    print(", ".join(f"{target}: {(label == i).sum()} voxels" for i, target in targets.items())
          + f"; {len(volume)} slices in {seconds:.0f} s; wrote {args.out / name}-label.nii.gz")
    filled = np.flatnonzero(label.any((1, 2)))
    rows = np.unique(filled[len(filled) * np.array([1, 2, 3]) // 4]) if len(filled) else [len(volume) // 2]
    pictures = [(f"slice {z}", gray_image(volume, z), [(t, label[z] == i) for i, t in targets.items() if i in label[z]])
                for z in rows]
    if len(pictures) == 1:  # then there is room for the image without them
        pictures = [("image", pictures[0][1], []), *pictures]
    plots.contact_sheet(pictures, args.out / f"{name}-overlay.png", name, 3, inches=4)


def predict_input(args, model, texts, path, read=None):
    """One image, slice or volume, from its file, or from what was read of it, to the results."""
    import inference
    import plots
    name, this = name_of(path), SimpleNamespace(key=name_of(path), case=name_of(path))
    asked = ([inference.wordings(texts, args.mean_wordings, target, args.modality, this) for target in args.target]
             if args.target else [[{kind: getattr(args, kind) for kind in ATTRIBUTES}]])
    pixels, grid, said = read or read_input(path, args)
    print("\n".join(said), end="\n" * bool(said))
    z, whole_volume, started = args.slice, grid and args.slice is None, time.time()
    if whole_volume:
        label = inference.predict_volume(model, pixels, asked, args.precision)
        label = inference.largest_components(label) if args.largest_component else label
        write_volume(args, name, pixels, label, grid, time.time() - started)
        z = int(np.argmax((label > 0).sum((1, 2))))  # the slice to explain
    pixels = inference.gray_image(pixels, z) if grid else pixels
    if z is not None:
        name = f"{name}-slice{z:03d}"
    elif args.page is not None:
        name = f"{name}-page{args.page:03d}"
    boxes, points = check_prompts(args, pixels.shape[:2])
    answer = inference.predict_image(model, pixels, asked, boxes, points, args.precision)
    if not whole_volume:
        write_image(args, name, pixels, answer)
    for i, target in enumerate(args.names if args.explain else ()):
        file = args.out / f"{name}-{file_part(target)}-explained.png"
        found = inference.explain(model, pixels, answer, i, asked, boxes, points, args.precision)
        plots.explanation(file, target, found)
        print(f"wrote {file}")


def main():
    args = parse()
    # First of all the inputs, and all of them: what is wrong with one is said before anything is loaded, and what the
    # model needs is imported after that, since it takes longer. Only the last one is kept, they may be many.
    for path in args.inputs:
        read = read_input(path, args)
    from inference import choose_precision
    from runs import default_checkpoint, load_checkpoint
    if args.onnx:
        from export import OnnxModel
        checkpoint, model, args.precision = args.onnx, OnnxModel(args.onnx), "float32"
        record = dict(dataset=model.dataset)
    else:
        checkpoint = args.checkpoint or default_checkpoint(args.modality)
        model, record = load_checkpoint(checkpoint, sam_checkpoint=args.sam_checkpoint, clip=args.clip)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        args.precision = choose_precision(model, args.precision)
    texts = Texts(args.dataset or record.get("dataset") or "synapse", args.attributes_file, args.texts)
    if args.target:
        texts.check_images(map(name_of, args.inputs), args.target)
    make_folder(args.out)
    print(f"checkpoint {checkpoint}: {model.describe()}")
    for path in args.inputs:
        with claimed(args, path):
            predict_input(args, model, texts, path, read if path == args.inputs[-1] else None)


if __name__ == "__main__":
    run(main)

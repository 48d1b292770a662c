"""Masks for your own image (PNG, JPEG), volume (NIfTI) or DICOM series, from texts, and with boxes or points.

    python predict.py scan.nii.gz --target liver --target spleen --out result
    python predict.py slice.png --position "upper left of the image" --texture "homogeneous" --shape "large wedge"
    python predict.py slice.png --target liver --box 20 60 130 190 --explain

An image gives OUT/NAME-TARGET.png masks and an overlay; a volume OUT/NAME-label.nii.gz, aligned with its input (same
shape, same affine; 1, 2, ... are the targets in order, see labels.json), and an overlay of three slices. --explain adds a
picture per target of what its texts did. As a function: inference.predict_image().
"""
import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from PIL import Image
from tqdm import tqdm

import plots
from common import (ATTRIBUTES, InputError, Parser, add_runtime_flags, check_runtime_flags, make_folder, run, whole,
                    write_atomically)
from data import VARIATION
from inference import merge, predict_image
from prepare import UPRIGHT, WINDOWS, Grid, read_grid, slabs
from readers import read_image
from runs import load_checkpoint, newest_checkpoint
from texts import Texts

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

# ---------------------------------------------------------------------------------------------------------------------
# Reading

def gray(values, window):
    """Numbers -> uint8: the window's ends become 0 and 255."""
    low, high = window
    return np.rint(255 * np.clip((values.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)


def choose_window(asked, modality, low, high, sample):
    """(low, high) of the values that become black and white: as asked for; of CT TransUNet's -125..275 HU; of others
    the 0.5th to 99.5th percentile of the values `sample`."""
    if asked:
        return asked
    if modality == "ct" and low < 0 and high - low >= 100:
        return WINDOWS["synapse"]
    if modality == "ct":
        raise InputError(f"the values run from {low:g} to {high:g}, which are not HU; give --window LOW HIGH, or another "
                         "--modality")
    return tuple(np.percentile(sample, (0.5, 99.5)))


def read_nifti(path, window, modality):
    """-> (uint8 [D,H,W], upright as prepare.py has it, its Grid)."""
    grid = read_grid(path)
    low, high, sample = np.inf, -np.inf, []
    if not window:
        for _, slab in slabs(grid, np.empty(grid.shape, np.uint8)):
            finite = slab[np.isfinite(slab)]
            if not len(finite):
                raise InputError(f"{path}: holds nothing but NaN; give another file")
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            sample.append(finite.ravel()[::101].astype(np.float32))
    try:
        window = choose_window(window, modality, low, high, np.concatenate(sample) if sample else None)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    image = np.empty(grid.shape, np.uint8)
    for part, slab in slabs(grid, image):
        part[...] = gray(np.nan_to_num(slab, nan=window[0]), window)
    return image, grid


def read_dicom(folder, window, modality):
    """A folder with one DICOM series -> (uint8 [D,H,W], its Grid): slices in order of their place along the normal."""
    try:
        import pydicom
    except ImportError:
        raise InputError(f"{folder}: DICOM needs pydicom; install it with: pip install pydicom") from None
    slices = []
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file()):
        try:
            slices.append((path, pydicom.dcmread(path, stop_before_pixels=True)))
        except pydicom.errors.InvalidDicomError:
            continue  # a DICOMDIR, a note
    slices = [(path, head) for path, head in slices if "ImagePositionPatient" in head and "Rows" in head]
    if not slices:
        raise InputError(f"{folder}: holds no DICOM slices; give the folder of one series")
    series = {head.get("SeriesInstanceUID") for _, head in slices}
    if len(series) > 1:
        raise InputError(f"{folder}: holds {len(series)} series; put the one to segment into a folder of its own")
    row, column = np.array(slices[0][1].ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(row, column)
    place = lambda head: float(normal @ np.array(head.ImagePositionPatient, float))
    slices.sort(key=lambda s: place(s[1]))
    gaps = np.diff([place(head) for _, head in slices])
    if len(gaps) and (gaps.min() <= 1e-3 or gaps.max() > 1.5 * np.median(gaps)):
        raise InputError(f"{folder}: the series has slices at the same place, or misses some (gaps of {gaps.min():.3g} to "
                         f"{gaps.max():.3g} mm); give all slices of one series, once")
    values = []
    for path, _ in slices:
        try:
            head = pydicom.dcmread(path)
            values.append(head.pixel_array * np.float32(head.get("RescaleSlope", 1))
                          + np.float32(head.get("RescaleIntercept", 0)))
        except Exception as e:  # pydicom raises nearly anything for damaged or compressed pixels
            raise InputError(f"{path}: its pixels cannot be read ({' '.join(str(e).split())[:150]}); store the series "
                             "uncompressed, or copy it again") from None
        if values[-1].shape != values[0].shape:
            raise InputError(f"{path}: {values[-1].shape} pixels, the first slice {values[0].shape}; give one series")
    values = np.stack(values)
    try:
        window = choose_window(window, modality, float(values.min()), float(values.max()), values.ravel()[::101])
    except InputError as e:
        raise InputError(f"{folder}: {e}") from None
    head = slices[0][1]
    dy, dx = map(float, head.PixelSpacing)
    step = normal * (np.median(gaps) if len(gaps) else float(head.get("SliceThickness", 1) or 1))
    affine = np.eye(4)  # of [column, row, slice], and DICOM's axes run to the left and the back
    affine[:3] = np.stack([row * dx, column * dy, step, np.array(head.ImagePositionPatient, float)], 1)
    affine[:2] *= -1
    axes = io_orientation(affine)
    stored = gray(values.transpose(2, 1, 0), window)
    image = np.ascontiguousarray(apply_orientation(stored, ornt_transform(axes, UPRIGHT)))
    return image, Grid(Path(folder), affine, axes, image.shape, [], 0.0)


def write_nifti(path, label, grid):
    """uint8 [D,H,W], upright, to a NIfTI file with its input's shape, affine and units."""
    stored = np.ascontiguousarray(apply_orientation(label, ornt_transform(UPRIGHT, grid.axes)))
    out = nib.Nifti1Image(stored, grid.affine)
    if grid.path.is_file():  # what the codes and units of its affine mean
        original = nib.load(grid.path)
        head = original.header
        out.header.set_xyzt_units(*head.get_xyzt_units())
        out.set_sform(grid.affine, int(head["sform_code"]) or int(head["qform_code"]))
        out.set_qform(head.get_qform() if head["qform_code"] else None, int(head["qform_code"]))
        out = nib.Nifti1Image(stored.reshape(original.shape), None, out.header)
    with whole(path) as file, gzip.GzipFile(fileobj=file, mode="wb", compresslevel=4, mtime=0) as f:
        f.write(out.to_bytes())


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

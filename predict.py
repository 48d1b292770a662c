"""Masks for your own images (PNG, JPEG), volumes (NIfTI) or DICOM series, from texts, and with boxes or points.

    python predict.py scan.nii.gz --target liver --target spleen --out result
    python predict.py series/ --target liver --series 3 --out result
    python predict.py slice.png --position "upper left of the image" --texture "homogeneous" --shape "large wedge"
    python predict.py slice.png --target liver --box 20 60 130 190 --explain
    python predict.py folder/ --target liver --out result --resume

An image gives OUT/NAME-TARGET.png masks and an overlay; a volume OUT/NAME-label.nii.gz, aligned with its input (same
shape, same affine; 1, 2, ... are the targets in order, see labels.json), and an overlay of three slices. --explain adds
a picture per target of what its texts did. OUT/volumes.csv has a row for each input and target. OUT/NAME-input.json
says whose results these are: those of another input are never replaced. As a function: inference.predict_image().
"""
import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from common import (ATTRIBUTES, MODALITIES, InputError, Parser, add_precision_flag, add_target_flags, alone_in,
                    make_folder, number, read_json, read_text, run, visible, whole, write_atomically, writing)
from readers.dicom import NOTES, is_dicom, is_image, load, read_dicom
from readers.pictures import SUFFIXES, picture_format, read_image
from readers.volumes import is_nifti, read_nifti, write_nifti
from texts import HERE, Texts, own_texts

PLANES = ("axial", "coronal", "sagittal")  # across the axes z, y and x
TABLE = ["input", "target", "voxels", "ml", "expected_iou"]  # the head of OUT/volumes.csv


def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT",
        help="a PNG or JPEG, a NIfTI volume (.nii, .nii.gz), a DICOM file or the folder of a series; a folder of these "
        "at any depth; or @LIST, a text file with one of them a line")
    add_target_flags(parser)
    add("--texts", help="a JSON lines file of texts for this image, as report.py writes it; NAME is the file's")
    add("--mean-wordings", type=number(1, 100, int), default=1, metavar="N",
        help="the mean over up to N wordings of a target's texts")
    add("--modality", default="ct", choices=MODALITIES)
    add("--window", type=number(), nargs=2, metavar=("LOW", "HIGH"), help="values that become black and white")
    add("--series", help="which one of a DICOM folder, by its number or UID")
    add("--box", type=float, nargs=4, action="append", metavar=("X0", "Y0", "X1", "Y1"),
        help="one per target, in pixels")
    add("--point", type=float, nargs="+", action="append", metavar="X Y [1|0]",
        help="in pixels, 1 inside (default) or 0 outside; with a single target")
    add("--plane", choices=PLANES, help="of a volume, which slices the model sees (default: those of best resolution)")
    add("--slice", type=int, help="only this slice of a volume (axial but for --plane; from 0 at the feet, the front "
        "or the right), or this frame of a film; boxes and points need it")
    add("--page", type=number(0, kind=int), help="which page of a TIFF, or frame of an animation, from 0")
    add("--largest-component", action="store_true", help="of a volume, keep the largest part of each target alone")
    add("--min-iou", type=number(0, 1), help="drop a target where the model expects a lower IoU of it, of a volume "
        "slice by slice (default: 0.4; with a box, a point or --largest-component 0, which keeps all)")
    add("--dicom-seg", action="store_true", help="of a DICOM series, also a DICOM Segmentation; needs highdicom")
    add("--explain", action="store_true", help="a picture per target of what its texts did")
    add("--out", type=Path, default="out/predict")
    add("--resume", action="store_true", help="pass over what has been asked before and is finished")
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
    args.asked = {flag: value for flag, value in vars(args).items() if flag not in ("inputs", "names", "out", "resume")}
    found = [one for given in args.inputs for one in find_inputs(given, args.out.resolve())]
    if (args.box or args.point) and len(found) > 1:
        raise InputError("--box and --point lie on one image; give a single INPUT with them")
    args.inputs = dict(found)
    for name, path in found:
        if args.inputs[name] is not path:
            raise InputError(f"{path}: results are named after their input, and {args.inputs[name]} is called {name} "
                             "as well; give them one at a time, each with an --out of its own")
        check_results(args, name, path)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Which inputs there are, and the names of their results

def find_inputs(given, out, lists=True):
    """An INPUT -> [(name, path)]: of itself, or of what @LIST lists, or of what is in a folder."""
    if lists and str(given).startswith("@") and not given.exists():
        lines = filter(None, map(str.strip, read_text(str(given)[1:]).splitlines()))
        return [one for line in lines for one in find_inputs(Path(line), out, lists=False)]
    if given.is_dir() and given.resolve() == out:
        raise InputError(f"--out {out}: is the INPUT as well, and what lies there would be taken for one; give another")
    return [(name_of(path, given), path) for path in given.is_dir() and [*in_folder(given, out)] or [given]]


def in_folder(folder, out):
    """The inputs in a folder, at any depth: DICOM files are a series, whose folder is given, every other file is one.
    Passed over are hidden files, notes, DICOM without an image, the folder `out`, and links that lead back."""
    def refuse(error):  # os.walk would pass over a folder that it may not read
        raise error

    for here, folders, _ in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(here)
        above = [out, here.resolve(), *here.resolve().parents]
        folders[:] = sorted(name for name in folders if name[0] != "." and (here / name).resolve() not in above)
        files = [path for path in visible(here) if path.is_file() or not path.exists()]  # or a link to nothing
        readable = {path for path in files if os.access(path, os.R_OK)}  # the others are named when they are read
        dicom = set(filter(is_dicom, readable))
        others = [path for path in files if path not in dicom and path.suffix.lower() not in NOTES]
        if any(map(holds_image, dicom)):
            yield here  # whose reader names what is odd beside slices
            others = [path for path in others if path in readable and (picture_format(path) or is_nifti(path))]
        yield from others


def holds_image(path):
    """Of a DICOM file; a damaged one counts, so that it is named."""
    try:
        return is_image(load(path, stop_before_pixels=True))
    except InputError:
        return True


def name_of(path, folder=None):
    """What an input's results are called: as its file without the suffix, or as its folder, also where that is `.`;
    what is in `folder` as its path below it, a_b for a/b.png."""
    name = "_".join(path.relative_to(folder or path).parts) or os.path.basename(os.path.abspath(path)) or "input"
    ends = next((end for end in (".nii.gz", ".nii", ".dcm", ".ppm", *SUFFIXES) if name.lower().endswith(end)), "")
    return name[:-len(ends)] or name if ends and not path.is_dir() else name


def file_part(target):
    """A target's name as a part of a file's name."""
    return re.sub(r'[\s/\\:*?"<>|\x00-\x1f]', "_", target)


def files_of(args, name):
    """The files in --out that have the names of an input's results."""
    targets = "|".join(re.escape(part) for part in ("overlay", *map(file_part, args.names)))
    kinds = (r"label\.nii\.gz|labels\.json|seg\.dcm|"
             rf"((slice|coronal|sagittal|page)\d+-)?({targets})(-explained)?\.png")
    named = visible(args.out, f"{glob.escape(name)}-*")
    return [path for path in named if re.fullmatch(f"{re.escape(name)}-({kinds})", path.name)]


def source_of(args, path):
    """What results are of: a file or folder, of which there may be several series."""
    return os.path.abspath(path) + (f", series {args.series}" if args.series else "")


def stem_of(args, name, z=None, axis=None):
    """What the results of a volume's slice z, or of the slice or page that is asked for, are called."""
    if z is None:
        z, axis = args.slice, PLANES.index(args.plane or "axial")
    if z is not None:
        return f"{name}-{PLANES[axis] if axis else 'slice'}{z:03d}"
    return name if args.page is None else f"{name}-page{args.page:03d}"


def record_of(args, stem, path):
    """OUT/STEM-input.json and what is in it, {} where it is not there; InputError if it is that of another input."""
    record = args.out / f"{stem}-input.json"
    known = read_json(record, "give another --out") if record.is_file() else {}
    if known and known.get("input") != source_of(args, path):
        raise InputError(f"{path}: would replace the results of another input, {known.get('input')}, whose are called "
                         f"{stem} as well, in {args.out}; give another --out")
    return record, known


def files_in(known, name):
    """{stem: files in --out} of what OUT/NAME-input.json lists, the latest last; {} if an earlier version wrote it."""
    parts = known.get("files") if isinstance(known.get("files"), dict) else {}
    return {stem: [file for file in map(str, files) if file.startswith(f"{name}-") and Path(file).name == file]
            for stem, files in parts.items() if isinstance(files, list)}


def check_results(args, name, path):
    """InputError if results of this input would replace those of another, or files of which nobody knows whose they are
    -> OUT/NAME-input.json and what is in it, {} where it is not there."""
    record_of(args, stem_of(args, name), path)
    record, known = record_of(args, name, path)
    for file in files_of(args, name) if not known else ():
        raise InputError(f"{file}: is there already, and nothing says that it is a result of {path}; move it away, or "
                         "give another --out")
    return record, known


def state_of(args, path):
    """What OUT/NAME-input.json is to say: what the input is and, flag by flag, what is asked; of files, and of folders
    of files, also bytes, time and a hash of each file's."""
    def stamp(*given):
        files = {f.name: f.stat() for one in given for f in (visible(one) if one.is_dir() else [one]) if f.is_file()}
        each = repr([(name, f.st_size, f.st_mtime_ns) for name, f in files.items()]).encode()
        return dict(bytes=sum(f.st_size for f in files.values()),
                    modified=max((f.st_mtime for f in files.values()), default=0),
                    listing=hashlib.blake2b(each, digest_size=8).hexdigest())

    def beside(file):
        return file.with_suffix(".json"), file.with_name("config.json"), file.with_name(f"{file.stem}-encoder.onnx")

    asked = args.asked | dict(checkpoint=args.checkpoint, attributes_file=args.texts_file)
    for flag in ("checkpoint", "sam_checkpoint", "attributes_file", "texts"):
        file = asked[flag] and Path(asked[flag])
        asked[flag] = file and [os.path.abspath(file), stamp(file, *(beside(file) if flag == "checkpoint" else ()))]
    if args.clip:  # NAME:TAG or NAME:FILE
        asked["clip"] = [args.clip, stamp(Path(args.clip.partition(":")[2] or args.clip))]
    for kind in ATTRIBUTES:  # one's own words may be clinical: a hash tells them apart as well
        asked[kind] = asked[kind] and hashlib.blake2b(repr(asked[kind]).encode(), digest_size=8).hexdigest()
    return json.loads(json.dumps(dict(input=source_of(args, path), **stamp(path), asked=asked), default=str))


def is_finished(args, name, path):
    """Whether an input has its results; where those are of other flags or files, it says so."""
    before, now = check_results(args, name, path)[1], state_of(args, path)
    asked = before["asked"] if isinstance(before.get("asked"), dict) else {}
    other = [f"--{flag.replace('_', '-')}" for flag in now["asked"] if asked.get(flag) != now["asked"][flag]]
    if before.get("finished") and other:
        tqdm.write(f"{path}: was done with other {', '.join(other)}, and is done anew")
    latest = [[], *files_in(before, name).values()][-1]
    return (before.get("finished") is True and asked == now["asked"] and not has_changed(before, now)
            and all((args.out / file).is_file() for file in latest))


def has_changed(before, now):
    """Whether an input is another than it was; what an earlier version did not note is as it was."""
    return any(before.get(key, now.get(key)) != now.get(key) for key in ("bytes", "modified", "listing"))


@contextmanager
def claimed(args, name, path):
    """Writes OUT/NAME-input.json before the results of an input are made, and again when they are finished; it goes
    again if none could be made. Yields begin(STEM, FILES), to be called before the first of them is written: it lists
    them there, and what is of an earlier ask and of this STEM (of any, if the input has changed) goes."""
    now = state_of(args, path)
    with alone_in(args.out):  # another process may have begun since parse()
        record, before = check_results(args, name, path)
        part = record.with_name(record.name + ".part")
        with writing(record):
            part.write_text(json.dumps(before or now))  # what is there stands until other results begin
            os.replace(part, record)
    changed, known = has_changed(before, now), files_in(before, name)
    if changed:
        tqdm.write(f"{path}: has changed since its last results in {args.out}, which are replaced")

    def begin(stem, files):
        gone = {stem, *(known if changed else ())}
        stale = [file for part in gone for file in known.pop(part, [])]
        now["files"] = known | {stem: [*stale, *files]}
        write_atomically(record, json.dumps(now).encode())
        for part in gone:
            write_rows(args, part, [])
        for file in stale:
            with writing(args.out / file):
                (args.out / file).unlink(missing_ok=True)
        now["files"][stem] = files

    try:
        yield begin
    except BaseException:
        if not before and not files_of(args, name):
            record.unlink(missing_ok=True)
        raise
    write_atomically(record, json.dumps(now | dict(finished=True)).encode())


def write_rows(args, name, rows):
    """Rows of target, voxels, ml and expected IoU into OUT/volumes.csv, in place of those that it has of this name."""
    table, before = args.out / "volumes.csv", [TABLE]
    with whole(table) as file:  # which keeps other processes out
        if table.is_file():
            before = [*csv.reader(io.StringIO(table.read_text("utf-8-sig", "surrogateescape")))]
        if before[:1] != [TABLE]:
            raise InputError(f"{table}: is there already, and is no table of results; move it away, or give another "
                             "--out")
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", "")
        csv.writer(text).writerows([row for row in before if row[:1] != [name]] + [[name, *row] for row in rows])
        text.detach()


# ---------------------------------------------------------------------------------------------------------------------
# From input to results

def plane_of(args, grid):
    """Which axis of [z,y,x] a volume's slices lie across: that of the longest voxels, or of a single one; z if no
    axis is clearly so, and where one slice is asked for."""
    if args.plane or args.slice is not None or args.box or args.point:
        return PLANES.index(args.plane or "axial")
    spacing = [step if count > 1 else np.inf for step, count in zip(grid.spacing, grid.shape)]
    _, second, longest = sorted(spacing)
    return spacing.index(longest) if longest > 1.25 * second else 0


def slices_of(volume, axis):
    """A view of [z,y,x] as its slices across an axis, upright: axial [z,y,x], coronal [y,-z,x], sagittal [x,-z,y]."""
    return np.moveaxis(volume, axis, 0)[:, ::-1] if axis else volume


def read_input(path, args):
    """-> (an image uint8 [H,W,3] or a volume's slices uint8 [N,H,W], the volume's Grid or None, what is to be said of
    its values), by what the file holds, whatever it is called."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give an image, a volume or the folder of a DICOM series")
    grid = window = None
    said, dicom = [], path.is_dir() or is_dicom(path)
    if dicom:
        pixels, grid, window = read_dicom(path, args.window, args.modality, args.series, args.slice, say=said.append)
    elif is_nifti(path):
        pixels, grid, window = read_nifti(path, args.window, args.modality)
    else:
        pixels = read_image(path, args.page, args.window, said.append)
    pixels = slices_of(pixels, plane_of(args, grid)) if grid else pixels
    if window:
        said.append(f"{path}: shown are its values from {window[0]:g} to {window[1]:g}")
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
    image = not grid and len(args.inputs) == 1  # among others, what is for volumes does not concern it
    if args.largest_component and (image or args.slice is not None):
        raise InputError(f"--largest-component: is for whole volumes, not for an image such as {path}; leave it out")
    series = grid and grid.slices and args.slice is None
    if args.dicom_seg and not series and len(args.inputs) == 1:
        raise InputError(f"--dicom-seg: is for the whole volume of a DICOM series, not for {path}; leave it out")
    if args.dicom_seg and series:
        from readers.dicom_seg import check_dicom_seg
        check_dicom_seg(grid, args.names)
    if args.plane and image:
        raise InputError(f"--plane: is for volumes, not for an image such as {path}; leave it out")
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
    """A PNG of 0 and 255 for each target, and all of them over the image -> rows of the table."""
    import plots
    masks = list(zip(args.names, answer.masks))
    rows = []
    for (target, mask), iou, low in zip(masks, answer.iou.tolist(), answer.iou < answer.min_iou):
        pixels, iou = int(mask.sum()), f"{iou:.3f}"
        rows.append([target, pixels, "", iou if pixels else ""])
        with whole(args.out / f"{name}-{file_part(target)}.png") as file:
            Image.fromarray(mask.view(np.uint8) * np.uint8(255)).save(file, format="PNG")
        dropped = f", below --min-iou {answer.min_iou:g}: dropped" if low else ""
        tqdm.write(f"{name}, {target}: {pixels} pixels ({mask.mean():.1%} of the image), expected IoU {iou}{dropped}")
    plots.contact_sheet([(name, image, []), ("prediction", image, masks)], args.out / f"{name}-overlay.png", name, 2,
                        inches=4)
    return rows


def write_volume(args, name, volume, label, grid, iou, seconds):
    """The label map [z,y,x], what its numbers mean, and three slices of it: amid what was found, and half way to both
    ends -> rows of the table. volume: its slices; iou: that the model expects of each target."""
    import plots
    from inference import gray_image
    write_nifti(args.out / f"{name}-label.nii.gz", label, grid)
    targets = dict(enumerate(args.names, 1))
    write_atomically(args.out / f"{name}-labels.json", json.dumps(targets, indent=1).encode())
    axis, voxel = plane_of(args, grid), abs(np.linalg.det(grid.affine[:3, :3])) / 1000  # ml
    rows = [[target, n := int((label == i).sum()), f"{n * voxel:.6g}", f"{iou[i - 1]:.3f}" if n else ""]
            for i, target in targets.items()]
    tqdm.write(", ".join(f"{target}: {n} voxels, {ml} ml" for target, n, ml, _ in rows)
               + f"; {len(volume)} {PLANES[axis]} slices in {seconds:.0f} s; wrote {args.out / name}-label.nii.gz")
    label = slices_of(label, axis)
    filled = np.flatnonzero(label.any((1, 2)))
    shown = np.unique(filled[len(filled) * np.array([1, 2, 3]) // 4]) if len(filled) else [len(volume) // 2]
    pictures = [(f"slice {z}", gray_image(volume, z), [(t, label[z] == i) for i, t in targets.items() if i in label[z]])
                for z in shown]
    if len(pictures) == 1:  # then there is room for the image without them
        pictures = [("image", pictures[0][1], []), *pictures]
    plots.contact_sheet(pictures, args.out / f"{name}-overlay.png", name, 3, inches=4)
    return rows


def write_dicom_seg(args, name, model, label, grid):
    from encoders import fingerprint
    from readers.dicom_seg import encode_dicom_seg
    file = args.out / f"{name}-seg.dcm"
    write_atomically(file, encode_dicom_seg(label, grid, args.names, fingerprint(model.trained())))
    tqdm.write(f"wrote {file}")


def predict_input(args, model, texts, name, path, read, begin):
    """One image, slice or volume, from what was read of it to the results; begin: see claimed."""
    import inference
    import plots
    this = SimpleNamespace(key=name, case=name)
    asked = ([inference.wordings(texts, args.mean_wordings, target, args.modality, this) for target in args.target]
             if args.target else [[{kind: getattr(args, kind) for kind in ATTRIBUTES}]])
    pixels, grid, said = read
    for line in said:
        tqdm.write(line)
    axis, z, started = plane_of(args, grid) if grid else 0, args.slice, time.time()
    whole_volume = grid and z is None
    least = args.min_iou
    if least is None:  # parts of the same organ in other slices are evidence enough
        least = 0.0 if args.box or args.point or args.largest_component else inference.UNSURE
    if whole_volume:
        found, iou = inference.predict_volume(model, pixels, asked, args.precision, min_iou=least)
        z, seconds = int(np.argmax((found > 0).sum((1, 2)))), time.time() - started  # the slice to explain
    image = inference.gray_image(pixels, z) if grid else pixels
    if not whole_volume or args.explain:
        boxes, points = check_prompts(args, image.shape[:2])
        answer = inference.predict_image(model, image, asked, boxes, points, args.precision, min_iou=least)
    explained = stem_of(args, name, z, axis)
    stem, segment = name if whole_volume else explained, whole_volume and args.dicom_seg and grid.slices
    if args.explain or not whole_volume:
        record_of(args, explained, path)
    ends = ["label.nii.gz", "labels.json"] if whole_volume else [f"{file_part(target)}.png" for target in args.names]
    pictures = [f"{explained}-{file_part(target)}-explained.png" for target in args.names if args.explain]
    begin(stem, [f"{stem}-{end}" for end in (*ends, "overlay.png", *["seg.dcm"] * bool(segment))] + pictures)
    if whole_volume:
        alone, label = inference.largest_components(found), np.empty(grid.shape, np.uint8)
        slices_of(label, axis)[...] = alone if args.largest_component else found
        say_apart(args, name, found, alone)
        rows = write_volume(args, name, pixels, label, grid, iou, seconds)
        if segment:
            write_dicom_seg(args, name, model, label, grid)
    else:
        rows = write_image(args, stem, image, answer)
    for i, file in enumerate(pictures):
        found = inference.explain(model, image, answer, i, asked, boxes, points, args.precision)
        plots.explanation(args.out / file, args.names[i], found)
        tqdm.write(f"wrote {args.out / file}")
    write_rows(args, stem, rows)


def say_apart(args, name, found, alone):
    """Says how much of each target lies outside its largest part: label maps, `alone` with the largest parts alone."""
    sizes = [np.bincount(label.ravel(), minlength=len(args.names) + 1)[1:] for label in (found, alone)]
    apart = [f"{target} {1 - largest / every:.0%}" for target, every, largest in zip(args.names, *sizes)
             if largest < 0.99 * every]
    if apart and len(found) > 1 and not args.largest_component:  # in a single slice an organ may well have parts
        tqdm.write(f"{name}: apart from its largest part lies of {', '.join(apart)}; --largest-component leaves that "
                   "out")


def load_model(args):
    """-> model, texts."""
    from inference import choose_precision
    from runs import load_checkpoint
    choose_checkpoint(args)
    if args.onnx:
        from export import OnnxModel
        model = OnnxModel(args.onnx)
        record = dict(dataset=model.dataset)
    else:
        model, record = load_checkpoint(args.checkpoint, sam_checkpoint=args.sam_checkpoint, clip=args.clip)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = "float32" if args.onnx else choose_precision(model, args.precision)
    texts = Texts(args.dataset or record.get("dataset") or "synapse", args.texts_file, args.texts)
    if args.target:
        texts.check_images(args.inputs, args.target)
        texts.check([(target, args.modality) for target in args.target])
    make_folder(args.out)
    tqdm.write(f"checkpoint {args.checkpoint}: {model.describe()}")
    return model, texts


def choose_checkpoint(args):
    """Sets args.checkpoint and args.texts_file, which holds the texts of --target: for a model of one's own data where
    its checkpoint says."""
    from runs import checkpoint_file, default_checkpoint, read_record
    args.checkpoint = args.onnx or checkpoint_file(args.checkpoint or default_checkpoint(args.modality))
    own = None
    with suppress(OSError, SafetensorError, ValueError):  # load_model says what is wrong with it
        own = own_texts({} if args.onnx else read_record(args.checkpoint), args.dataset)
    args.texts_file = args.attributes_file or own or HERE / "attributes.json"


def main():
    args = parse()
    if args.resume:
        choose_checkpoint(args)
    # The model is loaded for the first input that can be read: what is wrong with one is said before that, and what the
    # model needs is imported then, since it takes longer.
    loaded, failed, before = None, 0, 0
    for name, path in tqdm(args.inputs.items(), "inputs", disable=None if len(args.inputs) > 1 else True):
        read = None
        try:
            if args.resume and is_finished(args, name, path):
                before += 1
                continue
            read = read_input(path, args)
            loaded = loaded or load_model(args)
            with claimed(args, name, path) as begin:
                predict_input(args, *loaded, name, path, read, begin)
        except (InputError, MemoryError) as e:
            if len(args.inputs) == 1 or read and not loaded:  # what is wrong is no fault of this one among others
                raise
            failed += 1
            remedy = "; give a part of it, or use a larger machine" if isinstance(e, MemoryError) else ""
            what = " ".join(str(e).split()) + remedy
            tqdm.write("predict.py: " + (what if str(path) in what else f"{path}: {what}"), sys.stderr)
    if len(args.inputs) > 1 or before:
        done = len(args.inputs) - failed
        print(f"{done} of {len(args.inputs)} inputs have results in {args.out}; {before} had them before")
    if failed:
        sys.exit(1 if failed < len(args.inputs) else 2)


if __name__ == "__main__":
    run(main)

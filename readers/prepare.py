"""The challenges' NIfTI volumes, once, to the files that the readers open; `python data.py prepare` calls prepare().

    synapse   RAW/img/img0001.nii.gz, RAW/label/label0001.nii.gz  ->  the layout of TransUNet, see synapse.py
    kits19    RAW/case_00000/imaging.nii.gz, segmentation.nii.gz  ->  OUT/case_00000, see kits19.py

What is written is [z, y, x], upright, as volumes.py says: a volume that lies obliquely goes to its nearest axes, as in
the literature, and the last line says so.
"""
import json
import re
from pathlib import Path
from zipfile import BadZipFile

import h5py
import numpy as np
from tqdm import tqdm

from common import InputError, make_folder, read_json, visible, whole, write_atomically
from readers.synapse import TEST_CASES
from readers.volumes import WINDOWS, are_hu, gray, read_grid, slabs, some, unit

# BTCV's 13 organs -> TransUNet's eight, in the order of synapse.ORGANS
EIGHT = np.array([0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0], np.uint8)
KIDNEYS = np.array([0, 1, 2], np.uint8)
# the challenge has no other numbers; a copy that counts its cases from 1 to 30 would have other test cases
NUMBERS = {f"{n:04d}" for n in (*range(1, 11), *range(21, 41))}


def prepare(name, raw, out):
    """Writes the data set `name` from the challenge's folder `raw` to `out`, and prints what is there and what is next.

    A case that is complete is not written again, so that a run goes on where it was stopped. InputError for anything
    wrong with the files; headers are checked before the first case is written, voxels as they are read.
    """
    makers = {"synapse": synapse, "kits19": kits19}
    if name not in makers:
        raise InputError(f"prepare {name}: only {' and '.join(makers)} are prepared; others are read as published")
    raw, out = Path(raw), Path(out)
    if not raw.is_dir():
        raise InputError(f"{raw}: no such folder; name the one that holds the challenge's files")
    print(makers[name](raw, out))


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_pair(image, label):
    """Paths -> (Grid, Grid) of an image and its label, voxel upon voxel."""
    image, label = read_grid(image), read_grid(label)
    if image.shape != label.shape:
        raise InputError(f"{label.path}: {list(label.shape)} voxels (z, y, x), but its image {image.path.name} has "
                         f"{list(image.shape)}; store both on one grid")
    apart = np.abs(image.affine - label.affine).max()
    if apart > 1e-3:
        raise InputError(f"{label.path}: its affine and that of its image {image.path.name} differ by up to "
                         f"{apart:.4g}; store both on one grid")
    return image, label


def read_image(grid, window, dtype, remedy="take the challenge's file, not a rescaled one"):
    """-> [D,H,W]: HU clipped to `window` and scaled to [0, 1] for np.float32, to whole numbers 0..255 for np.uint8."""
    image, sample = np.empty(grid.shape, dtype), []
    for part, slab in slabs(grid, image):
        if not np.isfinite(slab).all():
            raise InputError(f"{grid.path}: holds NaN or infinity; replace these values")
        sample.append(some(slab, image.size))
        part[...] = unit(slab, window) if dtype == np.float32 else gray(slab, window)
    sample = np.concatenate(sample)
    if not are_hu(sample):
        raise InputError(f"{grid.path}: its values run from {sample.min():g} to {sample.max():g}, but they are not HU "
                         f"(air -1000, fat -100, soft tissue 0 to 100); {remedy}")
    return image


def read_label(grid, table, remedy="take the challenge's own file"):
    """-> uint8 [D,H,W]: table[id] for every voxel; `table` uint8 [ids]. Ids that a tool has stored with a scale factor,
    5.98 for 6, are rounded; ids that were interpolated lie anywhere between whole numbers, and are an InputError."""
    label = np.empty(grid.shape, np.uint8)
    for part, slab in slabs(grid, label):
        ids = np.clip(np.rint(slab), 0, len(table) - 1)
        wrong = ~(np.abs(slab - ids) < 0.05)  # finds NaN as well
        if wrong.any():
            raise InputError(f"{grid.path}: label {slab[wrong][0]} is not one of the ids 0..{len(table) - 1}; {remedy}")
        part[...] = table[ids.astype(np.uint8)]
    return label


def find(folder, stem):
    """The path of FOLDER/STEM.nii.gz or .nii, or None."""
    return next((path for path in (folder / f"{stem}.nii.gz", folder / f"{stem}.nii") if path.is_file()), None)


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def read_record(path):
    """What an earlier run wrote of what it has done, {} where there is none."""
    return read_json(path, "delete it") if path.is_file() else {}


def is_newer(made, *grids):
    """Whether a file was made after the volumes were put where they are, or last changed."""
    return all(made.stat().st_mtime_ns > grid.path.stat().st_ctime_ns for grid in grids)


def tilted(cases):
    """What the last line says of volumes that lie obliquely; below a degree it does not matter."""
    tilts = [image.tilt for image, _ in cases.values() if image.tilt > 1]
    return f"; {len(tilts)} lie obliquely, by up to {max(tilts):.0f} degrees, and were not resampled" if tilts else ""


# ---------------------------------------------------------------------------------------------------------------------
# Synapse (BTCV)

def synapse(raw, out):
    """A case is complete when its files are there, of its shape and newer than the volume's, and spacing.json, written
    last, has its spacing."""
    cases = {f"case{number}": read_pair(*paths) for number, paths in synapse_pairs(raw).items()}
    if not (out / "spacing.json").is_file() and any((out / folder).exists() for folder in ("train_npz", "test_vol_h5")):
        raise InputError(f"{out}: holds slices without our spacing.json, so they come from elsewhere; choose another "
                         "place with --out, or move them away")
    spacing = read_record(out / "spacing.json")
    todo = [case for case, pair in cases.items()
            if spacing.get(case) != pair[0].spacing or not synapse_complete(out, case, *pair)]
    make_folder(out)
    spacing = {case: mm for case, mm in spacing.items() if case not in todo}
    record_synapse(out, spacing)
    for case in tqdm(todo, "preparing synapse", unit="case"):
        write_synapse(out, case, *cases[case])
        spacing[case] = cases[case][0].spacing
        record_synapse(out, spacing)
    return synapse_summary(out, spacing, cases)


def synapse_pairs(raw):
    """{number: (image's path, label's path)}, sorted."""
    for folder in (raw, raw / "Training", raw / "RawData/Training"):
        numbers = {match[1] for kind in ("img", "label") for path in (folder / kind).glob(f"{kind}*")
                   if (match := re.fullmatch(kind + r"(\d+)\.nii(\.gz)?", path.name))}
        if numbers:
            break
    else:
        raise InputError(f"{raw}: no img/img0001.nii.gz with a label/label0001.nii.gz, neither here nor in Training or "
                         "RawData/Training; give the folder that the challenge's RawData.zip was unpacked to")
    pairs = {}
    for number in sorted(numbers):
        image, label = (find(folder / kind, f"{kind}{number}") for kind in ("img", "label"))
        if not (image and label):
            missing = folder / (f"label/label{number}" if image else f"img/img{number}")
            raise InputError(f"{missing}.nii.gz: missing, but {image or label} is there; unpack the challenge's "
                             "Training folder again, which holds both, or take that file away")
        pairs[number] = image, label
    return pairs


def synapse_files(out, case, grid):
    """The paths that a case is written to."""
    if case[4:] in TEST_CASES:
        return [out / f"test_vol_h5/{case}.npy.h5"]
    return [out / f"train_npz/{case}_slice{i:03d}.npz" for i in range(grid.shape[0])]


def synapse_complete(out, case, image, label):
    """Whether just these are there, and hold a volume of this shape: files appear whole, so the first speaks for
    all."""
    paths, test = synapse_files(out, case, image), case[4:] in TEST_CASES
    if sorted([*out.glob(f"test_vol_h5/{case}.npy.h5"), *out.glob(f"train_npz/{case}_slice*.npz")]) != paths:
        return False
    if not is_newer(paths[0], image, label):
        return False
    try:
        with h5py.File(paths[0]) if test else np.load(paths[0]) as first:
            return first["image"].shape == image.shape[0 if test else 1:]
    except (OSError, ValueError, KeyError, BadZipFile):
        return False


def write_synapse(out, case, image, label):
    paths = synapse_files(out, case, image)
    image, label = read_image(image, WINDOWS["synapse"], np.float32), read_label(label, EIGHT)
    make_folder(paths[0].parent)
    if case[4:] in TEST_CASES:
        with whole(paths[0]) as file, h5py.File(file, "w") as volume:
            volume["image"], volume["label"] = image, label
        return
    for path in (out / "train_npz").glob(f"{case}_slice*"):  # of a run that was stopped, or of a longer volume
        path.unlink()
    for path, x, y in zip(paths, image, label):
        with whole(path) as file:
            # not compressed: at 512 x 512 a slice takes 1.3 MB instead of 0.3, but is read in 0.8 ms instead of 4
            np.savez(file, image=x, label=y)


def record_synapse(out, spacing):
    """spacing.json and the lists, which name the cases that are complete and no others."""
    train = [path.stem for path in visible(out / "train_npz", "*.npz") if path.stem.split("_slice")[0] in spacing]
    make_folder(out / "lists_Synapse")
    write_atomically(out / "spacing.json", json.dumps(dict(sorted(spacing.items()))).encode())
    for kind, names in (("train", train), ("test_vol", [c for c in sorted(spacing) if c[4:] in TEST_CASES])):
        path = out / f"lists_Synapse/{kind}.txt"
        if names:
            write_atomically(path, "".join(f"{name}\n" for name in names).encode())
        else:  # for synapse.py a list that names nothing is an error
            path.unlink(missing_ok=True)


def synapse_summary(out, spacing, cases):
    """The last line: what lies in `out` and what to run next."""
    test = [case for case in spacing if case[4:] in TEST_CASES]
    slices, train = len(visible(out / "train_npz", "*.npz")), len(spacing) - len(test)
    line = (f"{out}: {train} case(s) to train on, {slices} slices, and {len(test)} of the {len(TEST_CASES)} test cases"
            + tilted(cases))
    others = sorted({case[4:] for case in spacing} - NUMBERS)
    if others:
        line += (f"; {others[0]} is not a number of the challenge's (0001-0010, 0021-0040): if this copy counts its "
                 "cases anew, give them their own numbers, or test cases are trained on")
    if len(test) < len(TEST_CASES):
        line += "; without all test cases results do not compare with published ones"
    return f"{line}; next: python train.py --dataset synapse --data {out}"


# ---------------------------------------------------------------------------------------------------------------------
# KiTS19

def kits19(raw, out):
    """A case is complete when its arrays are there and case.json, written last, has the volume's shape and spacing and
    is newer."""
    pairs, skipped = kits19_pairs(raw)
    cases = {case: read_pair(*paths) for case, paths in pairs.items()}
    todo = [case for case, pair in cases.items() if not kits19_complete(out / case, *pair)]
    make_folder(out)
    for case in tqdm(todo, "preparing kits19", unit="case"):
        write_kits19(out / case, *cases[case])
    line = f"{out}: {len(list(out.glob('case_*/case.json')))} case(s)" + tilted(cases)
    if skipped:
        line += f"; {skipped} without a segmentation, as the challenge's test cases from 210 on are, were skipped"
    return f"{line}; next: python train.py --dataset kits19 --data {out}"


def kits19_pairs(raw):
    """({case: (image's path, label's path)}, sorted; how many were skipped for want of a segmentation)."""
    folders = sorted(path for place in (raw, raw / "data") for path in place.glob("case_*") if path.is_dir())
    pairs, skipped = {}, 0
    for folder in folders:
        image, label = find(folder, "imaging"), find(folder, "segmentation")
        if image and label:
            pairs[folder.name] = image, label
        elif label:
            raise InputError(f"{folder / 'imaging.nii.gz'}: missing, but {label.name} is there; fetch the images with "
                             "the challenge's starter_code/get_imaging.py")
        else:
            skipped += image is not None
    if not pairs:
        raise InputError(f"{raw}: no case_00000/imaging.nii.gz with a segmentation.nii.gz beside it, neither here nor "
                         "in data; give the challenge's folder, with its images fetched by starter_code/get_imaging.py")
    return pairs, skipped


def kits19_complete(folder, image, label):
    record = read_record(folder / "case.json")
    return (record.get("shape") == list(image.shape) and record.get("spacing") == image.spacing
            and is_newer(folder / "case.json", image, label)
            and all((folder / f"{kind}.npy").is_file() for kind in ("image", "label")))


def write_kits19(folder, image, label):
    shape, spacing = list(image.shape), image.spacing
    image, label = read_image(image, WINDOWS["kits19"], np.uint8), read_label(label, KIDNEYS)
    make_folder(folder)
    (folder / "case.json").unlink(missing_ok=True)  # what it says is not true of the new arrays
    for kind, volume in (("image", image), ("label", label)):
        with whole(folder / f"{kind}.npy") as file:
            np.save(file, volume)
    areas = {letter: [(label == i).sum(tuple({0, 1, 2} - {axis})).tolist() for i in (1, 2)]
             for axis, letter in enumerate("zyx")}
    write_atomically(folder / "case.json", json.dumps(dict(shape=shape, spacing=spacing, areas=areas)).encode())

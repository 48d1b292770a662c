"""NIfTI volumes: read upright, window by window of values, and written back onto their own grid; dicom.py reads DICOM
onto the same Grid.

In memory a volume is [z, y, x]: z from inferior to superior, y from anterior to posterior, x from the patient's right
to left, so that a slice is the upright radiological view with the patient's right on the image's left, however the file
stores it. That is decided by the file's header alone. Axes are permuted and flipped, voxels never resampled.
"""
import bz2
import gzip
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from common import InputError, whole

UPRIGHT = axcodes2ornt(("S", "P", "L"))  # where z, y and x run to
# HU that keep their contrast: TransUNet's; nnU-Net's and MIScnn's, percentiles within KiTS19's kidneys
WINDOWS = {"synapse": (-125, 275), "kits19": (-79, 304)}
# what a file is, by its first bytes, whatever it is called
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
NIFTI = {size.to_bytes(4, order): kind for order in ("little", "big")
         for size, kind in ((348, nib.Nifti1Image), (540, nib.Nifti2Image))}
OTHERS = {b"\x89PNG": "a PNG", b"\xff\xd8\xff": "a JPEG", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"%PDF": "a PDF",
          b"PK\3\4": "a zip archive", b"NRRD": "NRRD", b"ObjectType": "MetaImage", b"\x89HDF": "HDF5",
          b"<": "a web page", b"version https://git-lfs": "git-lfs's pointer to it (git lfs pull fetches the file)"}
UNITS = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's codes of m, mm and um, in mm; without one it is mm, as everywhere
# the fields of its header that say where the voxels lie
PLACE = ("pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
         "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z")

# nibabel mends what little is wrong with a header and logs it; what it cannot mend becomes our one line
nib.imageglobals.logger.setLevel("CRITICAL")


@dataclass
class Grid:
    """Where the voxels of a NIfTI file or a DICOM series lie. `shape` and `spacing` are (z, y, x), of the volume that
    we hold and write."""
    path: Path
    affine: np.ndarray  # [4, 4]: the stored indices -> mm to the right, anterior and superior
    axes: np.ndarray  # [3, 2]: for each of the stored axes, the patient's nearest one and the direction along it
    shape: tuple
    spacing: list  # mm
    tilt: float  # degrees, between the stored axes and the patient's
    header: nib.Nifti1Header | None  # of a NIfTI file
    slices: tuple = ()  # of a DICOM series: the Slice of each step along the third stored axis


def make_grid(path, affine, shape, header=None):
    """A Grid; affine in mm and shape are those of the stored axes. InputError where they make no sense."""
    with np.errstate(over="ignore"):  # NIfTI-2 has numbers of 64 bits
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not sizes.all() or abs(np.linalg.det(affine[:3, :3] / sizes)) < 0.01:
        raise InputError(f"{path}: the header's affine {affine[:3].round(3).tolist()} is singular; copy the file "
                         "again, or set its sform")
    if sizes.min() < 1e-3 or sizes.max() > 100:  # most of all, metres or micrometres that the header takes for mm
        raise InputError(f"{path}: voxels of {' x '.join(f'{size:.4g}' for size in sizes)} mm, by its header; correct "
                         "its spacing and the units that it is in")
    axes = io_orientation(affine)
    along = [int(np.flatnonzero(axes[:, 0] == world)[0]) for world in UPRIGHT[:, 0]]
    cosines = [abs(affine[int(world), axis]) / sizes[axis] for axis, world in enumerate(axes[:, 0])]
    return Grid(path, affine, axes, tuple(shape[axis] for axis in along), [round(float(sizes[a]), 6) for a in along],
                float(np.degrees(np.arccos(min(1, *cosines)))), header)


def upright(stored, grid):
    """A view of an array along the stored axes [i,j,k] as [z,y,x]."""
    return apply_orientation(stored, ornt_transform(grid.axes, UPRIGHT))


def along_file(volume, grid):
    """A view of an array [z,y,x] along the stored axes."""
    return apply_orientation(volume, ornt_transform(UPRIGHT, grid.axes))


def first_bytes(path, count=348):
    """Up to `count` bytes; by default as many as NIfTI's header has."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check the path and its permissions") from None


def known(start, table):
    """What `table` says of a file's first bytes, or None."""
    return next((found for magic, found in table.items() if start.startswith(magic)), None)


def is_nifti(path):
    """By its bytes, or, damaged as these may be, by its name."""
    return known(first_bytes(path), PACKED | NIFTI) is not None or path.name.lower().endswith((".nii", ".nii.gz"))


# ---------------------------------------------------------------------------------------------------------------------
# NIfTI

@contextmanager
def opened(path):
    """The nibabel image and the stream that it reads from; whatever fails within is taken for a damaged file."""
    packed = known(first_bytes(path), PACKED)
    try:
        with (packed or open)(path, "rb") as stream:
            start = stream.read(348)
            stream.seek(0)
            other = "DICOM" if start[128:132] == b"DICM" else known(start, OTHERS)
            kind = NIFTI.get(start[:4])
            magic = start[4:8] if kind is nib.Nifti2Image else start[344:348] if kind else b""
            if magic in (b"ni1\0", b"ni2\0"):
                other = "the header of a NIfTI pair; store header and voxels in one file"
            elif magic == bytes(4) and kind is nib.Nifti1Image:
                other = "Analyze, which does not say how the patient lies"
            if other:
                raise InputError(f"{path}: holds no NIfTI, but is {other}; convert or replace it")
            with np.errstate(all="ignore"):  # of a header's numbers
                image = (kind or nib.Nifti1Image).from_stream(stream)
            yield image, stream
    except (InputError, MemoryError):
        raise
    except Exception as e:  # damaged bytes make gzip and nibabel raise nearly anything
        raise InputError(f"{path}: truncated or not NIfTI ({' '.join(str(e).split())}); copy it again") from None


def read_grid(path):
    """The Grid of a file, from its header."""
    with opened(path) as (image, _):
        stored, header, kind = image.shape, image.header, image.get_data_dtype().kind
        affine = np.array(image.affine, float)
        oriented = int(header["sform_code"]) or int(header["qform_code"])
    # the last: NIfTI-2's header has room for more voxels than can be counted
    if len(stored) < 3 or set(stored[3:]) - {1} or min(stored) < 1 or kind not in "iuf" or math.prod(stored) > 2 ** 48:
        raise InputError(f"{path}: should be one volume of numbers, but is {header.get_data_dtype()} {list(stored)}; "
                         "store three axes")
    if not oriented:  # nibabel would guess, and a wrong guess swaps the kidneys
        raise InputError(f"{path}: the header does not say how the patient lies (sform_code and qform_code are 0); "
                         "take the challenge's own file, or set its sform")
    affine[:3] *= UNITS.get(int(header["xyzt_units"]) & 7, 1.0)
    return make_grid(path, affine, stored, header)


def slabs(grid, volume):
    """Pairs (part of `volume` [D,H,W], the voxels of `grid`'s file that belong there), until all of it is covered.

    Only a few slices are ever held as the file stores them: KiTS19's largest case is 2 GB in float64.
    """
    stored = along_file(volume, grid)
    step = max(1, 2 ** 22 // (stored.shape[0] * stored.shape[1]))
    with opened(grid.path) as (image, stream):
        for start in range(0, stored.shape[2], step):
            part = stored[:, :, start:start + step]
            yield part, np.asanyarray(image.dataobj[:, :, start:start + step]).reshape(part.shape)
        while stream.read(2 ** 20):  # gzip compares its checksum at the end of the file
            pass


def read_nifti(path, window, modality):
    """-> (uint8 [D,H,W], upright, its Grid, the window: (low, high) of the values that became black and white)."""
    grid = read_grid(path)
    image, sample = np.empty(grid.shape, np.uint8), [np.zeros(0, np.float32)]
    for _, slab in slabs(grid, image):
        sample.append(some(slab, image.size))
    window = choose_window(window, modality, np.concatenate(sample), path)
    for part, slab in slabs(grid, image):
        part[...] = gray(slab, window)
    return image, grid, window


def check_size(path, count, most):
    """InputError if a volume of `count` voxels has more than `most`."""
    if count > most:
        raise InputError(f"{path}: {count / 1e6:,.0f} million voxels, but here {most / 1e6:,.0f} million are the most; "
                         "cut out a part, or make it smaller")


def read_values(path, most):
    """A volume for a window that gray() is given later -> (float32 [D,H,W], upright, its Grid, its usual window).
    InputError if it has more than `most` voxels."""
    grid, sample = read_grid(path), []
    check_size(path, math.prod(grid.shape), most)
    values = np.empty(grid.shape, np.float32)
    for part, slab in slabs(grid, values):
        sample.append(some(slab, values.size))
        with np.errstate(over="ignore"):
            part[...] = slab
    return values, grid, usual_window(np.concatenate(sample), path)


def write_nifti(path, label, grid):
    """uint8 [D,H,W], upright, to a NIfTI file with its input's shape, affine and units."""
    stored, head = np.ascontiguousarray(along_file(label, grid)), grid.header
    if head is None:  # a DICOM series: millimetres in the scanner's space
        out = nib.Nifti1Image(stored, grid.affine)
        out.header.set_xyzt_units("mm")
        out.set_sform(grid.affine, 1)
        ways = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
        if np.allclose(ways.T @ ways, np.eye(3), atol=1e-4):  # a qform cannot say that slices are sheared
            out.set_qform(grid.affine, 1)
    else:  # whatever says where the voxels lie, number by number
        kind = nib.Nifti2Image if isinstance(head, nib.Nifti2Header) else nib.Nifti1Image
        out = kind(stored.reshape(head.get_data_shape()), None)
        for name in PLACE:
            out.header[name] = head[name]
        out = kind(out.dataobj, None, out.header)
    with whole(path) as file, gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0) as f:
        f.write(out.to_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# Values

def unit(values, window):
    """Numbers -> float32: the window's ends become 0 and 1; so does NaN, as its low end."""
    low, high = window
    with np.errstate(over="ignore"):  # beyond float32 is beyond any window
        values = values.astype(np.float32)
    return (np.nan_to_num(np.clip(values, low, high), nan=low) - low) / max(high - low, 1e-30)


def gray(values, window):
    """Numbers -> uint8: the window's ends become 0 and 255, NaN 0."""
    return np.rint(255 * unit(values, window)).astype(np.uint8)


def some(values, total):
    """Of a volume of `total` voxels, of which `values` are a part, about a million finite ones, evenly spaced."""
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return values[np.isfinite(values)][::total // 2 ** 20 | 1]


def are_hu(sample):
    """Whether values may be Hounsfield units: air or fat, and soft tissue, make up a thousandth each. What lies below
    air is padding, and what a few voxels hold says nothing."""
    sample = sample[sample > -1050]
    share = lambda low, high: np.mean((low <= sample) & (sample < high)) if len(sample) else 0
    return share(-1050, -30) > 1e-3 and share(-30, 300) > 1e-3


def choose_window(asked, modality, sample, path, of="ct"):
    """(low, high) of the values that become black and white: as asked for; of CT TransUNet's -125..275 HU; of others
    the 0.5th to 99.5th percentile of `sample`, finite values of the volume. of: the modality that the file names."""
    if not len(sample):
        raise InputError(f"{path}: holds nothing but NaN or padding; give another file")
    if asked:
        return tuple(asked)
    if modality == "ct" and of not in ("ct", ""):
        raise InputError(f"{path}: its Modality is {of}, not CT; give its --modality, or --window LOW HIGH")
    if modality == "ct" and not are_hu(sample):
        raise InputError(f"{path}: the values run from {sample.min():g} to {sample.max():g}, but are not HU (air "
                         "-1000, fat -100, soft tissue 0 to 100); give --window LOW HIGH, or another --modality")
    if modality == "ct":
        return WINDOWS["synapse"]
    low, high = np.percentile(sample, (0.5, 99.5)).tolist()
    if low == high:  # a little on a large background
        low, high = float(sample.min()), float(sample.max())
    if low == high:
        raise InputError(f"{path}: every value is {low:g}, so there is nothing to see; give another file")
    return low, high


def usual_window(sample, path, of="ct"):
    """choose_window() where nobody says what the volume is: CT if its values are HU and its file names nothing else."""
    return choose_window(None, "ct" if of in ("ct", "") and are_hu(sample) else "", sample, path, of)

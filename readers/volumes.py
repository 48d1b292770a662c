"""NIfTI and DICOM volumes: read upright, window by window of values, and written back onto their own grid.

In memory a volume is [z, y, x]: z from inferior to superior, y from anterior to posterior, x from the patient's right
to left, so that a slice is the upright radiological view with the patient's right on the image's left, however the file
stores it. That is decided by the file's header alone. Axes are permuted and flipped, voxels never resampled.
"""
import gzip
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from common import InputError, visible, whole

UPRIGHT = axcodes2ornt(("S", "P", "L"))  # where z, y and x run to
# HU that keep their contrast: TransUNet's; nnU-Net's and MIScnn's, percentiles within KiTS19's kidneys
WINDOWS = {"synapse": (-125, 275), "kits19": (-79, 304)}

# nibabel mends what little is wrong with a header and logs it; what it cannot mend becomes our one line
nib.imageglobals.logger.setLevel("CRITICAL")


@dataclass
class Grid:
    """Where a NIfTI file's voxels lie. `shape` and `spacing` are (z, y, x), of the volume that we write."""
    path: Path
    affine: np.ndarray  # [4, 4]: the file's indices -> mm to the right, anterior and superior
    axes: np.ndarray  # [3, 2]: for each of the file's axes, the patient's nearest one and the direction along it
    shape: tuple
    spacing: list  # mm
    tilt: float  # degrees, between the file's axes and the patient's


@contextmanager
def opened(path):
    """The nibabel image and the stream that it reads from; whatever fails within is taken for a damaged file."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            yield nib.Nifti1Image.from_stream(stream), stream
    except Exception as e:  # damaged bytes make gzip and nibabel raise nearly anything
        raise InputError(f"{path}: truncated or not NIfTI ({' '.join(str(e).split())}); copy it again") from None


def read_grid(path):
    """The Grid of a file, from its header."""
    with opened(path) as (image, _):
        stored, affine, kind = image.shape, image.affine, image.get_data_dtype().kind
        oriented = int(image.header["sform_code"]) or int(image.header["qform_code"])
    if len(stored) < 3 or set(stored[3:]) - {1} or min(stored) < 1 or kind not in "iuf":
        raise InputError(f"{path}: should be one volume of numbers, but is {image.get_data_dtype()} {list(stored)}; "
                         "store three axes")
    if not oriented:  # nibabel would guess, and a wrong guess swaps the kidneys
        raise InputError(f"{path}: the header does not say how the patient lies (sform_code and qform_code are 0); "
                         "take the challenge's own file, or set its sform")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not sizes.all() or abs(np.linalg.det(affine[:3, :3] / sizes)) < 0.01:
        raise InputError(f"{path}: the header's affine {affine[:3].round(3).tolist()} is singular; copy the file "
                         "again, or set its sform")
    axes = io_orientation(affine)
    along = [int(np.flatnonzero(axes[:, 0] == world)[0]) for world in UPRIGHT[:, 0]]
    cosines = [abs(affine[int(world), axis]) / sizes[axis] for axis, world in enumerate(axes[:, 0])]
    return Grid(path, affine, axes, tuple(stored[axis] for axis in along), [round(float(sizes[a]), 6) for a in along],
                float(np.degrees(np.arccos(min(1, *cosines)))))


def slabs(grid, volume):
    """Pairs (part of `volume` [D,H,W], the voxels of `grid`'s file that belong there), until all of it is covered.

    Only a few slices are ever held as the file stores them: KiTS19's largest case is 2 GB in float64.
    """
    stored = apply_orientation(volume, ornt_transform(UPRIGHT, grid.axes))  # a view of it along the file's axes
    step = max(1, 2 ** 22 // (stored.shape[0] * stored.shape[1]))
    with opened(grid.path) as (image, stream):
        for start in range(0, stored.shape[2], step):
            part = stored[:, :, start:start + step]
            yield part, np.asanyarray(image.dataobj[:, :, start:start + step]).reshape(part.shape)
        while stream.read(2 ** 20):  # gzip compares its checksum at the end of the file
            pass


def unit(values, window):
    """Numbers -> float32: the window's ends become 0 and 1."""
    low, high = window
    return (np.clip(values.astype(np.float32), low, high) - low) / max(high - low, 1e-6)


def gray(values, window):
    """Numbers -> uint8: the window's ends become 0 and 255."""
    return np.rint(255 * unit(values, window)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# One's own volumes

def choose_window(asked, modality, low, high, sample, path):
    """(low, high) of the values that become black and white: as asked for; of CT TransUNet's -125..275 HU; of others
    the 0.5th to 99.5th percentile of the values `sample`. low, high: of all values of the file at `path`."""
    if asked:
        return asked
    if modality == "ct" and low < 0 and high - low >= 100:
        return WINDOWS["synapse"]
    if modality == "ct":
        raise InputError(f"{path}: the values run from {low:g} to {high:g}, which are not HU; give --window LOW HIGH, "
                         "or another --modality")
    return tuple(np.percentile(sample, (0.5, 99.5)))


def read_nifti(path, window, modality):
    """-> (uint8 [D,H,W], upright, its Grid)."""
    grid = read_grid(path)
    image, low, high, sample = np.empty(grid.shape, np.uint8), np.inf, -np.inf, [np.zeros(0, np.float32)]
    for _, slab in slabs(grid, image) if not window else ():
        finite = slab[np.isfinite(slab)]
        if not len(finite):
            raise InputError(f"{path}: holds nothing but NaN; give another file")
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        sample.append(finite.ravel()[::101].astype(np.float32))
    window = choose_window(window, modality, low, high, np.concatenate(sample), path)
    for part, slab in slabs(grid, image):
        part[...] = gray(np.nan_to_num(slab, nan=window[0]), window)
    return image, grid


def read_dicom(folder, window, modality):
    """A folder with one DICOM series -> (uint8 [D,H,W], its Grid): slices in order of their place along the normal."""
    import pydicom
    slices = []
    for path in filter(Path.is_file, visible(folder)):
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
        raise InputError(f"{folder}: the series has slices at the same place, or misses some (gaps of {gaps.min():.3g} "
                         f"to {gaps.max():.3g} mm); give all slices of one series, once")
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
    window = choose_window(window, modality, float(values.min()), float(values.max()), values.ravel()[::101], folder)
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

"""DICOM: the slices of a series, a file of many frames or a single image, each one checked before its pixels are used.

Every frame gives one Slice, the record of what its attributes say. Slices that say where they lie make a volume, if
they lie on one regular grid; a slice that does not say so (ultrasound, radiographs, secondary captures) is an image.
"""
import logging
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder

from common import InputError, visible
from readers.volumes import (along_file, check_size, choose_window, first_bytes, gray, make_grid, some, upright,
                             usual_window)

# what lies beside slices and is none; DICOM files that hold no image tell it by their class
NOTES = (".txt", ".md", ".xml", ".json", ".pdf", ".csv", ".tsv", ".html", ".htm", ".log", ".ini", ".inf", ".db")
OF = {"CT": "ct", "MR": "mr", "PT": "pet", "US": "ultrasound", "CR": "x-ray", "DX": "x-ray", "MG": "x-ray",
      "XA": "x-ray", "RF": "x-ray", "ES": "endoscopy", "OP": "fundus", "DMS": "dermoscopy"}  # DICOM's Modality -> ours
UNSAID = ("", "CT", "OT", "SC")  # what an image may name itself where it is taken for CT: the last two are anything
# what all slices of a series share, and of how many it speaks where they do not
SHARED = {"PatientID": "patients", "StudyInstanceUID": "studies", "FrameOfReferenceUID": "frames of reference",
          "Modality": "modalities"}
CODECS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"

# what is wrong with a file and does not matter is not told; what does becomes our one line
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"pydicom|readers\.dicom")


@dataclass
class Slice:
    """One frame of a file, by its attributes; None where they are missing or empty."""
    path: Path
    frame: int  # of the file's frames, from 0
    frames: int
    series: str  # SeriesInstanceUID
    label: str  # SeriesNumber
    shared: tuple  # its values of SHARED
    description: str
    modality: str  # one of ours, or DICOM's
    shape: tuple  # rows, columns
    colour: bool
    position: np.ndarray | None  # [3] mm to the left, posterior and superior: the centre of the first pixel
    orientation: np.ndarray | None  # [6]: where a row runs to, where a column runs to
    spacing: np.ndarray | None  # [2] mm between rows, between columns
    thickness: float | None  # mm
    slope: float | None
    intercept: float | None
    lut: pydicom.Dataset | None  # in place of these two: whose ModalityLUTSequence it is
    dark: bool  # MONOCHROME1: the larger the number, the darker; CT and PET measure, however they are to be drawn
    padding: list | None  # stored numbers that stand for "outside of the image": one, or the first and the last
    bits: int  # of a stored number

    def __str__(self):
        return f"{self.path}, frame {self.frame}" if self.frames > 1 else str(self.path)


# ---------------------------------------------------------------------------------------------------------------------
# Files and attributes

def is_dicom(path):
    """By its bytes: DICM after a preamble, or, without one, the first element of a header in either byte order."""
    start = first_bytes(path)
    bare = start[:2] in (b"\2\0", b"\10\0") and start[3:4] == b"\0" or start[:2] == b"\0\10"
    return start[128:132] == b"DICM" or bare


def load(path, **options):
    """-> the Dataset of a file; InputError if it is damaged."""
    try:
        head = pydicom.dcmread(path, force=True, **options)
        if "TransferSyntaxUID" not in head.file_meta:  # written without a header: pydicom has found it out
            implicit, little = head.original_encoding
            head.file_meta.TransferSyntaxUID = (uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
                                                if little else uid.ExplicitVRBigEndian)
        return head
    except Exception as e:  # damaged bytes make pydicom raise nearly anything
        raise InputError(f"{path}: truncated or not DICOM ({' '.join(str(e).split())[:150]}); copy it again") from None


def is_image(head):
    """Whether a file's class is one of images: not a DICOMDIR, a report, a segmentation, a plan, a presentation. In
    doubt it is one, and said to be damaged: a file that is cut off may end amid its class."""
    kinds = {text(head, "SOPClassUID"), text(head.file_meta, "MediaStorageSOPClassUID")} - {""}
    if not kinds or any("Image Storage" in uid.UID(kind).name for kind in kinds):
        return True
    private = any(uid.UID(kind).name == kind for kind in kinds)  # or cut off; pydicom names all others
    return private and ("Rows" in head or not text(head, "SeriesInstanceUID"))


def text(head, name):
    """An attribute as a string, "" where there is none or none that can be read."""
    try:
        value = head.get(name)
        return str(value if value or value == 0 else "").strip()
    except Exception:
        return ""


def numbers(where, sources, name, count, good=lambda found: True):
    """The attribute of the first of the Datasets `sources` that has it, as float64 [count]; None if none has it.
    InputError if it is something else than `count` finite numbers, or not `good`. where: the file, in messages."""
    for source in sources:
        value, found = "unreadable", np.zeros(0)
        try:
            value = source.get(name)
            if value is None or isinstance(value, (str, pydicom.multival.MultiValue)) and not len(value):
                continue
            found = np.array(value, float).ravel()
        except Exception:  # pydicom raises as it turns bytes to numbers, on the first look at them
            pass
        if len(found) != count or not np.isfinite(found).all() or not good(found):
            raise InputError(f"{where}: its {name} is {' '.join(str(value).split())[:80]}, but should be {count} sound "
                             f"number{'s' * (count > 1)}; correct it, or take the file away")
        return found
    return None


def groups(head, frame, name):
    """Of an enhanced file, what the frame's and the shared functional groups hold under `name`, in this order."""
    found = []
    for sequence, item in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        try:
            found.append(head[sequence].value[item][name].value[0])
        except Exception:  # not there, or empty
            continue
    return found


def orthonormal(found):
    """Whether six numbers are two unit vectors at a right angle."""
    ways = found.reshape(2, 3)
    return np.allclose(ways @ ways.T, np.eye(2), atol=1e-3)


def read_slices(path):
    """-> [Slice] of a file's frames, from its header alone; [] of a file that is no image."""
    head = load(path, stop_before_pixels=True)
    if not is_image(head):
        return []
    one = lambda name, default, sources=(head,), good=lambda x: True: (
        default if (found := numbers(path, sources, name, 1, good)) is None else found.item())
    count = lambda name, default, most: int(one(name, default, good=lambda x: x % 1 == 0 and 1 <= x <= most))
    shape = count("Rows", 0, 2 ** 16), count("Columns", 0, 2 ** 16)
    if not all(shape):
        raise InputError(f"{path}: a DICOM file without Rows and Columns, cut off or no image; copy it again, or take "
                         "it away")
    frames, kind = count("NumberOfFrames", 1, 10 ** 5), text(head, "PhotometricInterpretation").upper()
    modality = OF.get(text(head, "Modality"), text(head, "Modality"))
    palette, samples = kind == "PALETTE COLOR", one("SamplesPerPixel", 1, good=lambda x: x in (1, 3))
    padding = [one(f"PixelPadding{name}", None, good=lambda x: abs(x) < 2 ** 32) for name in ("Value", "RangeLimit")]
    padding = None if padding[0] is None else [int(x) for x in padding if x is not None]
    found = []
    for frame in range(frames):
        where = f"{path}, frame {frame}" if frames > 1 else path
        place, turn, measures, scale = (groups(head, frame, f"{name}Sequence") for name in (
            "PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation"))
        place += [head] if frames == 1 else []  # one place for all frames would be none
        geometry = [numbers(where, place, "ImagePositionPatient", 3),
                    numbers(where, turn + [head], "ImageOrientationPatient", 6, orthonormal),
                    numbers(where, measures + [head], "PixelSpacing", 2, lambda found: found.min() > 0)]
        found.append(Slice(
            path, frame, frames, text(head, "SeriesInstanceUID"), text(head, "SeriesNumber"),
            tuple(text(head, name) for name in SHARED), text(head, "SeriesDescription"), modality, shape,
            palette or samples > 1, *geometry,
            one("SliceThickness", None, measures + [head]) or one("SpacingBetweenSlices", None, measures + [head]),
            one("RescaleSlope", None, scale + [head], lambda x: x != 0), one("RescaleIntercept", None, scale + [head]),
            head if text(head, "ModalityLUTSequence") else None,
            kind == "MONOCHROME1" and modality not in ("ct", "pet"), padding,
            8 if palette else count("BitsStored", 16, 64)))
    return found


def bits_below(head):
    """How many bits below a file's numbers mean nothing: by HighBit, a retired form, of which codecs know nothing."""
    high, syntax = head.get("HighBit"), head.file_meta.TransferSyntaxUID
    if not isinstance(high, int) or not head.BitsStored <= high < head.BitsAllocated:
        return 0
    return 0 if syntax.is_encapsulated and syntax != uid.RLELossless else high + 1 - head.BitsStored


def read_pixels(one):
    """-> a Slice's file as stored: numbers [frames, rows, columns], or colours uint [frames, rows, columns, 3]."""
    head, codec, name = load(one.path), None, "an unknown way"
    try:
        name = head.file_meta.TransferSyntaxUID.name
        codec = get_decoder(head.file_meta.TransferSyntaxUID)
    except Exception:  # video, and what is no transfer syntax
        pass
    try:
        below = bits_below(head)
        if below:
            head.BitsStored += below
        array = head.pixel_array >> below if below else head.pixel_array  # of YBR as RGB
        if text(head, "PhotometricInterpretation").upper() == "PALETTE COLOR":
            table = apply_color_lut(np.arange(2 ** 16, dtype=np.int32), head)  # some hold 8 bits and say that it is 16
            array = (apply_color_lut(array, head) >> (8 if table.max() > 255 else 0)).astype(np.uint8)
        return array.reshape(one.frames, *one.shape, *((3,) if one.colour else ()))
    except Exception as e:  # pydicom and its decoders raise nearly anything
        remedy, lacking = "copy it again, or store it uncompressed", codec and str(codec.missing_dependencies)
        if "PixelData" not in head:
            remedy = "the file is cut off; copy it again"
        elif codec and ("pylibjpeg-libjpeg" in lacking or "pylibjpeg-openjpeg" in lacking):
            remedy = f"{CODECS}, or copy it again"
        raise InputError(f"{one.path}: its pixels, stored as {name}, cannot be read "
                         f"({' '.join(str(e).split())[:150]}); {remedy}") from None


# ---------------------------------------------------------------------------------------------------------------------
# From slices to a volume

def find_slices(path, series):
    """-> [Slice] of the file or of the one series in the folder `path`; `series`, its number or UID, chooses one."""
    path = Path(path)
    found = []
    for file in filter(Path.is_file, visible(path)) if path.is_dir() else [path]:
        if is_dicom(file):
            found += read_slices(file)
        elif file.suffix.lower() not in NOTES:
            raise InputError(f"{file}: truncated or not DICOM; copy it again, or take it out of the folder")
    if not found:
        raise InputError(f"{path}: holds no DICOM image; give the folder of one series, or the file of an image")
    each = {}
    for one in found:  # the UID, and where it was taken away the number, tells series apart
        each.setdefault((one.series, one.label), []).append(one)
    chosen = [names for names in each if series in (None, *names)]
    if len(chosen) == 1:
        return each[chosen[0]]
    labels = Counter(label for _, label in each)
    there = ", ".join(f"{label if label and labels[label] == 1 else name} ({one[0].description} {one[0].modality}, "
                      f"{len(one)} of {one[0].shape[0]} x {one[0].shape[1]})" for (name, label), one in each.items())
    raise InputError((f"--series {series}: {path} has {'several' if chosen else 'none'} of this number or UID, but "
                      if series else f"{path}: holds {len(each)} series; choose one with --series: ") + there)


def alike(slices, name, values, tolerance):
    """InputError that names the slice furthest from the others, where `values`, a row for each, differ by more."""
    usual = np.median(values, axis=0)
    apart = np.abs(values - usual).max(axis=1)
    odd = int(apart.argmax())
    if apart[odd] > tolerance:
        raise InputError(f"{slices[odd]}: its {name} is {np.round(values[odd], 4).tolist()}, that of the other slices "
                         f"{np.round(usual, 4).tolist()}; give slices of one series, of one orientation and size")
    return usual


def check_shared(path, slices):
    """InputError if a series has slices of several patients and the like: their places have nothing in common."""
    for (name, several), values in zip(SHARED.items(), zip(*(s.shared for s in slices))):
        other = next((s for s, value in zip(slices, values) if value != values[0]), None)
        if other:
            raise InputError(f"{path}: has slices of several {several} in one series ({other.path.name} has another "
                             f"{name} than {slices[0].path.name}); give each a folder of its own")


def check_scale(slices):
    """InputError that names a slice whose numbers are not made HU as those of the others are: they would lie apart."""
    for name, values, usual in (("RescaleSlope", [s.slope for s in slices], 1),
                                ("RescaleIntercept", [s.intercept for s in slices], 0),
                                ("ModalityLUTSequence", [s.lut for s in slices], None)):
        lacking = [s for s, value in zip(slices, values) if value is None]
        if lacking and any(value not in (None, usual) for value in values):
            raise InputError(f"{lacking[0]}: has no {name}, while other slices of its series have one, so its values "
                             "would lie apart from theirs; give the series as the scanner sent it")


def fit(slices):
    """Slices, which are sorted along their normal -> affine [4,4]: (column, row, slice) -> mm to the right, anterior
    and superior. Positions p0 + k * step are fitted to all slices; a step beside the normal is a tilted gantry.

    InputError, naming the slice, for what does not fit within 0.1 mm or a quarter of the step.
    """
    alike(slices, "size (rows, columns)", np.array([s.shape for s in slices], float), 0)
    ways = alike(slices, "ImageOrientationPatient", np.stack([s.orientation for s in slices]), 1e-4)
    row, column = ways.reshape(2, 3)
    dy, dx = alike(slices, "PixelSpacing", np.stack([s.spacing for s in slices]), 1e-4)
    normal = np.cross(row, column)
    slices.sort(key=lambda s: normal @ s.position)
    places = np.stack([s.position for s in slices])
    start, step = places[0], normal * abs(slices[0].thickness or 1)
    if len(slices) > 1:
        number = np.arange(len(slices))
        step, start = np.polyfit(number, places, 1)
        off, length = np.linalg.norm(places - start - np.outer(number, step), axis=1), np.linalg.norm(step)
        if length < 1e-3 or off.max() > min(0.1, length / 4) or normal @ step < 0.7 * length:
            steps = np.diff(places, axis=0)
            usual = np.median(steps, axis=0)
            odd = int(np.linalg.norm(steps - usual, axis=1).argmax())
            along, beside = normal @ steps[odd], np.linalg.norm(steps[odd] - normal * (normal @ steps[odd]))
            raise InputError(
                f"{slices[odd + 1]}: lies {along:.4g} mm behind {slices[odd].path.name} and {beside:.4g} mm beside it, "
                f"while the slices of its series lie {normal @ usual:.4g} mm apart: one is missing, doubled or "
                "shifted; give all slices of one series, once")
    affine = np.eye(4)  # DICOM's axes run to the left and the back
    affine[:3] = np.stack([row * dx, column * dy, step, start], 1)
    affine[:2] *= -1
    return affine


def values_of(one, stored):
    """A Slice's stored numbers, gray -> float32: HU, or what else its attributes make of them; NaN for padding."""
    with np.errstate(all="ignore"):
        out = (one.slope or 1.0) * stored + (one.intercept or 0.0)
        if one.lut is not None:
            try:
                out = apply_modality_lut(stored, one.lut)
            except Exception as e:
                raise InputError(f"{one}: its ModalityLUTSequence is damaged ({e}); copy it again") from None
        out = out.astype(np.float32)
    if one.padding and stored.dtype.kind in "iu":
        values = 2 ** (8 * stored.itemsize)
        if all(-values // 2 <= x < values for x in one.padding):  # else no pixel has it
            ends = np.array(one.padding).astype(stored.dtype)  # some writers store -2000 as 63536
            out[(stored >= ends.min()) & (stored <= ends.max())] = np.nan
    return out


def shown(one, values, window):
    """float32 -> uint8, for people to see: black is the window's low end, and padding."""
    pixels = gray(values, window)
    return np.where(np.isnan(values), 0, 255 - pixels).astype(np.uint8) if one.dark else pixels


def read_image(one, window, modality):
    """A Slice that is no part of a volume -> (uint8 [H,W,3], None, its window or, of colours, None)."""
    if modality == "ct" and not window and one.modality.upper() not in UNSAID:  # deep ones: choose_window()
        raise InputError(f"{one.path}: its Modality is {one.modality}, not CT; give its --modality"
                         + ("" if one.colour else ", or --window LOW HIGH"))
    stored = read_pixels(one)[one.frame]
    top = 2 ** one.bits - 1
    if one.colour:
        return np.rint(np.clip(stored, 0, top) * (255 / top)).astype(np.uint8), None, None
    values = values_of(one, stored)
    if one.bits <= 8 and one.modality != "ct" and one.lut is None and not window:  # drawn as it is to be seen
        ends = np.array([0, top]) - (top + 1) // 2 * (stored.dtype.kind == "i")
        window = sorted((ends * (one.slope or 1.0) + (one.intercept or 0.0)).tolist())
    window = choose_window(window, modality, some(values, values.size), one.path, one.modality)
    return np.repeat(shown(one, values, window)[..., None], 3, 2), None, window


def read_volume(path, slices, affine, window, modality):
    """Slices in order -> (uint8 [D,H,W], upright, Grid, window)."""
    grid = make_grid(path, affine, (*slices[0].shape[::-1], len(slices)))
    grid.slices = tuple(slices)
    files = {file: read_pixels(s) for file, s in {s.path: s for s in slices}.items()}
    sample = [some(values_of(s, files[s.path][s.frame]), np.prod(grid.shape)) for s in slices]
    window = choose_window(window, modality, np.concatenate(sample), path, slices[0].modality)
    stored = np.stack([shown(s, values_of(s, files[s.path][s.frame]), window) for s in slices])
    return np.ascontiguousarray(upright(stored.transpose(2, 1, 0), grid)), grid, window


def read_values(path, slices, affine):
    """The same for a window that gray() is given later -> (float32 [D,H,W], NaN for padding, Grid, its usual window).
    Where the larger numbers are the darker ones, they change their sign."""
    grid, sample = make_grid(path, affine, (*slices[0].shape[::-1], len(slices))), []
    files = {file: read_pixels(s) for file, s in {s.path: s for s in slices}.items()}
    values = np.empty(grid.shape, np.float32)
    for s, part in zip(slices, along_file(values, grid).transpose(2, 1, 0)):
        part[...] = values_of(s, files[s.path][s.frame]) * (-1 if s.dark else 1)
        sample.append(some(part, values.size))
    return values, grid, usual_window(np.concatenate(sample), path, slices[0].modality)


def read_dicom(path, window, modality, series=None, frame=None, most=None, say=None):
    """The folder of a series or a file -> (uint8 [D,H,W], upright, its Grid, its window); or, of what does not say
    where it lies, (uint8 [H,W,3], None, its window or, of colours, None). frame: the one to take of a film. most: of a
    volume read_values() instead; InputError if there are more than so many pixels. The function
    `say` is told, line by line, what had to be assumed."""
    slices = find_slices(path, series)
    if most:
        check_size(path, sum(math.prod(s.shape) for s in slices), most)
    first = slices[0]
    if all(s.position is None for s in slices) and first.frames == len(slices) > 1:
        if frame is None or not 0 <= frame < len(slices):
            raise InputError(f"{path}: {len(slices)} frames that do not say where they lie; choose one with --slice, "
                             f"0 to {len(slices) - 1}")
        return read_image(slices[frame], window, modality)
    axial = first.orientation is None or np.abs(np.cross(*first.orientation.reshape(2, 3))).argmax() == 2
    if len(slices) == 1 and (first.colour or not axial or first.position is None and first.orientation is None):
        if frame:  # a single sagittal or coronal slice, too, is no stack of axial ones
            raise InputError(f"--slice {frame}: {path} is a single image; leave it out")
        return read_image(first, window, modality)
    for s in slices:
        lacking = [name for name, value in (("ImagePositionPatient", s.position), ("PixelSpacing", s.spacing),
                                            ("ImageOrientationPatient", s.orientation)) if value is None]
        if s.colour:
            raise InputError(f"{s}: in colour, and so no part of a volume; give a gray series, or this file alone")
        if lacking:
            raise InputError(f"{s}: has no {' and no '.join(lacking)}, so nobody knows where it lies; give the series "
                             "as the scanner sent it, or an image alone")
    check_shared(path, slices)
    check_scale(slices)
    if len(slices) == 1 and not first.thickness and say:
        say(f"{path}: has no SliceThickness; 1 mm is assumed for ml")
    if most:
        return read_values(Path(path), slices, fit(slices))
    return read_volume(Path(path), slices, fit(slices), window, modality)

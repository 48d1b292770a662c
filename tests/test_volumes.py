"""readers/volumes.py: labels lie on their input, whatever its axes; DICOM series; bad files get their one line."""
import itertools

import nibabel as nib
import numpy as np
import pytest

from conftest import fails
from readers.volumes import gray, read_dicom, read_nifti, write_nifti


def volume_file(path, axes, flips, oblique=0.0, codes=(1, 1)):
    """Random HU, written with these axes (the patient's) and flips; -> what is stored."""
    rng = np.random.default_rng(0)
    stored = rng.integers(-1000, 1000, (5, 7, 6)).astype(np.int16)
    affine = np.zeros((4, 4))
    for axis, (world, flip, size) in enumerate(zip(axes, flips, (1.5, 0.8, 3.0))):
        affine[world, axis] = size * (-1 if flip else 1)
    c, s = np.cos(oblique), np.sin(oblique)
    affine = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine
    affine[:, 3] = 10, -20, 30, 1
    image = nib.Nifti1Image(stored, affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return stored


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_labels_lie_on_their_input(axes, ending, tmp_path):
    """For all 48 ways to store a volume, upright or oblique: shape and affine equal, voxel upon voxel."""
    for n, flips in enumerate(itertools.product((False, True), repeat=3)):
        path = tmp_path / f"{n}{ending}"
        stored = volume_file(path, axes, flips, oblique=0.2 * (n % 2), codes=((1, 1), (2, 0), (0, 1))[n % 3])
        volume, grid = read_nifti(path, (-200, 200), "ct")
        write_nifti(tmp_path / "label.nii.gz", (volume > 127).astype(np.uint8), grid)
        before, after = nib.load(path), nib.load(tmp_path / "label.nii.gz")
        assert after.shape == before.shape and np.asarray(after.dataobj).dtype == np.uint8
        np.testing.assert_allclose(after.affine, before.affine, atol=1e-4)
        assert after.header.get_zooms() == pytest.approx(before.header.get_zooms(), abs=1e-4)
        assert np.array_equal(np.asarray(after.dataobj), stored > -0.4)
        assert after.header.get_xyzt_units() == before.header.get_xyzt_units()
    # upright: the first slice is the lowest one, its first row the patient's front, its first column the right
    stored = volume_file(tmp_path / "u.nii", (0, 1, 2), (True, True, False))  # LPS
    volume, _ = read_nifti(tmp_path / "u.nii", (-1000, 1000), "ct")
    assert np.array_equal(volume, gray(stored.transpose(2, 1, 0), (-1000, 1000)))


def dicom_series(folder, stored, order, **change):
    """stored int16 [z,y,x], HU, as DICOM slices in a shuffled order of files."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
    series = generate_uid()
    for n, z in enumerate(order):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID, series
        d.Rows, d.Columns = stored.shape[1:]
        d.ImageOrientationPatient, d.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-5.0, -7.0, 100 + 2.5 * z]
        d.PixelSpacing, d.SliceThickness = [0.7, 0.9], 2.5  # rows, columns
        d.RescaleSlope, d.RescaleIntercept = 2, -1024
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated = d.BitsStored = 16
        d.HighBit, d.PixelRepresentation = 15, 0
        d.PixelData = ((stored[z].astype(int) + 1024) // 2).astype(np.uint16).tobytes()
        for name, value in change.items():
            setattr(d, name, value(z) if callable(value) else value)
        d.save_as(folder / f"{n}.dcm", enforce_file_format=True)
    (folder / "note.txt").write_text("not DICOM")


def test_a_dicom_series(tmp_path):
    stored = 2 * np.random.default_rng(0).integers(-500, 500, (4, 5, 6))
    dicom_series(tmp_path, stored, [2, 0, 3, 1])
    volume, grid = read_dicom(tmp_path, (-1000, 1000), "ct")
    assert np.array_equal(volume, gray(stored, (-1000, 1000)))  # already upright
    assert grid.affine.tolist() == [[-0.9, 0, 0, 5], [0, -0.7, 0, 7], [0, 0, 2.5, 100], [0, 0, 0, 1]]
    write_nifti(tmp_path / "label.nii.gz", (volume > 127).astype(np.uint8), grid)
    after = nib.load(tmp_path / "label.nii.gz")
    assert np.array_equal(np.asarray(after.dataobj), (stored >= 0).transpose(2, 1, 0))
    np.testing.assert_allclose(after.affine, grid.affine)


@pytest.mark.parametrize("change,named", [
    (dict(ImagePositionPatient=lambda z: [0, 0, 2.5 * min(z, 2)]), "same place"),
    (dict(ImagePositionPatient=lambda z: [0, 0, 2.5 * z + 40 * (z == 3)]), "misses"),
    (dict(SeriesInstanceUID=lambda z: f"1.2.{z % 2}"), "2 series"), (dict(PixelData=b"12"), "cannot be read")])
def test_a_bad_series_is_named(change, named, tmp_path):
    dicom_series(tmp_path, np.zeros((4, 5, 6), int), range(4), **change)
    fails(lambda: read_dicom(tmp_path, (-1000, 1000), "ct"), tmp_path, named)

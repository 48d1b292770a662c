"""readers/volumes.py: labels lie on their input, whatever its axes, units and packing; bad files get their one line."""
import bz2
import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common import InputError
from conftest import fails
from readers.volumes import are_hu, gray, read_grid, read_nifti, write_nifti


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
        volume, grid, _ = read_nifti(path, (-200, 200), "ct")
        write_nifti(tmp_path / "label.nii.gz", (volume > 127).astype(np.uint8), grid)
        before, after = nib.load(path), nib.load(tmp_path / "label.nii.gz")
        assert after.shape == before.shape and np.asarray(after.dataobj).dtype == np.uint8
        np.testing.assert_allclose(after.affine, before.affine, atol=1e-4)
        assert after.header.get_zooms() == pytest.approx(before.header.get_zooms(), abs=1e-4)
        assert np.array_equal(np.asarray(after.dataobj), stored > -0.4)
        assert after.header.get_xyzt_units() == before.header.get_xyzt_units()
    # upright: the first slice is the lowest one, its first row the patient's front, its first column the right
    stored = volume_file(tmp_path / "u.nii", (0, 1, 2), (True, True, False))  # LPS
    volume, _, _ = read_nifti(tmp_path / "u.nii", (-1000, 1000), "ct")
    assert np.array_equal(volume, gray(stored.transpose(2, 1, 0), (-1000, 1000)))


def test_units(tmp_path):
    """Metres and micrometres become millimetres; a label keeps the numbers and the units of its input."""
    rng = np.random.default_rng(0)
    stored, affine = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16), np.diag([0.7, 0.8, 3.0, 1])
    for unit, factor in (("mm", 1), ("micron", 1000), ("meter", 0.001), ("unknown", 1)):
        image = nib.Nifti1Image(stored, np.diag([*(np.diag(affine)[:3] * factor), 1]))
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / "a.nii")
        volume, grid, _ = read_nifti(tmp_path / "a.nii", None, "ct")
        assert grid.spacing == pytest.approx([3, 0.8, 0.7], abs=1e-5)
        write_nifti(tmp_path / "label.nii.gz", volume, grid)
        label = nib.load(tmp_path / "label.nii.gz")
        assert label.header.get_xyzt_units() == image.header.get_xyzt_units()
        assert np.allclose(label.affine, image.affine, rtol=1e-6) and label.shape == image.shape
    image.header.set_xyzt_units("micron")  # of 0.7 nanometres
    nib.save(image, tmp_path / "a.nii")
    fails(lambda: read_grid(tmp_path / "a.nii"), tmp_path / "a.nii", "units")


def test_formats_are_told_by_their_bytes(tmp_path):
    """NIfTI-2, a file that is packed and does not say so, or says so and is not, gives the same; others are named."""
    stored = volume_file(tmp_path / "a.nii", (2, 0, 1), (True, False, True))
    truth = read_nifti(tmp_path / "a.nii", None, "ct")
    plain = (tmp_path / "a.nii").read_bytes()
    second = nib.Nifti2Image.from_image(nib.load(tmp_path / "a.nii"))
    big = nib.Nifti1Image(stored, truth[1].affine, nib.Nifti1Header(endianness=">"))
    for name, content in (("plain.nii.gz", plain), ("packed.nii", gzip.compress(plain)), ("b.nii", bz2.compress(plain)),
                          ("scan", plain), ("two.nii.gz", gzip.compress(second.to_bytes())),
                          ("big.nii", big.to_bytes())):
        (tmp_path / name).write_bytes(content)
        volume, grid, _ = read_nifti(tmp_path / name, None, "ct")
        assert np.array_equal(volume, truth[0]) and np.allclose(grid.affine, truth[1].affine)
        write_nifti(tmp_path / "label.nii.gz", volume, grid)
        label = nib.load(tmp_path / "label.nii.gz")
        assert np.allclose(label.affine, truth[1].affine) and label.shape == stored.shape
        assert isinstance(label.header, nib.Nifti2Header) == (name == "two.nii.gz")
    pair = bytearray(plain)
    pair[344:348] = b"ni1\0"
    analyze = bytearray(plain)
    analyze[344:348] = bytes(4)
    for content, says in ((b"\x89PNG\r\n" + bytes(400), "PNG"), (b"<!DOCTYPE html>" * 40, "web page"), (pair, "pair"),
                          (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7", "git lfs pull"),
                          (gzip.compress(bytes(128) + b"DICM" + bytes(500)), "DICOM"), (analyze, "Analyze"),
                          (plain[:400], "truncated"), (gzip.compress(plain)[:-9], "truncated")):
        (tmp_path / "x.nii.gz").write_bytes(content)
        fails(lambda: read_nifti(tmp_path / "x.nii.gz", None, "ct"), tmp_path / "x.nii.gz", says)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind, magic, pair, size", [(nib.Nifti1Image, 344, b"ni1\0", 348),
                                                     (nib.Nifti2Image, 4, b"ni2\0", 540)])
def test_what_says_what_a_file_is_stands_elsewhere_in_each_version(kind, magic, pair, size, order, tmp_path):
    """Both versions in both byte orders, packed and not, with every code of the qform and without one: read. A header
    without its voxels is named, and one that does not say what it is, is no volume."""
    stored = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    affine, seen = np.diag([-0.7, -0.8, 3.0, 1]), []
    path = tmp_path / "x.nii.gz"
    for qform, sform in itertools.product(range(5), range(5)):
        image = kind(stored, affine, kind.header_class(endianness=order))
        image.set_qform(affine, qform), image.set_sform(affine, sform)
        for pack in (bytes, gzip.compress):
            path.write_bytes(pack(image.to_bytes()))
            if not qform and not sform:
                fails(lambda: read_nifti(path, None, "ct"), path, "how the patient lies")
                continue
            volume, grid, _ = read_nifti(path, (-1000, 1000), "ct")
            assert np.array_equal(volume, gray(stored.transpose(2, 1, 0), (-1000, 1000)))
            assert np.allclose(grid.affine, affine, atol=1e-6) and isinstance(grid.header, kind.header_class)
            seen.append(volume)
    plain = bytearray(image.to_bytes())
    assert len(seen) == 48 and plain[:4] == size.to_bytes(4, {"<": "little", ">": "big"}[order])
    for start, words in ((pair, "NIfTI pair"), (bytes(4), "Analyze" if size == 348 else "not NIfTI")):
        plain[magic:magic + 4] = start
        for pack in (bytes, gzip.compress):
            path.write_bytes(pack(plain))
            fails(lambda: read_nifti(path, None, "ct"), path, words)
    nib.save(kind(stored, affine), path)  # as nibabel writes it if nothing else is said
    assert read_grid(path).shape == (6, 5, 4)


def test_what_counts_as_missing_is_counted_over_the_volume(tmp_path):
    values = np.full((64, 64, 12), np.nan, np.float32)
    path = tmp_path / "v.nii"

    def read(values, window=None, modality="ct"):
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
        return read_nifti(path, window, modality)
    for window in (None, (-125, 275)):
        fails(lambda: read(values, window), path, "nothing but NaN")
    values[30:34, 30:34, 7:9] = np.linspace(-1000, 300, 32).reshape(4, 4, 2)
    volume, _, window = read(values)
    assert window == (-125, 275) and np.count_nonzero(volume) == (values > -124).sum()
    values[0, 0, 0], values[0, 0, 1] = np.inf, -np.inf
    volume, _, _ = read(values)
    assert volume[0, -1, -1] == 255 and volume[1, -1, -1] == 0


def test_windows(tmp_path):
    """They rest on what most of the volume holds, not on its extremes."""
    rng, path = np.random.default_rng(0), tmp_path / "v.nii"

    def read(values, modality="mr", window=None):
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
        return read_nifti(path, window, modality)[2]
    raw = rng.integers(900, 1200, (32, 32, 32)).astype(np.int16)  # a CT scanner's numbers, HU + 1024
    fails(lambda: read(raw, "ct"), path, "not HU", "--window")
    raw[0, 0, :9], raw[1, :20] = -900, -2000  # some outliers, and padding
    fails(lambda: read(raw, "ct"), path, "not HU", "--window")
    assert read(raw - 1024, "ct") == (-125, 275) and read(raw, "ct", (900, 1300)) == (900, 1300)
    image = rng.normal(500, 100, (32, 32, 32)).astype(np.float32)
    image[3, 3, 3] = 1e30
    low, high = read(image)
    assert 200 < low < 300 < 700 < high < 800
    tiny = np.linspace(0, 3e-9, 4096, dtype=np.float32).reshape(16, 16, 16)  # diffusion in m2/s
    assert abs(gray(tiny, read(tiny)).mean() - 127.5) < 1
    fails(lambda: read(np.full((8, 8, 8), 7, np.int16)), path, "every value is 7")
    small = np.zeros((64, 64, 64), np.int16)
    small[5:9, 5:9, 5:9] = 300
    assert read(small) == (0, 300)
    assert not are_hu(np.zeros(0)) and not are_hu(np.full(9, -1000.0)) and are_hu(np.array([-1000.0, 40.0]))


def test_files_of_nibabel(tmp_path):
    """Its own odd NIfTI files: read onto their grid, as nibabel itself sees it, or refused in a line."""
    folder = Path(pytest.importorskip("nibabel.testing").data_path)
    said = {}
    for path in sorted([*folder.glob("*.nii"), *folder.glob("*.nii.gz")]):
        try:
            volume, grid, _ = read_nifti(path, None, "mr")
        except InputError as e:
            said[path.name] = str(e)
            continue
        write_nifti(tmp_path / "label.nii.gz", volume, grid)
        before, label = nib.load(path), nib.load(tmp_path / "label.nii.gz")
        assert label.shape == before.shape and np.allclose(label.affine, before.affine, atol=1e-4), path
        values = np.nan_to_num(np.asarray(before.dataobj, float).ravel(), nan=-np.inf)
        shown = np.asarray(label.dataobj).ravel()
        assert (np.diff(shown[np.argsort(values)].astype(int)) >= 0).all(), path  # voxel upon voxel
    assert all("one volume" in line or "how the patient lies" in line for line in said.values()), said


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_any_byte_of_a_header_may_be_wrong(kind, tmp_path):
    """One line, or a label that lies, as nibabel sees both, where the file says that its voxels lie."""
    rng, read = np.random.default_rng(0), 0
    stored = volume_file(tmp_path / "a.nii", (1, 0, 2), (True, False, False), oblique=0.3)
    good = kind.from_image(nib.load(tmp_path / "a.nii")).to_bytes()
    for n in range(400):
        content, path = bytearray(good), tmp_path / "x.nii"
        for place in rng.integers(0, kind.header_class.sizeof_hdr + 4, 1 + n % 3):
            content[place] = rng.choice([0, 1, 255, rng.integers(256)])
        path.write_bytes(content)
        try:
            volume, grid, _ = read_nifti(path, (-1000, 1000), "ct")
        except InputError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            continue
        except MemoryError:  # a line of predict.py's
            continue
        write_nifti(tmp_path / "label.nii.gz", volume, grid)
        before, label = nib.load(path), nib.load(tmp_path / "label.nii.gz")
        assert label.shape == before.shape and np.allclose(label.affine, before.affine, rtol=1e-5, atol=1e-4)
        assert label.header["xyzt_units"] == before.header["xyzt_units"]
        assert np.array_equal(np.asarray(label.dataobj), gray(np.asarray(before.dataobj), (-1000, 1000)))
        read += 1
    assert read > 100 and stored.size

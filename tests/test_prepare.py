"""readers/prepare.py: every orientation gives the same arrays, what is stopped goes on, bad files get one line."""
import gzip
import importlib.util
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from common import InputError
from conftest import fails
from readers.kits19 import KiTS19
from readers.synapse import TEST_CASES, Synapse

nib = pytest.importorskip("nibabel", reason="the challenges' volumes are NIfTI")
h5py = pytest.importorskip("h5py", reason="the Synapse volumes are HDF5")
from readers.prepare import prepare, read_image  # noqa: E402
from readers.volumes import read_grid  # noqa: E402

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)))
SCANNER = ((2, 1, 0), (False, False, False))  # x, y, z, as scanners store them
# BTCV's organs by name, as its own page numbers them, and the eight of synapse.ORGANS
BTCV = {1: "spleen", 2: "right kidney", 3: "left kidney", 4: "gallbladder", 5: "esophagus", 6: "liver", 7: "stomach",
        8: "aorta", 9: "inferior vena cava", 10: "portal vein", 11: "pancreas", 12: "right adrenal gland",
        13: "left adrenal gland"}


def random_case(rng, labels, shape=None):
    """image int16 [z,y,x] in HU and label uint8, in blocks, so that slices hold something; spacing (z, y, x)."""
    spacing = [float(s) for s in rng.uniform(0.5, 5, 3).round(3)]
    shape = shape or tuple(rng.integers(4, 12, 3))
    label = rng.integers(0, labels, [-(-n // 3) for n in shape]).astype(np.uint8)
    label = np.kron(label, np.ones((3, 3, 3), np.uint8))[tuple(slice(n) for n in shape)]
    return rng.integers(-1000, 1000, shape).astype(np.int16), label, spacing


def as_stored(volume, spacing, orientation):
    """[z,y,x] -> (the array of a file with these axes, its affine), by the definition of NIfTI's space alone: mm to the
    right, to the front and upwards, while our z, y and x run upwards, to the back and to the left."""
    axes, flips = orientation
    ways = np.array([[0, 0, 1], [0, -1, 0], [-1, 0, 0]])
    affine = np.eye(4)
    for axis, (source, flip) in enumerate(zip(axes, flips)):
        affine[:3, axis] = ways[source] * spacing[source] * (-1 if flip else 1)
    affine[:3, 3] = 10, -20, 30
    return np.flip(volume.transpose(axes), [axis for axis in range(3) if flips[axis]]), affine


def write_nifti(path, volume, spacing, orientation=SCANNER, dtype=None, affine=None, code="sform"):
    path.parent.mkdir(parents=True, exist_ok=True)
    array, own = as_stored(volume, spacing, orientation)
    image = nib.Nifti1Image(array.astype(dtype or array.dtype), None)  # with an affine nibabel would refuse bad ones
    if code == "qform":
        image.header.set_qform(own if affine is None else affine, 1)
    else:
        image.header.set_sform(own if affine is None else affine, int(code == "sform"))
    nib.save(image, path)
    return path


def raw_synapse(root, numbers=("0001", "0005", "0006"), shape=(5, 6, 7), seed=0):
    """A little challenge folder. -> {number: (image, label, spacing)}."""
    truth = {}
    for number in numbers:
        truth[number] = random_case(np.random.default_rng([seed, int(number)]), 14, shape)
        write_nifti(root / f"img/img{number}.nii.gz", truth[number][0], truth[number][2])
        write_nifti(root / f"label/label{number}.nii.gz", truth[number][1], truth[number][2])
    return truth


def raw_kits19(root, numbers=(0, 1, 2), shape=(5, 6, 7), seed=0):
    """As the challenge stores it: slices first, from above."""
    truth = {}
    for n in numbers:
        truth[n] = random_case(np.random.default_rng([seed, n]), 3, shape)
        for name, volume in (("imaging", truth[n][0]), ("segmentation", truth[n][1])):
            write_nifti(root / f"case_{n:05d}/{name}.nii.gz", volume, truth[n][2], ((0, 1, 2), (True, False, False)))
    return truth


def eight(label):
    """BTCV's ids -> the Synapse benchmark's, by the organs' names."""
    ids = {name: i for i, name in enumerate(Synapse.classes, 1)}
    return np.vectorize(lambda i: ids.get(BTCV.get(i), 0))(label)


def check_synapse(out, truth):
    """Everything in `out` is what it should be."""
    for number, (image, label, spacing) in truth.items():
        if number in TEST_CASES:
            with h5py.File(out / f"test_vol_h5/case{number}.npy.h5") as f:
                got = f["image"][:], f["label"][:]
        else:
            paths = sorted((out / "train_npz").glob(f"case{number}_slice*.npz"))
            slices = [np.load(path) for path in paths]
            got = tuple(np.stack([s[key] for s in slices]) for key in ("image", "label"))
            assert [path.name[-7:-4] for path in paths] == [f"{i:03d}" for i in range(len(image))]
        assert got[0].dtype == np.float32 and got[1].dtype == np.uint8
        assert got[0].shape == image.shape and np.allclose(got[0], (image.clip(-125, 275) + 125) / 400, atol=1e-6)
        assert np.array_equal(got[1], eight(label))
        assert np.allclose(json.loads((out / "spacing.json").read_text())[f"case{number}"], spacing, atol=1e-4)
    assert set(json.loads((out / "spacing.json").read_text())) == {f"case{number}" for number in truth}
    lists = {kind: (out / f"lists_Synapse/{kind}.txt").read_text().split() for kind in ("train", "test_vol")
             if (out / f"lists_Synapse/{kind}.txt").is_file()}
    assert lists.get("test_vol", []) == sorted(f"case{number}" for number in truth if number in TEST_CASES)
    assert lists.get("train", []) == sorted(f"case{number}_slice{i:03d}" for number in truth if number not in TEST_CASES
                                            for i in range(len(truth[number][0])))
    assert not list(out.rglob("*.part"))


def check_kits19(out, truth):
    for n, (image, label, spacing) in truth.items():
        folder = out / f"case_{n:05d}"
        got, mask = np.load(folder / "image.npy"), np.load(folder / "label.npy")
        record = json.loads((folder / "case.json").read_text())
        assert got.dtype == mask.dtype == np.uint8 and np.array_equal(mask, label)
        assert np.abs(got - (image.clip(-79, 304) + 79.0) / 383 * 255).max() < 0.501
        assert record["shape"] == list(image.shape) and np.allclose(record["spacing"], spacing, atol=1e-4)
        for axis, letter in enumerate("zyx"):
            assert record["areas"][letter] == [
                [(plane == id).sum() for plane in np.moveaxis(label, axis, 0)] for id in (1, 2)]
    assert not list(out.rglob("*.part"))


def tree(folder):
    """{path: contents}; of HDF5, which holds times, the arrays."""
    def content(path):
        if path.suffix == ".h5":
            with h5py.File(path) as f:
                return f["image"][:].tobytes() + f["label"][:].tobytes()
        if path.suffix == ".npz":
            with np.load(path) as f:
                return f["image"].tobytes() + f["label"].tobytes()
        return path.read_bytes()
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# --- orientation

def test_every_orientation(tmp_path, capsys):
    """48 ways to store a volume, in all sorts of files, give the same arrays."""
    rng, synapse, kits = np.random.default_rng(0), {}, {}
    one, two = random_case(rng, 14), random_case(rng, 3)
    dtypes = (np.int16, np.int32, np.float32, np.float64, ">i2")
    for n, orientation in enumerate(ORIENTATIONS):
        how = dict(orientation=orientation, code=("sform", "qform")[n % 2])
        suffix = (".nii.gz", ".nii")[n // 2 % 2]
        number = TEST_CASES[n] if n < 6 else f"{100 + n:04d}"
        synapse[number], kits[n] = one, two
        for stem, volume in ((f"synapse/img/img{number}", one[0]), (f"synapse/label/label{number}", one[1])):
            write_nifti(tmp_path / (stem + suffix), volume, one[2], dtype=rng.choice(dtypes), **how)
        for stem, volume in (("imaging", two[0]), ("segmentation", two[1])):
            write_nifti(tmp_path / f"kits19/case_{n:05d}" / (stem + suffix), volume, two[2], dtype=rng.choice(dtypes),
                        **how)
    for name in ("synapse", "kits19"):
        prepare(name, tmp_path / name, tmp_path / f"{name}-out")
    check_synapse(tmp_path / "synapse-out", synapse)
    check_kits19(tmp_path / "kits19-out", kits)
    assert "obliquely" not in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(4))
def test_oblique_volumes_go_to_their_nearest_axes(tmp_path, capsys, seed):
    rng = np.random.default_rng(seed)
    truth = {"0005": random_case(rng, 14), "0006": random_case(rng, 14)}
    degrees = {"0005": 0.3, "0006": float(rng.uniform(5, 40))}
    for number, (image, label, spacing) in truth.items():
        orientation = ORIENTATIONS[rng.integers(48)]
        _, affine = as_stored(image, spacing, orientation)
        c, s = np.cos(np.deg2rad(degrees[number])), np.sin(np.deg2rad(degrees[number]))
        a, b = rng.permutation(3)[:2]  # turned in the plane of these two
        turn = np.eye(4)
        turn[[a, b, a, b], [a, b, b, a]] = c, c, -s, s
        for kind, volume in (("img", image), ("label", label)):
            write_nifti(tmp_path / f"raw/{kind}/{kind}{number}.nii.gz", volume, spacing, orientation,
                        affine=turn @ affine)
    prepare("synapse", tmp_path / "raw", tmp_path / "out")
    check_synapse(tmp_path / "out", truth)
    assert f"; 1 lie obliquely, by up to {degrees['0006']:.0f} degrees" in capsys.readouterr().out


def test_slabs_scaled_values_and_a_fourth_axis(tmp_path):
    """A volume of several slabs; HU stored with an offset; a last axis of length 1."""
    rng, orientation = np.random.default_rng(0), ((1, 2, 0), (True, False, True))
    image, label, spacing = random_case(rng, 3, (5, 1000, 1100))  # 2^22 voxels are a slab
    stored, affine = as_stored(image, spacing, orientation)
    header = nib.Nifti1Image(stored[..., None], affine).header
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = 1, -1024, 352
    path = tmp_path / "case_00000/imaging.nii.gz"
    path.parent.mkdir()
    with gzip.open(path, "wb", compresslevel=1) as f:  # nibabel would choose a slope of its own
        f.write(header.binaryblock + b"\0" * 4 + (stored + 1024).astype("<i2").tobytes(order="F"))
    assert nib.load(path).shape == (1000, 1100, 5, 1) and nib.load(path).dataobj.inter == -1024
    write_nifti(tmp_path / "case_00000/segmentation.nii", label, spacing, orientation)
    prepare("kits19", tmp_path, tmp_path / "out")
    check_kits19(tmp_path / "out", {0: (image, label, spacing)})


# --- what is written opens in the readers

@pytest.mark.parametrize("folder", ["", "Training", "RawData/Training"])
def test_synapse_is_read(tmp_path, capsys, folder):
    truth = raw_synapse(tmp_path / "raw" / folder, ("0001", "0005", "0006", "0010", "0025"))
    (tmp_path / "raw" / folder / "img/._img0005.nii.gz").touch()  # what macOS leaves behind
    prepare("synapse", tmp_path / "raw", tmp_path / "out")
    check_synapse(tmp_path / "out", truth)
    for split, numbers in (("train", ("0005", "0006")), ("val", ("0010",)), ("test", ("0001", "0025"))):
        source = Synapse(tmp_path / "out", split)
        expected = [(f"case{number}", i) for number in numbers for i in range(5)]
        assert [source.key(i) for i in range(len(source))] == [f"{case}_slice{i:03d}" for case, i in expected]
        for row, (case, i) in enumerate(expected):
            picture, (image, label, _) = source.read(row), truth[case[4:]]
            assert np.allclose(picture.image, (image[i].clip(-125, 275) + 125) / 400, atol=1e-6)
            for target, mask in zip(picture.targets, picture.masks):
                assert np.array_equal(mask, np.isin(label[i], [id for id in BTCV if BTCV[id] == target]))
    line = capsys.readouterr().out.strip()
    assert "\n" not in line and "3 case(s) to train on, 15 slices, and 2 of the 12 test cases" in line
    assert line.endswith(f"next: python train.py --dataset synapse --data {tmp_path / 'out'}")


@pytest.mark.parametrize("folder", ["", "data"])
def test_kits19_is_read(tmp_path, capsys, folder):
    truth = raw_kits19(tmp_path / "raw" / folder, range(5))
    shutil.copytree(tmp_path / "raw" / folder / "case_00000", tmp_path / "raw" / folder / "case_00210")
    (tmp_path / "raw" / folder / "case_00210/segmentation.nii.gz").unlink()
    (tmp_path / "raw" / folder / "case_00211").mkdir()
    prepare("kits19", tmp_path / "raw", tmp_path / "out")
    check_kits19(tmp_path / "out", truth)
    rows = 0
    for split in ("train", "val", "test"):
        source = KiTS19(tmp_path / "out", split, axes="z")
        for i in range(len(source)):
            image, label, _ = truth[int(source.case(i)[-5:])]
            z = int(source.key(i)[-4:])
            assert np.abs(source.read(i).image - (image[z].clip(-79, 304) + 79.0) / 383 * 255).max() < 0.501
            assert source.read(i).masks.sum() == (label[z] > 0).sum()
        rows += len(source)
        source = KiTS19(tmp_path / "out", split)
        assert all(len(source.read(i).targets) for i in range(len(source)))  # the areas say which slices hold something
    assert rows == 25
    line = capsys.readouterr().out.strip()
    assert "\n" not in line and "5 case(s); 1 without a segmentation" in line
    assert line.endswith(f"next: python train.py --dataset kits19 --data {tmp_path / 'out'}")


def test_real_cases(tmp_path, real_data, monkeypatch):
    """Real CT through NIfTI gives what the same cases give directly; 0010 also under the number of a test case."""
    spec = importlib.util.spec_from_file_location("layout", real_data / "layout.py")
    layout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layout)
    monkeypatch.setattr(layout, "cases", lambda: ["0010", "0030"])
    layout.synapse(tmp_path / "direct", ["0010"])
    subprocess.run([sys.executable, real_data / "layout.py", "btcv-raw", tmp_path / "raw", "--cases", "0010", "0030"],
                   check=True)
    for kind in ("img", "label"):
        (tmp_path / f"raw/{kind}/{kind}0010.nii.gz").rename(tmp_path / f"raw/{kind}/{kind}0001.nii.gz")
    prepare("synapse", tmp_path / "raw", tmp_path / "out")
    names = [path.name for path in sorted((tmp_path / "direct/train_npz").iterdir())]
    assert names == [path.name for path in sorted((tmp_path / "out/train_npz").iterdir())] and len(names) > 50
    with h5py.File(tmp_path / "direct/test_vol_h5/case0010.npy.h5") as a, \
            h5py.File(tmp_path / "out/test_vol_h5/case0001.npy.h5") as b:
        pairs = [({key: a[key][:] for key in a}, {key: b[key][:] for key in b})]
    pairs += [tuple(np.load(tmp_path / place / "train_npz" / name) for place in ("direct", "out")) for name in names]
    for direct, ours in pairs:
        assert np.array_equal(direct["label"], ours["label"])
        assert np.abs(direct["image"] - ours["image"]).max() <= 0.5 / 400 + 1e-6  # half a HU
    spacing = json.loads((tmp_path / "out/spacing.json").read_text())["case0030"]
    assert np.allclose(spacing[::-1], json.loads((real_data / "synapse/case0030_spacing.json").read_text()), atol=1e-4)


# --- resuming

def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".npz", ".h5", ".npy")}


def test_complete_cases_are_skipped(tmp_path):
    raw_synapse(tmp_path / "synapse")
    raw_kits19(tmp_path / "kits19")
    for name, removed, redone in (
            ("synapse", "train_npz/case0005_slice002.npz", "train_npz/case0005_*"),
            ("synapse", "test_vol_h5/case0001.npy.h5", "test_vol_h5/case0001*"),
            ("kits19", "case_00001/label.npy", "case_00001/*.npy"),
            ("kits19", "case_00002/case.json", "case_00002/*.npy")):
        out = tmp_path / f"{name}-out"
        prepare(name, tmp_path / name, out)
        whole, before, redone = tree(out), stamps(out), set(out.glob(redone))
        prepare(name, tmp_path / name, out)
        assert stamps(out) == before
        (out / removed).unlink()
        for part in (f"{removed}.part", "spacing.json.part", "lists_Synapse/train.txt.part"):  # as a kill leaves them
            if name == "synapse" or part.startswith(removed):
                (out / part).write_bytes(b"half")
        prepare(name, tmp_path / name, out)
        assert {path for path, stamp in stamps(out).items() if before[path] != stamp} == redone
        assert tree(out) == whole


@pytest.mark.parametrize("name, raw, changed", [
    ("synapse", raw_synapse, "label0005"), ("synapse", raw_synapse, "img0001"), ("kits19", raw_kits19, "segmentation")])
def test_a_corrected_volume_is_prepared_anew(tmp_path, name, raw, changed):
    """Of the same shape and spacing, and put there with whatever time it had; no other case is."""
    raw(tmp_path / "raw")
    prepare(name, tmp_path / "raw", tmp_path / "out")
    before, path = stamps(tmp_path / "out"), min((tmp_path / "raw").rglob(f"{changed}*"))
    volume = nib.load(path)
    values = np.asarray(volume.dataobj).copy()
    values[values == values.max()] = values.min()
    other = tmp_path / f"other{''.join(path.suffixes)}"
    nib.save(nib.Nifti1Image(values, volume.affine, volume.header), other)
    os.utime(other, (1e9, 1e9))
    os.replace(other, path)
    prepare(name, tmp_path / "raw", tmp_path / "out")
    case = path.parent.name if name == "kits19" else f"case{changed[-4:]}"
    redone = {p for p, stamp in stamps(tmp_path / "out").items() if before[p] != stamp}
    assert redone and all(case in str(p) for p in redone if p.suffix in (".npy", ".npz", ".h5"))


@pytest.mark.parametrize("name, raw, check", [("synapse", raw_synapse, check_synapse),
                                              ("kits19", raw_kits19, check_kits19)])
def test_other_files_under_the_same_name(tmp_path, name, raw, check):
    """Another volume takes the place of one of other shape or (by the seed) spacing; a second folder's cases join."""
    raw(tmp_path / "raw", shape=(5, 7, 7))
    prepare(name, tmp_path / "raw", tmp_path / "out")
    for shape, seed in (((3, 7, 7), 1), ((2, 7, 7), 1), ((4, 7, 7), 1), ((4, 6, 7), 1), ((4, 6, 7), 2)):
        truth = raw(tmp_path / "raw", shape=shape, seed=seed)
        prepare(name, tmp_path / "raw", tmp_path / "out")
        check(tmp_path / "out", truth)
    truth |= raw(tmp_path / "more", numbers=("0002", "0007") if name == "synapse" else (5, 6))
    prepare(name, tmp_path / "more", tmp_path / "out")
    check(tmp_path / "out", truth)


def test_data_from_elsewhere_is_left_alone(tmp_path):
    raw_synapse(tmp_path / "raw")
    (tmp_path / "out/train_npz").mkdir(parents=True)
    (tmp_path / "out/train_npz/case0005_slice000.npz").write_bytes(b"somebody's")
    fails(lambda: prepare("synapse", tmp_path / "raw", tmp_path / "out"), tmp_path / "out", "--out")
    assert (tmp_path / "out/train_npz/case0005_slice000.npz").read_bytes() == b"somebody's"


@pytest.mark.parametrize("name", ["synapse", "kits19"])
@pytest.mark.parametrize("before", ["nothing", "older"])
def test_killed_before_any_file_appears(tmp_path, name, before):
    """SIGKILL at the moment of every single os.replace, in an empty folder and in one that holds other volumes under
    the same names: what is said to be complete is whole and of one kind, and the next run finishes."""
    raw = {"synapse": raw_synapse, "kits19": raw_kits19}[name]
    raw(tmp_path / "raw", shape=(3, 4, 4), seed=1)
    prepare(name, tmp_path / "raw", tmp_path / "older")
    truth = raw(tmp_path / "raw", shape=(2, 5, 6))
    prepare(name, tmp_path / "raw", tmp_path / "whole")
    older, whole, out = tree(tmp_path / "older"), tree(tmp_path / "whole"), tmp_path / "out"
    for n in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        if before == "older":
            shutil.copytree(tmp_path / "older", out)
        child = os.fork()
        if child == 0:
            replace, calls = os.replace, itertools.count(1)
            os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == n else replace(a, b)
            prepare(name, tmp_path / "raw", out)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        now = {k: v for k, v in tree(out).items() if not k.endswith(".part")}
        for complete in (json.loads(now.get("spacing.json", "{}")) if name == "synapse" else
                         [k.split("/")[0] for k in now if k.endswith("case.json")]):
            of = lambda files: {k: v for k, v in files.items() if complete in k}
            assert of(now) == of(whole) or of(now) == of(older)
        assert all(v in (whole.get(k), older.get(k)) for k, v in now.items() if not k.endswith((".json", ".txt")))
        for kind, form in (("train", "train_npz/{}.npz"), ("test_vol", "test_vol_h5/{}.npy.h5")):
            assert all(form.format(x) in now for x in now.get(f"lists_Synapse/{kind}.txt", b"").decode().split())
        prepare(name, tmp_path / "raw", out)
        assert tree(out) == whole
    assert n > 8
    {"synapse": check_synapse, "kits19": check_kits19}[name](out, truth)


def test_disk_full(tmp_path):
    raw_synapse(tmp_path / "synapse", ("0001", "0002"), (3, 120, 120))
    raw_synapse(tmp_path / "slices", ("0005", "0006"), (3, 120, 120))
    raw_kits19(tmp_path / "kits19", (0,), (9, 80, 80))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for raw, file in (("synapse", "case0001.npy.h5"), ("slices", "case0005_slice000.npz"), ("kits19", "image.npy")):
        name, out = raw.replace("slices", "synapse"), tmp_path / f"{raw}-out"
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit[1]))  # no file may grow beyond it
        try:
            fails(lambda: prepare(name, tmp_path / raw, out), file, "cannot be written", "another place")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert not list(out.rglob("*.part")) and not list(out.rglob(file))
        prepare(name, tmp_path / raw, out)
        assert list(out.rglob(file))


# --- what the last line tells

def test_last_line(tmp_path, capsys):
    def line(*numbers):
        folder = tmp_path / "-".join(numbers)
        raw_synapse(folder / "raw", numbers, (1, 5, 6))
        capsys.readouterr()
        prepare("synapse", folder / "raw", folder / "out")
        return capsys.readouterr().out
    everything = line(*TEST_CASES, "0005", "0006")
    assert "12 of the 12" in everything and "compare" not in everything and "number" not in everything
    line(*TEST_CASES)
    assert len(Synapse(tmp_path / "-".join(TEST_CASES) / "out", "test")) == 12
    only_train = line("0005", "0006")
    assert "without all test cases" in only_train and "next: python train.py" in only_train
    assert len(Synapse(tmp_path / "0005-0006/out", "train")) == 1
    assert "; 0011 is not a number of the challenge's" in line("0005", "0006", "0011", "0012")


# --- the errors

def test_bad_folders(tmp_path):
    fails(lambda: prepare("kvasir", tmp_path, tmp_path / "out"), "kvasir", "synapse", "kits19")
    (tmp_path / "file").touch()
    for name in ("synapse", "kits19"):
        fails(lambda: prepare(name, tmp_path / "no", tmp_path / "out"), tmp_path / "no", "no such folder")
        fails(lambda: prepare(name, tmp_path / "file", tmp_path / "out"), tmp_path / "file", "no such folder")
    fails(lambda: prepare("synapse", tmp_path, tmp_path / "out"), tmp_path, "img/img0001.nii.gz", "RawData/Training")
    fails(lambda: prepare("kits19", tmp_path, tmp_path / "out"), tmp_path, "case_00000/imaging.nii.gz", "get_imaging")
    raw_synapse(tmp_path)
    fails(lambda: prepare("synapse", tmp_path, tmp_path / "file"), tmp_path / "file", "choose another")
    for kind in ("img", "label"):
        path = tmp_path / f"{kind}/{kind}0005.nii.gz"
        path.rename(tmp_path / "away")
        fails(lambda: prepare("synapse", tmp_path, tmp_path / "out"), path, "missing", "is there")
        (tmp_path / "away").rename(path)
    shutil.rmtree(tmp_path / "label")
    fails(lambda: prepare("synapse", tmp_path, tmp_path / "out"), tmp_path / "label/label0001.nii.gz", "missing")
    raw_kits19(tmp_path)
    path = tmp_path / "case_00001/imaging.nii.gz"
    path.unlink()
    fails(lambda: prepare("kits19", tmp_path, tmp_path / "out"), path, "missing", "get_imaging")
    assert not (tmp_path / "out").exists()  # all of that was found before anything was written


def test_damaged_records(tmp_path):
    raw_synapse(tmp_path / "synapse")
    raw_kits19(tmp_path / "kits19")
    for name, record in (("synapse", "spacing.json"), ("kits19", "case_00001/case.json")):
        out = tmp_path / f"{name}-out"
        prepare(name, tmp_path / name, out)
        (out / record).write_text('{"case')
        fails(lambda: prepare(name, tmp_path / name, out), out / record, "damaged")


def bad_files():
    """(name, image, label, what the line says, which of the two it names)."""
    image, label, spacing = random_case(np.random.default_rng(0), 3, (5, 6, 7))
    with_value = lambda x, value: np.where(np.arange(x.size).reshape(x.shape) == 17, value, x)
    yield "nan", with_value(image.astype(np.float32), np.nan), label, "NaN", 0
    yield "infinity", with_value(image.astype(np.float64), -np.inf), label, "infinity", 0
    yield "unit", np.random.default_rng(0).random((5, 6, 7)), label, "not HU", 0
    yield "bytes", (image + 1000).clip(0, 255).astype(np.uint8), label, "not HU", 0
    yield "shifted", (image + 1024), label, "not HU", 0
    yield "normalised", image / 1000, label, "not HU", 0
    yield "constant", np.full((5, 6, 7), -1000, np.int16), label, "not HU", 0
    yield "fraction", image, with_value(label.astype(np.float32), 1.5), "label 1.5", 1
    yield "nan-label", image, with_value(label.astype(np.float32), np.nan), "label nan", 1
    yield "infinite-label", image, with_value(label.astype(np.float32), np.inf), "label inf", 1
    yield "negative", image, with_value(label.astype(np.int16), -1), "label -1", 1
    yield "above", image, with_value(label, 14), "label 14", 1
    yield "far-above", image, with_value(label.astype(np.int16), 257), "label 257", 1
    yield "shape", image, label[:4], "4, 6, 7", 1
    yield "transposed", image, label.transpose(1, 0, 2), "6, 5, 7", 1


@pytest.mark.parametrize("image,label,says,which", [pytest.param(*rest, id=name) for name, *rest in bad_files()])
def test_bad_volumes(tmp_path, image, label, says, which):
    spacing = (1, 1, 1)
    for data, paths in (("synapse", ("img/img0005.nii.gz", "label/label0005.nii.gz")),
                        ("kits19", ("case_00003/imaging.nii.gz", "case_00003/segmentation.nii.gz"))):
        paths = [write_nifti(tmp_path / data / path, volume, spacing) for path, volume in zip(paths, (image, label))]
        fails(lambda: prepare(data, tmp_path / data, tmp_path / f"{data}-out"), paths[which], says)
        assert not list((tmp_path / f"{data}-out").rglob("*.np*"))


def test_bad_headers(tmp_path, capsys):
    image, label, spacing = random_case(np.random.default_rng(0), 14, (5, 6, 7))
    path, other = tmp_path / "img/img0005.nii.gz", tmp_path / "label/label0005.nii.gz"
    write_nifti(other, label, spacing)
    _, good = as_stored(image, spacing, SCANNER)
    attempt = lambda: prepare("synapse", tmp_path, tmp_path / "out")

    def changed(row, column, value):
        affine = good.copy()
        affine[row, column] = value
        return affine
    write_nifti(path, image, spacing, affine=changed(0, 0, 0))
    fails(attempt, path, "singular")
    write_nifti(path, image, spacing, affine=changed(2, 2, np.nan))
    fails(attempt, path)
    flat = good.copy()
    flat[:3, 1] = 2 * flat[:3, 0]
    write_nifti(path, image, spacing, affine=flat)
    fails(attempt, path, "singular")
    write_nifti(path, image, spacing, code=None)
    fails(attempt, path, "sform_code and qform_code are 0")
    for row, column, by in ((0, 3, 0.01), (1, 1, 0.002), (2, 0, 0.01)):
        write_nifti(path, image, spacing, affine=changed(row, column, good[row, column] + by))
        fails(attempt, other, "affine", path.name)
    write_nifti(path, image, spacing, ((2, 1, 0), (True, False, False)))  # mirrored against its label
    fails(attempt, other, "affine")
    for array in (np.zeros((5, 6)), np.zeros((5, 6, 7, 2)), np.zeros((0, 6, 7)), np.zeros((5, 6, 7), np.complex64),
                  np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])):
        nib.save(nib.Nifti1Image(array, good), path)
        fails(attempt, path, "one volume of numbers")
    path.write_bytes(b"")
    fails(attempt, path, "truncated or not NIfTI")
    path.write_bytes(b"not gzip at all, but long enough to hold a header" * 20)
    fails(attempt, path, "truncated or not NIfTI")
    with gzip.open(path, "wb") as f:
        f.write(b"gzip, but not NIfTI " * 100)
    fails(attempt, path, "truncated or not NIfTI")
    assert "\n" not in capsys.readouterr().err.strip() and not (tmp_path / "out").exists()
    write_nifti(path, image, spacing, affine=changed(0, 3, good[0, 3] + 5e-4))  # rounding is no difference
    attempt()


def test_damaged_bytes(tmp_path, caplog):
    """Files cut off anywhere, and files with wrong bytes: one line, or an image where the bytes do not matter."""
    rng = np.random.default_rng(0)
    image, _, spacing = random_case(rng, 14, (5, 6, 7))

    def read(path):
        try:
            return read_image(read_grid(path), (-125, 275), np.float32)
        except InputError as e:
            assert str(path) in str(e) and "\n" not in str(e)
    truth = None
    for suffix in (".nii.gz", ".nii"):
        path = write_nifti(tmp_path / f"a{suffix}", image, spacing)
        content = path.read_bytes()
        truth = read(path) if truth is None else truth
        assert np.array_equal(read(path), truth)
        for length in {*rng.integers(0, len(content), 60), len(content) - 1, len(content) - 4, len(content) - 8}:
            path.write_bytes(content[:length])
            assert read(path) is None
        for _ in range(200):
            damaged = bytearray(content)
            damaged[rng.integers(len(content) if suffix == ".nii.gz" else 352)] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            result = read(path)
            # 10 bytes of gzip's own header, and the name that follows it, do not matter
            assert suffix == ".nii" or result is None or np.array_equal(result, truth)
    assert not caplog.records  # nibabel would log a line of its own

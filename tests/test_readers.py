"""readers/: what they find in the published layouts, and the one line that they give for every bad file."""
import json
import pickle
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import REAL_DATA, fails
from common import InputError, Parser
from data import add_data_flags, open_dataset
from readers.pictures import split_cases
from readers.synapse import ORGANS, TEST_CASES, VAL_CASES

h5py = pytest.importorskip("h5py", reason="the Synapse volumes are HDF5")


def keys(dataset):
    return [dataset.key(i) for i in range(len(dataset))]


def cases(dataset):
    return [dataset.case(i) for i in range(len(dataset))]


def mask_of(sample, target):
    """The mask of a class, empty if it is absent."""
    if target in sample.absent:
        return np.zeros(sample.image.shape[:2], bool)
    return sample.masks[sample.targets.index(target)]


def label_of(sample):
    """The label map of a sample of organs, on its original grid."""
    return sum((ORGANS.index(t) + 1) * m.astype(np.uint8) for t, m in zip(sample.targets, sample.truth))


def random_slice(rng, shape):
    """Blocks of labels, so that a resized one still holds something."""
    coarse = rng.integers(0, 9, (-(-shape[0] // 8), -(-shape[1] // 8)))
    return rng.random(shape, dtype=np.float32), np.kron(coarse, np.ones((8, 8)))[:shape[0], :shape[1]]


def write_npz(root, case, number, image, label):
    (root / "train_npz").mkdir(parents=True, exist_ok=True)
    path = root / "train_npz" / f"case{case}_slice{number:03d}.npz"
    np.savez_compressed(path, image=image, label=label)
    return path


def write_h5(root, case, image, label):
    (root / "test_vol_h5").mkdir(parents=True, exist_ok=True)
    path = root / "test_vol_h5" / f"case{case}.npy.h5"
    path.unlink(missing_ok=True)  # it may still be open for reading
    with h5py.File(path, "w") as f:
        f["image"], f["label"] = image, label
    return path


def synapse(root, npz=("0005", "0006", "0010"), h5=("0001", "0028"), shape=(40, 56), depth=3, seed=0):
    """A little data set in TransUNet's layout, without lists. -> {(case, slice): (image, label)}."""
    rng, truth = np.random.default_rng(seed), {}
    for case in (*npz, *h5):
        slices = [random_slice(rng, shape) for _ in range(depth)]
        truth.update({(f"case{case}", i): s for i, s in enumerate(slices)})
        if case in npz:
            for i, (image, label) in enumerate(slices):
                write_npz(root, case, i, image, label)
        else:
            write_h5(root, case, *(np.stack(x) for x in zip(*slices)))
    return truth


def write_list(root, kind, *names, folder="lists_Synapse"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    path = root / folder / f"{kind}.txt"
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def same(a, b):
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("image", "masks", "truth")) \
        and (a.case, a.key, a.targets, a.absent) == (b.case, b.key, b.targets, b.absent)


# --- Synapse

@pytest.mark.parametrize("shape", [(40, 56), (64, 64), (33, 20)])
def test_synapse_samples(tmp_path, shape):
    truth = synapse(tmp_path, shape=shape)
    for split in ("train", "val", "test"):
        dataset = open_dataset("synapse", tmp_path, split, 64)
        assert dataset.classes == ORGANS and dataset.name == "synapse" and dataset.volumes
        assert len(dataset) == len(set(keys(dataset)))
        for i, s in enumerate(dataset):
            image, label = truth[s.case, int(s.key[-3:])]
            assert dataset.case(i) == s.case and dataset.key(i) == s.key and s.key[:-3] == f"{s.case}_slice"
            assert s.image.shape == (64, 64, 3) and s.image.dtype == np.uint8 and s.modality == "ct"
            assert s.masks.shape == (len(s.targets), 64, 64) and s.masks.dtype == bool
            assert set(s.targets) | set(s.absent) == set(ORGANS) and not set(s.targets) & set(s.absent)
            assert np.array_equal(label_of(s), label) and s.size == shape
            if shape == (64, 64):  # nothing to resize
                assert np.array_equal(s.image[..., 1], np.round(image * 255).astype(np.uint8))
                for t, organ in enumerate(ORGANS):  # id t + 1 is class t
                    assert np.array_equal(mask_of(s, organ), label == t + 1)


def test_masks_never_invent_labels(tmp_path):
    rng = np.random.default_rng(1)
    for size in (16, 31, 64, 100):
        label = np.kron(rng.choice([0, 2, 8], (6, 9)), np.ones((9, 5)))
        write_npz(tmp_path, "0005", 0, rng.random(label.shape), label)
        write_npz(tmp_path, "0006", 0, rng.random(label.shape), label)
        s = open_dataset("synapse", tmp_path, "train", size)[0]
        assert s.masks.sum(0).max() <= 1
        assert {ORGANS.index(t) + 1 for t, m in zip(s.targets, s.masks) if m.any()} == set(np.unique(label)) - {0}


def test_image_is_antialiased_and_mask_is_not_shifted(tmp_path):
    stripes = np.tile([[0.0, 1.0]], (128, 64))  # of one pixel: without antialiasing they turn black, white or wavy
    label = np.zeros((128, 128))
    label[32:64, 64:96] = 5
    for case in ("0005", "0006"):
        write_npz(tmp_path, case, 0, stripes, label)
    s = open_dataset("synapse", tmp_path, "train", 32)[0]
    assert abs(s.image.astype(int)[2:-2, 2:-2] - 127).max() < 12
    assert np.argwhere(mask_of(s, "liver")).min(0).tolist() == [8, 16]
    assert np.argwhere(mask_of(s, "liver")).max(0).tolist() == [15, 23]


ALL_CASES = sorted({*TEST_CASES, *VAL_CASES, "0005", "0006"})


@pytest.mark.parametrize("npz, h5, train, val", [
    (ALL_CASES[:10], ALL_CASES[10:], ["0005", "0006"], VAL_CASES),
    ([f"01{i:02d}" for i in range(13)] + ["0001"], ["0002"], [f"01{i:02d}" for i in range(11)], ["0111", "0112"]),
    (["0010"], [], None, ["0010"]),  # the usual cases alone: enough to validate, not to train
    (["0100", "0001"], [], None, None),
    ([], ["0001", "0037"], None, ["0037"]),  # for evaluation only
])
def test_splits(tmp_path, npz, h5, train, val):
    synapse(tmp_path, npz, h5, (8, 8), depth=2)
    for split, expected in (("train", train), ("val", val)):
        if expected is None:
            fails(lambda: open_dataset("synapse", tmp_path, split), tmp_path / "train_npz", "add cases")
        else:
            assert keys(open_dataset("synapse", tmp_path, split, 8)) == [
                f"case{case}_slice{i:03d}" for case in sorted(expected) for i in (0, 1)]
    if h5:
        assert cases(open_dataset("synapse", tmp_path, "test", 8)) == sorted(2 * [f"case{case}" for case in h5])


def test_a_damaged_spacing_is_named(tmp_path):
    synapse(tmp_path)
    path = tmp_path / "spacing.json"
    for spacing in ("abc", {"a": 1}, [1, 2], [1, "b", 2], [1, 2, 0], [1, 2, -3], [1, 2, 1e9], [1, 2, float("nan")]):
        path.write_text(json.dumps({"case0010": spacing}))
        source = open_dataset("synapse", tmp_path, "val", 64).source
        fails(lambda: source.spacing("case0010"), path, "case0010", "three numbers")
        assert source.spacing("case0028") is None
    path.write_text('{"case0010": [3.0, 0.8, 0.7]}')
    assert open_dataset("synapse", tmp_path, "val", 64).source.spacing("case0010") == [3.0, 0.8, 0.7]
    kits19(tmp_path)
    for path in tmp_path.glob("case_*/case.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(spacing="abc")))
    volumes = open_dataset("kits19", tmp_path, "val", 64, axes="z")
    fails(lambda: volumes.source.spacing(volumes.case(0)), "case.json", "three numbers", "prepare the case again")


@pytest.mark.parametrize("seed", range(8))
def test_splits_are_apart(tmp_path, seed):
    """Whatever cases there are: training, validation and test cases never mix, and volumes are whole and in order."""
    rng = np.random.default_rng(seed)
    pool = [f"{n:04d}" for n in rng.permutation(60)]
    synapse(tmp_path, npz=pool[:8] + ["0005", "0006"], h5=[c for c in pool[8:12] if c not in ("0005", "0006")],
            shape=(8, 8), depth=2)
    splits = {split: open_dataset("synapse", tmp_path, split, 8) for split in ("train", "val", "test")}
    train, val = set(cases(splits["train"])), set(cases(splits["val"]))
    assert train and val and not train & val
    assert not (train | val) & {f"case{c}" for c in TEST_CASES}
    for dataset in splits.values():
        assert keys(dataset) == sorted(keys(dataset))


def test_hidden_files_are_passed_over(tmp_path):
    synapse(tmp_path, shape=(8, 8), depth=2)
    for name in ("train_npz/._case0005_slice000.npz", "train_npz/.DS_Store", "test_vol_h5/._case0001.npy.h5"):
        (tmp_path / name).write_bytes(b"AppleDouble")
    assert keys(open_dataset("synapse", tmp_path, "train", 8)) == [
        f"case{c}_slice{i:03d}" for c in ("0005", "0006") for i in (0, 1)]
    assert set(cases(open_dataset("synapse", tmp_path, "test", 8))) == {"case0001", "case0028"}


@pytest.mark.parametrize("folder", ["lists_Synapse", "lists/lists_Synapse"])
def test_lists(tmp_path, folder):
    synapse(tmp_path, npz=["0005", "0006", "0010", "0050"], h5=["0001", "0002"], shape=(8, 8), depth=2)
    write_list(tmp_path, "train", "case0006_slice001", "", "case0005_slice000.npz", "case0050_slice000", folder=folder)
    write_list(tmp_path, "test_vol", "case0002", "case0001.npy.h5", folder=folder)
    assert keys(open_dataset("synapse", tmp_path, "train", 8)) == [
        "case0005_slice000", "case0006_slice001", "case0050_slice000"]
    assert cases(open_dataset("synapse", tmp_path, "val", 8)) == ["case0010"] * 2
    assert cases(open_dataset("synapse", tmp_path, "test", 8)) == ["case0001"] * 2 + ["case0002"] * 2
    write_h5(tmp_path, "0050", np.zeros((2, 8, 8)), np.zeros((2, 8, 8)))
    write_list(tmp_path, "test_vol", "case0050", folder=folder)  # named as a test case: no longer trained on
    assert "case0050" not in cases(open_dataset("synapse", tmp_path, "train", 8))


def test_random_access_pickle_and_workers(tmp_path):
    synapse(tmp_path), kits19(tmp_path)
    for dataset in (open_dataset("synapse", tmp_path, "val", 32), open_dataset("demo", split="val", image_size=64),
                    open_dataset("kits19", tmp_path, "train", 32)):
        first = [dataset[i] for i in range(4)]
        copy = pickle.loads(pickle.dumps(dataset))  # with a file open
        assert all(same(copy[i], first[i]) for i in (3, 0, 2, 1))
        with pytest.raises(IndexError):
            dataset[len(dataset)]
        loader = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=lambda x: x[0])
        assert all(same(a, b) for a, b in zip(first, loader))


def test_opening_does_not_read_slices(tmp_path):
    (tmp_path / "train_npz").mkdir()
    for i in range(2000):
        (tmp_path / "train_npz" / f"case00{50 + i // 200}_slice{i % 200:03d}.npz").touch()  # empty: unreadable
    start = time.time()
    assert len(open_dataset("synapse", tmp_path, "train")) == 1800
    assert time.time() - start < 2


def test_fraction_and_limit(tmp_path):
    whole = keys(open_dataset("demo"))
    for fraction in (0.05, 0.1, 0.33, 0.5, 0.9, 1.0):
        for seed in range(5):
            part = keys(open_dataset("demo", fraction=fraction, seed=seed))
            at = [whole.index(k) for k in part]
            assert len(part) == round(160 * fraction) and len(set(part)) == len(part) and at == sorted(at)
            assert np.diff(at).max(initial=0) <= np.ceil(1 / fraction)  # evenly spread
            assert part == keys(open_dataset("demo", fraction=fraction, seed=seed))
    assert keys(open_dataset("demo", fraction=0.1, seed=0)) != keys(open_dataset("demo", fraction=0.1, seed=1))
    assert keys(open_dataset("demo", limit=3)) == whole[:3] and open_dataset("demo", limit=3)[2].case == "train0002"
    assert len(open_dataset("demo", limit=10 ** 6)) == 160 and len(open_dataset("demo", fraction=1e-9)) == 1
    synapse(tmp_path)
    part = open_dataset("synapse", tmp_path, "train", 16, limit=2)
    assert len(part) == 2 and part[1].case == part.case(1)


# --- the errors

def test_bad_arguments(tmp_path):
    fails(lambda: open_dataset("nothere"), "--dataset nothere", "demo", "synapse", "kvasir", "kits19", "sa-med2d")
    fails(lambda: open_dataset("demo", split="dev"), "dev", "val")
    for fraction in (0, -1, 1.1, float("nan")):
        fails(lambda: open_dataset("demo", fraction=fraction), "--fraction")
    fails(lambda: open_dataset("demo", limit=0), "--limit")
    fails(lambda: open_dataset("demo", image_size=0), "--image-size")
    for flag, value in (("overlap", 2), ("contrast", -1), ("size", 0), ("size", 4), ("axes", "y")):
        parser = Parser()
        add_data_flags(parser)
        fails(lambda: parser.parse_args([f"--{flag}={value}"]), f"--{flag} ", value)
    fails(lambda: open_dataset("demo", colour=1), "colour")
    fails(lambda: open_dataset("demo", axes="z"), "axes")
    fails(lambda: open_dataset("synapse", tmp_path, overlap=0.5), "overlap")


def test_missing_folders(tmp_path):
    fails(lambda: open_dataset("synapse", tmp_path / "no"), tmp_path / "no", "--data", "docs/data.md")
    for split in ("train", "val"):
        fails(lambda: open_dataset("synapse", tmp_path, split), tmp_path / "train_npz")
    fails(lambda: open_dataset("synapse", tmp_path, "test"), tmp_path / "test_vol_h5", "--data")


def test_bad_lists(tmp_path):
    synapse(tmp_path)
    empty = write_list(tmp_path, "train", "", " ")
    fails(lambda: open_dataset("synapse", tmp_path), empty, "delete it")
    names = write_list(tmp_path, "train", "case0005_slice000", "case0005_slice077")
    fails(lambda: open_dataset("synapse", tmp_path), names, "case0005_slice077.npz", "missing")
    names.write_bytes(b"\xff\xfe\xff")
    fails(lambda: open_dataset("synapse", tmp_path), names, "UTF-8")
    names.unlink()
    names = write_list(tmp_path, "test_vol", "case0099")
    fails(lambda: open_dataset("synapse", tmp_path, "test"), names, "case0099.npy.h5")
    odd = tmp_path / "train_npz" / "liver.npz"
    odd.touch()
    fails(lambda: open_dataset("synapse", tmp_path), odd, "case0005_slice012.npz")


GOOD = np.full((16, 16), 0.5), np.zeros((16, 16))


def changed(x, value, dtype=float):
    x = x.astype(dtype)
    x[3, 4] = value
    return x


@pytest.mark.parametrize("image, label, words", [
    (GOOD[0], changed(GOOD[1], 11), ("label id 11", "mapped to the eight")),
    (GOOD[0], changed(GOOD[1], 9, np.uint8), ("label id 9",)),
    (GOOD[0], changed(GOOD[1], -1, np.int64), ("label id -1",)),
    (GOOD[0], changed(GOOD[1], 1.5), ("label id 1.5",)),
    (GOOD[0], GOOD[1][:8], ("(16, 16)", "(8, 16)", "differ in size")),
    (np.stack([GOOD[0]] * 3), GOOD[1], ("image", "[3, 16, 16]", "[H, W]")),
    (GOOD[0], GOOD[1][None], ("label", "[1, 16, 16]")),
    (GOOD[0][:0], GOOD[1][:0], ("[0, 16]",)),
    (GOOD[0].astype(str), GOOD[1], ("image", "numbers")),
    (changed(GOOD[0], np.nan), GOOD[1], ("image", "NaN")),
    (GOOD[0], changed(GOOD[1], np.inf), ("label", "NaN or infinity")),
    (changed(GOOD[0], -1000), GOOD[1], ("-1000", "[-125, 275]")),
    (GOOD[0].astype(object), GOOD[1], ("copy it again",)),  # would have to be unpickled
])
def test_bad_slices(tmp_path, image, label, words):
    write_npz(tmp_path, "0005", 0, *GOOD)
    path = write_npz(tmp_path, "0006", 1, image, label)
    write_npz(tmp_path, "0010", 1, *GOOD)
    dataset = open_dataset("synapse", tmp_path)
    assert dataset[0].case == "case0005"
    fails(lambda: dataset[1], path, *words)


def test_bad_npz_files(tmp_path):
    write_npz(tmp_path, "0010", 0, *GOOD)
    path = write_npz(tmp_path, "0005", 0, *GOOD)
    dataset, whole, rng = open_dataset("synapse", tmp_path), path.read_bytes(), np.random.default_rng(0)
    for cut in (0, 1, 10, 100, *rng.integers(0, len(whole) - 1, 40)):
        path.write_bytes(whole[:cut])
        fails(lambda: dataset[0], path, "copy it again")
    for _ in range(40):  # a few wrong bytes: an error of ours, or by chance still readable
        bad = np.frombuffer(whole, np.uint8).copy()
        bad[rng.integers(0, len(bad), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(bad.tobytes())
        try:
            dataset[0]
        except InputError as e:
            assert str(path) in str(e)
    np.savez(path, image=GOOD[0])
    fails(lambda: dataset[0], path, ".npz without 'label'")
    np.savez(path, label=GOOD[1])
    fails(lambda: dataset[0], path, ".npz without 'image'")
    with open(path, "wb") as f:
        np.save(f, GOOD[0])  # .npy under another name
    fails(lambda: dataset[0], path)
    path.write_bytes(pickle.dumps({"image": GOOD[0]}))
    fails(lambda: dataset[0], path, "plain arrays")
    path.unlink()
    fails(lambda: dataset[0], path)


def test_bad_volumes(tmp_path):
    path = write_h5(tmp_path, "0001", *(np.stack([x] * 3) for x in GOOD))
    whole = path.read_bytes()
    dataset = open_dataset("synapse", tmp_path, "test", 16)
    for cut in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        fails(lambda: open_dataset("synapse", tmp_path, "test", 16)[2], path, "copy")
    write_h5(tmp_path, "0001", *(np.stack([x] * 2) for x in GOOD))
    fails(lambda: dataset[2], path, "slice 2")
    for shape, label, words in (((3, 8, 8), np.full((3, 8, 8), 13), "label id 13"),
                                ((3, 8, 8), np.zeros((3, 8, 9)), "(3, 8, 9)"), ((8, 8), np.zeros((8, 8)), "[D, H, W]"),
                                ((0, 8, 8), np.zeros((0, 8, 8)), "(0, 8, 8)")):
        write_h5(tmp_path, "0001", np.zeros(shape), label)
        fails(lambda: open_dataset("synapse", tmp_path, "test", 16)[0], path, words)
    path.unlink()
    with h5py.File(path, "w") as f:
        f["image"] = np.zeros((3, 8, 8))
    fails(lambda: open_dataset("synapse", tmp_path, "test", 16), path, "no 'label'")


# --- the demo

def demo(split="train", size=256, **settings):
    return open_dataset("demo", split=split, image_size=size, **settings)


def test_demo_is_deterministic():
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for size in (64, 256):
        one, other = demo("train", size, seed=3), demo("train", size, seed=3, n=9)
        drawn = [one[i] for i in range(4)]
        assert all(same(other[i], drawn[i]) for i in (2, 0, 3, 1))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    assert not same(demo("train", 64, seed=4)[0], demo("train", 64, seed=3)[0])
    assert not np.array_equal(demo("train", 64)[0].image, demo("val", 64)[0].image)
    assert [len(demo(split)) for split in ("train", "val", "test")] == [160, 16, 32]
    part = open_dataset("demo", fraction=0.1)
    assert same(part[3], open_dataset("demo")[int(part.case(3)[-4:])])


def test_demo_anatomy():
    """The organs lie where the texts say, and each is absent in some images, and no image is empty of texture."""
    samples = [demo("train", 128, n=60)[i] for i in range(60)]
    present = np.array([[organ in s.targets for organ in ORGANS] for s in samples])
    assert ((present.mean(0) > 0.65) & (present.mean(0) < 0.98)).all()
    centre, area = {}, {}
    for target in ORGANS:
        masks = [mask_of(s, target) for s in samples if mask_of(s, target).any()]
        centre[target] = np.mean([np.argwhere(mask).mean(0)[::-1] for mask in masks], 0)
        area[target] = np.mean([mask.sum() for mask in masks])
    x, y = ({t: c[i] for t, c in centre.items()} for i in (0, 1))
    assert x["liver"] < 64 < x["spleen"] and x["right kidney"] < 64 < x["left kidney"]
    assert x["liver"] < x["gallbladder"] < x["aorta"] < x["stomach"] < x["spleen"]
    assert y["stomach"] < y["pancreas"] < y["aorta"] < y["left kidney"]
    assert max(area, key=area.get) == "liver" and area["gallbladder"] < area["pancreas"] < area["stomach"]
    assert 64 < x["aorta"] < 80
    for s in samples:
        assert s.size == (256, 256) and s.masks.sum(0).max(initial=0) <= 1 and s.image.std() > 20


def test_demo_brightness_alone_does_not_tell_the_organ():
    samples = [demo("train", 128, n=40)[i] for i in range(40)]
    of = {t: np.concatenate([s.image[..., 0][mask_of(s, t)] for s in samples]).astype(float)
          for t in ORGANS}
    for a, b in (("liver", "spleen"), ("left kidney", "right kidney"), ("liver", "left kidney"), ("liver", "pancreas")):
        assert abs(of[a].mean() - of[b].mean()) < 1.5 * min(of[a].std(), of[b].std())
    rest = np.concatenate([s.image[..., 0][s.masks.sum(0) == 0] for s in samples])
    low, high = np.percentile(of["liver"], [10, 90])
    assert ((rest > low) & (rest < high)).sum() > 0.2 * len(of["liver"])  # muscle, bowel and vessels, too


def test_demo_knobs():
    def mean(measure, **options):
        dataset = open_dataset("demo", split="test", image_size=128, n=16, **options)
        return np.mean([measure(dataset[i]) for i in range(16)])

    area = lambda s: s.masks.sum()
    assert mean(area, size=0.6) < 0.7 * mean(area) < 0.7 * mean(area, size=1.3)
    between = lambda s: np.std([np.argwhere(m).mean(0) for m in s.masks if m.any()])
    assert mean(between, overlap=1.0) < 0.8 * mean(between, overlap=0.0)
    assert mean(area, overlap=1.0) < mean(area, overlap=0.0)  # what is covered is not labelled
    for i in range(8):  # the same patient, organ by organ
        small, large = (open_dataset("demo", split="test", size=size, overlap=0)[i] for size in (0.7, 1.0))
        assert small.targets == large.targets
        for s, l in zip(small.masks, large.masks):
            assert abs(np.argwhere(s).mean(0) - np.argwhere(l).mean(0)).max() < 15
    a, b = (open_dataset("demo", split="test", contrast=c)[0] for c in (1.0, 0.0))
    assert np.array_equal(a.masks, b.masks)
    assert abs(a.image.astype(int) - b.image)[label_of(a) > 0].mean() > 20  # without contrast the organs are invisible
    assert abs(a.image.astype(int) - b.image)[label_of(a) == 0].mean() < 3


# --- KiTS19

def kits19(root, cases=3, shape=(20, 24, 30), seed=0):
    """Prepared volumes with a kidney and a tumor of random place. -> {case: (image, label)}."""
    rng, truth = np.random.default_rng(seed), {}
    for n in range(cases):
        label = np.zeros(shape, np.uint8)
        for i, edge in ((1, 8), (2, 3)):
            at = [int(rng.integers(0, side - edge)) for side in shape]
            label[tuple(slice(a, a + edge) for a in at)] = i
        label[0, 0, 0] = 2  # a speck, below the smallest share of the axial slice, not of the others
        image, case = rng.integers(0, 256, shape, dtype=np.uint8), f"case_{n:05d}"
        folder = root / case
        folder.mkdir(parents=True)
        np.save(folder / "image.npy", image), np.save(folder / "label.npy", label)
        areas = {letter: [(label == i).sum(tuple({0, 1, 2} - {axis})).tolist() for i in (1, 2)]
                 for axis, letter in enumerate("zyx")}
        (folder / "case.json").write_text(json.dumps(dict(shape=shape, spacing=[3, 0.8, 0.8], areas=areas)))
        truth[case] = image, label
    return truth


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("axes", ["xyz", "z"])
def test_kits19(tmp_path, axes, seed):
    shape = [(20, 24, 30), (9, 30, 40), (40, 40, 26), (60, 31, 33)][seed]
    truth, seen = kits19(tmp_path, shape=shape, seed=seed), []
    for split in ("train", "val", "test"):
        dataset = open_dataset("kits19", tmp_path, split, 32, axes=axes)
        assert dataset.volumes == (axes == "z") and len(set(cases(dataset))) == 1
        for i, s in enumerate(dataset):
            case, where = s.key.split("--")
            axis, number = "zyx".index(where[0]), int(where[2:])
            image, label = (np.take(volume, number, axis) for volume in truth[case])
            seen.append((case, axis, number))
            picture = dataset.source.read(i)
            assert np.array_equal(picture.image, image) and s.case == case == dataset.case(i)
            drawn = [k for k in (1, 2) if (label == k).sum() >= (0 if axes == "z" else 0.00153 * label.size)]
            assert set(s.targets) == {("kidney", "kidney tumor")[k - 1] for k in drawn if (label == k).any()}
            assert set(s.absent) == {("kidney", "kidney tumor")[k - 1] for k in (1, 2) if not (label == k).any()}
            assert all(np.array_equal(m, label == 1 + ("kidney", "kidney tumor").index(t))
                       for t, m in zip(s.targets, s.truth))
            assert axes == "z" or s.targets
    expected = []
    for case, (_, label) in truth.items():
        for axis in range(3 if axes == "xyz" else 1):
            sides = sorted(n for a, n in enumerate(shape) if a != axis)
            for number in range(shape[axis]) if axes == "z" or 2 * sides[0] >= sides[1] else ():
                area = [(np.take(label, number, axis) == k).mean() for k in (1, 2)]
                expected += [(case, axis, number)] if axes == "z" or max(area) >= 0.00153 else []
    assert sorted(seen) == sorted(expected)


def test_bad_kits19(tmp_path):
    kits19(tmp_path)
    open_ = lambda **options: open_dataset("kits19", tmp_path, "train", 32, **options)
    folder = tmp_path / open_().case(0)
    fails(lambda: open_dataset("kits19", folder), folder, "python data.py prepare kits19 RAW")
    label, record = folder / "label.npy", folder / "case.json"
    whole = label.read_bytes()
    label.write_bytes(whole[:-9])
    fails(lambda: open_()[0], label, "prepare the case again")
    np.save(label, np.load(folder / "image.npy").astype(np.int16))
    fails(lambda: open_()[0], label, "int16")
    np.save(label, np.full((20, 24, 30), 3, np.uint8))
    fails(lambda: open_()[0], label, "label 3")
    label.write_bytes(b"")
    fails(lambda: open_()[0], label)
    label.unlink()
    fails(lambda: open_()[0], label, "missing")
    good = record.read_text()
    for bad in ("", "{", "[]", "{}", '{"shape": [1, 2]}', good.replace('"z"', '"w"')):
        record.write_text(bad)
        fails(open_, record, "prepare the case again")


# --- Kvasir

def kvasir(root, names, shape=(30, 44), seed=0, suffix=".jpg"):
    rng, truth = np.random.default_rng(seed), {}
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for name in names:
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        mask = np.kron(rng.random((3, 4)) < 0.5, np.ones((10, 11), bool))
        mask[:10, :11] = True
        Image.fromarray(image).save(root / "images" / f"{name}{suffix}", quality=95)
        Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / f"{name}{suffix}", quality=95)
        truth[name] = mask
    return truth


def test_kvasir(tmp_path):
    truth, seen = kvasir(tmp_path, [f"cju{i}" for i in range(9)] + ["größe"]), []
    for split, n in (("train", 7), ("val", 1), ("test", 2)):
        dataset = open_dataset("kvasir", tmp_path, split, 32)
        assert len(dataset) == n and not dataset.volumes
        for s in dataset:
            seen.append(s.key)
            assert s.targets == ("polyp",) and s.modality == "endoscopy" and s.image.shape == (32, 32, 3)
            assert np.array_equal(s.truth[0], truth[s.key])  # JPEG's noise does not get into the mask
    assert sorted(seen) == sorted(truth)


def test_kvasir_lists_and_other_suffixes(tmp_path):
    kvasir(tmp_path, [f"a{i}" for i in range(6)] + ["a7.1", "a7.2"], suffix=".png")
    (tmp_path / "images/._a0.png").touch(), (tmp_path / "images/._b.png").touch()  # as macOS leaves them
    assert len(open_dataset("kvasir", tmp_path, "train")) + len(open_dataset("kvasir", tmp_path, "test")) == 7
    (tmp_path / "train.txt").write_text("a0\na1.jpg\na2\n\na7.1\n")
    assert len(open_dataset("kvasir", tmp_path, "test", 32)) == 2  # half a list is no list
    (tmp_path / "test.txt").write_text("a3\na4\n")
    assert keys(open_dataset("kvasir", tmp_path, "test", 32)) == ["a3", "a4"]
    rest = [keys(open_dataset("kvasir", tmp_path, split, 32)) for split in ("train", "val")]
    assert sorted(sum(rest, [])) == ["a0", "a1", "a2", "a7.1"] and len(rest[1]) == 1
    assert "a5.png, one of 2" in open_dataset("kvasir", tmp_path, "test", 32).source.problems[0]
    for text, words in (("a3\nb4\n", "names b4"), ("a3\na7.1.png\n", "names a7.1"), ("\n", "names no file")):
        (tmp_path / "test.txt").write_text(text)
        fails(lambda: open_dataset("kvasir", tmp_path, "test"), tmp_path / "test.txt", words)
    (tmp_path / "images/a1.jpg").touch()
    fails(lambda: open_dataset("kvasir", tmp_path, "test"), "a1.p", "a1.jpg")


def test_bad_kvasir(tmp_path):
    fails(lambda: open_dataset("kvasir", tmp_path), tmp_path / "images", "Kvasir-SEG")
    kvasir(tmp_path, ["a", "b", "c"], suffix=".png")
    dataset = open_dataset("kvasir", tmp_path, "test", 32)
    image, mask = (tmp_path / kind / f"{dataset.key(0)}.png" for kind in ("images", "masks"))
    assert dataset[0].targets == ("polyp",)
    whole, rng = image.read_bytes(), np.random.default_rng(0)
    for cut in (0, 1, 8, 50, *rng.integers(0, len(whole) - 20, 20)):
        image.write_bytes(whole[:cut])
        fails(lambda: dataset[0], image, "copy it again")
    image.write_bytes(whole)
    Image.fromarray(np.zeros((30, 43), np.uint8)).save(mask)
    fails(lambda: dataset[0], mask, "[30, 43]", "[30, 44]")
    mask.unlink()
    fails(lambda: dataset[0], mask, "missing")
    for value, words in ((0, "empty"), (255, "full")):
        Image.fromarray(np.full((30, 44), value, np.uint8)).save(mask)
        fails(lambda: dataset[0], mask, words)
    Image.fromarray(np.arange(30 * 44, dtype=np.uint8).reshape(30, 44) % 3).save(mask)
    fails(lambda: dataset[0], mask, "3 values (0, 1, 2)")


def test_real_kvasir(real_data):
    for split, n in (("train", 93), ("val", 11), ("test", 26)):
        dataset = open_dataset("kvasir", real_data / "kvasir", split, 64)
        assert len(dataset) == n
        for s in (dataset[i] for i in range(0, n, 10)):
            assert s.targets == ("polyp",) and 0.001 < s.truth.mean() < 0.9 and s.image.std() > 10


@pytest.mark.parametrize("n", [*range(1, 14), 100, 210, 1000])
def test_a_fifth_of_the_cases_is_for_testing(n):
    names = [f"case{i}" for i in range(n)]
    parts = [split_cases(names, split) for split in ("train", "val", "test")]
    assert sorted(sum(parts, [])) == sorted(names)
    assert parts[0] and len(parts[2]) == max(round(0.2 * n), n > 2)
    assert len(parts[1]) == (max(round(n / 12), 1) if n > 1 else 0)
    assert parts == [split_cases(reversed(names + names), split) for split in ("train", "val", "test")]


# --- real slices

@pytest.mark.skipif(not (REAL_DATA / "layout.py").is_file(), reason="the real CT cases are not beside the repository")
def test_real_cases(tmp_path):
    """Real cases in TransUNet's layout: classes lie on their sides, which also proves the ids and the orientation."""
    sys.path.insert(0, str(REAL_DATA))
    try:
        import layout
    finally:
        sys.path.pop(0)
    lut = np.zeros(14, np.uint8)
    for old, new in layout.EIGHT.items():
        lut[old] = new
    for name in layout.cases()[:3]:
        image, label, _ = layout.case(name)
        middle = np.flatnonzero((lut[label] > 0).any((1, 2)))[::6]
        write_h5(tmp_path, name, image[middle].astype(np.float32) / 255, lut[label[middle]].astype(np.float32))
    dataset, x = open_dataset("synapse", tmp_path, "test", 128), {t: [] for t in ORGANS}
    for s in dataset:
        for target, mask in zip(s.targets, s.masks):
            x[target] += [np.nonzero(mask)[1].mean()] if mask.any() else []
    x = {target: np.mean(values) for target, values in x.items() if values}
    assert x["liver"] < x["aorta"] < x["spleen"] and x["right kidney"] < x["aorta"] < x["left kidney"]
    assert x["liver"] < x["stomach"] < x["spleen"] + 20

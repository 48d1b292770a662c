"""data.py: what it reads, draws, cuts and says, and the one line that it gives for every bad input."""
import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import (ATTRIBUTES, CLASSES, TEST_CASES, VAL_CASES, Demo, InputError, add_prompts, attribute_texts,
                  box_prompt, load_attributes, make_batch, open_dataset, point_prompt, prompt_rng, to_original)

h5py = pytest.importorskip("h5py", reason="the Synapse volumes are HDF5")
REPOSITORY = Path(data.__file__).resolve().parent
REAL = REPOSITORY.parent / "shared" / "data"
KNOWN = load_attributes("synapse")


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


def fails(call, *parts):
    """call() raises an InputError of one line that names every one of `parts`."""
    with pytest.raises(InputError) as e:
        call()
    for part in map(str, parts):
        assert part in str(e.value), f"{part!r} not in {e.value}"
    assert "\n" not in str(e.value)


def same(a, b):
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("image", "masks", "label")) \
        and (a.case, a.slice, a.targets) == (b.case, b.slice, b.targets)


# --- Synapse

@pytest.mark.parametrize("shape", [(40, 56), (64, 64), (33, 20)])
def test_synapse_samples(tmp_path, shape):
    truth = synapse(tmp_path, shape=shape)
    for split in ("train", "val", "test"):
        dataset = open_dataset("synapse", tmp_path, split, 64)
        assert dataset.classes == CLASSES and dataset.modality == "ct" and dataset.name == "synapse"
        assert len(dataset) == len(dataset.cases) == len(dataset.keys) == len(set(dataset.keys))
        for i, s in enumerate(dataset):
            image, label = truth[s.case, s.slice]
            assert dataset.cases[i] == s.case and dataset.keys[i] == f"{s.case}_slice{s.slice:03d}"
            assert s.image.shape == (64, 64, 3) and s.image.dtype == np.uint8
            assert s.masks.shape == (8, 64, 64) and s.masks.dtype == bool and s.targets == CLASSES
            assert s.label.dtype == np.uint8 and np.array_equal(s.label, label) and s.size == shape
            if shape == (64, 64):  # nothing to resize
                assert np.array_equal(s.image[..., 1], np.round(image * 255).astype(np.uint8))
                for t in range(8):  # id t + 1 is class t
                    assert np.array_equal(s.masks[t], label == t + 1)


def test_masks_never_invent_labels(tmp_path):
    rng = np.random.default_rng(1)
    for size in (16, 31, 64, 100):
        label = np.kron(rng.choice([0, 2, 8], (6, 9)), np.ones((9, 5)))
        write_npz(tmp_path, "0005", 0, rng.random(label.shape), label)
        write_npz(tmp_path, "0006", 0, rng.random(label.shape), label)
        s = open_dataset("synapse", tmp_path, "train", size)[0]
        assert s.masks.sum(0).max() <= 1
        assert {i + 1 for i in np.flatnonzero(s.masks.any((1, 2)))} == set(np.unique(label)) - {0}


def test_image_is_antialiased_and_mask_is_not_shifted(tmp_path):
    stripes = np.tile([[0.0, 1.0]], (128, 64))  # of one pixel: without antialiasing they turn black, white or wavy
    label = np.zeros((128, 128))
    label[32:64, 64:96] = 5
    for case in ("0005", "0006"):
        write_npz(tmp_path, case, 0, stripes, label)
    s = open_dataset("synapse", tmp_path, "train", 32)[0]
    assert abs(s.image.astype(int)[2:-2, 2:-2] - 127).max() < 12
    assert box_prompt(s.masks[4]).tolist() == [16, 8, 23, 15]


def test_to_original():
    rng = np.random.default_rng(0)
    for _ in range(10):
        t, h, w = rng.integers(1, 9), *rng.integers(8, 90, 2)
        flat = to_original(torch.full((int(t), 32, 32), 0.5), (h, w))
        assert flat.shape == (t, h, w) and torch.allclose(flat, torch.tensor(0.5))
    x = torch.randn(2, 24, 24)
    assert torch.allclose(to_original(x, (24, 24)), x, atol=1e-6)
    assert to_original(x[:0], (5, 7)).shape == (0, 5, 7)
    half = torch.zeros(1, 32, 32)
    half[..., 16:] = 1  # the right half stays the right half
    assert (to_original(half, (40, 80))[0] > 0.5).sum(1).eq(40).all()


def test_splits(tmp_path):
    everything = sorted({*TEST_CASES, *VAL_CASES, "0005", "0006", "0040"})
    synapse(tmp_path, npz=everything[:10], h5=everything[10:], shape=(16, 16), depth=2)
    cases = {split: {c.removeprefix("case") for c in open_dataset("synapse", tmp_path, split, 16).cases}
             for split in ("train", "val")}
    assert cases["val"] == set(VAL_CASES)
    assert not cases["train"] & {*VAL_CASES, *TEST_CASES}
    assert cases["train"] == {"0005", "0006"}


@pytest.mark.parametrize("seed", range(8))
def test_splits_are_apart(tmp_path, seed):
    """Whatever cases there are: training, validation and test cases never mix, and volumes are whole and in order."""
    rng = np.random.default_rng(seed)
    pool = [f"{n:04d}" for n in rng.permutation(60)]
    synapse(tmp_path, npz=pool[:8] + ["0005", "0006"], h5=[c for c in pool[8:12] if c not in ("0005", "0006")],
            shape=(8, 8), depth=2)
    splits = {split: open_dataset("synapse", tmp_path, split, 8) for split in ("train", "val", "test")}
    train, val = set(splits["train"].cases), set(splits["val"].cases)
    assert train and val and not train & val
    assert not (train | val) & {f"case{c}" for c in TEST_CASES}
    for dataset in splits.values():
        assert dataset.keys == sorted(dataset.keys)


def test_validation_without_the_usual_cases(tmp_path):
    synapse(tmp_path, npz=[f"01{i:02d}" for i in range(13)] + ["0001"], h5=["0002"], shape=(8, 8), depth=1)
    assert open_dataset("synapse", tmp_path, "val", 8).cases == ["case0111", "case0112"]
    assert len(open_dataset("synapse", tmp_path, "train", 8)) == 11
    lone = tmp_path / "lone"  # the usual cases alone: enough to validate, not to train
    synapse(lone, npz=["0010"], h5=[], shape=(8, 8), depth=1)
    assert open_dataset("synapse", lone, "val", 8).cases == ["case0010"]
    fails(lambda: open_dataset("synapse", lone, "train"), lone / "train_npz", "add cases")
    one = tmp_path / "one"
    synapse(one, npz=["0100", "0001"], h5=[], shape=(8, 8), depth=1)
    for split in ("train", "val"):
        fails(lambda: open_dataset("synapse", one, split), one / "train_npz", "add cases")


def test_evaluation_only_folder(tmp_path):
    synapse(tmp_path, npz=[], h5=["0001", "0037"], shape=(8, 8), depth=2)
    assert open_dataset("synapse", tmp_path, "val", 8).keys == ["case0037_slice000", "case0037_slice001"]
    assert len(open_dataset("synapse", tmp_path, "test", 8)) == 4
    fails(lambda: open_dataset("synapse", tmp_path, "train"), tmp_path / "train_npz")


@pytest.mark.parametrize("folder", ["lists_Synapse", "lists/lists_Synapse"])
def test_lists(tmp_path, folder):
    synapse(tmp_path, npz=["0005", "0006", "0010", "0050"], h5=["0001", "0002"], shape=(8, 8), depth=2)
    write_list(tmp_path, "train", "case0006_slice001", "", "case0005_slice000.npz", "case0050_slice000", folder=folder)
    write_list(tmp_path, "test_vol", "case0002", "case0001.npy.h5", folder=folder)
    assert open_dataset("synapse", tmp_path, "train", 8).keys == [
        "case0005_slice000", "case0006_slice001", "case0050_slice000"]
    assert open_dataset("synapse", tmp_path, "val", 8).cases == ["case0010"] * 2
    assert open_dataset("synapse", tmp_path, "test", 8).cases == ["case0001"] * 2 + ["case0002"] * 2
    write_h5(tmp_path, "0050", np.zeros((2, 8, 8)), np.zeros((2, 8, 8)))
    write_list(tmp_path, "test_vol", "case0050", folder=folder)  # named as a test case: no longer trained on
    assert "case0050" not in open_dataset("synapse", tmp_path, "train", 8).cases


def test_random_access_pickle_and_workers(tmp_path):
    synapse(tmp_path)
    for dataset in (open_dataset("synapse", tmp_path, "val", 32), open_dataset("demo", split="val", image_size=64)):
        first = [dataset[i] for i in range(4)]
        copy = pickle.loads(pickle.dumps(dataset))  # with a file open
        assert all(same(copy[i], first[i]) for i in (3, 0, 2, 1))
        with pytest.raises(IndexError):
            dataset[len(dataset)]
        loader = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=lambda x: x[0])
        assert all(same(a, b) for a, b in zip(loader, first))


def test_opening_does_not_read_slices(tmp_path):
    (tmp_path / "train_npz").mkdir()
    for i in range(2000):
        (tmp_path / "train_npz" / f"case00{50 + i // 200}_slice{i % 200:03d}.npz").touch()  # empty: unreadable
    start = time.time()
    assert len(open_dataset("synapse", tmp_path, "train")) == 1800
    assert time.time() - start < 2


def test_fraction_and_limit(tmp_path):
    whole = open_dataset("demo").keys
    for fraction in (0.05, 0.1, 0.33, 0.5, 0.9, 1.0):
        for seed in range(5):
            part = open_dataset("demo", fraction=fraction, seed=seed).keys
            at = [whole.index(k) for k in part]
            assert len(part) == round(160 * fraction) and len(set(part)) == len(part) and at == sorted(at)
            assert np.diff(at).max(initial=0) <= np.ceil(1 / fraction)  # evenly spread
            assert part == open_dataset("demo", fraction=fraction, seed=seed).keys
    assert open_dataset("demo", fraction=0.1, seed=0).keys != open_dataset("demo", fraction=0.1, seed=1).keys
    assert open_dataset("demo", limit=3).keys == whole[:3] and open_dataset("demo", limit=3)[2].case == "train0002"
    assert len(open_dataset("demo", limit=10 ** 6)) == 160 and len(open_dataset("demo", fraction=1e-9)) == 1
    synapse(tmp_path)
    part = open_dataset("synapse", tmp_path, "train", 16, limit=2)
    assert len(part) == 2 and part[1].case == part.cases[1]


# --- the errors

def test_bad_arguments(tmp_path):
    fails(lambda: open_dataset("nothere"), "--dataset nothere", "demo", "synapse")
    fails(lambda: open_dataset("demo", split="dev"), "dev", "val")
    for fraction in (0, -1, 1.1, float("nan")):
        fails(lambda: open_dataset("demo", fraction=fraction), "--fraction")
    fails(lambda: open_dataset("demo", limit=0), "--limit")
    fails(lambda: open_dataset("demo", image_size=0), "--image-size")
    fails(lambda: open_dataset("demo", overlap=2), "overlap 2")
    fails(lambda: open_dataset("demo", contrast=-1), "contrast -1")
    fails(lambda: open_dataset("demo", n=0), "n 0")
    fails(lambda: open_dataset("demo", colour=1), "colour")
    fails(lambda: open_dataset("synapse", tmp_path, overlap=0.5), "overlap")


def test_missing_folders(tmp_path):
    fails(lambda: open_dataset("synapse", tmp_path / "no"), tmp_path / "no", "--data", "README")
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
    write_h5(tmp_path, "0001", np.zeros((3, 8, 8)), np.full((3, 8, 8), 13))
    fails(lambda: open_dataset("synapse", tmp_path, "test", 16)[0], path, "label id 13")
    write_h5(tmp_path, "0001", np.zeros((3, 8, 8)), np.zeros((3, 8, 9)))
    fails(lambda: open_dataset("synapse", tmp_path, "test", 16), path, "(3, 8, 9)")
    write_h5(tmp_path, "0001", np.zeros((8, 8)), np.zeros((8, 8)))
    fails(lambda: open_dataset("synapse", tmp_path, "test", 16), path, "[D, H, W]")
    write_h5(tmp_path, "0001", np.zeros((0, 8, 8)), np.zeros((0, 8, 8)))
    fails(lambda: open_dataset("synapse", tmp_path, "test", 16), path, "(0, 8, 8)")
    path.unlink()
    with h5py.File(path, "w") as f:
        f["image"] = np.zeros((3, 8, 8))
    fails(lambda: open_dataset("synapse", tmp_path, "test", 16), path, "no 'label'")


@pytest.mark.parametrize("body, status, words", [
    ("raise data.InputError('--x: bad\\nvalue; give a good one')", 2, "t.py: --x: bad value; give a good one"),
    ("raise OSError('disk')", 2, "t.py: disk"),
    ("raise KeyboardInterrupt", 130, "t.py: interrupted"),
    ("data.Parser().parse_args(['--nothere'])", 2, "t.py: unrecognized arguments: --nothere; --help lists the flags"),
    ("data.open_dataset('synapse', 'missing')", 2, "t.py: missing: no such folder"),
])
def test_run(tmp_path, monkeypatch, capsys, body, status, words):
    def main():
        exec(body, {"data": data})

    monkeypatch.setattr(sys, "argv", ["folder/t.py"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        data.run(main, OSError)
    out, err = capsys.readouterr()
    assert e.value.code == status and out == "" and err.startswith(words) and err.count("\n") == 1


# --- the demo

def test_demo_is_deterministic():
    for size in (64, 256):
        one, other = Demo("train", size, seed=3), Demo("train", size, seed=3, n=9)
        drawn = [one[i] for i in range(4)]
        assert all(same(other[i], drawn[i]) for i in (2, 0, 3, 1))
    assert not same(Demo("train", 64, seed=4)[0], Demo("train", 64, seed=3)[0])
    assert not np.array_equal(Demo("train", 64)[0].image, Demo("val", 64)[0].image)
    assert [len(Demo(split)) for split in ("train", "val", "test")] == [160, 16, 32]
    part = open_dataset("demo", fraction=0.1)
    assert same(part[3], open_dataset("demo")[int(part.cases[3][-4:])])


def test_demo_does_not_touch_global_random_state():
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Demo("train", 64)[0]
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_demo_anatomy():
    """The organs lie where the texts say, and each is absent in some images, and no image is empty of texture."""
    samples = [Demo("train", 128, n=60)[i] for i in range(60)]
    present = np.array([s.masks.any((1, 2)) for s in samples])
    assert ((present.mean(0) > 0.65) & (present.mean(0) < 0.98)).all()
    centre, area = {}, {}
    for t, target in enumerate(CLASSES):
        where = [np.argwhere(s.masks[t]).mean(0)[::-1] for s in samples if s.masks[t].any()]
        centre[target] = np.mean(where, 0)
        area[target] = np.mean([s.masks[t].sum() for s in samples if s.masks[t].any()])
    x, y = ({t: c[i] for t, c in centre.items()} for i in (0, 1))
    assert x["liver"] < 64 < x["spleen"] and x["right kidney"] < 64 < x["left kidney"]
    assert x["liver"] < x["gallbladder"] < x["aorta"] < x["stomach"] < x["spleen"]
    assert y["stomach"] < y["pancreas"] < y["aorta"] < y["left kidney"]
    assert max(area, key=area.get) == "liver" and area["gallbladder"] < area["pancreas"] < area["stomach"]
    assert 64 < x["aorta"] < 80
    for s in samples:
        assert s.label.shape == (256, 256) and s.masks.sum(0).max() <= 1 and s.image.std() > 20


def test_demo_brightness_alone_does_not_tell_the_organ():
    samples = [Demo("train", 128, n=40)[i] for i in range(40)]
    of = {t: np.concatenate([s.image[..., 0][s.masks[i]] for s in samples]).astype(float)
          for i, t in enumerate(CLASSES)}
    for a, b in (("liver", "spleen"), ("left kidney", "right kidney"), ("liver", "left kidney"), ("liver", "pancreas")):
        assert abs(of[a].mean() - of[b].mean()) < 1.5 * min(of[a].std(), of[b].std())
    rest = np.concatenate([s.image[..., 0][s.masks.sum(0) == 0] for s in samples])
    low, high = np.percentile(of["liver"], [10, 90])
    assert ((rest > low) & (rest < high)).sum() > 0.2 * len(of["liver"])  # muscle, bowel and vessels, too


def test_demo_knobs():
    def mean(measure, **knobs):
        dataset = Demo("test", 128, n=16, **knobs)
        return np.mean([measure(dataset[i]) for i in range(16)])

    area = lambda s: s.masks[:7].sum()
    assert mean(area, size=0.6) < 0.7 * mean(area) < 0.7 * mean(area, size=1.3)
    between = lambda s: np.std([np.argwhere(m).mean(0) for m in s.masks if m.any()])
    assert mean(between, overlap=1.0) < 0.8 * mean(between, overlap=0.0)
    assert mean(area, overlap=1.0) < mean(area, overlap=0.0)  # what is covered is not labelled
    for i in range(8):  # the same patient, organ by organ
        small, large = (Demo("test", 256, size=size, overlap=0)[i] for size in (0.7, 1.0))
        both = small.masks.any((1, 2))
        assert np.array_equal(both, large.masks.any((1, 2)))
        for s, l in zip(small.masks[both], large.masks[both]):
            assert abs(np.argwhere(s).mean(0) - np.argwhere(l).mean(0)).max() < 15
    a, b = (Demo("test", 256, contrast=c)[0] for c in (1.0, 0.0))
    assert np.array_equal(a.masks, b.masks)
    assert abs(a.image.astype(int) - b.image)[a.label > 0].mean() > 20  # without contrast the organs are invisible
    assert abs(a.image.astype(int) - b.image)[a.label == 0].mean() < 3


# --- prompts

def random_mask(rng):
    """A filled rectangle with some pixels knocked out, on a grid whose sides differ."""
    h, w = rng.integers(1, 60, 2)
    mask = np.zeros((h, w), bool)
    y, x = sorted(rng.integers(0, h, 2)), sorted(rng.integers(0, w, 2))
    mask[y[0]:y[1] + 1, x[0]:x[1] + 1] = True
    mask &= rng.random((h, w)) < 0.9
    mask[y[0], x[0]] = True
    return mask


def test_boxes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = random_mask(rng)
        ys, xs = np.nonzero(mask)
        box = box_prompt(mask)
        assert box.dtype == np.float32 and box.tolist() == [xs.min(), ys.min(), xs.max(), ys.max()]
        noisy = box_prompt(mask, rng)
        most = min(5, (box[2:] - box[:2]).min() / 2)
        assert abs(noisy - box).max() <= most and np.array_equal(noisy, np.round(noisy))
        assert 0 <= noisy[0] <= noisy[2] < mask.shape[1] and 0 <= noisy[1] <= noisy[3] < mask.shape[0]
    mask = np.zeros((100, 100), bool)
    mask[40:60, 30:70] = True
    shifts = np.array([box_prompt(mask, rng) - box_prompt(mask) for _ in range(400)])
    assert set(np.unique(shifts)) == set(range(-5, 6)) and abs(shifts.mean()) < 0.5
    with pytest.raises(ValueError):
        box_prompt(np.zeros((5, 5), bool))


def test_points():
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask, n = random_mask(rng), int(rng.integers(1, 12))
        points, labels = point_prompt(mask, n, rng)
        assert points.shape == (n, 2) and points.dtype == np.float32
        assert labels.dtype == np.int64 and labels.tolist() == [1] * n
        assert all(mask[int(y), int(x)] for x, y in points)
        if mask.sum() >= n:
            assert len({tuple(p) for p in points}) == n
    mask = np.zeros((10, 40), bool)
    mask[2, 33] = True
    assert point_prompt(mask, 3, rng)[0].tolist() == [[33, 2]] * 3  # (x, y), and repeated where it must
    with pytest.raises(ValueError):
        point_prompt(np.zeros((5, 5), bool), 1, rng)


def test_prompt_rng():
    draw = lambda *parts: prompt_rng(*parts).integers(2 ** 60)
    assert draw("case0005_slice012", "liver", 0) == draw("case0005_slice012", "liver", 0)
    keys = [(k, t, s) for k in ("a_slice000", "a_slice001") for t in CLASSES for s in range(3)]
    assert len({draw(*k) for k in keys}) == len(keys)
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import data; " \
           "print(data.prompt_rng('a', 'liver', 1).integers(2 ** 60))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(other.stdout) == draw("a", "liver", 1)  # another process, another hash seed


# --- texts

def test_attributes_are_complete():
    for name in data.DATASETS:
        attributes = load_attributes(name)
        assert tuple(sorted(attributes)) == tuple(sorted(CLASSES))
        for target in CLASSES:
            assert set(attributes[target]) == set(ATTRIBUTES)
            for kind in ATTRIBUTES:
                assert len(attributes[target][kind]) >= 5
    texts = [t for organ in KNOWN.values() for wordings in organ.values() for t in wordings]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert 8 <= len(text.split()) <= 25 and text == text.strip() and text.isascii(), text


@pytest.mark.parametrize("target, patient, image", [
    ("right kidney", "right", "left"), ("liver", "right", "left"), ("gallbladder", "right", "left"),
    ("left kidney", "left", "right"), ("spleen", "left", "right"), ("stomach", "left", "right")])
def test_sides(target, patient, image):
    """Every position says the patient's side and the image's, which is the other, and neither the wrong way round."""
    def of_patient(side, text):
        return re.search(rf"patient's {side}|{side} (upper abdomen|retroperitoneum) of the patient", text)

    def of_image(side, text):
        return re.search(rf"{side}( \w+)? of the (spine in the )?image|image's (\w+ )?{side}|image {side}", text)

    for text in KNOWN[target]["position"]:
        assert of_patient(patient, text) and of_image(image, text), text
        assert not of_patient(image, text) and not of_image(patient, text), text


def test_attribute_texts():
    first = attribute_texts(KNOWN, "liver")
    assert first == {kind: KNOWN["liver"][kind][0] for kind in ATTRIBUTES} == attribute_texts(KNOWN, "liver")
    rng = np.random.default_rng(0)
    drawn = [attribute_texts(KNOWN, "liver", rng) for _ in range(200)]
    for kind in ATTRIBUTES:
        assert {d[kind] for d in drawn} == set(KNOWN["liver"][kind])
    assert len({tuple(d.values()) for d in drawn}) > 50  # the attributes are drawn apart
    fails(lambda: attribute_texts(KNOWN, "heart"), "heart", *CLASSES)


def test_bad_attributes(tmp_path):
    path, organ = tmp_path / "a.json", {kind: ["one", "two"] for kind in ATTRIBUTES}
    good = {"synapse": {target: organ for target in CLASSES}}

    def refuses(content, *words, name="synapse"):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        fails(lambda: load_attributes(name, path), path, *words)

    fails(lambda: load_attributes("synapse", path), path)
    refuses("{", "not JSON")
    refuses("[]", "no texts for data set synapse")
    refuses(good, "no texts for data set kits19", '"kits19": {', '"position": ["..."]', name="kits19")
    refuses({"demo": "kits19", **good}, "demo", name="demo")
    refuses({"synapse": {t: organ for t in CLASSES[1:]}}, "class spleen", '"spleen": {"position"')
    for bad in ([], [""], ["good", "  "], "text", None, [3]):
        refuses({"synapse": {**good["synapse"], "aorta": {**organ, "shape": bad}}}, "synapse", "aorta", "shape")
    path.write_text(json.dumps({"demo": "synapse", "mine": {"heart": organ}, **good}))
    assert load_attributes("demo", path) == load_attributes("synapse", path) == good["synapse"]
    assert load_attributes("mine", path) == {"heart": organ}


# --- batches

SAMPLES = [Demo("train", 64)[i] for i in range(4)]


def batch_of(samples, prompt, rng, max_targets=4, absent=0.25, points=1, noise=True):
    return add_prompts(make_batch(samples, KNOWN, rng, max_targets, absent), prompt, rng, points, noise)


@pytest.mark.parametrize("prompt", ["none", "point", "box"])
def test_batches(prompt):
    for seed in range(25):
        rng = np.random.default_rng(seed)
        samples = [SAMPLES[i] for i in rng.permutation(4)[:rng.integers(1, 5)]]
        n, most = int(rng.integers(1, 4)), int(rng.integers(1, 9))
        batch = batch_of(samples, prompt, rng, max_targets=most, points=n)
        m = len(batch.targets)
        assert batch.images.shape == (len(samples), 3, 64, 64) and batch.images.dtype == torch.uint8
        assert batch.index.dtype == torch.int64 and batch.masks.dtype == torch.bool
        assert batch.index.shape == (m,) and batch.masks.shape == (m, 64, 64) and len(batch.texts) == m
        assert torch.bincount(batch.index, minlength=len(samples)).max() <= most
        assert len(set(zip(batch.index.tolist(), batch.targets))) == m  # without replacement
        assert batch.points is None or batch.boxes is None
        assert prompt == ("box" if batch.boxes is not None else "point" if batch.points else "none")
        for b, sample in enumerate(samples):
            assert np.array_equal(batch.images[b].permute(1, 2, 0).numpy(), sample.image)
        for i, (b, target, texts) in enumerate(zip(batch.index.tolist(), batch.targets, batch.texts)):
            mask = samples[b].masks[CLASSES.index(target)]
            assert np.array_equal(batch.masks[i].numpy(), mask)
            assert all(texts[kind] in KNOWN[target][kind] for kind in ATTRIBUTES)
            if batch.boxes is not None:
                assert abs(batch.boxes[i].numpy() - box_prompt(mask)).max() <= 5
            if batch.points:
                assert all(mask[int(y), int(x)] for x, y in batch.points[0][i])
        if batch.boxes is not None:
            assert batch.boxes.shape == (m, 4) and batch.boxes.dtype == torch.float32
        if batch.points:
            assert batch.points[0].shape == (m, n, 2) and batch.points[1].shape == (m, n)
            assert batch.points[1].dtype == torch.int64 and batch.points[1].eq(1).all()


def test_absent_targets():
    sample = next(s for s in SAMPLES if 0 < (~s.masks.any((1, 2))).sum())
    rng = np.random.default_rng(0)
    for absent in (0.0, 0.25, 1.0):
        batches = [batch_of([sample] * 4, "none", rng, max_targets=1, absent=absent) for _ in range(80)]
        empty = np.mean([not m.any() for b in batches for m in b.masks])
        assert abs(empty - absent) < 0.08
    assert batch_of([sample], "box", rng, absent=1.0).masks.any((1, 2)).all()
    exact = batch_of([sample], "box", rng, noise=False)
    assert all(np.array_equal(b, box_prompt(m)) for b, m in zip(exact.boxes.numpy(), exact.masks.numpy()))


def test_empty_batch():
    nothing = data.Sample(np.zeros((32, 32, 3), np.uint8), np.zeros((8, 32, 32), bool), CLASSES,
                          np.zeros((32, 32), np.uint8), "ct", "case0005", 0)
    rng = np.random.default_rng(0)
    box = batch_of([nothing], "box", rng)
    point = batch_of([nothing], "point", rng, points=3)
    assert box.masks.shape == (0, 32, 32) and box.boxes.shape == (0, 4) and box.index.shape == (0,)
    assert point.points[0].shape == (0, 3, 2) and point.points[1].shape == (0, 3) and point.targets == []
    fails(lambda: batch_of([nothing], "scribble", rng), "--prompt scribble")


# --- real slices

@pytest.mark.skipif(not (REAL / "layout.py").is_file(), reason="the real CT cases are not beside the repository")
def test_real_cases(tmp_path):
    """Real cases in TransUNet's layout: classes lie on their sides, which also proves the ids and the orientation."""
    sys.path.insert(0, str(REAL))
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
    dataset, x = open_dataset("synapse", tmp_path, "test", 128), {t: [] for t in CLASSES}
    for s in dataset:
        for target, mask in zip(s.targets, s.masks):
            x[target] += [np.nonzero(mask)[1].mean()] if mask.any() else []
    x = {target: np.mean(values) for target, values in x.items() if values}
    assert x["liver"] < x["aorta"] < x["spleen"] and x["right kidney"] < x["aorta"] < x["left kidney"]
    assert x["liver"] < x["stomach"] < x["spleen"] + 20

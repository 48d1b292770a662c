"""--dataset folder: nnU-Net's layout, whatever is in it, and that it gives what the other data sets give."""
import csv
import gzip
import itertools
import json
import pickle
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from PIL import Image

import data
import eval as evaluation
import train
from conftest import fails
from data import open_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from readers.folder import read_ids
from readers.pictures import RawSample, split_cases
from texts import Texts
from test_readers import cases, keys, kvasir, same

CT, LABELS = {"0": "CT"}, {"background": 0, "liver": 1, "spleen": 2, "tumor": 3}


def describe(root, labels=LABELS, channels=CT, ending=".nii.gz", **more):
    root.mkdir(exist_ok=True)
    path = root / "dataset.json"
    path.write_text(json.dumps(dict(channel_names=channels, labels=labels, file_ending=ending, numTraining=1, **more)))
    return path


def write_case(root, case, image, label, kind="Tr", channel=0, ending=".nii.gz", codes="LPS", sizes=(0.8, 0.7, 3.0)):
    """Upright [z,y,x] arrays, stored along axes that run to `codes`: by nibabel alone."""
    for folder, name, volume in ((f"images{kind}", f"{case}_{channel:04d}", image), (f"labels{kind}", case, label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        if ending == ".png":
            Image.fromarray(volume).save(root / folder / f"{name}.png")
            continue
        turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
        affine = np.diag([-sizes[0], -sizes[1], sizes[2], 1]) @ inv_ornt_aff(turn, volume.shape[::-1])
        stored = nib.Nifti1Image(apply_orientation(volume.transpose(2, 1, 0), turn), affine)
        nib.save(stored, root / folder / (name + ending))
    return root / f"images{kind}" / f"{case}_{channel:04d}{ending}", root / f"labels{kind}" / f"{case}{ending}"


def blocks(rng, shape, ids=4):
    """Random HU with all tissues in them, and a label of blocks."""
    label = np.kron(rng.integers(0, ids, [-(-n // 4) for n in shape]), np.ones([4] * len(shape)))
    return rng.integers(-300, 500, shape).astype(np.int16), label[tuple(map(slice, shape))].astype(np.uint8)


def own(root, names="abc", shape=(3, 12, 16), seed=0, **more):
    """A data set of random volumes -> {case: (image, label)}."""
    rng = np.random.default_rng(seed)
    describe(root, **more)
    truth = {f"case{name}": blocks(rng, shape) for name in names}
    for case, volumes in truth.items():
        write_case(root, case, *volumes)
    return truth


def parts(root, **options):
    return {split: sorted(set(cases(open_dataset("folder", root, split, 32, **options)))) for split in data.SPLITS}


def masks_of(raw):
    return dict(zip(raw.targets, raw.masks))


# --- volumes

def test_every_orientation_gives_the_upright_slices(tmp_path):
    rng, truth = np.random.default_rng(0), {}
    describe(tmp_path)
    ways = ["".join(p) for q in itertools.permutations(("LR", "PA", "SI")) for p in itertools.product(*q)]
    for n, codes in enumerate(ways):
        truth[f"c{n}"] = image, label = blocks(rng, rng.integers(2, 9, 3))
        write_case(tmp_path, f"c{n}", image, label.astype([np.uint8, np.int16, np.float32][n % 3]), codes=codes)
    seen = []
    for split in data.SPLITS:
        dataset = open_dataset("folder", tmp_path, split, 32)
        source = dataset.source
        assert dataset.volumes and dataset.classes == ("liver", "spleen", "tumor")
        for i in range(len(source)):
            case, z = source.case(i), int(source.key(i)[-3:])
            assert source.key(i) == f"{case}_slice{z:03d}" and source.spacing(case) == pytest.approx([3, 0.7, 0.8])
            image, label = (volume[z] for volume in truth[case])
            raw, shown = source.read(i), np.rint((np.clip(image, -125, 275) + 125.0) * 255 / 400)
            assert raw.modality == "ct" and np.abs(raw.image - shown).max() <= 1 and (raw.image == shown).mean() > 0.99
            assert sorted(raw.targets + raw.absent) == sorted(dataset.classes)
            for name, mask in masks_of(raw).items():
                assert mask.any() and np.array_equal(mask, label == LABELS[name])
            assert all(not (label == LABELS[name]).any() for name in raw.absent)
            seen.append((case, z))
    assert sorted(seen) == sorted((case, z) for case, (image, _) in truth.items() for z in range(len(image)))


def test_a_volume_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    own(tmp_path), (opens := [])
    from readers import prepare
    decode = prepare.read_label
    monkeypatch.setattr(prepare, "read_label", lambda *a: opens.append(a[0].path.name) or decode(*a))
    train_set = open_dataset("folder", tmp_path, "train", 32)
    assert train_set.stamp(0) is None
    first = [train_set[i] for i in (0, 2, 1, 0)]
    again = open_dataset("folder", tmp_path, "train", 32)
    assert all(same(a, again[i]) for a, i in zip(first, (0, 2, 1, 0))) and len(opens) == 1
    assert same(pickle.loads(pickle.dumps(again))[1], first[2]) and len(opens) == 1  # as worker processes get it
    before, case = again.stamp(0), again.case(0)
    image, label = blocks(np.random.default_rng(9), (3, 12, 16))
    write_case(tmp_path, case, image, label)
    changed = open_dataset("folder", tmp_path, "train", 32)
    assert changed[0].truth.sum() == (label[0] > 0).sum() and len(opens) == 2 and changed.stamp(0) != before
    describe(tmp_path, window=[-1000, 400])
    wide = open_dataset("folder", tmp_path, "train", 32)
    assert np.array_equal(wide.source.read(0).image, np.rint((np.clip(image[0], -1000, 400) + 1000.0) / 1400 * 255))
    prepared = list((tmp_path / "prepared/imagesTr").iterdir())
    assert len(prepared) == 1  # what is out of date is gone
    describe(tmp_path, dict(LABELS, tumor=4), window=[-1000, 400])  # what was prepared is checked against new labels
    fails(lambda: open_dataset("folder", tmp_path, "train", 32)[0], f"{case}.nii.gz", "label 3")
    describe(tmp_path, window=[-1000, 400])
    prepared[0].write_bytes(prepared[0].read_bytes()[:-9])
    fails(lambda: open_dataset("folder", tmp_path, "train", 32)[0], prepared[0], "delete it")


@pytest.mark.parametrize("said, modality", [("CT", "ct"), ("MRI", "mr"), ("T1w", "mr"), ("FLAIR", "mr"), ("PET", "pet"),
                                            ("noNorm", "unknown"), ("Ultrasound", "ultrasound"), ("us", "ultrasound")])
def test_modalities(tmp_path, said, modality):
    describe(tmp_path, channels={"0": said})
    image, label = blocks(np.random.default_rng(0), (3, 12, 16))
    image = image.astype(np.float32)
    image[0, 0, 0] = 1e6  # one bright voxel does not make the rest black
    for case in "ab":
        write_case(tmp_path, case, image, label)
    raw = open_dataset("folder", tmp_path, "train", 32).source.read(1)
    assert raw.modality == modality
    if modality != "ct":
        low, high = np.percentile(image, (0.5, 99.5))
        assert np.abs(raw.image - np.clip((image[1] - low) / (high - low) * 255, 0, 255)).max() <= 1
    describe(tmp_path, channels={"0": said}, modality="fundus")
    assert open_dataset("folder", tmp_path, "train", 32).source.pairs[0] == ("liver", "fundus")


def test_regions_and_ignore(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3, "ignore": 4}
    rng, truth = np.random.default_rng(1), {}
    describe(tmp_path, labels, regions_class_order=[1, 2, 3])
    for case in "abc":
        truth[case] = blocks(rng, (8, 12, 16))
        truth[case][1][5, 3, 3] = 4
        write_case(tmp_path, case, *truth[case])
    for split in data.SPLITS:
        dataset = open_dataset("folder", tmp_path, split, 32)
        assert not dataset.volumes and dataset.classes == ("whole", "core", "tip")
        for i in range(len(dataset)):
            raw, label = dataset.source.read(i), truth[dataset.case(i)][1][i]
            if i == 5:
                assert raw.targets == raw.absent == () and raw.masks.shape == (0, 12, 16)
                continue
            assert set(raw.targets) | set(raw.absent) == set(dataset.classes)
            for name, mask in masks_of(raw).items():
                assert np.array_equal(mask, np.isin(label, labels[name]))
    describe(tmp_path, {"background": 0, "a": [1, 2], "b": 3, "ignore": 4})  # apart: one label map holds them
    assert open_dataset("folder", tmp_path, "val", 32).volumes


def test_an_image_of_which_nothing_is_known_is_passed_over(tmp_path):
    """Neither asked for in training nor counted in evaluation."""
    describe(tmp_path, {"background": 0, "a": 1, "ignore": 2}, {"0": "dermoscopy"}, ".png")
    for case, value in zip("abc", (1, 1, 2)):
        label = np.zeros((12, 16), np.uint8)
        label[:6] = value
        write_case(tmp_path, case, np.full((12, 16, 3), 7, np.uint8), label, ending=".png")
    (tmp_path / "splits_final.json").write_text('[{"train": ["a", "b"], "val": ["c"]}]')
    dataset = open_dataset("folder", tmp_path, "test", 16)
    predictor = lambda sample: (list(sample.targets + sample.absent), torch.zeros(0, 16, 16))
    predictor.prepare, predictor.prompt = lambda sample: sample, "none"
    assert dataset[0].masks.shape == (0, 16, 16) and evaluation.evaluate_case(predictor, dataset, [0]) == []


def test_old_dataset_json_and_its_mistakes(tmp_path):
    own(tmp_path)
    open_ = lambda split="train": open_dataset("folder", tmp_path, split, 32)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(dict(modality={"0": "MRI"}, labels={"0": "background", "2": "spleen", "1": "liver",
                                                                   "3": "tumor"})))
    assert open_().source.pairs == (("spleen", "mr"), ("liver", "mr"), ("tumor", "mr"))
    for labels in (None, [], {}, {"background": 0}, {"a": 0.5}, {"a": -1}, {"a": 256}, {"a": "x"}, {"a": [1, 0]},
                   {"a": []}, {"a": True}, {"a": 1, "ignore": 1}, 7, {"a": None}, {"²": "a"}):
        fails(open_, describe(tmp_path, labels), '"labels"')
    fails(open_, describe(tmp_path, ending=".mha"), ".mha", "convert")
    describe(tmp_path, ending=".png")
    fails(open_, "imagesTr", "CASE_0000.png", "dataset.json")
    fails(open_, describe(tmp_path, modality="heat"), '"heat"', "endoscopy")
    for window in ([3, 1], [1], "wide", ["a", "b"], [True, 2], {}):
        fails(open_, describe(tmp_path, window=window), '"window"')
    fails(open_, describe(tmp_path, channel=-1), '"channel"')
    for bad in ("", "{", "[]"):
        path.write_text(bad)
        fails(open_, path)
    path.unlink()
    fails(open_, path, "missing")


def test_channels(tmp_path):
    truth = own(tmp_path, channels={"0": "T1", "1": "CT"})
    second = blocks(np.random.default_rng(5), (3, 12, 16))[0]
    path, _ = write_case(tmp_path, "caseb", second, truth["caseb"][1], channel=1)
    fails(lambda: open_dataset("folder", tmp_path, "train", 32), path, "second channel", '"channel": 0', "dataset.json")
    describe(tmp_path, channels={"0": "T1", "1": "CT"}, channel=0)
    assert open_dataset("folder", tmp_path, "train", 32).source.pairs[0] == ("liver", "mr")
    describe(tmp_path, channels={"0": "T1", "1": "CT"}, channel=1)
    (tmp_path / "splits_final.json").write_text('[{"train": ["caseb", "casea"], "val": ["casec"]}]')
    sets = [open_dataset("folder", tmp_path, split, 32) for split in ("train", "val")]
    assert sets[0].source.pairs[0] == ("liver", "ct")
    for dataset in sets:
        if dataset.case(0) == "caseb":
            assert np.array_equal(dataset.source.read(1).image,
                                  np.rint((np.clip(second[1], -125, 275) + 125.0) * 255 / 400))
        else:
            fails(lambda: dataset[0], f"{dataset.case(0)}_0001.nii.gz", "missing")


# --- splits

def test_splits(tmp_path):
    names = [f"case{c}" for c in "abcdefgh"]
    own(tmp_path, "abcdefgh", shape=(1, 8, 8))
    assert parts(tmp_path) == {split: split_cases(names, split) for split in data.SPLITS}
    folds = [dict(train=names[:6], val=names[6:]), dict(train=names[2:], val=names[:1])]
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps(folds))
    found = parts(tmp_path)  # a checkpoint is not chosen by what it is tested on
    assert found["test"] == names[6:] and len(found["val"]) == 1
    assert sorted(found["train"] + found["val"]) == names[:6]
    found = parts(tmp_path, fold=1)
    assert found["test"] == names[:1] and sorted(found["train"] + found["val"]) == names[2:]
    source = open_dataset("folder", tmp_path, "test", 32, fold=1).source
    assert len(source.problems) == 1 and "caseb" in source.problems[0]
    rng = np.random.default_rng(3)
    for case in ("x", "y"):
        image, label = write_case(tmp_path, case, *blocks(rng, (1, 8, 8)), kind="Ts")
    label.unlink()  # not all test images have labels
    assert parts(tmp_path) == dict(train=names[:6], val=names[6:], test=["x"])
    path.unlink()
    found = parts(tmp_path)
    assert found["test"] == ["x"] and len(found["val"]) == 1 and sorted(found["train"] + found["val"]) == names
    write_case(tmp_path, found["train"][0], *blocks(rng, (1, 8, 8)), kind="Ts")
    fails(lambda: parts(tmp_path), "imagesTs", found["train"][0], "trained on")


def test_what_more_cases_do_to_a_split(tmp_path):
    """They move others between parts that are drawn, and change none that splits_final.json names."""
    own(tmp_path, "abcdefghij", shape=(1, 8, 8))
    before, path = parts(tmp_path), tmp_path / "splits_final.json"
    own(tmp_path, "abcdefghijklmnopqrst", shape=(1, 8, 8))
    assert set(before["train"] + before["val"]) & set(parts(tmp_path)["test"])
    path.write_text(json.dumps([dict(train=before["train"] + before["val"], val=before["test"])]))
    found = parts(tmp_path)
    assert found["test"] == before["test"] and sorted(sum(found.values(), [])) == sorted(sum(before.values(), []))


def test_bad_splits(tmp_path):
    own(tmp_path, "abc", shape=(1, 8, 8))
    path = tmp_path / "splits_final.json"
    good = [dict(train=["casea", "caseb"], val=["casec"])]
    for folds, words in (([], "folds"), ({}, "damaged"), ([{}], "damaged"), ([7], "damaged"), ("", "damaged"),
                         ([dict(train=["casex"], val=["casec"])], "casex"),
                         ([dict(train=["casec", "casea"], val=["casec"])], "both"),
                         ([dict(train=[["casea"]], val=["casec"])], "damaged"), (None, "damaged")):
        path.write_text(json.dumps(folds) if folds != "" else "")
        fails(lambda: open_dataset("folder", tmp_path, "train", 32), path, words)
    path.write_text(json.dumps([dict(train=["casea", "caseb", "caseb"], val=["casec", "casec"])]))
    assert cases(open_dataset("folder", tmp_path, "test", 32)) == ["casec"]  # named twice, counted once
    path.write_text(json.dumps(good))
    fails(lambda: open_dataset("folder", tmp_path, "train", 32, fold=4), "--fold 4", "0 to 0")
    fails(lambda: open_dataset("kvasir", tmp_path, "train", 32, fold=0), "fold")


# --- what is wrong with the files

def test_bad_volumes(tmp_path):
    truth = own(tmp_path)
    (tmp_path / "splits_final.json").write_text('[{"train": ["casea", "caseb"], "val": ["casec"]}]')
    image, label = write_case(tmp_path, "casec", *truth["casec"])
    hu, ids = truth["casec"]
    read = lambda: open_dataset("folder", tmp_path, "test", 32)[0]
    assert read().modality == "ct"
    for path in (image, label):
        whole = path.read_bytes()
        for cut in (0, 5, 40, len(whole) // 2, len(whole) - 4):
            path.write_bytes(whole[:cut])
            fails(read, path)
        path.write_bytes(whole)
    again = lambda *volumes, **how: write_case(tmp_path, "casec", *volumes, **how)
    again(hu, np.full_like(ids, 9))
    fails(read, label, "label 9", "dataset.json")
    for wrong in (ids + 0.5, ids - 1.0, np.full(ids.shape, np.nan)):
        again(hu, wrong.astype(np.float32))
        fails(read, label, "store whole numbers")
    again(hu, ids[:, :8])
    fails(read, label, "one grid")
    again(hu, ids, sizes=(0.8, 0.7, 2.0)), write_case(tmp_path, "other", hu, ids)
    (tmp_path / "imagesTr/other_0000.nii.gz").replace(image)
    fails(read, label, "affine")
    again((hu - hu.min()).astype(np.uint16), ids)
    fails(read, image, "not HU", '"window"', "dataset.json")
    again(np.where(hu > 400, np.nan, hu).astype(np.float32), ids)
    fails(read, image, "NaN")
    label.unlink()
    fails(read, label, "missing")


def test_everything_wrong_is_named_once_and_each_volume_tried_once(tmp_path, monkeypatch, capsys):
    truth = own(tmp_path, "abcdef")
    (tmp_path / "splits_final.json").write_text(json.dumps([dict(train=[f"case{c}" for c in "abcd"], val=["casee"])]))
    (tmp_path / "attributes.json").write_text('{"folder": "synapse"}')
    cut, unknown = (tmp_path / f"imagesTr/case{c}_0000.nii.gz" for c in "ab")
    cut.write_bytes(gzip.compress(gzip.decompress(cut.read_bytes())[:200]))
    write_case(tmp_path, "caseb", truth["caseb"][0], truth["caseb"][1] + 1)
    (tmp_path / "labelsTr/casec.nii.gz").unlink(), (tmp_path / "imagesTr/notes.nii.gz").touch()
    (tmp_path / "labelsTr/._casec.nii.gz").touch(), (tmp_path / "labelsTr/lost.nii.gz").touch()
    monkeypatch.setattr(sys, "argv", ["data.py", "stats", "--dataset", "folder", "--data", str(tmp_path),
                                      "--workers", "0"])
    with pytest.raises(SystemExit) as e:
        data.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong: ")]
    for named in (cut, "labelsTr/caseb.nii.gz: holds label 4", "labelsTr/casec.nii.gz: missing", "notes.nii.gz",
                  "labelsTr/lost.nii.gz: has no image", "casef, one of 1 in neither", "class tumor"):
        assert sum(str(named) in line for line in lines) == 1, (named, lines)
    assert e.value.code == 1 and len(lines) == 7, lines


# --- pictures

def test_pictures_and_how_labels_are_stored(tmp_path):
    rng = np.random.default_rng(0)
    describe(tmp_path, channels={"0": "R", "1": "G", "2": "B"}, ending=".png")
    image = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    label = rng.integers(0, 4, (12, 16), dtype=np.uint8)
    palette = Image.fromarray(label, "P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 90, 255, 255, 255])
    stored = dict(gray=Image.fromarray(label), deep=Image.fromarray(label.astype(np.uint16)), palette=palette,
                  rgb=Image.fromarray(np.repeat(label[..., None], 3, 2)), bits=Image.fromarray(label == 1))
    for case, file in stored.items():
        write_case(tmp_path, case, image, label, ending=".png")
        file.save(tmp_path / "labelsTr" / f"{case}.png")
    seen = []
    for split in data.SPLITS:
        dataset = open_dataset("folder", tmp_path, split, 32)
        assert not dataset.volumes and dataset.source.pairs[0] == ("liver", "unknown")
        for i in range(len(dataset)):
            raw, ids = dataset.source.read(i), label if dataset.key(i) != "bits" else label == 1
            assert np.array_equal(raw.image, image) and dataset.key(i) == dataset.case(i) and isinstance(raw, RawSample)
            assert set(raw.targets) == {name for name, i in LABELS.items() if i and (ids == i).any()}
            assert all(np.array_equal(mask, ids == LABELS[name]) for name, mask in masks_of(raw).items())
            seen.append(dataset.key(i))
    assert sorted(seen) == sorted(stored)
    (tmp_path / "splits_final.json").write_text(json.dumps([dict(train=["deep", "bits", "rgb"], val=["gray"])]))
    read, path = lambda: open_dataset("folder", tmp_path, "test", 32)[0], tmp_path / "labelsTr/gray.png"
    for bad, words in ((image, "numbers of labels"), (label[:5], "one grid"),
                       (label.astype(np.uint16) + 300, "0 to 255"), (label + 9, "does not name")):
        Image.fromarray(bad).save(path)
        fails(read, path, words)
    Image.fromarray(label).save(path, format="JPEG")
    fails(read, path, "PNG")
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    fails(read, path, "copy it again")
    path.unlink()
    fails(read, path, "missing")
    describe(tmp_path, ending=".png", window=[0, 9])
    fails(read, '"window"', "pictures")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(("L", "P", "RGB", "LA", "RGBA", "PA", "1", "I;16")), st.sampled_from(("none", "one", "any")),
       st.integers(2, 256), st.sampled_from(("png", "tif")), st.integers(0, 9999))
def test_labels_are_the_numbers_stored_whatever_is_transparent(tmp_path_factory, mode, see, count, suffix, seed):
    """Gray, colour or palette, with an alpha channel or a value that is called transparent."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, count if mode != "1" else 2, (9, 11), dtype=np.uint8)
    alpha = {"none": np.full((9, 11), 255), "one": np.full((9, 11), rng.integers(256)),
             "any": rng.integers(0, 256, (9, 11))}[see].astype(np.uint8)
    file = Image.fromarray(label.astype(np.uint16) if mode == "I;16" else label > 0 if mode == "1" else label)
    if mode[0] == "P":
        file = Image.fromarray(label, "P")
        file.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    elif mode[:3] == "RGB":
        file = file.convert("RGB")
    if mode[-1] == "A":
        file.putalpha(Image.fromarray(alpha))
    shown, more = int(rng.integers(count)), {}
    if suffix == "png" and see != "none":
        more = {"P": dict(transparency=alpha.tobytes() if see == "any" else shown), "RGB": dict(
            transparency=(shown,) * 3), "L": dict(transparency=shown), "1": dict(transparency=shown % 2),
            "I;16": dict(transparency=shown)}.get(mode, {})
    if mode == "PA" and suffix == "png":
        return  # there is no such PNG
    path = tmp_path_factory.mktemp("l") / f"x.{suffix}"
    file.save(path, **more)
    assert np.array_equal(read_ids(path), label)


# --- texts

def test_a_form_for_the_texts_is_written_and_never_over_another(tmp_path, monkeypatch, capsys):
    own(tmp_path, "abc", labels={"background": 0, "Liver": 1, "left_kidney": 2, "tumor": 3})
    stats = ["data.py", "stats", "--dataset", "folder", "--data", str(tmp_path), "--workers", "0"]

    def run(main, *argv):
        monkeypatch.setattr(sys, "argv", list(argv))
        with pytest.raises((SystemExit, data.InputError)) as e:
            main()
        return e.value, [line for line in capsys.readouterr().out.splitlines() if "reading" not in line]

    path = tmp_path / "attributes.json"
    error, _ = run(train.main, "train.py", "--dataset", "folder", "--data", str(tmp_path), "--light", "--image-size",
                   "64", "--out", str(tmp_path / "out"))
    assert str(path) in str(error) and "data.py stats" in str(error)
    status, lines = run(data.main, *stats)
    form, known = json.loads(path.read_text())["folder"], json.loads((data.Path("attributes.json")).read_text())
    assert form["Liver"] == known["synapse"]["liver"] and form["left_kidney"] == known["synapse"]["left kidney"]
    assert form["tumor"] == dict(position=[""], texture=[""], shape=[""]) and status.code == 1
    wrong = [line for line in lines if line.startswith("wrong")]
    assert len(wrong) == 3 and all(f"tumor, {kind}" in line for kind, line in zip(form["tumor"], wrong)), wrong
    form["tumor"] = {kind: [f"its {kind}"] for kind in form["tumor"]}
    path.write_text(written := json.dumps(dict(folder=form)))
    status, lines = run(data.main, *stats)
    assert status.code == 0 and path.read_text() == written and not any("form" in line for line in lines)
    texts = Texts("folder", path)
    assert texts("tumor", "ct")["shape"] == "its shape" and texts.concepts().keys() >= {"tumor", "polyp", "liver"}


def test_a_drafted_text_is_of_the_same_modality(tmp_path):
    own(tmp_path, channels={"0": "MRI"})
    source = open_dataset("folder", tmp_path, "train", 32).source
    args = SimpleNamespace(dataset="folder", data=str(tmp_path), attributes_file=None, texts=None)
    data.open_or_draft_texts(args, source)
    assert set(json.loads((tmp_path / "attributes.json").read_text())["folder"]["liver"]["shape"]) == {""}


# --- the same data, the same numbers

def runs_of(monkeypatch, capsys, tmp_path, flags):
    """A tiny training and evaluation -> (rows of log.csv without times, what eval.py --json has of numbers)."""
    out, cache = tmp_path / f"out-{flags[1]}", ["--cache", str(tmp_path / f"cache-{flags[1]}")]
    train_flags = ["--light", "--image-size", "64", "--feature-grid", "8", "--max-steps", "3", "--batch-size", "2",
                   "--val-slices", "4", "--targets", "2", "--workers", "0", "--limit", "6", "--out", str(out)]
    for main, argv in ((train.main, ["train.py", *flags, *cache, *train_flags]),
                       (evaluation.main, ["eval.py", *flags, *cache, "--checkpoint", str(out), "--limit", "12",
                                          "--json", str(out / "none.json")])):
        monkeypatch.setattr(sys, "argv", argv)
        main()
    capsys.readouterr()
    with open(out / "log.csv") as file:
        log = [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds", "memory_mb")}
               for row in csv.DictReader(file)]
    result = json.loads((out / "none.json").read_text())
    return log, {name: result[name] for name in ("table", "modalities", "volumes", "targets", "images", "step")}


def test_what_training_says_comes_next_tests_on_no_case_that_was_trained_on(tmp_path, monkeypatch, capsys):
    """The command that train.py prints finds the data, and the fold, by the checkpoint alone."""
    folder, out, names = tmp_path / "own", tmp_path / "out", "abcdef"
    own(folder, names, shape=(2, 12, 16))
    (folder / "attributes.json").write_text(json.dumps(dict(folder={name: {
        kind: [f"its {kind}"] for kind in ("position", "texture", "shape")} for name in LABELS if LABELS[name]})))
    folds = [[f"case{name}" for name in part] for part in ("ab", "cd", "ef")]
    (folder / "splits_final.json").write_text(json.dumps([
        dict(train=sorted(set(sum(folds, [])) - set(fold)), val=fold) for fold in folds]))

    def said(main, argv):
        monkeypatch.setattr(sys, "argv", argv)
        main()
        return capsys.readouterr().out

    flags = ["--light", "--image-size", "64", "--feature-grid", "8", "--max-steps", "1", "--batch-size", "2",
             "--val-slices", "2", "--targets", "1", "--workers", "0", "--cache", "none", "--out", str(out)]
    for fold in (1, 2):
        line = said(train.main, ["train.py", "--dataset", "folder", "--data", str(folder), "--fold", str(fold), *flags])
        command, more = line.split("next: python ")[1].split(), ["--cache", "none", "--json", str(out / "x.json")]
        line, result = said(evaluation.main, command + more), json.loads((out / "x.json").read_text())
        assert set(result["volumes"]["case"]) == set(folds[fold]) == set(parts(folder, fold=fold)["test"])
        assert result["fold"] == fold and f"as the checkpoint was trained: --data {folder} --fold {fold}" in line
        assert "trained with" not in line
    line, result = said(evaluation.main, [*command, *more, "--fold", "0"]), json.loads((out / "x.json").read_text())
    assert "trained with --fold 2: cases of fold 0 may have been trained on" in line and result["fold"] == 0
    assert set(result["volumes"]["case"]) == set(folds[0])
    folder.rename(tmp_path / "moved")  # the fold is that of training wherever the data are now
    fails(lambda: said(evaluation.main, command), "data/folder", "--data")
    said(evaluation.main, [*command, *more, "--data", str(tmp_path / "moved")])
    result = json.loads((out / "x.json").read_text())
    assert set(result["volumes"]["case"]) == set(folds[2]) and result["fold"] == 2


def equal_sets(first, second, size):
    """Two open_dataset arguments: slice by slice the same arrays and texts in all splits; -> how many slices."""
    count = 0
    for split in data.SPLITS:
        a, b = (open_dataset(*args, split, size) for args in (first, second))
        texts = [Texts("folder", args[1] / "attributes.json") if args[0] == "folder" else Texts(args[0])
                 for args in (first, second)]
        assert keys(a) == keys(b) and cases(a) == cases(b) and a.classes == b.classes and a.volumes == b.volumes
        assert tuple(a.source.pairs) == tuple(b.source.pairs)
        assert all(texts[0](*pair, number=n) == texts[1](*pair, number=n) for pair in a.source.pairs for n in range(9))
        for x, y in zip(a, b):
            assert same(x, y) and x.modality == y.modality, (x.key, y.key)
        count += len(a)
    return count


def test_synapse_in_this_layout(tmp_path, real_data, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(real_data))
    import layout
    names, val, short = ("0005", "0006", "0010", "0028"), ("0010", "0028"), layout.case
    # every eighth slice of the middle, for time; both layouts are made of these
    monkeypatch.setattr(layout, "case", lambda name: (*(v[30:110:8] for v in short(name)[:2]), short(name)[2]))
    monkeypatch.setattr(layout, "cases", lambda: list(names))
    layout.synapse(tmp_path / "synapse", val)
    spacing, root = {}, tmp_path / "own"
    describe(root, {"background": 0} | {name: i for i, name in enumerate(data.Synapse.classes, 1)})
    (root / "attributes.json").write_text('{"folder": "synapse"}')  # they share its texts
    lut = np.array([layout.EIGHT.get(i, 0) for i in range(14)], np.uint8)
    for name in names:
        image, label, sizes = layout.case(name)
        hu = np.round(image / 255 * 400 - 125).astype(np.int16)
        for kind in ("Tr", "Ts") if name in val else ("Tr",):
            write_case(root, f"case{name}", hu, lut[label], kind, sizes=sizes, codes="RAS" if name == "0006" else "LPS")
        spacing[f"case{name}"] = [round(float(np.float32(s)), 6) for s in sizes[::-1]]  # as NIfTI's header has it
    (tmp_path / "synapse/spacing.json").write_text(json.dumps(spacing))
    split = lambda chosen: [f"case{name}" for name in names if (name in val) == chosen]
    (root / "splits_final.json").write_text(json.dumps([dict(train=split(False), val=split(True))]))
    both = ("synapse", tmp_path / "synapse"), ("folder", root)
    assert equal_sets(*both, 256) == equal_sets(*both, 96) > 50
    logs, results = zip(*(runs_of(monkeypatch, capsys, tmp_path, ["--dataset", name, "--data", str(folder)])
                          for name, folder in both))
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == ["3", "3"] and logs[0][0]["loss"]
    assert results[0] == results[1] and results[0]["table"]["mean"]["hd95_strict_mm"]


def test_kvasir_in_this_layout(tmp_path, linked, monkeypatch, capsys):
    kvasir_root, root = linked("kvasir"), tmp_path / "own"
    for name in ("images", "masks"):  # fewer, for time
        files = [file.resolve() for file in sorted((kvasir_root / name).iterdir())[:14]]
        (kvasir_root / name).unlink()
        (kvasir_root / name).mkdir()
        for file in files:
            (kvasir_root / name / file.name).symlink_to(file)
    describe(root, {"background": 0, "polyp": 1}, {"0": "R", "1": "G", "2": "B"}, ".png", modality="endoscopy")
    (root / "attributes.json").write_text('{"folder": "kvasir"}')
    found = {split: keys(open_dataset("kvasir", kvasir_root, split, 32)) for split in data.SPLITS}
    for split, names in found.items():
        for name in names:
            image = np.asarray(Image.open(kvasir_root / "images" / f"{name}.jpg").convert("RGB"))
            mask = np.asarray(Image.open(kvasir_root / "masks" / f"{name}.jpg").convert("L")) > 127
            write_case(root, name, image, mask.astype(np.uint8), "Ts" if split == "test" else "Tr", ending=".png")
    (root / "splits_final.json").write_text(json.dumps([dict(train=found["train"], val=found["val"])]))
    both = ("kvasir", kvasir_root), ("folder", root)
    assert equal_sets(*both, 64) == 14
    logs, results = zip(*(runs_of(monkeypatch, capsys, tmp_path, ["--dataset", name, "--data", str(folder)])
                          for name, folder in both))
    assert logs[0] == logs[1] and logs[0] and results[0] == results[1] and results[0]["table"]["mean"]

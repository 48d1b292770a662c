"""readers/sa_med2d.py: the index against a plain reading of the JSON, the splits, known defects, broken files."""
import json
import multiprocessing
import pickle
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import fails
from readers.pictures import split_cases
from readers.sa_med2d import SAMed2D

CLASSES = {"liver": "0001", "Left_Kidney": "0002", "polyp": "0003"}


def write(root, seed=0, sources=("AMOS", "KiTS", "größe"), cases=6, slices=3, shape=(40, 52)):
    """A data set of random structure in the layout of SA-Med2D-20M. -> its JSON."""
    rng, entries = np.random.default_rng(seed), {}
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for source in sources:
        for case in range(cases):
            for z in range(slices):
                stem = f"{rng.choice(['ct_00', 'mr_t1'])}--{source}--case{case}--z_{z:04d}"
                Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(root / f"images/{stem}.png")
                names = []
                for number in rng.permutation(list(CLASSES.values()))[:rng.integers(0, 4)]:
                    for instance in range(rng.integers(1, 3)):
                        mask = np.zeros(shape, np.uint8)
                        mask[2:2 + rng.integers(5, 30), 3:3 + rng.integers(5, 40)] = rng.choice([1, 255])
                        names.append(f"masks/{stem}--{number}_{instance:03d}.png")
                        Image.fromarray(mask).save(root / names[-1])
                entries[f"images/{stem}.png"] = names
    save(root, entries)
    return entries


def save(root, entries):
    (root / "SAMed2D_v1.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    (root / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(CLASSES))


def class_of(mask):
    number = mask.rsplit("--", 1)[1].split("_")[0]
    return {v: k.replace("_", " ").lower() for k, v in CLASSES.items()}[number]


@pytest.mark.parametrize("seed", range(4))
def test_the_index_says_what_the_json_says(tmp_path, seed):
    entries, seen = write(tmp_path, seed), []
    occurs = defaultdict(set)
    for image, masks in entries.items():
        occurs[image.split("--")[1], image[7:9]].update(map(class_of, masks))
    for split in ("train", "val", "test"):
        dataset = SAMed2D(tmp_path, split)
        assert dataset.problems == [] and set(dataset.classes) <= {"liver", "left kidney", "polyp"}
        for i in range(len(dataset)):
            image = f"images/{dataset.key(i)}.png"
            modality, source, case, _ = dataset.key(i).split("--")
            seen.append(image)
            assert dataset.case(i) == f"{source}--{case}" and dataset.group(i)[1] == modality[:2]
            assert case in [c.split("--")[1] for c in split_cases([f"{source}--case{n}" for n in range(6)], split)]
            picture, here = dataset.read(i), [class_of(m) for m in entries[image]]
            assert list(picture.targets) == here and picture.modality == modality[:2]
            assert set(picture.absent) == occurs[source, modality[:2]] - set(here)
            for mask, name in zip(picture.masks, entries[image]):
                assert np.array_equal(mask, np.array(Image.open(tmp_path / name)) > 0)
            assert np.array_equal(picture.image, np.array(Image.open(tmp_path / image)))
    assert sorted(seen) == sorted(entries)


def test_no_per_image_objects_and_the_same_in_other_processes(tmp_path):
    write(tmp_path)
    dataset = SAMed2D(tmp_path, "train")
    assert len(pickle.dumps(dataset)) < 1500  # paths, not rows
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy.key(i) for i in range(len(copy))] == [dataset.key(i) for i in range(len(dataset))]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(copy.key, (3,)) == dataset.key(3)
    sent = pickle.dumps(dataset)
    (tmp_path / "index.arrow").unlink()
    fails(lambda: pickle.loads(sent), tmp_path / "index.arrow", "start again")


def test_an_index_that_cannot_be_written(tmp_path):
    write(tmp_path)
    (tmp_path / "index.lock").mkdir()
    fails(lambda: SAMed2D(tmp_path, "train"), tmp_path / "index.arrow", "cannot be written")


def test_many_problems_are_counted(tmp_path):
    entries = write(tmp_path)
    save(tmp_path, entries | {f"images/{i}.png": [] for i in range(1500)})
    problems = SAMed2D(tmp_path, "train").problems
    assert len(problems) == 1001 and problems[-1].endswith("500 more problems")


def test_the_index_is_built_once_and_again_when_the_json_changes(tmp_path):
    entries = write(tmp_path)
    count = sum(len(SAMed2D(tmp_path, split)) for split in ("train", "val", "test"))
    index = tmp_path / "index.arrow"
    built = index.stat().st_mtime_ns
    SAMed2D(tmp_path, "test")
    assert index.stat().st_mtime_ns == built and count == len(entries)
    first = next(iter(entries))
    save(tmp_path, {k: v for k, v in entries.items() if k != first})
    assert sum(len(SAMed2D(tmp_path, split)) for split in ("train", "val", "test")) == count - 1
    whole = index.read_bytes()
    for damaged in (b"", whole[:40], whole[:-40], whole[40:], whole[:-200] + whole[-100:]):  # built anew
        index.write_bytes(damaged)
        assert sum(len(SAMed2D(tmp_path, split)) for split in ("train", "val", "test")) == count - 1
    assert not list(tmp_path.glob("*.part"))


def find(root, key):
    for split in ("train", "val", "test"):
        dataset = SAMed2D(root, split)
        for i in range(len(dataset)):
            if dataset.key(i) == key:
                return dataset, i


def test_known_defects(tmp_path):
    entries = write(tmp_path, sources=("A", "iChallenge_ADAM_Task2"))
    image = next(k for k, masks in entries.items() if "--A--" in k and len(masks) > 1)
    shape, mask = (40, 52), entries[image][0]
    for content, strict in ((np.ones((39, 52)), "[39, 52]"), (np.zeros(shape), "empty")):
        Image.fromarray((content * 255).astype(np.uint8)).save(tmp_path / mask)
        dataset, i = find(tmp_path, image[7:-4])
        picture = dataset.read(i)
        assert len(picture.targets) == len(entries[image]) - 1
        fails(lambda: dataset.read(i, strict=True), tmp_path / mask, strict)
    speck = np.zeros(shape, np.uint8)
    speck[:1, :3] = 255  # 3 of 2080 pixels: below 0.153 %
    Image.fromarray(speck).save(tmp_path / mask)
    assert len(dataset.read(i, strict=True).targets) == len(entries[image]) - 1
    if class_of(mask) not in map(class_of, entries[image][1:]):
        assert class_of(mask) not in dataset.read(i).targets + dataset.read(i).absent
    inverted = next(k for k, masks in entries.items() if "ADAM" in k and masks)
    dataset, i = find(tmp_path, inverted[7:-4])
    assert np.array_equal(dataset.read(i).masks[0], np.array(Image.open(tmp_path / entries[inverted][0])) == 0)


def test_broken_files_are_named(tmp_path):
    entries = write(tmp_path)
    image = next(k for k, masks in entries.items() if masks)
    dataset, i = find(tmp_path, image[7:-4])
    for path in (tmp_path / image, tmp_path / entries[image][0]):
        whole = path.read_bytes()
        for cut in (0, 8, len(whole) // 2):
            path.write_bytes(whole[:cut])
            fails(lambda: dataset.read(i), path, "copy it again")
        path.unlink()
        fails(lambda: dataset.read(i), path, "missing")
        path.write_bytes(whole)


@pytest.mark.parametrize("image,mask,words", [
    ("/etc/ct_00--A--c--z_1.png", None, "not named like images/"),
    ("images/../ct_00--A--c--z_1.png", None, "not named like images/"),
    ("../images/ct_00--A--c--z_1.png", None, "not named like images/"),
    ("images/liver.png", None, "not named like images/"), ("images/ct_00--A--c--z_1\n.png", None, "not named like"),
    (None, "masks/../x.png", "not named like masks/"), (None, "/etc/passwd", "not named like masks/"),
    (None, 3, "not named like masks/"), (None, "masks/other--0001_000.png", "not named like masks/"),
    (None, "../masks/{}--0001_000.png", "not named like masks/"), (None, "masks/{}", "not named like masks/"),
    (None, "masks/{}/--0001_000.png", "not named like masks/"), (None, "masks/{}--0099_000.png", "99")])
def test_bad_entries_are_problems_and_never_opened(tmp_path, image, mask, words):
    entries = write(tmp_path)
    if image:
        entries[image] = []
    else:
        good = next(iter(entries))
        entries[good] = [mask.format(good[7:-4]) if isinstance(mask, str) else mask]
    save(tmp_path, entries)
    datasets = [SAMed2D(tmp_path, split) for split in ("train", "val", "test")]
    problems = datasets[0].problems
    assert len(problems) == 1 and words in problems[0] and "SAMed2D_v1.json" in problems[0] and "\n" not in problems[0]
    assert sum(map(len, datasets)) == len(entries) - bool(image)
    for dataset in datasets:
        for i in range(len(dataset)):
            dataset.read(i)


def test_bad_json(tmp_path):
    fails(lambda: SAMed2D(tmp_path, "train"), tmp_path, "SAMed2D_v1.json")
    write(tmp_path)
    path = tmp_path / "SAMed2D_v1.json"
    whole = path.read_text()
    for bad in ("", "[]", "3", "{", whole[:-5], whole[:len(whole) // 2], "not json"):
        path.write_text(bad)
        fails(lambda: SAMed2D(tmp_path, "train"), path, "copy")
    path.write_text("{}")
    fails(lambda: SAMed2D(tmp_path, "train"), tmp_path, "no image for train")


def test_sam_med2ds_own_form(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    train, test = {}, {}
    for case in range(8):
        for number in range(2):
            stem = f"amos_{case:04d}_{number}"
            Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)).save(tmp_path / f"images/{stem}.png")
            masks = [f"data/masks/{stem}_{name}_000.png" for name in ("inferior_vena_cava", "liver")]
            for mask in masks:
                Image.fromarray(np.full((20, 30), 255, np.uint8)).save(tmp_path / mask[5:])
            if case < 6:
                train[f"data/images/{stem}.png"] = masks
            else:
                test |= {mask: f"data/images/{stem}.png" for mask in masks}
    (tmp_path / "image2label_train.json").write_text(json.dumps(train))
    (tmp_path / "label2image_test.json").write_text(json.dumps(test))
    sizes = {}
    for split in ("train", "val", "test"):
        dataset = SAMed2D(tmp_path, split)
        sizes[split] = len(dataset)
        assert dataset.classes == ("inferior vena cava", "liver")
        cases = {dataset.case(i) for i in range(len(dataset))}
        assert cases.isdisjoint({"amos_0006", "amos_0007"}) == (split != "test")
        picture = dataset.read(0)
        assert picture.targets == dataset.classes and picture.absent == () and picture.modality == "unknown"
    assert sizes["test"] == 4 and sizes["train"] + sizes["val"] == 12 and sizes["val"] > 0


def test_real_samples(linked):
    for name, n in (("sa-med2d-mini", 371), ("sammed2d-demo", 4)):
        root, total = linked(name), 0
        for split in ("train", "val", "test"):
            try:
                dataset = SAMed2D(root, split)
            except ValueError:
                continue  # the demo is too small to have all three
            total += len(dataset)
            for i in range(0, len(dataset), 9):
                picture = dataset.read(i, strict=True)
                assert len(picture.targets) == len(picture.masks) and picture.image.std() > 5
        assert total == n, name


def test_workers(tmp_path):
    from data import open_dataset
    write(tmp_path)
    dataset = open_dataset("sa-med2d", tmp_path, "train", 32)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    for sample, i in zip(loader, range(len(dataset))):
        assert sample.key == dataset[i].key and np.array_equal(sample.masks, dataset[i].masks)


def test_what_occurs_twice_is_named_and_taken_once(tmp_path):
    """Masks of one test image may stand anywhere in {mask: image}; an image or a mask may not come twice."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    train = ['"data/images/a_0_1.png": ["masks/a_0_1_liver_0.png", "masks/a_0_1_liver_0.png"]',
             '"images/a_1_1.png": []', '"other/images/a_0_1.png": ["masks/a_0_1_aorta_0.png"]',
             '"images/b_0_1.png": ["masks/b_0_1_liver_0.png"]', '"images/c_0_1.png": 3']
    (tmp_path / "image2label_train.json").write_text("{" + ", ".join(train) + "}")
    test = {f"masks/b_{n}_1_{organ}_0.png": f"images/b_{n}_1.png" for organ in ("liver", "aorta") for n in (0, 2)}
    (tmp_path / "label2image_test.json").write_text(json.dumps(test))
    splits = {split: SAMed2D(tmp_path, split) for split in ("train", "val", "test")}
    found = {s.key(i): [target for _, target in s.masks(i)] for s in splits.values() for i in range(len(s))}
    assert found == {"a_0_1": ["liver"], "a_1_1": [], "b_0_1": ["liver", "aorta"], "b_2_1": ["liver", "aorta"]}
    assert len(splits["test"]) == 2
    problems = splits["test"].problems
    for words in ("'a_0_1.png' occurs twice", "c_0_1.png': 3 is not", "same case"):
        assert sum(words in line for line in problems) == 1, problems
    assert len(problems) == 3

"""Prediction on one's own files: images, volumes and explanations, on the input's own grid, and bad input."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import inference
import plots
import predict
from common import ATTRIBUTES, LIGHT, InputError
from conftest import ROOT, fails
from inference import explain
from medsegr import Config, MedSegR, Priors
from readers.dicom import read_dicom
from runs import save_checkpoint
from test_dicom import HU, dataset, save, series
from test_volumes import volume_file
from texts import Texts

TEXT = dict(position="on the left", texture="bright", shape="round")

# ---------------------------------------------------------------------------------------------------------------------
# The command

def command(monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, flags), "--checkpoint", str(folder)])
    predict.main()


def test_an_image(model, tmp_path, monkeypatch, capsys):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    command(monkeypatch, model[1], tmp_path / "x.png", "--target", "liver", "--target", "left kidney", "--explain",
            "--out", tmp_path / "o", "--box", 3, 4, 30, 40, "--box", 40, 4, 70, 40)
    files = {f.name for f in (tmp_path / "o").iterdir()}
    assert files == {"volumes.csv", "x-input.json", "x-liver.png", "x-left_kidney.png", "x-overlay.png",
                     "x-liver-explained.png", "x-left_kidney-explained.png"}
    assert Image.open(tmp_path / "o/x-liver.png").size == (80, 48)
    assert set(np.unique(np.asarray(Image.open(tmp_path / "o/x-liver.png")))) <= {0, 255}
    out = capsys.readouterr().out
    assert "liver: " in out and "expected IoU" in out and "homogeneous" not in out  # no clinical text is logged
    picture = np.asarray(Image.open(tmp_path / "o/x-liver-explained.png").convert("L"))
    assert picture.shape[1] > 1200 and (picture < 100).mean() > 0.1


def test_texts_of_a_report(model, tmp_path, monkeypatch):
    """texts.jsonl, as report.py writes it, in place of the class's texts; the class need not be known then."""
    Image.new("RGB", (40, 40), "gray").save(tmp_path / "x.png")
    (tmp_path / "t.jsonl").write_text(json.dumps(dict(image="x", target="cyst", source="rules", **TEXT)))
    seen = []
    monkeypatch.setattr(inference, "predict_image", lambda model, image, texts, *a, f=inference.predict_image, **k:
                        seen.append(texts) or f(model, image, texts, *a, **k))
    command(monkeypatch, model[1], tmp_path / "x.png", "--target", "cyst", "--texts", tmp_path / "t.jsonl", "--out", tmp_path)
    assert seen == [[[TEXT]]]
    with pytest.raises(InputError, match="cyst"):
        command(monkeypatch, model[1], tmp_path / "x.png", "--target", "cyst", "--out", tmp_path)


@pytest.mark.parametrize("off", [dict(priors=()), dict(cognitive=False), dict(perceptual=False, branches=("sem",))])
def test_explanations_of_models_with_parts_switched_off(off, tmp_path):
    model = MedSegR(Config(**LIGHT, image_size=64, feature_grid=8, **off)).eval()
    image = np.zeros((40, 40, 3), np.uint8)
    points = np.array([[[5, 6]]], np.float32), np.array([[1]])
    answer = inference.predict_image(model, image, [TEXT], points=points)
    plots.explanation(tmp_path / "x.png", "thing", explain(model, image, answer, 0, [TEXT], None, points))
    assert (tmp_path / "x.png").stat().st_size > 20_000


def test_a_volume(model, tmp_path, monkeypatch, capsys):
    stored = volume_file(tmp_path / "v.nii.gz", (2, 0, 1), (True, False, False))
    free = [f for kind in ATTRIBUTES for f in (f"--{kind}", "bright, in the middle")]
    command(monkeypatch, model[1], tmp_path / "v.nii.gz", *free, "--out", tmp_path / "o")
    label = nib.load(tmp_path / "o/v-label.nii.gz")
    assert label.shape == stored.shape and np.allclose(label.affine, nib.load(tmp_path / "v.nii.gz").affine)
    assert json.loads((tmp_path / "o/v-labels.json").read_text()) == {"1": "target"}
    assert "6 coronal slices" in capsys.readouterr().out and (tmp_path / "o/v-overlay.png").is_file()
    command(monkeypatch, model[1], tmp_path / "v.nii.gz", *free, "--slice", 2, "--point", 1, 1, "--point", 2, 2, 0,
            "--out", tmp_path / "p")
    assert (tmp_path / "p/v-slice002-target.png").is_file()


def test_a_dicom_slice(model, tmp_path, monkeypatch, capsys):
    """A single file: a volume of one slice, on which a box may lie as on an image; the window is told."""
    file = series(tmp_path / "s", np.tile(HU[:1], (1, 8, 8))) / "000.dcm"
    command(monkeypatch, model[1], file, "--target", "liver", "--out", tmp_path / "o")
    label = nib.load(tmp_path / "o/000-label.nii.gz")
    assert label.shape == (56, 40, 1) and "shown are its values from -125 to 275" in capsys.readouterr().out
    for flags in ((), ("--slice", 0)):
        command(monkeypatch, model[1], file, "--target", "liver", "--box", 5, 5, 20, 20, *flags, "--out", tmp_path / "p")
        assert Image.open(tmp_path / "p/000-slice000-liver.png").size == (56, 40)
    save(dataset(np.zeros((3, 40, 56), np.uint8), Modality="OT"), tmp_path / "film")
    command(monkeypatch, model[1], tmp_path / "film", "--target", "liver", "--slice", 2, "--out", tmp_path / "q")
    assert Image.open(tmp_path / "q/film-slice002-liver.png").size == (56, 40)


def test_inputs_are_looked_at_before_a_model_is_loaded(tmp_path, monkeypatch):
    """All of them, and without a checkpoint, so that a refusal costs no more than it must."""
    monkeypatch.setattr("runs.load_checkpoint", lambda *a, **k: pytest.fail("the model was loaded first"))
    monkeypatch.setattr("runs.default_checkpoint", lambda *a, **k: pytest.fail("the model was looked for first"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("x.png")
    volume_file(tmp_path / "v.nii", (0, 1, 2), (False,) * 3)
    (tmp_path / "cut.nii").write_bytes((tmp_path / "v.nii").read_bytes()[:-9])
    for flags, named in (("cut.nii", "cut.nii"), ("v.nii --window 275 -125", "--window 275 -125"),
                         ("v.nii --window nan 3", "--window"), ("x.png --window 0 3", "--window"),
                         ("x.png --series 3", "--series 3"), ("v.nii --series 3", "--series 3"),
                         ("x.png --box 1 2 300 4", "--box"), ("v.nii --slice 2 --box 1 2 300 4", "--box")):
        monkeypatch.setattr(sys, "argv", ["predict.py", *flags.split(), "--target", "liver"])
        with pytest.raises(InputError, match=named):
            predict.main()


def test_switches_of_a_volume(model, tmp_path, monkeypatch, capsys):
    """The mean over wordings is asked for, and the largest component of each target alone is written; without it, what
    lies apart is said."""
    volume_file(tmp_path / "v.nii.gz", (0, 1, 2), (False,) * 3)
    seen = []

    def two_parts(model, volume, texts, precision, min_iou):
        seen.append(texts)
        label = np.zeros(volume.shape, np.uint8)
        label[1:3, 1:3, 1], label[5, 6, 4] = 1, 1
        return label, np.ones(1)

    monkeypatch.setattr(inference, "predict_volume", two_parts)
    flags = tmp_path / "v.nii.gz", "--target", "liver", "--out", tmp_path
    for switches, voxels, wordings in (((), 5, 1), (("--largest-component", "--mean-wordings", 3), 4, 3)):
        command(monkeypatch, model[1], *flags, *switches)
        assert np.count_nonzero(np.asarray(nib.load(tmp_path / "v-label.nii.gz").dataobj)) == voxels
        assert [len(words) for words in seen.pop()] == [wordings]
        assert ("v: apart from its largest part lies of liver 20%" in capsys.readouterr().out) == (voxels == 5)


def test_several_inputs_and_no_checkpoint_named(model, tmp_path, monkeypatch, capsys):
    """Each input has results of its own; the shipped weights are taken where nothing was trained, and it says so."""
    monkeypatch.setattr("runs.WEIGHTS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Image.new("L", (40, 30)).save(f"{name}.png")
    monkeypatch.setattr(sys, "argv", "predict.py a.png b.png --target liver --out o".split())
    with pytest.raises(InputError, match="train.py"):
        predict.main()
    save_checkpoint(model[0], "weights/abdomen-ct.safetensors", dataset="synapse")
    predict.main()
    assert {f.name for f in (tmp_path / "o").iterdir()} == {
        "volumes.csv", *(f"{n}-{what}" for n in "ab" for what in ("liver.png", "overlay.png", "input.json"))}
    assert f"checkpoint {tmp_path}/weights/abdomen-ct.safetensors: backbone" in capsys.readouterr().out


@pytest.mark.parametrize("flags,named", [
    (["none.png", "--target", "liver"], "none.png"), (["x.png"], "--target"), (["x.png", "--shape", "round"], "--position"),
    (["x.png", "--target", "tail"], "tail"), (["x.txt", "--target", "liver"], "x.txt"),
    (["cut.png", "--target", "liver"], "cut.png"), (["cut.nii.gz", "--target", "liver"], "cut.nii.gz"),
    (["x.png", "--target", "liver", "--box", 1, 2, 300, 4], "--box 1 2 300 4"),
    (["x.png", "--target", "liver", "--target", "spleen", "--box", 1, 2, 3, 4], "--box"),
    (["x.png", "--target", "liver", "--point", 99, 4], "--point 99 4"),
    (["x.png", "--target", "liver", "--point", 1], "--point"), (["x.png", "--target", "liver", "--slice", 1], "--slice 1"),
    (["v.nii", "--target", "liver", "--box", 1, 1, 2, 2], "--slice"), (["v.nii", "--target", "liver", "--slice", 9], "0 to"),
    (["flat.nii", "--target", "liver"], "not HU"), (["empty", "--target", "liver"], "no DICOM"),
    (["x.png", "--target", "liver", "--modality", "sonar"], "--modality"),
    (["x.png", "--target", "liver", "--mean-wordings", 0], "--mean-wordings"),
    (["x.png", "--target", "liver", "--largest-component"], "--largest-component"),
    (["v.nii", "--target", "liver", "--slice", 1, "--largest-component"], "--largest-component"),
    (["x.png", "--target", "liver", "--plane", "coronal"], "--plane"), (["@none.txt", "--target", "liver"], "none.txt"),
    (["x.png", "v.nii", "--target", "tail"], "tail"),
    (["x.png", "v.nii", "--target", "liver", "--box", 1, 2, 3, 4], "--box"),
    (["x.png", "empty/../x.png", "--target", "liver"], "x.png")])
def test_bad_input_is_named(flags, named, model, tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:50])
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    volume_file(tmp_path / "v.nii", (0, 1, 2), (False,) * 3)
    volume_file(tmp_path / "cut.nii.gz", (0, 1, 2), (False,) * 3)
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "cut.nii.gz").read_bytes()[:-60])
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), 7, np.int16), np.eye(4)), tmp_path / "flat.nii")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=named.replace("(", "")) as e:
        command(monkeypatch, model[1], *flags, "--out", tmp_path / "o")
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Planes

class Threshold:
    """In place of a model: the mask of any target is where the image exceeds 127."""
    device, config = torch.device("cpu"), Config(**LIGHT, image_size=8)

    def encode_image(self, images):
        return images.float()

    def encode_attributes(self, texts, empty=False):
        return Priors(None, None, None, None, torch.zeros(len(texts), 1))

    def decode(self, features, image, priors, points=None, boxes=None, explain=False):
        return features[image].mean(1) - 127.5, torch.full((len(image),), 0.75), {}


@pytest.fixture
def threshold(monkeypatch):
    """threshold(INPUT, *flags) -> the exit status of predict.py with Threshold, whose pictures are empty."""
    def ask(*flags):
        try:
            command(monkeypatch, ROOT / "weights/abdomen-ct.safetensors", *flags, "--target", "liver", "--precision",
                    "float32")
        except SystemExit as e:
            return e.code
        return 0

    def load_model(args):
        predict.choose_checkpoint(args)
        predict.make_folder(args.out)
        return Threshold(), Texts("synapse")

    monkeypatch.setattr(predict, "load_model", load_model)
    monkeypatch.setattr(plots, "contact_sheet", lambda pictures, path, *a, **k: path.touch())
    return ask


@pytest.mark.parametrize("plane", [None, *predict.PLANES])
def test_labels_lie_on_the_grid_of_the_input_whatever_the_plane(plane, threshold, tmp_path):
    """Ten of the 48 ways to store a volume, with random values, spacing and angle: the label is the threshold."""
    rng, ways = np.random.default_rng(0), [*product(permutations(range(3)), product((1, -1), repeat=3))]
    stored = {}
    for n in rng.permutation(len(ways))[:10]:
        (axes, flips), name = ways[n], f"{n}.nii" + ".gz" * (n % 2)
        affine, angle = np.zeros((4, 4)), rng.uniform(-0.4, 0.4)
        affine[axes, range(3)] = rng.choice([0.5, 1.0, 3.0], 3) * flips
        c, s = np.cos(angle), np.sin(angle)
        affine = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]]) @ affine
        affine[:, 3] = *rng.uniform(-99, 99, 3), 1
        stored[name] = rng.integers(-1000, 1000, (8, 8, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(stored[name], affine), tmp_path / name)
    flags = ("--plane", plane) if plane else ()
    assert not threshold(tmp_path, "--window", -1000, 1000, "--out", tmp_path / "o", *flags)
    for name, values in stored.items():
        image, label = nib.load(tmp_path / name), nib.load(tmp_path / "o" / f"{name.split('.')[0]}-label.nii.gz")
        assert np.array_equal(np.asarray(label.dataobj), values > -0.4), name
        assert np.allclose(label.affine, image.affine, atol=1e-4)
    rows = [*csv.DictReader(open(tmp_path / "o/volumes.csv"))]
    assert len(rows) == 10
    for row in rows:
        name = next(name for name in stored if name.split(".")[0] == row["input"])
        size = np.prod(nib.load(tmp_path / name).header.get_zooms()) / 1000
        assert row["target"] == "liver" and int(row["voxels"]) == (stored[name] > -0.4).sum()
        assert float(row["ml"]) == pytest.approx(int(row["voxels"]) * size, rel=1e-5) and row["expected_iou"] == "0.750"


@pytest.mark.parametrize("spacing, shape, plane", [
    ((3, 1, 1), (9, 9, 9), "axial"), ((0.5, 0.98, 0.98), (9, 9, 9), "axial"), ((1, 4, 1), (9, 9, 9), "coronal"),
    ((1, 1.2, 4), (9, 9, 9), "sagittal"), ((1, 1, 1.2), (9, 9, 9), "axial"), ((1, 1, 1), (9, 1, 9), "coronal"),
    ((1, 4, 1), (1, 9, 9), "axial"), ((1, 1, 1), (1, 9, 1), "axial")])
def test_the_plane_of_best_resolution(spacing, shape, plane):
    grid = predict.SimpleNamespace(spacing=spacing, shape=shape)
    ask = lambda **flags: predict.PLANES[predict.plane_of(predict.SimpleNamespace(
        **dict(plane=None, slice=None, box=None, point=None) | flags), grid)]
    assert ask() == plane and ask(plane="sagittal") == "sagittal"
    assert ask(slice=3) == ask(box=[[1, 2, 3, 4]]) == ask(point=[[1, 2]]) == "axial"


def test_slices_are_upright():
    volume = np.arange(3 * 4 * 5).reshape(3, 4, 5)  # z from inferior to superior, y to posterior, x to the left
    coronal, sagittal = predict.slices_of(volume, 1), predict.slices_of(volume, 2)
    assert coronal.shape == (4, 3, 5) and sagittal.shape == (5, 3, 4)
    assert np.array_equal(coronal[1][0], volume[2, 1]) and np.array_equal(sagittal[3][0], volume[2, :, 3])
    assert predict.slices_of(volume, 0) is volume


def test_a_slice_of_another_plane(threshold, tmp_path):
    volume_file(tmp_path / "v.nii", (0, 1, 2), (False,) * 3)  # 5 x 7 x 6: x, y and z
    ask = lambda *flags: threshold(tmp_path / "v.nii", "--out", tmp_path / "o", *flags)
    for flags, name, size in (((), "slice004", (5, 7)), (("--plane", "coronal"), "coronal004", (5, 6)),
                              (("--plane", "sagittal"), "sagittal004", (7, 6))):
        ask("--slice", 4, *flags)
        assert Image.open(tmp_path / f"o/v-{name}-liver.png").size == size
    ask("--slice", 6, "--plane", "coronal")
    fails(lambda: ask("--slice", 6), "--slice 6", "0 to 5")
    fails(lambda: ask("--slice", 2, "--plane", "sagittal", "--box", 0, 0, 7, 5), "--box")
    assert {row["input"] for row in csv.DictReader(open(tmp_path / "o/volumes.csv"))} == {
        "v-slice004", "v-coronal004", "v-sagittal004", "v-coronal006"}


# ---------------------------------------------------------------------------------------------------------------------
# Several inputs

@pytest.fixture
def folder(tmp_path):
    """20 inputs of all kinds, of which two are broken, and what is none -> the folder, {name: file or series}."""
    root, inputs = tmp_path / "in", {}
    rng = np.random.default_rng(0)
    for path in ("a.png", "b.jpg", "sub/a.png", "sub/deep er/c.bmp"):
        inputs[path] = gray(root / path)
    deep = rng.integers(0, 4000, (30, 40)).astype(np.uint16)
    for path in ("deep.tif", "sub/deep.tiff"):
        Image.fromarray(deep).save(root / path)
        inputs[path] = root / path
    for n, (axes, flips) in enumerate(zip(permutations(range(3)), product((False, True), repeat=3))):
        path = root / ("sub" if n % 2 else "") / f"v{n}.nii{'.gz' * (n % 3 > 0)}"
        volume_file(path, axes, flips, oblique=0.1 * n)
        nib.save(nib.Nifti1Image.from_image(nib.load(path)).slicer[:, :, :2], path)
        inputs[str(path.relative_to(root))] = path
    for n in range(6):
        place = root / "dicom" / f"patient {n % 2}"
        place.mkdir(parents=True, exist_ok=True)
        inputs[f"dicom/patient {n % 2}/{n}"] = series(place / str(n), HU[:2], start=(n, 2 * n, 3))
    for path in ("sub/cut.nii.gz", "z.png"):
        content = (root / "sub/v1.nii.gz" if "nii" in path else root / "a.png").read_bytes()
        (root / path).write_bytes(content[:len(content) // 2])
        inputs[path] = root / path
    assert len(inputs) == 20
    gray(root / ".hidden.png"), gray(root / ".cache/x.png"), gray(root / "sub/._a.png")
    (root / "notes.txt").write_text("hello")
    save(dataset(np.zeros((2, 2), np.uint8), sop="1.2.840.10008.5.1.4.1.1.88.11"), root / "dicom/report")
    (root / "sub/again").symlink_to(root, target_is_directory=True)
    names = {predict.name_of(path, root): path for path in inputs.values()}
    assert {"sub_a", "sub_deep er_c", "dicom_patient 0_2", "v0", "sub_v1"} <= names.keys()
    return root, names


def finished(out):
    """The names of the inputs whose results are finished."""
    return {path.name[:-11] for path in out.glob("*-input.json") if b"finished" in path.read_bytes()}


def test_a_folder_of_all_kinds_some_broken_and_killed_amid(model, folder, tmp_path, monkeypatch, capsys):
    (root, names), out, sound = folder, tmp_path / "o", set(folder[1]) - {"sub_cut", "z"}
    flags = [str(root), "--target", "liver", "--out", str(out)]
    child = subprocess.Popen([sys.executable, "predict.py", *flags, "--checkpoint", str(model[1])], cwd=ROOT,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(finished(out)) < 8:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    before = finished(out)
    made = {path: path.stat().st_mtime_ns for path in out.iterdir()
            if any(path.name.startswith(f"{name}-") for name in before)}
    assert 8 <= len(before) < 18 and len(made) >= 3 * len(before)

    done, ask = [], lambda: command(monkeypatch, model[1], *flags, "--resume")
    monkeypatch.setattr(predict, "predict_input", lambda args, model, texts, name, *rest, f=predict.predict_input:
                        done.append(name) or f(args, model, texts, name, *rest))
    with pytest.raises(SystemExit) as e:
        ask()
    said = capsys.readouterr()
    assert e.value.code == 1 and set(done) == sound - before and finished(out) == sound
    assert f"18 of 20 inputs have results in {out}; {len(before)} had them before" in said.out
    lines = said.err.splitlines()
    assert len(lines) == 2 and all(line.startswith("predict.py: ") and "copy it again" in line for line in lines)
    assert sum(str(names[name]) in line for name in ("sub_cut", "z") for line in lines) == 2
    assert made == {path: path.stat().st_mtime_ns for path in made}  # nothing was done twice
    assert sorted(row["input"] for row in csv.DictReader(open(out / "volumes.csv"))) == sorted(sound)

    for name in sound:
        path, label = names[name], out / f"{name}-label.nii.gz"
        if path.suffix in (".nii", ".gz"):
            shape, affine = nib.load(path).shape, nib.load(path).affine
        elif path.is_dir():
            _, grid, _ = read_dicom(path, None, "ct")
            shape, affine = (7, 5, 2), grid.affine
        else:
            assert Image.open(out / f"{name}-liver.png").size == Image.open(path).size == (40, 30)
            continue
        assert nib.load(label).shape == shape and np.allclose(nib.load(label).affine, affine, atol=1e-4)

    monkeypatch.setattr(predict, "load_model", lambda args: pytest.fail("there was nothing to do"))
    with pytest.raises(SystemExit) as e:
        ask()
    assert e.value.code == 1 and len(capsys.readouterr().err.splitlines()) == 2


def test_what_is_asked_otherwise_is_done_anew(threshold, tmp_path, capsys):
    def ask(*flags):
        threshold(tmp_path / "in", "--out", tmp_path / "o", "--resume", *flags)
        said = capsys.readouterr().out
        return {name for name in "ab" if f"{name}, liver: " in said}, said

    gray(tmp_path / "in/a.png"), gray(tmp_path / "in/b.png")
    assert ask()[0] == {"a", "b"} and ask()[0] == set()
    done, said = ask("--mean-wordings", 2)
    assert done == {"a", "b"} and "a.png: was done with other --mean-wordings, and is done anew" in said
    gray(tmp_path / "in/b.png", 200)
    done, said = ask("--mean-wordings", 2)
    assert done == {"b"} and "b.png: has changed" in said
    texts = tmp_path / "attributes.json"
    texts.write_text((ROOT / "attributes.json").read_text())
    assert ask("--attributes-file", texts)[0] == {"a", "b"} and not ask("--attributes-file", texts)[0]
    texts.write_text(texts.read_text() + " ")
    assert "other --attributes-file" in ask("--attributes-file", texts)[1]
    record = tmp_path / "o/a-input.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "finished"}))
    assert ask("--attributes-file", texts)[0] == {"a"}
    time.sleep(0.01)
    os.utime(series(tmp_path / "in/s", HU[:2]) / "000.dcm")
    assert "s-label" in ask("--attributes-file", texts)[1] and "s-label" not in ask("--attributes-file", texts)[1]
    os.utime(tmp_path / "in/s/000.dcm")
    assert "s: has changed" in ask("--attributes-file", texts)[1]


def test_what_changed_behind_its_flags_is_done_anew(threshold, model, tmp_path, capsys):
    """Of one's own data the file of texts that the checkpoint names, a slice in place of another, a result that is
    gone; and what somebody wrote into a record."""
    def ask(name, *flags):
        threshold(tmp_path / name, "--resume", "--out", tmp_path / "o", *flags)
        return " 1 had them before" not in capsys.readouterr().out

    own = tmp_path / "own.json"
    own.write_text("{}")
    checkpoint = tmp_path / "c/last.safetensors"
    save_checkpoint(model[0], checkpoint, dataset="folder", arguments=dict(attributes_file=str(own)))
    gray(tmp_path / "a.png")
    parse = predict.Parser.parse_args
    with pytest.MonkeyPatch.context() as patch:  # in place of the checkpoint that `threshold` names
        patch.setattr(predict.Parser, "parse_args", lambda *a: vars(args := parse(*a)).update(
            checkpoint=str(checkpoint)) or args)
        assert ask("a.png") and not ask("a.png") and ask("a.png", "--dataset", "synapse")
        own.write_text('{"folder": {}}')
        assert not ask("a.png", "--dataset", "synapse") and ask("a.png") and not ask("a.png")

        for file, flags in (("c/last.json", ()), ("c/config.json", ()), ("c/last-encoder.onnx", ()),
                            ("sam.pth", ("--sam-checkpoint", tmp_path / "sam.pth")),
                            ("clip.pt", ("--clip", f"ViT-B-16:{tmp_path / 'clip.pt'}"))):
            ask("a.png", *flags)
            (tmp_path / file).write_text("{}")
            assert ask("a.png", *flags) and not ask("a.png", *flags)

    slices = series(tmp_path / "s", HU[:2])
    assert ask("s") and not ask("s")
    os.utime(slices / "000.dcm", (1, 1))
    assert ask("s") and not ask("s")
    record = tmp_path / "o/s-input.json"
    known = json.loads(record.read_text())
    for name in known["files"]["s"]:
        (tmp_path / "o" / name).unlink()
        assert ask("s") and not ask("s")
    for asked in (None, [], "x"):
        record.write_text(json.dumps(known | dict(asked=asked)))
        assert ask("s") and not ask("s")
    for files in (None, ["x"], dict(s=None)):
        record.write_text(json.dumps(known | dict(files=files)))
        assert not ask("s") and not threshold(slices, "--out", tmp_path / "o")
    record.write_text(json.dumps({key: known[key] for key in known if key not in ("files", "listing")}))
    assert not ask("s")  # as an earlier version wrote it


def raising(error):
    raise error


def test_lists_and_what_is_missing(threshold, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gray(tmp_path / "in/a.png"), gray(tmp_path / "in/b/a.png"), gray(tmp_path / "c.png")
    (tmp_path / "list.txt").write_bytes("\ufeffc.png\r\n\r\n  none.png\r\nin\r\n".encode())
    assert threshold("@list.txt", "--out", "o") == 1
    assert finished(tmp_path / "o") == {"a", "b_a", "c"}
    assert capsys.readouterr().err.startswith("predict.py: none.png: no such file; ")
    assert threshold("none.png", "gone.png", "--out", "o") == 2 and len(capsys.readouterr().err.splitlines()) == 2
    fails(lambda: threshold("none.png", "--out", "o"), "none.png")
    fails(lambda: threshold("in", "in/b", "--out", "p"), "in/a.png", "in/b/a.png is called a")
    fails(lambda: threshold("in", "--out", "in"), "--out", "INPUT")
    with monkeypatch.context() as patch, pytest.raises(PermissionError, match="in/b"):  # common.run makes a line of it
        patch.setattr(os, "scandir", lambda path, f=os.scandir:
                      raising(PermissionError(13, "Permission denied", str(path))) if str(path) == "in/b" else f(path))
        threshold("in", "--out", "p")
    fails(lambda: threshold("in", "--box", 1, 1, 2, 2, "--out", "p"), "--box", "single INPUT")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(predict, "read_image", lambda path, *a, f=predict.read_image:
                      raising(MemoryError("Unable to allocate 9 TiB")) if path.name == "c.png" else f(path, *a))
        assert threshold("in", "c.png", "--out", "p") == 1 and finished(tmp_path / "p") == {"a", "b_a"}
    assert "c.png: Unable to allocate 9 TiB; give a part" in capsys.readouterr().err
    assert not threshold("in", "--plane", "coronal", "--largest-component", "--out", "q")  # for its volumes, if any
    assert not threshold("in", "--out", "in/b/results") and not threshold("in", "--out", "in/b/results")


def test_odd_files_beside_slices_are_named(threshold, tmp_path, capsys):
    """A picture is done for itself; what cannot be told is named by the reader of the series."""
    place = series(tmp_path / "in", HU[:2])
    gray(place / "x.png")
    assert threshold(tmp_path / "in", "--out", tmp_path / "o") == 1 and finished(tmp_path / "o") == {"x"}
    assert "x.png: truncated or not DICOM" in capsys.readouterr().err
    (place / "x.png").rename(tmp_path / "x.png")
    assert not threshold(tmp_path / "in", "--out", tmp_path / "p") and finished(tmp_path / "p") == {"in"}
    (place / "001.dcm").write_bytes(b"no longer")
    fails(lambda: threshold(tmp_path / "in", "--out", tmp_path / "q"), "001.dcm: truncated or not DICOM")


def test_the_table(threshold, tmp_path):
    """Rows of one input are replaced, those of others stay; a table of somebody else is not touched."""
    table = tmp_path / "o/volumes.csv"
    rows = lambda: [(row["input"], row["voxels"], row["ml"]) for row in csv.DictReader(open(table))
                    if (row["expected_iou"] == "") == (row["voxels"] == "0")]
    one, two = gray(tmp_path / 'a,"b\nc.png', 200, (8, 8)), gray(tmp_path / "d.png", 10, (8, 8))
    threshold(one, "--out", tmp_path / "o"), threshold(two, "--out", tmp_path / "o")
    assert rows() == [('a,"b\nc', "64", ""), ("d", "0", "")]
    gray(one, 10, (8, 8))
    threshold(one, "--out", tmp_path / "o")
    assert rows() == [("d", "0", ""), ('a,"b\nc', "0", "")]
    table.write_text("my;own\n")
    fails(lambda: threshold(one, "--out", tmp_path / "o"), table, "move it away")
    assert table.read_text() == "my;own\n"


# ---------------------------------------------------------------------------------------------------------------------
# Whose results they are

def gray(path, value=90, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


@pytest.mark.parametrize("path, name", [
    ("scan.nii.gz", "scan"), ("scan.v2.NII", "scan.v2"), ("a/b.tar.png", "b.tar"), ("1.2.840.1", "1.2.840.1"),
    (".png", ".png"), ("x", "x"), (".", "here"), ("..", "above"), ("../here/", "here"), ("a/..", "here"), ("/", "input")])
def test_names(path, name, tmp_path, monkeypatch):
    here = tmp_path / "above/here"
    (here / "a").mkdir(parents=True)
    monkeypatch.chdir(here)
    path = predict.Path(path)
    if not path.exists():
        path.touch()
    assert predict.name_of(path) == name


def test_results_of_another_input_are_never_replaced(model, tmp_path, monkeypatch, capsys):
    one, two, out = gray(tmp_path / "1/x.png"), gray(tmp_path / "2/x.png", 200), tmp_path / "o"
    ask = lambda path, *flags, target="liver": command(monkeypatch, model[1], path, "--target", target, "--out", out, *flags)
    ask(one)
    made = {path: path.read_bytes() for path in out.iterdir()}
    for again in (two, gray(tmp_path / "3/x.jpg"), out / "x-liver.png"):
        if again.parent != out:
            fails(lambda: ask(again), again, one, "another input", "--out")
            fails(lambda: ask(again, target="spleen"), again, one)
    assert made == {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    ask(one)  # itself is asked again
    assert "has changed" not in capsys.readouterr().out
    ask(one, target="spleen")
    gray(one, 10)
    ask(one)
    assert "has changed since its last results" in capsys.readouterr().out


def test_files_of_nobody_knows_whom_are_not_replaced(model, tmp_path, monkeypatch):
    """The truth beside an image, when the results are to lie there as well; an input that is called like a result."""
    image, truth = gray(tmp_path / "x.png"), gray(tmp_path / "x-liver.png", 255)
    ask = lambda *inputs: command(monkeypatch, model[1], *inputs, "--target", "liver", "--out", tmp_path)
    content = truth.read_bytes()
    fails(lambda: ask(image), truth, "there already", "--out")
    fails(lambda: ask(truth, image), truth, "there already")
    assert truth.read_bytes() == content and {path.name for path in tmp_path.iterdir()} == {"x.png", "x-liver.png"}


@pytest.mark.parametrize("flags, stem", [
    (("v.nii", "--slice", 4), "v-slice004"), (("v.nii", "--slice", 4, "--plane", "coronal"), "v-coronal004"),
    (("one.nii", "--box", 0, 0, 2, 2), "one-slice000"), (("s.tif", "--page", 1), "s-page001"),
    (("v.nii", "--plane", "sagittal", "--explain"), "v-sagittal002")])
def test_nor_by_way_of_a_slice_or_page(flags, stem, threshold, tmp_path, monkeypatch):
    """Nor after results of its own, whose record says nothing of those of an input that is called like its slice."""
    volume_file(tmp_path / "v.nii", (0, 1, 2), (False,) * 3)
    nib.save(nib.Nifti1Image.from_image(nib.load(tmp_path / "v.nii")).slicer[:, :, :1], tmp_path / "one.nii")
    pages = [Image.new("L", (40, 30))] * 2
    pages[0].save(tmp_path / "s.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(inference, "predict_volume", lambda model, volume, *a, **k: (
        np.where(np.arange(len(volume)) == 2, 1, np.zeros(volume.shape[::-1], np.uint8)).T, np.ones(1)))
    ask = lambda name, *flags: threshold(tmp_path / name, "--out", tmp_path / "o", *flags)
    ask(flags[0], *(("--page", 0) if "--page" in flags else ())), ask(gray(tmp_path / f"{stem}.png"))
    made = {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    fails(lambda: ask(*flags), flags[0], f"{stem}.png", "another --out")
    assert made == {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}


def test_of_an_earlier_ask_nothing_stays(model, tmp_path, monkeypatch):
    """OUT/NAME-input.json lists what an ask wrote, all of it; the next one of the same slice, or of the whole, takes it
    away, of an input that has changed everything; what is of other slices stays, and what is nobody's."""
    volume_file(tmp_path / "v.nii", (0, 1, 2), (False,) * 3)
    out = tmp_path / "o"
    ask = lambda *flags: command(monkeypatch, model[1], tmp_path / "v.nii", "--out", out, *flags)
    files = lambda: {path.name for path in out.iterdir()} - {"volumes.csv", "v-input.json", "v-notes.txt"}
    rows = lambda: {(row["input"], row["target"]) for row in csv.DictReader(open(out / "volumes.csv"))}
    listed = lambda: sorted(sum(json.loads((out / "v-input.json").read_text())["files"].values(), []))
    liver, spleen = ("--target", "liver"), ("--target", "spleen")
    whole = {"v-label.nii.gz", "v-labels.json", "v-overlay.png"}
    ask(*liver, *spleen, "--explain")
    assert len(files()) == 5 and sorted(files()) == listed()
    (out / "v-notes.txt").touch()
    ask(*spleen)
    assert files() == whole and sorted(whole) == listed() and rows() == {("v", "spleen")}
    ask(*liver, "--slice", 1, "--explain"), ask(*liver, "--slice", 2), ask(*spleen, "--slice", 1)
    assert files() == {*whole, "v-slice001-spleen.png", "v-slice001-overlay.png", "v-slice002-liver.png",
                       "v-slice002-overlay.png"} and sorted(files()) == listed()
    assert rows() == {("v", "spleen"), ("v-slice001", "spleen"), ("v-slice002", "liver")}
    os.utime(tmp_path / "v.nii", (1, 1))
    ask(*liver, "--slice", 1)
    assert files() == {"v-slice001-liver.png", "v-slice001-overlay.png"} and rows() == {("v-slice001", "liver")}
    assert (out / "v-notes.txt").is_file()


@pytest.mark.parametrize("stop", ["label.nii.gz", "labels.json", "overlay.png", "seg.dcm"])
def test_an_ask_that_stops_leaves_nothing_of_two(stop, threshold, tmp_path, monkeypatch):
    """Organs in another order, stopped at any file: what stands is of the second ask, and goes with the third."""
    series(tmp_path / "v", HU[:2])
    out, flags = tmp_path / "o", (tmp_path / "v", "--out", tmp_path / "o", "--dicom-seg")
    monkeypatch.setattr("readers.dicom_seg.check_dicom_seg", lambda *a: None)
    monkeypatch.setattr(predict, "write_dicom_seg", lambda args, name, *a: predict.write_atomically(
        args.out / f"{name}-seg.dcm", " ".join(args.names).encode()))
    threshold(*flags)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(inference, "predict_volume", lambda *a, **k: raising(MemoryError("too large")))
        with pytest.raises(MemoryError):
            threshold(*flags, "--target", "spleen")
    assert first == {path.name: path.read_bytes() for path in out.iterdir()}  # nothing was computed, nothing is lost
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        replace = os.replace
        patch.setattr(os, "replace", lambda part, path: raising(KeyboardInterrupt) if str(path).endswith(stop) else
                      replace(part, path))
        patch.setattr(plots, "contact_sheet", lambda pictures, path, *a, **k: predict.write_atomically(path, b""))
        threshold(*flags, "--target", "spleen")
    assert "v" not in finished(out)
    assert (out / "v-label.nii.gz").is_file() == (stop != "label.nii.gz")
    for file in (out / "v-labels.json", out / "v-seg.dcm"):
        assert not file.is_file() or b"spleen" in file.read_bytes()
    threshold(*flags[:3])
    assert {path.name for path in out.iterdir()} == first.keys() - {"v-seg.dcm"} and "v" in finished(out)


def test_what_is_dropped_is_said_by_the_models_own_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "contact_sheet", lambda *a, **k: None)
    args = predict.SimpleNamespace(names=["liver"], out=tmp_path)
    for iou, least in ((0.8736, 0.8738), (0.8734, 0.87325), (0.7, 0.7), (0.39996, 0.4)):
        for pixels in (4, 0):  # the table has no IoU of nothing
            masks = np.full((1, 2, 2), pixels > 0)
            answer = predict.SimpleNamespace(masks=masks, iou=torch.tensor([iou]), min_iou=least)
            rows, number = predict.write_image(args, "x", np.zeros((2, 2, 3), np.uint8), answer), f"{iou:.3f}"
            said = capsys.readouterr().out
            assert ("dropped" in said) == (iou < least) and f"{pixels} pixels" in said and f"IoU {number}" in said
            assert rows == [["liver", pixels, "", number if pixels else ""]]


def test_a_claim_goes_where_nothing_could_be_made(model, tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(gray(tmp_path / "y.png").read_bytes()[:40])
    with pytest.raises(InputError):
        command(monkeypatch, model[1], tmp_path / "x.png", "--target", "liver", "--out", tmp_path / "o")
    assert not (tmp_path / "o").is_dir() or not list((tmp_path / "o").iterdir())


def test_pages_deep_pictures_and_odd_targets(model, tmp_path, monkeypatch, capsys):
    pages = [Image.fromarray(np.full((30, 40), n, np.uint8)) for n in range(3)]
    pages[0].save(tmp_path / "s.tif", save_all=True, append_images=pages[1:])
    ask = lambda name, *flags: command(monkeypatch, model[1], tmp_path / name, *flags, "--out", tmp_path / "o")
    fails(lambda: ask("s.tif", "--target", "liver"), "s.tif", "3 pages")
    for n in (0, 2):
        ask("s.tif", "--target", "liver", "--page", n)
    assert {"s-page000-liver.png", "s-page002-liver.png"} <= {path.name for path in (tmp_path / "o").iterdir()}
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)).save(tmp_path / "deep.png")
    ask("deep.png", "--target", "liver")
    assert "values from 0 to 1199" in capsys.readouterr().out
    gray(tmp_path / "x.png")
    fails(lambda: ask("x.png", "--target", "liver", "--window", 1, 2), "--window")
    fails(lambda: ask("x.png", "--target", "liver", "--target", "liver"), "--target liver")
    (tmp_path / "a.json").write_text(json.dumps(dict(synapse={
        name: {kind: ["text"] for kind in ATTRIBUTES} for name in ("../a b", "../a_b", "overlay")})))
    odd = "--dataset", "synapse", "--attributes-file", tmp_path / "a.json"
    ask("x.png", "--target", "../a b", *odd)
    assert (tmp_path / "o/x-.._a_b.png").is_file()
    fails(lambda: ask("x.png", "--target", "../a b", "--target", "../a_b", *odd), "--target ../a b")
    fails(lambda: ask("x.png", "--target", "overlay", *odd), "--target overlay")


@pytest.mark.parametrize("flag, value", [("--texts", "t.jsonl"), ("--dataset", "demo"), ("--attributes-file", "a.json")])
def test_what_would_not_be_used_is_refused(flag, value, tmp_path, monkeypatch):
    free = [part for kind in ATTRIBUTES for part in (f"--{kind}", "x")]
    fails(lambda: command(monkeypatch, "none", gray(tmp_path / "x.png"), *free, flag, value), flag, "leave it out")


@pytest.mark.parametrize("text", ["a$\\b$", "$x^{$", "M\udcfcller", "\0\x1b[3m", "_hidden", "肝臓", "", "x" * 300, "a\nb"])
def test_pictures_with_any_text(text, tmp_path):
    image, mask = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), bool)
    mask[5:9, 4:20] = True
    plots.contact_sheet([(text, image, [(text, mask)])], tmp_path / "x.png", text)
    plots.curves([], tmp_path / "y.png", text)
    assert all(Image.open(tmp_path / name).size[0] > 100 for name in ("x.png", "y.png"))
    fails(lambda: plots.curves([], tmp_path / "none/x.png", text), "none/x.png", "cannot be written")


def test_names_below_an_underscore_are_in_the_legend(monkeypatch, tmp_path):
    image, mask, drawn = np.zeros((20, 30, 3), np.uint8), np.ones((20, 30), bool), []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.contact_sheet([("slice", image, [("_liver", mask), ("$spleen$", mask)])], tmp_path / "x.png", "two")
    assert [text.get_text().strip() for text in drawn[0].legends[0].get_texts()] == ["_liver", "$spleen$"]
    plots.plt.close(drawn[0])


def test_a_large_picture_is_thinned_where_it_is_drawn(model, tmp_path):
    """Masks have every pixel; the explanation has every third, with its prompts where they were."""
    image = np.random.default_rng(0).integers(0, 255, (2400, 150, 3), dtype=np.uint8)
    boxes = np.array([[30, 900, 120, 1500]], np.float32)
    answer = inference.predict_image(model[0], image, [TEXT], boxes)
    assert answer.masks.shape == (1, 2400, 150) and np.array_equal(answer.masks, (answer.logits > 0).numpy())
    found = explain(model[0], image, answer, 0, [TEXT], boxes)
    assert found.image.shape == (800, 50, 3) and found.step == 3 and found.probability.shape == (800, 50)
    assert np.abs(found.box - boxes[0] / 3).max() < 1
    rate = (found.probability > 0.5).mean() - answer.masks.mean()
    assert abs(rate) < 0.01 and (found.without["shape"].shape == (800, 50))
    plots.explanation(tmp_path / "x.png", "thing", found)
    assert np.array_equal(explain(model[0], image[:600], inference.predict_image(model[0], image[:600], [TEXT]), 0,
                                  [TEXT]).image, image[:600])

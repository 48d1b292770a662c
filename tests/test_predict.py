"""Prediction on one's own files: the same answers as in evaluation, on the input's own grid, and bad input."""
import itertools
import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import predict
from common import InputError
from conftest import fails
from data import ATTRIBUTES, Texts, box_prompt, open_dataset
from eval import Predictor
from medsegr import Config, MedSegR, load_checkpoint, save_checkpoint

TEXT = dict(position="on the left", texture="bright", shape="round")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model whose heads do something, saved; -> (model, its folder)."""
    torch.manual_seed(0)
    model = MedSegR(Config(image_size=64, feature_grid=8)).eval()
    for head in model.perceptual.children():
        torch.nn.init.normal_(head.linear.weight, std=0.3)
    torch.nn.init.normal_(model.refine.out.weight, std=0.02)
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(model, folder / "last.safetensors", dataset="demo")
    return load_checkpoint(folder)[0], folder


def test_answers_are_those_of_the_evaluation(model):
    """The same image, texts and boxes give the same masks through predict_image as through eval.Predictor."""
    model = model[0]
    dataset, texts = open_dataset("demo", split="test", image_size=64, limit=3), Texts("demo")
    for sample in dataset:
        names, logits = Predictor(model, texts, "box")(sample)
        boxes = np.stack([box_prompt(m) for m in sample.masks if m.any()])
        answer = predict.predict_image(model, sample.image, [texts(n, "ct") for n in names], boxes)
        np.testing.assert_allclose(answer.probability, logits.sigmoid().numpy(), atol=1e-3)  # its features are kept in 16 bits
        again = predict.predict_image(model, sample.image, [texts(n, "ct") for n in names], boxes,
                                      features=answer.features)
        assert np.array_equal(again.probability, answer.probability)


def test_prompts_are_in_pixels_of_the_image(model, monkeypatch):
    """On a 128 x 192 image of a 64 x 64 model: a pixel's centre stays the centre of what it covers."""
    seen = {}
    monkeypatch.setattr(type(model[0]), "ask", lambda self, x, points, boxes, masks=None: seen.update(
        points=points, boxes=boxes) or (torch.zeros(len(x), 32, 32), torch.zeros(len(x))))
    image = np.zeros((128, 192, 3), np.uint8)
    answer = predict.predict_image(model[0], image, [TEXT], [[0, 0, 191, 127]], (np.array([[[95.5, 63.5]]]), [[1]]))
    assert seen["points"][0].tolist() == [[[31.5, 31.5]]] and seen["points"][1].tolist() == [[1]]
    np.testing.assert_allclose(seen["boxes"].numpy(), [[-1 / 3, -0.25, 63 + 1 / 3, 63.25]], atol=1e-5)
    assert answer.probability.shape == (1, 128, 192) and (answer.probability == 0.5).all()


def test_the_most_probable_target_wins():
    p = np.array([[[0.6, 0.2]], [[0.9, 0.4]]], np.float32)
    assert predict.merge(p).tolist() == [[2, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# Volumes

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
        volume, grid = predict.read_nifti(path, (-200, 200), "ct")
        predict.write_nifti(tmp_path / "label.nii.gz", (volume > 127).astype(np.uint8), grid)
        before, after = nib.load(path), nib.load(tmp_path / "label.nii.gz")
        assert after.shape == before.shape and np.asarray(after.dataobj).dtype == np.uint8
        np.testing.assert_allclose(after.affine, before.affine, atol=1e-4)
        assert after.header.get_zooms() == pytest.approx(before.header.get_zooms(), abs=1e-4)
        assert np.array_equal(np.asarray(after.dataobj), stored > -0.4)
        assert after.header.get_xyzt_units() == before.header.get_xyzt_units()
    # upright: the first slice is the lowest one, its first row the patient's front, its first column the right
    stored = volume_file(tmp_path / "u.nii", (0, 1, 2), (True, True, False))  # LPS
    volume, _ = predict.read_nifti(tmp_path / "u.nii", (-1000, 1000), "ct")
    assert np.array_equal(volume, predict.gray(stored.transpose(2, 1, 0), (-1000, 1000)))


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
    volume, grid = predict.read_dicom(tmp_path, (-1000, 1000), "ct")
    assert np.array_equal(volume, predict.gray(stored, (-1000, 1000)))  # already upright
    assert grid.affine.tolist() == [[-0.9, 0, 0, 5], [0, -0.7, 0, 7], [0, 0, 2.5, 100], [0, 0, 0, 1]]
    predict.write_nifti(tmp_path / "label.nii.gz", (volume > 127).astype(np.uint8), grid)
    after = nib.load(tmp_path / "label.nii.gz")
    assert np.array_equal(np.asarray(after.dataobj), (stored >= 0).transpose(2, 1, 0))
    np.testing.assert_allclose(after.affine, grid.affine)


@pytest.mark.parametrize("change,named", [
    (dict(ImagePositionPatient=lambda z: [0, 0, 2.5 * min(z, 2)]), "same place"),
    (dict(ImagePositionPatient=lambda z: [0, 0, 2.5 * z + 40 * (z == 3)]), "misses"),
    (dict(SeriesInstanceUID=lambda z: f"1.2.{z % 2}"), "2 series"), (dict(PixelData=b"12"), "cannot be read")])
def test_a_bad_series_is_named(change, named, tmp_path):
    dicom_series(tmp_path, np.zeros((4, 5, 6), int), range(4), **change)
    fails(lambda: predict.read_dicom(tmp_path, (-1000, 1000), "ct"), tmp_path, named)


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
    assert files == {"x-liver.png", "x-left_kidney.png", "x-overlay.png", "x-liver-explained.png",
                     "x-left_kidney-explained.png"}
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
    monkeypatch.setattr(predict, "predict_image", lambda model, image, texts, *a, f=predict.predict_image, **k:
                        seen.append(texts) or f(model, image, texts, *a, **k))
    command(monkeypatch, model[1], tmp_path / "x.png", "--target", "cyst", "--texts", tmp_path / "t.jsonl", "--out", tmp_path)
    assert seen == [[TEXT]]
    with pytest.raises(InputError, match="cyst"):
        command(monkeypatch, model[1], tmp_path / "x.png", "--target", "cyst", "--out", tmp_path)


@pytest.mark.parametrize("off", [dict(priors=()), dict(cognitive=False), dict(perceptual=False, branches=("sem",))])
def test_explanations_of_models_with_parts_switched_off(off, tmp_path):
    from explain import explain
    model = MedSegR(Config(image_size=64, feature_grid=8, **off)).eval()
    image = np.zeros((40, 40, 3), np.uint8)
    points = np.array([[[5, 6]]], np.float32), np.array([[1]])
    answer = predict.predict_image(model, image, [TEXT], points=points)
    explain(model, image, answer, None, points, 0, "thing", [TEXT], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 20_000


def test_a_volume(model, tmp_path, monkeypatch, capsys):
    stored = volume_file(tmp_path / "v.nii.gz", (2, 0, 1), (True, False, False))
    free = [f for kind in ATTRIBUTES for f in (f"--{kind}", "bright, in the middle")]
    command(monkeypatch, model[1], tmp_path / "v.nii.gz", *free, "--out", tmp_path / "o")
    label = nib.load(tmp_path / "o/v-label.nii.gz")
    assert label.shape == stored.shape and np.allclose(label.affine, nib.load(tmp_path / "v.nii.gz").affine)
    assert json.loads((tmp_path / "o/v-labels.json").read_text()) == {"1": "target"}
    assert "5 slices" in capsys.readouterr().out and (tmp_path / "o/v-overlay.png").is_file()
    command(monkeypatch, model[1], tmp_path / "v.nii.gz", *free, "--slice", 2, "--point", 1, 1, "--point", 2, 2, 0,
            "--out", tmp_path / "p")
    assert (tmp_path / "p/v-slice002-target.png").is_file()


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
    (["x.png", "--target", "liver", "--modality", "sonar"], "--modality sonar")])
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

"""Prediction on one's own files: images, volumes and explanations, on the input's own grid, and bad input."""
import json
import sys

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import inference
import plots
import predict
from common import ATTRIBUTES, LIGHT, InputError
from conftest import fails
from inference import explain
from medsegr import Config, MedSegR
from runs import save_checkpoint
from test_dicom import HU, dataset, save, series
from test_volumes import volume_file

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
    assert files == {"x-input.json", "x-liver.png", "x-left_kidney.png", "x-overlay.png", "x-liver-explained.png",
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
    assert "5 slices" in capsys.readouterr().out and (tmp_path / "o/v-overlay.png").is_file()
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
    save(dataset(np.zeros((3, 40, 56), np.uint8), Modality="US"), tmp_path / "film")
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
    for flags, named in (("x.png v.nii cut.nii", "cut.nii"), ("v.nii --window 275 -125", "--window 275 -125"),
                         ("v.nii --window nan 3", "--window"), ("x.png --window 0 3", "--window"),
                         ("x.png --series 3", "--series 3"), ("v.nii --series 3", "--series 3"),
                         ("x.png --box 1 2 300 4", "--box"), ("v.nii --slice 2 --box 1 2 300 4", "--box")):
        monkeypatch.setattr(sys, "argv", ["predict.py", *flags.split(), "--target", "liver"])
        with pytest.raises(InputError, match=named):
            predict.main()


def test_switches_of_a_volume(model, tmp_path, monkeypatch):
    """The mean over wordings is asked for, and the largest component of each target alone is written."""
    volume_file(tmp_path / "v.nii.gz", (0, 1, 2), (False,) * 3)
    seen = []

    def two_parts(model, volume, texts, precision):
        seen.append(texts)
        label = np.zeros(volume.shape, np.uint8)
        label[1:3, 1:3, 1], label[5, 6, 4] = 1, 1
        return label

    monkeypatch.setattr(inference, "predict_volume", two_parts)
    flags = tmp_path / "v.nii.gz", "--target", "liver", "--out", tmp_path
    for switches, voxels, wordings in (((), 5, 1), (("--largest-component", "--mean-wordings", 3), 4, 3)):
        command(monkeypatch, model[1], *flags, *switches)
        assert np.count_nonzero(np.asarray(nib.load(tmp_path / "v-label.nii.gz").dataobj)) == voxels
        assert [len(words) for words in seen.pop()] == [wordings]


def test_several_inputs_and_no_checkpoint_named(model, tmp_path, monkeypatch, capsys):
    """Each input has results of its own; the shipped weights are taken where nothing was trained, and it says so."""
    monkeypatch.setattr("runs.WEIGHTS", tmp_path / "weights" / "abdomen-ct.safetensors")
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Image.new("L", (40, 30)).save(f"{name}.png")
    monkeypatch.setattr(sys, "argv", "predict.py a.png b.png --target liver --out o".split())
    with pytest.raises(InputError, match="train.py"):
        predict.main()
    save_checkpoint(model[0], "weights/abdomen-ct.safetensors", dataset="synapse")
    predict.main()
    assert {f.name for f in (tmp_path / "o").iterdir()} == {
        f"{n}-{what}" for n in "ab" for what in ("liver.png", "overlay.png", "input.json")}
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
    (["x.png", "none.nii", "--target", "liver"], "none.nii"),
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

"""export.py: what ONNX files say is what PyTorch says, and what they were not made for is refused."""
import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

import export
import predict
from common import ATTRIBUTES, LIGHT, InputError
from conftest import fails
from export import OnnxModel
from inference import predict_image
from medsegr import Config, MedSegR
from ops import reference
from runs import save_checkpoint
from test_volumes import volume_file
from texts import Texts

NAMES = ("liver", "spleen", "aorta")
TEXTS = [Texts("demo")(name, "ct") for name in NAMES]


@pytest.fixture(scope="module", params=["none", "box"])
def exported(model, tmp_path_factory, request):
    """-> (the model, its files, what they take beside the features)."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} of requirements-extras.txt is not installed")
    path = tmp_path_factory.mktemp("onnx") / "three.onnx"
    onnx, off = export.export(model[0], TEXTS, path, request.param, "demo")
    assert off < 1e-4
    return model[0], onnx, request.param


def boxes_for(n, prompt, rng):
    return np.sort(rng.uniform(0, 40, (n, 2, 2)), 1).reshape(n, 4) if prompt == "box" else None


@pytest.mark.parametrize("seed", range(4))
def test_logits_and_masks_are_pytorchs(exported, seed):
    """Images of several sizes, the targets in any order, some of them left out, several wordings of one."""
    model, onnx, prompt = exported
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, rng.integers(30, 90, 2).tolist() + [3], dtype=np.uint8)
    asked = [TEXTS[i] for i in rng.permutation(3)[:rng.integers(1, 4)]]
    boxes = boxes_for(len(asked), prompt, rng)
    asked = [TEXTS[:2]] if seed == 3 and prompt == "none" else asked
    theirs, ours = (predict_image(m, image, asked, boxes) for m in (model, onnx))
    scale = float(theirs.grid.max() - theirs.grid.min())
    assert float((ours.grid - theirs.grid).abs().max()) < 1e-3 * scale
    np.testing.assert_allclose(ours.iou, theirs.iou, atol=1e-3)
    clear = (theirs.logits.abs() > 1e-3 * scale).numpy()
    assert (ours.masks == theirs.masks)[clear].all() and clear.mean() > 0.9


def test_what_the_files_were_not_made_for_is_refused(exported, tmp_path):
    model, onnx, prompt = exported
    image, rng = np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0)
    ask = lambda texts, boxes=None, points=None: predict_image(onnx, image, texts, boxes, points)
    fails(lambda: onnx.encode_image(torch.zeros(1, 3, 96, 96)), onnx.path, "[B,3,64,64]", "96")
    other = Texts("demo")("liver", "ct", number=1)
    fails(lambda: ask([TEXTS[0], other], boxes_for(2, prompt, rng)), onnx.path, "1 of 2", "export.py")
    others = None if prompt == "box" else boxes_for(1, "box", rng)
    fails(lambda: ask([TEXTS[0]], others), f"--prompt {prompt}", "export.py")
    fails(lambda: ask([TEXTS[0]], None, (np.array([[[3.0, 4]]]), [[1]])), f"--prompt {prompt}", "boxes alone")
    if prompt == "box":
        fails(lambda: ask([TEXTS[0]] * 2, boxes_for(2, prompt, rng)), "one at a time")
    encoder = onnx.path.with_name("three-encoder.onnx")
    fails(lambda: OnnxModel(tmp_path / "none.onnx"), tmp_path / "none.onnx", "no such file")
    (tmp_path / "alone.onnx").write_bytes(onnx.path.read_bytes())
    fails(lambda: OnnxModel(tmp_path / "alone.onnx"), "three-encoder.onnx", "no such file", "together")
    (tmp_path / encoder.name).write_bytes(encoder.read_bytes()[:1000])
    fails(lambda: OnnxModel(tmp_path / "alone.onnx"), encoder.name, "not a readable ONNX file")


@pytest.mark.parametrize("switches, prompt", [(dict(cognitive=False, offset_grid=2), "none"),
                                              (dict(branches=("sam",)), "box")])
def test_a_model_without_a_semantic_prior(switches, prompt, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} of requirements-extras.txt is not installed")
    model = MedSegR(Config(**LIGHT, image_size=64, feature_grid=8, **switches)).eval()
    onnx, off = export.export(model, TEXTS[:2], tmp_path / "x.onnx", prompt)
    assert off < 1e-4 and len(onnx.texts) == 2


def test_every_way_is_timed(exported):
    model, onnx, _ = exported
    took = export.seconds(model, onnx, turns=2)
    assert list(took) == ["PyTorch in float32", "PyTorch in bfloat16", "ONNX"] and all(t > 0 for t in took.values())


def test_a_volume_by_the_command(exported, model, tmp_path, monkeypatch, capsys):
    _, onnx, prompt = exported
    if prompt == "box":
        pytest.skip("a volume takes no boxes")
    volume_file(tmp_path / "v.nii.gz", (0, 1, 2), (False,) * 3)
    labels = []
    for flags in (["--checkpoint", str(model[1]), "--precision", "float32"], ["--onnx", str(onnx.path)]):
        monkeypatch.setattr(sys, "argv", ["predict.py", str(tmp_path / "v.nii.gz"), "--target", "spleen", "--target",
                                          "liver", "--out", str(tmp_path), *flags])
        predict.main()
        labels.append(np.asarray(nib.load(tmp_path / "v-label.nii.gz").dataobj))
    assert (labels[0] == labels[1]).mean() > 0.999 and "onnxruntime" in capsys.readouterr().out


def test_without_the_package_and_with_flags_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    fails(lambda: OnnxModel(tmp_path / "x.onnx"), "onnxruntime", "pip install -r requirements-extras.txt")
    monkeypatch.setitem(sys.modules, "onnx", None)
    fails(lambda: export.to_onnx(None, {}, [], {}), "package onnx", "pip install -r requirements-extras.txt")
    for flags, named in ((["--target", "liver", "--out", "x"], "--out x"), (["--out", "x.onnx"], "--target NAME"),
                         (["--target", "liver", "--shape", "round"], "--target NAME")):
        monkeypatch.setattr(sys, "argv", ["export.py", *flags])
        fails(export.parse, named)
    volume_file(tmp_path / "v.nii", (0, 1, 2), (False,) * 3)
    for flag in (["--explain"], ["--checkpoint", "x"], ["--precision", "bfloat16"]):
        monkeypatch.setattr(sys, "argv", ["predict.py", str(tmp_path / "v.nii"), "--target", "liver", "--onnx", "x",
                                          *flag])
        fails(predict.parse, "--onnx", flag[0])


def test_the_texts_of_a_model_of_ones_own_data(model, tmp_path, monkeypatch):
    """They are where its checkpoint says, unless --attributes-file names others."""
    texts = {name: {kind: [f"{kind} of my lump, in {name}"] for kind in ATTRIBUTES} for name in ("own", "other")}
    for name, wordings in texts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"folder": {"lump": wordings}}))
    save_checkpoint(model[0], tmp_path / "last.safetensors", dataset="folder",
                    arguments=dict(attributes_file=str(tmp_path / "own.json")))

    def stop(model, asked, *rest):
        raise InputError(str(asked))

    monkeypatch.setattr(export, "export", stop)
    for name, flags in (("own", []), ("other", ["--attributes-file", str(tmp_path / "other.json")])):
        monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint", str(tmp_path), "--target", "lump", "--out",
                                          str(tmp_path / "x.onnx"), *flags])
        fails(export.main, f"shape of my lump, in {name}")


@torch.no_grad()
def test_offsets_shared_over_space_are_one_dense_kernel(model):
    """dense() changes nothing of the features, also where offsets are larger than the grid."""
    for scale in (0.1, 1, 7):
        priors = model[0].encode_attributes(TEXTS)
        priors = priors._replace(shape_offset=scale * priors.shape_offset)
        x, kernel = torch.randn(3, 5, 8, 8), export.dense(priors)
        expected = reference.deform_conv2d(x, priors.shape_offset, priors.shape_kernel)
        torch.testing.assert_close(reference.dynamic_conv2d(x, kernel.shape_kernel), expected)
    assert kernel.shape_offset is None and kernel.shape_kernel.shape[-1] > 3

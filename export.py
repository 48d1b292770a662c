"""The model as ONNX files, for programs without PyTorch: the image encoder, and the decoder for given texts.

    python export.py --target liver --target spleen --out liver-spleen.onnx
    python predict.py scan.nii.gz --target liver --target spleen --onnx liver-spleen.onnx

writes liver-spleen.onnx and, beside it, liver-spleen-encoder.onnx, of fixed sizes, in float32 and opset 18:

    encoder   image float32 [1,3,S,S], RGB, 0 to 255 -> features [1,C,H,W]
    decoder   features, with --prompt box also boxes float32 [T,4], x0 y0 x1 y1 in pixels of the S x S image
              -> logits [T,4H,4W], a mask where they exceed 0, and iou [T], how good the model thinks its masks are

The texts are in the decoder, as what they do to the features; so it answers these T targets alone, in their order. Its
metadata says which, and all else that OnnxModel needs. Both files are checked against PyTorch when they are made.
"""
import json
import logging
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

import ops
from common import (ATTRIBUTES, MODALITIES, InputError, Parser, add_target_flags, make_folder, number, run,
                    write_atomically)
from inference import predict_image, wordings
from medsegr import Priors
from ops.reference import dense_kernel
from runs import default_checkpoint, load_checkpoint
from texts import Texts, own_texts

OPSET = 18
TOLERANCE = 1e-3  # of the range of the logits: how far those of the files may be from PyTorch's
NEEDS = "pip install -r requirements-extras.txt"


# ---------------------------------------------------------------------------------------------------------------------
# To ONNX

class Encoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model.encode_image(image)


class Decoder(nn.Module):
    """A model with the priors of T texts."""

    def __init__(self, model, texts):
        super().__init__()
        self.model, self.T, self.priors = model, len(texts), dense(model.encode_attributes(texts))

    def forward(self, features, boxes=None):
        return self.model.decode(features, torch.zeros(self.T, dtype=torch.int64), self.priors, boxes=boxes)


def dense(priors):
    """Priors whose shape offsets are shared over space -> the same with one dense kernel in place of kernel and offsets
    (ops/reference.py), whose size is then known; others as they are."""
    offset = priors.shape_offset  # [M,18,n,n]
    if offset is None or offset.shape[-1] > 1:
        return priors
    tap = torch.arange(9)
    y, x = tap // 3 - 1 + offset[:, 0::2, 0, 0], tap % 3 - 1 + offset[:, 1::2, 0, 0]
    return priors._replace(shape_kernel=dense_kernel(y, x, priors.shape_kernel), shape_offset=None)


def to_onnx(module, inputs, outputs, metadata):
    """{name: example} and names of what comes out -> the bytes of an ONNX file."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as e:
        raise InputError(f"export.py: needs the package {e.name}; {NEEDS}") from None
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells what it could not make faster
    with torch.no_grad(), ops.reference_only():
        program = torch.onnx.export(torch.export.export(module, tuple(inputs.values()), strict=False), dynamo=True,
                                    input_names=list(inputs), output_names=outputs, opset_version=OPSET, verbose=False)
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    return proto.SerializeToString()


@torch.no_grad()
def export(model, texts, out, prompt="none", dataset=""):
    """Writes OUT and OUT's encoder for the texts, a list of dicts, of T targets; checks both -> OnnxModel, and
    by how much its logits differ from PyTorch's, as a part of their range.

    InputError where the files and PyTorch disagree by more than TOLERANCE.
    """
    out, c, T = Path(out), model.config, len(texts)
    encoder_file = out.with_name(f"{out.stem}-encoder.onnx")
    metadata = dict(texts=json.dumps(texts), encoder=encoder_file.name, image_size=str(c.image_size), dataset=dataset,
                    prompt=prompt, model=model.describe())
    draw = np.random.default_rng(0)
    image = torch.from_numpy(draw.integers(0, 256, (1, 3, c.image_size, c.image_size)).astype(np.float32))
    features = model.encode_image(image)
    inputs = dict(features=features)
    if prompt == "box":
        inputs["boxes"] = torch.from_numpy(draw.random((T, 4), np.float32).reshape(T, 2, 2)).sort(1)[0].flatten(1)
        inputs["boxes"] *= c.image_size
    decoder = Decoder(model, texts).eval()
    with ops.reference_only():
        expected = decoder(*inputs.values())
    write_atomically(encoder_file, to_onnx(Encoder(model).eval(), dict(image=image), ["features"], metadata))
    write_atomically(out, to_onnx(decoder, inputs, ["logits", "iou"], metadata))
    exported = OnnxModel(out)
    found = exported.run_decoder(exported.encode_image(image), inputs.get("boxes"))
    off = float((found[0] - expected[0]).abs().max() / (expected[0].max() - expected[0].min()))
    if not off < TOLERANCE:
        raise InputError(f"{out}: its logits differ from PyTorch's by {off:.1e} of their range; try other versions of "
                         "onnx, onnxscript and onnxruntime")
    return exported, off


# ---------------------------------------------------------------------------------------------------------------------
# ONNX files in place of a model

class OnnxModel:
    """The files of export.py, asked as MedSegR is by inference.py: its sizes, encode_image, encode_attributes and
    decode, by onnxruntime on the processor. InputError for texts and prompts that the files were not made for."""

    device = torch.device("cpu")

    def __init__(self, path):
        self.path = Path(path)
        self.decoder = self.session(self.path)
        about = self.decoder.get_modelmeta().custom_metadata_map
        if "encoder" not in about or "texts" not in about:
            raise InputError(f"--onnx {path}: is not a decoder that export.py writes; give the file of its --out")
        self.texts, self.prompt, self.dataset = json.loads(about["texts"]), about["prompt"], about["dataset"]
        self.config = SimpleNamespace(image_size=int(about["image_size"]))
        self.about, self.encoder = about["model"], self.session(self.path.with_name(about["encoder"]))

    def session(self, path):
        try:
            import onnxruntime
        except ImportError:
            raise InputError(f"--onnx {self.path}: needs the package onnxruntime; {NEEDS}") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # of onnxruntime's own classes
            why = "no such file" if not path.is_file() else f"not a readable ONNX file ({type(e).__name__})"
            raise InputError(f"--onnx {self.path}: {path.name}: {why}; make it with export.py, and keep its two files "
                             "together") from None

    def eval(self):
        return self

    def describe(self):
        return f"{self.about}; by onnxruntime in float32"

    def encode_image(self, images):
        """Images [B,3,S,S], 0 to 255 -> features [B,C,H,W]."""
        S = self.config.image_size
        if images.shape[1:] != (3, S, S):
            raise InputError(f"--onnx {self.path}: takes images [B,3,{S},{S}], not {list(images.shape)}")
        return torch.cat([torch.from_numpy(self.encoder.run(None, {"image": image[None].float().numpy()})[0])
                          for image in images])

    def encode_attributes(self, texts, empty=False):
        """Texts, all of them among those of the files -> in place of Priors their numbers there."""
        known = [{kind: text[kind] for kind in ATTRIBUTES} for text in self.texts]
        wanted = [{kind: text[kind] for kind in ATTRIBUTES} for text in texts]
        strange = [i for i, text in enumerate(wanted, 1) if text not in known]
        if strange:  # it is not said which: texts may be clinical
            raise InputError(f"--onnx {self.path}: was made for other texts ({len(strange)} of {len(wanted)} asked for "
                             "are not among them); ask for its own targets, or make one for these with export.py")
        return Priors(None, None, None, None, torch.tensor([known.index(text) for text in wanted], dtype=torch.int64))

    def run_decoder(self, features, boxes=None):
        """Features [1,C,H,W], boxes [T,4] -> logits [T,4H,4W] and IoU [T] of all T targets of the files."""
        inputs = dict(features=features.numpy()) | ({} if boxes is None else dict(boxes=boxes.float().numpy()))
        return [torch.from_numpy(x) for x in self.decoder.run(["logits", "iou"], inputs)]

    def decode(self, features, image_index, priors, points=None, boxes=None, explain=False):
        """As MedSegR.decode, of one image."""
        rows, given = priors.T_attr, "point" if points is not None else "none" if boxes is None else "box"
        if given != self.prompt:
            raise InputError(f"--onnx {self.path}: was made for --prompt {self.prompt}, not {given}; make one for "
                             "these prompts with export.py" + ", which knows boxes alone" * (given == "point"))
        if boxes is not None:
            if len(set(rows.tolist())) < len(rows):
                raise InputError(f"--onnx {self.path}: two boxes for the same texts; ask for one at a time")
            boxes = torch.zeros(len(self.texts), 4).index_copy(0, rows, boxes.float())
        logits, iou = (x[rows] for x in self.run_decoder(features, boxes))
        return (logits, iou) + (dict.fromkeys(("F_fused", "F_sem", "gate", "text_map")),) * explain


# ---------------------------------------------------------------------------------------------------------------------

def seconds(model, exported, turns=3):
    """What an image and its targets take, {way: seconds}: the median of turns by turns, on this machine."""
    S, boxes, times = model.config.image_size, None, {}
    image = np.random.default_rng(0).integers(0, 256, (S, S, 3), dtype=np.uint8)
    if exported.prompt == "box":
        boxes = np.tile([S / 4, S / 4, S / 2, S / 2], (len(exported.texts), 1))
    ways = {f"PyTorch in {kind}": (model, kind) for kind in ("float32", "bfloat16")} | {"ONNX": (exported, "float32")}
    for turn in range(turns + 1):
        for way, (asked, precision) in ways.items():
            started = time.perf_counter()
            predict_image(asked, image, exported.texts, boxes, precision=precision)
            if turn:  # the first one warms up
                times.setdefault(way, []).append(time.perf_counter() - started)
    return {way: statistics.median(t) for way, t in times.items()}


def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_target_flags(parser)
    add("--mean-wordings", type=number(1, 100, int), default=1, metavar="N",
        help="for predict.py with the same flag: up to N wordings of a target's texts")
    add("--modality", default="ct", choices=MODALITIES)
    add("--prompt", default="none", choices=("none", "box"), help="what the decoder takes beside the features")
    add("--sam-checkpoint"), add("--clip")
    add("--out", type=Path, default=Path("out/medsegr.onnx"), metavar="FILE", help="default: %(default)s")
    args = parser.parse_args()
    free = {kind: getattr(args, kind) for kind in ATTRIBUTES}
    if bool(args.target) == any(free.values()) or not args.target and not all(free.values()):
        raise InputError("say what to find: either --target NAME, or --position, --texture and --shape")
    if args.out.suffix != ".onnx":
        raise InputError(f"--out {args.out}: give a file that ends in .onnx")
    args.texts = [] if args.target else [free]
    return args


def main():
    args = parse()
    checkpoint = args.checkpoint or default_checkpoint(args.modality)
    model, record = load_checkpoint(checkpoint, sam_checkpoint=args.sam_checkpoint, clip=args.clip)
    dataset = args.dataset or record.get("dataset") or "synapse"
    texts = Texts(dataset, args.attributes_file or own_texts(record, args.dataset)) if args.target else None
    for target in args.target or ():
        args.texts += wordings(texts, args.mean_wordings, target, args.modality, None)
    make_folder(args.out.parent)
    print(f"checkpoint {checkpoint}: {model.describe()}")
    started = time.time()
    exported, off = export(model, args.texts, args.out, args.prompt, dataset)
    sizes = [path.stat().st_size / 2 ** 20 for path in (args.out, args.out.with_name(f"{args.out.stem}-encoder.onnx"))]
    print(f"wrote {args.out} ({sizes[0]:.0f} MB) and its encoder ({sizes[1]:.0f} MB), opset {OPSET}, "
          f"{exported.config.image_size} px, {len(exported.texts)} targets, in {time.time() - started:.0f} s; the "
          f"logits differ from PyTorch's by {off:.0e} of their range")
    took = ", ".join(f"{s:.2f} s by {way}" for way, s in seconds(model, exported).items())
    print(f"an image and its targets take {took}")


if __name__ == "__main__":
    run(main)

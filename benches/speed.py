"""bench.py speed: table 7, tuned parameters and images per second, each image with one box."""
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from segment_anything import sam_model_registry

from benches.timing import measure, show
from common import LIGHT
from export import export
from inference import autocast
from medsegr import Config, MedSegR
from paper.tables import NUMBERS
from readers.synapse import ORGANS
from texts import Texts


def plain_sam(device):
    """SAM ViT-B at 1024 -> (function of a batch of images and boxes, image size, all of its parameters in M)."""
    sam = sam_model_registry["vit_b"]().to(device).eval()

    def answer(images, boxes):
        features, masks = sam.image_encoder(images), []
        for f, box in zip(features, boxes):  # its decoder takes one image at a time
            sparse, dense = sam.prompt_encoder(points=None, boxes=box[None], masks=None)
            masks.append(sam.mask_decoder(image_embeddings=f[None], image_pe=sam.prompt_encoder.get_dense_pe(),
                                          sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense,
                                          multimask_output=False)[0])
        return torch.cat(masks)

    return answer, 1024, sum(p.numel() for p in sam.parameters()) / 1e6


def medsegr(device, own_encoder=False, **config):
    """As plain_sam(), with the trained parameters. Texts as in real use: their tokens are known, the trained stages are
    computed for every batch. own_encoder: LiteMedSAM's encoder as its package runs it, for comparison."""
    model = MedSegR(Config(**config)).to(device).eval()
    texts = [Texts("synapse")(name, "ct") for name in ORGANS]
    encode = model.sam.image_encoder if own_encoder else model.encode_image

    def answer(images, boxes):
        n = len(images)
        priors = model.encode_attributes([texts[i % 8] for i in range(n)])
        return model.decode(encode(images), torch.arange(n, device=device), priors, boxes=boxes)[0]

    return answer, model.config.image_size, sum(p.numel() for p in model.trained().values()) / 1e6


def onnx(device, **config):
    """medsegr() as ONNX files for one text, an image at a time."""
    model = MedSegR(Config(**config)).eval()
    texts = [Texts("synapse")(ORGANS[0], "ct")]
    with tempfile.TemporaryDirectory() as folder:
        files, _ = export(model, texts, Path(folder) / "x.onnx", "box")
    priors, first = files.encode_attributes(texts), torch.zeros(1, dtype=torch.int64)

    def answer(images, boxes):
        return torch.cat([files.decode(files.encode_image(image[None]), first, priors, boxes=box[None])[0]
                          for image, box in zip(images, boxes)])

    return answer, model.config.image_size, sum(p.numel() for p in model.trained().values()) / 1e6


VIT = dict(backbone="vit_b", sam_checkpoint="random")  # random weights are as fast as SAM's
LITE, ONNX = dict(backbone="lite_medsam", branches=("sam",)), "the same, as ONNX files"
ROWS = {
    "SAM, ViT-B at 1024": plain_sam,
    "SAM, ViT-B at 224": partial(medsegr, **VIT, branches=("sam",)),
    "SAM-Med2D, ViT-B with adapters at 256": partial(medsegr, backbone="sam_med2d", sam_checkpoint="random",
                                                     branches=("sam",)),
    "MedSeg-R, ViT-B at 224, CLIP ViT-B/16": partial(medsegr, **VIT, clip="ViT-B-16-quickgelu:random"),
    "LiteMedSAM at 256, its package's encoder": partial(medsegr, **LITE, own_encoder=True),
    "LiteMedSAM at 256, our encoder": partial(medsegr, **LITE),
    "MedSeg-R, LiteMedSAM at 256, MiniLM": partial(medsegr, **LIGHT),
    ONNX: partial(onnx, **LIGHT),
}


@torch.no_grad()
def bench_speed(args):
    """In float32, and in --dtype."""
    device, rows = torch.device(args.device), []
    for name, make in ROWS.items():
        if name == ONNX and args.device == "cuda":
            continue  # its files are for processors
        with warnings.catch_warnings(action="ignore"):
            answer, S, tuned = make(device)
        row = {"": name, "tuned, M": tuned}
        for dtype in dict.fromkeys(("float32", args.dtype)):
            for n in args.batches if name != ONNX or dtype == "float32" else ():
                images = torch.randint(0, 256, (n, 3, S, S), device=device).float()
                box = torch.tensor([[S / 4, S / 4, S / 2, S / 2]], device=device).expand(n, -1)
                with autocast(device, dtype):
                    ms, _ = measure(dict(ours=lambda: answer(images, box)), args, slow=20)
                row[f"images/s, batch {n}" + f", {dtype}" * (dtype != "float32")] = 1000 * n / ms["ours"]
                if ms["ours"] > 20_000:
                    break  # larger ones take too long
        rows.append(row)
    tables = show("each image with one box; SAM at 1024: all of its parameters, at 224 its decoder's", rows)
    paper = [{"": f"{name}, {backbone}", "tuned, M": tuned, "images/s": rate}
             for name, (backbone, tuned, rate) in NUMBERS["table7"]["rows"].items()]
    return tables | show(f"the paper, {NUMBERS['table7']['note']}: compare the ratios", paper)

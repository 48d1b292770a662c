"""bench.py speed: table 7, tuned parameters and images per second, each image with one box."""
import warnings

import torch
from segment_anything import sam_model_registry

from benches.timing import measure, show
from common import LIGHT
from inference import autocast
from medsegr import Config, MedSegR
from paper.tables import NUMBERS
from readers.synapse import ORGANS
from texts import Texts

RANDOM = dict(backbone="vit_b", sam_checkpoint="random")  # weights, as fast as SAM's
ROWS = {  # None: SAM as its package has it
    "SAM, ViT-B at 1024": None,
    "SAM, ViT-B at 224": dict(**RANDOM, branches=("sam",)),
    "MedSeg-R, ViT-B at 224, CLIP ViT-B/16": dict(**RANDOM, clip="ViT-B-16-quickgelu:random"),
    "LiteMedSAM at 256": dict(backbone="lite_medsam", branches=("sam",)),
    "MedSeg-R, LiteMedSAM at 256, MiniLM": LIGHT,
}


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


def medsegr(config, device):
    """As plain_sam(), with the trained parameters. Texts as in real use: their tokens are known, the trained stages are
    computed for every batch."""
    model = MedSegR(Config(**config)).to(device).eval()
    texts = [Texts("synapse")(name, "ct") for name in ORGANS]

    def answer(images, boxes):
        n = len(images)
        priors = model.encode_attributes([texts[i % 8] for i in range(n)])
        return model.decode(model.encode_image(images), torch.arange(n, device=device), priors, boxes=boxes)[0]

    return answer, model.config.image_size, sum(p.numel() for p in model.trained().values()) / 1e6


@torch.no_grad()
def bench_speed(args):
    device, rows = torch.device(args.device), []
    for name, config in ROWS.items():
        with warnings.catch_warnings(action="ignore"):
            answer, S, tuned = medsegr(config, device) if config else plain_sam(device)
        row = {"": name, "tuned, M": tuned}
        for n in args.batches:
            images = torch.randint(0, 256, (n, 3, S, S), device=device).float()
            box = torch.tensor([[S / 4, S / 4, S / 2, S / 2]], device=device).expand(n, -1)
            with autocast(device, args.dtype):
                ms, _ = measure(dict(ours=lambda: answer(images, box)), args, slow=20)
            row[f"images/s, batch {n}"] = 1000 * n / ms["ours"]
            if ms["ours"] > 20_000:
                break  # larger ones take too long
        rows.append(row)
    tables = show("each image with one box; SAM at 1024: all of its parameters, at 224 its decoder's", rows)
    paper = [{"": f"{name}, {backbone}", "tuned, M": tuned, "images/s": rate}
             for name, (backbone, tuned, rate) in NUMBERS["table7"]["rows"].items()]
    return tables | show(f"the paper, {NUMBERS['table7']['note']}: compare the ratios", paper)

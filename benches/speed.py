"""bench.py speed: table 7, tuned parameters and images per second, each image with one box."""
import warnings

import torch
from segment_anything import sam_model_registry

from benches.timing import measure
from common import LIGHT
from inference import autocast
from medsegr import Config, MedSegR
from paper.tables import NUMBERS
from readers.synapse import ORGANS
from texts import Texts


def plain_sam(device):
    """SAM ViT-B as its package has it, at 1024 -> (function of a batch of boxes, all of its parameters in M)."""
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


def medsegr(device, **config):
    """-> (function of a batch of images and boxes, image size, trained parameters in M). Texts as in real use: their
    tokens are known, the trained stages are computed for every batch."""
    model = MedSegR(Config(**config)).to(device).eval()
    texts = [Texts("synapse")(name, "ct") for name in ORGANS]

    def answer(images, boxes):
        n = len(images)
        priors = model.encode_attributes([texts[i % 8] for i in range(n)])
        return model.decode(model.encode_image(images), torch.arange(n, device=device), priors, boxes=boxes)[0]

    return answer, model.config.image_size, sum(p.numel() for p in model.trained().values()) / 1e6


ROWS = {
    "SAM, ViT-B at 1024": plain_sam,
    "SAM, ViT-B at 224": lambda d: medsegr(d, backbone="vit_b", sam_checkpoint="random", branches=("sam",)),
    "MedSeg-R, ViT-B at 224, CLIP ViT-B/16": lambda d: medsegr(d, backbone="vit_b", sam_checkpoint="random",
                                                               clip="ViT-B-16-quickgelu:random"),
    "LiteMedSAM at 256": lambda d: medsegr(d, backbone="lite_medsam", branches=("sam",)),
    "MedSeg-R, LiteMedSAM at 256, MiniLM": lambda d: medsegr(d, **LIGHT),
}


COLUMNS = "{:<40}{:>10}{:>20}{:>8}{:>7}".format


@torch.no_grad()
def bench_speed(args):
    """-> {row: tuned parameters in M, images a second by batch size}"""
    device, record = torch.device(args.device), {}
    print("", COLUMNS("", "tuned, M", "images/s, batch 1", "best", "batch"), sep="\n")
    for name, make in ROWS.items():
        with warnings.catch_warnings(action="ignore"):
            answer, S, tuned = make(device)
        rates = {}
        for n in args.batches:
            images = torch.randint(0, 256, (n, 3, S, S), device=device).float()
            box = torch.tensor([[S / 4, S / 4, S / 2, S / 2]], device=device).expand(n, -1)
            with autocast(device, args.dtype):
                times, _ = measure(dict(ours=lambda: answer(images, box)), args, slow=20)
            rates[n] = n / times["ours"]["ms"] * 1000
            if rates[n] < 0.9 * max(rates.values()) or n / rates[n] > 20:
                break  # larger ones are slower still, or take too long
        best = max(rates, key=rates.get)
        record[name] = dict(tuned=tuned, images_per_s=rates)
        print(COLUMNS(name, f"{tuned:.2f}", f"{rates[1]:.2f}" if 1 in rates else "-", f"{rates[best]:.2f}", best))
    for name, (backbone, tuned, rate) in NUMBERS["table7"]["rows"].items():
        print(COLUMNS(f"paper: {name}, {backbone}*", f"{tuned:.2f}", rate, "", ""))
    print(f"* {NUMBERS['table7']['note']}: compare the ratios\n"
          "Plain SAM: all of its parameters, or with a size of ours its decoder's")
    return dict(rows=record)

"""Trains MedSeg-R: the text heads and SAM's mask decoder, on frozen and cached image features.

    python train.py --dataset demo                              one process, CPU or GPU
    torchrun --nproc_per_node 8 train.py --dataset synapse      one process per GPU
    python train.py --dataset synapse --out out/synapse --resume

Writes OUT/best.safetensors and OUT/last.safetensors (with OUT/config.json), OUT/log.csv and, for --resume,
OUT/training.safetensors.
"""
import csv
import json
import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from cache import FeatureCache, fill
from common import InputError, Parser, make_folder, run, seeded, write_atomically
from data import PROMPTS, Texts, add_data_flags, add_prompts, knobs, make_batch, merge_instances, open_dataset
from eval import Predictor, add_runtime_flags, answers, autocast, check_runtime_flags, label_map, true_label_map
from medsegr import ATTRIBUTES, BRANCHES, Config, MedSegR, ModelError, save_checkpoint

LOG = ("step", "epoch", "prompt", "loss", "focal", "dice", "iou", "lr", "images_per_s", "seconds", "val_dice")


# ---------------------------------------------------------------------------------------------------------------------
# Loss, augmentation, schedule

def segmentation_loss(logits, iou, masks):
    """SAM-Med2D's loss, 20 focal + Dice + MSE of the predicted IoU, each taken per target and then averaged.

    logits float [M,h,w], iou [M], masks bool [M,S,S] -> the loss and its three parts. An absent structure has an empty
    mask: its Dice term falls as the predicted area does, its IoU is 1 if nothing is predicted, else 0.
    """
    if not len(logits):  # a step whose images hold nothing to ask for: no gradient, rather than the mean of nothing
        zero = 0.0 * (logits.sum() + iou.sum())
        return zero, dict(focal=zero.detach(), dice=zero.detach(), iou=zero.detach())
    truth = masks.float()
    logits = F.interpolate(logits.float()[:, None], masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    right, alpha = truth * p + (1 - truth) * (1 - p), 0.25 * truth + 0.75 * (1 - truth)
    focal = (alpha * (1 - right) ** 2 * entropy).mean()
    dice = (1 - (2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)).mean()
    with torch.no_grad():
        predicted = logits > 0
        union = (predicted | masks).sum((1, 2))
        true_iou = torch.where(union > 0, (predicted & masks).sum((1, 2)) / union.clamp(min=1), 1.0)
    iou = F.mse_loss(iou.float(), true_iou)
    return 20 * focal + dice + iou, dict(focal=focal.detach(), dice=dice.detach(), iou=iou.detach())


def jitter(features, batch, rng, size):
    """Moves, scales and turns each image's cached features and its masks alike, by up to `size` of the image.

    The frozen encoders are nearly equivariant, so this augments without encoding again. Nothing is mirrored: the texts
    speak of left and right.
    """
    B, S = len(features), batch.masks.shape[-1]
    scale, turn = np.exp(rng.uniform(-size, size, B)), rng.uniform(-size, size, B)
    cos, sin = scale * np.cos(turn), scale * np.sin(turn)
    shift = rng.uniform(-size, size, (2, B))
    theta = torch.tensor(np.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).reshape(B, 2, 3), dtype=torch.float32)
    grid = F.affine_grid(theta, list(features.shape), align_corners=False)
    features = F.grid_sample(features, grid, padding_mode="border", align_corners=False)
    grid = F.affine_grid(theta, [B, 1, S, S], align_corners=False)[batch.index]
    masks = F.grid_sample(batch.masks[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0] > 0.5
    return features, replace(batch, masks=masks)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then polynomial decay with power 0.9, as SAMed."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (step - warmup) / max(1, steps - warmup)) ** 0.9


def parameter_groups(model, weight_decay, decoder_share):
    """AdamW's groups: SAM's pretrained mask decoder learns at a share of the rate, or it would forget what it knows of
    prompts before the heads, which start from nothing, have learnt to speak to it. Biases, norms and temperatures do
    not decay."""
    groups = {}
    for name, p in model.trained().items():
        group = decoder_share if name.startswith("sam.mask_decoder.") else 1.0, weight_decay if p.dim() > 1 else 0.0
        groups.setdefault(group, []).append(p)
    return [dict(params=params, share=share, weight_decay=decay) for (share, decay), params in groups.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Processes and data

def start_processes():
    """-> rank, world size, device; joins the process group that torchrun set up, NCCL on GPUs and gloo on CPUs."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), torch.device("cuda", local) if cuda else torch.device("cpu")


class Batches(torch.utils.data.Dataset):
    """Item `step` is the samples of that step for this rank: every epoch is a seeded permutation, cut evenly.

    With `views` an image comes in another of its variations in every epoch, and as it is in every (views + 1)th.
    """

    def __init__(self, dataset, batch_size, rank, world, seed, first, last, views=0, texts=None):
        self.dataset, self.batch_size, self.rank, self.world = dataset, batch_size, rank, world
        self.seed, self.first, self.last, self.views, self.texts = seed, first, last, views, texts
        self.per_epoch = -(-len(dataset) // (batch_size * world))

    def __len__(self):
        return self.last - self.first

    def __getitem__(self, i):
        epoch, at = divmod(self.first + i, self.per_epoch)
        order = seeded("order", self.seed, epoch).permutation(len(self.dataset))
        rows = order[self.rank::self.world][at * self.batch_size:(at + 1) * self.batch_size]
        if not len(rows):  # the ranks share an epoch unevenly by at most one sample
            rows = order[:1]
        try:
            return [self.dataset.view(int(j), int(epoch + j) % (self.views + 1), self.texts) for j in rows]
        except InputError as e:  # carried out of the worker process as a value, or it would arrive as a traceback
            return e


# ---------------------------------------------------------------------------------------------------------------------
# Validation and checkpoints

def validate(predictor, dataset, rows, rank, world):
    """Dice per class, the pixels of all given images pooled, averaged over the classes -> float, equal on all ranks.

    Pooled, because an image that lacks a structure has no Dice of its own, yet what is predicted there must count.
    """
    predictor.model.eval()
    classes = list(dataset.classes)
    both, sizes = (torch.zeros(len(classes), dtype=torch.float64) for _ in range(2))
    for i in rows[rank::world]:
        sample = predictor.prepare(dataset[i])
        names, logits = predictor(sample)
        pairs = answers(names, logits, sample)
        if dataset.volumes:  # where the most certain answer wins
            label, truth = label_map(names, logits, sample.size, classes), true_label_map(sample, classes)
            pairs = [(name, label == t, truth == t) for t, name in enumerate(classes, 1)]
        for name, a, b in pairs:
            both[classes.index(name)] += (a & b).sum()
            sizes[classes.index(name)] += a.sum() + b.sum()
    predictor.model.train()
    if world > 1:
        totals = torch.stack([both, sizes]).to(predictor.model.device)
        dist.all_reduce(totals)
        both, sizes = totals.cpu()
    seen = sizes > 0
    return float((2 * both[seen] / sizes[seen]).mean()) if seen.any() else 0.0


def save_training(path, model, optimizer, **record):
    """All that --resume needs in one file, replaced at once: parameters, moments, and the record as metadata."""
    tensors = {}
    for name, p in model.trained().items():
        tensors[f"p.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
    write_atomically(path, safetensors.torch.save(tensors, {k: json.dumps(v) for k, v in record.items()}))


def load_training(path, model, optimizer):
    """The opposite of save_training -> its record."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            record = {k: json.loads(v) for k, v in f.metadata().items()}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        names = {k.split(".", 1)[1] for k in tensors}
        shapes = {n: tuple(tensors[f"p.{n}"].shape) for n in names}
        if shapes != {n: tuple(p.shape) for n, p in model.trained().items()}:
            raise InputError(f"--resume: {path} is of a model with other switches; give the flags of its run")
        with torch.no_grad():
            for name, p in model.trained().items():
                p.copy_(tensors[f"p.{name}"])
                moments = {k: tensors[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
        return record
    except FileNotFoundError:
        raise InputError(f"--resume: {path} is not there; leave --resume out to start anew") from None
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError, AttributeError) as e:
        raise InputError(f"--resume: {path} is damaged ({type(e).__name__}); leave --resume out to start "
                         "anew") from None


# ---------------------------------------------------------------------------------------------------------------------

def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_data_flags(parser)
    parser.set_defaults(dataset="demo")
    add("--backbone", default="lite_medsam", help="lite_medsam, vit_b, vit_l or vit_h")
    add("--sam-checkpoint", help="weights of the backbone (default: its own)")
    add("--clip", default="minilm", help="text encoder: minilm, or NAME:TAG or NAME:FILE of open_clip")
    add("--prompt", default="none", help="none, point, box or mixed (one of the three per step)")
    add("--points", type=int, default=1, help="points per target")
    add("--epochs", type=int, default=50)
    add("--max-steps", type=int, help="end, and let the rate decay, after this many steps")
    add("--batch-size", type=int, default=12, help="images per process and step")
    add("--targets", type=int, default=4, help="structures asked for per image")
    add("--absent", type=float, default=0.25, help="how often an absent structure is asked for, without a prompt")
    add("--jitter", type=float, default=0.1, help="move, scale and turn features by up to this much; 0: not at all")
    add("--views", type=int, default=0, help="variations of each image, encoded and cached as the image is")
    add("--lr", type=float, default=1e-3, help="of the parts that start from nothing")
    add("--decoder-lr", type=float, default=0.1, help="of SAM's pretrained mask decoder, as a share of --lr")
    add("--warmup", type=int, default=100, help="steps")
    add("--weight-decay", type=float, default=0.1)
    add("--image-size", type=int, help="pixels (default: 256 for lite_medsam, 224 for ViT)")
    add("--feature-grid", type=int, help="pool the features to this grid, to train on a CPU")
    add("--normalize", help="sam (mean and std) or minmax (MedSAM's weights); default: the backbone's own")
    add("--fraction", type=float, default=1.0, help="of the training slices")
    add("--limit", type=int, help="only the first N training slices")
    add("--val-slices", type=int, default=64, help="slices to validate on, spread evenly")
    add("--seed", type=int, default=0)
    add("--out", default="out")
    add("--resume", action="store_true", help="go on where OUT/training.safetensors ends")
    add("--workers", type=int, default=1, help="processes that load images")
    add("--attributes", nargs="*", default=ATTRIBUTES, help="table 3: texts that the cognitive stage sees")
    add("--priors", nargs="*", default=ATTRIBUTES, help="table 4: perceptual heads that act")
    add("--branches", nargs="+", default=BRANCHES, help="table 6: fused, sem, sam")
    for switch in ("cognitive", "perceptual", "caa"):
        add(f"--no-{switch}", dest=switch, action="store_false", help="table 5")
    add("--position-grid", type=int, default=14)
    add("--offset-grid", type=int, default=1)
    add_runtime_flags(parser)
    args = parser.parse_args()
    check_runtime_flags(args)
    if args.prompt not in (*PROMPTS, "mixed"):
        raise InputError(f"--prompt {args.prompt}: choose from {', '.join(PROMPTS)}, mixed")
    for flag in ("points", "epochs", "max_steps", "batch_size", "targets", "warmup", "val_slices"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give at least 1")
    for flag, low, high in (("absent", 0, 1), ("jitter", 0, 0.5), ("views", 0, 1000), ("lr", 1e-12, 10),
                            ("decoder_lr", 0, 1), ("weight_decay", 0, 10)):
        if not low <= getattr(args, flag) <= high:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give {low} to {high}")
    return args


def main():
    args = parse()
    rank, world, device = start_processes()
    say = print if rank == 0 else lambda *a, **k: None
    out = Path(args.out)
    config = Config(**{k: getattr(args, k) for k in (
        "backbone", "sam_checkpoint", "clip", "image_size", "normalize", "feature_grid", "attributes", "priors",
        "cognitive", "perceptual", "caa", "branches", "position_grid", "offset_grid")})
    train_set = open_dataset(args.dataset, args.data, "train", config.image_size, args.fraction, args.limit, args.seed,
                             **knobs(args))
    val_set = open_dataset(args.dataset, args.data, "val", config.image_size, **knobs(args))
    val_rows = np.unique(np.linspace(0, len(val_set) - 1, args.val_slices).round().astype(int)).tolist()
    val_prompt = "none" if args.prompt == "mixed" else args.prompt
    texts = Texts(args.dataset, args.attributes_file, args.texts)
    texts.check(train_set.source.pairs)
    make_folder(out)
    torch.manual_seed(args.seed)
    model = MedSegR(config).to(device)
    say(model.describe())
    say(f"{args.dataset}: {len(train_set)} training images, {len(val_rows)} of {len(val_set)} validation images; "
        f"{world} process(es) on {device}")

    # each image is encoded once, by one of the processes
    cache = FeatureCache(args.cache, f"{model.features_key()}-{args.precision}", args.cache_gb)

    def encode(images):
        with autocast(device, args.precision):
            return model.encode_image(images)

    views = range(args.views + 1)
    images = ((len(train_set) * len(views), lambda n: train_set.view(*divmod(n, len(views)), texts)),
              (len(val_rows), lambda n: val_set[val_rows[n]]))
    for (count, sample), note in zip(images, ("encoding images", "encoding validation images")):
        fill(cache, count, sample, encode, rank, world, note)
    if world > 1:
        dist.barrier()

    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, args.decoder_lr), lr=args.lr,
                                  betas=(0.9, 0.999))
    progress = dict(step=0, best=-1.0, seconds=0.0)
    if args.resume:
        progress = load_training(out / "training.safetensors", model, optimizer)
    batches = Batches(train_set, args.batch_size, rank, world, args.seed, progress["step"], 0, args.views, texts)
    steps = min(args.epochs * batches.per_epoch, args.max_steps or 10 ** 12)
    batches.last = max(progress["step"], steps)
    if progress["step"] >= steps:
        return say(f"{out}: already trained for {progress['step']} steps; raise --epochs or --max-steps to go on")
    ddp = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    log = open_log(out / "log.csv", progress["step"]) if rank == 0 else None
    started, shown = time.time() - progress["seconds"], time.time()
    loader = DataLoader(batches, batch_size=None, num_workers=args.workers)
    bar = tqdm(loader, "training", total=steps, initial=progress["step"], disable=rank > 0, unit="step", mininterval=1)
    model.train()
    for step, samples in enumerate(bar, progress["step"]):
        if isinstance(samples, InputError):
            raise samples
        # one generator per step and rank, so that a resumed run draws what an undisturbed one would have
        rng = seeded("step", args.seed, step, rank)
        prompt = PROMPTS[rng.integers(3)] if args.prompt == "mixed" else args.prompt
        if prompt == "none":
            samples = [merge_instances(sample) for sample in samples]
        batch = make_batch(samples, texts, rng, args.targets, args.absent if prompt == "none" else 0.0)
        if not batch.targets:  # none of the structures is here to be pointed at
            prompt, batch = "none", make_batch(samples, texts, rng, args.targets, 1.0)
        features = cache(batch.images, encode)
        if args.jitter:
            features, batch = jitter(features, batch, rng, args.jitter)
        batch = add_prompts(batch, prompt, rng, args.points).to(device)
        lr = learning_rate(step, steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * lr
        with autocast(device, args.precision):
            logits, iou = ddp(None, batch.index, batch.texts, batch.points, batch.boxes, features.to(device))
        loss, parts = segmentation_loss(logits, iou, batch.masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trained().values(), 1.0)
        optimizer.step()

        done, epoch = step + 1, step // batches.per_epoch
        check = done % batches.per_epoch == 0 or done == steps
        if rank == 0 and (done % 10 == 0 or check):
            rate = 10 * args.batch_size * world / max(1e-9, time.time() - shown)
            shown = time.time()
            row = dict(step=done, epoch=epoch, prompt=prompt, loss=loss.detach(), **parts, lr=lr,
                       images_per_s=rate, seconds=shown - started)
            log({k: f"{float(v):.6g}" if k not in ("step", "epoch", "prompt") else v for k, v in row.items()})
            bar.set_postfix(epoch=epoch, loss=f"{float(row['loss']):.3f}", best=f"{progress['best']:.3f}")
        if check:
            predictor = Predictor(model, texts, val_prompt, args.points, 0, cache, args.precision)
            dice = validate(predictor, val_set, val_rows, rank, world)
            progress = dict(step=done, best=max(dice, progress["best"]), seconds=time.time() - started)
            shown = time.time()
            if rank == 0:
                log(dict(step=done, epoch=epoch, prompt=val_prompt, val_dice=f"{dice:.6g}"))
                record = dict(dataset=args.dataset, step=done, val_dice=dice, arguments=vars(args))
                if dice >= progress["best"]:
                    save_checkpoint(model, out / "best.safetensors", **record)
                save_checkpoint(model, out / "last.safetensors", **record)
                save_training(out / "training.safetensors", model, optimizer, **progress)
    say(f"{out}: {steps} steps in {progress['seconds'] / 60:.1f} min, best validation Dice {progress['best']:.4f} "
        f"(prompt {val_prompt}, pixels pooled); next: python eval.py --checkpoint {out}")
    if world > 1:
        dist.destroy_process_group()


def open_log(path, step):
    """A function that adds a row to the CSV, after dropping the rows beyond `step` of an interrupted run."""
    rows = []
    if step and path.is_file():
        with open(path, newline="") as f:
            rows = [r for r in csv.DictReader(f) if (r.get("step") or "").isdigit() and int(r["step"]) <= step]
    file = open(path, "w", newline="")
    writer = csv.DictWriter(file, LOG)
    writer.writeheader()
    writer.writerows(rows)

    def add(row):
        writer.writerow(row)
        file.flush()
    return add


if __name__ == "__main__":
    run(main, ModelError)

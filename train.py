"""Trains MedSeg-R: the text heads and SAM's mask decoder, on frozen and cached image features.

    python train.py --dataset demo                              one process, CPU or GPU
    torchrun --nproc_per_node 8 train.py --dataset synapse      one process per GPU
    python train.py --dataset synapse --out out/synapse --resume

Writes OUT/best.safetensors and OUT/last.safetensors (with OUT/config.json), OUT/log.csv, OUT/curves.png, OUT/run.json
and, for --resume, OUT/training.safetensors. SIGTERM and Ctrl-C save first. The draws are in data.py, what is written
in runs.py.
"""
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import (InputError, Parser, add_runtime_flags, check_runtime_flags, make_folder, run, start_processes,
                    total)
from data import PROMPTS, Batches, add_data_flags, correction_points, knobs, move, open_dataset
from encoders import FeatureCache, fill
from inference import Predictor, autocast, predict
from medsegr import ATTRIBUTES, BRANCHES, Config, MedSegR
from runs import (Log, changes, check_disk, fingerprint, load_training, memory_mb, save_checkpoint, save_run,
                  save_training)
from texts import Texts

PATIENCE = 20  # steps in a row without a finite gradient end a run

# ---------------------------------------------------------------------------------------------------------------------
# Loss, schedule

def segmentation_loss(logits, iou, masks, count=None, weights=(20.0, 1.0, 1.0)):
    """SAM-Med2D's loss, 20 focal + Dice + MSE of the predicted IoU, each taken per target and then averaged.

    logits float [M,h,w], iou [M], masks bool [M,S,S] -> the loss and its three parts [3]. `count` takes M's place where
    these are not all of a step's targets. An absent structure has an empty mask: its Dice term falls as the predicted
    area does, its IoU is 1 if nothing is predicted, else 0.
    """
    count = max(1, len(masks) if count is None else count)
    if not len(logits):  # no gradient, rather than the mean of nothing
        zero = 0.0 * (logits.sum() + iou.sum())
        return zero, torch.zeros(3, device=logits.device)
    truth = masks.float()
    logits = F.interpolate(logits.float()[:, None], masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    right, alpha = truth * p + (1 - truth) * (1 - p), 0.25 * truth + 0.75 * (1 - truth)
    focal = (alpha * (1 - right) ** 2 * entropy).mean((1, 2))
    dice = 1 - (2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)
    with torch.no_grad():
        predicted = logits > 0
        union = (predicted | masks).sum((1, 2))
        true_iou = torch.where(union > 0, (predicted & masks).sum((1, 2)) / union.clamp(min=1), 1.0)
    parts = torch.stack([focal, dice, (iou.float() - true_iou) ** 2], 1).sum(0) / count
    return (parts * parts.new_tensor(weights)).sum(), parts.detach()


class Objective(nn.Module):
    """Model and loss in one forward, as DistributedDataParallel needs it; it sees the trained parameters alone."""

    def __init__(self, model, weights):
        super().__init__()
        self.trained = nn.ParameterList(model.trained().values())
        self.held = [model]  # in a list, so that the frozen parts are no part of this module
        self.weights = weights

    def forward(self, batch, features, count, clicks=()):
        """The loss of one Batch, its three parts [3]. `count`: of the targets of all processes together.

        clicks: the number of points in each further round, in which SAM is shown its own last answer and points from
        its error (SAM-Med2D's interactive training). The rounds share encoding, texts and one backward pass, where
        SAM-Med2D takes an optimiser step for each.
        """
        model = self.held[0]
        x, _ = model.steer(features, batch.index, model.encode_attributes(batch.texts))
        logits, iou = model.ask(x, batch.points, batch.boxes)
        losses = [segmentation_loss(logits, iou, batch.masks, count, self.weights)]
        for n, clicked in enumerate(clicks):
            before, points = logits.detach(), None
            if clicked and len(before):
                size = batch.masks.shape[-2:]
                shown = F.interpolate(before.float()[:, None], size, mode="bilinear", align_corners=False)[:, 0] > 0
                points = correction_points(shown, batch.masks, batch.clicks[:, n, :clicked])
            logits, iou = model.ask(x, points, None, before)
            losses.append(segmentation_loss(logits, iou, batch.masks, count, self.weights))
        return (sum(loss for loss, _ in losses) / len(losses), sum(parts for _, parts in losses) / len(losses))


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then polynomial decay with power 0.9, as SAMed."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (step - warmup) / max(1, steps - warmup)) ** 0.9


def parameter_groups(model, weight_decay, decoder_share):
    """AdamW's groups: what is pretrained, SAM's mask decoder, learns at a share of the rate, or it would forget what it
    knows of prompts before the heads, which start from nothing, have learnt to speak to it. Biases, norms and
    temperatures do not decay."""
    groups = {}
    for name, p in model.trained().items():
        pretrained = name.startswith("sam.") and ".parametrizations." not in name  # LoRA's updates start from nothing
        group = decoder_share if pretrained else 1.0, weight_decay if p.dim() > 1 else 0.0
        groups.setdefault(group, []).append(p)
    return [dict(params=params, share=share, weight_decay=decay) for (share, decay), params in groups.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Signals

class Stopped(Exception):
    """A signal asked this run to end."""


class Signals:
    """Remembers SIGTERM and SIGINT instead of dying of them; the second one kills."""

    seen = None

    def __enter__(self):
        self.before = {n: signal.signal(n, self) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        self.seen = number
        signal.signal(number, self.before[number])

    def name(self):
        return signal.Signals(self.seen).name if self.seen else "another process was stopped"

    def check(self):
        if self.seen:
            raise Stopped


# ---------------------------------------------------------------------------------------------------------------------

def validate(predictor, dataset, rows, rank, world, signals):
    """Dice per class, the pixels of all given images pooled, averaged over the classes -> float, equal on all ranks.

    Pooled, because an image that lacks a structure has no Dice of its own, yet what is predicted there must count.
    """
    predictor.model.eval()
    classes = list(dataset.classes)
    both, sizes = (torch.zeros(len(classes), dtype=torch.float64) for _ in range(2))
    for i in rows[rank::world]:
        signals.check()
        sample = predictor.prepare(dataset[i])
        for name, a, b in predict(predictor, sample, dataset):
            both[classes.index(name)] += (a & b).sum()
            sizes[classes.index(name)] += a.sum() + b.sum()
    predictor.model.train()
    both, sizes = torch.tensor(total(*both.tolist(), *sizes.tolist()), dtype=torch.float64).view(2, -1)
    seen = sizes > 0
    return float((2 * both[seen] / sizes[seen]).mean()) if seen.any() else 0.0


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
    add("--accumulate", type=int, default=1, help="batches per step: memory for time, the same gradient")
    add("--targets", type=int, default=4, help="structures asked for per image")
    add("--absent", type=float, default=0.1, help="how often an absent structure is asked for, without a prompt")
    add("--jitter", type=float, default=0.1, help="move, scale and turn features by up to this much; 0: not at all")
    add("--rounds", type=int, default=1, help="SAM-Med2D's interaction: further ones see the last mask and points")
    add("--views", type=int, default=0, help="variations of each image, encoded and cached as the image is")
    add("--lr", type=float, default=1e-3, help="of the parts that start from nothing")
    add("--decoder-lr", type=float, default=0.1, help="of SAM's pretrained mask decoder, as a share of --lr")
    add("--warmup", type=int, default=100, help="steps")
    add("--weight-decay", type=float, default=0.1)
    add("--loss-weights", type=float, nargs=3, default=(20.0, 1.0, 1.0), help="of focal, Dice and IoU")
    add("--tune-encoder", default="none", help="beyond the paper: lora or all; nothing can be cached then")
    add("--lora-rank", type=int, default=4)
    add("--compile", action="store_true", help="torch.compile: a minute or more first; its gain is not measured")
    add("--image-size", type=int, help="pixels (default: 256 for lite_medsam, 224 for ViT)")
    add("--feature-grid", type=int, help="pool the features to this grid, to train on a CPU")
    add("--normalize", help="sam (mean and std) or minmax (MedSAM's weights); default: the backbone's own")
    add("--fraction", type=float, default=1.0, help="of the training slices")
    add("--limit", type=int, help="only the first N training slices")
    add("--val-slices", type=int, default=64, help="slices to validate on, spread evenly")
    add("--val-every", type=int, help="steps (default: an epoch)")
    add("--seed", type=int, default=0)
    add("--out", default="out")
    add("--save-minutes", type=float, default=10.0, help="between two states to resume from")
    add("--resume", action="store_true", help="go on where OUT/training.safetensors ends, or start if there is none")
    add("--workers", type=int, default=1, help="processes that load images")
    add("--attributes", nargs="*", default=ATTRIBUTES, help="table 3: texts that the cognitive stage sees")
    add("--priors", nargs="*", default=ATTRIBUTES, help="table 4: perceptual heads that act")
    add("--branches", nargs="+", default=BRANCHES, help="table 6: fused, sem, sam")
    add("--sentence", action="store_true", help="a baseline: the three texts as one sentence's embedding, no heads")
    for switch in ("cognitive", "perceptual", "caa"):
        add(f"--no-{switch}", dest=switch, action="store_false", help="table 5")
    add("--position-grid", type=int, default=14)
    add("--offset-grid", type=int, default=1)
    add_runtime_flags(parser)
    args = parser.parse_args()
    check_runtime_flags(args)
    if args.prompt not in (*PROMPTS, "mixed"):
        raise InputError(f"--prompt {args.prompt}: choose from {', '.join(PROMPTS)}, mixed")
    for flag in ("points", "epochs", "max_steps", "batch_size", "accumulate", "targets", "warmup", "rounds",
                 "val_slices", "val_every"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give at least 1")
    for flag, low, high in (("absent", 0, 1), ("jitter", 0, 0.5), ("views", 0, 1000), ("lr", 1e-12, 10),
                            ("decoder_lr", 0, 1), ("weight_decay", 0, 10), ("workers", 0, 1000),
                            ("save_minutes", 0, 1e6)):
        if not low <= getattr(args, flag) <= high:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give {low} to {high}")
    if min(args.loss_weights) < 0 or not sum(args.loss_weights):
        raise InputError("--loss-weights: give three numbers of at least 0, not all of them 0")
    return args


def main():
    args = parse()
    rank, world, device = start_processes()
    with Signals() as signals:
        try:
            train(args, rank, world, device, signals)
        except Stopped as e:
            if rank == 0:
                print(f"train.py: {signals.name()}: {e or 'stopped before the first step'}", file=sys.stderr)
            sys.exit(128 + (signals.seen or signal.SIGTERM))
    if world > 1:
        dist.destroy_process_group()


def train(args, rank, world, device, signals):
    say = print if rank == 0 else lambda *a, **k: None
    out = Path(args.out)
    config = Config(**{k: getattr(args, k) for k in (
        "backbone", "sam_checkpoint", "clip", "image_size", "normalize", "feature_grid", "attributes", "priors",
        "cognitive", "perceptual", "caa", "sentence", "branches", "position_grid", "offset_grid", "tune_encoder",
        "lora_rank")})
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
    check_disk(out, model)
    say(model.describe())
    say(f"{args.dataset}: {len(train_set)} training images, {len(val_rows)} of {len(val_set)} validation images; "
        f"{world} process(es) on {device}")

    # each image is encoded once, by one of the processes
    frozen = args.tune_encoder == "none"
    cache = FeatureCache(args.cache if frozen else None, f"{model.features_key()}-{args.precision}", args.cache_gb)

    def encode(images):
        with autocast(device, args.precision):
            return model.encode_image(images)

    def view(n):
        return train_set.view(*divmod(n, args.views + 1), texts)

    def stamp(n):
        signals.check()
        return train_set.stamp(*divmod(n, args.views + 1))

    fill(cache, len(train_set) * (args.views + 1), view, encode, rank, world, stamp=stamp)
    fill(cache, len(val_rows), lambda n: val_set[val_rows[n]], encode, rank, world, "encoding validation images",
         stamp=lambda n: val_set.stamp(val_rows[n]))
    if world > 1:
        dist.barrier()

    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, args.decoder_lr), lr=args.lr,
                                  betas=(0.9, 0.999))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "float16")
    # window: sums since the last row of the log, of loss, focal, dice, iou and steps; validated: not only trained
    progress = dict(step=0, best=-1.0, seconds=0.0, skipped=0, window=[0.0] * 5, validated=True)
    about = dict(arguments=vars(args), data=fingerprint(train_set))
    if args.resume and (out / "training.safetensors").is_file():
        saved = load_training(out / "training.safetensors", model, optimizer)
        progress = {k: saved[k] for k in progress}
        scaler.load_state_dict(saved["scaler"])
        say(f"{out}: resumed at step {progress['step']}" + changes(saved, about))
    elif args.resume:
        say(f"{out}: nothing to resume yet, starting anew")
    elif rank == 0 and (out / "training.safetensors").is_file():  # or a later --resume would go on with another run
        (out / "training.safetensors").replace(out / "training.old.safetensors")
        say(f"{out}: held a run already; starting anew, what --resume would have gone on with is kept in "
            "training.old.safetensors")
    batches = Batches(train_set, texts, cache, args, rank, world, progress["step"])
    steps = min(args.epochs * batches.per_epoch, args.max_steps or 10 ** 12)
    batches.last = max(progress["step"], steps)
    if progress["step"] >= steps and progress["validated"]:
        return say(f"{out}: already trained for {progress['step']} steps; raise --epochs or --max-steps to go on")
    objective = Objective(model, args.loss_weights)
    if args.compile:
        model.steer, model.ask = torch.compile(model.steer), torch.compile(model.ask)
    ddp = DistributedDataParallel(objective, broadcast_buffers=False) if world > 1 else objective
    log = Log(out, progress["step"], progress["validated"]) if rank == 0 else None
    if rank == 0:
        save_run(out, model, device, world, about["arguments"], about["data"], progress["step"])
    started, shown, saved_at, images = time.time() - progress["seconds"], time.time(), time.time(), 0

    def save(**new):
        progress.update(new, seconds=time.time() - started)
        if rank == 0:
            save_training(out / "training.safetensors", model, optimizer, scaler=scaler.state_dict(), **about,
                          **progress)

    def check():
        """Validates, keeps the best; what was trained so far is saved already."""
        predictor = Predictor(model, texts, val_prompt, args.points, 0, cache, args.precision)
        dice = validate(predictor, val_set, val_rows, rank, world, signals)
        best = dice >= progress["best"]
        if rank == 0:
            step = progress["step"]
            log.add(step=step, epoch=(step - 1) // batches.per_epoch, prompt=val_prompt, val_dice=dice)
            record = dict(dataset=args.dataset, step=step, val_dice=dice, arguments=vars(args))
            if best:
                save_checkpoint(model, out / "best.safetensors", **record)
            save_checkpoint(model, out / "last.safetensors", **record)
            log.draw()
        save(best=max(dice, progress["best"]), validated=True)

    model.train()
    try:
        if not progress["validated"]:
            check()
        loader = iter(DataLoader(batches, batch_size=None, num_workers=args.workers,
                                 pin_memory=device.type == "cuda", worker_init_fn=ignore_interrupts))
        bar = tqdm(range(progress["step"], steps), "training", total=steps, initial=progress["step"],
                   disable=rank > 0, unit="step", mininterval=1)
        in_a_row = 0
        for step in bar:
            batch = fetch(loader, signals)
            count, stop = total(sum(len(b.masks) for b in batch), signals.seen is not None)
            if stop:
                if step:
                    save()
                raise Stopped()
            lr = learning_rate(step, steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * lr
            clicks = [batches.clicks_of(step, n) for n in range(1, args.rounds)]
            sums = 0
            for n, part in enumerate(batch, 1):
                wait = nullcontext() if world == 1 or n == len(batch) else ddp.no_sync()
                with wait, autocast(device, args.precision):
                    features = features_of(part, cache, encode, frozen, model)
                    loss, parts = ddp(part.to(device), features, count, clicks)
                    # DistributedDataParallel takes the mean over the processes, but `count` is of all of them
                    scaler.scale(loss * world).backward()
                sums = sums + torch.cat([loss.detach()[None], parts])
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(list(objective.trained), 1.0)
            norm, *sums = torch.cat([norm[None], sums]).tolist()
            finite = np.isfinite(norm)  # of the mean over the processes, so they agree
            if finite:
                scaler.step(optimizer)
                progress["window"] = [a + b for a, b in zip(progress["window"], [*sums, 1.0])]
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            in_a_row = 0 if finite else in_a_row + 1
            progress["skipped"] += not finite
            if in_a_row == PATIENCE:
                raise InputError(f"{out}: no finite gradient in the last {PATIENCE} steps, up to step {step + 1}; "
                                 "lower --lr, or give --precision float32")

            done, images = step + 1, images + len(batches.rows(step))
            progress["step"] = done
            last = done == steps or done % (args.val_every or batches.per_epoch) == 0
            if done % 10 == 0 or last:
                *sums, n = total(*progress["window"])
                loss, focal, dice, iou = (s * world / max(1.0, n) for s in sums)
                if rank == 0:
                    log.add(step=done, epoch=step // batches.per_epoch, prompt=batches.prompt_of(step), loss=loss,
                            focal=focal, dice=dice, iou=iou, lr=lr, images_per_s=images / (time.time() - shown),
                            memory_mb=memory_mb(device), skipped=progress["skipped"], seconds=time.time() - started)
                    bar.set_postfix(epoch=step // batches.per_epoch, loss=f"{loss:.3f}", best=f"{progress['best']:.3f}")
                progress["window"], shown, images = [0.0] * 5, time.time(), 0
            if last:
                save(validated=False)
                check()
                saved_at = shown = time.time()
            elif time.time() - saved_at > 60 * args.save_minutes:
                save()
                saved_at = time.time()
    except Stopped:
        saved = (out / "training.safetensors").is_file()
        raise Stopped(f"saved at step {progress['step']}; go on with --resume" if saved else "") from None
    say(f"{out}: {steps} steps in {progress['seconds'] / 60:.1f} min, best validation Dice {progress['best']:.4f} "
        f"(prompt {val_prompt}, pixels pooled)" + (f", {progress['skipped']} steps without a finite gradient skipped"
                                                   if progress["skipped"] else "")
        + f"; next: python eval.py --checkpoint {out}")


def fetch(loader, signals):
    """The next step's Batches; none if a signal to all processes ended the workers."""
    try:
        batch = next(loader)
    except RuntimeError:
        if signals.seen is None:
            raise
        return []
    if isinstance(batch, InputError):
        raise batch
    return batch


def ignore_interrupts(worker):
    """Ctrl-C goes to all processes of a terminal: the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def features_of(batch, cache, encode, frozen, model):
    """The features of a Batch on the model's device, moved as its masks were."""
    grid = model.config.feature_grid
    if batch.features is not None:
        features = batch.features.to(model.device, non_blocking=True).float()
    elif not len(batch.images):
        features = torch.zeros(0, 256, grid, grid, device=model.device)
    else:
        features = cache(batch.images, encode).to(model.device) if frozen else encode(batch.images)
    return features if batch.theta is None else move(features, batch.theta.to(model.device))


if __name__ == "__main__":
    run(main)

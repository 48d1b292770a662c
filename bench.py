"""Speed and memory of MedSeg-R's own parts against their peers, as ratios that anyone can repeat.

    python bench.py ops                 every shape, about ten minutes; --quick for a first look
    python bench.py ops --device cuda --dtype bfloat16 --json ops.json
    python bench.py data demo synapse=DIR --peer DIR
    python bench.py --help              what else there is: model, train, eval, speed, index

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


def count(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers of at least 1")
    return int(text)


def data_set(text):
    """name or name=DIR -> (name, DIR or None)"""
    name, _, folder = text.partition("=")
    return name, folder or None


def clone(folder):
    if not (Path(folder) / "DataLoader.py").is_file():
        raise argparse.ArgumentTypeError(f"{folder}: no DataLoader.py; clone github.com/OpenGVLab/SAM-Med2D there")
    return folder


PEER = {"--peer": dict(type=clone, help="a clone of github.com/OpenGVLab/SAM-Med2D, with opencv-python-headless, "
                                        "albumentations and scikit-image installed")}
COMMANDS = {  # command -> its function in benches/, what it measures, its flags: numbers unless they have another type
    "ops": ("operators.bench_ops", "both operators against plain PyTorch, torchvision, and a copy of their output", {
        "--grids": dict(nargs="+", help="H = W (default: 14 16 32 64, with --quick 14 32)"),
        "--targets": dict(nargs="+", help="M (default: 1 8 96, with --quick 1 8)"), "--channels": dict(default=256)}),
    "model": ("training.bench_model", "a training step and a decode, with the compiled operators and the reference", {
        "--feature-grid": dict(default=32, help="H = W")}),
    "train": ("training.bench_train", "a training step against the naive way, and SAM-Med2D's", {
        "--backbones": dict(type=str, nargs="+", default=["lite_medsam", "vit_b"]), "--batch-size": dict(default=4),
        "--targets": dict(default=4, help="per image"), **PEER}),
    "data": ("loading.bench_data", "loading images, one process and several workers", {
        "sets": dict(type=data_set, nargs="*", default=[("demo", None)], help="data sets, as demo or kvasir=DIR"),
        "--image-size": dict(default=256), "--images": dict(default=256, help="of each data set"), **PEER}),
    "eval": ("scoring.bench_eval", "Dice and HD95 of whole volumes, against medpy", {
        "sets": dict(type=data_set, nargs="+", help="data sets of volumes, as synapse=DIR"),
        "--split": dict(type=str, default="test"), "--volumes": dict(default=3, help="of each data set")}),
    "speed": ("speed.bench_speed", "table 7: tuned parameters and images a second, beside plain SAM", {
        "--batches": dict(nargs="+", default=[1, 2, 4, 8, 16, 32], help="batch sizes to try, up to the best")}),
    "index": ("index.bench_index", "the index of SA-Med2D-20M against Python's lists, on a generated JSON file", {
        "--images": dict(default=100_000, help="SA-Med2D-20M has 4,600,000"),
        "--folder": dict(type=str, help="for a folder of its own that is removed again (default: /tmp)"),
        "--naive-up-to": dict(default=1_000_000, help="images; lists of more are not tried: 4,600,000 take 10 GB")})}
ON_DEVICE = ("ops", "model", "train", "speed")


def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what, flags) in COMMANDS.items():
        add = commands.add_parser(name, help=what, description=what).add_argument
        for flag, options in flags.items():
            add(flag, **{"type": count, **options})
        add("--json", help="write every number to this file")
        if name in ON_DEVICE:
            add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
            add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        if name != "index":
            add("--repeats", type=count, default=50, help="at most; fewer where they take long")
            add("--quick", action="store_true", help="a first look")
    args = parser.parse_args()
    gpu = machine()["gpu"]
    args.device = getattr(args, "device", "cpu") or ("cuda" if gpu else "cpu")
    if args.device == "cuda" and not gpu:
        raise InputError("--device cuda: PyTorch finds no GPU; leave --device out")
    if args.json:
        make_folder(Path(args.json).parent)
    return args


def machine():
    """What times depend on most: the processor, its cores, whether it has AMX (for bfloat16), and the GPU."""
    import torch
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"^model name\s*: (.*)", info, re.MULTILINE)
    return dict(processor=name[1] if name else platform.processor() or platform.machine(), cores=os.cpu_count(),
                amx="amx_bf16" in info, gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def environment(args):
    """What the numbers depend on; printed as the first lines."""
    record = dict(command=args.command, **machine(), date=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    print(f"{record['processor']}, {record['cores']} cores, {'AMX' if record['amx'] else 'no AMX'}, "
          f"{record['gpu'] or 'no GPU'}; {record['date']}")
    if args.command in ON_DEVICE:
        import torch
        import ops
        record |= dict(device=args.device, dtype=args.dtype, threads=torch.get_num_threads(), torch=torch.__version__,
                       torchvision=version("torchvision"),
                       ours="compiled" if ops.compiled(args.device) else "ops/reference.py")
        print("{device}, {dtype}, {threads} threads, torch {torch}; ours: {ours}".format(**record))
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

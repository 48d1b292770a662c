"""bench.py index: the index of SA-Med2D-20M against Python's lists."""
import json
import pickle
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from benches.timing import in_a_process, memory
from common import InputError, make_folder
from readers.sa_med2d import CLASS_IDS, ORIGINAL, SAMed2D


WORKERS, TOUCHES = 4, 20_000


def bench_index(args):
    """the index of SA-Med2D-20M against Python's lists, on a generated JSON file"""
    if not Path("/proc/self/smaps_rollup").is_file():
        raise InputError("bench.py index: memory is read from /proc/self/smaps_rollup, which is not here; use Linux")
    if args.folder:
        make_folder(args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        masks = write_data_set(root, args.images)
        size = (root / ORIGINAL).stat().st_size / 1e6
        print(f"{args.images} images, {masks} masks, {size:.1f} MB of JSON", flush=True)
        build = in_a_process(build_index, root)
        build["mb_per_s"] = size / build["seconds"]
        build["mb"] = sum(f.stat().st_size for f in (root / "index").iterdir()) / 1e6
        print("index: built in {seconds:.1f} s, {mb_per_s:.1f} MB/s, peak {peak_mb:.0f} MB, of which "
              "{before_mb:.0f} MB before; {mb:.1f} MB on disk".format(**build))
        record = dict(images=args.images, masks=masks, json_mb=size, build=build, ours=in_a_process(use_index, root))
        print("index: opened in {open_s:.3f} s; {key_us:.1f} us per key, {masks_us:.1f} us per list of masks; "
              "{pickle_bytes} bytes to send to a worker".format(**record["ours"]))
        show_workers("index", record["ours"]["workers"])
        if args.images <= args.naive_up_to:
            record["naive"] = in_a_process(use_lists, root)
            print("lists: read in {seconds:.1f} s, peak {peak_mb:.0f} MB, of which {before_mb:.0f} MB before".format(
                **record["naive"]))
            show_workers("lists", record["naive"]["workers"])
    return record


def write_data_set(root, n):
    """SAMed2D_v1.json with n images, and its class ids, without any image -> number of masks.

    60 sources, every fourth of pictures that are a case each, the others of volumes with 40 slices along each axis; an
    image has 4.28 masks on average, as in SA-Med2D-20M.
    """
    (root / CLASS_IDS).write_text(json.dumps({f"class {i}": f"{i:04d}" for i in range(1, 220)}))
    counts = 1 + np.random.default_rng(0).poisson(3.28, n)
    starts = [-(-n * source // 60) for source in range(61)]
    with open(root / ORIGINAL, "w") as f:
        for source in range(60):
            for row in range(starts[source], starts[source + 1]):
                j = row - starts[source]
                if source % 4 == 3:
                    stem = f"dermoscopy_00--Pictures_{source:02d}--ISIC_{j:07d}--2d_none"
                else:
                    stem = f"ct_00--Challenge_{source:02d}--case_{j // 120:05d}--{'xyz'[j // 40 % 3]}_{j % 40:04d}"
                masks = [f'"masks/{stem}--{(7 * source + m) % 219 + 1:04d}_000.png"' for m in range(counts[row])]
                f.write(("," if row else "{") + f'\n"images/{stem}.png": [\n' + ",\n".join(masks) + "\n]")
        f.write("\n}\n")
    return int(counts.sum())


def build_index(root):
    before, started = memory()["rss"], time.perf_counter()
    SAMed2D(root, "train")
    return dict(seconds=time.perf_counter() - started, before_mb=before, peak_mb=memory()["peak"])


def use_index(root):
    started = time.perf_counter()
    source = SAMed2D(root, "train")
    spent = dict(open_s=time.perf_counter() - started)
    rows = np.random.default_rng(1).integers(0, len(source), 10 * TOUCHES).tolist()
    for name, look_up in dict(key_us=source.key, masks_us=source.masks).items():
        started = time.perf_counter()
        for row in rows:
            look_up(row)
        spent[name] = (time.perf_counter() - started) / len(rows) * 1e6
    touched = Touched(len(source), source.key, source.masks)
    return dict(**spent, pickle_bytes=len(pickle.dumps(source)),
                workers={kind: in_workers(touched, kind) for kind in ("fork", "spawn")})


def use_lists(root):
    """As SAM-Med2D's own loader reads it."""
    before, started = memory()["rss"], time.perf_counter()
    with open(root / ORIGINAL) as f:
        read = json.load(f)
    images, masks = list(read.keys()), list(read.values())
    return dict(seconds=time.perf_counter() - started, before_mb=before, peak_mb=memory()["peak"], workers=dict(
        fork=in_workers(Touched(len(images), images.__getitem__, lambda i: list(masks[i])), "fork")))


class Touched(torch.utils.data.Dataset):
    """Item w: by how much this process grows when it looks up TOUCHES random entries among n, in MB."""

    def __init__(self, n, *look_ups):
        self.n, self.look_ups = n, look_ups

    def __len__(self):
        return WORKERS

    def __getitem__(self, worker):
        before = memory()
        for row in np.random.default_rng(worker).integers(0, self.n, TOUCHES).tolist():
            for look_up in self.look_ups:
                look_up(row)
        after = memory()
        return {kind: after[kind] - before[kind] for kind in ("rss", "private", "dirty")}


def in_workers(touched, kind):
    """[growth of each of WORKERS DataLoader workers]; kind: fork or spawn."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than this machine has cores
    return list(torch.utils.data.DataLoader(touched, batch_size=None, num_workers=WORKERS,
                                            multiprocessing_context=kind))


def show_workers(name, workers):
    for kind, rows in workers.items():
        most = {key: max(row[key] for row in rows) for key in rows[0]}
        print("{}: {} workers by {} that look up {} entries each grow by at most {rss:.1f} MB, {private:.1f} MB of it "
              "shared with no other process, {dirty:.1f} MB not with the file either".format(
                  name, WORKERS, kind, TOUCHES, **most))

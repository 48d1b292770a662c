"""bench.py index: the index of SA-Med2D-20M against Python's lists."""
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from benches.timing import in_a_process, memory
from common import InputError, make_folder
from readers.sa_med2d import CLASS_IDS, INDEX, ORIGINAL, SAMed2D

WORKERS, TOUCHES = 4, 20_000


def bench_index(args):
    """the index of SA-Med2D-20M against Python's lists, on a generated JSON file"""
    if not Path("/proc/self/smaps_rollup").is_file():
        raise InputError("bench.py index: memory is read from /proc/self/smaps_rollup, which is not here; use Linux")
    if args.folder:
        make_folder(args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        record = dict(images=args.images, masks=write_data_set(root, args.images),
                      json_mb=(root / ORIGINAL).stat().st_size / 1e6)
        print("{images} images, {masks} masks, {json_mb:.1f} MB of JSON".format(**record), flush=True)
        record["index"] = in_a_process(use, root, open_index, ("fork", "spawn"))
        record["index_mb"] = (root / INDEX).stat().st_size / 1e6
        show("index", record["index"])
        print(f"index: {record['index_mb']:.1f} MB on disk")
        if args.images <= args.naive_up_to:
            record["lists"] = in_a_process(use, root, open_lists, ("fork",))
            show("lists", record["lists"])
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


def open_index(root):
    """-> number of images; what looks up a name; what looks up the masks."""
    source = SAMed2D(root, "train")
    return len(source), source.key, source.masks


def open_lists(root):
    """The same, as SAM-Med2D's own loader reads it."""
    with open(root / ORIGINAL) as f:
        read = json.load(f)
    images, masks = list(read.keys()), list(read.values())
    return len(images), images.__getitem__, lambda i: list(masks[i])


def use(root, open_, kinds):
    """Opens twice, the first time to build the index; kinds: how DataLoader workers are started."""
    before, started = memory()["rss"], time.perf_counter()
    open_(root)
    spent = dict(first_s=time.perf_counter() - started, before_mb=before, peak_mb=memory()["peak"])
    started = time.perf_counter()
    n, *look_ups = open_(root)
    spent["again_s"] = time.perf_counter() - started
    rows = np.random.default_rng(1).integers(0, n, 10 * TOUCHES).tolist()
    for name, look_up in zip(("name_us", "masks_us"), look_ups):
        started = time.perf_counter()
        for row in rows:
            look_up(row)
        spent[name] = (time.perf_counter() - started) / len(rows) * 1e6
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than this machine has cores
    touched = Touched(n, *look_ups)
    return dict(**spent, workers={kind: list(torch.utils.data.DataLoader(
        touched, batch_size=None, num_workers=WORKERS, multiprocessing_context=kind)) for kind in kinds})


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


def show(name, spent):
    print("{}: opened in {first_s:.1f} s, peak {peak_mb:.0f} MB, of which {before_mb:.0f} MB before; again in "
          "{again_s:.3f} s; {name_us:.1f} us per name, {masks_us:.1f} us per list of masks".format(name, **spent))
    for kind, rows in spent["workers"].items():
        most = {key: max(row[key] for row in rows) for key in rows[0]}
        print("{}: {} workers by {} that look up {} entries each grow by at most {rss:.1f} MB, {private:.1f} MB of it "
              "shared with no other process, {dirty:.1f} MB not with the file either".format(
                  name, WORKERS, kind, TOUCHES, **most))

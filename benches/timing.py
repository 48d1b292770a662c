"""Times of what takes turns, and the memory of what has a process of its own."""
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch


def timed(f, n=1):
    """Seconds per call of n calls, on a GPU until all of them are done."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(n):
        f()
    wait()
    return (time.perf_counter() - started) / n


def measure(calls, args, rivals=(), slow=3):
    """{name: function} -> {name: dict(ms, min_ms, max_ms, samples[, peak_mb])}, {name: why there is none}.

    A first round warms up and sorts out: what takes over `slow` seconds keeps its one time, and of the rivals only
    those near the fastest go on. The rest takes turns of a millisecond or more (on a GPU ten), 3 times or more, for
    most of a second. torch.utils.benchmark's turns of 15 ms and more measure, on a busy machine, the other programs.
    """
    times, failed, peak, cuda = {}, {}, {}, args.device == "cuda"
    for name, f in calls.items():
        try:
            if cuda:
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            times[name] = [timed(f)]
            if cuda:
                peak[name] = dict(peak_mb=(torch.cuda.max_memory_allocated() - held) / 2 ** 20)
            if times[name][0] < 1:
                times[name] = [timed(f, max(1, int(5e-3 / times[name][0])))]
        except RuntimeError as e:  # no kernel for this dtype, or out of memory
            if name == "ours":
                raise
            failed[name] = " ".join(str(e).split())[:100]
    near = 1.5 * min((times[n][0] for n in rivals if n in times), default=0)
    turns = {n: [] for n, (t,) in times.items() if t <= (min(slow, near) if n in rivals else slow)}
    lap = sum(max(times[n][0], 1e-3) for n in turns)
    for _ in range(min(args.repeats, max(3, int((0.2 if args.quick else 0.7) / max(lap, 1e-3))))):
        for name, found in turns.items():
            found.append(timed(calls[name], max(1, int((1e-2 if cuda else 1e-3) / times[name][0]))))
    return {name: dict(ms=1000 * statistics.median(t), min_ms=1000 * min(t), max_ms=1000 * max(t), samples=len(t),
                       **peak.get(name, {})) for name, t in (times | turns).items()}, failed


def in_a_process(f, *args, **options):
    """f(...) in a fresh process, so that its memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(f, *args, **options).result()


def memory():
    """MB of this process: now and at most; of the pages in memory, those no other process has, and those of them that
    cannot be dropped and read again from a file."""
    kb = {k: int(v) for path in ("status", "smaps_rollup")
          for k, v in re.findall(r"^(\w+):\s*(\d+) kB", Path(f"/proc/self/{path}").read_text(), re.MULTILINE)}
    return dict(rss=kb["Rss"] / 1e3, private=(kb["Private_Clean"] + kb["Private_Dirty"]) / 1e3,
                dirty=kb["Private_Dirty"] / 1e3,
                peak=kb["VmHWM"] / 1e3)  # getrusage's ru_maxrss would begin at that of the parent process

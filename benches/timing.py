"""Times of what takes turns, and the memory of what has a process of its own."""
import re
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.benchmark import Timer, timer


def once(f):
    """Seconds of one call, on a GPU until all of it is done."""
    started = timer()
    f()
    return timer() - started


def measure(calls, args, rivals=(), slow=3):
    """{name: function} -> {name: dict(ms, min_ms, max_ms, samples[, peak_mb])}, {name: why there is none}.

    A first round warms up and sorts out: what takes over `slow` seconds keeps its one time, and of the rivals only
    those near the fastest go on. The rest takes args.repeats turns, each PyTorch's own blocked_autorange.
    """
    times, failed, peak, cuda = {}, {}, {}, args.device == "cuda"
    timers = {name: Timer("f()", globals=dict(f=f), num_threads=torch.get_num_threads()) for name, f in calls.items()}
    for name, f in calls.items():
        try:
            if cuda:
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            times[name] = [once(f)]
            if cuda:
                peak[name] = dict(peak_mb=(torch.cuda.max_memory_allocated() - held) / 2 ** 20)
            if times[name][0] < 1:
                times[name] = timers[name].blocked_autorange(min_run_time=0.005).times
        except RuntimeError as e:  # no kernel for this dtype, or out of memory
            if name == "ours":
                raise
            failed[name] = " ".join(str(e).split())[:100]
    fastest = min((min(times[n]) for n in rivals if n in times), default=0)
    turns = {n: [] for n, t in times.items() if min(t) <= (min(slow, 1.5 * fastest) if n in rivals else slow)}
    for _ in range(args.repeats):
        for name, found in turns.items():
            found += timers[name].blocked_autorange(min_run_time=0.05).times
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

"""Times of what takes turns, tables of them, and what has a process of its own."""
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pandas as pd
import torch

from common import keep_freed_memory


def timed(f, n=1):
    """Seconds per call of n calls, on a GPU until all of them are done."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(n):
        f()
    wait()
    return (time.perf_counter() - started) / n


def measure(calls, args, slow=1.0):
    """{name: function} -> {name: median ms}, and on a GPU {name: MB at most}; peers that fail have neither.

    A first call warms up; what takes over `slow` seconds keeps that one time. The rest takes turns of a millisecond or
    more (on a GPU ten), 3 times or more, for most of a second. torch.utils.benchmark's turns of 15 ms and more measure,
    on a busy machine, the other programs.
    """
    times, peak, cuda = {}, {}, args.device == "cuda"
    for name, f in calls.items():
        try:
            if cuda:
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            times[name] = [timed(f)]
            if cuda:
                peak[name] = (torch.cuda.max_memory_allocated() - held) / 2 ** 20
        except RuntimeError as e:  # no kernel for this dtype, or out of memory
            if name == "ours":
                raise
            print(f"{name}: {' '.join(str(e).split())[:100]}")
    turns = {n: max(1, int((1e-2 if cuda else 1e-3) / timed(calls[n]))) for n, (t,) in times.items() if t <= slow}
    times |= {name: [] for name in turns}
    until = time.perf_counter() + 0.7
    for lap in range(args.repeats):
        if lap < 3 or time.perf_counter() < until:
            for name, n in turns.items():
                times[name].append(timed(calls[name], n))
    return {name: 1000 * statistics.median(t) for name, t in times.items()}, peak


def show(title, rows):
    """Prints rows, a dict each, under a title -> {title: rows}, for the JSON file."""
    table = pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format, na_rep="-")
    print(f"\n{title}\n{table}", flush=True)
    return {title: rows}


def in_a_process(f, *args, **options):
    """f(...) in a fresh process, so that its memory is its own; it keeps freed memory as every command does."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=keep_freed_memory) as pool:
        return pool.submit(f, *args, **options).result()

"""python tests/killed.py N FLAGS: runs train.py FLAGS, killing it N times with SIGKILL, and resumes it each time.

A quarter of the kills come at a random time, the others when one of the files is seen half-written. A run that ends by
itself before the last kill is begun anew; one that got no further since the last kill, as on a busy machine, gets more
time before the next.
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402  every run is a fork of this process, which has loaded all packages


def start():
    """A training process, which --resumes what is there; returned to when it writes run.json, and so begins."""
    before = stamp()
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")
        sys.argv = ["train.py", *flags, "--resume"]
        try:
            train.main()
            os._exit(0)
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
            os._exit(1)
    while stamp() == before and not ended(child):
        time.sleep(0.002)
    return child


def stamp():
    return (out / "run.json").stat().st_mtime_ns if (out / "run.json").is_file() else None


def ended(child):
    """Has it ended by itself?"""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid and status:
        sys.exit(f"a training process failed, status {status}")
    return bool(pid)


kills, flags = int(sys.argv[1]), sys.argv[2:]
out, rng, killed, span, last = Path(flags[flags.index("--out") + 1]), random.Random(0), 0, 3.0, None
while killed < kills:
    child, seen = start(), "a random moment"
    began, pause, wanted = time.time(), rng.uniform(0, span), ("", "training", "last", "best")[killed % 4]
    while not (done := ended(child)):
        if time.time() - began > pause:
            if not wanted or time.time() - began > 3 * span:
                break
            if list(out.glob(f"{wanted}*.part")):
                seen = f"{wanted}.safetensors half-written"
                break
        time.sleep(0.0002)
    if done:
        for file in out.iterdir():
            file.unlink()
        continue
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed += 1
    rows = (out / "log.csv").read_text().splitlines() if (out / "log.csv").is_file() else []
    span, last = 3.0 if rows != last else min(2 * span, 60), rows
    print(f"killed at {seen}, log at: {rows[-1][:30] if rows else 'nothing'}", flush=True)
child = start()
while not ended(child):
    time.sleep(0.05)

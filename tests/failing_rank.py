"""train.py of which the second process fails in the third step, as at a damaged file."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import train  # noqa: E402
from common import InputError, run  # noqa: E402

draw = data.Batches.draw


def damaged(self, step, *rest):
    if step == 2 and os.environ["RANK"] == "1":
        raise InputError("slice 3: damaged; copy the file again")
    return draw(self, step, *rest)


data.Batches.draw = damaged
run(train.main)

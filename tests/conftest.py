"""Shared by the tests: the repository on the path, and frozen text encoders that are built once per session."""
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import medsegr  # noqa: E402

medsegr.TextEncoder = functools.lru_cache(maxsize=None)(medsegr.TextEncoder)

REAL_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data():
    if not REAL_DATA.is_dir():
        pytest.skip("the real images are not part of the repository, and ../shared/data is not here")
    return REAL_DATA

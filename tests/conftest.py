"""Shared by the tests: the repository on the path, and frozen text encoders that are built once per session."""
import functools
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import encoders  # noqa: E402
import medsegr  # noqa: E402
import runs  # noqa: E402
from common import LIGHT, InputError  # noqa: E402

encoders.TextEncoder = medsegr.TextEncoder = functools.lru_cache(maxsize=None)(encoders.TextEncoder)

REAL_DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    """The file that takes longest first: of two processes the other one does the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_train.py")


@pytest.fixture(scope="session")
def real_data():
    if not REAL_DATA.is_dir():
        pytest.skip("the real images are not part of the repository, and ../shared/data is not here")
    return REAL_DATA


def fails(call, *parts):
    """call() raises an InputError of one line that names every one of `parts`."""
    with pytest.raises(InputError) as e:
        call()
    for part in map(str, parts):
        assert part in str(e.value), f"{part!r} not in {e.value}"
    assert "\n" not in str(e.value)


@pytest.fixture
def linked(tmp_path, real_data):
    """linked(name) -> a folder with links to the images of real data and a copy of its JSON files, to be indexed."""
    def link(name):
        root = tmp_path / name
        root.mkdir()
        for path in (real_data / name).iterdir():
            if path.name in ("images", "masks"):
                (root / path.name).symlink_to(path.resolve(), target_is_directory=True)
            elif path.suffix == ".json":
                (root / path.name).write_bytes(path.read_bytes())
        return root
    return link


@pytest.fixture(scope="module")
def small():
    """An untrained model that is quick."""
    return medsegr.MedSegR(medsegr.Config(**LIGHT, image_size=64, feature_grid=8)).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model whose heads do something, saved; -> (model, its folder)."""
    torch.manual_seed(0)
    model = medsegr.MedSegR(medsegr.Config(**LIGHT, image_size=64, feature_grid=8)).eval()
    for head in model.perceptual.children():
        torch.nn.init.normal_(head.linear.weight, std=0.3)
    torch.nn.init.normal_(model.refine.out.weight, std=0.02)
    folder = tmp_path_factory.mktemp("model")
    runs.save_checkpoint(model, folder / "last.safetensors", dataset="demo")
    return runs.load_checkpoint(folder)[0], folder

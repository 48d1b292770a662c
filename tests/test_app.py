"""The page, in a real headless browser: the first mask, clicks, a box, other texts, and bad uploads."""
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from common import LIGHT
from conftest import ROOT
from medsegr import Config, MedSegR
from runs import save_checkpoint
from test_report import free_port

gr = pytest.importorskip("gradio")
import app  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]


def test_clicks():
    clicks = app.NOTHING
    for kind, x in zip((*app.CLICKS, app.CLICKS[0]), range(3)):
        clicks = app.click(clicks, kind, x, x + 1)
    assert clicks == dict(points=[[0, 1], [1, 2], [2, 3]], labels=[1, 0, 1], box=None)
    clicks = app.drag(app.drag(clicks, "0 0 9.5 9"), "30 4 2.5 11 1764000000000.0")
    assert clicks["box"] == [2.5, 4, 30, 11] and len(clicks["points"]) == 3
    assert app.NOTHING == dict(points=[], labels=[], box=None)
    image = np.zeros((37, 91, 3), np.uint8)
    mask = np.zeros((37, 91), bool)
    mask[3:20, 5:40] = True
    drawn = app.marked(image, clicks, mask)
    assert drawn.shape == image.shape and drawn.any()


def test_what_is_missing_is_said():
    model = MedSegR(Config(**LIGHT, image_size=64, feature_grid=8)).eval()
    image, texts = np.zeros((40, 50, 3), np.uint8), ("left", "bright", "round")
    for wrong in ((None, app.NOTHING, "x", texts), (image, app.NOTHING, "x", ("left", " ", "round"))):
        with pytest.raises(gr.Error):
            app.find(model, *wrong, False)
    shown, said, picture = app.find(model, image, app.NOTHING | dict(box=[5, 8, 30, 20]), "", texts, False)
    assert shown.shape == (40, 50, 3) and picture is None and "structure" in said


def test_an_upload_is_read_as_by_the_command(tmp_path):
    """16 bits, lying on its side: as readers/pictures.py reads it; what is no picture is called by its own name."""
    from gradio.data_classes import ImageData
    from readers.pictures import read_image
    exif = Image.Exif()
    exif[0x0112] = 6
    path, component = tmp_path / "0123abc.png", app.Picture()
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)).save(path, exif=exif)
    found = component.preprocess(ImageData(path=str(path), orig_name="scan.png"))
    assert found.shape == (40, 30, 3) and np.array_equal(found, read_image(path)) and found.max() == 255
    path.write_bytes(b"x")
    with pytest.raises(gr.Error, match="^'?scan.png: is no PNG"):
        component.preprocess(ImageData(path=str(path), orig_name="scan.png"))
    assert component.preprocess(None) is None and component.get_block_name() == "image"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a small model whose answers follow its boxes, open in a browser."""
    if not BROWSER:
        pytest.skip("no chromium here: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api")
    folder = tmp_path_factory.mktemp("app")
    save_checkpoint(MedSegR(Config(**LIGHT, feature_grid=16)), folder / "last.safetensors", dataset="synapse")
    port = free_port()
    log = open(folder / "log.txt", "w")
    (folder / "tmp").mkdir()
    server = subprocess.Popen([sys.executable, "-W", "ignore", "app.py", "--checkpoint", folder, "--port", str(port)],
                              cwd=ROOT, stdout=log, stderr=log, env=os.environ | dict(TMPDIR=str(folder / "tmp")))
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        page = browser.new_page(viewport=dict(width=1200, height=1500))
        page.hosts = set()
        page.on("request", lambda r: page.hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
        for _ in range(120):
            try:
                page.goto(f"http://127.0.0.1:{port}")
                break
            except sync.Error:
                assert server.poll() is None, (folder / "log.txt").read_text()
                time.sleep(1)
        page.wait_for_selector("#image img", timeout=60_000)
        page.port, page.kept = port, folder / "tmp"
        yield page
        browser.close()
    kept = list(page.kept.rglob("*.png"))
    server.terminate()
    server.wait(20)
    assert kept and not list(page.kept.glob("medsegr-*"))  # no image stays behind


def press_find(page, says):
    """Presses Find and waits until the line below says it."""
    page.click("#find")
    page.wait_for_function(f"document.querySelector('#said').innerText.includes({says!r})", timeout=90_000)
    return page.inner_text("#said")


def test_the_first_mask(page, tmp_path):
    """Open, press Find: nothing else is needed."""
    started = time.time()
    press_find(page, "liver")
    page.wait_for_selector("#mask img, #mask canvas", timeout=60_000)
    page.wait_for_selector("#explained img", timeout=60_000)
    assert time.time() - started < 90
    page.screenshot(path=tmp_path / "page.png")
    assert page.hosts == {f"127.0.0.1:{page.port}"}  # nothing is loaded from, or sent, elsewhere


def new_picture(page, act):
    """Waits until act() has changed the image."""
    before = page.get_attribute("#image img", "src")
    act()
    page.wait_for_function(f"document.querySelector('#image img').src != {before!r}", timeout=60_000)


def test_points_and_a_box(page):
    """A click is a point, a drag a box and no point; both lie where the hand was."""
    picture = page.locator("#image img")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    side = min(box["width"], box["height"])  # the square picture, in the middle of its element
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    at = lambda x, y: (left + x * side, top + y * side)

    def dragging():
        page.mouse.move(*at(0.6, 0.7))
        page.mouse.down()
        page.mouse.move(*at(0.4, 0.5), steps=3)
        assert page.locator("#band").count() == 1
        page.mouse.move(*at(0.2, 0.2), steps=3)
        page.mouse.up()
        assert page.locator("#band").count() == 0

    new_picture(page, dragging)
    dragged = np.array(page.input_value("#dragged textarea, #dragged input").split()[:4], float)
    assert np.abs(dragged - np.array([0.6, 0.7, 0.2, 0.2]) * 256).max() < 2
    new_picture(page, lambda: page.mouse.click(*at(0.3, 0.3)))
    assert "pixels" in press_find(page, "pixels")  # LiteMedSAM with a box finds something
    new_picture(page, lambda: page.click("#clear"))


def test_bad_uploads(page, tmp_path):
    away = "[aria-label='Clear'], [aria-label='Remove Image'], #image button[title='Clear']"
    page.click(away)
    page.click("#find")
    page.wait_for_selector("text=There is no image", timeout=60_000)
    (tmp_path / "bad.png").write_bytes(b"this is no picture")
    page.set_input_files("#image input[type=file]", tmp_path / "bad.png")
    page.wait_for_selector("text=bad.png: is no PNG", timeout=60_000)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90), dtype=np.uint8)).save(tmp_path / "good.png")
    page.click(away)  # the same page goes on
    page.set_input_files("#image input[type=file]", tmp_path / "good.png")
    page.wait_for_selector("#image img", timeout=60_000)
    page.fill("#position textarea", "   ")
    page.click("#find")
    page.wait_for_selector("text=All three texts are needed", timeout=60_000)
    page.fill("#position textarea", "in the middle")
    press_find(page, "liver")
    assert page.hosts == {f"127.0.0.1:{page.port}"}


@pytest.mark.parametrize("flags", [["--checkpoint", "/no/such"], ["--port", "x"], ["--port", "99999"]])
def test_bad_flags_are_named(flags, monkeypatch):
    from common import InputError
    monkeypatch.setattr(sys, "argv", ["app.py", *flags])
    with pytest.raises(InputError, match=flags[0]):
        app.main()


def test_nothing_trained_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runs.WEIGHTS", tmp_path / "none.safetensors")
    model, dataset, about = app.load(None)
    assert dataset == "synapse" and "untrained" in about and isinstance(model, torch.nn.Module)

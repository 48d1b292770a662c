"""The page, in a real headless browser: the first mask, clicks, a box, other texts, and bad uploads."""
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from medsegr import Config, MedSegR, save_checkpoint
from test_report import free_port

gr = pytest.importorskip("gradio")
import app  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]


def test_clicks():
    clicks = app.NOBODY
    for kind, x in zip(("point inside", "point outside", "corner of a box", "corner of a box"), range(4)):
        clicks = app.click(clicks, kind, x, x + 1)
    assert clicks == dict(points=[[0, 1], [1, 2]], labels=[1, 0], corners=[[2, 3], [3, 4]])
    assert app.click(clicks, "corner of a box", 9, 9)["corners"] == [[9, 9]]
    assert app.NOBODY == dict(points=[], labels=[], corners=[])
    image = np.zeros((37, 91, 3), np.uint8)
    mask = np.zeros((37, 91), bool)
    mask[3:20, 5:40] = True
    drawn = app.marked(image, clicks, mask)
    assert drawn.shape == image.shape and drawn.any()


def test_what_is_missing_is_said(tmp_path):
    model = MedSegR(Config(image_size=64, feature_grid=8)).eval()
    image, texts = np.zeros((40, 50), np.uint8), ("left", "bright", "round")
    for wrong in ((None, app.NOBODY, "x", texts), (image, app.NOBODY, "x", ("left", " ", "round")),
                  (image, dict(app.NOBODY, corners=[[1, 1]]), "x", texts)):
        with pytest.raises(gr.Error):
            app.find(model, *wrong, False, tmp_path)
    shown, said, path = app.find(model, image, dict(app.NOBODY, corners=[[30, 20], [5, 8]]), "", texts, False, tmp_path)
    assert shown.shape == (40, 50, 3) and path is None and "structure" in said


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a small model whose answers follow its boxes, open in a browser."""
    if not BROWSER:
        pytest.skip("no chromium here: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api")
    folder = tmp_path_factory.mktemp("app")
    save_checkpoint(MedSegR(Config(feature_grid=16)), folder / "last.safetensors", dataset="synapse")
    port = free_port()
    log = open(folder / "log.txt", "w")
    server = subprocess.Popen([sys.executable, "-W", "ignore", "app.py", "--checkpoint", folder, "--port", str(port)],
                              cwd=ROOT, stdout=log, stderr=log)
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
        page.port = port
        yield page
        browser.close()
    server.terminate()
    server.wait(20)


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


def test_a_box_by_two_clicks_and_bad_uploads(page, tmp_path):
    page.click("text=corner of a box")
    picture = page.locator("#image img")
    box = picture.bounding_box()
    side = min(box["width"], box["height"])  # the square picture, in the middle of its element
    left, top = (box["width"] - side) / 2, (box["height"] - side) / 2
    for x, y in ((0.2, 0.2), (0.6, 0.7)):
        before = page.get_attribute("#image img", "src")
        picture.click(position=dict(x=left + x * side, y=top + y * side))  # scrolls there first
        page.wait_for_function(f"document.querySelector('#image img').src != {before!r}", timeout=60_000)
    assert "pixels" in press_find(page, "pixels")  # LiteMedSAM with a box finds something
    before = page.get_attribute("#image img", "src")
    page.click("#clear")
    page.wait_for_function(f"document.querySelector('#image img').src != {before!r}", timeout=60_000)

    page.click("[aria-label='Clear'], [aria-label='Remove Image'], #image button[title='Clear']")
    page.click("#find")
    page.wait_for_selector("text=There is no image", timeout=60_000)
    (tmp_path / "bad.png").write_bytes(b"this is no picture")
    page.set_input_files("#image input[type=file]", tmp_path / "bad.png")
    time.sleep(2)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90), dtype=np.uint8)).save(tmp_path / "good.png")
    page.reload()
    page.wait_for_selector("#image img", timeout=60_000)
    page.click("[aria-label='Clear'], [aria-label='Remove Image'], #image button[title='Clear']")
    page.set_input_files("#image input[type=file]", tmp_path / "good.png")
    page.wait_for_selector("#image img", timeout=60_000)
    page.fill("#position textarea", "   ")
    page.click("#find")
    page.wait_for_selector("text=All three texts are needed", timeout=60_000)
    page.fill("#position textarea", "in the middle")
    press_find(page, "liver")
    assert page.hosts == {f"127.0.0.1:{page.port}"}


@pytest.mark.parametrize("flags", [["--checkpoint", "/no/such"], ["--port", "x"]])
def test_bad_flags_are_named(flags, monkeypatch):
    from common import InputError
    monkeypatch.setattr(sys, "argv", ["app.py", *flags])
    with pytest.raises(InputError, match=flags[0]):
        app.main()


def test_nothing_trained_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, dataset, about = app.load(None)
    assert dataset == "synapse" and "untrained" in about and isinstance(model, torch.nn.Module)

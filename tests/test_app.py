"""The page: what is uploaded to it, and, in a real headless browser, the first mask, clicks, a box, other texts, bad
uploads, and a volume from its upload to the file with its mask."""
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from common import LIGHT
from conftest import ROOT, fails
from inference import predict_image, predict_volume
from medsegr import Config, MedSegR
from readers.dicom import read_dicom
from readers.pictures import read_image
from readers.volumes import gray, read_nifti
from runs import save_checkpoint
from test_dicom import HU, dataset, rotation, save, series
from test_report import free_port
from test_volumes import volume_file

gr = pytest.importorskip("gradio")
import app  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]
CLEAR_IMAGE = "[aria-label='Clear'], [aria-label='Remove Image'], #image button[title='Clear']"


def test_clicks():
    clicks = app.NOTHING
    for kind, x in zip((*app.CLICKS, app.CLICKS[0]), range(3)):
        clicks = app.click(clicks, kind, x, x + 1)
    assert clicks == dict(points=[[0, 1], [1, 2], [2, 3]], labels=[1, 0, 1], box=None)
    clicks = app.drag(app.drag(clicks, 0, 0, 9.5, 9), 30, 4, 2.5, 11)
    assert clicks["box"] == [2.5, 4, 30, 11] and len(clicks["points"]) == 3
    assert app.NOTHING == dict(points=[], labels=[], box=None)
    image = np.zeros((37, 91, 3), np.uint8)
    mask = np.zeros((37, 91), bool)
    mask[3:20, 5:40] = True
    drawn = app.marked(image, clicks, mask)
    assert drawn.shape == image.shape and drawn.any()


def test_marks_are_seen_in_images_of_any_size():
    """On black and on white, as large beside a large image as beside a small one, and where the click was."""
    rng = np.random.default_rng(0)
    for w, h in [(29, 57), (64, 64), (3000, 2000), *rng.integers(40, 1500, (5, 2))]:
        x, y = rng.uniform(0.2, 0.8) * w, rng.uniform(0.2, 0.8) * h
        for gray in (0, 255):
            image = np.full((h, w, 3), gray, np.uint8)
            drawn = app.marked(image, app.click(app.NOTHING, app.CLICKS[0], x, y))
            rows, columns = np.nonzero((np.abs(drawn.astype(int) - gray) > 60).any(2))
            assert drawn.shape == image.shape and len(rows)
            assert np.abs([columns.mean() - x, rows.mean() - y]).max() < 1 + max(h, w) / 300
            assert 0.03 < (np.ptp(rows) + 1) / max(h, w) < (0.09 if max(h, w) > 150 else 0.2)


def test_what_is_missing_is_said():
    model = MedSegR(Config(**LIGHT, image_size=64, feature_grid=8)).eval()
    image, texts = np.zeros((40, 50, 3), np.uint8), ("left", "bright", "round")
    scan = app.Scan("x.png", image)
    for wrong in ((None, texts), (scan, ("left", " ", "round"))):
        with pytest.raises(gr.Error):
            app.find(model, wrong[0], 0, app.USUAL, app.NOTHING, "x", wrong[1], False)
        with pytest.raises(gr.Error):
            app.find_all(model, wrong[0], app.USUAL, {}, wrong[1])
    clicks = app.NOTHING | dict(box=[5, 8, 30, 20])
    mask, said, picture = app.find(model, scan, 0, app.USUAL, clicks, "", texts, False)
    assert mask.shape == (40, 50) and mask.dtype == bool and picture is None and "structure" in said


def test_an_upload_is_read_as_by_the_command(tmp_path):
    """16 bits, lying on its side: as readers/pictures.py reads it; what is no picture is called by its own name."""
    from gradio.data_classes import ImageData
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


# ---------------------------------------------------------------------------------------------------------------------
# Volumes, without a browser

def packed(path, files, **options):
    """A zip archive of files, pairs of a name in it and their bytes."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def same(scan, truth):
    """A Scan shows, through its usual window, what predict.py takes."""
    volume, grid, window = truth
    assert scan.window == pytest.approx(window) and np.array_equal(scan.grid.affine, grid.affine)
    assert scan.pixels.dtype == np.float32
    for z in range(len(volume)):
        shown = app.slice_of(scan, z, app.USUAL)
        assert shown.dtype == np.uint8 and np.abs(shown[..., 1] - volume[z].astype(int)).max() <= 1
    for name, window in app.WINDOWS.items():
        assert np.array_equal(app.slice_of(scan, 1, name)[..., 0], gray(scan.pixels[1], window or scan.window))


def test_nifti_is_read_as_by_the_command(tmp_path):
    for n, (axes, flips) in enumerate((((0, 1, 2), (0, 0, 0)), ((2, 0, 1), (1, 0, 1)), ((1, 2, 0), (0, 1, 1)))):
        path = tmp_path / f"{n}.nii.gz"
        volume_file(path, axes, flips)
        scan = app.read([path])
        same(scan, read_nifti(path, None, "ct"))
        truth = np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)[::-1, ::-1].transpose(2, 1, 0)
        assert scan.name == path.name and np.array_equal(scan.pixels, truth)  # the values themselves
        same(app.read([packed(tmp_path / "x.zip", [("a/x.nii.gz", path.read_bytes())])]), read_nifti(path, None, "ct"))
    rng = np.random.default_rng(0)  # no HU: by their percentiles; NaN is black
    values = rng.gamma(2, 300, (9, 8, 4)).astype(np.float32)
    values[2, 3, 1] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    same(app.read([path]), read_nifti(path, None, "mr"))


def test_dicom_is_read_as_by_the_command(tmp_path):
    """As files, and in archives whose folders have files of the same names; a slanted and a tilted series, inverted
    gray values, padding."""
    c, s = np.cos(0.3), np.sin(0.3)
    tilt = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    bright = dict(Modality="MR", PhotometricInterpretation="MONOCHROME1", RescaleIntercept=0)
    padded = dict(PixelPaddingValue=struct.pack("<H", HU[1, 2, 3] + 1024))
    for n, change in enumerate((dict(order=[2, 0, 5, 3, 1, 4]), dict(turn=rotation([0.2, -0.3, 0.5])),
                                dict(turn=tilt, step=(0, 0, 3.0)), dict(turn=np.roll(np.eye(3), 1, 0)), bright,
                                padded)):
        folder = series(tmp_path / str(n), **change)
        truth = read_dicom(folder, None, "mr" if n == 4 else "ct")
        files = sorted(folder.iterdir())
        scan = app.read(files)
        assert scan.name == "6 files"
        if n == 4:  # the brighter, the larger
            truth = *truth[:2], (-truth[2][1], -truth[2][0])
        same(scan, truth)
        again = app.read([packed(tmp_path / "x.zip", [
            *((f"IMG/{n}/I1.dcm", file.read_bytes()) for n, file in enumerate(files)), ("IMG/", b""),
            ("__MACOSX/IMG/._I1.dcm", b"\0\5\26\7"), ("read me.txt", b"hello")])])
        assert np.array_equal(again.pixels, scan.pixels, equal_nan=True) and np.isnan(scan.pixels).any() == (n == 5)
        assert again.name == "x.zip" and np.array_equal(again.grid.affine, scan.grid.affine)


def test_other_uploads(tmp_path):
    """Pictures, a DICOM image without a place; of several series the one that is asked for."""
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    save(dataset(picture, Modality="OT"), tmp_path / "b.dcm")
    for name in ("a.png", "b.dcm"):
        scan = app.read([tmp_path / name])
        assert np.array_equal(scan.pixels, picture) and scan.grid is None and scan.name == name
        assert app.slice_of(scan, 0, app.USUAL) is scan.pixels
    assert app.slice_of(None, 0, "lung") is None
    one = series(tmp_path / "1", SeriesInstanceUID="1.2.4", SeriesNumber=3)
    files = [*series(tmp_path / "2", HU[:4]).iterdir(), *one.iterdir()]
    fails(lambda: app.read(files), "10 files: holds 2 series", "the field series: ", "3 (")
    assert len(app.read(files, " 3").pixels) == 6


def test_what_is_assumed_is_said(small, tmp_path, monkeypatch):
    """A slice's thickness: of a file and of an archive, by the names that the user knows, and beside the ml."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    file = series(tmp_path / "s", HU[:1], SliceThickness=...) / "000.dcm"
    for path in (file, packed(tmp_path / "x.zip", [("a/000.dcm", file.read_bytes()), ("b/read me.txt", b"hello")])):
        scan, line = app.read([path]), "has no SliceThickness; 1 mm is assumed for ml"
        assert app.described(scan).endswith(f". {path.name}: {line}")
        said, _ = app.write_label(scan, app.find_all(small, scan, app.USUAL, {}, ("left", "bright", "round")), "x")
        assert "ml, in " in said and said.endswith(f". {path.name}: {line}")
    assert "assumed" not in app.described(app.read(list(series(tmp_path / "t").iterdir())))


def test_slices_are_whole_numbers():
    """Also of a half, and of the empty field of one who types another."""
    slider = app.Slices(0, 9, 0, step=1)
    assert [slider.preprocess(value) for value in (4, 4.4, None)] == [4, 4, 0] and slider.get_block_name() == "slider"


def test_bad_volumes_are_said_in_a_line(tmp_path, monkeypatch):
    """By the names that the user knows; nothing lies outside of the folder, and nothing is left of it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    files = [(file.name, file.read_bytes()) for file in sorted(series(tmp_path / "s").iterdir())]
    zipped, z = packed(tmp_path / "good.zip", files).read_bytes(), tmp_path / "z.zip"

    def bad(*parts, paths=(z,), **options):
        with pytest.raises(Exception) as e:
            app.read(list(paths), **options)
        assert type(e.value) is app.InputError and "\n" not in str(e.value)
        for part in parts:
            assert part in str(e.value), f"{part!r} not in {e.value}"
        assert str(tmp_path) not in str(e.value) and not re.search(r"upload\d", str(e.value))
        assert not list((tmp_path / "cache").iterdir()) and not (tmp_path / "evil.dcm").exists()

    for content in (b"", b"this is no archive", zipped[:len(zipped) // 2], b"PK" + zipped[2:90], zipped[-22:-4]):
        z.write_bytes(content)
        bad("z.zip: cannot be unpacked")
    rng = np.random.default_rng(0)
    for _ in range(60):  # any byte may be wrong: it is said, or does not matter
        wrong = bytearray(zipped)
        for at in rng.integers(0, len(zipped), 3):
            wrong[at] = rng.integers(256)
        z.write_bytes(wrong)
        try:
            app.read([z])
        except app.InputError as e:
            assert "\n" not in str(e) and str(tmp_path) not in str(e)
    for name in ("../evil.dcm", "a/../../evil.dcm", "/evil.dcm", "..\\evil.dcm", "C:\\evil.dcm"):
        packed(z, [*files, (name, b"x")])
        bad("z.zip: ", "leads out")
    locked = bytearray(zipped)
    for start, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for found in re.finditer(re.escape(start), zipped):
            locked[found.start() + flags] |= 1
    z.write_bytes(locked)
    bad("z.zip: is encrypted")
    packed(z, [])
    bad("z.zip: holds no DICOM image")
    packed(z, files[:2] + files[3:])
    bad("003.dcm: lies 5 mm behind 001.dcm", "one is missing")
    bad("000.dcm: lies 0 mm behind", "doubled", paths=[tmp_path / "s/000.dcm"] * 3)
    packed(z, [*files, ("viewer.exe", b"MZ")])
    bad("viewer.exe: truncated or not DICOM")
    packed(z, [*files, ("inner.zip", zipped)])
    bad("inner.zip: truncated or not DICOM")
    bad("There is no file", paths=())
    (tmp_path / "x.nii.gz").write_bytes(b"\x1f\x8bno")
    bad("x.nii.gz: truncated", paths=[tmp_path / "x.nii.gz"])
    film = dataset(np.zeros((3, 9, 9), np.uint8), Modality="US")
    save(film, tmp_path / "film.dcm")
    bad("film.dcm: 3 frames", "predict.py --slice", paths=[tmp_path / "film.dcm"])

    # what is too large: the archive unpacked, its number of files, and what small files say that they hold
    packed(z, [("zeros", bytes(2 ** 22))], compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(app, "MOST_BYTES", 2 ** 22 - 1)
    assert z.stat().st_size < 10 ** 4
    bad("z.zip: 1 files of 0.0 GB", "are the most")
    monkeypatch.setattr(app, "MOST_BYTES", 2 ** 22)
    bad("zeros: is no PNG")
    packed(z, files)
    monkeypatch.setattr(app, "MOST_FILES", 5)
    bad("z.zip: 6 files")
    monkeypatch.undo()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    huge = nib.Nifti1Header()
    huge.set_data_dtype(np.uint8), huge.set_data_shape((32767, 32767, 32767)), huge.set_sform(np.eye(4), 1)
    huge["magic"], huge["vox_offset"] = b"n+1", 352
    (tmp_path / "huge.nii").write_bytes(huge.binaryblock + bytes(400))
    bad("huge.nii: 35,181,151 million voxels", "268 million", paths=[tmp_path / "huge.nii"])
    most = b"\xff\xff"
    save(dataset(np.zeros((9, 9), np.uint8), Modality="US"), tmp_path / "huge.dcm", Rows=most, Columns=most)
    bad("huge.dcm: 4,295 million", paths=[tmp_path / "huge.dcm"])


def test_a_whole_volume(small, tmp_path, monkeypatch):
    """As predict.py does it, but for the slices that have points or a box of their own; the file lies on its input."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    texts, path = ("left", "bright", "round"), tmp_path / "x.nii.gz"
    volume_file(path, (2, 0, 1), (1, 0, 1))
    scan, asked = app.read([path]), [dict(zip(app.ATTRIBUTES, texts))]
    boxed = app.drag(app.NOTHING, 0, 0, 3, 4)
    clicks = {1: boxed, 2: app.NOTHING, 3: app.click(app.NOTHING, app.CLICKS[0], 2, 2)}
    label = app.find_all(small, scan, app.USUAL, clicks, texts)
    said, file = app.write_label(scan, label, "")
    truth, _ = predict_volume(small, read_nifti(path, None, "ct")[0], asked, progress=False)
    for z in range(len(label)):
        if z in (1, 3):
            mask, _, _ = app.find(small, scan, z, app.USUAL, clicks[z], "", texts, False)
            assert np.array_equal(label[z], mask)
        else:
            assert np.array_equal(label[z], truth[z])
    image = app.slice_of(scan, 1, app.USUAL)
    assert np.array_equal(label[1], predict_image(small, image, asked, np.array([boxed["box"]])).masks[0])
    stored = nib.load(file)
    assert np.array_equal(stored.affine, nib.load(path).affine) and stored.shape == nib.load(path).shape
    assert os.path.basename(file) == "x-label.nii.gz"
    count = np.count_nonzero(np.asarray(stored.dataobj))
    assert count == np.count_nonzero(label) and f"{count} voxels, {count * 1.5 * 0.8 * 3 / 1000:.1f} ml" in said


@pytest.fixture
def events(small, tmp_path, monkeypatch):
    """What the page does, by the functions' names, and a volume that was opened."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    volume_file(tmp_path / "x.nii.gz", (2, 0, 1), (1, 0, 1))
    found = {event.name: event.fn for event in app.build(small, app.Texts("synapse"), "").fns.values() if event.fn}
    return found, app.Opened(app.read([tmp_path / "x.nii.gz"]))


def test_a_structure_is_looked_for_by_its_own_texts(events, monkeypatch):
    """Also if its name was typed a moment ago and the boxes still hold the last one's; one's own texts stay."""
    (on, opened), texts, taken = events, app.Texts("synapse"), []
    nothing = np.zeros(opened.scan.pixels.shape[1:], bool)
    monkeypatch.setattr(app, "find", lambda *args: taken.append(args[6]) or (nothing, "", None))
    triple = lambda name, modality="ct": [texts(name, modality)[a] for a in app.ATTRIBUTES]
    own = ["left", "dark", "round"]
    for name, modality, filled, boxes, truth in (
            ("liver", "ct", "liver ct", triple("liver"), triple("liver")), ("liver", "ct", "liver ct", own, own),
            ("spleen", "ct", "liver ct", triple("liver"), triple("spleen")), ("cyst", "ct", "liver ct", own, own),
            ("liver", "mr", "liver ct", triple("liver"), triple("liver", "mr"))):
        on["on_find"](opened, f"{opened.number} 1", 1, app.USUAL, name, modality, filled, False, *boxes)
        assert list(taken[-1]) == truth
    *boxes, filled = on["fill"]("spleen", "mr")
    assert boxes == triple("spleen", "mr") and filled == "spleen mr" and on["fill"]("cyst", "ct") == gr.skip()


def test_an_answer_stays_with_its_own_image(events):
    """What was asked of an image that is shown no more: nothing happens to the one that is open by now."""
    on, first = events
    second, texts = app.Opened(first.scan), ["left", "bright", "round"]
    before = f"{first.number} 3"
    image, mask, line, explained, seen, label = on["look"](second, before, 3, "lung")
    assert seen == f"{second.number} {second.depth // 2}" and mask is None and line == app.described(first.scan)
    assert np.array_equal(image, app.marked(app.slice_of(first.scan, second.depth // 2, app.USUAL), app.NOTHING))
    on["on_hand"](second, before, app.CLICKS[0], "2 2 0")
    with pytest.raises(gr.Error, match="opened meanwhile"):
        on["on_find"](second, before, 3, app.USUAL, "cyst", "ct", "", False, *texts)
    with pytest.raises(gr.Error, match="opened meanwhile"):
        on["on_whole"](second, before, app.USUAL, "cyst", "ct", "", *texts)
    assert not second.clicks and not second.found and second.volume is None
    on["on_find"](first, before, 3, app.USUAL, "a *b* <i>c</i>", "ct", "", True, *texts)
    image, mask, line, explained, seen, label = on["look"](first, before, 3, app.USUAL)
    assert mask is not None and explained is not None and seen == before and not label.visible
    assert line.startswith("a *b* &lt;i&gt;c&lt;/i&gt;: ")  # a name is no markup
    assert on["look"](first, before, 2, app.USUAL)[1:4] == (None, app.described(first.scan), None)
    with pytest.raises(gr.Error, match="not arrived"):
        on["on_image"](None)
    nothing = app.Opened(None)  # what the browser has taken away, is not taken from it once more
    assert on["look"](nothing, f"{nothing.number} 0", 0, app.USUAL)[:2] == (gr.skip(), None)
    for z in (-1, first.depth):
        with pytest.raises(gr.Error, match=f"There is no slice {z}: they have the numbers 0 to"):
            on["look"](first, before, z, app.USUAL)


def test_a_correction_is_in_the_volumes_file(events):
    """What is found anew in a slice after the whole volume; what is found of another structure is not."""
    (on, opened), texts = events, ["left", "bright", "round"]
    seen = f"{opened.number} 2"
    on["on_whole"](opened, seen, app.USUAL, "cyst", "ct", "", *texts)
    before = opened.volume.label.copy()
    for z, name, box in ((2, "other", "0 0 6 9 0"), (2, "cyst", "3 2 0 0 0"), (0, "cyst", "1 1 5 7 0")):
        on["on_hand"](opened, f"{opened.number} {z}", app.CLICKS[0], box)
        on["on_find"](opened, seen, z, app.USUAL, name, "ct", "", False, *texts)
        Path(opened.volume.path).unlink()  # as gradio does after an hour: it is written again
        *_, label = on["look"](opened, seen, z, app.USUAL)
        if name == "cyst":
            before[z] = opened.found[z][0]
        stored = np.asarray(nib.as_closest_canonical(nib.load(label.value["path"])).dataobj)[::-1, ::-1].transpose(2, 1, 0)
        assert np.array_equal(stored, before) and f" cyst: {np.count_nonzero(before)} voxels" in label.label
    assert before.any() and opened.clicks[0]["box"] and len(opened.found) == len(before)
    on["on_hand"](opened, seen, app.CLICKS[0], "clear 0")
    assert opened.clicks[2] == app.NOTHING and opened.clicks[0]["box"]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

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
    server.wait(60)
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


def hand_over(page):
    """-> at(x, y): where on the page a pixel of the picture lies, whose size it is shown in has another scale."""
    picture = page.locator("#image img")
    picture.scroll_into_view_if_needed()
    box, (w, h) = picture.bounding_box(), picture.evaluate("img => [img.naturalWidth, img.naturalHeight]")
    scale = min(box["width"] / w, box["height"] / h)
    left, top = box["x"] + (box["width"] - w * scale) / 2, box["y"] + (box["height"] - h * scale) / 2
    return lambda x, y: (left + (x + 0.5) * scale, top + (y + 0.5) * scale)


def crosses(page, before, count):
    """Waits for the crosses of that many points in the picture -> their centres [count,2] from left to right."""
    gap = max(before.shape) // 64  # between the halves of a cross's edge
    for _ in range(120):
        changed = (np.abs(picture_of(page) - before) > 60).any(2)
        parts, _ = ndimage.label(ndimage.maximum_filter(changed, 2 * gap + 1))
        places = [[(x.start + x.stop - 1) / 2, (y.start + y.stop - 1) / 2] for y, x in ndimage.find_objects(parts)]
        if len(places) == count:
            return np.array(sorted(places))
        page.wait_for_timeout(500)
    raise AssertionError(f"{len(places)} crosses at {places}, not {count}")


@pytest.mark.parametrize("size", [(64, 64), (150, 90), (900, 1300)])
def test_points_lie_where_the_hand_was(page, tmp_path, size):
    """In pictures shown larger and smaller than they are; also those of fast clicks, and of clicks while the picture
    with the last point is loaded. Beside the picture there is no point."""
    gray = np.full((size[1], size[0]), 60, np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    page.click(CLEAR_IMAGE)
    page.set_input_files("#image input[type=file]", tmp_path / "gray.png")
    page.wait_for_function("""([w, h]) => {
        const img = document.querySelector("#image img");
        return img?.complete && img.naturalWidth == w && document.querySelector("#said").innerText == `image: ${h} x ${w}`
    }""", arg=size, timeout=60_000)
    at, empty, held = hand_over(page), picture_of(page), []
    truth = np.array([[0.15, 0.3], [0.3, 0.8], [0.5, 0.5], [0.7, 0.2], [0.85, 0.7]]) * size
    page.route("**/file=**", lambda route: held.append(route))  # the picture with a point, which the browser waits for
    page.mouse.click(*at(*truth[0]))
    for _ in range(120):
        page.wait_for_timeout(500)
        if held:
            break
    assert not page.locator("#image img").evaluate("img => img.complete")
    for place in truth[1:]:
        page.mouse.click(*at(*place))
    for route in held:  # and those that come meanwhile
        route.continue_()
    page.unroute("**/file=**")
    places = crosses(page, empty, 5)
    assert np.abs(places - truth).max() < max(1.5, max(size) / 200)
    if size[0] != size[1]:
        page.mouse.click(*at(*([size[0] * 0.5, -9] if size[0] > size[1] else [-99, size[1] * 0.5])))
        page.wait_for_timeout(2000)
        assert np.array_equal(crosses(page, empty, 5), places)


def test_points_and_a_box(page):
    """A click is a point, a drag a box and no point, also one that ends beside the picture."""
    new_picture(page, lambda: page.click("#another"))
    at = hand_over(page)

    def dragging(to):
        page.mouse.move(*at(150, 180))
        page.mouse.down()
        page.mouse.move(*at(100, 120), steps=3)
        assert page.locator("#band").count() == 1
        page.mouse.move(*at(*to), steps=3)
        page.mouse.up()
        assert page.locator("#band").count() == 0

    new_picture(page, lambda: dragging((-30, 200)))
    new_picture(page, lambda: dragging((50, 52)))
    *dragged, _ = page.input_value("#hand textarea, #hand input").split()
    assert np.abs(np.array(dragged, float) - [150, 180, 50, 52]).max() < 2
    new_picture(page, lambda: page.mouse.click(*at(77, 77)))
    assert "pixels" in press_find(page, "pixels")  # LiteMedSAM with a box finds something
    before = picture_of(page, "#mask")
    new_picture(page, lambda: page.click("#clear"))
    assert np.array_equal(picture_of(page, "#mask"), before)  # a mask keeps the clicks that it was found with


def test_a_structure_that_is_typed(page):
    """Has its own texts, as if it had been selected; a name that nobody knows leaves the texts as they are."""
    field, texts = page.locator("#name input").first, app.Texts("synapse")

    def name(typed, position):
        field.fill(typed)
        field.press("Tab")
        page.wait_for_function(f"document.querySelector('#position textarea').value == {position!r}", timeout=60_000)

    for known in ("spleen", "stomach"):
        name(known, texts(known, "ct")["position"])
    name("cyst", texts("stomach", "ct")["position"])
    name("liver", texts("liver", "ct")["position"])
    assert page.locator(".toast-body").count() == 0


def test_bad_uploads(page, tmp_path):
    page.click(CLEAR_IMAGE)
    page.click("#find")
    page.wait_for_selector("text=There is no image", timeout=60_000)
    (tmp_path / "bad.png").write_bytes(b"this is no picture")
    page.set_input_files("#image input[type=file]", tmp_path / "bad.png")
    page.wait_for_selector("text=bad.png: is no PNG", timeout=60_000)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90), dtype=np.uint8)).save(tmp_path / "good.png")
    page.click(CLEAR_IMAGE)  # the same page goes on
    page.set_input_files("#image input[type=file]", tmp_path / "good.png")
    page.wait_for_selector("#image img", timeout=60_000)
    page.fill("#position textarea", "   ")
    page.click("#find")
    page.wait_for_selector("text=All three texts are needed", timeout=60_000)
    page.fill("#position textarea", "in the middle")
    press_find(page, "liver")
    assert page.hosts == {f"127.0.0.1:{page.port}"}


def picture_of(page, where="#image"):
    """What is to be seen, int [H,W,3]."""
    body = page.request.get(page.locator(f"{where} img").evaluate("img => img.src")).body()
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)


def upload(page, files):
    """In place of the files, or of the word that they are bad, that are there."""
    while (away := page.locator("#files button[aria-label='Clear']")).count():
        away.first.click()
        page.wait_for_timeout(1000)
    page.set_input_files("#files input[type=file]", files)


def test_a_volume(page, tmp_path):
    """Upload, scroll, another window, a box that stays on its slice, find there and in all slices, and download; then a
    broken archive, after which the volume is still there, and a DICOM series in another one."""
    path = tmp_path / "scan.nii.gz"
    stored = np.random.default_rng(0).normal(50, 30, (48, 5, 40)).astype(np.int16)
    stored[:6] = -1000
    affine = np.array([[-0.8, 0.1, 0, 5], [0, 0.2, 0.9, -7], [0.1, 4, 0, 90], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(stored, affine), path)
    scan = app.read([path])
    volume = read_nifti(path, None, "ct")[0].astype(int)
    upload(page, path)
    page.wait_for_selector("text=scan.nii.gz: 5 x 40 x 48; usual is to show its values from -125 to 275",
                           timeout=60_000)
    page.wait_for_selector("#slice input[type=number]", timeout=60_000)
    number = page.locator("#slice input[type=number]")
    close = lambda truth: np.abs(picture_of(page)[..., 0] - truth).mean() < 6  # the page's pictures are compressed

    def scroll(z):
        number.fill(str(z))
        number.press("Enter")

    assert number.input_value() == "2" and close(volume[2])
    new_picture(page, lambda: scroll(4))
    assert close(volume[4]) and not close(volume[2])
    new_picture(page, lambda: page.click("#window label:has-text('lung')"))
    assert close(app.slice_of(scan, 4, "lung")[..., 0]) and not close(volume[4])
    new_picture(page, lambda: page.click("#window label:has-text('usual')"))
    empty = picture_of(page)
    box = page.locator("#image img").bounding_box()
    page.locator("#image img").scroll_into_view_if_needed()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.7, steps=4)
    new_picture(page, page.mouse.up)
    marked = picture_of(page)
    assert (np.abs(marked - empty) > 60).any()
    new_picture(page, lambda: scroll(1))
    assert close(volume[1])
    new_picture(page, lambda: scroll(4))
    assert np.array_equal(picture_of(page), marked)
    one = press_find(page, "pixels")
    page.wait_for_selector("#mask img", timeout=60_000)
    page.click("#whole")
    page.wait_for_selector("#mask >> text=predicting", timeout=60_000)
    page.wait_for_selector("#label", timeout=120_000)
    page.wait_for_function("document.querySelector('#said').innerText.includes('of 5 slices')", timeout=60_000)
    assert page.inner_text("#said") in page.inner_text("#label")  # also after something else is looked for
    with page.expect_download() as waiting:
        page.click("#label")
    waiting.value.save_as(tmp_path / "label.nii.gz")
    label = nib.load(tmp_path / "label.nii.gz")
    assert waiting.value.suggested_filename == "scan-label.nii.gz"
    assert label.shape == stored.shape and np.array_equal(label.affine, nib.load(path).affine)
    found = read_nifti(tmp_path / "label.nii.gz", (0, 255), "mr")[0]
    count = np.asarray(label.dataobj).sum()
    assert f": {count} voxels" in page.inner_text("#said") and f": {(found[4] > 0).sum()} pixels" in one

    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 and nothing more")
    upload(page, tmp_path / "broken.zip")
    page.wait_for_selector("text=broken.zip: cannot be unpacked", timeout=60_000)
    new_picture(page, lambda: scroll(2))  # the same page goes on
    assert close(volume[2])
    page.click("#find")
    page.wait_for_function("/pixels|not found/.test(document.querySelector('#said').innerText)", timeout=90_000)
    files = sorted(series(tmp_path / "s").iterdir())
    packed(tmp_path / "series.zip", [(file.name, file.read_bytes()) for file in files])
    upload(page, tmp_path / "series.zip")
    page.wait_for_selector("text=series.zip: 6 x 5 x 7", timeout=60_000)
    upload(page, files)
    page.wait_for_selector("text=6 files: 6 x 5 x 7", timeout=60_000)
    new_picture(page, lambda: page.click("#another"))
    assert page.locator("#slice").count() == page.locator("#whole").count() == 0
    assert page.hosts == {f"127.0.0.1:{page.port}"} and not list(page.kept.rglob("upload?-*"))


def test_an_impatient_hand(page, tmp_path):
    """Another volume while something is looked for, Find in two slices, Clear between clicks: all of it counts."""
    for name, depth in (("a", 9), ("b", 5)):
        values = np.broadcast_to(np.arange(depth) * 40.0 - 100 + 10 * (name == "b"), (50, 40, depth))
        nib.save(nib.Nifti1Image(values.astype(np.int16), np.diag([1, 1, 2, 1.0])), tmp_path / f"{name}.nii.gz")
    volumes = {name: read_nifti(tmp_path / f"{name}.nii.gz", None, "ct")[0] for name in "ab"}
    number = page.locator("#slice input[type=number]")
    shows = lambda name, z: np.abs(picture_of(page)[..., 0] - volumes[name][z].astype(int)).max() <= 1

    def wait(condition):
        for _ in range(120):
            if condition():
                return
            page.wait_for_timeout(500)
        raise AssertionError(f"slice {number.input_value()}, {page.inner_text('#said')}")

    def scroll(z):
        new_picture(page, lambda: (number.fill(str(z)), number.press("Enter")))

    upload(page, tmp_path / "a.nii.gz")
    wait(lambda: number.count() and number.input_value() == "4" and shows("a", 4))
    scroll(8)
    page.click("#find")
    page.locator("#files button[aria-label='Clear']").first.click()
    page.set_input_files("#files input[type=file]", tmp_path / "b.nii.gz")
    wait(lambda: number.input_value() == "2" and shows("b", 2))
    page.wait_for_timeout(5000)  # the answer about the first one has come by now
    assert number.input_value() == "2" and shows("b", 2) and page.inner_text("#said").startswith("b.nii.gz: 5 x 40 x")
    assert page.locator("#mask img").count() == 0

    page.click("#find")
    scroll(4)
    page.click("#find")
    for z in (4, 2):
        if z == 2:
            scroll(2)
        wait(lambda: page.locator("#mask img").count() and not page.inner_text("#said").startswith("b.nii.gz"))

    at, empty = hand_over(page), picture_of(page)
    for place in ((10, 10), (30, 10)):
        page.mouse.click(*at(*place))
    page.click("#clear")
    page.mouse.click(*at(20, 30))
    assert np.abs(crosses(page, empty, 1) - [[20, 30]]).max() < 2
    page.mouse.move(*at(5, 5))
    page.mouse.down()
    page.mouse.move(*at(20, 20), steps=3)
    page.mouse.wheel(0, 60)
    page.wait_for_timeout(500)
    page.mouse.move(*hand_over(page)(30, 25))
    page.mouse.up()
    page.wait_for_timeout(500)
    written = page.input_value("#hand textarea, #hand input")
    assert np.abs(np.array(written.split()[:4], float) - [5, 5, 30, 25]).max() < 2
    page.evaluate("""() => {  // two fingers
        const img = document.querySelector("#image img"), box = img.getBoundingClientRect();
        const touch = (kind, first, x) => img.dispatchEvent(new PointerEvent(kind, {bubbles: true, isPrimary: first,
            pointerType: "touch", pointerId: first ? 1 : 2, clientX: box.left + x, clientY: box.top + 50}));
        touch("pointerdown", true, 40), touch("pointerdown", false, 90);
        touch("pointermove", true, 10), touch("pointermove", false, 150), touch("pointerup", true, 10);
        touch("pointerup", false, 150);
    }""")
    page.wait_for_timeout(500)
    assert page.input_value("#hand textarea, #hand input") == written and page.locator("#band").count() == 0


@pytest.mark.parametrize("flags", [["--checkpoint", "/no/such"], ["--port", "x"], ["--port", "99999"]])
def test_bad_flags_are_named(flags, monkeypatch):
    from common import InputError
    monkeypatch.setattr(sys, "argv", ["app.py", *flags])
    with pytest.raises(InputError, match=flags[0]):
        app.main()


def test_nothing_trained_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runs.WEIGHTS", tmp_path)
    model, texts, about = app.load(None)
    assert texts.name == "synapse" and "untrained" in about and isinstance(model, torch.nn.Module)


def test_a_model_of_ones_own_data_brings_its_own_texts(model, tmp_path):
    words = {"position": ["behind"], "texture": ["dark"], "shape": ["round"]}
    (tmp_path / "own.json").write_text(json.dumps({"folder": {"cyst": words}}))
    save_checkpoint(model[0], tmp_path / "last.safetensors", dataset="folder",
                    arguments=dict(attributes_file=str(tmp_path / "own.json")))
    assert list(app.load(tmp_path)[1].classes) == ["cyst"] and "liver" in app.load(tmp_path, "synapse")[1].classes

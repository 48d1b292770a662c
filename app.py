"""A page to try the model on: an image or a volume, texts, points and boxes by hand; masks and what the texts did.

    python app.py                      the newest checkpoint in out, or what weights/ ships, or an untrained model
    python app.py --checkpoint out/synapse --port 7860

It runs on this machine (127.0.0.1) and sends nothing anywhere.
"""
import html
import io
import itertools
import os
import re
import signal
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from typing import NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"

try:
    import gradio as gr
except ImportError:
    print("app.py: the page needs gradio; pip install -r requirements-extras.txt", file=sys.stderr)
    sys.exit(2)
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import plots  # noqa: E402
from common import ATTRIBUTES, LIGHT, MODALITIES, InputError, Parser, add_precision_flag, number, run  # noqa: E402
from inference import UNSURE, choose_precision, explain, predict_image, predict_volume  # noqa: E402
from medsegr import Config, MedSegR  # noqa: E402
from readers.demo import Demo  # noqa: E402
from readers.dicom import is_dicom, read_dicom  # noqa: E402
from readers.pictures import gray_to_rgb, picture_format, read_image  # noqa: E402
from readers.volumes import Grid, first_bytes, gray, is_nifti, read_values, write_nifti  # noqa: E402
from runs import default_checkpoint, load_checkpoint  # noqa: E402
from texts import Texts, own_texts  # noqa: E402

CLICKS = ("inside the structure", "outside of it")
STYLE = """#image img, #mask img {width: 100%; height: 100%; object-fit: contain}
#image img {touch-action: none; cursor: crosshair}
#band {position: fixed; border: 2px dashed white; outline: 1px solid black; pointer-events: none}"""
NOTHING = dict(points=[], labels=[], box=None)
USUAL = "usual"
# HU that become black and white, as radiologists look at them; None: what predict.py takes
WINDOWS = {USUAL: None, "soft tissue": (-150, 250), "lung": (-1350, 150), "bone": (-500, 1300)}
MOST_BYTES, MOST_FILES, MOST_VOXELS = 2 ** 31, 10_000, 2 ** 28  # of an upload, unpacked; the values take 4 bytes each
GUIDE = """**1** Take the drawn slice, or upload an image or a volume. **2** Choose a structure, or write three texts of
your own. **3** If you like, help on the image: click points, or drag a box. **4** Press *Find*."""

# A click on the image becomes a point, x y, and a drag a box, x0 y0 x1 y1, in its pixels. They are written into the
# hidden text field #hand, one after the other; the time after them makes each a new value. gradio's own clicks are not
# used: they miss their place in a picture that is shown larger than it is, and are lost while the picture is loaded
# anew. The picture lies in the middle of its element (object-fit: contain).
HAND = """() => {
  let from = null, band = null, last = Promise.resolve();
  const pause = (ms) => new Promise(done => setTimeout(done, ms));
  const picture = () => document.querySelector("#image img");
  const send = words => last = last.catch(() => {}).then(async () => {
    while (picture() && !picture().complete) await pause(20);
    const written = words();
    if (!written) return;
    const field = document.querySelector("#hand textarea, #hand input");
    field.value = [...written, Date.now()].join(" ");
    field.dispatchEvent(new Event("input", {bubbles: true}));
    await pause(100);  // or the next one could take its place, or overtake it on the way
  });
  const place = (box, ...corners) => send(() => {
    const w = picture()?.naturalWidth, h = picture()?.naturalHeight, scale = Math.min(box.width / w, box.height / h);
    if (!w) return null;
    const pixels = corners.flatMap(([x, y]) => [(x - (box.width - w * scale) / 2) / scale - 0.5,
                                                (y - (box.height - h * scale) / 2) / scale - 0.5]);
    const within = pixels.map((v, n) => Math.max(0, Math.min((n % 2 ? h : w) - 1, v)));
    const beside = corners.length == 1 && pixels.some((v, n) => Math.abs(v - within[n]) > 0.5);
    return beside ? null : within.map(v => v.toFixed(1));
  });
  const at = (e, box) => [e.clientX - box.left, e.clientY - box.top];  // of the image's corner: the page may scroll
  const end = () => { band?.remove(); from = band = null; };
  addEventListener("dragstart", e => { if (e.target.closest("#image img")) e.preventDefault(); });
  addEventListener("pointerdown", e => {
    end();  // a second finger ends what the first began
    if (e.isPrimary && !e.button && e.target.matches("#image img")) from = at(e, picture().getBoundingClientRect());
  }, true);
  addEventListener("pointermove", e => {
    const box = picture()?.getBoundingClientRect();
    if (!from || !box || !band && Math.hypot(at(e, box)[0] - from[0], at(e, box)[1] - from[1]) < 6) return;
    if (!band) { band = document.createElement("div"); band.id = "band"; document.body.append(band); }
    const x = from[0] + box.left, y = from[1] + box.top;
    Object.assign(band.style, {left: Math.min(x, e.clientX) + "px", top: Math.min(y, e.clientY) + "px",
      width: Math.abs(e.clientX - x) + "px", height: Math.abs(e.clientY - y) + "px"});
  }, true);
  addEventListener("pointerup", e => {
    const box = picture()?.getBoundingClientRect();
    if (from && box) band ? place(box, from, at(e, box)) : place(box, at(e, box));
    end();
  }, true);
  addEventListener("pointercancel", end, true);
  addEventListener("click", e => { if (e.target.closest("#clear")) send(() => ["clear"]); }, true);
}"""


def load(checkpoint, dataset=None, **given):
    """-> (model, its Texts, or those of a data set, a line that says what it is)."""
    try:
        checkpoint = checkpoint or default_checkpoint()
    except InputError:  # nothing trained yet
        about = ("**untrained**: the texts do nothing yet, and it gives the masks of LiteMedSAM, which needs a box; "
                 "`make demo` trains a small one")
        model = MedSegR(Config(**LIGHT | {k: v for k, v in given.items() if v})).eval()
        return model, Texts(dataset or "synapse"), about
    model, record = load_checkpoint(checkpoint, **given)
    trained = record.get("dataset")
    texts = Texts(dataset or trained or "synapse", own_texts(record, dataset))
    return model, texts, f"{checkpoint}, trained on {trained or 'unknown data'}"


# ---------------------------------------------------------------------------------------------------------------------
# What is uploaded

class Scan(NamedTuple):
    """An image, or a volume, whose values are kept so that another window can be chosen."""
    name: str
    pixels: np.ndarray  # uint8 [H,W,3]; of a volume float32 [D,H,W], upright
    grid: Grid | None = None  # of a volume
    window: tuple | None = None  # what is black and white, unless another is chosen
    assumed: str = ""  # what had to be assumed to read it: sentences that follow on a line, or none


class Volume(NamedTuple):
    """What was found in all slices."""
    label: np.ndarray  # uint8 [D,H,W]
    name: str
    texts: list
    window: str  # as window_note() says it
    line: str  # about it
    path: str  # of its NIfTI file


class Opened:
    """A Scan that was opened, and what was done on it since, by its slices; an image is slice 0. Events change it in
    place: what is found after another one was opened stays with its own."""
    numbers = itertools.count()

    def __init__(self, scan):
        self.scan, self.number = scan, next(Opened.numbers)
        self.depth = len(scan.pixels) if scan and scan.grid else 0  # of a volume
        self.clicks = {}  # {z: as NOTHING}
        self.found = {}  # {z: (mask bool [H,W], a line about it, the clicks it was found with, an explanation or None)}
        self.volume = None  # a Volume, if one was found

    def own(self, z):
        """The clicks of a slice."""
        return self.clicks.get(z, NOTHING)

    def keep(self, label, name, texts, window):
        """Keeps what was found in all slices, and writes its file."""
        self.volume = Volume(label, name, texts, window, *write_label(self.scan, label, name, window))


def placed(folder, number, name):
    """Where an uploaded file lies while it is read: under its own name, which read() finds again in messages."""
    return folder / f"upload{number}-{Path(name).name[-50:]}"


def unpack(path, folder):
    """The files of a zip archive into one folder, whatever folders they were in."""
    name = Path(path).name
    try:
        with zipfile.ZipFile(path) as archive:
            parts = {file: re.split(r"[/\\]", file.filename) for file in archive.infolist() if not file.is_dir()}
            files = [file for file, (*_, last) in parts.items() if last == ".." or not last.startswith(".")]
            size = sum(file.file_size for file in files)  # no more than that is unpacked, whatever the files hold
            if size > MOST_BYTES or len(files) > MOST_FILES:
                raise InputError(f"{name}: {len(files):,} files of {size / 1e9:.1f} GB, but {MOST_FILES:,} files of "
                                 f"{MOST_BYTES / 1e9:.1f} GB are the most; pack a single series")
            for number, file in enumerate(files):
                if ".." in parts[file] or not parts[file][0] or ":" in parts[file][0]:
                    raise InputError(f"{name}: {file.filename} leads out of the archive; make it again")
                if file.flag_bits & 1:
                    raise InputError(f"{name}: is encrypted; unpack it, and upload its files")
                with archive.open(file) as packed, open(placed(folder, number, file.filename), "wb") as out:
                    copyfileobj(packed, out)
    except InputError:
        raise
    except Exception as e:  # damaged bytes make zipfile raise nearly anything
        raise InputError(f"{name}: cannot be unpacked ({e}): damaged, of a rare kind, or there is no room; make it "
                         "again") from None


def read(paths, series="", modality="ct"):
    """The Scan in uploaded files: a NIfTI volume, a picture, DICOM files, or a zip archive of one of these. What was
    unpacked is deleted again; InputError names the files as the user does."""
    if not paths:
        raise InputError("There is no file: upload one.")
    name = Path(paths[0]).name if len(paths) == 1 else f"{len(paths)} files"
    for path in paths:
        if not Path(path).exists():
            raise InputError(f"{Path(path).name}: is deleted here, as every upload is after an hour; upload it again")
        if len(paths) > 1 and not is_dicom(path) and (is_nifti(path) or picture_format(path)):
            raise InputError(f"{name}: {Path(path).name} is no DICOM file; upload one volume or picture at a time")
    with tempfile.TemporaryDirectory(dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        folder, assumed = Path(folder), []
        as_known = lambda line: re.sub(rf"({re.escape(str(folder))}/)?upload\d+-", "", line).replace(str(folder), name)
        try:
            if len(paths) == 1 and (first_bytes(paths[0])[:2] == b"PK" or name.lower().endswith(".zip")):
                unpack(paths[0], folder)
            else:
                for number, path in enumerate(paths):
                    placed(folder, number, path).symlink_to(Path(path).absolute())
            files = list(folder.iterdir())
            path = files[0] if len(files) == 1 else folder
            if path == folder or is_dicom(path):
                found = read_dicom(path, None, modality, series.strip() or None, None, MOST_VOXELS, assumed.append)
            else:
                found = read_values(path, MOST_VOXELS) if is_nifti(path) else (read_image(path), None, None)
        except InputError as e:
            said = re.sub(r"--(series|modality)", r"the field \1", as_known(str(e)))
            raise InputError(re.sub(r"(?<!predict.py )--(slice|window)", r"predict.py --\1", said)) from None
    return Scan(name, *found, "".join(f". {as_known(line)}" for line in assumed))


def described(scan):
    """A line, until something is found."""
    if scan is None:
        return ""
    size = " x ".join(map(str, scan.pixels.shape[:3 if scan.grid else 2]))
    values = "; usual is to show its values from {:g} to {:g}".format(*scan.window) if scan.window else ""
    return f"{scan.name}: {size}{values}{scan.assumed}"


@contextmanager
def told():
    """What is wrong with an input becomes one line on the page, which goes on."""
    try:
        yield
    except ValueError as e:  # InputError as well
        raise gr.Error(str(e), duration=60) from None


def slice_of(scan, z, window):
    """uint8 [H,W,3] or None: the image, or a slice of the volume through the window of this name."""
    if scan is None or scan.grid is None:
        return scan and scan.pixels
    return gray_to_rgb(gray(scan.pixels[z], WINDOWS[window] or scan.window))


class Picture(gr.Image):
    """gradio's Image, but an upload is read as by predict.py: upright, 16 bits by their range -> uint8 [H,W,3]."""
    is_template = True  # it looks like its base class

    def preprocess(self, payload):
        if payload is None or payload.path is None:
            return super().preprocess(payload)
        try:
            return read_image(payload.path)
        except InputError as e:
            raise gr.Error(str(e).replace(payload.path, payload.orig_name or "the image")) from None


class Slices(gr.Slider):
    """gradio's Slider, of whole numbers; while another one is typed, its field is empty: the first. Whether there is
    such a slice is asked of the volume: another one may be open by now."""
    is_template = True

    def preprocess(self, payload):
        return round(payload or 0)


def drawn(number=0):
    """uint8 [256,256,3]: one of the demo's slices."""
    return gray_to_rgb((255 * Demo("test").read(number).image).round().astype(np.uint8))


def marked(image, clicks, mask=None, name="mask"):
    """The image uint8 [H,W,3] with the clicks and the mask on it, in the same size: clicks lie where they were made.
    Marks grow with the image, which is shown in one size."""
    if image is None:
        return None
    h, w = image.shape[:2]
    dpi = max(50, max(h, w) / 3)  # below 50 a line is less than a pixel wide
    figure = plt.figure(figsize=(w / dpi, h / dpi), dpi=dpi)
    axis = figure.add_axes((0, 0, 1, 1))
    plots.overlay(axis, image, [(name, mask)] if mask is not None and mask.any() else [], {name: plots.COLOURS[0]},
                  most=max(h, w))
    axis.axis("off")
    plots.prompts(axis, clicks["box"], zip(clicks["points"], clicks["labels"]))
    axis.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return pixels


def click(clicks, kind, x, y):
    """The clicks and one more point."""
    return clicks | dict(points=[*clicks["points"], [x, y]], labels=[*clicks["labels"], int(kind == CLICKS[0])])


def drag(clicks, x0, y0, x1, y1):
    """The clicks with the box of two opposite corners, in any order, in place of an earlier one."""
    corners = np.array([[x0, y0], [x1, y1]], float)
    return clicks | dict(box=[*corners.min(0).tolist(), *corners.max(0).tolist()])


def as_prompts(clicks):
    """-> boxes, points of one target, as predict_image takes them."""
    boxes = np.array([clicks["box"]], np.float32) if clicks["box"] else None
    return boxes, (np.array([clicks["points"]], np.float32), np.array([clicks["labels"]])) if clicks["points"] else None


def as_target(scan, texts):
    """The texts of one target, as predict_image takes them, if there is something to find it in."""
    if scan is None:
        raise gr.Error("There is no image: upload one, or take the drawn slice.")
    if not all(t.strip() for t in texts):
        raise gr.Error("All three texts are needed: choose a structure, or write them.")
    return [dict(zip(ATTRIBUTES, texts))]


def window_note(scan, window):
    """Says that a volume was not looked at through its usual window."""
    return f"; {window} window" if scan.grid and window != USUAL else ""


def find(model, scan, z, window, clicks, name, texts, with_explanation, precision="float32"):
    """One image or slice -> (its mask bool [H,W], a line about it, the explanation or None)."""
    target, prompts, picture, name = as_target(scan, texts), as_prompts(clicks), None, name or "structure"
    image = slice_of(scan, z, window)
    answer = predict_image(model, image, target, *prompts, precision, min_iou=UNSURE if clicks == NOTHING else 0.0)
    mask = answer.masks[0]
    if with_explanation:
        picture = io.BytesIO()
        plots.explanation(picture, name, explain(model, image, answer, 0, target, *prompts, precision))
        picture = Image.open(picture)
    said = f"{name}: not found; add a box or a point, or other texts"
    if mask.any():
        said = (f"{name}: {mask.sum()} pixels, {mask.mean():.1%} of the image; the model expects an IoU of "
                f"{answer.iou[0]:.2f}")
    return mask, said + window_note(scan, window), picture


def find_all(model, scan, window, clicks, texts, precision="float32"):
    """A whole volume; clicks: {z: those of slice z}, which help there -> its label, uint8 [D,H,W]."""
    target = as_target(scan, texts)
    volume = np.stack([slice_of(scan, z, window)[..., 0] for z in range(len(scan.pixels))])
    label, _ = predict_volume(model, volume, target, precision, min_iou=UNSURE)
    for z, own in clicks.items():
        if own != NOTHING:
            label[z] = predict_image(model, gray_to_rgb(volume[z]), target, *as_prompts(own), precision).masks[0]
    return label


def write_label(scan, label, name, window=""):
    """The NIfTI file of a volume's label -> (a line about it, its path); window: as window_note() says it."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
    path = folder / (re.sub(r"\.(nii(\.gz)?|zip|dcm)$", "", scan.name, flags=re.I) + "-label.nii.gz")
    write_nifti(path, label, scan.grid)
    count, ml = np.count_nonzero(label), abs(np.linalg.det(scan.grid.affine[:3, :3])) / 1000
    name, slices = name or "structure", label.any((1, 2)).sum()
    said = f"{name}: {count} voxels, {count * ml:.1f} ml, in {slices} of {len(label)} slices"
    return said + window + scan.assumed, str(path)


# ---------------------------------------------------------------------------------------------------------------------
# The page

def build(model, texts, about, precision="float32"):
    """The page."""
    names, first = list(texts.classes), "liver" if "liver" in texts.classes else next(iter(texts.classes))
    first_modality = texts.modalities(first)[0] or "ct"

    def words(name, modality):
        with told():
            triple = texts(name, modality)
            return [triple[a] for a in ATTRIBUTES]

    def fill(name, modality):
        """The boxes, and whose texts are in them."""
        return [*words(name, modality), f"{name} {modality}"] if name in names else gr.skip()  # one's own name

    def asked(name, modality, filled, three):
        """The texts in the boxes, or of a structure that was chosen a moment ago its own, which are not there yet."""
        return words(name, modality) if name in names and filled != f"{name} {modality}" else list(three)

    # what was uploaded and drawn is deleted after an hour, and by main() when the page is stopped
    with gr.Blocks(title="MedSeg-R", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# MedSeg-R\n{GUIDE}\n\nModel: {about}. Research only, not for diagnosis.")
        start = Opened(Scan("drawn", drawn()))
        opened, turn = gr.State(start), gr.State(0)
        with gr.Row():
            with gr.Column():
                image = Picture(start.scan.pixels, type="numpy", label="image: click points, drag a box",
                                elem_id="image", sources=["upload", "clipboard"], height=400, buttons=[], format="png")
                z = Slices(0, 1, 0, step=1, label="slice, from the feet", elem_id="slice", visible=False)
                window = gr.Radio(list(WINDOWS), value=USUAL, label="CT's window; the model, too, sees what is shown",
                                  elem_id="window", visible=False)
                hand = gr.Textbox(visible="hidden", elem_id="hand")
                seen = gr.Textbox(f"{start.number} 0", visible="hidden")  # which Opened, and slice, the image shows
                kind = gr.Radio(CLICKS, value=CLICKS[0], label="a click is a point")
                with gr.Row():
                    gr.Button("Clear points and box", elem_id="clear")  # heard by HAND
                    another = gr.Button("Another drawn slice", elem_id="another")
                with gr.Row():
                    files = gr.File(label="a volume: NIfTI, DICOM, zip", elem_id="files",
                                    file_count="multiple", height=140)
                    series = gr.Textbox(label="series", info="if there are several: its number", elem_id="series")
            with gr.Column():
                with gr.Row():
                    name = gr.Dropdown(names, value=first, label="structure", allow_custom_value=True, elem_id="name")
                    modality = gr.Dropdown(list(MODALITIES), value=first_modality, label="modality")
                boxes = [gr.Textbox(value, label=a, lines=2, elem_id=a)
                         for a, value in zip(ATTRIBUTES, words(first, first_modality))]
                filled = gr.Textbox(f"{first} {first_modality}", visible="hidden")
                more = gr.Checkbox(True, label="explain what the texts did")
                button = gr.Button("Find", variant="primary", elem_id="find")
                whole = gr.Button("Find in all slices", elem_id="whole", visible=False)
                said = gr.HTML(elem_id="said")
                label = gr.DownloadButton("Download the volume's mask (NIfTI)", elem_id="label", visible=False)
        shown = gr.Image(label="mask", format="png", elem_id="mask", interactive=False, height=400,
                         buttons=["download"])
        explained = gr.Image(show_label=False, format="png", elem_id="explained", interactive=False,
                             buttons=["download", "fullscreen"])

        def show(new):
            """A Scan in place of the last one; look() does the rest."""
            new = Opened(new)
            middle = new.depth // 2
            # an image that was taken away is gone in the browser; to say so again could meet the next upload
            shows = slice_of(new.scan, middle, USUAL) if new.scan else gr.skip()
            return {opened: new, seen: f"{new.number} {middle}", image: shows,
                    z: gr.Slider(value=middle, maximum=max(1, new.depth - 1), visible=new.depth > 1),
                    window: gr.Radio(value=USUAL, visible=new.depth > 0), whole: gr.Button(visible=new.depth > 0)}

        def on_image(pixels):
            if pixels is None:
                raise gr.Error("The image has not arrived: upload it again.")
            return show(Scan("image", pixels))

        def on_files(paths, series, modality):
            with told():
                return show(read(paths, series, modality))

        def next_slice(number):
            number = (number + 1) % 32
            return show(Scan("drawn", drawn(number))) | {turn: number}

        def check(opened, seen, z=0):
            """Whether the browser shows what is open here; if so, an error for a slice that is not in it."""
            same = int(seen.split()[0]) == opened.number
            if same and not 0 <= z < max(1, opened.depth):
                raise gr.Error(f"There is no slice {z}: they have the numbers 0 to {max(1, opened.depth) - 1}.")
            return same

        def look(opened, seen, z, window):
            if not check(opened, seen, z):  # opened a moment ago, and to be shown as show() does
                z, window = opened.depth // 2, USUAL
            pixels = slice_of(opened.scan, z, window)
            mask, line, used, picture = opened.found.get(z, (None, described(opened.scan), None, None))
            volume = opened.volume
            if volume and not Path(volume.path).exists():  # deleted after an hour
                opened.keep(*volume[:4])
            return (marked(pixels, opened.own(z)) if opened.scan else gr.skip(),
                    None if mask is None else marked(pixels, used, mask), html.escape(line), picture,
                    f"{opened.number} {z}",
                    gr.DownloadButton(f"Download (NIfTI) {volume.line}", value=opened.volume.path, visible=True)
                    if volume else gr.DownloadButton(value=None, visible=False))

        def on_hand(opened, seen, kind, hand):
            z, (*place, _) = int(seen.split()[1]), hand.split()
            if check(opened, seen):
                own, place = opened.own(z), [float(v) for v in place if v != "clear"]
                opened.clicks[z] = (drag(own, *place) if len(place) == 4 else click(own, kind, *place) if place
                                    else NOTHING)

        def on_find(opened, seen, z, window, name, modality, filled, more, *three):
            if not check(opened, seen, z):
                raise gr.Error("Another image was opened meanwhile: press Find again.")
            own, three = opened.own(z), asked(name, modality, filled, three)
            with told():
                mask, line, picture = find(model, opened.scan, z, window, own, name, three, more, precision)
            opened.found[z] = mask, line, own, picture
            volume = opened.volume
            if volume and (volume.name, volume.texts) == (name, three):  # a correction, which the file has as well
                volume.label[z] = mask
                opened.keep(*volume[:4])

        def on_whole(opened, seen, window, name, modality, filled, position, texture, shape,
                     progress=gr.Progress(track_tqdm=True)):
            if not check(opened, seen):
                raise gr.Error("Another image was opened meanwhile: press Find in all slices again.")
            three, clicks = asked(name, modality, filled, (position, texture, shape)), dict(opened.clicks)
            with told():
                label = find_all(model, opened.scan, window, clicks, three, precision)
            opened.keep(label, name, three, window_note(opened.scan, window))
            opened.found = {z: (part > 0, opened.volume.line, clicks.get(z, NOTHING), None)
                            for z, part in enumerate(label)}

        fresh, texts_of = [opened, seen, image, z, window, whole], [name, modality, filled]
        in_turn = dict(concurrency_limit=1, trigger_mode="multiple")  # nothing is lost, and nothing overtakes
        opening = in_turn | dict(concurrency_id="open")
        finding = in_turn | dict(concurrency_id="find", show_progress_on=shown)
        # the slice that is looked at by now, with what belongs to it; a veil over the image would swallow a click
        seeing = dict(fn=look, inputs=[opened, seen, z, window], outputs=[image, shown, said, explained, seen, label],
                      trigger_mode="always_last", show_progress="hidden")
        # shown as it was read: a browser knows neither 16 bits nor TIFF
        for event in (image.upload(on_image, image, fresh, **opening),
                      image.clear(lambda: show(None), None, fresh, **opening),
                      files.upload(on_files, [files, series, modality], fresh, **opening),
                      series.submit(on_files, [files, series, modality], fresh, **opening),
                      another.click(next_slice, turn, [turn, *fresh], **opening),
                      hand.change(on_hand, [opened, seen, kind, hand], None, show_progress="hidden", **in_turn),
                      button.click(on_find, [opened, seen, z, window, *texts_of, more, *boxes], None, **finding),
                      whole.click(on_whole, [opened, seen, window, *texts_of, *boxes], None, **finding)):
            event.success(**seeing)
        for event in (z.input, window.input):
            event(**seeing)
        for event in (name.select, name.change, modality.select):  # a name that is typed is not selected
            event(fill, [name, modality], [*boxes, filled])
    return page


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", help="a .safetensors file or its folder (default: newest in out, else what weights/ ships)")
    add("--dataset", help="whose classes are offered (default: the checkpoint's)")
    add("--sam-checkpoint"), add("--clip")
    add("--port", type=number(1, 65535, int), default=7860)
    add_precision_flag(parser, auto=True)
    args = parser.parse_args()
    model, texts, about = load(args.checkpoint, args.dataset, sam_checkpoint=args.sam_checkpoint, clip=args.clip)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{about}\n{model.describe()}", flush=True)
    precision = choose_precision(model, args.precision)
    print(f"open http://127.0.0.1:{args.port}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # deletes the folder as well
    with tempfile.TemporaryDirectory(prefix="medsegr-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(model, texts, about, precision)
        try:
            page.launch(server_name="127.0.0.1", server_port=args.port, share=False, show_error=True, footer_links=[],
                        max_file_size=MOST_BYTES, css=STYLE, js=HAND, quiet=True, run_history=False,
                        theme=gr.themes.Default(font=["system-ui"], font_mono=["monospace"]))  # no web fonts
        except OSError as e:
            raise InputError(f"--port {args.port}: {e}; give another") from None


if __name__ == "__main__":
    run(main)

"""A page to try the model on: an image, its texts, points and a box by hand; the mask and what the texts did.

    python app.py                      the newest checkpoint in out, or what weights/ ships, or an untrained model
    python app.py --checkpoint out/synapse --port 7860

It runs on this machine (127.0.0.1) and sends nothing anywhere.
"""
import io
import os
import signal
import sys
import tempfile
from pathlib import Path

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
from common import ATTRIBUTES, LIGHT, InputError, Parser, add_precision_flag, number, run  # noqa: E402
from data import VARIATION  # noqa: E402
from inference import choose_precision, explain, predict_image  # noqa: E402
from medsegr import Config, MedSegR  # noqa: E402
from readers.demo import Demo  # noqa: E402
from readers.pictures import gray_to_rgb, read_image  # noqa: E402
from runs import default_checkpoint, load_checkpoint  # noqa: E402
from texts import Texts  # noqa: E402

CLICKS = ("inside the structure", "outside of it")
STYLE = """#image img, #mask img {width: 100%; height: 100%; object-fit: contain}
#image img {touch-action: none; cursor: crosshair}
#band {position: fixed; border: 2px dashed white; outline: 1px solid black; pointer-events: none}"""
NOTHING = dict(points=[], labels=[], box=None)
GUIDE = """**1** Take the drawn slice, or upload an image. **2** Choose a structure, or write three texts of your own.
**3** If you like, help on the image: click points, or drag a box. **4** Press *Find*."""

# A drag over the image becomes a box: x0 y0 x1 y1 in its pixels and the time, which makes each drag a new value,
# written into the hidden text field #dragged. gradio's own click, a point, is kept from following it. The picture lies
# in the middle of its element (object-fit: contain).
DRAG = """() => {
  let img = null, from = null, band = null, dragged = false;
  const pixel = (x, y) => {
    const r = img.getBoundingClientRect(), w = img.naturalWidth, h = img.naturalHeight;
    const scale = Math.min(r.width / w, r.height / h);
    const inside = (v, n) => Math.max(0, Math.min(n - 1, v));
    return [inside((x - r.left - (r.width - w * scale) / 2) / scale - 0.5, w),
            inside((y - r.top - (r.height - h * scale) / 2) / scale - 0.5, h)];
  };
  addEventListener("dragstart", e => { if (e.target.closest("#image img")) e.preventDefault(); });
  addEventListener("pointerdown", e => {
    dragged = false;
    if (e.button || !e.target.matches("#image img")) return;
    img = e.target; from = [e.clientX, e.clientY];
  }, true);
  addEventListener("pointermove", e => {
    if (!from || !band && Math.hypot(e.clientX - from[0], e.clientY - from[1]) < 6) return;
    if (!band) { band = document.createElement("div"); band.id = "band"; document.body.append(band); }
    Object.assign(band.style, {left: Math.min(from[0], e.clientX) + "px", top: Math.min(from[1], e.clientY) + "px",
      width: Math.abs(e.clientX - from[0]) + "px", height: Math.abs(e.clientY - from[1]) + "px"});
  }, true);
  addEventListener("pointerup", e => {
    if (band) {
      const field = document.querySelector("#dragged textarea, #dragged input");
      band.remove(); dragged = true;
      field.value = [...pixel(...from), ...pixel(e.clientX, e.clientY), Date.now()].map(v => v.toFixed(1)).join(" ");
      field.dispatchEvent(new Event("input", {bubbles: true}));
    }
    from = band = null;
  }, true);
  addEventListener("pointercancel", () => { band?.remove(); from = band = null; }, true);
  addEventListener("click", e => { if (dragged && e.target.closest("#image")) e.stopPropagation(); }, true);
}"""


def load(checkpoint, **given):
    """-> (model, the data set whose texts it knows, a line that says what it is)."""
    try:
        checkpoint = checkpoint or default_checkpoint()
    except InputError:  # nothing trained yet
        about = ("**untrained**: the texts do nothing yet, and it gives the masks of LiteMedSAM, which needs a box; "
                 "`make demo` trains a small one")
        return MedSegR(Config(**LIGHT | {k: v for k, v in given.items() if v})).eval(), "synapse", about
    model, record = load_checkpoint(checkpoint, **given)
    dataset = record.get("dataset")
    return model, dataset or "synapse", f"{checkpoint}, trained on {dataset or 'unknown data'}"


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


def drawn(number=0):
    """uint8 [256,256,3]: one of the demo's slices."""
    return gray_to_rgb((255 * Demo("test").read(number).image).round().astype(np.uint8))


def marked(image, clicks, mask=None, name="mask"):
    """The image uint8 [H,W,3] with the clicks and the mask on it, in the same size: clicks lie where they were made."""
    h, w = image.shape[:2]
    figure = plt.figure(figsize=(w / 100, h / 100), dpi=100)
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


def drag(clicks, dragged):
    """The clicks with the box "x0 y0 x1 y1 ...", two opposite corners in any order, in place of an earlier one."""
    corners = np.array(dragged.split()[:4], float).reshape(2, 2)
    return clicks | dict(box=[*corners.min(0).tolist(), *corners.max(0).tolist()])


def find(model, image, clicks, name, texts, with_explanation, precision="float32"):
    """-> (image with the mask, a line about it, the explanation or None)."""
    if image is None:
        raise gr.Error("There is no image: upload one, or take the drawn slice.")
    if not all(t.strip() for t in texts):
        raise gr.Error("All three texts are needed: choose a structure, or write them.")
    name = name or "structure"
    boxes = np.array([clicks["box"]], np.float32) if clicks["box"] else None
    points = (np.array([clicks["points"]], np.float32), np.array([clicks["labels"]])) if clicks["points"] else None
    asked, picture = [dict(zip(ATTRIBUTES, texts))], None
    answer = predict_image(model, image, asked, boxes, points, precision)
    mask = answer.masks[0]
    if with_explanation:
        picture = io.BytesIO()
        plots.explanation(picture, name, explain(model, image, answer, 0, asked, boxes, points, precision))
        picture = Image.open(picture)
    said = f"{name}: not found; add a box or a point, or other texts"
    if mask.any():
        said = (f"{name}: {mask.sum()} pixels, {mask.mean():.1%} of the image; the model expects an IoU of "
                f"{answer.iou[0]:.2f}")
    return marked(image, clicks, mask, name), said, picture


def build(model, dataset, about, precision="float32"):
    """The page."""
    texts = Texts(dataset)
    names, first = list(texts.classes), "liver" if "liver" in texts.classes else next(iter(texts.classes))
    first_modality = texts.modalities(first)[0] or "ct"

    def fill(name, modality):
        try:
            triple = texts(name, modality)
            return [triple[a] for a in ATTRIBUTES]
        except InputError as e:
            raise gr.Error(str(e))

    # what was uploaded and drawn is deleted after an hour, and by main() when the page is stopped
    with gr.Blocks(title="MedSeg-R", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# MedSeg-R\n{GUIDE}\n\nModel: {about}. Research only, not for diagnosis.")
        clicks, original = gr.State(NOTHING), gr.State(drawn())
        with gr.Row():
            with gr.Column():
                image = Picture(drawn(), type="numpy", label="image: click points, drag a box", elem_id="image",
                                 sources=["upload", "clipboard"], height=400, buttons=[])
                dragged = gr.Textbox(visible="hidden", elem_id="dragged")
                kind = gr.Radio(CLICKS, value=CLICKS[0], label="a click is a point")
                with gr.Row():
                    clear = gr.Button("Clear points and box", elem_id="clear")
                    another = gr.Button("Another drawn slice", elem_id="another")
            with gr.Column():
                with gr.Row():
                    name = gr.Dropdown(names, value=first, label="structure", allow_custom_value=True, elem_id="name")
                    modality = gr.Dropdown(list(VARIATION), value=first_modality, label="modality")
                boxes = [gr.Textbox(value, label=a, lines=2, elem_id=a)
                         for a, value in zip(ATTRIBUTES, fill(first, first_modality))]
                more = gr.Checkbox(True, label="explain what the texts did")
                button = gr.Button("Find", variant="primary", elem_id="find")
                said = gr.Markdown(elem_id="said")
        shown = gr.Image(label="mask", elem_id="mask", interactive=False, height=400, buttons=["download"])
        explained = gr.Image(label="what the texts did", format="png", elem_id="explained", interactive=False,
                             buttons=["download", "fullscreen"])
        turn = gr.State(0)

        def on_click(clicks, original, kind, event: gr.SelectData):
            clicks = click(clicks, kind, *event.index)
            return clicks, marked(original, clicks)

        def on_drag(clicks, original, dragged):
            clicks = drag(clicks, dragged)
            return clicks, marked(original, clicks)

        def next_slice(turn):
            turn = (turn + 1) % 32
            return turn, drawn(turn), drawn(turn), NOTHING

        # shown as it was read: a browser knows neither 16 bits nor TIFF
        image.upload(lambda new: (new, new, NOTHING), image, [image, original, clicks])
        image.clear(lambda: (None, NOTHING), None, [original, clicks])
        image.select(on_click, [clicks, original, kind], [clicks, image])
        dragged.change(on_drag, [clicks, original, dragged], [clicks, image])
        clear.click(lambda original: (NOTHING, original), original, [clicks, image])
        another.click(next_slice, turn, [turn, original, image, clicks])
        name.select(fill, [name, modality], boxes)
        modality.select(fill, [name, modality], boxes)

        def on_find(image, clicks, name, more, *three):
            try:
                return find(model, image, clicks, name, three, more, precision)
            except (InputError, ValueError) as e:
                raise gr.Error(str(e))

        button.click(on_find, [original, clicks, name, more, *boxes], [shown, said, explained])
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
    model, dataset, about = load(args.checkpoint, sam_checkpoint=args.sam_checkpoint, clip=args.clip)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{about}\n{model.describe()}", flush=True)
    precision = choose_precision(model, args.precision)
    print(f"open http://127.0.0.1:{args.port}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # deletes the folder as well
    with tempfile.TemporaryDirectory(prefix="medsegr-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(model, args.dataset or dataset, about, precision)
        try:
            page.launch(server_name="127.0.0.1", server_port=args.port, share=False, show_error=True, footer_links=[],
                        css=STYLE, js=DRAG, quiet=True, run_history=False,
                        theme=gr.themes.Default(font=["system-ui"], font_mono=["monospace"]))  # no web fonts
        except OSError as e:
            raise InputError(f"--port {args.port}: {e}; give another") from None


if __name__ == "__main__":
    run(main)

"""The demo: abdominal CT slices drawn from a seed, with eight organs that overlap in brightness. Needs no download.

    python -m readers.demo slice.png      one of the test slices as a PNG, to try predict.py on
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import Parser, number, run, seeded, whole
from readers.pictures import from_labels
from readers.synapse import ORGANS


class Demo:
    """Drawn abdominal CT slices on a 256 x 256 grid; image i of a split depends on (seed, split, i) and options.

    overlap: 0..1, pulls the organs towards each other, the front one wins. contrast: factor on the difference between
    organs and what lies behind them, 0..10. size: factor on the organs' size, 0..3. n: images (train 160, val 16,
    test 32).
    Spleen, liver, kidneys, bowel and vessels overlap in brightness, and each organ is absent in 15 % of the images.
    """
    name, classes, volumes = "demo", ORGANS, True
    pairs = tuple((organ, "ct") for organ in ORGANS)

    def __init__(self, split="train", seed=0, n=None, overlap=0.3, contrast=1.0, size=1.0):
        self.split, self.seed = split, seed
        self.overlap, self.contrast, self.size = overlap, contrast, size
        self.n = n or {"train": 160, "val": 16, "test": 32}[split]

    def __len__(self):
        return self.n

    def case(self, i):
        return f"{self.split}{i:04d}"

    def spacing(self, case):
        return None  # drawn, not scanned

    def key(self, i):
        return f"{self.split}{i:04d}_slice000"

    def read(self, i):
        rng = seeded("demo", self.seed, self.split, i)
        return from_labels(*draw(rng, self.classes, self.overlap, self.contrast, self.size), self.classes, "ct")


# ---------------------------------------------------------------------------------------------------------------------
# Drawing

# name: centre (x, y) in fractions of the body's half axes, half axes in pixels of the 256 grid, degrees, brightness,
# strength of the texture; rough, notch and bend of blob(). Radiological convention: the patient's right is on the
# image's left. Later ones lie in front.
DRAWN = {
    "spleen": ((0.70, 0.16), (14, 31), 12, 0.57, 0.02, 0.12, None, 0.22),
    "liver": ((-0.52, -0.08), (42, 45), 8, 0.55, 0.025, 0.12, None, 0),
    "right kidney": ((-0.43, 0.42), (17, 22), 14, 0.62, 0.03, 0.12, (-15, 0.35), 0),
    "left kidney": ((0.42, 0.40), (17, 22), -14, 0.62, 0.03, 0.12, (195, 0.35), 0),
    "stomach": ((0.36, -0.40), (34, 21), 18, 0.38, 0.05, 0.16, None, 0),
    "pancreas": ((0.10, -0.03), (38, 8), -12, 0.49, 0.07, 0.2, None, 0.3),
    "aorta": ((0.07, 0.29), (8.5, 8.5), 0, 0.66, 0.01, 0.03, None, 0),
    "gallbladder": ((-0.22, 0.06), (11, 8), 60, 0.33, 0.01, 0.06, None, 0),
}


def smooth(rng, grain, shape=(256, 256)):
    """Random field float32 [H, W], mean 0, standard deviation about 1, with bumps of `grain` pixels."""
    coarse = torch.from_numpy(rng.standard_normal([1, 1] + [int(n / grain) + 2 for n in shape], dtype=np.float32))
    return 1.5 * F.interpolate(coarse, shape, mode="bilinear", align_corners=False)[0, 0].numpy()


def blob(rng, centre, axes, degrees, rough=0.1, notch=None, bend=0.0):
    """-> (window, depth): two slices into the 256 x 256 grid; there depth float32, 1 in the centre, 0 at the outline.

    An ellipse with random Fourier waves of relative height `rough` along its outline. notch (degrees, depth) dents it,
    as a hilum does; bend curves its long axis.
    """
    turn = np.linspace(-np.pi, np.pi, 361)
    outline = 1 + sum(rough * rng.normal() / k * np.cos(k * turn + rng.uniform(0, 6.28)) for k in range(2, 7))
    if notch:
        away = (turn - np.deg2rad(notch[0]) + np.pi) % (2 * np.pi) - np.pi
        outline = outline - notch[1] * np.exp(-(away / 0.35) ** 2)
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    reach = outline.max() * np.hypot([axes[0] * c, axes[0] * s], [axes[1] * s, axes[1] * c]) + 2 * bend * max(axes)
    x0, y0 = np.clip(np.array(centre) - reach, 0, 255).astype(int)
    x1, y1 = np.clip(np.array(centre) + reach, 0, 255).astype(int) + 1
    x, y = np.arange(x0, x1, dtype=np.float32) - centre[0], np.arange(y0, y1, dtype=np.float32)[:, None] - centre[1]
    u, v = (c * x + s * y) / axes[0], (c * y - s * x) / axes[1]
    if bend and axes[0] >= axes[1]:
        v = v + bend * axes[0] / axes[1] * (u * u - 0.4)
    elif bend:
        u = u + bend * axes[1] / axes[0] * (v * v - 0.4)
    u, v = u.astype(np.float32), v.astype(np.float32)
    outline = outline.astype(np.float32)[((np.arctan2(v, u) + np.pi) * (180 / np.pi) + 0.5).astype(np.int16)]
    return (slice(y0, y1), slice(x0, x1)), 1 - np.sqrt(u * u + v * v) / outline


def draw_body(rng, at, scale):
    """-> float32 [256, 256]: everything but the organs: air, skin, fat, muscle, ribs, spine, vena cava, bowel."""
    image = np.full((256, 256), 0.0, np.float32)
    tilt, fat = at(0, 0)[2], rng.uniform(0.06, 0.12)

    def paint(centre, axes, degrees, value, rough=0.05, wall=None):
        window, depth = blob(rng, at(*centre)[:2], np.array(axes) * scale, degrees + tilt, rough)
        image[window][depth > 0] = value
        if wall is not None:
            image[window][(depth > 0) & (depth < 0.25)] = wall

    layer, belly = rng.uniform(0.88, 0.95), 0.02
    paint((0, 0), (109, 83), 0, 0.38, belly)  # skin
    paint((0, 0), (106, 80), 0, fat, belly)
    paint((0, 0), (106 * layer, 80 * layer), 0, 0.43, belly)  # the muscles of the wall
    paint((0, -0.02), (106 * layer - 8, 80 * layer - 7), 0, fat + 0.04, belly)
    turn = rng.uniform(0, 12)
    for a in range(0, 360, 24):  # ribs, cut obliquely, but none in front of the belly
        a = a + turn
        if not 235 < a % 360 < 305 and rng.random() < 0.8:
            c, s = np.cos(np.deg2rad(a)), np.sin(np.deg2rad(a))
            paint((0.93 * layer * c, 0.92 * layer * s), (8, 3.2), a + 90, rng.uniform(0.75, 0.95), 0.1, wall=1.0)
    for side in (-1, 1):  # psoas and back muscles
        paint((side * 0.22, 0.60), (13, 11), 0, 0.44)
        paint((side * 0.22, 0.80), (20, 11), side * 10, 0.45)
    paint((0, 0.57), (17, 13), 0, 0.72, 0.04, wall=0.92)  # vertebra: spongy inside, dense rim
    paint((0, 0.76), (13, 7), 0, 0.85)
    paint((0, 0.75), (7, 5), 0, 0.38)
    paint((0, 0.90), (3, 9), 0, 0.85)
    paint((-0.12, 0.27), (10, 7.5), 0, rng.uniform(0.52, 0.66))  # vena cava: as bright as the aorta
    for _ in range(rng.integers(6, 14)):  # bowel: anywhere, in the brightness of the organs
        centre, axes = (rng.uniform(-0.62, 0.62), rng.uniform(-0.62, 0.40)), rng.uniform(6, 15, 2)
        value = rng.choice([0.02, 0.3, 0.42, 0.5, 0.56, 0.62])
        paint(centre, axes, rng.uniform(0, 180), value + rng.normal(0, 0.03), 0.15, wall=0.5)
    return image + 0.02 * smooth(rng, 12) * (image > 0.04)


def draw_organ(rng, name, window, depth, value, grain):
    """-> float32 values in the window: the organ's own texture."""
    shape = depth.shape
    out = value + grain * smooth(rng, 8, shape)
    if name in ("liver", "spleen"):  # vessels: the ridges between the bumps of a random field, fewer in the spleen
        out += (0.11 if name == "liver" else 0.03) * (np.abs(smooth(rng, 16, shape)) < 0.09)
    elif name.endswith("kidney"):  # bright cortex, darker pyramids, fat in the sinus
        out += np.where(depth < 0.32, 0.08, -0.05 + 0.05 * smooth(rng, 5, shape))
        out[depth > rng.uniform(0.68, 0.8)] = 0.22
    elif name == "stomach":  # a wall, uneven contents, and the air that rises to the front of a patient on the back
        out += 0.05 * smooth(rng, 12, shape)
        rows = np.flatnonzero((depth > 0).any(1))
        level = rows[0] + rng.uniform(0, 0.55) * len(rows) if len(rows) else 0
        out[:int(level)] = 0.02
        out[depth < 0.14] = 0.50
    elif name == "pancreas":  # lobules with fat between them
        out -= 0.16 * (smooth(rng, 6, shape) > 1.2)
    elif name == "gallbladder":
        out[depth < 0.14] = 0.45
    elif name == "aorta" and rng.random() < 0.3:  # calcified plaque
        out[(depth < 0.2) & (smooth(rng, 5, shape) > 1.3)] = 1.0
    return out


def draw(rng, classes, overlap, contrast, size):
    """-> image float32 [256, 256] in [0, 1], label uint8 [256, 256] (TransUNet's ids)."""
    scale, tilt, middle = rng.uniform(0.9, 1.06), rng.normal(0, 3), 128 + rng.normal(0, 3, 2)
    half = np.array([108, 82]) * scale * rng.uniform(0.96, 1.04, 2)
    c, s = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))

    def at(x, y):
        """Body coordinates -> (x, y) in pixels, and the body's tilt in degrees."""
        x, y = x * half[0], y * half[1]
        return middle[0] + c * x - s * y, middle[1] + s * x + c * y, tilt

    behind = draw_body(rng, at, scale)
    front, label = behind.copy(), np.zeros((256, 256), np.uint8)
    phase = rng.normal(0, 0.03)  # how much contrast medium has arrived
    for name, ((x, y), axes, degrees, value, grain, rough, notch, bend) in DRAWN.items():
        # an organ draws from a generator of its own: the options change nothing but what they say
        own = np.random.default_rng(rng.integers(2 ** 62))
        here = own.random() > 0.15
        x, y = np.array([x, y]) * (1.06 - 0.4 * overlap) + np.array([0, 0.06]) * overlap + own.normal(0, 0.035, 2)
        axes = np.array(axes) * scale * size * np.exp(own.normal(0, 0.09, 2))
        degrees, value = degrees + tilt + own.normal(0, 8), value + phase + own.normal(0, 0.03)
        parts = [blob(own, at(x, y)[:2], axes, degrees, rough, notch, bend * own.uniform(0.6, 1.3))]
        if name == "liver":  # the left lobe, a tongue across the midline
            lobe = axes * (0.85, 0.36)
            parts.append(blob(own, at(x + 0.36 * size, y - 0.36 * size)[:2], lobe, degrees - 24, 0.12))
        for window, depth in parts if here else ():
            inside = depth > 0
            front[window][inside] = draw_organ(own, name, window, depth, value, grain)[inside]
            label[window][inside] = classes.index(name) + 1
    image = np.where(label > 0, behind + contrast * (front - behind), behind)
    return scan(rng, image), label


def scan(rng, image):
    """Mild blur and the grainy noise of a scanner."""
    sigma, noise = rng.uniform(0.6, 1.0), rng.standard_normal((256, 256), dtype=np.float32)
    kernel = torch.exp(-torch.arange(-3, 4).float() ** 2 / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, 7)
    x = torch.from_numpy(np.stack([image, noise]).astype(np.float32))[:, None]
    x = F.conv2d(F.conv2d(F.pad(x, (3, 3, 3, 3), mode="reflect"), kernel), kernel.mT)[:, 0].numpy()
    return np.clip(x[0] + rng.uniform(0.04, 0.09) * x[1], 0, 1)


def main():
    parser = Parser(description="One of the drawn test slices as a PNG, to try predict.py on.")
    parser.add_argument("file")
    slices = Demo("test")
    parser.add_argument("--image", type=number(0, len(slices) - 1, int), default=0, help="its number, 0 to 31")
    args = parser.parse_args()
    with whole(args.file) as file:
        Image.fromarray((255 * slices.read(args.image).image).round().astype(np.uint8)).save(file, format="PNG")


if __name__ == "__main__":
    run(main)

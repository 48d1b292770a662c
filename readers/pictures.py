"""What the readers of all data sets share: the RawSample that they return, how cases are split, and the one way to read
a picture file, of the command line, the page and the data sets."""
import hashlib
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from common import InputError

SPLITS = ("train", "val", "test")
# SAM-Med2D leaves out masks below this share of the image: 100 pixels at 256 x 256
SMALLEST = 0.00153
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")  # that Pillow may open


@dataclass
class RawSample:
    """One image on its own grid with the masks drawn on it."""
    image: np.ndarray  # uint8 [H,W] or [H,W,3] (RGB), or float [H,W] in [0, 1]
    masks: np.ndarray  # bool [T,H,W], none of them empty
    targets: tuple  # T class names; with instances the same name more than once
    absent: tuple  # classes that were looked for here and are not here
    modality: str  # one of MODALITIES, or "unknown"


def from_labels(image, label, classes, modality):
    """image [H,W], label uint8 [H,W], where i + 1 stands for classes[i] -> RawSample."""
    ids = [i for i in np.unique(label) if i]
    return RawSample(image, label == np.array(ids, np.uint8).reshape(-1, 1, 1), tuple(classes[i - 1] for i in ids),
                   tuple(c for i, c in enumerate(classes, 1) if i not in ids), modality)


def without_small(picture):
    """The RawSample without masks below SMALLEST; what they show is then neither a target nor absent."""
    keep = picture.masks.sum((1, 2)) >= SMALLEST * picture.masks[0].size if len(picture.masks) else []
    return replace(picture, masks=picture.masks[keep], targets=tuple(t for t, k in zip(picture.targets, keep) if k))


def split_cases(cases, split):
    """The cases of "train", "val" or "test": a fifth to test on, as the paper has it, and a twelfth of all held out for
    validation, drawn by a hash of the names; at least one each if there are three. Sorted."""
    cases = sorted(set(cases), key=lambda case: (hashlib.blake2b(case.encode()).digest(), case))
    test = max(round(0.2 * len(cases)), len(cases) > 2)
    val = test + max(round(len(cases) / 12), len(cases) > 1)
    return sorted({"test": cases[:test], "val": cases[test:val], "train": cases[val:]}[split])


# ---------------------------------------------------------------------------------------------------------------------
# Picture files

# what a file begins with -> the picture format that it is of
PICTURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP",
            b"GIF8": "GIF", b"RIFF....WEBP": "WebP", b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
            b"\xff\x4f\xff\x51": "JPEG 2000", **{b"P%d" % n: "PPM" for n in range(1, 7)}}
# the same of files that are often taken for pictures -> what they are, and the remedy
OTHERS = {
    b"....ftyphei": "HEIC, a telephone's own format; store it as PNG or JPEG",
    b"....ftypavif": "AVIF; store it as PNG or JPEG",
    b"%PDF": "a PDF document; store the picture in it as PNG",
    b"\0\x05\x16\x07": "what macOS leaves beside a file that it copies; give the one without ._ in its name",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; git lfs pull",
    b"<": "a page or drawing in XML or HTML; download the picture itself, or store it as PNG",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "gzip; unpack it, or name it .nii.gz if it is a NIfTI volume",
    b"\x93NUMPY": "an array of numpy; store it as PNG", b"\x89HDF": "HDF5; store the slice as PNG",
    b"NRRD": "NRRD; store it as NIfTI", b"ObjectType": "MetaImage; store it as NIfTI",
    b"\x5c\x01\0\0": "NIfTI; give it with its own suffix, .nii or .nii.gz",
    b"\0\0\x01\x5c": "NIfTI; give it with its own suffix, .nii or .nii.gz"}
GRAY, COLOUR, ALPHA = ("1", "L"), ("RGB", "RGBX", "P", "CMYK", "YCbCr", "HSV"), ("RGBA", "RGBa", "LA", "La", "PA")
OPAQUE = {"RGBA": "RGB", "RGBa": "RGB", "LA": "L", "PA": "P"}
NOISY = ("JPEG", "MPO", "WEBP", "JPEG2000")  # Pillow's names of formats that change values


def begins(path, starts):
    """The value in `starts` of what the file begins with, where a dot stands for any byte; None if nothing fits."""
    with open(path, "rb") as file:
        head = file.read(32)
    fits = lambda start: len(head) >= len(start) and all(a in (b, 46) for a, b in zip(start, head))
    return next((value for start, value in starts.items() if fits(start)), None)


def picture_format(path):
    """The format of a picture, by the file's first bytes, whatever its suffix; None if it is none that is read."""
    try:
        return begins(path, PICTURES)
    except OSError as e:
        raise unreadable(path, e) from None


def unreadable(path, error):
    """The InputError for a file that the system does not open."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: missing; restore the file, or correct its name")
    return InputError(f"{path}: cannot be opened ({error.strerror or error}); let this user read it")


@contextmanager
def opened(path, page=None):
    """-> Pillow's image of a file, its pixels loaded: of the only page, or of page `page`, counted from 0; and whether
    it had 16 bits a colour, of which Pillow keeps the upper 8.

    InputError if it is no picture, damaged, or of several pages; whatever else fails within is said to be damage.
    """
    kind = picture_format(path)
    if kind is None:
        what = begins(path, OTHERS) or (
            "no PNG, JPEG, TIFF, BMP, GIF, WebP or JPEG 2000 by its first bytes; convert it, or copy it again"
            if Path(path).stat().st_size else "empty, 0 bytes; copy it again")
        raise InputError(f"{path}: is {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about tags that say nothing of pixels
            # not by its path: Pillow would map some TIFFs, and cuts those that lie on their side at the wrong places
            with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
                # a telephone's JPEG may hold a preview, or a map of brightness, behind its picture
                pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                if pages > 1 and page is None:
                    raise InputError(f"{path}: holds {pages} pages or frames; store each as a file of its own, or, in "
                                     f"predict.py, choose one with --page 0 to {pages - 1}")
                if page is not None and not 0 <= page < pages:
                    raise InputError(f"{path}: --page {page}: it has {pages}, from 0 to {pages - 1}")
                image.seek(page or 0)
                halved = ";16" in str([tile[3] for tile in image.tile]) and image.mode in (*COLOUR, *ALPHA)
                image.load()
                with suppress(Exception):  # a damaged EXIF block, which viewers pass over as well
                    ImageOps.exif_transpose(image, in_place=True)
                yield image, halved
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{path}: has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; cut out a "
                         "part, or make it smaller") from None
    except Exception as e:  # damaged bytes make Pillow raise nearly anything
        raise InputError(f"{path}: cannot be read as {kind} ({' '.join(str(e).split())[:150]}): truncated, damaged, or "
                         "of a rare kind; copy it again, or store it as a PNG of 8 bits") from None


def read_image(path, page=None, window=None, say=None):
    """Any picture file -> uint8 [H,W,3], RGB, upright as viewers show it. What is transparent becomes black.

    Gray values of more than 8 bits become black to white over the range that they have, or that `window` gives; the
    function `say` is told which. page: of several, from 0.
    """
    with opened(path, page) as (image, halved):
        if is_deep(image):
            return gray_to_rgb(to_8_bits(path, image, window, say))
        if window:
            raise InputError(f"--window: {path} has 8 bits, which are shown as they are; leave it out")
        if image.mode not in (*GRAY, *COLOUR, *ALPHA):
            raise InputError(f"{path}: pixels of kind {image.mode}, which are not read; store it as RGB or gray")
        if halved and max(high for _, high in image.getextrema()[:3]) < 64:
            raise InputError(f"{path}: has 16 bits a colour, but its values use a quarter of their range or less, of "
                             "which too few levels can be read; scale them to the whole range, or store 8 bits")
        pixels = to_pixels(image)
    return pixels if pixels.ndim == 3 else gray_to_rgb(pixels)


def to_pixels(image):
    """A loaded image of up to 8 bits -> uint8 [H,W] or, of colours, [H,W,3]; what is transparent is black."""
    if image.mode in ALPHA or "transparency" in image.info:
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, (0, 0, 0, 255)), shown)
    mode = "L" if image.mode in GRAY else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    pixels = np.empty((image.height, image.width, 3)[:2 if mode == "L" else 3], np.uint8)
    for top in range(0, image.height, 256):  # all at once Pillow would take the memory twice
        pixels[top:top + 256] = image.crop((0, top, image.width, min(top + 256, image.height)))
    return pixels


def opaque(image):
    """A loaded image of values, not of what they look like -> the same without its transparency."""
    image.info.pop("transparency", None)
    return image.convert(OPAQUE[image.mode]) if image.mode in OPAQUE else image


def gray_to_rgb(pixels):
    """[H,W] -> [H,W,3]."""
    return np.repeat(pixels[..., None], 3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Gray values of more than 8 bits

def is_deep(image):
    return image.mode[0] in "IF"  # Pillow's I, I;16, I;16B and F


def deep_values(image):
    """The values [H,W] of a loaded deep image, as they are in the file."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    # Pillow reads 32 bits as signed whatever a TIFF file says in SampleFormat (339) and BitsPerSample (258)
    unsigned = image.mode == "I" and 32 in np.ravel(tags.get(258, ())) and tags.get(339, (1,))[0] == 1
    return values.view(np.uint32) if unsigned else values


def value_range(values):
    """(low, high) of numbers: the smallest and the largest, unless a few lie far away from all others, such as a letter
    that was burnt in; then the 0.5th and the 99.5th percentile."""
    low, high = float(values.min()), float(values.max())
    near, far = np.percentile(values[::max(1, values.size // 10 ** 6)], (0.5, 99.5))
    return (float(near), float(far)) if 0 < 4 * (far - near) < high - low else (low, high)


def to_8_bits(path, image, window, say):
    """A loaded deep image -> uint8 [H,W]."""
    values = deep_values(image)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise InputError(f"{path}: holds nothing but NaN or infinity; give another file")
    low, high = window or value_range(finite)
    if say and not window:
        say(f"{path}: values from {finite.min():g} to {finite.max():g}; {low:g} is shown black, {high:g} white "
            "(--window LOW HIGH chooses others)")
    values = np.nan_to_num(values, nan=low) if values.dtype.kind == "f" else values
    gray = np.rint(np.interp(values, (low, max(high, np.nextafter(low, np.inf))), (0, 255))).astype(np.uint8)
    # MinIsWhite, a PhotometricInterpretation (262) of TIFF that Pillow passes over where there are more than 8 bits
    return 255 - gray if getattr(image, "tag_v2", {}).get(262) == 0 else gray


# ---------------------------------------------------------------------------------------------------------------------
# Masks

def read_mask(path):
    """A mask file of two values, 0 and any other -> bool [H,W], upright: where it is not 0.

    A value is what the file stores: an index into its palette, a gray value however dark, a colour, whether it is
    transparent or not; by_alpha() says where the transparency is the mask. The noise of JPEG, also where it was stored
    as PNG since, is rounded to 0 and 255. InputError for a third value, or two without a 0; a mask of one value is
    empty or full, which is for the caller to judge.
    """
    with opened(path) as (image, halved):
        if halved:
            raise InputError(f"{path}: a mask of 16 bits a colour; store 0 and 255, 8 bits gray")
        noisy = image.format in NOISY
        alpha = np.asarray(image.getchannel(len(image.getbands()) - 1)) if image.mode in ALPHA else None
        image = opaque(image)
        if is_deep(image):
            values = deep_values(image)
        elif image.mode == "P":
            values = palette_values(path, image)
        else:
            values = to_pixels(image)
            if noisy and alpha is not None:  # WebP leaves any colour where nothing is seen
                values[alpha == 0] = 0
            values = values if values.ndim == 2 else colour_values(path, values)
        values = values if alpha is None else by_alpha(path, values, alpha)
    found = np.unique(values)
    if len(found) > (2 if noisy else 8) and values.dtype == np.uint8 and found[-1] > 223:
        check_noise(path, values)
        return values > 127
    if len(found) > 2 or len(found) == 2 and found[0] != 0:
        listed = ", ".join(f"#{v:06x}" if values.dtype == np.int64 else f"{v:g}" for v in found[:6])
        raise InputError(f"{path}: holds {len(found)} values ({listed}{', ...' * (len(found) > 6)}), but a mask has "
                         "two, 0 and another; store a mask for each structure")
    return values != 0


def palette_values(path, image):
    """A loaded palette image -> its indices uint8 [H,W], 0 for black; of a gray picture its gray values."""
    indices, table = np.asarray(image), np.zeros((256, 3), np.uint8)
    stored = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    table[:len(stored)] = stored
    used = np.unique(indices)
    if len(used) > 2 and (table[used] == table[used][:, :1]).all():
        return table[indices, 0]
    black = used[(table[used] == 0).all(1)]
    if len(black) != 1 or black[0] == 0:
        return indices
    if 0 in used:
        raise InputError(f"{path}: is black where its palette's index is {black[0]}, but index 0, which has another "
                         "colour, should be the background; store 0 and 255, without a palette")
    return np.where(indices == black[0], 0, indices)


def colour_values(path, pixels):
    """uint8 [H,W,3] -> gray values uint8 [H,W] where all is gray, or else a number for each colour, int64 [H,W]; of
    noisy colours the brightest part, uint8."""
    if (pixels == pixels[..., :1]).all():
        return pixels[..., 0]
    numbers = pixels @ np.array([65536, 256, 1])
    if len(np.unique(numbers)) <= 8:
        return numbers
    brightest = pixels.max(2)
    inside = brightest > 191
    if inside.any():
        others = inside & (np.abs(pixels - np.median(pixels[inside], 0)).max(2) > 64)
        if ndimage.binary_erosion(others, np.ones((5, 5))).any():  # a second colour, and not the blur of an edge
            raise InputError(f"{path}: its structures have several colours; store a mask of 0 and 255 for each")
    return brightest


def by_alpha(path, values, alpha):
    """The values of a mask and its alpha, uint8 [H,W] -> those that tell what it shows: the alpha where all else is of
    one value, or where it softens the edges of what is drawn on nothing; else the values. What is wholly transparent is
    the background where nothing else is."""
    hidden = alpha == 0
    if (alpha == alpha[0, 0]).all():
        return values
    if (values == values[0, 0]).all() or len(np.unique(alpha)) > 8 and (hidden == (values == 0)).all():
        return alpha
    if values.all():
        return np.where(hidden, 0, values)
    if values[hidden].any():
        raise InputError(f"{path}: is wholly transparent where its values are not 0, so it may be a mask of either; "
                         "store 0 and 255, without transparency")
    return values


def check_noise(path, values):
    """InputError if uint8 [H,W] gathers around a third value between 0 and 255, where noise and blur are spread."""
    bins = np.bincount(values.ravel(), minlength=256)[32:224].reshape(12, 16).sum(1)
    pairs = np.convolve(bins, (1, 1), "valid")
    if pairs.max() > max(20, bins.sum() / 2):
        raise InputError(f"{path}: many values are near {48 + 16 * pairs.argmax()}, but a mask has two, 0 and 255; "
                         "store a mask for each structure")

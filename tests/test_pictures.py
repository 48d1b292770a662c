"""readers/pictures.py: every kind of picture file is read as Pillow would show it, or refused in one line."""
import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import ndimage

from common import InputError
from conftest import fails
from readers.pictures import picture_format, read_image, read_mask

QUICK = settings(max_examples=40, deadline=None)
SIDES = st.integers(1, 40)


def pixels_of(mode, height, width, seed=0):
    """A random Pillow image of a mode."""
    rng = np.random.default_rng(seed)
    if mode in ("I;16", "I", "F"):
        values = rng.integers(0, 4096, (height, width))
        return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    if mode == "RGBA":
        return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def over_black(image):
    """What a viewer shows, by Pillow's own means: uint8 [H,W,3]."""
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB"))


def stretched(values):
    """Numbers -> uint8 [H,W,3]: black to white from the smallest to the largest."""
    values = values - values.min()
    return np.repeat(np.rint(255.0 * values / max(values.max(), 1e-9)).astype(np.uint8)[..., None], 3, 2)


KINDS = [("PNG", m) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")] + [
    ("JPEG", m) for m in ("L", "RGB", "CMYK", "YCbCr")] + [("TIFF", m) for m in (
        "1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")] + [
    ("BMP", "RGB"), ("BMP", "P"), ("GIF", "P"), ("GIF", "L"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("JPEG2000", "RGB"),
    ("PPM", "L"), ("PPM", "RGB")]


@QUICK
@given(st.sampled_from(KINDS), SIDES, SIDES, st.integers(1, 8), st.integers(0, 99))
def test_every_kind_of_picture_is_read_as_pillow_shows_it(tmp_path_factory, kind, height, width, orientation, seed):
    (form, mode), path = kind, tmp_path_factory.mktemp("p") / "no-suffix"
    exif = Image.Exif()
    exif[0x0112] = orientation
    given = dict(exif=exif) if form in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    pixels_of(mode, height, width, seed).save(path, form, **given)
    with open(path, "rb") as file, Image.open(file) as stored:  # by its path Pillow would map it, see `opened`
        stored.load()
        deep = mode in ("I;16", "I", "F")
        truth = stretched(np.asarray(ImageOps.exif_transpose(stored)).astype(float)) if deep else over_black(stored)
    found = read_image(path)
    assert found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"] and found.shape == truth.shape
    assert np.abs(found.astype(int) - truth).max() <= deep
    assert picture_format(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "RGB"])
def test_a_tiff_on_its_side_is_its_stored_pixels_turned(mode, orientation, tmp_path):
    """Stored without compression as with it."""
    turned = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
              6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: lambda a: np.rot90(a)}
    image, found = pixels_of(mode, 7, 23, 0), []
    for n, options in enumerate((dict(), dict(compression="tiff_lzw"))):
        image.save(tmp_path / f"{n}.tif", tiffinfo={274: orientation}, **options)
        found.append(read_image(tmp_path / f"{n}.tif"))
    if mode in ("L", "RGB"):
        truth = np.asarray(image) if mode == "RGB" else np.repeat(np.asarray(image)[..., None], 3, 2)
        assert np.array_equal(found[0], turned[orientation](truth))
    assert np.array_equal(*found) and found[0].shape == ((7, 23, 3) if orientation < 5 else (23, 7, 3))


@QUICK
@given(st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 99))
def test_a_truncated_picture_is_refused_or_whole(tmp_path_factory, kind, cut, seed):
    (form, mode), path = kind, tmp_path_factory.mktemp("p") / "x"
    pixels_of(mode, 30, 40, seed).save(path, form)
    whole, content = read_image(path), path.read_bytes()
    path.write_bytes(content[:int(cut * len(content))])
    for read in (read_image, read_mask):
        try:
            found = read(path)
        except InputError as e:
            assert str(path) in str(e) and "\n" not in str(e)
        else:
            assert read is read_mask or np.array_equal(found, whole)


@QUICK
@given(st.binary(max_size=400), st.sampled_from((b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"GIF89a", b"BM",
                                                 b"RIFF0000WEBP", b"P5\n", b"MM\0*")))
def test_random_bytes_are_refused(tmp_path_factory, content, start):
    path = tmp_path_factory.mktemp("p") / "x.png"
    path.write_bytes(start + content)
    for read in (read_image, read_mask):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                read(path)
            except InputError as e:
                assert str(path) in str(e) and "\n" not in str(e)


def test_what_a_file_is_is_said_before_it_is_called_damaged(tmp_path):
    path = tmp_path / "x.png"
    for content, words in ((b"", "empty"), (b"%PDF-1.7", "PDF"), (b"\0\0\0\x18ftypheic", "HEIC"),
                           (b"\0\x05\x16\x07\0\2", "macOS"), (b"version https://git-lfs.github.com", "git lfs pull"),
                           (b"<!DOCTYPE html>", "HTML"), (b"\x1f\x8b\x08\0", "gzip"), (b"\x5c\x01\0\0" * 90, "NIfTI"),
                           (b"hello, world", "by its first bytes")):
        path.write_bytes(content)
        fails(lambda: read_image(path), path, words)
        assert picture_format(path) is None
    fails(lambda: read_image(tmp_path), tmp_path, "cannot be opened")
    fails(lambda: read_image(tmp_path / "none"), "none", "missing")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "really.jpg", "PNG")
    assert read_image(tmp_path / "really.jpg").shape == (9, 9, 3)


def test_pages_and_frames(tmp_path):
    """Several are refused, or asked for by number; a telephone's JPEG with a preview behind it is one picture."""
    pages = [Image.fromarray(np.full((8, 9), 40 * n, np.uint8)) for n in range(1, 6)]
    for form in ("tif", "gif", "png", "webp"):
        path = tmp_path / f"x.{form}"
        pages[0].save(path, save_all=True, append_images=pages[1:], **dict(lossless=True) if form == "webp" else {})
        fails(lambda: read_image(path), path, "5 pages", "--page 0 to 4")
        fails(lambda: read_mask(path), path, "5 pages")
        assert [read_image(path, n)[0, 0, 0] for n in (4, 0, 2)] == [200, 40, 120]
        for n in (5, -1):
            fails(lambda: read_image(path, n), f"--page {n}")
    pages[0].save(tmp_path / "x.mpo", save_all=True, append_images=pages[1:2])
    assert read_image(tmp_path / "x.mpo")[0, 0, 0] == 40
    fails(lambda: read_image(tmp_path / "x.mpo", 1), "--page 1")


def test_more_than_8_bits(tmp_path):
    """By their own range, without the few that lie far away; inverted where TIFF says so; NaN is black."""
    path, said = tmp_path / "x.tif", []
    ramp = np.arange(1200, dtype=np.uint16).reshape(30, 40)
    Image.fromarray(ramp).save(path)
    assert np.array_equal(read_image(path, say=said.append), stretched(ramp.astype(float)))
    assert "0 to 1199" in said[0] and "--window" in said[0]
    assert read_image(path, window=(0, 600)).max() == 255 and (read_image(path, window=(0, 600))[15:] == 255).all()
    Image.fromarray(ramp).save(path, tiffinfo={262: 0})  # MinIsWhite
    assert np.array_equal(read_image(path), 255 - stretched(ramp.astype(float)))
    burnt = ramp.copy()
    burnt[0, :2] = 65535
    Image.fromarray(burnt).save(path)
    assert read_image(path)[20, 0, 0] > 150
    holes = ramp.astype(np.float32)
    holes[3, 4] = np.nan
    holes[3, 5] = np.inf
    Image.fromarray(holes).save(path)
    assert read_image(path)[3, 4, 0] == 0 and read_image(path)[3, 5, 0] == 255 == read_image(path).max()
    Image.fromarray(holes * np.nan).save(path)
    fails(lambda: read_image(path), path, "NaN")
    Image.fromarray(np.full((4, 5), 700, np.uint16)).save(path)
    assert not read_image(path).any()
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    fails(lambda: read_image(path, window=(0, 9)), "--window", "8 bits")


def png_16_bits_a_colour(path, pixels):
    """uint16 [H,W,3] as a PNG, which Pillow cannot write."""
    import struct
    import zlib
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    h, w, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_16_bits_a_colour(tmp_path):
    """Pillow keeps the upper 8 bits: right where the range is used, and else nearly black."""
    pixels, path = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)), tmp_path / "x.png"
    png_16_bits_a_colour(path, pixels)
    assert np.array_equal(read_image(path), pixels >> 8)
    png_16_bits_a_colour(path, pixels >> 4)
    fails(lambda: read_image(path), path, "16 bits a colour")


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (15, 10)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").shape == (10, 15, 3)
    Image.new("L", (25, 10)).save(tmp_path / "x.png")
    fails(lambda: read_image(tmp_path / "x.png"), "million pixels", "smaller")


# ---------------------------------------------------------------------------------------------------------------------
# Masks

TRUTH = np.zeros((40, 60), bool)
TRUTH[8:30, 10:45] = True


def palette(indices, *colours):
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(sum(colours, ()))
    return image


@pytest.mark.parametrize("name, image", {
    "0 and 255": Image.fromarray(TRUTH.astype(np.uint8) * 255), "0 and 1": Image.fromarray(TRUTH.astype(np.uint8)),
    "0 and 2": Image.fromarray(TRUTH.astype(np.uint8) * 2), "1 bit": Image.fromarray(TRUTH),
    "0 and 300": Image.fromarray(TRUTH.astype(np.uint16) * 300), "32 bits": Image.fromarray(TRUTH.astype(np.int32) * 7),
    "float": Image.fromarray(TRUTH.astype(np.float32)),
    "dark red": palette(TRUTH, (0, 0, 0), (30, 0, 0)), "black is index 5": palette(
        np.where(TRUTH, 2, 5), *[(9, 9, 200)] * 5, (0, 0, 0)),
    "red": Image.fromarray(TRUTH[..., None] * np.array([128, 0, 0], np.uint8)),
    "gray as RGBA": Image.fromarray(TRUTH.astype(np.uint8) * 255).convert("RGBA"),
    "white where it is opaque": Image.fromarray(np.dstack([np.full(TRUTH.shape, 255, np.uint8), TRUTH * np.uint8(255)]),
                                                "LA")}.items())
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_masks_by_value(tmp_path, name, image, suffix):
    if image.mode == "F" and suffix == "png":
        return  # there is no such PNG
    image.save(tmp_path / f"m.{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"m.{suffix}"), TRUTH), name


@pytest.mark.parametrize("quality", [60, 75, 95])
@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 0, 0), (255, 255, 0)])
def test_the_noise_of_jpeg_is_rounded(tmp_path, quality, colour):
    inside = np.kron(np.random.default_rng(0).random((6, 8)) < 0.4, np.ones((16, 16), bool))
    image = Image.fromarray(inside[..., None] * np.array(colour, np.uint8))
    image.save(tmp_path / "m.jpg", quality=quality)
    Image.open(tmp_path / "m.jpg").save(tmp_path / "m.png")  # and its noise with it
    for name in ("m.jpg", "m.png"):
        assert np.array_equal(read_mask(tmp_path / name), inside)


def flat(*bands):
    """Bands, numbers or arrays -> the Pillow image of TRUTH's size that has them."""
    return Image.fromarray(np.dstack([np.broadcast_to(band, TRUTH.shape).astype(np.uint8) for band in bands]),
                           {2: "LA", 3: "RGB", 4: "RGBA"}[len(bands)])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(("1", "L", "I;16", "P", "PA", "RGB", "LA", "RGBA")), st.integers(1, 255),
       st.sampled_from(("one", "seen", "background")), st.sampled_from(("png", "tif")), st.integers(0, 9999))
def test_masks_are_told_by_their_values_whatever_is_transparent(tmp_path_factory, mode, value, see, suffix, seed):
    """An alpha of one value, of many, or of none outside; a value or a palette's index that is called transparent."""
    rng = np.random.default_rng(seed)
    mask = rng.random((9, 11)) < 0.5
    mask[0, :2] = True, False
    alpha = {"one": np.full(mask.shape, rng.integers(256)), "seen": rng.integers(1, 256, mask.shape),
             "background": mask * rng.integers(1, 256)}[see].astype(np.uint8)
    gray = mask * np.uint8(value)
    if mode[0] == "P":
        colour = (0, 0, 0) if see == "one" else tuple(rng.integers(1, 256, 3))
        image = palette(mask, (0, 0, 0), colour)
    else:
        image = Image.fromarray(mask if mode == "1" else gray.astype(np.uint16) if mode == "I;16" else gray)
        image = image.convert("RGB") if mode[:3] == "RGB" else image
    if mode[-1] == "A":
        if mode == "PA" and suffix == "png":
            return  # there is no such PNG
        image.putalpha(Image.fromarray(alpha))
    shown = int(rng.choice([0, 1 if mode in "1P" else value]))
    more = dict(transparency=(shown,) * 3 if mode == "RGB" else shown) if suffix == "png" and mode[-1] != "A" else {}
    path = tmp_path_factory.mktemp("m") / f"m.{suffix}"
    image.save(path, **more)
    assert np.array_equal(read_mask(path), mask)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_masks_that_are_drawn_on_nothing(tmp_path, suffix):
    """The alpha alone, or with soft edges, tells them; what may be a mask of either part is refused."""
    path, inside = tmp_path / f"m.{suffix}", TRUTH * 255
    soft = np.rint(ndimage.gaussian_filter(TRUTH * 255.0, 1.5))
    for image, truth in ((flat(0, 0, 0, inside), TRUTH), (flat(255, 255, 255, inside), TRUTH),
                         (flat(0, 0, 0, soft), soft > 127), (flat(255, 255, 255, soft), soft > 127),
                         (flat(*[255 * (soft > 0)] * 3, soft), soft > 127), (flat(0, 0, 0, 255), TRUTH & False),
                         (flat(255, 255, 255, 3), TRUTH | True), (flat(inside, inside, inside, 3), TRUTH)):
        image.save(path)
        assert np.array_equal(read_mask(path), truth)
    if suffix == "webp":  # has no colour where nothing is seen
        return
    flat(255, 255 - inside, 255 - inside, inside).save(path)  # red on what would be white
    assert np.array_equal(read_mask(path), TRUTH)
    for image in (flat(*[255 - inside] * 3, inside), flat(*[inside] * 3, 255 - inside),
                  flat(*[inside] * 3, np.where(np.arange(60) < 20, 0, 255))):
        image.save(path)
        fails(lambda: read_mask(path), path, "wholly transparent", "without transparency")


def test_third_values_are_named(tmp_path):
    labels = TRUTH.astype(np.uint8)
    labels[20:, 30:] = 2
    red, green = np.array([255, 0, 0]), np.array([0, 255, 0])
    path = tmp_path / "m.png"
    for image, words in ((Image.fromarray(labels), "3 values (0, 1, 2)"), (Image.fromarray(labels * 127), "(0, 127, 254)"),
                         (palette(labels, (0, 0, 0), (9, 0, 0), (0, 9, 0)), "(0, 1, 2)"),
                         (Image.fromarray((labels[..., None] == 1) * red.astype(np.uint8)
                                          + (labels[..., None] == 2) * green.astype(np.uint8)), "#00ff00, #ff0000"),
                         (Image.fromarray(labels + np.uint16(1)), "3 values"),
                         (Image.fromarray(TRUTH + np.uint8(1)), "2 values (1, 2)"),
                         (palette(TRUTH, (255, 255, 255), (0, 0, 0)), "background")):
        image.save(path)
        fails(lambda: read_mask(path), path, words)
    big = np.kron(labels, np.ones((4, 4), np.uint8))
    Image.fromarray(big * 127).save(tmp_path / "m.jpg")
    fails(lambda: read_mask(tmp_path / "m.jpg"), "m.jpg", "many values are near 1")
    Image.fromarray((big[..., None] == 1) * red.astype(np.uint8) + (big[..., None] == 2) * green.astype(np.uint8)).save(
        tmp_path / "m.jpg")
    fails(lambda: read_mask(tmp_path / "m.jpg"), "several colours")
    for full in (False, True):
        Image.fromarray(np.full((9, 9), 255 * full, np.uint8)).save(path)
        assert (read_mask(path) == full).all()


def test_a_mask_lies_as_its_photograph(tmp_path):
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        image = Image.fromarray(TRUTH.astype(np.uint8) * 255)
        image.save(tmp_path / "m.png", exif=exif), image.save(tmp_path / "x.jpg", quality=95, exif=exif)
        assert np.array_equal(read_mask(tmp_path / "m.png"), read_image(tmp_path / "x.jpg")[..., 0] > 127)


def test_the_range_of_a_32_bit_tiff(tmp_path):
    """Values above 2 ** 31, which Pillow reads as negative ones."""
    rows = np.linspace(0, 2 ** 32 - 1, 64).astype("<u4").reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.int32)).save(buffer, "TIFF")
    content = bytearray(buffer.getvalue())
    with Image.open(buffer) as image:
        start = image.tag_v2[273][0]
        entry = content.index(b"\x53\x01\x03\x00")  # tag 339, SampleFormat, a short
    content[start:start + 256], content[entry + 8:entry + 10] = rows.tobytes(), b"\1\0"
    (tmp_path / "x.tif").write_bytes(content)
    assert np.abs(read_image(tmp_path / "x.tif")[..., 0].astype(int) - np.rint(rows / (2 ** 32 - 1) * 255)).max() <= 1

"""Every kind of file that is taken comes out upright, RGB and with the right colours; every bad one says why."""

import io
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from training.storage import image_file
from training.storage.image_file import (
    DEFAULT_LIMITS,
    MAX_JPEG_SCANS,
    ImageError,
    ImageLimits,
    count_pixels,
    declared_size,
    open_image,
)
from training.storage.images import ORIENTATION_TAG, MaskedImage, decode_image, read_image, thumbnail

Pixels = NDArray[np.uint8]


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def read_picture(data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> MaskedImage:
    return decode_image(open_image(data, name, limits))


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth, asymmetric colour picture, so that every flip and turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 5 % 256, y * 7 % 256, (x + 2 * y) % 256], -1).astype(np.uint8))


def pixels(image: Image.Image) -> Pixels:
    return np.asarray(image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tall_jpeg(width: int, height: int) -> bytes:
    """A baseline JPEG of any height, made of one row of blocks that stands between restart markers again and again."""
    y, x = np.mgrid[0:16, 0:width]
    strip = Image.fromarray(np.stack([x * 255 // width, 255 - x * 255 // width, y * 0 + 100], -1).astype(np.uint8))
    data = encoded(strip, "JPEG", restart_marker_rows=1)
    frame, scan = data.find(b"\xff\xc0"), data.find(b"\xff\xda")
    start = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    row, rows = data[start:-2], -(-height // 16)
    head = data[: frame + 5] + struct.pack(">H", height) + data[frame + 7 : start]
    return head + b"".join(row + bytes([0xFF, 0xD0 + index % 8]) for index in range(rows - 1)) + row + data[-2:]


def reason(data: bytes, limits: ImageLimits | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        read_picture(data, "cat.jpg", limits or ImageLimits())
    assert caught.value.name == "cat.jpg"
    assert str(caught.value) == f"cat.jpg: {caught.value.reason}"
    return caught.value.reason


# -- what is taken


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_lossless_formats_come_out_pixel_exact(form: str) -> None:
    image = read_image(encoded(picture(), form, **({"lossless": True} if form == "WEBP" else {})), "a")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(pixels(image), pixels(picture()))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_comes_out_alike(progressive: bool) -> None:
    image = read_image(encoded(picture(), "JPEG", quality=95, progressive=progressive), "a.jpg")
    assert np.abs(pixels(image).astype(int) - pixels(picture())).mean() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_exif_orientation_is_undone_exactly(form: str, orientation: int) -> None:
    upright = pixels(picture())
    stored: dict[int, Callable[[Pixels], Pixels]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    as_stored = Image.fromarray(np.ascontiguousarray(stored[orientation](upright)))
    data = encoded(as_stored, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    np.testing.assert_array_equal(pixels(read_image(data, "a")), upright)


def test_a_jpegs_orientation_and_a_mask_turn_together() -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    assert read_image(encoded(picture(), "JPEG", exif=exif), "a.jpg").size == (32, 48)
    rgba = picture()
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    turned = read_picture(encoded(rgba, exif=exif), "a.png")
    assert turned.mask is not None
    assert turned.mask.size == turned.image.size == (32, 48)


def test_broken_exif_does_not_cost_the_photo() -> None:
    assert read_image(encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), "a.jpg").size == (48, 32)


def test_alpha_lies_on_white_and_is_kept_as_mask() -> None:
    alpha = Image.linear_gradient("L").resize((48, 32))
    rgba = picture()
    rgba.putalpha(alpha)
    image, mask = read_picture(encoded(rgba), "a.png")
    assert mask is not None
    np.testing.assert_array_equal(pixels(mask), pixels(alpha))
    share = pixels(alpha)[..., None] / 255
    np.testing.assert_allclose(pixels(image), pixels(picture()) * share + 255 * (1 - share), atol=1)


def test_an_opaque_alpha_channel_is_no_mask() -> None:
    image, mask = read_picture(encoded(picture().convert("RGBA")), "a.png")
    assert mask is None
    np.testing.assert_array_equal(pixels(image), pixels(picture()))


def test_grey_with_alpha() -> None:
    grey = Image.linear_gradient("L").resize((32, 32))
    image, mask = read_picture(encoded(Image.merge("LA", (grey, Image.new("L", (32, 32), 0)))), "a.png")
    assert mask is not None
    assert (pixels(image) == 255).all()
    opaque = read_image(encoded(Image.merge("LA", (grey, Image.new("L", (32, 32), 255)))), "a.png")
    np.testing.assert_array_equal(pixels(opaque), pixels(grey.convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_grey(form: str) -> None:
    grey = Image.linear_gradient("L").resize((64, 64))
    values = pixels(read_image(encoded(grey, form), "a"))
    assert (values[..., 0] == values[..., 1]).all()
    assert (values[..., 1] == values[..., 2]).all()
    assert np.abs(values[..., 0].astype(int) - pixels(grey)).max() <= 4


def test_black_and_white() -> None:
    bits = Image.linear_gradient("L").resize((32, 32)).point(lambda value: 255 * (value > 100)).convert("1")
    np.testing.assert_array_equal(pixels(read_image(encoded(bits), "a.png"))[..., 0], pixels(bits.convert("L")))


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    image = read_image(encoded(Image.fromarray(values)), "a.png")
    np.testing.assert_array_equal(pixels(image)[..., 0], np.rint(values / 257).astype(np.uint8))


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    values = np.full((16, 16), 30_000, np.uint16)
    values[:8] = 1000
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    image, mask = read_picture(png(16, 16, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 1000))), "a.png")
    assert mask is not None
    assert (pixels(mask)[:8] == 0).all()
    assert (pixels(mask)[8:] == 255).all()
    assert tuple(pixels(image)[0, 0]) == (255, 255, 255)
    assert tuple(pixels(image)[15, 0]) == (117, 117, 117)


def test_sixteen_bit_colour_with_a_transparent_value() -> None:
    rows = b"".join(
        b"\0" + (struct.pack(">HHH", 0x8000, 0x4000, 0xC000) if y < 8 else bytes(6)) * 16 for y in range(16)
    )
    clear = chunk(b"tRNS", struct.pack(">HHH", 0x8000, 0x4000, 0xC000))
    image, mask = read_picture(png(16, 16, 16, 2, rows, clear), "a.png")
    assert mask is not None
    assert tuple(pixels(image)[0, 0]) == (255, 255, 255)
    assert tuple(pixels(image)[15, 0]) == (0, 0, 0)
    opaque = read_image(png(16, 16, 16, 2, rows), "a.png")
    assert tuple(pixels(opaque)[0, 0]) == (0x80, 0x40, 0xC0)


def test_palette_with_and_without_transparency() -> None:
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    palette.paste(0, (0, 0, 32, 8))
    plain = read_picture(encoded(palette), "a.png")
    assert plain.mask is None
    assert tuple(pixels(plain.image)[0, 0]) == (255, 0, 0)
    for transparency in (0, bytes([0, 255, 255])):
        image, mask = read_picture(encoded(palette, transparency=transparency), "a.png")
        assert mask is not None
        assert tuple(pixels(image)[0, 0]) == (255, 255, 255)
        assert tuple(pixels(image)[31, 0]) == (0, 0, 255)


def test_a_cmyk_jpeg_has_its_colours() -> None:
    for rgb in ((250, 10, 10), (20, 180, 60), (255, 255, 255), (0, 0, 0)):
        solid = Image.new("RGB", (32, 32), rgb)
        image = read_image(encoded(solid.convert("CMYK"), "JPEG", quality=95), "a.jpg")
        assert np.abs(pixels(image).astype(int) - np.array(rgb)).max() <= 6


def test_an_srgb_profile_changes_nothing_and_a_bad_one_neither() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (srgb, b"no profile at all"):
        np.testing.assert_array_equal(pixels(read_image(encoded(picture(), icc_profile=icc), "a")), pixels(picture()))


def test_another_profile_is_converted() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # does not fit RGB: plain
    np.testing.assert_array_equal(pixels(read_image(encoded(picture(), icc_profile=lab), "a")), pixels(picture()))
    linear = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name in ("sRGB".encode("utf-16-be"), b"sRGB"):
        linear = linear.replace(name, "wide".encode("utf-16-be") if len(name) == 8 else b"wide")
    red = linear.find(b"rXYZ")  # the tag table's entry: its offset follows; swapping red for green shows at once
    green = linear.find(b"gXYZ")
    linear[red + 4 : red + 8], linear[green + 4 : green + 8] = linear[green + 4 : green + 8], linear[red + 4 : red + 8]
    image = read_image(encoded(Image.new("RGB", (32, 32), (200, 30, 30)), icc_profile=bytes(linear)), "a.png")
    red_value, green_value, _ = pixels(image)[0, 0].tolist()
    assert green_value > red_value


def test_a_phones_mpo_is_one_photo() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture()], quality=95)
    assert read_image(data, "IMG_1.jpg").size == (48, 32)


def test_a_phones_200_megapixels_are_read_scaled_down_in_bounded_memory(tmp_path: Path) -> None:
    """Whole, the pixels alone would take 600 MB."""
    file = tmp_path / "large.jpg"
    file.write_bytes(tall_jpeg(16_384, 12_288))
    code = (
        "import resource, sys; from training.storage.images import read_image;"
        "data = open(sys.argv[1], 'rb').read();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        "image = read_image(data, 'large.jpg');"
        "print(*image.size, *image.getpixel((1, 1)), *image.getpixel((4090, 3070)), (peak() - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True, text=True)
    width, height, red, green, _, last_red, last_green, _, mib = map(int, done.stdout.split())
    assert (width, height) == (4096, 3072)
    assert red < 5 and green > 250 and last_red > 250 and last_green < 5
    assert mib < 250


@pytest.mark.parametrize(("most", "factor"), [(600 * 400, 1), (599 * 400, 2), (300 * 200, 2), (299 * 200, 4), (1, 8)])
def test_a_scaled_down_reading_is_the_same_picture(most: int, factor: int) -> None:
    image = read_image(encoded(picture(600, 400), "JPEG", quality=95), "a.jpg", ImageLimits(max_pixels=most))
    assert image.size == (600 // factor, 400 // factor)
    expected = read_image(encoded(picture(600, 400), "JPEG", quality=95), "a.jpg").reduce(factor)
    assert np.abs(pixels(image).astype(int) - pixels(expected)).mean() < 4


def test_a_scaled_down_reading_is_upright() -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    data = encoded(picture(600, 400), "JPEG", exif=exif)
    assert read_image(data, "a.jpg", ImageLimits(max_side_px=300)).size == (200, 300)


# -- what is not


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "empty: 0 bytes")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "empty: 0 bytes", "a.jpg: empty: 0 bytes")


def test_empty() -> None:
    assert reason(b"") == "empty: 0 bytes"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, form)
    for share in (0.3, 0.6, 0.9):
        assert "truncated" in reason(data[: int(len(data) * share)]) or "corrupt" in reason(
            data[: int(len(data) * share)]
        )
    assert "corrupt or truncated" in reason(data[:14])


def test_corrupt_pixels() -> None:
    rows = bytearray(zlib.compress(b"\0" * (32 * 97)))
    rows[4:10] = b"\xff" * 6
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", bytes(rows)) + chunk(b"IEND", b"")
    assert "corrupt" in reason(data) or "truncated" in reason(data)


def test_text_named_jpg() -> None:
    assert reason(b"a photo of a cat\n" * 9) == "not an image: neither JPEG, PNG nor WebP"


@pytest.mark.parametrize(("form", "kind"), [("GIF", "a GIF"), ("BMP", "a BMP"), ("TIFF", "a TIFF or raw photo")])
def test_other_formats_are_named(form: str, kind: str) -> None:
    assert reason(encoded(picture(), form)) == f"{kind}, not one of JPEG, PNG, WebP"


def test_heic_and_pdf_are_named() -> None:
    assert reason(b"\0\0\0\x18ftypheic" + bytes(40)) == "a HEIC photo, not one of JPEG, PNG, WebP"
    assert reason(b"%PDF-1.7" + bytes(40)) == "a PDF, not one of JPEG, PNG, WebP"


def test_postscript_never_reaches_an_interpreter() -> None:
    assert "not an image" in reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animated(form: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
    assert reason(data) == "animated: 3 frames, at most 1"


def test_too_small() -> None:
    assert reason(encoded(Image.new("RGB", (1, 1)))) == "too small: 1x1 px, at least 16 px a side"
    limits = ImageLimits(min_side_px=128)
    assert reason(encoded(Image.new("RGB", (400, 100))), limits) == "too small: 400x100 px, at least 128 px a side"


def test_too_narrow() -> None:
    assert "too narrow: 400x20 px, at most 8 times" in reason(encoded(Image.new("RGB", (400, 20))))


def test_too_many_bytes() -> None:
    assert reason(bytes(3 << 20), ImageLimits(max_bytes=1 << 20)) == "too many bytes: 3.0 MiB, at most 1 MiB"


def test_a_png_bomb_is_refused_by_its_header() -> None:
    rows = zlib.compress(bytes(1 << 20))
    for side in (9000, 20_000, 60_000):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        assert reason(bomb).startswith(f"too large (decompression bomb?): {side}x{side} px, at most 8192 px a side")


def test_pixels_are_counted_as_well_as_sides() -> None:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8000, 8000, 8, 2, 0, 0, 0))
    assert "8000x8000 px, at most 8192 px a side and 40 megapixels" in reason(b"\x89PNG\r\n\x1a\n" + head)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_a_webps_size_is_known_from_its_header(options: dict[str, object]) -> None:
    assert declared_size(encoded(picture(), "WEBP", **options)) == (48, 32)


def test_a_webp_bomb_is_refused_by_its_header() -> None:
    canvas = (16_000 - 1).to_bytes(3, "little") * 2
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + canvas
    assert "16000x16000 px" in reason(b"RIFF" + struct.pack("<I", len(body)) + body)


def claiming(side: int) -> bytes:
    """A small JPEG whose header declares a square of `side` px."""
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    frame = data.find(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize("side", [16_000, 60_000])
def test_a_jpeg_bomb_is_refused_by_its_header(side: int) -> None:
    assert "decompression bomb" in reason(claiming(side))
    assert "at most 250 megapixels" in reason(claiming(side))


def test_a_jpeg_that_only_claims_to_be_large_costs_what_a_small_one_does() -> None:
    assert read_image(claiming(9000), "a.jpg").size == (4500, 4500)


def test_a_large_jpeg_that_must_be_held_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scan of all components passes by row by row; everything else is held, whatever size is wanted."""
    monkeypatch.setattr(image_file, "MAX_JPEG_HELD_BYTES", 600 * 400 * 3)
    for subsampling in (0, 2):  # 4:4:4, 4:2:0
        assert read_image(encoded(picture(600, 400), "JPEG", subsampling=subsampling), "a.jpg").size == (600, 400)
    assert read_image(encoded(picture(600, 400), "JPEG", progressive=True), "a.jpg").size == (600, 400)
    refused = reason(encoded(picture(600, 400), "JPEG", progressive=True, subsampling=0))
    assert "too large for a progressive JPEG: 600x400 px" in refused and "save it as a baseline JPEG" in refused


def test_the_larger_a_jpeg_the_fewer_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "MAX_JPEG_SCANNED_PIXELS", 600 * 400 * 5)
    assert "too many JPEG scans: 10, at most 5" in reason(encoded(picture(600, 400), "JPEG", progressive=True))
    assert read_image(encoded(picture(300, 200), "JPEG", progressive=True), "a.jpg").size == (300, 200)


@pytest.mark.parametrize("filler", [b"\xff\xfe\x00\x02", b"\xff", b"\x00", b"\xff\xd0"])
def test_a_jpeg_header_that_does_not_end_is_refused(filler: bytes) -> None:
    """Pillow walks it in Python, a segment or a byte at a time."""
    data = encoded(picture(), "JPEG")
    assert "header does not end" in reason(data[:20] + filler * 20_000 + data[20:])
    few = data[:20] + b"\xff\xfe\x00\x02" * 600 + data[20:]
    assert read_image(few, "a.jpg").size == (48, 32)


# -- read at the size that is wanted


@pytest.mark.parametrize(("about_px", "size"), [(999, (320, 480)), (160, (160, 240)), (60, (80, 120)), (9, (40, 60))])
def test_a_jpeg_is_scaled_down_while_it_is_decoded(about_px: int, size: tuple[int, int]) -> None:
    """Upright, no smaller than asked for, and close to the whole image scaled down."""
    whole = Image.radial_gradient("L").resize((480, 320)).convert("RGB")
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    data, limits = encoded(whole, "JPEG", quality=95, exif=exif), ImageLimits(min_side_px=1)
    assert count_pixels(data, "a.jpg", limits, about_px) == size[0] * size[1]
    image = read_image(data, "a.jpg", limits, about_px)
    assert image.size == size
    expected = whole.transpose(Image.Transpose.ROTATE_270).resize(size, Image.Resampling.BOX)
    assert np.abs(pixels(image).astype(int) - pixels(expected).astype(int)).mean() < 6


def test_a_jpeg_of_100_megapixels_is_read_within_the_limits_of_what_is_decoded() -> None:
    data = encoded(Image.new("L", (10_000, 10_000), 128), "JPEG")
    assert count_pixels(data, "a.jpg", about_px=1024) == 1250**2
    assert read_image(data, "a.jpg", about_px=1024).size == (1250, 1250)


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {}), ("JPEG", {"progressive": True})])
def test_what_must_be_decoded_whole_counts_whole(form: str, options: dict[str, Any]) -> None:
    data = encoded(picture(), form, **options)
    assert count_pixels(data, "a", about_px=8) == 48 * 32
    limits = ImageLimits(max_pixels=1000)
    with pytest.raises(ImageError, match="too large"):
        count_pixels(data, "a", limits, about_px=8)
    with pytest.raises(ImageError, match="too large"):
        read_image(data, "a", limits, about_px=8)


def test_a_jpeg_of_many_scans_is_refused_before_it_takes_hours() -> None:
    data = encoded(picture(), "JPEG", progressive=True)
    scan = data.rfind(b"\xff\xda")
    many = data[:-2] + data[scan:-2] * (MAX_JPEG_SCANS + 1) + data[-2:]
    assert "too many JPEG scans" in reason(many)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_give_an_image_or_an_image_error(form: str) -> None:
    data = encoded(picture(), form, exif=Image.Exif())
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            damaged[at] = rng.integers(0, 256)
        try:
            assert read_image(bytes(damaged), "a").mode == "RGB"
        except ImageError as error:
            assert error.reason


# -- reports


def test_a_thumbnail_is_small_and_shows_the_whole_image() -> None:
    small = Image.open(io.BytesIO(thumbnail(picture(400, 200), 96)))
    assert (small.format, small.size) == ("WEBP", (96, 48))
    assert Image.open(io.BytesIO(thumbnail(picture(20, 10)))).size == (20, 10)

"""Start pictures: looked at before they are decoded, decoded in turn, upright and with the right greys."""

import base64
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from serving.engine.pictures import decoding
from serving.engine.pictures.codec import MAX_PIXELS, count, decode
from serving.engine.pictures.decoding import PIXELS, WAITING, Decoding
from serving.errors import NotReady, QueueFull, Refused
from tests.serving.http.test_api import World, problem
from training.base.base import Base
from training.storage.images import ORIENTATION_TAG


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixel."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


class Gate:
    """Stands for `decode`: a picture is done when the test lets its tenant's name through."""

    def __init__(self) -> None:
        self.open: dict[bytes, threading.Event] = {}
        self.begun: list[bytes] = []
        self.begins = threading.Condition()

    def __call__(self, data: bytes, width: int, height: int) -> Tensor:
        with self.begins:
            self.begun.append(data)
            self.begins.notify_all()
        assert self.open.setdefault(data, threading.Event()).wait(10)
        return torch.zeros(3, height, width, dtype=torch.uint8)

    def wait(self, number: int) -> list[bytes]:
        """The first `number` pictures whose decoding began."""
        with self.begins:
            assert self.begins.wait_for(lambda: len(self.begun) >= number, 10)
        return self.begun[:number]

    def let(self, *names: bytes) -> None:
        for name in names:
            self.open.setdefault(name, threading.Event()).set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Pictures are their names; `b"...big"` takes the whole budget."""
    gate = Gate()
    monkeypatch.setattr(decoding, "decode", gate)
    monkeypatch.setattr(decoding, "count", lambda data, *_: PIXELS if data.endswith(b"big") else 1)
    return gate


@pytest.fixture
def queue() -> Iterator[Decoding]:
    queue = Decoding()
    yield queue
    queue.close()


def submit(queue: Decoding, *names: str) -> "list[Future[Tensor]]":
    """`a1` is tenant a's first picture."""
    return [queue.submit(name[0], name.encode(), 8, 8) for name in names]


def test_a_flood_of_one_tenant_leaves_a_thread_for_others(queue: Decoding, gate: Gate) -> None:
    flood = submit(queue, *(f"a{number}" for number in range(WAITING)))
    (other,) = submit(queue, "b1")
    assert set(gate.wait(2)) == {b"a0", b"b1"}
    gate.let(b"b1")
    assert other.result(10).shape == (3, 8, 8) and not any(one.done() for one in flood)
    gate.let(*(f"a{number}".encode() for number in range(WAITING)))
    assert flood[-1].result(10) is not None


def test_tenants_take_turns(queue: Decoding, gate: Gate) -> None:
    submit(queue, "x1", "y1")
    gate.wait(2)
    last = submit(queue, "a1", "a2", "a3", "b1", "b2", "c1")
    gate.let(b"a1", b"a2", b"a3", b"b1", b"b2", b"c1", b"x1")  # y1 keeps one thread
    for one in last:
        one.result(10)
    assert gate.begun[2:] == [b"a1", b"b1", b"c1", b"a2", b"b2", b"a3"]
    gate.let(b"y1")


def test_pixels_at_once_are_bounded(queue: Decoding, gate: Gate) -> None:
    submit(queue, "a-big")
    gate.wait(1)
    others = submit(queue, "b-big", "c1")
    assert gate.begun == [b"a-big"]
    gate.let(b"a-big")
    assert gate.wait(2)[1] == b"b-big"
    gate.let(b"b-big", b"c1")
    assert all(one.result(10) is not None for one in others)


def test_a_tenant_may_have_only_so_many_waiting(queue: Decoding, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(queue, *(f"a{number}" for number in range(WAITING + 1)))
    with pytest.raises(QueueFull):
        submit(queue, "a-more")
    monkeypatch.setattr(decoding, "WAITING_BYTES", 12)
    submit(queue, "b-running", "b-12-letters")  # one waits whatever it takes
    with pytest.raises(QueueFull):
        submit(queue, "b3")
    gate.let(b"b-running", b"b-12-letters", *(f"a{number}".encode() for number in range(WAITING + 1)))


def test_a_picture_that_nobody_waits_for_is_not_decoded(queue: Decoding, gate: Gate) -> None:
    _, left, last = submit(queue, "a1", "a2", "a3")
    assert left.cancel()
    gate.let(b"a1", b"a3")
    assert last.result(10) is not None
    assert b"a2" not in gate.begun


def test_a_picture_that_cannot_be_decoded_ends_its_own_request_only(queue: Decoding) -> None:
    bad, good = (
        queue.submit("a", data, 8, 8)
        for data in (encoded(Image.new("L", (9, 9)))[:-30], encoded(Image.new("L", (9, 9))))
    )
    with pytest.raises(Refused, match="truncated|corrupt"):
        bad.result(10)
    assert good.result(10).shape == (3, 8, 8)


def test_a_closed_queue_refuses(queue: Decoding) -> None:
    queue.close()
    with pytest.raises(NotReady):
        queue.submit("a", encoded(Image.new("L", (9, 9))), 8, 8)


# -- looked at before


@pytest.mark.parametrize("route", ["/v1/images/generations", "/sdapi/v1/img2img"])
def test_a_large_picture_is_refused_by_its_header(
    tiny: Base, tiny_folder: Path, tmp_path: Path, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "decode", lambda *_: 1 / 0)
    world = World(tiny, tiny_folder, tmp_path, keys=False)
    field, many = ("image", False) if route.startswith("/v1") else ("init_images", True)
    try:
        for width, height in ((8192, 8192), (100_000, 1)):
            sent = base64.b64encode(png_header(width, height)).decode()
            answer = world.call("POST", route, json={"prompt": "a dog", field: [sent] if many else sent})
            error = problem(answer, 400)
            assert error["param"] == field and f"{width}x{height}" in error["message"]
    finally:
        world.loop.close()


def test_a_photo_of_48_megapixels_is_taken_scaled_and_one_of_24_whole() -> None:
    phone = encoded(Image.new("RGB", (8000, 6000), (200, 30, 30)), "JPEG", quality=30)
    assert count(phone, 512, 512) == 1000 * 750
    assert decode(phone, 512, 512).shape == (3, 512, 512)
    assert count(png_header(6000, 4000), 512, 512) == MAX_PIXELS
    with pytest.raises(Refused, match="6000x4001"):
        count(png_header(6000, 4001), 512, 512)


# -- the reader is the one for photos


def test_a_picture_comes_upright() -> None:
    wide = Image.new("RGB", (48, 32), (0, 0, 255))
    wide.paste((255, 0, 0), (0, 0, 24, 32))  # left half red
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6  # stored turned left: its left is the top
    for form in ("PNG", "JPEG", "WEBP"):
        pixels = decode(encoded(wide, form, exif=exif), 32, 48)
        assert pixels[0, :20].min() > 190 and pixels[0, 28:].max() < 60, form


def test_grey_of_16_bits_keeps_its_values() -> None:
    values = np.array([[0, 16384], [32768, 65535]], np.uint16).repeat(8, 0).repeat(8, 1)
    pixels = decode(encoded(Image.fromarray(values)), 16, 16)
    found = [pixels[0, y, x].item() for y, x in ((2, 2), (2, 13), (13, 2), (13, 13))]
    assert found == pytest.approx([0, 64, 128, 255], abs=2)


def test_transparency_lies_on_white() -> None:
    clear: Any = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert decode(encoded(clear), 16, 16).min() == 255


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    with pytest.raises(Refused, match="scans"):
        decode(data[:at] + data[at:-2] * 200 + data[-2:], 16, 16)

"""Captions are found beside photos and in one file; every line that is not understood is named."""

import pytest

from training.photos.captions import MAX_CAPTION_CHARS, MAX_FILE_BYTES, captions

PHOTOS = ["a.jpg", "b.png", "c: d.webp"]


def test_beside_a_photo() -> None:
    found, warnings = captions({"a.txt": b"a cat\n on  a sofa\n", "notes.txt": b"\xff not ours"}, PHOTOS)
    assert found == {"a.jpg": "a cat on a sofa"}
    assert warnings == ()


def test_one_file_with_colons_tabs_comments_and_a_byte_order_mark() -> None:
    text = "\ufeff# mine\r\n\r\na.jpg: a cat: asleep\r\nc: d.webp\ta dog\r\n"
    found, warnings = captions({"captions.txt": text.encode()}, PHOTOS)
    assert found == {"a.jpg": "a cat: asleep", "c: d.webp": "a dog"}
    assert warnings == ()


def test_a_photos_own_file_wins() -> None:
    found, _ = captions({"a.txt": b"mine", "captions.txt": b"a.jpg: theirs\nb.png: other"}, PHOTOS)
    assert found == {"a.jpg": "mine", "b.png": "other"}


def test_bad_lines_are_named() -> None:
    text = b"a.jpg: a cat\nno separator\nz.jpg: nobody\na.jpg: again\nb.png:   \n"
    found, (warning,) = captions({"captions.txt": text}, PHOTOS)
    assert found == {"a.jpg": "a cat"}
    assert warning.kind == "caption"
    assert warning.names == ("captions.txt",)
    for part in ("line 2: neither", "line 3: no photo named z.jpg", "line 4: a.jpg has", "line 5: empty caption"):
        assert part in warning.message


def test_a_thousand_bad_lines_stay_readable() -> None:
    _, (warning,) = captions({"captions.txt": b"nonsense\n" * 1000}, PHOTOS)
    assert "and 980 more" in warning.message
    assert len(warning.message) < 3000


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty caption"),
        (b"caf\xe9", "not UTF-8 text at byte 3"),
        (b"a cat \x1b[2J", "control characters"),
        (b"x" * (MAX_CAPTION_CHARS + 1), f"{MAX_CAPTION_CHARS + 1} characters, at most {MAX_CAPTION_CHARS}"),
        (b"x" * (MAX_FILE_BYTES + 1), "too long"),
    ],
)
def test_unusable_files_are_warnings(data: bytes, problem: str) -> None:
    found, (warning,) = captions({"a.txt": data}, PHOTOS)
    assert found == {}
    assert warning.names == ("a.txt",)
    assert problem in warning.message

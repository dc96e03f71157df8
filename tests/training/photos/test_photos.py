"""A subject's files: good ones are kept, bad ones named with reasons, and too few good ones stop the subject."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.subjects import spec
from training.errors import UserError
from training.photos import files as files_module, photo_report
from training.photos.files import PhotoFile, list_photo_files, read_files
from training.photos.intake import fingerprint
from training.photos.photo_report import Rejected, TooFewPhotos
from training.photos.photos import photos
from training.storage.image_file import MIB, ImageLimits
from training.storage.storage import LocalStorage


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def files(count: int = 6) -> list[PhotoFile]:
    return [PhotoFile(f"{i}.png", encoded(picture(i))) for i in range(count)]


def test_good_photos_come_sorted_with_hash_size_and_caption() -> None:
    several = files()
    found = photos([*several[::-1], PhotoFile("2.txt", b"a box")], resolution=64)
    assert [photo.name for photo in found.good] == [file.name for file in several]
    assert found.good[1].sha256 == hashlib.sha256(several[1].data).hexdigest()
    assert [photo.caption for photo in found.good] == [None, None, "a box", None, None, None]
    assert found.good[0].source_size == (64, 64)
    assert (found.rejected, found.warnings) == ((), ())
    np.testing.assert_array_equal(np.asarray(found.good[3].image), np.asarray(picture(3)))


def test_notes_hidden_files_and_sidecars_are_no_photos() -> None:
    beside = [".DS_Store", "._0.png", ".hidden.jpg", "Thumbs.db", "desktop.ini", "notes.txt", "meta.json", "0.npz"]
    found = photos([*files(), *(PhotoFile(name, b"anything") for name in beside)], resolution=64)
    assert len(found.good) == 6
    assert found.rejected == ()


def test_bad_files_are_named_and_the_subject_goes_on() -> None:
    bad = [
        PhotoFile("a.jpg", b""),
        PhotoFile("b.jpg", b"some text"),
        PhotoFile("c.png", encoded(picture(9))[:100]),
        PhotoFile("d.png", encoded(Image.new("RGB", (1, 1)))),
        PhotoFile("e.gif", encoded(picture(9), "GIF")),
        PhotoFile("f.jpg", b"", "unreadable: Permission denied"),
        PhotoFile("g.mov", b"\0\0\0\x14ftypqt  " + bytes(20)),
    ]
    found = photos([*files(), *bad], resolution=64)
    assert len(found.good) == 6
    reasons = {file.name: file.reason for file in found.rejected}
    assert list(reasons) == [file.name for file in bad]
    assert reasons["a.jpg"] == "empty: 0 bytes"
    assert reasons["d.png"] == "too small: 1x1 px, at least 16 px a side"
    assert reasons["f.jpg"] == "unreadable: Permission denied"
    assert reasons["g.mov"] == "a video, not one of JPEG, PNG, WebP"


def test_too_few_lists_every_reason_and_pickles() -> None:
    with pytest.raises(TooFewPhotos) as caught:
        photos([*files(4), PhotoFile("bad.jpg", b"text"), PhotoFile("empty.png", b"")], resolution=64)
    assert isinstance(caught.value, UserError)
    message = str(caught.value)
    assert "4 usable, at least 5 needed" in message
    assert "bad.jpg: not an image" in message
    assert "empty.png: empty" in message
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.good, again.needed, again.rejected) == (message, 4, 5, caught.value.rejected)
    assert again.rejected[1] == Rejected("empty.png", "empty: 0 bytes")


def test_fewer_are_enough_when_asked_for_but_warned_about() -> None:
    found = photos(files(3), resolution=64, min_photos=3)
    assert [warning.kind for warning in found.warnings] == ["few"]
    with pytest.raises(TooFewPhotos, match="0 usable, at least 1 needed"):
        photos([], min_photos=1)


def test_the_smallest_side_follows_the_resolution() -> None:
    assert len(photos(files(), resolution=256).good) == 6
    with pytest.raises(TooFewPhotos, match="too small: 64x64 px, at least 128 px a side"):
        photos(files(), resolution=512)
    with pytest.raises(TooFewPhotos, match="at least 65 px a side"):
        photos(files(), resolution=64, min_side_px=65)


def test_large_photos_and_their_masks_are_kept_small() -> None:
    rgba = picture(1, 400, 600)
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    (photo,) = photos([PhotoFile("a.png", encoded(rgba))], resolution=64, min_photos=1).good
    assert photo.source_size == (400, 600)
    assert photo.mask is not None
    assert photo.image.size == photo.mask.size == (128, 192)


def test_findings_of_captions_and_of_pictures_are_reported_together() -> None:
    copy = PhotoFile("copy.png", files()[0].data)
    found = photos([*files(), copy, PhotoFile("captions.txt", b"9.png: nobody")], resolution=64)
    assert [warning.kind for warning in found.warnings] == ["identical", "caption"]


def test_class_images_are_read_without_a_report() -> None:
    several = [PhotoFile(f"{i}.png", files()[0].data) for i in range(300)]
    found = photos(several, resolution=64, max_photos=1000, with_report=False)
    assert len(found.good) == 300
    assert found.warnings == ()


def test_backgrounds_that_cannot_be_replaced_are_a_warning() -> None:
    clear = picture(9).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 100))
    mixed = [*files(), PhotoFile("9.png", encoded(clear))]
    (warning,) = (one for one in photos(mixed, resolution=64, backgrounds=2).warnings if one.kind == "mask")
    assert warning.names == tuple(f"{index}.png" for index in range(6)) and "transparency" in warning.message
    assert not any(one.kind == "mask" for one in photos(mixed, resolution=64).warnings)


def test_face_crop_without_its_detector_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_report, "can_find_faces", lambda: False)
    (warning,) = photos(files(), resolution=64, crop="face").warnings
    assert warning.kind == "face"
    assert "dlib" in warning.message
    monkeypatch.setattr(photo_report, "can_find_faces", lambda: True)
    monkeypatch.setattr(photo_report, "find_face", lambda _: None)
    (warning,) = photos(files(), resolution=64, crop="face").warnings
    assert "No face found" in warning.message


def test_limits_of_number_and_names() -> None:
    with pytest.raises(UserError, match="Too many photos: 201, at most 200"):
        photos([PhotoFile(f"{i}.png", b"") for i in range(201)])
    with pytest.raises(UserError, match="at most 4"):
        photos(files(5), resolution=64, max_photos=4)
    with pytest.raises(UserError, match="same name"):
        photos([*files(), files()[0]])


# -- folders


def test_a_folder_is_read_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", ".hidden.png", "a.txt"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "more").mkdir()
    found = list_photo_files(tmp_path)
    assert found == tuple(PhotoFile(name, name.encode()) for name in ("a.JPG", "a.txt", "b.png"))


def test_a_subfolder_is_said_and_is_no_part_of_the_training(tmp_path: Path) -> None:
    for file in files():
        (tmp_path / file.name).write_bytes(file.data)
    flat = list_photo_files(tmp_path)
    for name in ("empty", ".thumbnails", "trip/day 2"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("trip/a.jpg", "trip/day 2/b.jpg", "trip/notes.txt", ".thumbnails/a.jpg"):
        (tmp_path / name).write_bytes(b"x")
    nested = list_photo_files(tmp_path)
    found = photos(nested, resolution=64)
    assert found.refusals == (
        "trip/ is not used: a subfolder, which is not searched; move its files (2) up if they belong here",
    )
    with pytest.raises(TooFewPhotos, match=r"trip/: a subfolder, which is not searched"):
        photos(nested, resolution=64, min_photos=7)
    assert fingerprint(spec("rusty"), "base", nested) == fingerprint(spec("rusty"), "base", flat)
    storage = LocalStorage(str(tmp_path.parent))
    uploaded = read_files(spec("rusty").model_copy(update={"images": f"storage:{tmp_path.name}"}), storage)
    assert [file.name for file in uploaded if file.is_folder] == ["trip/"]


def test_folders_that_cannot_be_used_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No folder .*missing\. Give the folder"):
        list_photo_files(tmp_path / "missing")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file is a file\. Give the folder"):
        list_photo_files(tmp_path / "file")
    empty = tmp_path / "empty"
    (empty / "photos").mkdir(parents=True)
    (empty / "notes.txt").write_text("nothing")
    with pytest.raises(
        UserError, match=r"No photos in .*subfolders \(photos\) are not searched.*Put JPEG, PNG or WebP"
    ):
        list_photo_files(empty)


def test_what_cannot_be_read_is_a_problem_of_that_file(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(b"x")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    problems = {file.name: file.problem for file in list_photo_files(tmp_path)}
    assert problems == {
        "good.png": "",
        "lost.png": "unreadable: No such file or directory",
        "pipe.png": "unreadable: not a regular file",
    }


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(300 * MIB)
    (file_read,) = list_photo_files(tmp_path)
    assert len(file_read.data) == ImageLimits().max_bytes + 1


def test_a_folder_of_too_many_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MAX_TOTAL_BYTES", MIB)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(bytes(MIB))
    with pytest.raises(UserError, match="holds more than 1 MiB"):
        list_photo_files(tmp_path)


def test_reading_photos_needs_no_torch() -> None:
    code = "import sys, training.photos.photos, training.photos.variants; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

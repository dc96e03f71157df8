"""What a submission reads: every file once a process, also when it is copied to the storage."""

from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_images
from tests.training.subjects import spec
from training.errors import UserError
from training.photos import files
from training.photos.files import FileCache, PhotoFile
from training.run.submission import settle, submit
from training.storage.storage import open_storage


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of photos in the order in which their files are read."""
    seen: list[str] = []
    read = files._read_file

    def watched(path: Path) -> PhotoFile:
        seen.append(f"{path.parent.name}/{path.name}")
        return read(path)

    monkeypatch.setattr(files, "_read_file", watched)
    return seen


def test_photos_that_are_copied_to_the_storage_are_read_once(
    tmp_path: Path, tiny_folder: Path, reads: list[str]
) -> None:
    for id in ("a", "b"):
        tiny_images(tmp_path / id)
    subjects = [{"id": id, "images": id, "class": "dog"} for id in ("a", "b")]
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "name": "pets", "base": str(tiny_folder), "subjects": subjects}))
    storage = open_storage(str(tmp_path / "storage"))
    submission = submit(path, storage, upload=True)
    records = settle(submission)
    assert [record.state for record in records] == ["queued", "queued"]
    assert sorted(reads) == [f"{id}/{index}.png" for id in ("a", "b") for index in range(5)]
    for subject, record in zip(submission.record.manifest.subjects, records, strict=True):
        key = subject.images.removeprefix("storage:")
        assert storage.get(f"{key}/0.png") == (tmp_path / subject.id / "0.png").read_bytes()
        assert record.fingerprint is not None


def test_a_cache_keeps_what_it_has_room_for(tmp_path: Path, reads: list[str]) -> None:
    size = sum(path.stat().st_size for path in tiny_images(tmp_path / "a").iterdir())
    tiny_images(tmp_path / "b", seed=1)
    a, b = (spec(id).model_copy(update={"images": id}) for id in ("a", "b"))
    cache = FileCache(open_storage(str(tmp_path / "storage")), str(tmp_path), room=size)
    assert cache.read(a) == cache.read(a) and len(reads) == 5
    assert cache.read(b) == cache.read(b) and len(reads) == 15, "there is no room for both"
    assert cache.take_out("b") is None and len(cache.take_out("a") or ()) == 5
    assert cache.read(b) == cache.read(b) and len(reads) == 20, "what was taken makes room"
    assert cache.take_out("a") is None
    with pytest.raises(UserError, match="No folder"):
        cache.read(a.model_copy(update={"id": "c", "images": "nowhere"}))

"""A run refuses subjects without the consent that they need, and those whose consent was taken back."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import tiny_images
from training.errors import UserError
from training.manifest.subject import SubjectSpec
from training.photos.intake import take_in
from training.run.personal import check_photos, forget_photos, photos_forgotten
from training.run.submission import Submission, read_manifest, settle, submit
from training.storage.consents import Revoked, list_consents
from training.storage.erasure import revoke
from training.storage.storage import open_storage

GIVEN = {
    "kind": "person", "granted_by": "Ann", "evidence": "a" * 64, "granted_at": "2026-01-01T00:00:00+00:00",
    "expires_at": "2096-01-01T00:00:00+00:00",
}  # fmt: skip


def manifest(folder: Path, base: Path, *subjects: dict[str, Any]) -> Path:
    for subject in subjects:
        tiny_images(folder / subject["images"], side=32)
    path = folder / "m.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "name": "m", "base": str(base), "subjects": list(subjects)}))
    return path


def test_validate_and_submit_refuse_a_person_without_consent_in_words(tmp_path: Path, tiny_folder: Path) -> None:
    path = manifest(tmp_path, tiny_folder, {"id": "ann", "images": "a", "class": "woman"})
    for look in (read_manifest, lambda path: submit(path, open_storage(str(tmp_path / "s")))):
        with pytest.raises(UserError, match="subject 'ann': it has no `consent`, and class 'woman' is a person"):
            look(path)


def photos(submission: Submission) -> tuple[SubjectSpec, Any]:
    (subject,) = submission.manifest.subjects
    return subject, take_in(subject, submission.files.read(subject), 16).photos.good


def test_what_was_taken_back_is_refused_by_id_and_by_photos_under_another_id(tmp_path: Path, tiny_folder: Path) -> None:
    storage = open_storage(str(tmp_path / "s"))
    ann = {"id": "ann", "images": "a", "class": "woman", "consent": GIVEN}
    submission = submit(manifest(tmp_path, tiny_folder, ann), storage)
    assert settle(submission)[0].state == "queued"
    subject, good = photos(submission)
    check_photos(submission.store, "default", subject, good)
    (record,) = list_consents(storage, "default")
    assert record.subject == "ann" and len(record.photos) == len(record.looks) == 5
    revoke(storage, "default", "ann", by="Ann", reason="revoked")
    with pytest.raises(Revoked, match="may not be trained again"):
        check_photos(submission.store, "default", subject, good)
    again = submit(manifest(tmp_path, tiny_folder, ann), storage)
    (settled,) = settle(again)
    assert settled.state == "failed" and "may not be trained again" in str(settled.reason)
    (other,) = settle(submit(manifest(tmp_path, tiny_folder, {"id": "pet", "images": "a", "class": "dog"}), storage))
    assert other.state == "failed" and "is one for which consent was taken back" in str(other.reason)


def test_copied_photos_go_when_training_is_done(tmp_path: Path, tiny_folder: Path) -> None:
    storage = open_storage(str(tmp_path / "s"))
    path = manifest(tmp_path, tiny_folder, {"id": "rex", "images": "a", "class": "dog"})
    submission = submit(path, storage, upload=True)
    (before,) = settle(submission)
    (subject,) = submission.record.manifest.subjects
    assert not photos_forgotten(submission.store, subject)
    submission.store.save_subject(before.model_copy(update={"state": "published", "version": "1"}))
    forget_photos(submission.store, "rex")
    assert photos_forgotten(submission.store, subject)
    assert storage.list(f"runs/{submission.record.run}/subjects/rex/images") == []

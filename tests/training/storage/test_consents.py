"""Consent records are immutable, the log is chained, and what is taken back is erased, with all that contains it."""

import io
import json
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.training.storage.test_registry import make_card
from training.storage import audit
from training.storage.consent import Consent
from training.storage.consents import (
    Revoked,
    check_unrevoked,
    consent_id,
    find_consent,
    keep_consent,
    list_consents,
    revocation_of,
)
from training.storage.erasure import containing, expire, export, revoke
from training.storage.picture_hash import NEAR, distance, picture_hash
from training.storage.registry import Registry
from training.storage.storage import Storage, content_id, open_storage
from training.storage.version import UnknownAdapter

YESTERDAY = datetime.now(UTC) - timedelta(days=1)
PHOTOS = (content_id(b"one"), content_id(b"two"))
LOOKS = ("00ff00ff00ff00ff",)


def agreed(**changes: object) -> Consent:
    fields = {"kind": "person", "granted_by": "Ann", "evidence": "a" * 64, "granted_at": YESTERDAY, **changes}
    return Consent.model_validate(fields)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def published(storage: Storage, id: str, weights: bytes, **card: Any) -> str:
    return Registry(storage).publish("default", id, weights, make_card(weights, **card)).version


def trained(storage: Storage, id: str) -> list[str]:
    """What a run leaves of a subject on the storage, and keys of another that stay."""
    storage.put("runs/r/run.json", json.dumps({"tenant": "default"}).encode())
    storage.put("runs/other/run.json", json.dumps({"tenant": "bob"}).encode())
    storage.put("cache/latents/abc.safetensors", b"latents")
    mine = [f"runs/r/subjects/{id}/{name}" for name in ("images/0.png", "checkpoints/1.safetensors", "state.json")]
    for key in [*mine, f"runs/r/subjects/{id}2/state.json", f"runs/other/subjects/{id}/state.json"]:
        storage.put(key, b"{}")
    storage.put(f"runs/r/subjects/{id}/latents.json", b'["cache/latents/abc.safetensors"]')
    return [*mine, f"runs/r/subjects/{id}/latents.json", "cache/latents/abc.safetensors"]


def test_dates_the_wrong_way_round_and_scopes_without_training_are_refused() -> None:
    with pytest.raises(ValueError, match="is not after `granted_at`"):
        agreed(expires_at=YESTERDAY - timedelta(days=1))
    with pytest.raises(ValueError, match="lacks 'train'"):
        agreed(scope=["generate"])
    with pytest.raises(ValueError, match="evidence"):
        agreed(evidence="a piece of paper")
    with pytest.raises(ValueError, match="granted_at"):
        agreed(granted_at="2026-01-01T00:00:00")  # without an offset


def test_a_record_is_written_once_and_named_by_its_content(storage: Storage) -> None:
    first = keep_consent(storage, "default", "ann", agreed(), PHOTOS, LOOKS)
    assert keep_consent(storage, "default", "ann", agreed(), reversed(PHOTOS), LOOKS) == first
    assert first.id == consent_id("ann", agreed()) == find_consent(storage, first.id).id
    assert len(list_consents(storage)) == 1 and [one.event for one in audit.entries(storage)] == ["granted"]
    assert consent_id("ann", agreed(granted_by="Eve")) != first.id


def test_the_log_shows_what_was_changed_removed_or_put_in(storage: Storage) -> None:
    for subject in ("a", "b", "c", "d"):
        audit.append(storage, "granted", "default", subject)
    whole = audit.verify(storage)
    assert (whole.entries, whole.broken) == (4, None)
    second = "audit/000000000002.json"
    before = storage.get(second)
    storage.put(second, before.replace(b'"b"', b'"x"'))
    assert audit.verify(storage).broken is not None and audit.verify(storage).entries == 2
    storage.delete(second)
    assert "missing" in str(audit.verify(storage).broken)
    storage.put(second, b"nonsense")
    assert "is no entry" in str(audit.verify(storage).broken)
    storage.put(second, before)
    assert audit.verify(storage) == whole


def test_revoking_erases_the_subject_and_everything_merged_from_it(storage: Storage) -> None:
    version = published(storage, "ann", b"1", image_hashes=PHOTOS, image_looks=LOOKS)
    published(storage, "mix", b"2", sources=(f"default/ann@{version}", "default/cat@0"))
    published(storage, "mix2", b"3", sources=("default/mix@1",))
    published(storage, "cat", b"4")
    record = keep_consent(storage, "default", "ann", agreed(), PHOTOS, LOOKS)
    gone = trained(storage, "ann")
    assert containing(storage, "default/ann") == ["default/ann", "default/mix", "default/mix2"]
    receipt = revoke(storage, "default", "ann", by="Ann", reason="revoked")
    assert receipt.id == record.id and not receipt.repeated
    assert set(receipt.adapters) == {"default/ann", "default/mix", "default/mix2"}
    assert set(gone) <= set(receipt.keys) and f"adapters/default/ann/{version}/adapter.safetensors" in receipt.keys
    assert not [key for key in receipt.keys if storage.exists(key)]
    for id in ("ann", "mix", "mix2"):
        with pytest.raises(UnknownAdapter):
            Registry(storage).resolve(f"default/{id}")
    assert Registry(storage).resolve("default/cat").id == "cat"
    assert storage.exists("runs/r/subjects/ann2/state.json") and storage.exists("runs/other/subjects/ann/state.json")
    again = revoke(storage, "default", "ann", by="Ann", reason="revoked")
    assert again.repeated and again.keys == ()
    assert [one.event for one in audit.entries(storage)] == ["granted", "revoked"]
    assert audit.verify(storage).broken is None


def test_it_may_not_be_trained_again_by_id_photo_or_looks(storage: Storage) -> None:
    keep_consent(storage, "default", "ann", agreed(), PHOTOS, LOOKS)
    check_unrevoked(storage, "default", "ann", PHOTOS, LOOKS)
    revoke(storage, "default", "ann", by="Ann", reason="revoked")
    for tenant, subject, photos, looks, said in (
        ("default", "ann", (), (), "taken back"),
        ("bob", "eve", PHOTOS[:1], (), "is one for which"),
        ("bob", "eve", (), ("00ff00ff00ff00fe",), "looks like one"),
    ):
        with pytest.raises(Revoked, match=said):
            check_unrevoked(storage, tenant, subject, photos, looks)
    check_unrevoked(storage, "bob", "ann", (content_id(b"three"),), ("ff00ff00ff00ff00",))


def test_expiry_revokes_by_itself_once(storage: Storage) -> None:
    keep_consent(storage, "default", "ann", agreed(), PHOTOS)
    assert expire(storage) == []
    keep_consent(storage, "default", "eve", agreed(expires_at=YESTERDAY + timedelta(hours=1)), PHOTOS)
    (receipt,) = expire(storage)
    assert (receipt.subject, receipt.reason) == ("eve", "expired") and expire(storage) == []
    assert revocation_of(storage, "default", "eve") is not None


def test_everything_about_a_subject_in_one_zip(storage: Storage) -> None:
    version = published(storage, "ann", b"1")
    keep_consent(storage, "default", "ann", agreed(), PHOTOS)
    kept = set(trained(storage, "ann")) - {"runs/other/subjects/ann/state.json"}
    packed = export(storage, "default", "ann")
    assert packed is not None
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        names = set(archive.namelist())
    assert kept <= names and f"adapters/default/ann/{version}/card.json" in names
    assert any(name.startswith("consents/default/") for name in names)
    assert not any("other" in name or "ann2" in name for name in names)
    assert export(storage, "default", "nobody") is None


def test_a_perceptual_hash_is_near_for_the_same_photo_and_far_for_others() -> None:
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96)) for _ in range(20)]
    for image in smooth:
        for same in (image.resize((50, 50)), image.filter(ImageFilter.GaussianBlur(1)), image.point(lambda v: v * 0.9)):
            assert distance(picture_hash(image), picture_hash(same)) <= NEAR
    hashes = [picture_hash(image) for image in smooth]
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > NEAR

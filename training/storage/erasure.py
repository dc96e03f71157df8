"""Revoking and erasing a subject: its adapters, what was merged from them, kept pictures, photos, latents, events.

Works on the storage alone, so that a server and a command do the same. What is copied to other places (exported files,
fused bases, pictures that were sent) is not there to be erased; `docs/provenance.md` says so.
"""

import io
import json
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

from pydantic import ValidationError

from training.storage import audit
from training.storage.card import Card
from training.storage.closed import Closed
from training.storage.consents import ConsentRecord, Revocation, list_consents, revocation_of
from training.storage.pictures import PictureStore
from training.storage.registry import Registry
from training.storage.storage import NotFound, Storage, content_id
from training.storage.version import UnknownAdapter

Reason = Literal["revoked", "expired", "erased", "reported"]
LATENTS = "latents.json"  # beside a subject's state: the cache keys of its latents


class Receipt(Closed):
    """What was erased. `keys` are the storage's; `repeated`: it had been revoked before."""

    id: str
    tenant: str
    subject: str
    time: str
    reason: Reason
    adapters: tuple[str, ...]
    keys: tuple[str, ...]
    repeated: bool = False


def revoke(storage: Storage, tenant: str, subject: str, *, by: str, reason: Reason) -> Receipt:
    """Takes a subject back for good, and returns the receipt, which is kept under `receipts/`. May be repeated."""
    before = revocation_of(storage, tenant, subject)
    records = [one for one in list_consents(storage, tenant) if one.subject == subject]
    adapters = containing(storage, f"{tenant}/{subject}") if before is None else list(before.adapters)
    photos, looks = _known_photos(storage, tenant, subject, records)
    revocation = before or Revocation(
        id=records[0].id if records else content_id(f"{tenant}/{subject}".encode())[:16],
        tenant=tenant,
        subject=subject,
        time=_now(),
        by=by,
        reason=reason,
        photos=tuple(sorted(photos)),
        looks=tuple(sorted(looks)),
        adapters=tuple(adapters),
    )
    key = f"revocations/{tenant}/{subject}/{revocation.id}.json"
    first = storage.create(key, revocation.model_dump_json().encode())  # from here on nothing is served
    erased = list(_erase(storage, tenant, subject, adapters))
    receipt = Receipt(
        id=revocation.id, tenant=tenant, subject=subject, time=_now(), reason=reason, adapters=tuple(adapters),
        keys=tuple(erased), repeated=not first,
    )  # fmt: skip
    if first or erased:
        name = content_id(receipt.model_dump_json().encode())[:8]
        storage.create(f"receipts/{tenant}/{subject}-{name}.json", receipt.model_dump_json(indent=1).encode())
        audit.append(storage, reason, tenant, subject, by=by, keys=str(len(erased)), receipt=name)
    return receipt


def expire(storage: Storage) -> list[Receipt]:
    """Revokes what has expired and is not revoked yet; returns the receipts."""
    due = [one for one in list_consents(storage) if one.consent.expired]
    return [
        revoke(storage, one.tenant, one.subject, by="expiry", reason="expired")
        for one in due
        if revocation_of(storage, one.tenant, one.subject) is None
    ]


def containing(storage: Storage, name: str) -> list[str]:
    """`tenant/id` of an adapter and of all that were merged from it, directly or not; by their cards."""
    sources: dict[str, set[str]] = {}
    for key in storage.list("adapters"):
        parts = key.split("/")
        if parts[-1] != "card.json" or len(parts) != 5:
            continue
        try:
            card = Card.model_validate_json(storage.get(key))
        except (NotFound, ValidationError):
            continue
        sources.setdefault(f"{parts[1]}/{parts[2]}", set()).update(one.partition("@")[0] for one in card.sources)
    found = [name]
    for one in found:  # grows while it is walked
        found += [other for other, made_of in sources.items() if one in made_of and other not in found]
    return found


def export(storage: Storage, tenant: str, subject: str) -> bytes | None:
    """Everything that is held about a subject, as a zip; None if nothing is."""
    keys = sorted(held(storage, tenant, subject))
    if not keys:
        return None
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in keys:
            archive.writestr(key, storage.get(key))
    return out.getvalue()


def held(storage: Storage, tenant: str, subject: str) -> set[str]:
    """The keys of everything that is held about a subject."""
    keys = set(storage.list(f"adapters/{tenant}/{subject}"))
    keys |= set(_keys_of_runs(storage, tenant, subject))
    pictures = PictureStore(storage)
    for picture in pictures.wearing([f"{tenant}/{subject}"], tenant):
        keys |= set(pictures.keys(picture))
    for id in {one.id for one in list_consents(storage, tenant) if one.subject == subject}:
        keys |= set(storage.list(f"consents/{tenant}/{id}"))
    return keys | set(storage.list(f"revocations/{tenant}/{subject}"))


def _erase(storage: Storage, tenant: str, subject: str, adapters: Iterable[str]) -> Iterable[str]:
    """Erases and returns the keys that were there."""
    registry = Registry(storage)
    for name in adapters:
        owner, _, id = name.partition("/")
        keys = [key for key in storage.list(f"adapters/{name}") if not key.endswith("/current.json")]
        with suppress(UnknownAdapter):
            registry.delete(owner, id)
        storage.delete(f"public/{name}")
        for key in keys:
            storage.delete(key)
        yield from keys
    pictures = PictureStore(storage)
    for picture in pictures.wearing(list(adapters)):
        keys = pictures.keys(picture)
        pictures.delete(picture.shelf, picture.tenant, picture.id)
        yield from keys
    for key in _keys_of_runs(storage, tenant, subject):
        storage.delete(key)
        yield key


def _keys_of_runs(storage: Storage, tenant: str, subject: str) -> list[str]:
    """What runs of the tenant hold of the subject, with its latents in the cache."""
    found: list[str] = []
    for run in storage.folders("runs"):
        if not _is_of(storage, run, tenant):
            continue
        keys = storage.list(f"runs/{run}/subjects/{subject}")
        for key in keys:
            if key.endswith(f"/{LATENTS}"):
                found += [one for one in json.loads(storage.get(key)) if storage.exists(one)]
        found += keys
    return found


def _is_of(storage: Storage, run: str, tenant: str) -> bool:
    try:
        return bool(json.loads(storage.get(f"runs/{run}/run.json")).get("tenant", "default") == tenant)
    except (NotFound, ValueError):
        return False


def _known_photos(
    storage: Storage, tenant: str, subject: str, records: Iterable[ConsentRecord]
) -> tuple[set[str], set[str]]:
    """Hashes of all photos that the subject was trained on, by its consents and its cards."""
    photos = {photo for record in records for photo in record.photos}
    looks = {look for record in records for look in record.looks}
    for key in storage.list(f"adapters/{tenant}/{subject}"):
        if key.endswith("/card.json"):
            try:
                card = Card.model_validate_json(storage.get(key))
            except (NotFound, ValidationError):
                continue
            photos |= set(card.image_hashes)
            looks |= set(card.image_looks)
    return photos, looks


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Consent records and revocations on a storage: who agreed to what, and what may not be trained or served any more.

    consents/<tenant>/<id>/<photos>.json        written once, before training: the record and its photos' hashes
    revocations/<tenant>/<subject>/<id>.json    written once: from here on nothing of it is served or trained

A revocation refuses a subject by its id, and the same photos under any id and tenant: by their SHA-256 and their looks.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Literal

from training.errors import UserError
from training.storage import audit
from training.storage.closed import Closed
from training.storage.consent import Consent
from training.storage.picture_hash import NEAR, distance
from training.storage.storage import NotFound, Storage, content_id

ALIKE = NEAR  # bits


class ConsentRecord(Closed):
    """A consent as it was used for a subject's photos. `photos` are SHA-256s of files, `looks` perceptual hashes."""

    id: str
    tenant: str
    subject: str
    consent: Consent
    photos: tuple[str, ...]
    looks: tuple[str, ...] = ()


class Revocation(Closed):
    """What was taken back. `adapters` are `tenant/id` of all that contained the subject."""

    id: str
    tenant: str
    subject: str
    time: str
    by: str
    reason: Literal["revoked", "expired", "erased", "reported"]
    photos: tuple[str, ...] = ()
    looks: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


class Revoked(UserError):
    """The subject, or its photos, may not be used any more."""


def keep_consent(
    storage: Storage, tenant: str, subject: str, consent: Consent, photos: Iterable[str], looks: Iterable[str] = ()
) -> ConsentRecord:
    """Writes the record of a consent and these photos, once; the same again changes nothing."""
    hashes = tuple(sorted(photos))
    record = ConsentRecord(
        id=consent_id(subject, consent),
        tenant=tenant,
        subject=subject,
        consent=consent,
        photos=hashes,
        looks=tuple(sorted(looks)),
    )
    name = content_id(" ".join(hashes).encode())[:16]
    if storage.create(f"consents/{tenant}/{record.id}/{name}.json", record.model_dump_json().encode()):
        audit.append(storage, "granted", tenant, subject, consent=record.id, by=consent.granted_by)
    return record


def consent_id(subject: str, consent: Consent) -> str:
    """What a consent for a subject is called: 16 hex digits of its content."""
    stated = json.dumps([subject, consent.model_dump(mode="json")], sort_keys=True)
    return content_id(stated.encode())[:16]


def list_consents(storage: Storage, tenant: str | None = None) -> list[ConsentRecord]:
    """All records, of one tenant or of all: one for each set of photos that a consent was used for."""
    prefix = "consents" if tenant is None else f"consents/{tenant}"
    return [ConsentRecord.model_validate_json(storage.get(key)) for key in storage.list(prefix)]


def find_consent(storage: Storage, id: str, tenant: str | None = None) -> ConsentRecord:
    """The record of an id. Raises UserError if there is none, or it is another tenant's."""
    for record in list_consents(storage, tenant):
        if record.id == id:
            return record
    known = ", ".join(record.id for record in list_consents(storage, tenant)[-5:]) or "none"
    raise UserError(f"No consent '{id[:80]}'. The latest: {known}.")


def list_revocations(storage: Storage) -> list[Revocation]:
    """All revocations."""
    found = []
    for key in storage.list("revocations"):
        try:
            found.append(Revocation.model_validate_json(storage.get(key)))
        except NotFound:
            continue
    return found


def revocation_of(storage: Storage, tenant: str, subject: str) -> Revocation | None:
    """The revocation of a subject, if there is one."""
    for key in storage.list(f"revocations/{tenant}/{subject}"):
        return Revocation.model_validate_json(storage.get(key))
    return None


def check_unrevoked(
    storage: Storage, tenant: str, subject: str, photos: Sequence[str], looks: Sequence[str] = ()
) -> None:
    """Raises Revoked if the subject or any of its photos may not be used any more, saying which."""
    for one in list_revocations(storage):
        when = f"on {one.time[:10]}"
        if (one.tenant, one.subject) == (tenant, subject):
            raise Revoked(f"The consent for subject '{subject}' was taken back {when}: it may not be trained again.")
        same = set(one.photos).intersection(photos)
        alike = next((mine for mine in looks for theirs in one.looks if distance(mine, theirs) <= ALIKE), None)
        if same or alike:
            how = "is one" if same else "looks like one"
            raise Revoked(
                f"A photo of subject '{subject}' {how} for which consent was taken back {when}. Remove photos of that "
                "person, pet or thing."
            )

"""What a run does with personal data: consents are recorded and checked, photos and latents found again to be erased.

A subject whose consent was taken back is refused wherever it is looked at: when a run is settled, by its id and files,
and before it trains, by what its photos look like.
"""

import hashlib
import json
import os
from collections.abc import Sequence

from training.base.safety import check_safe
from training.errors import UserError
from training.manifest.consent import consent_problems, require_consent
from training.manifest.subject import SubjectSpec
from training.photos.files import UPLOADED, PhotoFile
from training.photos.photos import Photo
from training.photos.variants import can_find_faces, find_face
from training.run.run import RunStore
from training.storage.consents import check_unrevoked, keep_consent
from training.storage.erasure import LATENTS
from training.storage.picture_hash import picture_hash

PHOTO_SAFETY = "DREAMFLEET_PHOTO_SAFETY"  # in the environment: photos that the safety filter scores as high are refused


def check_subject(store: RunStore, tenant: str, subject: SubjectSpec, files: Sequence[PhotoFile]) -> None:
    """Raises UserError if the subject lacks a consent that it needs, or its use was taken back."""
    for problem in consent_problems(subject, require_consent()):
        raise UserError(problem)
    hashes = [hashlib.sha256(file.data).hexdigest() for file in files if not file.problem]
    check_unrevoked(store.storage, tenant, subject.id, hashes)


def check_photos(store: RunStore, tenant: str, subject: SubjectSpec, photos: Sequence[Photo]) -> None:
    """Looks at the photos themselves, and records the consent for them.

    Raises UserError for faces without a consent, and for photos taken back.
    """
    policy = require_consent()
    if policy != "none" and can_find_faces():
        shown = sum(find_face(photo.image) is not None for photo in photos)
        for problem in consent_problems(subject, policy, faces=bool(photos) and 2 * shown >= len(photos)):
            raise UserError(problem)
    for photo in photos if PHOTO_SAFETY in os.environ else ():
        check_safe(photo.image, float(os.environ[PHOTO_SAFETY]), f"Photo '{photo.name}'")
    looks = [picture_hash(photo.image) for photo in photos]
    check_unrevoked(store.storage, tenant, subject.id, [photo.sha256 for photo in photos], looks)
    if subject.consent is not None:
        keep_consent(store.storage, tenant, subject.id, subject.consent, [photo.sha256 for photo in photos], looks)


def note_latents(store: RunStore, id: str, key: str) -> None:
    """Writes down where a subject's latents are cached, so that they are found when it is erased."""
    file = store.subject_key(id, LATENTS)
    known = json.loads(store.storage.get(file)) if store.storage.exists(file) else []
    if key not in known:
        store.storage.put(file, json.dumps([*known, key]).encode())


def forget_photos(store: RunStore, id: str) -> None:
    """Removes the copies of a subject's photos that were made for its training."""
    store.storage.delete_tree(store.subject_key(id, "images"))


def photos_forgotten(store: RunStore, subject: SubjectSpec) -> bool:
    """Whether a subject's photos were copies on the storage that have been removed after its training."""
    prefix = subject.images.removeprefix(UPLOADED)
    return subject.images.startswith(UPLOADED) and not store.storage.list(prefix)

"""What was made under an `Idempotency-Key`, on the storage: the same request again gets the same thing, also after a
restart and from another process."""

import hashlib
import json

from serving.http.replies import KeyReused
from training.storage.storage import Storage


def id_once(storage: Storage, tenant: str, key: str | None, digest: str, fresh: str) -> str:
    """The id to make something under: `fresh`, or the one that an earlier request with the same key has.

    Raises KeyReused if that one asked for something else.
    """
    if key is None:
        return fresh
    where = f"fleet/keys/{tenant}/{hashlib.sha256(key.encode()).hexdigest()}.json"
    if storage.create(where, json.dumps({"digest": digest, "id": fresh}).encode()):
        return fresh
    before = json.loads(storage.get(where))
    if before["digest"] != digest:
        raise KeyReused
    return str(before["id"])


def digest(*parts: bytes | str) -> str:
    """What identifies a request."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(f"{len(data)}:".encode() + data)
    return whole.hexdigest()

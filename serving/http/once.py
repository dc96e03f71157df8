"""What was made under an `Idempotency-Key`, on the storage: the same request again gets the same thing, also after a
restart and from another process."""

import hashlib
import json
from typing import Annotated

from fastapi import Header

from serving.http.replies import KeyReused
from training.storage.storage import NotFound, Storage

Once = Annotated[str | None, Header(max_length=255, description="a request with the same key makes one thing")]


def id_once(storage: Storage, tenant: str, key: str | None, digest: str, fresh: str) -> str:
    """The id to make something under: `fresh`, or the one that an earlier request with the same key has.

    Raises KeyReused if that one asked for something else.
    """
    if key is None or storage.create(_where(tenant, key), json.dumps({"digest": digest, "id": fresh}).encode()):
        return fresh
    made = made_once(storage, tenant, key, digest)
    return fresh if made is None else made


def made_once(storage: Storage, tenant: str, key: str | None, digest: str) -> str | None:
    """The id that an earlier request with the same key has; None if there was none. Raises KeyReused as `id_once`."""
    if key is None:
        return None
    try:
        before = json.loads(storage.get(_where(tenant, key)))
    except NotFound:
        return None
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


def _where(tenant: str, key: str) -> str:
    return f"idempotency/{tenant}/{hashlib.sha256(key.encode()).hexdigest()}.json"

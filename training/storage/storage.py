"""Where everything is kept: opens a folder or an object store behind one interface.

Owns the choice by URI. What a storage promises, its errors and its keys are in `interface.py`. Knows nothing about
adapters, runs or tensors.
"""

from training.storage.interface import (
    NotFound,
    Storage,
    StorageError,
    StorageFull,
    StorageUnavailable,
    check_key,
    content_id,
    masked,
    unknown_scheme,
)
from training.storage.local import LocalStorage
from training.storage.object_store import ObjectStorage

__all__ = [
    "LocalStorage",
    "NotFound",
    "ObjectStorage",
    "Storage",
    "StorageError",
    "StorageFull",
    "StorageUnavailable",
    "check_key",
    "content_id",
    "masked",
    "open_storage",
]


def open_storage(uri: str) -> Storage:
    """The storage at `uri`: a path, `file://`, `s3://bucket/prefix?option=value&...` or `gs://bucket/prefix`.

    Options of s3 and gs: endpoint_override, scheme, region, access_key, secret_key, session_token, anonymous,
    request_timeout (seconds), attempts. Credentials that the URI does not hold come from the environment.
    """
    scheme, separator, rest = uri.partition("://")
    if not uri:
        raise StorageError("The storage is empty. Give a folder, or a URI such as s3://bucket/prefix.")
    if not separator:
        return LocalStorage(uri)
    if scheme == "file":
        return LocalStorage(rest)
    if scheme in ("s3", "gs"):
        return ObjectStorage(uri)
    raise unknown_scheme(uri)

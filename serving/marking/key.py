"""The service's secret: made once on the storage, the same for every process that works on it."""

import secrets

from training.errors import UserError
from training.storage.storage import Storage

KEY = "marks/key"
BYTES = 32


def service_key(storage: Storage) -> bytes:
    """The key of the noise mark on `storage`; made by the first who asks. Whoever has it can find, and forge, marks.

    Raises UserError for a key that is damaged: pictures made with the right one could not be read.
    """
    if not storage.exists(KEY):
        storage.create(KEY, secrets.token_hex(BYTES).encode())
    try:
        key = bytes.fromhex(storage.get(KEY).decode())
    except ValueError:
        key = b""
    if len(key) != BYTES:
        raise UserError(
            f"'{KEY}' on the storage is no key of {2 * BYTES} hex digits. Put the right one back from a copy: without "
            "it the pictures made so far cannot be read. Or delete it, and a new one is made."
        )
    return key

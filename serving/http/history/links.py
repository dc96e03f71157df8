"""Links to kept pictures that need no key: signed with the service's secret, valid until the time in them."""

import hashlib
import hmac
import time
from dataclasses import dataclass
from urllib.parse import urlencode

from serving.http.problems import ApiError
from serving.marking.key import service_key
from training.storage.storage import Storage

SIGNED = "/v1/images/files/"  # below it a signature stands for a key


@dataclass(frozen=True, slots=True)
class Links:
    """Makes and checks links; every server on the storage has the same secret. `lasts_s`: how long a link is valid."""

    storage: Storage
    lasts_s: float
    site: str | None = None

    def url(self, shelf: str, tenant: str, name: str, asked_at: str) -> str:
        """A link to the picture `name`; `asked_at` is the address that the caller used, where none is set. Blocks."""
        file = f"{shelf}/{tenant}/{name}"
        expires = int(time.time() + self.lasts_s)
        query = urlencode({"expires": expires, "signature": self._sign(file, expires)})
        return f"{(self.site or asked_at).rstrip('/')}{SIGNED}{file}?{query}"

    def check(self, file: str, expires: int, signature: str) -> None:
        """Raises ApiError unless `signature` is this service's for `file` until `expires`, which is to come. Blocks."""
        if not hmac.compare_digest(self._sign(file, expires).encode(), signature.encode()):
            raise ApiError(403, "The link is not valid: use it as it was given.", code="link_invalid")
        if time.time() > expires:
            raise ApiError(403, "The link has expired. Ask for the picture again.", code="link_expired")

    def _sign(self, file: str, expires: int) -> str:
        return hmac.new(service_key(self.storage), f"link|{file}|{expires}".encode(), hashlib.sha256).hexdigest()

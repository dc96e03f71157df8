"""Signed metadata: a C2PA manifest put into a finished picture file, and what the one in a file is worth.

By `c2pa-python`, whose library is loaded at the first use. Signing takes a few milliseconds and releases the
interpreter, so it runs on a worker thread. Source: the C2PA specification 2.2.
"""

import io
import threading
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from PIL import Image

from serving.marking.authority import Authority
from serving.marking.forms import ImageForm
from serving.marking.xmp import MADE
from training.errors import UserError

CredentialState = Literal["valid", "invalid", "none"]
LABEL = "org.dreamfleet.generation"  # the assertion with base, adapters and request
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_trust": False, "remote_manifest_fetch": False},
}


class CredentialCheck(NamedTuple):
    """What a file's manifest says: whether its signature holds for these bytes, who signed, and our facts if any."""

    state: CredentialState
    signer: str | None = None
    facts: Mapping[str, Any] | None = None


class Credentials:
    """Signs as `authority` for `operator`. Raises UserError if C2PA does not sign with it; the message says why."""

    def __init__(self, authority: Authority, operator: str, timestamp_url: str | None = None) -> None:
        import c2pa

        self._operator = operator
        self._lock = threading.Lock()
        self._context = c2pa.Context.from_dict(_SETTINGS)
        algorithm = c2pa.C2paSigningAlg[authority.algorithm.upper()]
        try:
            info = c2pa.C2paSignerInfo(algorithm, authority.chain, authority.key, timestamp_url)
            self._signer = c2pa.Signer.from_info(info)
            self.sign(_one_pixel(), "png", {}, "2000-01-01T00:00:00Z")
        except c2pa.C2paError as error:
            raise UserError(
                f"The certificate cannot sign pictures: {error}. Give a chain, signer's first, of a kind that C2PA "
                "allows (docs/provenance.md), or none for a self-made one."
            ) from None

    def sign(self, data: bytes, form: ImageForm, facts: Mapping[str, Any], when: str, source: str = MADE) -> bytes:
        """The file with a manifest that says: made by a model, by this operator at `when` (ISO 8601), with `facts`.

        `source`: the digital source type, which tells an edited picture.
        """
        import c2pa

        created = {
            "action": "c2pa.created",
            "when": when,
            "digitalSourceType": source,
            "softwareAgent": {"name": "dreamfleet"},
        }
        manifest = {
            "claim_generator_info": [{"name": "dreamfleet", "operator": self._operator}],
            "format": f"image/{form}",
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
                {"label": LABEL, "data": {**facts, "operator": self._operator, "time": when}},
            ],
        }
        out = io.BytesIO()
        with self._lock, c2pa.Builder(manifest, self._context) as builder:
            builder.sign(self._signer, f"image/{form}", io.BytesIO(data), out)
        return out.getvalue()


def read_claim(data: bytes, form: ImageForm) -> CredentialCheck:
    """What the manifest in a file is worth. A signature can hold whoever signed: `signer` says who it was."""
    import c2pa

    try:
        reader = c2pa.Reader(f"image/{form}", io.BytesIO(data), context=c2pa.Context.from_dict(_SETTINGS))
    except c2pa.C2paError.ManifestNotFound:
        return CredentialCheck("none")
    except c2pa.C2paError:
        return CredentialCheck("invalid")
    with reader:
        state: CredentialState = "invalid" if reader.get_validation_state() == "Invalid" else "valid"
        active = reader.get_active_manifest() or {}
        signature = active.get("signature_info") or {}
        ours = [one.get("data") for one in active.get("assertions", []) if one.get("label") == LABEL]
        return CredentialCheck(state, signature.get("issuer"), ours[0] if ours and isinstance(ours[0], dict) else None)


def _one_pixel() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    return out.getvalue()

"""Everything that is put on a finished picture file, and kept about it. Blocks: an event loop calls it on a thread.

In this order: XMP, the settings as text where the operator wants them, the record of its serial, and last the signed
manifest, which holds for exactly these bytes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from PIL import Image

from serving.marking.authority import authority_of_files, own_authority
from serving.marking.credentials import Credentials
from serving.marking.forms import ImageForm
from serving.marking.key import service_key
from serving.marking.noise import NoiseMark
from serving.marking.pixels import PixelMark, check_pixels
from serving.marking.serials import Issued, Serials, WornVersion
from serving.marking.settings import MarkSpec
from serving.marking.xmp import EDITED, MADE, with_xmp
from training.base.safety import Unsafe, check_filter, check_safe
from training.storage.picture_hash import picture_hash
from training.storage.storage import Storage


@dataclass(frozen=True, slots=True)
class Made:
    """What a picture was made of. `adapters` are the versions that it wears, with their weights."""

    tenant: str
    request: str
    index: int
    seed: int
    base: str
    base_hash: str
    adapters: Sequence[tuple[WornVersion, float]] = ()
    edited: bool = False  # whether it was made of somebody's picture
    prompts: tuple[str, str] = field(default=("", ""))  # prompt and negative prompt


class Marks:
    """The marks of one server. `noise` is None where it leaves pictures' noise as it is."""

    def __init__(self, spec: MarkSpec, storage: Storage) -> None:
        self.spec = spec
        self.noise = noise_mark(spec, storage)
        self.pixels = pixel_mark(spec, storage)
        self.serials = Serials(storage)
        self.credentials = _credentials(spec, storage)
        if spec.safety is not None:
            check_filter()

    def finish(self, data: bytes, form: ImageForm, made: Made) -> bytes:
        """The file with all marks, its record written.

        Raises Unsafe for what the safety filter withholds; StorageError: a picture without a record is not sent.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        most = self.spec.most_unsafe(made.tenant)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
        score, refusal = None, None
        if most is not None:
            try:
                score = check_safe(image, most, "The picture")
            except Unsafe as error:
                score, refusal = error.score, error
        if self.noise is not None:
            self.serials.keep(
                Issued(
                    serial=self.noise.serial(made.tenant, made.seed),
                    tenant=made.tenant,
                    adapters=tuple(worn for worn, _ in made.adapters),
                    request=made.request,
                    index=made.index,
                    time=now,
                    looks=picture_hash(image),
                    unsafe=score,
                    withheld=refusal is not None,
                )
            )
        if refusal is not None:
            raise refusal
        return self.sign(data, form, made, now)

    def sign(self, data: bytes, form: ImageForm, made: Made, now: str | None = None) -> bytes:
        """The file with its metadata alone: what an unfinished picture gets."""
        if self.credentials is None:
            return data
        facts: dict[str, Any] = {
            "base": made.base,
            "base_hash": made.base_hash,
            "adapters": [{"id": worn.id, "version": worn.version, "weight": weight} for worn, weight in made.adapters],
        }
        if self.spec.tell_prompt:
            facts |= zip(("prompt", "negative_prompt"), made.prompts, strict=True)
        when = now or datetime.now(UTC).isoformat(timespec="seconds")
        source = EDITED if made.edited else MADE
        return self.credentials.sign(with_xmp(data, form, source), form, facts, when, source)


def noise_mark(spec: MarkSpec, storage: Storage) -> NoiseMark | None:
    """The mark that a server's engines put into noise; None where it is off."""
    return NoiseMark(service_key(storage)) if spec.watermark == "noise" else None


def pixel_mark(spec: MarkSpec, storage: Storage) -> PixelMark | None:
    """The mark that a server's engines put into pixels; None where it is off. Raises UserError without its packages."""
    if not spec.pixels:
        return None
    check_pixels()
    return PixelMark(service_key(storage))


def _credentials(spec: MarkSpec, storage: Storage) -> Credentials | None:
    if not spec.credentials:
        return None
    own = spec.certificate is None and spec.certificate_key is None
    authority = own_authority(storage) if own else authority_of_files(spec.certificate, spec.certificate_key)
    return Credentials(authority, spec.operator, spec.timestamp_url)

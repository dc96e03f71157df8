"""Whether a picture was made here: its manifest, its noise, and what the records say about the serial in it.

Knows nothing about HTTP; the command line uses it, too.
"""

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from serving.engine.reading import reading_request
from serving.engine.request import NoiseReading
from serving.errors import Refused
from serving.http.service import Engines
from serving.marking.credentials import CredentialState, read_claim
from serving.marking.forms import form_of
from serving.marking.noise import FOUND
from serving.marking.pixels import PixelMark
from serving.marking.serials import Issued, Serials
from serving.marking.views import Supposition, cut_views, looked_at, usual_views
from training.base.facts import Facts
from training.storage.image_file import ImageError, ImageLimits
from training.storage.images import read_image
from training.storage.picture_hash import distance, picture_hash

LIMITS = ImageLimits(min_side_px=16, max_pixels=24_000_000)
AT_ONCE = 16  # readings of one picture in the engine
ALIKE = 16  # bits of a perceptual hash: beyond it the records' picture is another one
DEADLINE_S = 300.0


@dataclass(frozen=True, slots=True)
class Detected:
    """What is known about a picture. `records` are those that its serial fits, the likeliest first."""

    made_here: bool
    false_positive: float
    c2pa: CredentialState
    signer: str | None = None
    reading: NoiseReading | None = None
    records: Sequence[Issued] = field(default=())


@dataclass(frozen=True, slots=True)
class Detector:
    """Looks at pictures with the engines of one base. Without `reads`, nothing but their manifests."""

    engines: Engines
    facts: Facts
    serials: Serials
    most_px: int
    reads: bool = True
    pixels: PixelMark | None = None

    async def detect(self, data: bytes, name: str, *, thorough: bool = False) -> Detected:
        """What is known about a picture file. `thorough` also supposes that parts were cut off, which takes long.

        Raises Refused for a file that is no picture, and what reading raises.
        """
        form = form_of(data)
        try:
            image = await asyncio.to_thread(read_image, data, name, LIMITS)
        except ImageError as error:
            raise Refused(f"'{name}' cannot be looked at: {error.reason}. Send a JPEG, PNG or WebP file.") from None
        claim = await asyncio.to_thread(read_claim, data, form) if form else None
        state, signer = (claim.state, claim.signer) if claim else ("none", None)
        looks = await asyncio.to_thread(picture_hash, image)
        reading = await self._read(image, looks, thorough) if self.reads else None
        if reading is None or reading.log10 > FOUND:
            seen = 0.0 if self.pixels is None else await asyncio.to_thread(self.pixels.read, image)
            chances = sorted([seen, 0.0 if reading is None else reading.log10])
            tries = 0.0 if self.pixels is None else math.log10(2)
            chance = min(1.0, 10 ** (chances[0] + tries))
            return Detected(math.log10(chance) <= FOUND, chance, state, signer, reading)
        records = await asyncio.to_thread(self.serials.find, reading.serial, reading.words, looks)
        alike = [one for one in records if distance(one.looks, looks) <= ALIKE] or records[:1]
        return Detected(True, 10**reading.log10, state, signer, reading, alike)

    async def _read(self, image: Image.Image, looks: str, thorough: bool) -> NoiseReading | None:
        """The clearest reading; its probability counts everything that may be tried."""
        best: NoiseReading | None = None
        expected = await asyncio.to_thread(self.serials.alike, looks)
        for views, share in self._suppositions(image, thorough):
            for start in range(0, len(views), AT_ONCE):
                some = views[start : start + AT_ONCE]
                readings = await asyncio.gather(*(self._look(image, view, expected) for view in some))
                tries = math.log10(len(views) / share)
                counted = [one.model_copy(update={"log10": min(0.0, one.log10 + tries)}) for one in readings]
                best = min([*counted, *([best] if best else [])], key=lambda one: one.log10)
                if best.log10 <= FOUND:
                    return best
        return best

    def _suppositions(self, image: Image.Image, thorough: bool) -> Iterator[tuple[Sequence[Supposition], float]]:
        """Views that are tried together, each group with its share of the false positives; the likeliest come first."""
        usual = usual_views(image.size, self.facts, self.most_px)
        for turn, view in enumerate(usual):
            yield [view], 0.1 / (len(usual) - 1) if turn else 0.8
        if thorough:
            yield list(cut_views(image.size, self.facts, self.most_px)), 0.1

    async def _look(self, image: Image.Image, view: Supposition, expected: Sequence[int]) -> NoiseReading:
        data = await asyncio.to_thread(looked_at, image, view)
        width, height = view.canvas
        return await self.engines.read(
            reading_request(data, width, height, deadline_s=DEADLINE_S, expected=expected, cut_cells=view.cut_cells)
        )

"""An adapter in a mix as clients ask for it: its weights, over the steps too, and the region that wears it.

Reading them raises ApiError with the field, the value and what is allowed. Knows no torch.
"""

from collections.abc import Sequence
from typing import Annotated

from PIL import Image, ImageFilter
from pydantic import ConfigDict, Discriminator, Field, StringConstraints, Tag

from serving.engine.region import FEATHER, Region, WeightSpan
from serving.http.problems import ApiError
from training.base.phrases import find_phrase
from training.storage.closed import Closed
from training.storage.image_file import ImageError, ImageLimits
from training.storage.images import read_image

ADAPTER_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}(/[a-z0-9][a-z0-9._-]{0,62})?(@[0-9a-f]{6,64})?$"
MAX_SPANS = 1000
MAX_MASK = 16 * 2**20  # of base64
Phrase = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class ScheduledWeight(Closed):
    """A weight during a part of the steps: `from` is included, `to` is not."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    start: float = Field(alias="from", ge=0, le=1, description="share of the steps")
    end: float = Field(alias="to", ge=0, le=1, description="share of the steps")
    weight: float


class RegionBody(Closed):
    """The part of a picture and of its prompt that wears an adapter."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"box": [0, 0, 0.5, 1], "words": ["sks dog"]}]})

    box: tuple[float, float, float, float] | None = Field(
        default=None, description="left, top, right, bottom as shares of the picture, 0 to 1"
    )
    mask: str | None = Field(
        default=None,
        max_length=MAX_MASK,
        description="a picture of the request's size, base64 or a data URL: white wears it",
    )
    words: tuple[Phrase, ...] | None = Field(
        default=None,
        max_length=32,
        description="phrases of the prompt whose tokens wear it; by default the adapter's trigger; if the prompt "
        "lacks it, all tokens, or none of a region with its own prompt; [] is none",
    )
    prompt: str | None = Field(
        default=None,
        max_length=20_000,
        description="what the region shows, in place of the request's prompt; takes a further row of the forward",
    )
    feather: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description=f"how far edges fall off, of the shorter side; {FEATHER} of a box, 0 of a mask",
    )


class WornAdapter(Closed):
    """An adapter in a mix."""

    id: Annotated[
        str,
        Field(
            pattern=ADAPTER_NAME,
            max_length=300,
            description="`<id>`, `<tenant>/<id>`, either with `@<version>`",
            examples=["rusty"],
        ),
    ]
    weight: Annotated[
        Annotated[float, Tag("number")]
        | Annotated[tuple[ScheduledWeight, ...], Field(min_length=1, max_length=MAX_SPANS), Tag("list")],
        Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "number"),
        Field(
            description="scales its effect; negative subtracts it. Or a list of `{from, to, weight}` over the steps, 0 "
            "where none is",
            examples=[1.0],
        ),
    ] = 1.0
    text_encoder_weight: float | None = Field(
        default=None, description="of the text encoders; by default `weight`, or the largest of a list"
    )
    region: RegionBody | None = Field(default=None, description="where it is worn; by default everywhere")

    @property
    def peak(self) -> float:
        """The weight that is farthest from 0."""
        if isinstance(self.weight, float | int):
            return self.weight
        return max((span.weight for span in self.weight), key=abs)

    @property
    def extremes(self) -> tuple[float, ...]:
        """Every weight that it has."""
        own = (self.weight,) if isinstance(self.weight, float | int) else tuple(span.weight for span in self.weight)
        return own if self.text_encoder_weight is None else (*own, self.text_encoder_weight)


def read_schedule(worn: WornAdapter) -> tuple[WeightSpan, ...]:
    """The weights over the steps, in order; empty for one weight. Raises ApiError if two are for the same steps."""
    if isinstance(worn.weight, float | int):
        return ()
    spans = sorted((WeightSpan(start=one.start, end=one.end, weight=one.weight) for one in worn.weight), key=_start)
    for one, following in zip(spans, [*spans[1:], None], strict=True):
        if one.start >= one.end:
            raise _refusal(worn, f"a weight is from {one.start:g} to {one.end:g}; 'to' must be above 'from'")
        if following is not None and following.start < one.end:
            raise _refusal(
                worn,
                f"two weights are for the steps from {following.start:g} on; let each begin where the one before ends",
            )
    return tuple(spans)


def read_region(
    worn: WornAdapter,
    trigger: str,
    prompt: str,
    mask: bytes | None,
    size_px: tuple[int, int],
    cells: tuple[int, int],
) -> Region | None:
    """The region as the engine takes it; None is everywhere.

    `trigger`: the words of the adapter; `mask`: the file of its mask; `size_px` and `cells` of the picture and its
    latent, across and down. Raises ApiError.
    """
    body = worn.region
    if body is None:
        return None
    if body.box is not None and body.mask is not None:
        raise _refusal(worn, "its region has a 'box' and a 'mask'. Give one of the two")
    if body.prompt is not None and body.box is None and body.mask is None:
        raise _refusal(worn, "its region has a 'prompt' but no place in the picture. Give 'box' or 'mask', too")
    if body.box is None and body.mask is None and body.words is None:
        raise _refusal(worn, "its region says nothing. Give 'box', 'mask' or 'words', or leave 'region' out")
    if body.box is not None:
        _check_box(worn, body.box, size_px)
    for phrase in body.words or ():
        if not find_phrase(prompt, phrase):
            raise _refusal(worn, f"its region names the words {phrase!r}, which are not in the prompt {prompt[:80]!r}")
    without = None if body.prompt is None else ()  # a region with a prompt needs none of the request's
    own = (trigger,) if find_phrase(prompt, trigger) else without
    return Region(
        box=body.box,
        cells=None if mask is None else _read_mask(worn, mask, body.feather or 0.0, size_px, cells),
        words=own if body.words is None else body.words,
        feather=FEATHER if body.feather is None else body.feather,
        prompt=body.prompt,
    )


def _check_box(worn: WornAdapter, box: Sequence[float], size_px: tuple[int, int]) -> None:
    left, top, right, bottom = box
    shown = f"[{', '.join(f'{value:g}' for value in box)}]"
    if not all(0 <= value <= 1 for value in box):
        width, height = size_px
        fits = 0 <= left <= width and 0 <= right <= width and 0 <= top <= height and 0 <= bottom <= height
        meant = [left / width, top / height, right / width, bottom / height]
        hint = f"; in pixels it would be [{', '.join(f'{value:.4g}' for value in meant)}]" if fits else ""
        raise _refusal(
            worn, f"its box {shown} is outside of the picture: give left, top, right, bottom as shares, 0 to 1{hint}"
        )
    if left >= right or top >= bottom:
        raise _refusal(worn, f"its box {shown} is empty: right must be above left, bottom above top")


def _read_mask(
    worn: WornAdapter, data: bytes, feather: float, size_px: tuple[int, int], cells: tuple[int, int]
) -> bytes:
    """How much of each cell a mask covers, a byte each, row by row."""
    try:
        picture = read_image(data, "mask", ImageLimits(min_side_px=1)).convert("L")
    except ImageError as error:
        raise _refusal(worn, f"its mask cannot be read: {error.reason}") from None
    if picture.size != size_px:
        have, need = (f"{width}x{height}" for width, height in (picture.size, size_px))
        raise _refusal(worn, f"its mask has {have} pixels; it must have the picture's {need}")
    if feather:
        picture = picture.filter(ImageFilter.GaussianBlur(feather * min(size_px) / 2))
    return picture.resize(cells, Image.Resampling.BOX).tobytes()


def _start(span: WeightSpan) -> float:
    return span.start


def _refusal(worn: WornAdapter, why: str) -> ApiError:
    return ApiError(400, f"Adapter '{worn.id}': {why}.", param="adapters")

"""The part of a picture that wears an adapter, and how strongly at which step. Knows no torch."""

from collections.abc import Sequence

from pydantic import Field

from training.base.phrases import Span, find_phrase
from training.storage.closed import Closed

FEATHER = 0.06  # of the shorter side


class Region(Closed):
    """Where an adapter is worn. Of the picture: in `box`, or by `cells`, or everywhere. Of the prompt: by its `words`.

    `box` is left, top, right, bottom as shares of the picture; its edges inside of the picture fall off over `feather`
    of the shorter side. `cells`: a byte for each latent cell, row by row; 255 is all. `words`: phrases of the prompt
    whose tokens wear it; None is every token, and that of the negative prompt, none is no token. `prompt`: what the
    region shows, in place of the request's prompt, drawn in a row of its own.
    """

    box: tuple[float, float, float, float] | None = None
    cells: bytes | None = None
    words: tuple[str, ...] | None = None
    feather: float = Field(default=FEATHER, ge=0, le=1)
    prompt: str | None = None


class WeightSpan(Closed):
    """The weight between two shares of the steps, `start` included, `end` not."""

    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)
    weight: float


def weight_at(spans: Sequence[WeightSpan], step: int, steps: int) -> float:
    """The weight of step `step` of `steps`; 0 where no span is."""
    share = step / steps + 1e-9  # a border that is at a step begins there, however its share is rounded
    return next((span.weight for span in spans if span.start <= share < span.end), 0.0)


def spans_of_words(prompt: str, regions: Sequence[Region | None]) -> list[list[Span] | None]:
    """The characters of `prompt` that wear each region's adapter; None is all of them.

    Where a phrase stands as often as regions name it, each takes one, in order; else each takes all of them.
    """
    named = [phrase.casefold() for one in regions if one is not None for phrase in one.words or ()]
    taken: dict[str, int] = {}
    found: list[list[Span] | None] = []
    for one in regions:
        if one is None or one.words is None:
            found.append(None)
            continue
        spans: list[Span] = []
        for phrase in one.words:
            places, key = find_phrase(prompt, phrase), phrase.casefold()
            turn = taken.get(key, 0)
            taken[key] = turn + 1
            spans += places[turn : turn + 1] if len(places) == named.count(key) else places
        found.append(spans)
    return found

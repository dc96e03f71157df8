"""The base as training sees it in a process that draws pictures from it, too: before each call of a model there is a
border, where drawing may take the device.

What training has laid over the base is set aside there: a route of one is no route of the other.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from training.adapters.bank import set_aside
from training.base.base import Base
from training.base.family import Cond, Family, Parts, RowFacts, Words
from training.base.noise.process import Process, Size


def with_borders(base: Base, border: Callable[[], None]) -> Base:
    """The same base; `border` is called before each call of one of its models."""
    _ = base.process  # is made now: one that is made while pictures are drawn could not be trained with
    return replace(base, family=cast(Family, _Bordered(base.family, border)))


class _Bordered:
    """A loaded family that calls `border` first."""

    def __init__(self, family: Family, border: Callable[[], None]) -> None:
        self._family = family
        self._border = border
        self.facts = family.facts

    @property
    def process(self) -> Process:
        return self._family.process

    def tokenizer(self) -> Any:
        return self._family.tokenizer()

    def count_chunks(self, parts: Parts, prompt: str, words: Words) -> int:
        return self._family.count_chunks(parts, prompt, words)

    def together(self, size: Size, cond: Cond) -> Hashable:
        return self._family.together(size, cond)

    def encode(
        self, parts: Parts, prompts: Sequence[str], words: Sequence[Words] | None = None, chunks: int = 1
    ) -> list[Cond]:
        self._pass()
        return self._family.encode(parts, prompts, words, chunks)

    def to_latents(self, parts: Parts, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        self._pass()
        return self._family.to_latents(parts, pixels_N3HW)

    def to_pixels(self, parts: Parts, latents_NCHW: Tensor) -> Tensor:
        self._pass()
        return self._family.to_pixels(parts, latents_NCHW)

    def predict(
        self, parts: Parts, x_NCHW: Tensor, times_N: Tensor, conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> Tensor:
        self._pass()
        return self._family.predict(parts, x_NCHW, times_N, conds, rows)

    def features(
        self, parts: Parts, x_NCHW: Tensor, times_N: Tensor, conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> Tensor:
        self._pass()
        return self._family.features(parts, x_NCHW, times_N, conds, rows)

    def _pass(self) -> None:
        with set_aside():
            self._border()

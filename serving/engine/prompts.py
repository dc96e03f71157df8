"""Prompt embeddings under each request's own adapters, encoded together and remembered.

An embedding depends on the text and on the adapters that change the text encoder, with their weights; adapters that do
not are left out of the key, so their prompts are shared with the base.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serving.engine.request import AdapterRef
from training.adapters.bank import Bank, Route
from training.base.base import Base
from training.base.family import Cond

Mix = tuple[tuple[AdapterRef, float], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to be encoded under `mix`, whose adapters are in `slots`."""

    text: str
    mix: Mix
    slots: tuple[int, ...]

    @property
    def key(self) -> tuple[str, Mix]:
        return self.text, self.mix


def make_routes(
    bank: Bank,
    components: Sequence[str],
    slots: Sequence[tuple[int, ...]],
    weights: Sequence[tuple[float, ...]],
    empty: int,
) -> list[Route]:
    """The routes of rows that wear `slots[n]` with `weights[n]`, or none if all are base rows.

    Rows with fewer adapters are filled up with the slot `empty`, which holds zeros, never with another's slot: what is
    in there would be multiplied by zero, and zero times an infinity is not zero.
    """
    k = max((len(row) for row in slots), default=0)
    if k == 0:
        return []
    slots_NK = torch.tensor([[*row, *[empty] * (k - len(row))] for row in slots])
    padded = [[*row, *[1.0] * (k - len(row))] for row in weights]
    plain = all(weight == 1.0 for row in padded for weight in row)
    weights_NK = None if plain else torch.tensor(padded)
    return [bank.route(component, slots_NK, weights_NK) for component in components]


class Prompts:
    """At most `capacity` prompts are kept, least recently used out first."""

    def __init__(self, base: Base, bank: Bank, *, empty: int, capacity: int) -> None:
        self._base = base
        self._bank = bank
        self._empty = empty
        self._capacity = capacity
        self._known: OrderedDict[tuple[str, Mix], Cond] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def encode(self, texts: Sequence[Text]) -> list[Cond]:
        """The embedding of each text; those not known are encoded in one forward."""
        missing = {text.key: text for text in texts if text.key not in self._known}
        self.hits += len(texts) - len(missing)
        self.misses += len(missing)
        fresh: dict[tuple[str, Mix], Cond] = {}
        if missing:
            rows = list(missing.values())
            routes = make_routes(
                self._bank,
                self._base.facts.text_encoders,
                [row.slots for row in rows],
                [tuple(weight for _, weight in row.mix) for row in rows],
                self._empty,
            )
            with self._bank.using(*routes):
                words = [{w: v for slot in row.slots for w, v in self._bank.words(slot).items()} for row in rows]
                conds = self._base.encode([row.text for row in rows], words)
            fresh = dict(zip(missing, conds, strict=True))
        found = [fresh[text.key] if text.key in fresh else self._known[text.key] for text in texts]
        for text, cond in zip(texts, found, strict=True):
            # a copy: a row of the batch would keep the whole batch
            kept = {name: part.clone() for name, part in cond.items()} if text.key in fresh else cond
            self._known[text.key] = kept
            self._known.move_to_end(text.key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return found

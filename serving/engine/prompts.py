"""Prompt embeddings under each request's own adapters, encoded together and remembered.

An embedding depends on the text and on the adapters that change the text encoder, with their weights; adapters that do
not are left out of the key, so their prompts are shared with the base. A prompt longer than the encoder takes several
chunks; all prompts of a request get as many as its longest.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from serving.engine.request import AdapterRef
from serving.errors import Refused
from training.adapters.bank import Bank, Route
from training.base.base import Base
from training.base.family import Cond, Wording, Words

Mix = tuple[tuple[AdapterRef, float], ...]
_Key = tuple[Wording, Mix, int]  # text, adapters that change it, chunks


@dataclass(frozen=True, slots=True)
class Text:
    """A text to be encoded under `mix`, whose adapters are in `slots`."""

    text: Wording
    mix: Mix
    slots: tuple[int, ...]


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


class PromptCache:
    """At most `capacity` embeddings are kept, least recently used out first. `longest`: tokens a prompt may have."""

    def __init__(self, base: Base, bank: Bank, *, empty: int, capacity: int, longest: int) -> None:
        self._base = base
        self._bank = bank
        self._empty = empty
        self._capacity = capacity
        self._room = base.facts.prompt_tokens
        self._most = ceil(longest / self._room) if base.facts.chunked else 1
        self._known: OrderedDict[_Key, Cond] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def encode(self, requests: Sequence[Sequence[Text]]) -> list[list[Cond]]:
        """The record of each text of each request; those not remembered are encoded together.

        Raises Refused for a text that is longer than is served.
        """
        keys: list[list[_Key]] = []
        texts: dict[_Key, Text] = {}
        for request in requests:
            chunks = max(map(self._chunks, request))
            keys.append([(text.text, text.mix, chunks) for text in request])
            texts |= zip(keys[-1], request, strict=True)
        missing = [key for key in texts if key not in self._known]
        self.hits += sum(map(len, keys)) - len(missing)
        self.misses += len(missing)
        found = {key: self._known[key] for key in texts if key in self._known}
        for chunks in {key[2] for key in missing}:
            alike = [key for key in missing if key[2] == chunks]
            found |= zip(alike, self._encode([texts[key] for key in alike], chunks), strict=True)
        for key, state in found.items():
            self._known[key] = state
            self._known.move_to_end(key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return [[found[key] for key in request] for request in keys]

    def _chunks(self, text: Text) -> int:
        chunks = self._base.count_chunks(text.text, self._words(text))
        if chunks > self._most:
            raise Refused(
                f"The prompt '{str(text.text)[:40]}...' takes {chunks} chunks of {self._room} tokens; at most "
                f"{self._most} are served. Shorten it."
            )
        return chunks

    def _encode(self, texts: Sequence[Text], chunks: int) -> list[Cond]:
        routes = make_routes(
            self._bank,
            self._base.facts.text_encoders,
            [text.slots for text in texts],
            [tuple(weight for _, weight in text.mix) for text in texts],
            self._empty,
        )
        with self._bank.using(*routes):
            conds = self._base.encode([text.text for text in texts], list(map(self._words, texts)), chunks)
        # copies: a view would keep the whole batch in memory
        return [{name: part.clone() for name, part in cond.items()} for cond in conds]

    def _words(self, text: Text) -> Words:
        return {word: vectors for slot in text.slots for word, vectors in self._bank.words(slot).items()}

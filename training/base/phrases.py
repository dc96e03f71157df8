"""Phrases in a prompt: where they stand, and which tokens stand for them. No torch."""

import re
from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]  # first character and the one behind the last


def find_phrase(prompt: str, phrase: str) -> list[Span]:
    """Every place where `phrase` stands in `prompt` as whole words, in order; case and width of spaces do not count."""
    words = phrase.split()
    if not words:
        return []
    pattern = r"\s+".join(map(re.escape, words))
    return [found.span() for found in re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, re.IGNORECASE)]


def touching(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """The indices of those of `offsets` that share a character with one of `spans`."""
    return [
        index
        for index, (start, end) in enumerate(offsets)
        if any(start < stop and begin < end for begin, stop in spans)
    ]


def tokens_at(tokenizer: Any, text: str, spans: Sequence[Span], *, length: int) -> list[int]:
    """The places of the tokens of `text`, cut at `length`, that stand for `spans` of its characters."""
    told = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
    return touching(told["offset_mapping"], spans)

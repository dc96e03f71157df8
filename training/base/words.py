"""Textual-inversion words: `<s1>` in a prompt stands for vectors that were trained, not for a word of the base's.

A prompt is cut at its words; the pieces between are tokenised as usual. Where a word stands, the text encoder's token
embedding is replaced by the word's vectors. Source: Gal et al. 2022.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from training.base.family import Wording, Words
from training.base.wording import phrases_of


@dataclass(frozen=True)
class Tokenised:
    """A chunk of each prompt: ids int64 [N, L]; `places[n]` is (position, vector [D]) of each trained vector in it.

    `weights` [N, L] are the tokens' own, 1 for marks of start and end; None where all of them are 1.
    """

    ids: Tensor
    places: tuple[tuple[tuple[int, Tensor], ...], ...]
    weights: Tensor | None = None


class _Token(NamedTuple):
    """A token's id or its trained vector, and its weight."""

    value: int | Tensor
    weight: float


def tokenise(tokenizer: CLIPTokenizer, prompts: Sequence[Wording], words: Sequence[Words], chunk: int = 0) -> Tokenised:
    """Token ids of one chunk of each prompt; `words[n]` are those prompt n may use.

    A chunk is what the encoder takes at once: the tokenizer's length, with its marks of start and end. A prompt that
    ends before has an empty one.
    """
    rows, places, weights = [], [], []
    for prompt, known in zip(prompts, words, strict=True):
        tokens = [token for part in _split(tokenizer, prompt, known)[chunk : chunk + 1] for token in part]
        row, found = _row(tokenizer, [token.value for token in tokens])
        rows.append(row)
        places.append(tuple(found))
        weights.append([1.0, *(token.weight for token in tokens), *[1.0] * (len(row) - len(tokens) - 1)])
    plain = all(weight == 1.0 for row_weights in weights for weight in row_weights)
    return Tokenised(torch.tensor(rows), tuple(places), None if plain else torch.tensor(weights))


def count_chunks(tokenizer: CLIPTokenizer, prompt: Wording, words: Words) -> int:
    """How many chunks a prompt takes; one if it is empty."""
    return len(_split(tokenizer, prompt, words))


def _split(tokenizer: CLIPTokenizer, prompt: Wording, words: Words) -> list[list[_Token]]:
    """The tokens of each chunk; a trained word is not split if a chunk can hold it."""
    room = tokenizer.model_max_length - 2
    chunks: list[list[_Token]] = [[]]
    for phrase in phrases_of(prompt):
        if phrase.opens:
            chunks.append([])
        for piece in _cut(phrase.text, words):
            trained = piece in words
            tokens = list(words[piece]) if trained else tokenizer(piece, add_special_tokens=False).input_ids
            if trained and len(chunks[-1]) + len(tokens) > room >= len(tokens):
                chunks.append([])
            for token in tokens:
                if len(chunks[-1]) == room:
                    chunks.append([])
                chunks[-1].append(_Token(token, phrase.weight))
    return chunks


def _row(tokenizer: CLIPTokenizer, tokens: Sequence[int | Tensor]) -> tuple[list[int], list[tuple[int, Tensor]]]:
    """The ids [L] of a chunk, and its trained vectors' places; no chunk is an empty one.

    A trained vector is put in place of the id that stands for it. That is the mark of the start, not of the end: a
    pooled output is read where the first mark of the end is.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids: list[int] = [tokenizer.bos_token_id]
    found: list[tuple[int, Tensor]] = []
    for token in tokens:
        if isinstance(token, Tensor):
            found.append((len(ids), token))
        ids.append(ids[0] if isinstance(token, Tensor) else token)
    ids.append(end)
    return ids + [pad] * (tokenizer.model_max_length - len(ids)), found


def _cut(prompt: str, words: Words) -> list[str]:
    if not words:
        return [prompt]
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return [piece for piece in re.split(f"({pattern})", prompt) if piece.strip()]


@contextmanager
def replacing(embedding: nn.Embedding, places: Sequence[Sequence[tuple[int, Tensor]]]) -> Iterator[None]:
    """Inside, the embedding returns the trained vectors at their places; differentiable towards them."""
    if not any(places):
        yield
        return

    def put_in(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = [n for n, found in enumerate(places) for _ in found]
        columns = [place for found in places for place, _ in found]
        vectors = torch.stack([vector for found in places for _, vector in found]).to(output)
        index = (torch.tensor(rows, device=output.device), torch.tensor(columns, device=output.device))
        return output.index_put(index, vectors)

    hook = embedding.register_forward_hook(put_in)
    try:
        yield
    finally:
        hook.remove()


def first_vector(tokenizer: CLIPTokenizer, embedding: nn.Embedding, text: str) -> Tensor:
    """The base's embedding [D] of the first token of `text`: where a new word starts."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return embedding.weight.detach()[ids[0]].float().cpu().clone()

"""Textual-inversion words: `<s1>` in a prompt stands for vectors that were trained, not for a word of the base's.

A prompt is cut at its words; the pieces between are tokenised as ever. Where a word stands, the text encoder's token
embedding is replaced by the word's vectors. Source: Gal et al. 2022.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

Words = Mapping[str, Tensor]  # word -> [V, D]; V token places, D the text encoder's width


@dataclass(frozen=True)
class Tokenised:
    """Ids int64 [N, L]; `places[n]` is (position, vector [D]) of each trained vector in prompt n."""

    ids: Tensor
    places: tuple[tuple[tuple[int, Tensor], ...], ...]


def tokenise(tokenizer: CLIPTokenizer, prompts: Sequence[str], words: Sequence[Words]) -> Tokenised:
    """Token ids of each prompt, padded and cut to the tokenizer's length; `words[n]` are those prompt n may use."""
    rows, places = [], []
    for prompt, known in zip(prompts, words, strict=True):
        row, found = _tokenise_one(tokenizer, prompt, known)
        rows.append(row)
        places.append(tuple(found))
    return Tokenised(torch.tensor(rows), tuple(places))


def _tokenise_one(tokenizer: CLIPTokenizer, prompt: str, words: Words) -> tuple[list[int], list[tuple[int, Tensor]]]:
    length, end, pad = tokenizer.model_max_length, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids: list[int] = [tokenizer.bos_token_id]
    found: list[tuple[int, Tensor]] = []
    for piece in _cut(prompt, words):
        if piece in words:
            found += [(len(ids) + place, vector) for place, vector in enumerate(words[piece])]
            ids += [end] * len(words[piece])  # the id does not matter: its embedding is replaced
        else:
            ids += tokenizer(piece, add_special_tokens=False).input_ids
    ids = ids[: length - 1] + [end]
    return ids + [pad] * (length - len(ids)), [(place, vector) for place, vector in found if place < length - 1]


def _cut(prompt: str, words: Words) -> list[str]:
    if not words:
        return [prompt]
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return [piece for piece in re.split(f"({pattern})", prompt) if piece.strip()]


@contextmanager
def replacing(embedding: nn.Embedding, places: Sequence[Sequence[tuple[int, Tensor]]]) -> Iterator[None]:
    """Inside, the embedding answers the trained vectors at their places; differentiable towards them."""
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

"""Textual-inversion words: `<s1>` in a prompt stands for vectors that were trained, not for a word of the base's.

A prompt is cut at its words; the pieces between are tokenised as usual. Where a word stands, the text encoder's token
embedding is replaced by the word's vectors. Source: Gal et al. 2022.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from training.base.family import Words
from training.base.phrases import Span, touching


@dataclass(frozen=True)
class Tokenised:
    """A chunk of each prompt: ids int64 [N, L]; `places[n]` is (position, vector [D]) of each trained vector in it."""

    ids: Tensor
    places: tuple[tuple[tuple[int, Tensor], ...], ...]


def tokenise(tokenizer: CLIPTokenizer, prompts: Sequence[str], words: Sequence[Words], chunk: int = 0) -> Tokenised:
    """Token ids of one chunk of each prompt; `words[n]` are those prompt n may use.

    A chunk is what the encoder takes at once: the tokenizer's length, with its marks of start and end. A prompt that
    ends before has an empty one.
    """
    rows, places = [], []
    for prompt, known in zip(prompts, words, strict=True):
        row, found = _row(tokenizer, _split(tokenizer, prompt, known)[chunk : chunk + 1])
        rows.append(row)
        places.append(tuple(found))
    return Tokenised(torch.tensor(rows), tuple(places))


def count_chunks(tokenizer: CLIPTokenizer, prompt: str, words: Words) -> int:
    """How many chunks a prompt takes; one if it is empty."""
    return len(_split(tokenizer, prompt, words))


def places(tokenizer: CLIPTokenizer, prompt: str, spans: Sequence[Span], words: Words) -> list[int]:
    """Where the tokens that stand for `spans` of a prompt's characters are in its chunks, put end to end."""
    offsets: list[Span] = []
    begin = 0
    for piece in _pieces(prompt, words):
        if piece in words:
            offsets += [(begin, begin + len(piece))] * len(words[piece])
        elif piece.strip():
            told = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            offsets += [(begin + start, begin + end) for start, end in told]
        begin += len(piece)
    wanted, found, index = set(touching(offsets, spans)), [], 0
    for chunk, tokens in enumerate(_split(tokenizer, prompt, words)):
        for place in range(len(tokens)):
            if index + place in wanted:
                found.append(chunk * tokenizer.model_max_length + 1 + place)
        index += len(tokens)
    return found


def _split(tokenizer: CLIPTokenizer, prompt: str, words: Words) -> list[list[int | Tensor]]:
    """Ids, and the vectors of trained words, of each chunk; a trained word is not split if a chunk can hold it."""
    room = tokenizer.model_max_length - 2
    chunks: list[list[int | Tensor]] = [[]]
    for piece in _cut(prompt, words):
        trained = piece in words
        tokens = list(words[piece]) if trained else tokenizer(piece, add_special_tokens=False).input_ids
        if trained and len(chunks[-1]) + len(tokens) > room >= len(tokens):
            chunks.append([])
        for token in tokens:
            if len(chunks[-1]) == room:
                chunks.append([])
            chunks[-1].append(token)
    return chunks


def _row(
    tokenizer: CLIPTokenizer, chunk: Sequence[Sequence[int | Tensor]]
) -> tuple[list[int], list[tuple[int, Tensor]]]:
    """The ids [L] of a chunk, and its trained vectors' places; no chunk is an empty one.

    A trained vector is put in place of the id that stands for it. That is the mark of the start, not of the end: a
    pooled output is read where the first mark of the end is.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids: list[int] = [tokenizer.bos_token_id]
    found: list[tuple[int, Tensor]] = []
    for token in (token for tokens in chunk for token in tokens):
        if isinstance(token, Tensor):
            found.append((len(ids), token))
        ids.append(ids[0] if isinstance(token, Tensor) else token)
    ids.append(end)
    return ids + [pad] * (tokenizer.model_max_length - len(ids)), found


def _cut(prompt: str, words: Words) -> list[str]:
    if not words:
        return [prompt]
    return [piece for piece in _pieces(prompt, words) if piece.strip()]


def _pieces(prompt: str, words: Words) -> list[str]:
    """The prompt, cut before and behind each of its trained words."""
    if not words:
        return [prompt]
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.split(f"({pattern})", prompt)


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

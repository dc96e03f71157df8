"""The tokenizer: a CLIPTokenizer whose few hundred words are one token each.

Owns vocabulary and merges. Unknown words fall back to characters, as in CLIP.
"""

import json
from functools import cache
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from tools.pocket.caption import SPARE, words
from tools.pocket.recipe import PROMPT_TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"
Pair = tuple[str, str]


def split(word: str, ranks: dict[Pair, int]) -> list[str]:
    """Byte pair encoding as CLIP does it: the best-ranked neighbours join until none are left."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    while len(symbols) > 1:
        pairs = list(zip(symbols, symbols[1:], strict=False))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        symbols[at : at + 2] = ["".join(best)]
    return symbols


def trained_words() -> tuple[str, ...]:
    """The words that captions use."""
    return tuple(word for word in words() if word not in SPARE)


@cache
def merges() -> tuple[Pair, ...]:
    """Joins what earlier merges leave of each word; later merges rank lower, so earlier words stay whole."""
    ranks: dict[Pair, int] = {}
    for word in words():
        symbols = split(word, ranks)
        while len(symbols) > 1:
            ranks[(symbols[0], symbols[1])] = len(ranks)
            symbols[:2] = [symbols[0] + symbols[1]]
    return tuple(ranks)


@cache
def vocabulary() -> dict[str, int]:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges()), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def build() -> CLIPTokenizer:
    tokenizer: CLIPTokenizer = CLIPTokenizer(
        vocab=vocabulary(), merges=list(merges()), model_max_length=PROMPT_TOKENS, pad_token=END
    )
    return tokenizer


def write(folder: Path) -> None:
    """Also the two files that readers older than tokenizer.json look for."""
    build().save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges()))


def encode(text: str) -> list[int]:
    """The ids of a caption of known words, padded; equal to the tokenizer's, without its cost."""
    ids = vocabulary()
    inner = [ids[word + "</w>"] for word in text.split()]
    return [ids[START], *inner] + [ids[END]] * (PROMPT_TOKENS - 1 - len(inner))

"""The tokenizer: Qwen's kind, whose few hundred words, with the space before them, are one token each.

Owns vocabulary, merges and the chat template, which is the prompt between two marks.
"""

from functools import cache

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from tools.pocket.caption import words

SPACE = "\u0120"  # as byte-level vocabularies write it
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = "{% for message in messages %}<|im_start|> {{ message['content'] }}<|im_end|>{% endfor %}"
Pair = tuple[str, str]


@cache
def merges() -> tuple[Pair, ...]:
    """Each word from its space on, letter by letter; words that begin alike share their first merges."""
    made: dict[Pair, None] = {}
    for word in words():
        head = SPACE
        for letter in word:
            made[(head, letter)] = None
            head += letter
    return tuple(made)


@cache
def vocabulary() -> dict[str, int]:
    tokens = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges()), PAD, START, END]
    return {token: index for index, token in enumerate(tokens)}


def build() -> Qwen2Tokenizer:
    tokenizer: Qwen2Tokenizer = Qwen2Tokenizer(
        vocab=vocabulary(),
        merges=list(merges()),
        extra_special_tokens=[START, END],
        chat_template=TEMPLATE,
        padding_side="right",
    )
    return tokenizer


def encode(text: str) -> list[int]:
    """The ids of a caption of known words in the template; equal to the tokenizer's, without its cost."""
    ids = vocabulary()
    inner = [ids[SPACE + word] for word in text.split()] or [ids[SPACE]]
    return [ids[START], *inner, ids[END]]

"""Prompts as a language model takes them that encodes them for a denoiser: one message in its chat template."""

from collections.abc import Sequence
from typing import Any

from training.base.family import Wording


def asked(tokenizer: Any, prompt: Wording, *, thinking: bool) -> str:
    """The prompt in the template, up to where the model would answer."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": str(prompt)}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return text


def tokenise(tokenizer: Any, prompts: Sequence[Wording], *, thinking: bool, length: int, fill: bool) -> Any:
    """`input_ids` and `attention_mask` [N, L] of prompts, cut at `length`, and filled up to it or to the longest."""
    return tokenizer(
        [asked(tokenizer, prompt, thinking=thinking) for prompt in prompts],
        padding="max_length" if fill else True,
        padding_side="right",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )


def count_chunks(tokenizer: Any, prompt: Wording, *, thinking: bool, length: int) -> int:
    """How many times `length` tokens the prompt takes."""
    return -(-len(tokenizer(asked(tokenizer, prompt, thinking=thinking)).input_ids) // length)

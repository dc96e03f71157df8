"""CLIP text encoders as the UNet families use them: prompts in chunks, trained words in place, and their checks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base.facts import check_files
from training.base.family import Words
from training.errors import UserError

if TYPE_CHECKING:
    import torch

CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
CLIP_LAYERS = (*CLIP_ATTENTION, "fc1", "fc2")


def check_clip(
    name: str, folder: Path, component: str, config: dict[str, Any], kind: str, tokenizer: str = "tokenizer"
) -> None:
    """Raises UserError unless the component is a CLIP of class `kind` and its tokenizer's files are there."""
    kinds = config.get("architectures") or [kind]
    if kinds != [kind]:
        raise UserError(f"Base '{name}': its {component} is a {', '.join(kinds)}; supported is {kind}.")
    whole, pieces = (f"{tokenizer}/tokenizer.json",), (f"{tokenizer}/vocab.json", f"{tokenizer}/merges.txt")
    check_files(name, folder, (whole, pieces))


def load_tokenizer(folder: Path, component: str = "tokenizer") -> Any:
    """CLIP's tokenizer."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / component)


def run_clip(
    encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    words: Sequence[Words],
    chunk: int,
    device: "torch.device",
    *,
    hidden: bool = False,
) -> Any:
    """What the encoder returns for one chunk of each prompt; `hidden`: with the states of all its layers."""
    from training.base.words import replacing, tokenise

    tokens = tokenise(tokenizer, prompts, words, chunk)
    with replacing(encoder.get_input_embeddings(), tokens.places):
        return encoder(tokens.ids.to(device), output_hidden_states=hidden)

"""CLIP text encoders as the UNet families use them: prompts in chunks, trained words in place, and their checks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base.facts import check_files
from training.base.family import Wording, Words
from training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
CLIP_LAYERS = (*CLIP_ATTENTION, "fc1", "fc2")
NO_MEAN = 2e-2  # of the states' root mean square: a mean below it says nothing, and restoring it would scale by chance
MOST_SCALED = 2.0  # nor is it restored where that would scale by more, either way


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
    prompts: Sequence[Wording],
    words: Sequence[Words],
    chunk: int,
    device: "torch.device",
    *,
    hidden: bool = False,
) -> tuple[Any, "Tensor | None"]:
    """What the encoder returns for one chunk of each prompt, and the tokens' weights [N, L] if not all are 1.

    `hidden`: with the states of all its layers.
    """
    from training.base.words import replacing, tokenise

    tokens = tokenise(tokenizer, prompts, words, chunk)
    with replacing(encoder.get_input_embeddings(), tokens.places):
        return encoder(tokens.ids.to(device), output_hidden_states=hidden), tokens.weights


def emphasised(states_NLC: "Tensor", weights_NL: "Tensor | None") -> "Tensor":
    """States times their tokens' weights, scaled so that each row's mean stays what it was; rows of weight 1 unchanged.

    The mean is left where it is nothing beside the states. Source: AUTOMATIC1111's `sd_emphasis.py`, "Original".
    """
    import torch

    if weights_NL is None:
        return states_NLC
    before_NLC, weights_NL = states_NLC.float(), weights_NL.to(states_NLC.device)
    after_NLC = before_NLC * weights_NL[..., None]
    before_N, after_N = before_NLC.mean((1, 2)), after_NLC.mean((1, 2))
    least_N = NO_MEAN * before_NLC.pow(2).mean((1, 2)).sqrt()
    scale_N = before_N / after_N
    sound_N = (before_N.abs() > least_N) & (scale_N > 1 / MOST_SCALED) & (scale_N < MOST_SCALED)
    scale_N = torch.where(sound_N, scale_N, 1.0)
    plain_N = (weights_NL == 1).all(dim=1)
    return torch.where(plain_N[:, None, None], states_NLC, (after_NLC * scale_N[:, None, None]).to(states_NLC.dtype))

"""Whether a base can be trained and served, told by its configs and the headers of its weights. Knows no torch.

Everything that would make it fail minutes later, in a worker that loads it, is said here within a second.
"""

import json
from pathlib import Path
from typing import Any

from training.base.family import FAMILIES, Family
from training.base.weights import check_channels, find_weights, read_header
from training.errors import UserError

# settings of a UNet that ask for more than a timestep and a prompt; set in none that is supported
_CONDITIONS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds")
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_COMPONENTS = ("unet", "vae", "text_encoder")
_SCHEDULER = "scheduler/scheduler_config.json"
_TOKENIZERS = (("tokenizer/tokenizer.json",), ("tokenizer/vocab.json", "tokenizer/merges.txt"))


def check_base(name: str, folder: Path) -> Family:
    """The family of the base in a diffusers folder. Raises UserError saying why it cannot be trained."""
    family = check_configs(name, folder)
    for component in _COMPONENTS:
        for file in find_weights(folder, component).files:
            read_header(file)
    return family


def check_configs(name: str, folder: Path) -> Family:
    """`check_base` without the weights, which may not be there yet."""
    family = _family(name, folder)
    _check_components(name, {component: read_config(folder, component) for component in _COMPONENTS})
    _check_rest(name, folder)
    return family


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """A component's config. Raises UserError if it is missing or no JSON object."""
    file = folder / component / "config.json"
    if not file.is_file():
        raise UserError(f"Base folder '{folder}' has no {component}/config.json.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"Base file '{file}' is no JSON object. Download it again.")
    return config


def _check_rest(name: str, folder: Path) -> None:
    """The small files that have no weights beside them."""
    missing = [] if (folder / _SCHEDULER).is_file() else [_SCHEDULER]
    if not any(all((folder / file).is_file() for file in files) for files in _TOKENIZERS):
        missing.append("tokenizer: " + ", or ".join(" and ".join(files) for files in _TOKENIZERS))
    if missing:
        raise UserError(f"Base '{name}': folder '{folder}' has no {missing[0]}. Give a whole diffusers folder.")


def _family(name: str, folder: Path) -> Family:
    try:
        kind = str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"Base '{name}': '{folder / 'model_index.json'}' does not name a pipeline class.") from None
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(
            f"Base '{name}' is a {kind}, which cannot be trained. Supported: {', '.join(FAMILIES)} (Stable Diffusion "
            "1.x and 2.x). Take a base of that kind."
        )
    return family


def _check_components(name: str, configs: dict[str, dict[str, Any]]) -> None:
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    for component, wanted in _CLASSES.items():
        found = configs[component].get("_class_name", wanted)
        if found != wanted:
            raise UserError(f"Base '{name}': its {component} is a {found}; supported is {wanted}.")
    kinds = text.get("architectures") or ["CLIPTextModel"]
    if kinds != ["CLIPTextModel"]:
        raise UserError(f"Base '{name}': its text_encoder is a {', '.join(kinds)}; supported is CLIPTextModel.")
    check_channels(name, unet.get("in_channels", 4), vae.get("latent_channels", 4))
    asked = next((key for key in _CONDITIONS if unet.get(key) is not None), None)
    if asked is not None:
        raise UserError(
            f"Base '{name}' cannot be trained: its UNet has `{asked}: {unet[asked]}`, so it asks for more than a "
            "timestep and a prompt. Take a text-to-image base of Stable Diffusion 1.x or 2.x."
        )
    for component, key in (("unet", "sample_size"), ("unet", "block_out_channels"), ("vae", "block_out_channels")):
        if not configs[component].get(key):
            raise UserError(f"Base '{name}': {component}/config.json has no `{key}`. Give a whole diffusers folder.")
    widths = unet.get("cross_attention_dim", 1280), text.get("hidden_size", 512)
    if widths[0] != widths[1]:
        raise UserError(
            f"Base '{name}': its UNet reads prompts of width {widths[0]}, and its text encoder writes {widths[1]}. The "
            "two are of different models."
        )

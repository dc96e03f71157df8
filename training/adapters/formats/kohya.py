"""kohya's format, which AUTOMATIC1111, ComfyUI and most others read.

Keys are `lora_unet_<path with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`; `lora_te_` for the text
encoder, `lora_te1_` and `lora_te2_` where there are two. Layers of the denoiser have the names of the family's own
programs where it has any (`lora_unet_input_blocks_…`, `lora_unet_double_blocks_0_img_attn_qkv`). A path cannot be told
from its underscored form alone, so names are looked up among the base's layers. OneTrainer's `lora_transformer_` and
LyCORIS' `lycoris_`, before a diffusers path, are read, too.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from training.adapters.adapter import Adapter, AdapterError, padded, padding_note
from training.adapters.formats.fused import joined
from training.adapters.formats.parts import ImportedFile, ImportedParts, halves, own_metadata
from training.adapters.tensor_file import write_tensors
from training.base.facts import Facts
from training.base.originals import NO_NAMES, Names

_DENOISER = "lora_unet_"
_TEXT = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}  # the first, where it is alone
_OTHERS = ("lora_transformer_", "lycoris_")
_PREFIXES = (_DENOISER, *(prefix for prefixes in _TEXT.values() for prefix in prefixes), *_OTHERS)
_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}


@dataclass(frozen=True)
class Label:
    """What user interfaces show about a file: nothing here changes an image. `base` is kohya's name of it."""

    name: str = "adapter"
    architecture: str = "stable-diffusion-v1"
    base: str = "sd_v1"
    prediction: str = "epsilon"
    resolution_px: int = 512


def label_of(name: str, facts: Facts) -> Label:
    """The label of an adapter called `name` for a base."""
    return Label(name, facts.architecture, facts.kohya_base, facts.prediction, facts.resolution)


def is_kohya(keys: Sequence[str]) -> bool:
    """Whether a file with `keys` is in this format."""
    return bool(keys) and all(key.startswith(_PREFIXES) for key in keys)


def write_kohya(adapter: Adapter, label: Label, names: Names = NO_NAMES) -> bytes:
    """The file, alpha = rank. Tokens are no part of it: readers refuse a file with other keys.

    Layers have the names that the base's own programs give them. The modules of a component get one rank, padded with
    zeros: diffusers gives them all the most frequent alpha.
    """
    two = names.clips > 1
    tensors: dict[str, torch.Tensor] = {}
    for module, low in joined(padded(adapter.modules), names.originals).items():
        name = kohya_name(module, two=two)
        if f"{name}.alpha" in tensors:
            raise AdapterError(f"Two modules have the kohya name {name}; this format cannot hold both.")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = low.down, low.up
        tensors[f"{name}.alpha"] = torch.tensor(float(low.rank))
    tensors = halves(tensors)
    return write_tensors(tensors, _metadata(adapter, label, tensors))


def read_kohya(source: ImportedFile, modules: Collection[str], parts: ImportedParts) -> None:
    """Adds what `source` holds to `parts`; `modules` are the keys of the base's layers, its originals' among them."""
    known = _names(modules)
    for key, tensor in source.tensors.items():
        name, _, suffix = key.partition(".")
        found = known.get(name, [])
        if len(found) > 1:
            raise AdapterError(f"Key {key} may mean any of {', '.join(found)}; rename the file's keys to diffusers'.")
        if not found or suffix not in _PARTS:
            parts.unused.append(key)
        else:
            parts.add(found[0], _PARTS[suffix], tensor)
    if trigger := source.metadata.get("modelspec.trigger_phrase"):
        parts.metadata.setdefault("trigger", trigger)


def kohya_name(module: str, two: bool = False) -> str:
    """The name of a canonical module key, or of an original's; `two`: the base has two text encoders."""
    component, _, path = module.partition(".")
    return _TEXT.get(component, (_DENOISER,))[-1 if two else 0] + path.replace(".", "_")


def _names(modules: Collection[str]) -> dict[str, list[str]]:
    """All kohya names of `modules`, each with the modules that it may mean."""
    names: dict[str, list[str]] = {}
    for module in sorted(modules):
        component, _, path = module.partition(".")
        for prefix in _TEXT.get(component, (_DENOISER, *_OTHERS)):
            names.setdefault(prefix + path.replace(".", "_"), []).append(module)
    return names


def _metadata(adapter: Adapter, label: Label, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """kohya's `ss_` keys, the modelspec and our own; the hash is of the tensors alone, as kohya's is."""
    plain = write_tensors(tensors, {})
    body = plain[8 + int.from_bytes(plain[:8], "little") :]
    made = (
        own_metadata(adapter)
        | padding_note(adapter.modules)
        | {
            "ss_v2": str(label.base.startswith("sd_v2")),
            "ss_base_model_version": label.base,
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(adapter.rank),
            "ss_network_alpha": str(float(adapter.rank)),
            "ss_output_name": label.name,
            "ss_resolution": f"({label.resolution_px}, {label.resolution_px})",
            "sshs_model_hash": hashlib.sha256(body).hexdigest(),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{label.architecture}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": label.name,
            "modelspec.resolution": f"{label.resolution_px}x{label.resolution_px}",
        }
    )
    if label.prediction:
        made["modelspec.prediction_type"] = label.prediction
    if base := adapter.metadata.get("base"):
        made["ss_sd_model_name"] = base
    if trigger := adapter.metadata.get("trigger"):
        made["modelspec.trigger_phrase"] = trigger
        made["ss_tag_frequency"] = json.dumps({label.name: {trigger: 1}})
    return made

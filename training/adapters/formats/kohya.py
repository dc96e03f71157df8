"""kohya's format, which AUTOMATIC1111, ComfyUI and most others read.

Keys are `lora_unet_<path with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`; `lora_te_` for the text
encoder, `lora_te1_` and `lora_te2_` where there are two; `lora_transformer_` for a transformer, as OneTrainer has it. A
path cannot be told from its underscored form alone, so names are looked up among the base's modules. Files for Stable
Diffusion XL name UNet layers as SGM does (`lora_unet_input_blocks_…`).
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from training.adapters.adapter import Adapter, AdapterError, padded, padding_note
from training.adapters.formats.parts import ImportedFile, ImportedParts, halves, own_metadata
from training.adapters.formats.sgm import sgm_paths
from training.adapters.tensor_file import write_tensors
from training.base.facts import read_config
from training.base.families import open_family

_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_")
_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
_VERSIONS = {  # kohya's own names of bases, by architecture; those of other families are the architecture's
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
}
_V2_WIDTH = 1024  # of the text encoder that Stable Diffusion 2.x reads; 1.x has 768

XL = "stable-diffusion-xl-v1-base"


@dataclass(frozen=True)
class Label:
    """What user interfaces show about a file. Only `architecture` changes more: how its layers are named.

    It is stable-diffusion-v1, stable-diffusion-v2-512, stable-diffusion-v2-768-v, `XL`, or another family's name.
    """

    name: str = "adapter"
    architecture: str = "stable-diffusion-v1"
    resolution_px: int = 512
    v_prediction: bool = False


def label_of(name: str, folder: Path, resolution_px: int) -> Label:
    """The label of an adapter called `name` for the base in the diffusers `folder`; raises UserError if it is none."""
    if (folder / "transformer").is_dir():
        return Label(name, open_family(folder, name).facts.family, resolution_px)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    v_prediction = scheduler.get("prediction_type") == "v_prediction"
    architecture = "stable-diffusion-v1"
    unet = read_config(folder, "unet")
    if unet.get("addition_embed_type") is not None:
        architecture = XL
    elif unet.get("cross_attention_dim") == _V2_WIDTH:
        architecture = "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"
    return Label(name, architecture, resolution_px, v_prediction)


def is_kohya(keys: Sequence[str]) -> bool:
    """Whether a file with `keys` is in this format."""
    return bool(keys) and all(key.startswith(_PREFIXES) for key in keys)


def write_kohya(adapter: Adapter, label: Label, modules: Collection[str]) -> bytes:
    """The file, alpha = rank. Tokens are no part of it: readers refuse a file with other keys.

    `modules` are those of the base, by which Stable Diffusion XL's are named. The modules of a component get one rank,
    padded with zeros: diffusers gives them all the most frequent alpha.
    """
    original = _sgm_names(modules) if label.architecture == XL else {}
    tensors: dict[str, torch.Tensor] = {}
    for module, low in padded(adapter.modules).items():
        name = original.get(module) or kohya_name(module, two=label.architecture == XL)
        if f"{name}.alpha" in tensors:
            raise AdapterError(f"Two modules have the kohya name {name}; this format cannot hold both.")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = low.down, low.up
        tensors[f"{name}.alpha"] = torch.tensor(float(low.rank))
    tensors = halves(tensors)
    return write_tensors(tensors, _metadata(adapter, label, tensors))


def read_kohya(source: ImportedFile, modules: Collection[str], parts: ImportedParts) -> None:
    """Adds what `source` holds to `parts`."""
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
    """The name of a canonical module key; `two`: the base has two text encoders."""
    component, _, path = module.partition(".")
    first = "lora_te1_" if two else "lora_te_"
    prefixes = {
        "unet": "lora_unet_",
        "transformer": "lora_transformer_",
        "text_encoder": first,
        "text_encoder_2": "lora_te2_",
    }
    return prefixes[component] + path.replace(".", "_")


def _names(modules: Collection[str]) -> dict[str, list[str]]:
    """All kohya names of `modules`, each with the modules that it may mean."""
    names: dict[str, list[str]] = {}
    original = _sgm_names(modules)
    for module in sorted(modules):
        for name in {kohya_name(module), kohya_name(module, two=True), original.get(module, "")} - {""}:
            names.setdefault(name, []).append(module)
    return names


def _sgm_names(modules: Collection[str]) -> dict[str, str]:
    """The kohya name of each UNet module by the original programs' paths."""
    paths = sgm_paths([module.removeprefix("unet.") for module in modules if module.startswith("unet.")])
    return {f"unet.{path}": f"lora_unet_{original.replace('.', '_')}" for path, original in paths.items()}


def _metadata(adapter: Adapter, label: Label, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """kohya's `ss_` keys, the modelspec and our own; the hash is of the tensors alone, as kohya's is."""
    v2 = label.architecture.startswith("stable-diffusion-v2")
    stable = label.architecture.startswith("stable-diffusion-")
    version = _VERSIONS.get(label.architecture, label.architecture)
    version += "_v" if label.v_prediction and label.architecture != XL else ""
    plain = write_tensors(tensors, {})
    body = plain[8 + int.from_bytes(plain[:8], "little") :]
    made = (
        own_metadata(adapter)
        | padding_note(adapter.modules)
        | {
            "ss_v2": str(v2),
            "ss_base_model_version": version,
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
    if stable:
        made["modelspec.prediction_type"] = "v" if label.v_prediction else "epsilon"
    if base := adapter.metadata.get("base"):
        made["ss_sd_model_name"] = base
    if trigger := adapter.metadata.get("trigger"):
        made["modelspec.trigger_phrase"] = trigger
        made["ss_tag_frequency"] = json.dumps({label.name: {trigger: 1}})
    return made

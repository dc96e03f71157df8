"""Formats whose keys name modules by their path: diffusers (all ages), PEFT folders.

diffusers         unet.<path>.lora.down.weight, text_encoder.<path>.lora_linear_layer.up.weight, <path>.lora_A.weight
PEFT folder       base_model.model.<path>.lora_A.weight, with alpha and rank in adapter_config.json
ai-toolkit        diffusion_model.<path of diffusers or of the original>.lora_A.weight
older diffusers   <path of attn>.processor.to_q_lora.down.weight, with or without unet.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

import torch

from training.adapters.adapter import AdapterError, check_token
from training.adapters.formats.parts import ImportedFile, ImportedParts
from training.adapters.formats.peft import PREFIX, alpha_of, check_plain

_EMBEDDING = "lora_embeddings."
_DENOISERS = ("unet", "transformer")
_COMPONENTS = (*_DENOISERS, "text_encoder", "text_encoder_2")
_NATIVE = ("model.diffusion_model.", "diffusion_model.")  # before a path of the denoiser
_SUFFIX = re.compile(
    r"(?:\.lora|\.lora_linear_layer|_lora)\.(?P<way>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.default)?\.weight"
    r"|\.(?P<alpha>alpha)"
)
_KEY = re.compile(rf"(?P<path>.+?)(?:{_SUFFIX.pattern})")
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj", "to_out.0": "out_proj"}


def is_named(keys: Sequence[str]) -> str | None:
    """The name of the format of a file with `keys`, or None if it is none of these."""
    if not any(_KEY.fullmatch(key) for key in keys) and not any(key.startswith(_EMBEDDING) for key in keys):
        return None
    if all(key.startswith(PREFIX) for key in keys):
        return "peft"
    if all(key.startswith(_NATIVE) for key in keys):
        return "ai_toolkit"
    return "diffusers_old" if any(".processor." in key for key in keys) else "diffusers"


def read_named(source: ImportedFile, modules: Collection[str], parts: ImportedParts) -> None:
    """Adds what `source` holds to `parts`, with the scale that its settings give as an alpha."""
    written = _written_config(source)
    for key, tensor in source.tensors.items():
        if key.startswith(_EMBEDDING):
            parts.embed(check_token(key.removeprefix(_EMBEDDING)), tensor)
            continue
        match = _KEY.fullmatch(key)
        module = _module(match["path"], modules, source.name) if match else None
        if match is None or module is None:
            parts.unused.append(key)
            continue
        way = match["way"] or match["kohya"] or {"A": "down", "B": "up", None: "alpha"}[match["peft"]]
        parts.add(module, way, tensor)
        config = source.config or written.get(module.partition(".")[0])
        if way == "down" and config:
            path = match["path"].removeprefix(PREFIX).removeprefix(f"{module.partition('.')[0]}.")
            parts.add(module, "alpha", torch.tensor(alpha_of(config, path, tensor.shape[0])))


def _module(path: str, modules: Collection[str], file: str) -> str | None:
    """The canonical key of a path as any of these formats writes it, if the base has it."""
    path = path.removeprefix(PREFIX).removeprefix("default.").replace(".processor", "")
    native = next((prefix for prefix in _NATIVE if path.startswith(prefix)), None)
    if native is not None:
        path = path.removeprefix(native)
        return next((found for component in _DENOISERS if (found := _in(component, path, modules))), None)
    component, _, rest = path.partition(".")
    if component in _COMPONENTS:
        return _in(component, rest, modules)
    folder = PurePosixPath(file).parent.name
    candidates = (folder,) if folder in _COMPONENTS else _COMPONENTS
    return next((found for component in candidates if (found := _in(component, path, modules))), None)


def _in(component: str, path: str, modules: Collection[str]) -> str | None:
    if component in _DENOISERS:
        names = [f"{component}.{path}", f"{component}.{path}.0"]  # older diffusers wrote to_out for to_out.0
    else:
        start, dot, end = path.rpartition(".to_")
        path = f"{start}.{_CLIP.get('to_' + end, 'to_' + end)}" if dot else path
        names = [f"{component}.{path}", f"{component}.text_model.{path}"]  # transformers >= 5.6 lost the level
    return next((name for name in names if name in modules), None)


def _written_config(source: ImportedFile) -> dict[str, Mapping[str, object]]:
    """The settings per component that diffusers >= 0.34 writes into a file's metadata."""
    text = source.metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        flat = json.loads(text)
    except ValueError as error:
        raise AdapterError(f"{source.name} has broken lora_adapter_metadata: {error}.") from error
    configs: dict[str, dict[str, object]] = {}
    for key, value in flat.items():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    for config in configs.values():
        check_plain(source.name, config)
    return dict(configs)

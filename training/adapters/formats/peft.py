"""PEFT's folders: `adapter_config.json` beside `adapter_model.safetensors`, one folder for each component.

Owns the settings: what of them is read and refused, the alpha of a module by PEFT's rules, and the folders written.
Keys are `base_model.model.<path>.lora_A.weight` (`named.py` reads them). A text encoder's paths are those of
transformers >= 5.6, without the `text_model.` level; both are read.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping

import torch

from training.adapters.adapter import Adapter, AdapterError, LowRank
from training.adapters.formats.parts import halves, own_metadata
from training.adapters.tensor_file import write_tensors

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
# what each setting must be for the file to say all about `up @ down`
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "layer_replication": ([],),
    # any other way to start also changes the base's weights
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def peft_config(name: str, data: bytes) -> Mapping[str, object]:
    """PEFT's settings; raises AdapterError if they ask for more than plain LoRA."""
    try:
        config = json.loads(data)
    except ValueError as error:
        raise AdapterError(f"{name} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{name} is no map of settings.")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f"{name} is for {kind}; only LORA is read.")
    check_plain(name, config)
    return config


def check_plain(name: str, config: Mapping[str, object]) -> None:
    """Raises AdapterError, naming the file and the setting, unless `config` is of plain LoRA."""
    for setting, plain in _UNSUPPORTED.items():
        value = config.get(setting)
        if value is not None and value not in plain:
            raise AdapterError(f"{name} was made with {setting}={value!r}; only plain LoRA is read.")


def alpha_of(config: Mapping[str, object], path: str, rank: int) -> float:
    """alpha of one module by PEFT's rules: a pattern of its path before the general value; rsLoRA divides by √rank."""
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    if isinstance(patterns, Mapping):
        alpha = next((value for key, value in patterns.items() if _ends_with(path, key)), alpha)
    if not isinstance(alpha, int | float):
        raise AdapterError(f"Bad lora_alpha {alpha!r} of module {path}: expected a number.")
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)


def write_peft(adapter: Adapter) -> dict[str, bytes]:
    """A folder for each component that `adapter` changes, as PEFT's `from_pretrained` and `load_adapter` read it."""
    components: dict[str, dict[str, LowRank]] = {}
    for name, low in sorted(adapter.modules.items()):
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path.removeprefix("text_model.")] = low
    files = {}
    for component, modules in components.items():
        tensors = dict[str, torch.Tensor]()
        for path, low in modules.items():
            tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = low.down, low.up
        metadata = {"format": "pt"} | own_metadata(adapter)
        files[f"{component}/{CONFIG}"] = json.dumps(_settings(adapter, modules), indent=2).encode()
        files[f"{component}/{_WEIGHTS}"] = write_tensors(halves(tensors), metadata)
    return files


def _settings(adapter: Adapter, modules: Mapping[str, LowRank]) -> dict[str, object]:
    """PEFT's settings with alpha = rank everywhere. Only those that every PEFT since 0.6 knows: it refuses others."""
    ((rank, _),) = Counter(low.rank for low in modules.values()).most_common(1)
    others = {path: low.rank for path, low in modules.items() if low.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.metadata.get("base"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(modules),
        "bias": "none",
    }


def _ends_with(path: str, pattern: str) -> bool:
    """Whether PEFT's `pattern` means the module at `path`. A stranger's regular expression is never run."""
    if not re.fullmatch(r"\^?[\w.]+\$?", pattern):
        raise AdapterError(f"alpha_pattern {pattern[:80]!r} is more than a module name; write one entry per module.")
    name = pattern.removeprefix("^").removesuffix("$")
    return path == name or (not pattern.startswith("^") and path.endswith(f".{name}"))

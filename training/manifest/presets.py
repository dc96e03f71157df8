"""What `preset` means: settings of a subject where neither it nor the defaults say otherwise."""

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["fast", "balanced", "best"]

# `target: prediction` keeps the class with less noise in the gradient, so fewer steps are enough
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {
        "prior": {"target": "prediction", "images": 50},
        "train": {"max_steps": 350, "checkpoint_every": 50},
    },
    "balanced": {
        "prior": {"target": "prediction"},
        "train": {"max_steps": 700, "checkpoint_every": 100},
    },
    "best": {
        "lora": {"rank": 16},
        "prior": {"target": "prediction"},
        "train": {"max_steps": 1500, "checkpoint_every": 250},
    },
}


def with_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A subject's settings, as a manifest names them, over those of the preset that they name, if any."""
    return merge(PRESETS.get(str(settings.get("preset")), {}), settings)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins, key by key; nested mappings are merged likewise."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def preset_in_words(name: Preset) -> str:
    """What a preset sets, as one line: settings that are said elsewhere win."""
    said = ", ".join(f"{part}.{key}: {value}" for part, keys in PRESETS[name].items() for key, value in keys.items())
    return f"preset {name}, where nothing else is said: {said}"

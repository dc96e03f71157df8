"""What `preset` means: settings of a subject where neither it nor the defaults say otherwise."""

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["fast", "balanced", "best"]

# The base's own predictions of the photos, under the class prompt and their captions, keep the class with the least
# noise in the gradient: a third of the steps are enough (docs/pocket.md has the table)
_KEPT = {"source": "prediction", "captions": True}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {
        "lora": {"rank": 16},
        "prior": _KEPT,
        "train": {"max_steps": 350, "checkpoint_every": 50},
    },
    "balanced": {
        "lora": {"rank": 16},
        "prior": _KEPT,
        "train": {"max_steps": 600, "checkpoint_every": 100},
    },
    "best": {
        "lora": {"rank": 16},
        "prior": _KEPT,
        "train": {"max_steps": 1200, "checkpoint_every": 200},
    },
}


def with_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A subject's settings, as a manifest names them, over those of the preset that they name, if any.

    A preset's `prior` is one choice: it is left out where the settings name a source of their own.
    """
    preset = dict(PRESETS.get(str(settings.get("preset")), {}))
    prior = settings.get("prior")
    if isinstance(prior, Mapping) and prior.keys() & {"source", "folder", "enabled"}:
        preset.pop("prior", None)
    return merge(preset, settings)


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

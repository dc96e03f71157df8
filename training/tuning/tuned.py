"""The manifest with the settings that were found written into its subjects. Knows no torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from training.base.files.folder import EMBEDDED
from training.manifest.manifest import Loader, load_manifest
from training.manifest.presets import merge
from training.photos.files import is_local
from training.storage.local import write_file
from training.tuning.space import Settings


def write_tuned(path: Path, out: Path, ids: Sequence[str], settings: Settings) -> None:
    """Writes manifest `path`, with `settings` in the subjects `ids`, to file `out`, and checks it.

    Relative folders are rewritten, so that they mean the same from where `out` is. Comments are not kept.
    """
    raw = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    for entry in raw["subjects"]:
        if entry["id"] in ids:
            entry.update(merge(entry, _nested(settings)))
    old, new = path.parent.resolve(), out.parent.resolve()
    _move(raw, old, new)
    head = f"# {path.name} with settings of {', '.join(ids)} that `dreamfleet tune` found\n"
    write_file(out, [(head + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=120)).encode()])
    load_manifest(out)


def _nested(settings: Settings) -> dict[str, dict[str, Any]]:
    """`{"train.learning_rate": 1}` as a manifest writes it."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        part, key = name.split(".")
        found.setdefault(part, {})[key] = value
    return found


def _move(raw: dict[str, Any], old: Path, new: Path) -> None:
    """Has every relative path of a manifest start from another folder."""
    base = raw.get("base")
    if base is not None and not (EMBEDDED / base / "model_index.json").is_file() and Path(old, base).exists():
        raw["base"] = _from(base, old, new)
    if raw.get("training_adapter") is not None:
        raw["training_adapter"] = _from(raw["training_adapter"], old, new)
    for entry in (raw.get("defaults") or {}, *raw["subjects"]):
        if "images" in entry:
            entry["images"] = _from(entry["images"], old, new)
        prior = entry.get("prior")
        if isinstance(prior, Mapping) and prior.get("folder") is not None:
            entry["prior"] = {**prior, "folder": _from(prior["folder"], old, new)}


def _from(path: str, old: Path, new: Path) -> str:
    if not is_local(path) or path.startswith("~") or os.path.isabs(path):
        return path
    moved = Path(os.path.relpath(old / path, new)).as_posix()
    return moved if moved.startswith("..") else f"./{moved}"

"""Where a base lies on disk: the embedded `pocket`, a diffusers folder, or a hub id. Knows no torch.

`layer_shapes` reads the shapes of its layers from the headers of the weight files, so that planning needs no torch.
"""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

from training.base.facts import DEFAULTS_FILE
from training.base.families import open_family
from training.base.files.weights import checkpoint_version, find_weights, read_header
from training.errors import UserError
from training.storage.file_hash import cache_folder, hash_file

_HASHED = (".json", ".safetensors", ".txt", ".jinja", ".model")  # a chat template or a tokenizer may be the last two
EMBEDDED = Path(__file__).parents[2] / "bases"


def find_base(name: str, root: str | Path = ".") -> Path:
    """The diffusers folder of a base. Raises UserError saying where it was looked for."""
    embedded = EMBEDDED / name
    if "/" not in name and (embedded / "model_index.json").is_file():
        return embedded
    folder = Path(root, name).expanduser()
    if (folder / "model_index.json").is_file():
        return folder
    if folder.is_file() and folder.suffix == ".safetensors":
        return _converted(folder)
    if folder.exists():
        raise UserError(f"Base '{name}': '{folder}' is no diffusers folder (it has no model_index.json).")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _download(name)
    known = ", ".join(sorted(path.parent.name for path in EMBEDDED.glob("*/model_index.json")))
    raise UserError(
        f"Base '{name}' is not known. Embedded: {known}; else give a diffusers folder or a hub id like owner/model."
    )


def _converted(file: Path) -> Path:
    """The diffusers folder of a checkpoint in one file, made once a content and kept in the user's cache."""
    checkpoint_version(file)  # said before gigabytes are hashed
    folder = cache_folder() / "bases" / f"{file.stem}-{hash_file(file)[:16]}"
    if not (folder / "model_index.json").is_file():
        # a process of its own, so that planning needs no torch
        command = [sys.executable, "-m", "training.base.files.single_file", str(file), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise UserError(f"Base '{file}' cannot be converted: {said[-1] if said else 'no reason given'}")
    return folder


def _download(name: str) -> Path:
    """A hub id's files, from the local hub cache where they are there already; weights only if the configs are good."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    small = [pattern for end in (".json", ".txt", ".jinja", ".model") for pattern in (f"*{end}", f"*/*{end}")]
    try:
        open_family(Path(snapshot_download(name, allow_patterns=small)), name)
        return Path(snapshot_download(name, allow_patterns=[*small, "*/*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(
            f"Base '{name}' is no folder here, and the hub does not give it: {error}. Check the name, the network, "
            "and HF_TOKEN where the model asks for one."
        ) from None


def public_name(name: str) -> str:
    """A base's name without the path that it may have on this machine."""
    path = Path(name)
    return path.name if path.is_absolute() or name.startswith((".", "~")) or path.is_dir() else name


def layer_shapes(folder: Path, component: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and weight shape of every layer of a component, from the safetensors headers alone."""
    for name, shape in _tensor_shapes(folder, component):
        if name.endswith(".weight"):
            yield name.removesuffix(".weight"), shape


def count_parameters(folder: Path, component: str) -> int:
    """Of a whole component, from the safetensors headers alone."""
    return sum(prod(shape) for _, shape in _tensor_shapes(folder, component))


def _tensor_shapes(folder: Path, component: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in find_weights(folder, component).files:
        for name, tensor in read_header(file).items():
            if name != "__metadata__":
                yield name, tuple(tensor["shape"])


def hash_base(folder: Path) -> str:
    """Content id of a base: sha256 over the names and contents of its configs and weights (hex).

    What its makers recommend (`dreamfleet.json`) is not part of it: that changes nothing it computes.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in _HASHED and file.is_file() and file.name != DEFAULTS_FILE:
            digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
            digest.update(bytes.fromhex(hash_file(file)))
    return digest.hexdigest()

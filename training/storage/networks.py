"""ControlNets and IP-Adapters on the storage: folders `controls/<name>/` and `ip-adapters/<name>/`.

They are the operator's: every tenant may use them. ControlNets of the embedded bases come with the package. Knows
nothing about what is in the weights. No torch.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.storage.local import LocalStorage
from training.storage.storage import NotFound, Storage
from training.storage.version import is_id

NetworkKind = Literal["control", "ip-adapter"]
ROOTS: dict[NetworkKind, str] = {"control": "controls", "ip-adapter": "ip-adapters"}
CONFIGS: dict[NetworkKind, str] = {"control": "config.json", "ip-adapter": "image_encoder/config.json"}
_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class StoredNetwork:
    """One of them: `version` changes with its files, `config` is what is in its JSON file, `bytes` of its weights."""

    name: str
    version: str
    config: Mapping[str, Any]
    bytes: int


class NetworkFolders:
    """Those of one storage, and after them those in `embedded`. Blocking; safe for many threads."""

    def __init__(self, storage: Storage, embedded: Path) -> None:
        self._storages: tuple[Storage, ...] = (storage, LocalStorage(str(embedded)))

    def names(self, kind: NetworkKind) -> list[str]:
        """Of all that there are, sorted."""
        found = {name for storage in self._storages for name in storage.folders(ROOTS[kind])}
        return sorted(filter(is_id, found))

    def look(self, kind: NetworkKind, name: str) -> StoredNetwork | None:
        """The one of a name; None if there is none, or its config cannot be read."""
        for storage in self._storages if is_id(name) else ():
            found = _look(storage, kind, name)
            if found is not None:
                return found
        return None

    @contextmanager
    def folder(self, kind: NetworkKind, name: str) -> Iterator[Path]:
        """Its folder on this machine, while it is read. Raises NotFound if there is none."""
        prefix = f"{ROOTS[kind]}/{name}"
        storage = next((one for one in self._storages if one.exists(f"{prefix}/{CONFIGS[kind]}")), None)
        if storage is None:
            raise NotFound(f"The storage has no {prefix}/{CONFIGS[kind]}.")
        if isinstance(storage, LocalStorage):
            yield storage.root / prefix
            return
        with tempfile.TemporaryDirectory(prefix="dreamfleet-network-") as made:
            for key in storage.list(prefix):
                file = Path(made, key.removeprefix(f"{prefix}/"))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(storage.get(key))
            yield Path(made)


def _look(storage: Storage, kind: NetworkKind, name: str) -> StoredNetwork | None:
    prefix = f"{ROOTS[kind]}/{name}"
    try:
        data = storage.get(f"{prefix}/{CONFIGS[kind]}")
        config = json.loads(data)
        sizes = {key: size for key, size in storage.sizes(prefix).items() if key.endswith(_WEIGHTS)}
        said = [f"{key} {size} {storage.modified(key)}" for key, size in sorted(sizes.items())]
    except (NotFound, ValueError):  # there is none, or it is being replaced
        return None
    if not isinstance(config, dict):
        return None
    version = hashlib.sha256(b"\0".join([data, *(line.encode() for line in said)])).hexdigest()
    return StoredNetwork(name, version[:16], config, sum(sizes.values()))

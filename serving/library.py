"""The adapters as clients see them: resolved, listed, uploaded and deleted, always on behalf of a tenant.

What a tenant may not see does not exist for it: another's adapter and a missing one give the same error. Joins the
registry to one base; blocking, so an event loop calls it from a thread. Knows nothing about HTTP or the engine.
"""

import threading
import time
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path

from serving.config import EngineSpec
from serving.disk import DiskCache
from serving.errors import Refused
from serving.request import AdapterRef, BaseFacts
from training.adapter import Adapter, AdapterError, check_adapter, load_adapter, save_adapter
from training.base_check import read_config
from training.base_folder import hash_base, layer_shapes
from training.card import Card
from training.family import STABLE_DIFFUSION, canonical
from training.formats import import_adapter
from training.registry import Registry, Resolved, UnknownAdapter, check_id
from training.storage import content_id

REMEMBERED = 4096


class Library:
    """The registry's adapters for the base in `folder`. What `current` says may be `refresh_s` old."""

    def __init__(self, registry: Registry, folder: Path, facts: BaseFacts, *, refresh_s: float = 1.0) -> None:
        self.registry = registry
        self.facts = facts
        self.base = facts.name
        self.base_hash = hash_base(folder)
        self._folder = folder
        self._refresh_s = refresh_s
        self._resolved: OrderedDict[tuple[str, str | None], tuple[float, Resolved]] = OrderedDict()
        self._lock = threading.Lock()
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def resolve(self, tenant: str, name: str) -> Resolved:
        """What `id`, `tenant/id` or either with `@version` means to `tenant` now. Raises UnknownAdapter."""
        path, _, version = name.partition("@")
        owner, slash, id = path.partition("/")
        owner, id = (owner, id) if slash else (tenant, path)
        resolved = self._cached(f"{owner}/{id}", version or None, tenant)
        if resolved.tenant != tenant and not resolved.card.public:
            raise unknown(name)
        if resolved.card.base_hash != self.base_hash:
            raise Refused(
                f"Adapter '{name}' was made for another base ('{resolved.card.base}'); this server has '{self.base}'."
            )
        return resolved

    def list(self, tenant: str) -> "list[Resolved]":
        """The tenant's own adapters, and those that others have made public, for this base."""
        found = self.registry.list(tenant)
        for other in self.registry.storage.folders("adapters"):
            if other != tenant:
                found += [resolved for resolved in self.registry.list(other) if resolved.card.public]
        return [resolved for resolved in found if resolved.card.base_hash == self.base_hash]

    def upload(self, tenant: str, id: str, data: bytes, spec: EngineSpec, *, public: bool, trigger: str) -> Resolved:
        """Checks an adapter file against the base, publishes it as the tenant's `id` and answers its version.

        Raises AdapterError saying which modules or values are wrong; then nothing has been stored.
        """
        check_id(id)
        shapes = self.shapes()
        adapter = import_adapter({"adapter.safetensors": data}, shapes.keys())
        check_adapter(adapter, shapes, spec.rank)
        self._check_words(adapter, spec)
        _check_targets(adapter, spec)
        weights = save_adapter(adapter)
        card = Card.model_validate(
            {
                "sha256": content_id(weights),
                "size": len(weights),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "fingerprint": content_id(weights),
                "base": self.base,
                "base_hash": self.base_hash,
                "rank": adapter.rank,
                "alpha": adapter.rank,  # any scale of the file is folded in
                "targets": _ends(adapter, STABLE_DIFFUSION.denoiser),
                "text_encoder_targets": _ends(adapter, *STABLE_DIFFUSION.text_encoders),
                "instance_prompt": trigger,
                "class": "",
                "trigger": trigger,
                "public": public,
            }
        )
        published = self.registry.publish(tenant, id, weights, card)
        if not published.new:  # the same file again: it is what the tenant wants served, whatever came between
            self.registry.set_current(tenant, id, published.version)
        self._forget(tenant, id)
        return self.registry.resolve(f"{tenant}/{id}", published.version)

    def delete(self, tenant: str, id: str) -> Resolved:
        """Deletes the tenant's own adapter and answers what was current. Raises UnknownAdapter."""
        try:
            resolved = self.registry.resolve(f"{tenant}/{check_id(id)}")
        except UnknownAdapter:
            raise unknown(id) from None
        self.registry.delete(tenant, id)
        self._forget(tenant, id)
        return resolved

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and weight shape of every layer of the base that an adapter may change."""
        if self._shapes is None:
            self._shapes = {
                canonical(component, name): shape
                for component in STABLE_DIFFUSION.components
                for name, shape in layer_shapes(self._folder, component)
                if len(shape) in (2, 4)
            }
        return self._shapes

    def _check_words(self, adapter: Adapter, spec: EngineSpec) -> None:
        width = read_config(self._folder, "text_encoder")["hidden_size"]
        vectors = [vectors.reshape(-1, vectors.shape[-1]) for vectors in adapter.embeddings.values()]
        if any(one.shape[1] != width for one in vectors):
            raise AdapterError(f"The words {', '.join(adapter.embeddings)} need vectors of width {width} on this base.")
        if sum(map(len, vectors)) > spec.words:
            raise AdapterError(
                f"The file's words take {sum(map(len, vectors))} vectors; at most {spec.words} are served."
            )

    def _cached(self, path: str, version: str | None, tenant: str) -> Resolved:
        key, now = (path, version), time.monotonic()
        with self._lock:
            expires, resolved = self._resolved.get(key, (0.0, None))
        if resolved is not None and now < expires:
            return resolved
        try:
            resolved = self.registry.resolve(path, version, tenant)
        except UnknownAdapter:
            with self._lock:
                self._resolved.pop(key, None)
            raise unknown(path if version is None else f"{path}@{version}") from None
        with self._lock:
            self._resolved[key] = now + self._refresh_s, resolved
            self._resolved.move_to_end(key)
            while len(self._resolved) > REMEMBERED:
                self._resolved.popitem(last=False)
        return resolved

    def _forget(self, tenant: str, id: str) -> None:
        with self._lock:
            for key in [key for key in self._resolved if key[0] == f"{tenant}/{id}"]:
                del self._resolved[key]


class Fetcher:
    """Reads adapters for the engine's loaders: from the local disk if they have been here, else from the registry."""

    def __init__(self, registry: Registry, disk: DiskCache | None = None) -> None:
        self._registry = registry
        self._disk = disk

    def __call__(self, ref: AdapterRef) -> Adapter:
        data = self._disk.get(ref.version) if self._disk is not None else None
        if data is None:
            data = self._registry.weights(self._registry.resolve(f"{ref.tenant}/{ref.id}", ref.version))
            if self._disk is not None:
                self._disk.put(data)
        return load_adapter(data)


def unknown(name: str) -> UnknownAdapter:
    """The one error for what is missing and for what is another's."""
    return UnknownAdapter(f"Unknown adapter '{name}'. See GET /v1/adapters for yours.")


def _ends(adapter: Adapter, *components: str) -> tuple[str, ...]:
    """The last parts of the names of some components' modules, each once: `to_q`, `to_out.0`."""
    names = (name.split(".") for name in adapter.modules if name.partition(".")[0] in components)
    return tuple(sorted({".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1] for parts in names}))


def _check_targets(adapter: Adapter, spec: EngineSpec) -> None:
    """The server's bank lies over some layers only; an adapter must not be served in part."""
    served = tuple(f".{target}" for target in (*spec.targets, *spec.text_encoder_targets))
    left = [name for name in adapter.modules if not name.endswith(served)]
    if left:
        raise AdapterError(
            f"{len(left)} of {len(adapter.modules)} modules are layers that this server does not adapt, the first is "
            f"'{min(left)}'. Ask its operator to add them to `targets`."
        )

"""Reads adapter files for the engine's loaders: from the local disk if they have been here, else from the registry.

What a name means has been resolved before: a reference names a tenant, an id and a whole version, which is the hash of
the file. So nothing is looked up again: one read, and the bytes are checked against the version.
"""

from serving.engine.request import AdapterRef
from serving.engine.tiers.disk import DiskCache
from training.adapters.adapter import Adapter, load_adapter
from training.storage.registry import Registry


class Fetcher:
    """The adapters of `registry`, with copies of their files in `disk`, if there is one."""

    def __init__(self, registry: Registry, disk: DiskCache | None = None) -> None:
        self._registry = registry
        self._disk = disk

    def __call__(self, ref: AdapterRef) -> Adapter:
        """The adapter of a version. Raises UnknownAdapter if it has been deleted, CorruptAdapter if it is damaged."""
        data = self._disk.get(ref.version) if self._disk is not None else None
        if data is None:
            data = self._registry.fetch(ref.tenant, ref.id, ref.version)
            if self._disk is not None:
                self._disk.put(data)
        return load_adapter(data)

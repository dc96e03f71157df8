"""ControlNets and IP-Adapters on their way to the device: loaded when a request wants them, on a thread of their own.

At most `spec.networks` are on the device at once; the least recently used makes room, never one that an image is being
drawn with. A load that fails is an error of the requests that waited for it. As adapters, but whole networks: between
the storage and the device nothing is kept.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from torch import nn

from serving.config import EngineSpec
from serving.engine.request import NetworkRef
from serving.engine.tiers.host import HostCache
from serving.engine.tiers.slots import Slots
from serving.errors import NetworkUnavailable
from serving.flags import flag
from training.base.base import Base
from training.errors import UserError
from training.storage.networks import NetworkKind

logger = logging.getLogger(__name__)
LOADERS = 1  # networks are large: one after another
OpenNetwork = Callable[[NetworkKind, str], AbstractContextManager[Path]]  # the folder on this machine, by its name


@dataclass(frozen=True, slots=True)
class LoadedNetwork:
    """A network in host memory."""

    network: nn.Module

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(part.nbytes for part in self.network.parameters())


NetworkLoads = dict[NetworkRef, "Future[LoadedNetwork]"]


class Networks:
    """Those of `base`. `open_network` is used on loader threads; `woken` is set when a load ends."""

    def __init__(self, base: Base, spec: EngineSpec, open_network: OpenNetwork | None, woken: Event) -> None:
        self._base = base
        self._open = open_network
        self.slots = Slots[NetworkRef](spec.networks)
        self.networks: dict[NetworkRef, nn.Module] = {}
        self.host = HostCache[NetworkRef, LoadedNetwork](
            self._load, budget_bytes=0, loaders=LOADERS, woken=woken.set, threads="load-network"
        )

    def close(self) -> None:
        """Stops the loader and drops all networks."""
        self.host.close()
        self.networks.clear()

    def want(self, keys: Sequence[NetworkRef], loads: NetworkLoads) -> None:
        """Adds to `loads` those of `keys` that are neither on the device nor in it. Undone by `settle`."""
        for key in dict.fromkeys(keys):
            if key not in self.slots and key not in loads:
                loads[key] = self.host.want(key)

    def settle(self, loads: NetworkLoads) -> None:
        """Releases all `loads` and forgets them."""
        for key in loads:
            self.host.release(key)
        loads.clear()

    def acquire(self, keys: Sequence[NetworkRef], loads: NetworkLoads) -> bool:
        """Brings `keys` to the device and pins them there; False if there is no room now. All others are loaded.

        If the device lacks the memory, nothing is changed but `loads`, where the one that asked for it has failed.
        """
        if not self.slots.fits(keys):
            return False
        placement = self.slots.acquire(keys)
        assert placement is not None
        self.networks = {key: network for key, network in self.networks.items() if key in self.slots}
        for _, key in placement.fresh:
            try:
                self.networks[key] = loads[key].result().network.to(self._base.device)
            except RuntimeError as error:
                logger.error("%s: %s", key, error)
                self.slots.release(keys)
                for _, fresh in placement.fresh:
                    self.slots.drop(fresh)
                    self.networks.pop(fresh, None)
                loads[key] = _failed(key)
                return False
        return True

    def release(self, keys: Sequence[NetworkRef]) -> None:
        """Undoes one `acquire`; they stay on the device until others need the room."""
        self.slots.release(keys)

    def _load(self, key: NetworkRef) -> LoadedNetwork:
        family: Any = self._base.family
        loader = family.controls if key.kind == "control" else family.image_prompts
        if loader is None or self._open is None:
            raise NetworkUnavailable(f"{key} cannot be loaded: this server has none of its kind.")
        with self._open(key.kind, key.name) as folder:
            return LoadedNetwork(loader.load(folder, self._base.dtype))


def explain_network(key: NetworkRef, error: BaseException) -> Exception:
    """The error of a failed load, as the requests that waited for it get it."""
    if isinstance(error, NetworkUnavailable):
        return error
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return NetworkUnavailable(f"{key} cannot be loaded: {reason}")


def _failed(key: NetworkRef) -> "Future[LoadedNetwork]":
    future: Future[LoadedNetwork] = Future()
    future.set_exception(
        NetworkUnavailable(
            f"{key}: this server's device has no memory left for it. Start it with a lower {flag('networks')}."
        )
    )
    return future

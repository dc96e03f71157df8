"""Adapters on their way into the bank: registry -> host memory -> slots of the device.

Joins the three tiers for the engine: `Slots` and `HostCache` decide what is where, here rows are copied. A load that
fails has changed neither slots nor host cache, so it affects no other request.

The bank starts over no layer and grows when an adapter with further layers is put into a slot, so that a slot is as
wide as what adapters in use change, not as all that they might. It does not shrink.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Event

import torch

from serving.config import EngineSpec
from serving.engine.request import AdapterRef
from serving.engine.tiers.fit import check_fit
from serving.engine.tiers.host import HostCache
from serving.engine.tiers.slots import Slots
from serving.errors import AdapterUnavailable
from serving.flags import flag
from training.adapters.adapter import Adapter
from training.adapters.bank import Bank
from training.adapters.layout import AdapterRow, Layout, find_sites
from training.base.base import Base
from training.errors import UserError

logger = logging.getLogger(__name__)
Fetch = Callable[[AdapterRef], Adapter]


@dataclass(frozen=True, slots=True)
class HostRow:
    """An adapter in host memory, laid out over its own layers. `changes_text`: whether it changes what prompts mean."""

    row: AdapterRow
    changes_text: bool

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes."""
        return self.row.nbytes


Loads = dict[AdapterRef, "Future[HostRow]"]


class Adapters:
    """The bank over `base`, and what is in it. `fetch` is called on loader threads; `woken` is set when a load ends."""

    def __init__(self, base: Base, spec: EngineSpec, fetch: Fetch, woken: Event) -> None:
        facts = base.facts
        targets = dict.fromkeys(facts.text_encoders, spec.text_encoder_targets or facts.text_layers)
        targets[facts.denoiser] = spec.targets or facts.layers
        sites = {name: find_sites(name, model, targets[name]) for name, model in base.models.items()}
        vectors = (spec.words, facts.word_width)
        self._reach = Layout(sites, spec.rank, *vectors)  # every layer that an adapter may change here
        self.empty = spec.slots  # the bank's last slot is never given to an adapter: it stays zero
        self.bank = Bank(
            dict.fromkeys(sites, ()),
            slots=spec.slots + 1,
            rank=spec.rank,
            vectors=vectors,
            device=base.device,
            dtype=base.dtype,
        )
        self.bank.inject()
        self.slots = Slots[AdapterRef](spec.slots)
        self.swap_seconds = 0.0
        self._facts = facts
        self._fetch = fetch
        self._spec = spec
        self._pin = base.device.type == "cuda"
        self._changes_text: dict[AdapterRef, bool] = {}
        self.host = HostCache[AdapterRef, HostRow](
            self._lay_out, budget_bytes=spec.host_bytes, loaders=spec.loaders, woken=woken.set
        )

    def close(self) -> None:
        """Takes the bank off the base and stops the loaders."""
        self.host.close()
        self.bank.eject()

    def want(self, keys: Sequence[AdapterRef], loads: Loads) -> None:
        """Adds to `loads` those of `keys` that are neither in slots nor in it. Undone by `settle`."""
        for key in dict.fromkeys(keys):
            if key not in self.slots and key not in loads:
                loads[key] = self.host.want(key)

    def settle(self, loads: Loads) -> None:
        """Releases all `loads` and forgets them."""
        for key in loads:
            self.host.release(key)
        loads.clear()

    def acquire(self, keys: Sequence[AdapterRef], loads: Loads) -> tuple[int, ...] | None:
        """The slots of `keys`, filled and pinned; None if they do not fit now. All not in slots have been loaded.

        If the device lacks the memory to lay the bank over their layers, nothing is changed but `loads`, where the
        adapter that asks for them has failed.
        """
        if not self.slots.fits(keys):
            return None
        began = time.perf_counter()
        if not all(self._cover(key, loads) for key in keys if key not in self.slots):
            return None
        placement = self.slots.acquire(keys)
        assert placement is not None
        for slot, key in placement.fresh:
            host_row = loads[key].result()
            self.bank.put(slot, host_row.row)
            self._changes_text[key] = host_row.changes_text
        if placement.fresh:  # forgets the adapters that were evicted for them
            self._changes_text = {key: changes for key, changes in self._changes_text.items() if key in self.slots}
        self.swap_seconds += time.perf_counter() - began
        return placement.slots

    def _cover(self, key: AdapterRef, loads: Loads) -> bool:
        """Lays the bank over the layers of a loaded adapter; False if the device has no memory for them."""
        try:
            self.bank.cover(loads[key].result().row.layout.sites)
        except RuntimeError as error:
            logger.error("the bank cannot grow for %s: %s", key, error)
            loads[key] = Future()
            loads[key].set_exception(
                AdapterUnavailable(
                    f"Adapter '{key}' changes layers for which this server's device has no memory left: "
                    f"{self._spec.slots} slots of rank {self._spec.rank} would have to be as wide. Start it with a "
                    f"lower {flag('slots')} or {flag('rank')}."
                )
            )
            return False
        return True

    def release(self, keys: Sequence[AdapterRef]) -> None:
        """Undoes one `acquire`."""
        self.slots.release(keys)

    def changes_text(self, key: AdapterRef) -> bool:
        """Whether an adapter that is in a slot changes the text encoder."""
        return self._changes_text[key]

    def forget(self, key: AdapterRef) -> None:
        """Drops a deleted or replaced version from every tier, unless a request still uses it."""
        self.host.drop(key)
        if self.slots.drop(key):
            del self._changes_text[key]

    def preload(self, key: AdapterRef) -> None:
        """Brings an adapter into host memory in the background."""
        if key not in self.slots:
            self.host.want(key)
            self.host.release(key)

    def _lay_out(self, key: AdapterRef) -> HostRow:
        adapter = self._fetch(key)
        check_fit(adapter, self._spec, self._facts)
        row = self._reach.only(adapter.modules).pack(adapter, self.bank.weights_SP.dtype)
        if not any(row.worn.values()) and not row.words:
            raise AdapterUnavailable(f"Adapter '{key}' changes no layer of this base.")
        if not all(torch.isfinite(part).all() for part in row.parts.values()):
            raise AdapterUnavailable(
                f"Adapter '{key}' has values that this server's {self.bank.weights_SP.dtype} cannot hold."
            )
        if self._pin:
            row = dataclasses.replace(row, parts={name: part.pin_memory() for name, part in row.parts.items()})
        return HostRow(row, bool(row.words) or any(row.worn.get(name) for name in self._facts.text_encoders))


def explain_load(key: AdapterRef, error: BaseException) -> Exception:
    """The error of a failed load, as the requests that waited for it get it."""
    if isinstance(error, AdapterUnavailable):
        return error
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return AdapterUnavailable(f"Adapter '{key}' cannot be loaded: {reason}")

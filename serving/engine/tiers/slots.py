"""Which adapter is in which slot of the bank: the least recently used is evicted, never one in use. Knows no tensors.

A key is in at most one slot. `acquire` takes all of a request's adapters or none, so two requests never hold half of
what they need and wait for each other.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

SlotKey = TypeVar("SlotKey", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Placement(Generic[SlotKey]):
    """Where the adapters asked for are, in the order asked; `fresh` are the (slot, key) pairs to be filled first."""

    slots: tuple[int, ...]
    fresh: tuple[tuple[int, SlotKey], ...]


class Slots(Generic[SlotKey]):
    """`count` slots, all free at first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._loaded: OrderedDict[SlotKey, int] = OrderedDict()  # least recently used first
        self._pins: dict[SlotKey, int] = {}
        self.hits = 0
        self.loads = 0
        self.evictions = 0

    def __contains__(self, key: SlotKey) -> bool:
        return key in self._loaded

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def pinned(self) -> int:
        """How many slots are in use right now."""
        return len(self._pins)

    def fits(self, keys: Sequence[SlotKey]) -> bool:
        """Whether `acquire` would find room now."""
        wanted = dict.fromkeys(keys)
        missing = sum(key not in self._loaded for key in wanted)
        idle = sum(key not in self._pins and key not in wanted for key in self._loaded)
        return missing <= len(self._free) + idle

    def acquire(self, keys: Sequence[SlotKey]) -> Placement[SlotKey] | None:
        """Pins a slot for each key, evicting idle ones where needed; None, and nothing changed, if they do not fit."""
        if not self.fits(keys):
            return None
        wanted = dict.fromkeys(keys)
        for key in wanted:
            self._pins[key] = self._pins.get(key, 0) + 1  # pinned first, so that none of them evicts another
        fresh = []
        for key in wanted:
            if key in self._loaded:
                self._loaded.move_to_end(key)
                self.hits += 1
            else:
                slot = self._free.pop() if self._free else self._evict()
                self._loaded[key] = slot
                fresh.append((slot, key))
                self.loads += 1
        return Placement(tuple(self._loaded[key] for key in keys), tuple(fresh))

    def release(self, keys: Sequence[SlotKey]) -> None:
        """Undoes one `acquire` of the same keys; they stay loaded until their slots are needed."""
        for key in dict.fromkeys(keys):
            left = self._pins[key] - 1
            if left:
                self._pins[key] = left
            else:
                del self._pins[key]

    def drop(self, key: SlotKey) -> bool:
        """Forgets an adapter that is not in use; False if it is in use or not here."""
        if key not in self._loaded or key in self._pins:
            return False
        self._free.append(self._loaded.pop(key))
        return True

    def loaded(self) -> tuple[SlotKey, ...]:
        """The keys in slots, least recently used first."""
        return tuple(self._loaded)

    def check_integrity(self) -> None:
        """Raises AssertionError with the numbers if free and loaded slots do not add up to all, or a pin is wrong."""
        used = [*self._free, *self._loaded.values()]
        assert len(used) == self.count, f"free({len(self._free)}) + loaded({len(self._loaded)}) != slots({self.count})"
        assert len(set(used)) == self.count, f"a slot is used twice: free {self._free}, loaded {self._loaded}"
        assert all(count > 0 for count in self._pins.values()), f"a pin is not above zero: {self._pins}"
        assert self._pins.keys() <= self._loaded.keys(), f"pinned but not loaded: {self._pins.keys()}"

    def _evict(self) -> int:
        key = next(key for key in self._loaded if key not in self._pins)
        self.evictions += 1
        return self._loaded.pop(key)

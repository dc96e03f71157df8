"""One device for two: drawing pictures and training take turns at their step borders.

Pictures go first. While both want the device, training gets its share of the time all the same: each second of pictures
earns it a part of a second, and it takes its turn as soon as it is owed one. While nobody asks for pictures it has the
device to itself. Two threads, of which one computes at any moment. Knows no torch.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MOST_OWED_S = 1.0  # what training may save up while it had nothing to do but a little


class DeviceTurns:
    """`share` is the part of the device that training gets while pictures are wanted. `clock` in seconds."""

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._earns = share / (1 - share)
        self._clock = clock
        self._changed = threading.Condition()
        self._busy: str | None = None
        self._pictures = False  # whether pictures are wanted
        self._training = False  # whether there is something to train
        self._owed = 0.0  # seconds that training is owed; it has had too much if negative
        self._began = 0.0

    # -- pictures: one thread --

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The device for one step of pictures."""
        with self._changed:
            self._pictures = True
            self._changed.wait_for(lambda: self._busy is None and not (self._training and self._owed > 0))
            self._busy = "pictures"
        began = self._clock()
        try:
            yield
        finally:
            with self._changed:
                self._busy = None
                if self._training:
                    self._owed = min(MOST_OWED_S, self._owed + (self._clock() - began) * self._earns)
                self._changed.notify_all()

    def rest(self) -> None:
        """No pictures are wanted until the next turn."""
        if self._pictures:
            with self._changed:
                self._pictures = False
                self._changed.notify_all()

    # -- training: one thread --

    @contextmanager
    def training(self) -> Iterator[None]:
        """There is something to train inside; the device is this thread's but at `border`."""
        with self._changed:
            self._training, self._owed = True, 0.0
            self._take()
        try:
            yield
        finally:
            with self._changed:
                self._training, self._busy = False, None
                self._changed.notify_all()

    def border(self) -> None:
        """Where training may be interrupted: returns when it is its turn again."""
        if not self._pictures:
            self._began = self._clock()
            return
        with self._changed:
            self._owed -= self._clock() - self._began
            self._busy = None
            self._changed.notify_all()
            self._take()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Training has nothing to do inside."""
        with self._changed:
            self._training, self._busy = False, None
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._training = True
                self._take()

    def _take(self) -> None:
        self._changed.wait_for(lambda: self._busy is None and (not self._pictures or self._owed > 0))
        self._busy, self._began = "training", self._clock()

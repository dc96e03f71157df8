"""The worker's link to its source: what it is doing goes there about once a second, and orders come back."""

import time

from training.run.source import Beat, Doing, Orders, Outcome, Source

BEAT_SECONDS = 1.0


class Pulse:
    """Collects the news of all subjects of a worker and sends them. `stop` is set once the source has said so."""

    def __init__(self, source: Source) -> None:
        self.beat = Beat()
        self.stop = False
        self._source = source
        self._sent = 0.0
        self._rate: list[tuple[float, int]] = []

    def say(self, id: str, doing: Doing) -> None:
        """A change of phase, sent at once if the last beat is old enough: long preparation keeps the lease alive."""
        self.beat.phase[id] = doing
        self.send()

    def note(self, text: str) -> None:
        """Something a person should read."""
        self.beat.notes.append(text)

    def trained(self, id: str, step: int, loss: float) -> None:
        """A subject has done a step."""
        self.beat.steps[id], self.beat.losses[id] = step, loss

    def measure(self, seconds: float, rows: int) -> None:
        """Takes in one fused step; images a second are of the last twenty."""
        self._rate = [*self._rate[-19:], (seconds, rows)]
        total = sum(seconds for seconds, _ in self._rate)
        self.beat.images_per_second = sum(rows for _, rows in self._rate) / total if total else 0.0

    def send(self) -> Orders:
        """Sends a beat if the last one is old enough, and returns what the source orders."""
        if time.monotonic() - self._sent < BEAT_SECONDS:
            return Orders()
        self._sent = time.monotonic()
        orders = self._source.beat(self.beat)
        self.beat.notes.clear()
        self.stop = self.stop or orders.stop
        return orders

    def ended(self, outcome: Outcome) -> None:
        """A subject's end, sent at once; there is no more news of it."""
        for about in (self.beat.phase, self.beat.steps, self.beat.losses):
            about.pop(outcome.id, None)
        self._source.ended(outcome)

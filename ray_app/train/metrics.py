"""A run in numbers, for Prometheus: through Ray's own metrics, on every node's metrics port, as `ray_dreamfleet_*`.

No label grows with subjects. What is asked for by `manifests/grafana/dreamfleet.json` is defined here.
"""

import time
from collections import Counter as Tally
from collections.abc import Mapping
from typing import get_args

from training.run.run import State, SubjectRecord
from training.run.view import RunView

WAIT_SECONDS = [1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0]


class RunMetrics:
    """Follows one run. `see` and `say` are what the driver calls; call them inside `connect`."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._subjects = Gauge("dreamfleet_subjects", "Subjects of a run by state", ("run", "state"))
        self._packs = Gauge("dreamfleet_packs", "Packs that hold subjects", ("run",))
        self._rate = Gauge("dreamfleet_images_per_second", "Training images a second, all packs", ("run",))
        self._retries = Counter("dreamfleet_retries_total", "Attempts that ended early, by why", ("run", "kind"))
        self._steps = Counter("dreamfleet_steps_total", "Training steps of all subjects", ("run",))
        self._wait = Histogram(
            "dreamfleet_queue_wait_seconds", "Time a subject waited for its pack", WAIT_SECONDS, ("run",)
        )
        for metric in (self._subjects, self._packs, self._rate, self._retries, self._steps, self._wait):
            metric.set_default_tags({"run": run})
        self._queued: dict[str, float] = {}
        self._known: dict[str, SubjectRecord] = {}

    def say(self, text: str) -> None:
        """Does nothing: text is no metric."""

    def see(self, view: RunView, records: Mapping[str, SubjectRecord]) -> None:
        """Sets the gauges and counters to how everything stands."""
        states = Tally(record.state for record in records.values())
        for state in get_args(State):
            self._subjects.set(states[state], {"state": state})
        self._packs.set(sum(bool(lane.held) for lane in view.lanes))
        self._rate.set(sum(lane.images_per_second for lane in view.lanes))
        for record in records.values():
            self._take_in(record)

    def _take_in(self, record: SubjectRecord) -> None:
        before = self._known.get(record.id)
        self._known[record.id] = record
        if record == before:
            return
        if record.state == "queued":
            self._queued.setdefault(record.id, time.monotonic())
        elif record.id in self._queued:
            self._wait.observe(time.monotonic() - self._queued.pop(record.id))
        if before is None:
            return  # what happened before this driver was counted by another
        if record.step > before.step:
            self._steps.inc(record.step - before.step)
        for attempt in record.attempts[len(before.attempts) :]:
            self._retries.inc(1, {"kind": attempt.kind})

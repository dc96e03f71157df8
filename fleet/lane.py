"""The lane of a fleet in one process: a thread that trains what the driver's queue lends it, over the engine's base."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from fleet.device import DeviceTurns
from fleet.shared_base import with_borders
from training.base.base import Base
from training.manifest.plan import PackPlan
from training.run.fleet import FleetDriver
from training.run.run import RunStore
from training.run.source import Beat, Orders, Outcome, Task
from training.trainer.worker.worker import work

IDLE_S = 0.25  # how long an empty answer of the queue holds
log = logging.getLogger(__name__)
OnPublished = Callable[[Task, str], None]


class LaneSource:
    """What a worker asks: the driver's queue, for one lane. `warm_s`: how long an empty lane waits for subjects."""

    def __init__(
        self, driver: FleetDriver, lane: int, profile: int, turns: DeviceTurns, warm_s: float, published: OnPublished
    ) -> None:
        self._driver = driver
        self._lane = lane
        self._profile = profile
        self._turns = turns
        self._warm_s = warm_s
        self._published = published
        self._held: dict[str, Task] = {}
        self._empty_until = 0.0
        self.stopped = threading.Event()

    def lease(self, count: int) -> Sequence[Task]:
        """See `Source`. With nothing held, waits for a while before it gives up."""
        if self._held and time.monotonic() < self._empty_until:
            return []
        tasks = self._driver.lease(self._lane, count)
        if not tasks and not self._held:
            with self._turns.away():
                tasks = self._wait(count)
        self._held |= {task.key: task for task in tasks}
        self._empty_until = time.monotonic() + IDLE_S
        return tasks

    def beat(self, beat: Beat) -> Orders:
        """See `Source`."""
        orders = self._driver.beat(self._lane, beat)
        return Orders(orders.cancel, orders.pause, orders.stop or self.stopped.is_set())

    def ended(self, outcome: Outcome) -> None:
        """See `Source`."""
        task = self._held.pop(outcome.id, None)
        if task is not None and outcome.version is not None:
            self._published(task, outcome.version)
        self._driver.ended(self._lane, outcome)

    def _wait(self, count: int) -> list[Task]:
        """Waits for subjects until the lane is cold, or what waits needs another one."""
        until = time.monotonic() + self._warm_s
        while time.monotonic() < until and not self.stopped.is_set():
            wanted = self._driver.wanted()
            if wanted and wanted[0].profile != self._profile:
                return []
            if wanted and (tasks := self._driver.lease(self._lane, count)):
                return tasks
            self.stopped.wait(0.05)
        return []


class LaneThread:
    """Opens one lane after the other, for the profile whose turn it is, until it is stopped. Starts at once."""

    def __init__(
        self, driver: FleetDriver, base: Base, turns: DeviceTurns, warm_s: float, published: OnPublished
    ) -> None:
        self._driver = driver
        self._base = with_borders(base, turns.border)
        self._turns = turns
        self._warm_s = warm_s
        self._published = published
        self._stopped = threading.Event()
        self._source: LaneSource | None = None
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Has the lane checkpoint and end; waits for it."""
        self._stopped.set()
        source = self._source
        if source is not None:
            source.stopped.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        lane = 0
        while not self._stopped.is_set():
            wanted = self._driver.wanted()
            if not wanted:
                self._stopped.wait(0.05)
                continue
            profile, plan, _ = wanted[0]
            if plan.workers > 1:
                self._driver.give_up(
                    profile, f"`strategy: zero` takes {plan.workers} devices, and this fleet has one. Leave it out."
                )
                continue
            lane += 1
            try:
                self._open(lane, profile, plan)
            except Exception as error:
                log.exception("lane %d", lane)
                self._driver.leave(lane, f"its lane failed: {type(error).__name__}: {error}", "lost")
                self._stopped.wait(1.0)

    def _open(self, lane: int, profile: int, plan: PackPlan) -> None:
        self._source = LaneSource(self._driver, lane, profile, self._turns, self._warm_s, self._published)
        if self._stopped.is_set():
            return
        self._driver.enter(lane, profile)
        with self._turns.training():
            work(self._base, plan, self._source, RunStore(self._driver.storage, "fleet"), tenant="fleet")
        self._driver.leave(lane)

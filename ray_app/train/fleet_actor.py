"""A fleet's driver on a cluster: an actor that leads, opens lanes for what waits, and lends them subjects.

It decides nothing about a subject: `training.run.fleet` does. If it dies, Serve starts another one, which takes up what
is on the storage; lanes that the dead one had opened end with it.
"""

import logging
import threading
from dataclasses import asdict
from typing import Any

from pydantic import Field, TypeAdapter

from fleet.board import Board
from fleet.config import FleetSpec
from fleet.driving import drive
from fleet.hooks import Hooks
from ray_app.silence import silence
from ray_app.train.cluster import ClusterLimits, current
from ray_app.train.lanes import LaneOrder, Lanes
from training.base.files.folder import hash_base
from training.base.files.outline import outline
from training.run.fleet import FleetDriver, fleet_lead
from training.run.source import Beat, Outcome, Release
from training.storage.closed import Closed
from training.storage.storage import open_storage

TICK_S = 0.5
STOP_S = 60.0
THREADS = 64  # calls of lanes at once
_BEAT, _OUTCOME = TypeAdapter(Beat), TypeAdapter(Outcome)
log = logging.getLogger(__name__)


class FleetLanes(Closed):
    """How many lanes a fleet may open on its cluster."""

    lanes: int | None = Field(default=None, ge=1, description="lanes at once; by default one a GPU, else one a node")
    gpus: int | None = Field(default=None, ge=1, description="GPUs at most; an autoscaler may add them")
    cpus_per_lane: int = Field(default=1, ge=1)


class FleetActor:
    """The driver behind Ray's border: dicts in, dicts out. `name` is the actor's own, by which lanes find it."""

    def __init__(self, spec: dict[str, Any], lanes: dict[str, Any], name: str) -> None:
        silence()
        self._spec = FleetSpec.model_validate(spec)
        self._limits = FleetLanes.model_validate(lanes)
        self._name = name
        self._storage = open_storage(self._spec.server.storage)
        self._base = outline(self._spec.server.base)
        self._hash = hash_base(self._base.folder)
        self._hooks = Hooks(self._storage, Board(self._storage), self._spec.private_hooks)
        self._nodes: dict[int, str] = {}
        self._closing = threading.Event()
        self._claim = fleet_lead(self._storage)
        self._driver: FleetDriver | None = None  # while it leads
        self._thread = threading.Thread(
            target=drive, args=(self._claim, self._lead, self._closing), name="driver", daemon=True
        )
        self._thread.start()

    # -- for the service --

    def healthy(self) -> bool:
        """Whether it drives, or waits for the lead."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """Something was submitted or asked."""
        if self._driver is not None:
            self._driver.woken.set()

    def close(self) -> None:
        """Lanes checkpoint and end; everything is written down."""
        self._closing.set()
        self.wake()
        self._thread.join(STOP_S + 10)

    # -- for lanes: as the queue of a run --

    def enter(self, lane: int, profile: int, node: str) -> bool:
        """A lane's worker begins on `node`. If its last worker's node is gone, that costs its subjects nothing."""
        import ray

        last, self._nodes[lane] = self._nodes.get(lane), node
        if last is not None and last not in {found["NodeID"] for found in ray.nodes() if found["Alive"]}:
            return self._leading.enter(lane, profile, "its node was lost", "preempted")
        return self._leading.enter(lane, profile)

    def lease(self, lane: int, count: int) -> list[dict[str, Any]]:
        """See `SubjectQueue.lease`."""
        return [lease.model_dump() for lease in self._leading.leases(lane, count)]

    def stays(self, lane: int) -> bool:
        """See `SubjectQueue.stays`."""
        return self._leading.stays(lane)

    def beat(self, lane: int, beat: dict[str, Any]) -> dict[str, Any]:
        """See `SubjectQueue.beat`."""
        return asdict(self._leading.beat(lane, _BEAT.validate_python(beat)))

    def ended(self, lane: int, outcome: dict[str, Any]) -> None:
        """See `SubjectQueue.ended`."""
        self._leading.ended(lane, _OUTCOME.validate_python(outcome))

    def leave(self, lane: int, reason: str, kind: Release) -> None:
        """See `SubjectQueue.release`."""
        self._leading.leave(lane, reason, kind)

    def trouble(self, lane: int) -> str | None:
        """See `SubjectQueue.trouble`."""
        return self._leading.trouble(lane)

    def give_up(self, profile: int, reason: str) -> None:
        """See `SubjectQueue.give_up`."""
        self._leading.give_up(profile, reason)

    def dismiss(self, lane: int) -> None:
        """See `SubjectQueue.dismiss`."""
        self._leading.dismiss(lane)

    # -- driving --

    @property
    def _leading(self) -> FleetDriver:
        """The driver, for lanes: it has opened them."""
        if self._driver is None:
            raise RuntimeError("the fleet's driver has not the lead")
        return self._driver

    def _lead(self) -> None:
        import ray

        over = threading.Event()
        driver = self._driver = FleetDriver(
            self._storage,
            self._base,
            self._hash,
            self._claim,
            seats=None,
            max_rows=self._spec.train_rows,
            ended=self._hooks.ended,
        )
        told = LaneOrder(
            run="",
            storage=self._storage.uri,
            queue=self._name,
            base=self._base.name,
            base_hash=self._hash,
            warm_s=self._spec.warm_s,
        )
        limits = ClusterLimits(self._limits.lanes, self._limits.gpus, self._limits.cpus_per_lane)
        me = ray.get_runtime_context().current_actor
        lanes = Lanes(told, driver.plans(), current(), limits, me, log.warning, spread=False)
        threading.Thread(target=self._hooks.deliver, args=(over,), name="webhooks", daemon=True).start()
        try:
            while not self._closing.is_set():
                driver.tick()
                lanes.close_ended()
                driver.set_seats(lanes.seats)
                lanes.open(driver.view())
                driver.woken.wait(TICK_S)
                driver.woken.clear()
        finally:
            over.set()
            driver.stop()
            lanes.wait(STOP_S)
        driver.close()

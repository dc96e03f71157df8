"""The lanes of a run: opened while subjects wait and devices are free, taken away when they end.

Decides how many there are and how large each is. It knows nothing of a subject but that it waits.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray_app.train.cluster import Cluster, ClusterLimits, current
from ray_app.train.lane import LaneSetup, in_words, run_lane
from ray_app.train.sharing import Sharing
from training.errors import UserError
from training.manifest.plan import PackPlan, with_slots
from training.run.view import RunView

CLUSTER_SECONDS = 10.0  # how often the cluster's size is looked at
LANE_FAILURES = 3
MOST_WORDS = 2000  # characters of an error that are kept
LANES_HERE = 8  # each takes about 0.7 GB of processes where its task lives


class LaneOrder(NamedTuple):
    """What all lanes of a run, or of a fleet, are told alike; see `LaneSetup`."""

    run: str
    storage: str
    queue: str
    base: str = ""
    base_hash: str = ""
    warm_s: float = 0.0


@dataclass
class _Lane:
    """A lane that is open: its future, and its pack's plan."""

    profile: int
    plan: PackPlan
    future: Any


class Lanes:
    """The open lanes of one run, or of a fleet. `packs` are known by their place, their profile, and may become more;
    `order` is what all lanes are told alike; `say` is told what goes wrong. `spread`: subjects are spread over the
    seats; else a lane has all the slots of its pack, for those that come later.
    """

    def __init__(
        self,
        order: LaneOrder,
        packs: Sequence[PackPlan],
        cluster: Cluster,
        limits: ClusterLimits,
        queue: Any,
        say: Callable[[str], None],
        sharing: Sharing | None = None,
        *,
        spread: bool = True,
    ) -> None:
        self._order = order
        self._spread = spread
        self._packs = packs
        self._cluster = cluster
        self._limits = limits
        self._queue = queue
        self._say = say
        self._sharing = sharing
        self._allowed: int | None = None
        self._lanes: dict[int, _Lane] = {}
        self._opened = 0
        self._failures: defaultdict[int, int] = defaultdict(int)
        self._seats = cluster.seats
        self._looked = time.monotonic()

    def open(self, view: RunView) -> None:
        """Opens lanes while there are subjects that no lane has room for, and seats: subjects are spread evenly over
        the seats. Pending lanes are the demand that an autoscaler sees."""
        self._watch_cluster()
        busy = {lane.lane: len(lane.held) for lane in view.lanes}
        profiles = sorted(view.waiting.items())
        for turn, (profile, waiting) in enumerate(profiles):
            pack = self._packs[profile]
            if pack.workers > self._devices():
                self._refuse(profile, pack)
                continue
            coming = sum(
                lane.plan.slots for i, lane in self._lanes.items() if lane.profile == profile and not busy.get(i)
            )
            mine = -(-self._free() // (len(profiles) - turn)) // pack.workers
            if not self._lanes and self._allowed is None:
                mine = max(1, mine)  # a gang needs more devices than there are seats; `_devices` says that they exist
            while waiting > coming and mine > 0:
                slots = min(pack.slots, -(-(waiting - coming) // mine)) if self._spread else pack.slots
                self._open(profile, with_slots(pack, slots))
                coming, mine = coming + slots, mine - 1

    def share(self, view: RunView) -> None:
        """Gives devices back that are other runs' share: lanes that only wait first, then the latest."""
        if self._sharing is None:
            return
        working = {lane.lane for lane in view.lanes}
        at_work = self._taken(working)
        before, self._allowed = self._allowed, self._sharing.ask(at_work, self._taken() - at_work)
        over = self._taken() - self._allowed if self._allowed is not None else 0
        if over > 0 and before != self._allowed:
            self._say(f"{over} of {self._taken()} devices are given back: other runs wait for their share")
        for index in sorted(self._lanes, key=lambda index: (index in working, -index)):
            if over <= 0:
                break
            over -= self._lanes[index].plan.workers
            self._give_back(index, index in working)

    def _give_back(self, index: int, works: bool) -> None:
        """A lane that works checkpoints and ends; one that waits is taken away."""
        import ray

        ray.get(self._queue.dismiss.remote(index))
        if not works:
            ray.cancel(self._lanes.pop(index).future, force=True)

    def close_ended(self) -> None:
        """Takes away lanes that ended. One that failed gives back its subjects; what no lane can serve fails."""
        import ray

        futures = {lane.future: index for index, lane in self._lanes.items()}
        ended, _ = ray.wait(list(futures), num_returns=len(futures), timeout=0) if futures else ([], [])
        for future in ended:
            index = futures[future]
            lane = self._lanes.pop(index)
            try:
                ray.get(future)
            except ray.exceptions.RayError as error:
                self._failed(index, lane, _cause(error))

    def wait(self, seconds: float) -> None:
        """Waits until all lanes have ended, for at most so many seconds."""
        import ray

        futures = [lane.future for lane in self._lanes.values()]
        if futures:
            ray.wait(futures, num_returns=len(futures), timeout=seconds)

    def _open(self, profile: int, plan: PackPlan) -> None:
        import ray

        index = self._opened
        order = LaneSetup(
            **self._order._asdict(),
            lane=index,
            profile=profile,
            plan=plan,
            threads=self._threads(plan),
            resources=slot_resources(self._cluster, self._limits),
            marks={"opened": time.time()},
        )
        # a lost node is no failure: Ray runs the task again elsewhere, and the queue knows which lane it is
        task = ray.remote(run_lane).options(
            num_cpus=0, max_retries=-1, name=f"lane-{index}", scheduling_strategy=_lane_place(len(self._lanes))
        )
        self._lanes[index] = _Lane(profile, plan, task.remote(order.model_dump()))
        self._opened += 1

    def _failed(self, index: int, lane: _Lane, cause: BaseException) -> None:
        import ray

        reason = in_words(cause)[:MOST_WORDS]
        # the workers of this lane have tried several times; on another node another lane may do better
        permanent = self._cluster.local and isinstance(cause, UserError)
        self._failures[lane.profile] += LANE_FAILURES if permanent else 1
        self._say(f"lane {index} failed: {reason}")
        ray.get(self._queue.leave.remote(index, f"its lane failed: {reason}", "lost"))
        alone = all(other.profile != lane.profile for other in self._lanes.values())
        if alone and self._failures[lane.profile] >= LANE_FAILURES:
            ray.get(self._queue.give_up.remote(lane.profile, f"no lane can work: {reason}"))

    def _refuse(self, profile: int, pack: PackPlan) -> None:
        import ray

        reason = (
            f"`zero.workers` is {pack.workers}, and there are {self._devices()} devices here: take fewer workers, or "
            f"wait for devices with --max-gpus {pack.workers}"
        )
        ray.get(self._queue.give_up.remote(profile, reason))

    # -- the cluster --

    def _watch_cluster(self) -> None:
        if time.monotonic() - self._looked >= CLUSTER_SECONDS:
            self._looked = time.monotonic()
            self._seats = max(self._seats, current().seats)

    @property
    def seats(self) -> int:
        """Lanes that can be open at once."""
        return self._most()

    def _most(self) -> int:
        """Seats that the run may take."""
        most = self._limits.lanes or self._limits.gpus or self._seats
        return most if self._allowed is None else min(most, self._allowed)

    def _free(self) -> int:
        return self._most() - self._taken()

    def _taken(self, lanes: Collection[int] | None = None) -> int:
        """Devices of these lanes, of all by default."""
        return sum(lane.plan.workers for index, lane in self._lanes.items() if lanes is None or index in lanes)

    def _devices(self) -> int:
        """The most workers that a gang can have."""
        gpus = max(self._cluster.gpus, self._limits.gpus or 0)
        return max(self._seats, gpus or self._cluster.cpus // self._limits.cpus_per_lane)

    def _threads(self, plan: PackPlan) -> int:
        """Compute threads of a worker on a CPU machine: its share of the cores; 0 leaves it to torch."""
        if self._cluster.gpus or not self._cluster.local or "OMP_NUM_THREADS" in os.environ:
            return int(os.environ.get("OMP_NUM_THREADS", 0))
        return max(1, (os.cpu_count() or 1) // max(self._most(), plan.workers))


def slot_resources(cluster: Cluster, limits: ClusterLimits) -> dict[str, float]:
    """What one worker of a lane asks of Ray: a GPU where there are any (or will be), else CPUs."""
    if cluster.gpus or limits.gpus:
        return {"CPU": 1, "GPU": 1}
    return {"CPU": limits.cpus_per_lane}


def _lane_place(open_lanes: int) -> Any:
    """Where a lane's task lives: beside the driver, which outlives preemptible nodes, while there is memory for it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if open_lanes >= LANES_HERE:
        return "SPREAD"
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def _cause(error: BaseException) -> BaseException:
    """The innermost of the errors that Ray has wrapped into each other."""
    while (inner := getattr(error, "cause", None)) is not None and inner is not error:
        error = inner
    return error

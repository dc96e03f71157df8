"""The driver of a run: opens lanes, follows them through the subject queue, and keeps the states on the storage.

It decides nothing about a subject: the queue does. It may die at any time; the same command takes the run up again.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pydantic import TypeAdapter

from ray_app import cancel
from ray_app.cluster import Cluster, Limits, current
from ray_app.lane import Order, run_lane
from ray_app.runlog import RunLog
from ray_app.subject_queue import Entry, Release, SubjectQueue, View
from ray_app.submission import Submission
from training.lead import Lead
from training.plan import PackPlan, plan_run, profile_of
from training.report import write_report
from training.run import ENDED, RunRecord, RunStore, SubjectRecord
from training.source import Beat, Outcome

POLL_SECONDS = 0.5
STEP_SAVE_SECONDS = 5.0  # how often a mere step is written down; changes of state are at once
STOP_SECONDS = 30.0  # how long lanes may take to checkpoint when the run is stopped
CANCEL_SECONDS = 2.0  # how often the storage is asked whether somebody wants the run cancelled
CLUSTER_SECONDS = 10.0  # how often the cluster's size is looked at
LANE_FAILURES = 3
LANES_HERE = 8  # each takes about 0.7 GB of processes where its task lives

log = logging.getLogger(__name__)
_BEAT, _OUTCOME = TypeAdapter(Beat), TypeAdapter(Outcome)


class Watcher(Protocol):
    """Who looks on: a terminal, a log, a test."""

    def see(self, view: View, records: Mapping[str, SubjectRecord]) -> None: ...

    def say(self, text: str) -> None: ...


class QueueActor:
    """The subject queue behind Ray's border: dicts in, dicts out."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._queue = SubjectQueue(Entry.model_validate(entry) for entry in entries)
        self._nodes: dict[int, str] = {}

    def enter(self, lane: int, profile: int, node: str) -> bool:
        """A lane's worker begins on `node`. If its last worker's node is gone, that costs its subjects nothing."""
        last, self._nodes[lane] = self._nodes.get(lane), node
        if last is not None and last not in _living_nodes():
            return self._queue.enter(lane, profile, "its node was lost", "preempted")
        return self._queue.enter(lane, profile)

    def lease(self, lane: int, count: int) -> list[dict[str, Any]]:
        return [lease.model_dump() for lease in self._queue.lease(lane, count)]

    def beat(self, lane: int, beat: dict[str, Any]) -> dict[str, Any]:
        return asdict(self._queue.beat(lane, _BEAT.validate_python(beat)))

    def ended(self, lane: int, outcome: dict[str, Any]) -> None:
        self._queue.ended(lane, _OUTCOME.validate_python(outcome))

    def leave(self, lane: int, reason: str, kind: Release) -> None:
        self._queue.release(lane, reason, kind)

    def trouble(self, lane: int) -> str | None:
        return self._queue.trouble(lane)

    def cancel(self, ids: list[str] | None) -> None:
        self._queue.cancel(ids)

    def give_up(self, profile: int, reason: str) -> None:
        self._queue.give_up(profile, reason)

    def stop(self) -> None:
        self._queue.stop()

    def view(self, since: int) -> dict[str, Any]:
        return self._queue.view(since).model_dump()


@dataclass
class _Lane:
    """A lane that is open: its future, and its pack's plan."""

    profile: int
    plan: PackPlan
    future: Any


@dataclass
class Driver:
    """Works a submission off. `run` is the way in; call it inside `connect`."""

    submission: Submission
    subjects: Sequence[SubjectRecord]
    lead: Lead
    cluster: Cluster
    watchers: Sequence[Watcher]
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        record, facts = self.submission.record, self.submission.facts
        self.store = self.submission.store
        self.records: dict[str, SubjectRecord] = {subject.id: subject for subject in self.subjects}
        self.plan = plan_run(record.manifest, facts)
        self._profiles = [pack.profile for pack in self.plan.packs]
        self._facts = facts
        self._queue: Any = None
        self._lanes: dict[int, _Lane] = {}
        self._opened = 0
        self._failures = dict.fromkeys(range(len(self._profiles)), 0)
        self._saved = dict(self.records)
        self._saved_at = dict.fromkeys(self.records, 0.0)
        self._seats = self.cluster.seats
        self._looked = time.monotonic()
        self._heeded = 0.0
        self._log = RunLog(self.store)

    def run(self) -> RunRecord:
        """Until every subject has ended. On KeyboardInterrupt lanes checkpoint and stop, and it is raised again.

        Raises Lost if another driver has taken over.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        name = f"queue-{self.store.run}"
        entries = [entry.model_dump() for entry in self._entries()]
        # on this node: a queue that dies with another one would take the run along
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(QueueActor).options(num_cpus=0, name=name, scheduling_strategy=here)
        self._queue = actor.remote(entries)
        try:
            self._follow(name)
            return self._finish()
        except KeyboardInterrupt:
            self._stop()
            self._save_all()
            raise
        finally:
            ray.kill(self._queue)

    # -- following --

    def _follow(self, queue: str) -> None:
        since = 0
        while True:
            self.lead.renew()
            self._heed_cancel()
            view = self._look(since)
            since = view.seq
            self._close_lanes()
            if not view.unfinished:
                return self._let_lanes_end()
            self._open_lanes(view, queue)
            time.sleep(POLL_SECONDS)

    def _heed_cancel(self) -> None:
        """Passes on what somebody wished on the storage."""
        import ray

        if time.monotonic() - self._heeded < CANCEL_SECONDS:
            return
        self._heeded = time.monotonic()
        wanted = cancel.wanted(self.store)
        if wanted is not None:
            ray.get(self._queue.cancel.remote(wanted or None))
            cancel.forget(self.store)

    def _let_lanes_end(self) -> None:
        """Their work is done. On a cluster of others they get the time to clean up after themselves."""
        import ray

        futures = [lane.future for lane in self._lanes.values()]
        if futures and not self.cluster.local:
            ray.wait(futures, num_returns=len(futures), timeout=STOP_SECONDS)

    def _look(self, since: int) -> View:
        import ray

        view = View.model_validate(ray.get(self._queue.view.remote(since), timeout=60))
        for record in view.changed:
            self._take_in(record)
        for note in view.notes:
            self._log.add(note)
        for watcher in self.watchers:
            watcher.see(view, self.records)
        self._log.flush(STEP_SAVE_SECONDS)
        return view

    def _take_in(self, record: SubjectRecord) -> None:
        before = self.records[record.id]
        self.records[record.id] = record
        if record.state != before.state:
            reason = f": {record.reason}" if record.reason else ""
            self._log.add(f"{record.id}: {record.state} at step {record.step}/{record.max_steps}{reason}")
        if record.state != before.state or time.monotonic() - self._saved_at[record.id] >= STEP_SAVE_SECONDS:
            self._save(record)

    def _save(self, record: SubjectRecord) -> None:
        self.store.save_subject(record)
        self._saved[record.id], self._saved_at[record.id] = record, time.monotonic()

    def _save_all(self) -> None:
        """The last word about those whose latest steps were not written down yet."""
        for record in self.records.values():
            if record != self._saved[record.id]:
                self._save(record)
        self._log.flush()

    def _say(self, text: str) -> None:
        for watcher in self.watchers:
            watcher.say(text)

    def _finish(self) -> RunRecord:
        self._save_all()
        return finish(self.store, self.submission.record, tuple(self.records.values()))

    def _stop(self) -> None:
        """Asks the lanes to checkpoint and end, and waits for them."""
        import ray

        self._say("stopping: checkpoints are being written (again to stop at once)")
        with contextlib.suppress(KeyboardInterrupt, ray.exceptions.RayError):
            ray.get(self._queue.stop.remote())
            futures = [lane.future for lane in self._lanes.values()]
            ray.wait(futures, num_returns=len(futures), timeout=STOP_SECONDS) if futures else None
            self._look(0)
        for id, record in self.records.items():
            if record.state not in ENDED:  # the last checkpoint is later than the last beat
                step = max(self.store.checkpoints(id), default=0)
                self.records[id] = record.model_copy(update={"step": step})

    # -- lanes --

    def _entries(self) -> Iterator[Entry]:
        place = {profile: index for index, profile in enumerate(self._profiles)}
        for subject in self.submission.record.manifest.subjects:
            yield Entry(record=self.records[subject.id], profile=place[profile_of(subject, self._facts)])

    def _open_lanes(self, view: View, queue: str) -> None:
        """Opens lanes while there are subjects that no lane has room for, and seats: subjects are spread evenly over
        the seats. Pending lanes are the demand that an autoscaler sees."""
        self._watch_cluster()
        most = self.limits.lanes or self.limits.gpus or self._seats
        busy = {lane.lane: len(lane.held) for lane in view.lanes}
        profiles = sorted(view.waiting.items())
        for turn, (profile, waiting) in enumerate(profiles):
            coming = sum(
                lane.plan.slots for i, lane in self._lanes.items() if lane.profile == profile and not busy.get(i)
            )
            mine = -(-(most - len(self._lanes)) // (len(profiles) - turn))
            while waiting > coming and mine > 0:
                slots = min(self.plan.packs[profile].slots, -(-(waiting - coming) // mine))
                self._open(profile, queue, slots)
                coming, mine = coming + slots, mine - 1

    def _open(self, profile: int, queue: str, slots: int) -> None:
        import ray

        plan, index = with_slots(self.plan.packs[profile], slots), self._opened
        resources = self._slot_resources()
        order = Order(
            run=self.store.run,
            storage=self.store.storage.uri,
            lane=index,
            profile=profile,
            plan=plan,
            queue=queue,
            threads=self._threads(),
            resources=resources,
        )
        # a lost node is no failure: Ray runs the task again elsewhere, and the queue knows which lane it is
        task = ray.remote(run_lane).options(
            num_cpus=0, max_retries=-1, name=f"lane-{index}", scheduling_strategy=_lane_place(len(self._lanes))
        )
        self._lanes[index] = _Lane(profile, plan, task.remote(order.model_dump()))
        self._opened += 1

    def _close_lanes(self) -> None:
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
                self._lane_failed(index, lane, _cause(error))

    def _lane_failed(self, index: int, lane: _Lane, reason: str) -> None:
        import ray

        self._failures[lane.profile] += 1
        self._log.add(f"lane {index} failed: {reason}")
        self._say(f"lane {index} failed: {reason}")
        ray.get(self._queue.leave.remote(index, f"its lane failed: {reason}", "lost"))
        alone = all(other.profile != lane.profile for other in self._lanes.values())
        if alone and self._failures[lane.profile] >= LANE_FAILURES:
            ray.get(self._queue.give_up.remote(lane.profile, f"no lane can work: {reason}"))

    def _watch_cluster(self) -> None:
        if time.monotonic() - self._looked >= CLUSTER_SECONDS:
            self._looked = time.monotonic()
            self._seats = max(self._seats, current().seats)

    def _slot_resources(self) -> dict[str, float]:
        return slot_resources(self.cluster, self.limits)

    def _threads(self) -> int:
        """Compute threads of a lane on a CPU machine: its share of the cores; 0 leaves it to torch."""
        if self.cluster.gpus or not self.cluster.local or "OMP_NUM_THREADS" in os.environ:
            return int(os.environ.get("OMP_NUM_THREADS", 0))
        return max(1, (os.cpu_count() or 1) // (self.limits.lanes or self._seats))


def _lane_place(open_lanes: int) -> Any:
    """Where a lane's task lives: beside the driver, which outlives preemptible nodes, while there is memory for it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if open_lanes >= LANES_HERE:
        return "SPREAD"
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def _living_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def with_slots(pack: PackPlan, slots: int) -> PackPlan:
    """The same pack for fewer subjects at once."""
    share = slots / pack.slots
    news = {"slots": slots, "state_bytes": int(pack.state_bytes * share), "memory_mb": pack.memory_mb * share}
    return pack.model_copy(update=news)


def finish(store: RunStore, record: RunRecord, subjects: Sequence[SubjectRecord]) -> RunRecord:
    """Writes down that a run has ended, and how, and its report."""
    states = {subject.state for subject in subjects}
    state = "failed" if "failed" in states else "cancelled" if "cancelled" in states else "done"
    ended = record.model_copy(update={"state": state, "finished": time.time()})
    store.save(ended)
    write_report(store)
    return ended


def slot_resources(cluster: Cluster, limits: Limits) -> dict[str, float]:
    """What one lane asks of Ray: a GPU where there are any (or will be), else CPUs."""
    if cluster.gpus or limits.gpus:
        return {"CPU": 1, "GPU": 1}
    return {"CPU": limits.cpus_per_lane}


def _cause(error: Exception) -> str:
    """The innermost message of what Ray wrapped, one line."""
    text = str(error).strip().splitlines()
    return text[-1][:300] if text else type(error).__name__

"""The driver of a run: opens lanes, follows them through the subject queue, and keeps the states on the storage.

It decides nothing about a subject: the queue does. It may die at any time; the same command takes the run up again.
"""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pydantic import TypeAdapter

from ray_app.train.cluster import Cluster, ClusterLimits
from ray_app.train.lanes import LaneOrder, Lanes
from ray_app.train.sharing import Sharing
from training.evaluation.report import write_report
from training.manifest.plan import plan_run, reserve
from training.run import cancel
from training.run.lead import Lead
from training.run.lease import Entry, entries
from training.run.run import RunRecord, RunStore, SubjectRecord, end_run
from training.run.shares import read_quota
from training.run.source import Beat, Outcome, Release
from training.run.states import States
from training.run.subject_queue import SubjectQueue
from training.run.submission import Submission
from training.run.view import RunView

POLL_SECONDS = 0.5
STOP_SECONDS = 30.0  # how long lanes may take to checkpoint when the run is stopped
CANCEL_SECONDS = 2.0  # how often the storage is asked for a request to cancel

log = logging.getLogger(__name__)
_BEAT, _OUTCOME = TypeAdapter(Beat), TypeAdapter(Outcome)


class Watcher(Protocol):
    """What follows a run: a terminal, metrics, a test."""

    def see(self, view: RunView, records: Mapping[str, SubjectRecord]) -> None:
        """Is told how everything stands, about once a second."""

    def say(self, text: str) -> None:
        """Is told what a person should read."""


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
        """See `SubjectQueue.lease`."""
        return [lease.model_dump() for lease in self._queue.lease(lane, count)]

    def beat(self, lane: int, beat: dict[str, Any]) -> dict[str, Any]:
        """See `SubjectQueue.beat`."""
        return asdict(self._queue.beat(lane, _BEAT.validate_python(beat)))

    def ended(self, lane: int, outcome: dict[str, Any]) -> None:
        """See `SubjectQueue.ended`."""
        self._queue.ended(lane, _OUTCOME.validate_python(outcome))

    def leave(self, lane: int, reason: str, kind: Release) -> None:
        """See `SubjectQueue.release`."""
        self._queue.release(lane, reason, kind)

    def trouble(self, lane: int) -> str | None:
        """See `SubjectQueue.trouble`."""
        return self._queue.trouble(lane)

    def cancel(self, ids: list[str] | None) -> None:
        """See `SubjectQueue.cancel`."""
        self._queue.cancel(ids)

    def give_up(self, profile: int, reason: str) -> None:
        """See `SubjectQueue.give_up`."""
        self._queue.give_up(profile, reason)

    def dismiss(self, lane: int) -> None:
        """See `SubjectQueue.dismiss`."""
        self._queue.dismiss(lane)

    def stop(self) -> None:
        """See `SubjectQueue.stop`."""
        self._queue.stop()

    def view(self, since: int) -> dict[str, Any]:
        """See `SubjectQueue.view`."""
        return self._queue.view(since).model_dump()


@dataclass
class Driver:
    """Works a submission off. `run` is the way in; call it inside `connect`."""

    submission: Submission
    subjects: Sequence[SubjectRecord]
    lead: Lead
    cluster: Cluster
    watchers: Sequence[Watcher]
    limits: ClusterLimits = field(default_factory=ClusterLimits)

    def __post_init__(self) -> None:
        record, base = self.submission.record, self.submission.base
        self.store = self.submission.store
        self.states = States(self.store, self.subjects)
        self.plan = plan_run(record.manifest, base)
        room = max(self.cluster.seats, self.limits.gpus or 0)
        self._reserve = [pack for pack in reserve(record.manifest, base) if pack.workers <= room]
        self._queue: Any = None
        self._heeded = 0.0

    @property
    def records(self) -> dict[str, SubjectRecord]:
        """How each subject stands, in manifest order."""
        return self.states.records

    def run(self) -> RunRecord:
        """Until every subject has ended. On KeyboardInterrupt lanes checkpoint and stop, and it is raised again.

        Raises Lost if another driver has taken over.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        name = f"queue-{self.store.run}"
        found = entries(self.records.values(), self.plan.packs, self._reserve)
        # on this node: a queue that dies with another one would take the run along
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(QueueActor).options(num_cpus=0, name=name, scheduling_strategy=here)
        self._queue = actor.remote([entry.model_dump() for entry in found])
        packs = (*self.plan.packs, *self._reserve)
        sharing = self._sharing()
        told = LaneOrder(self.store.run, self.store.storage.uri, name)
        lanes = Lanes(told, packs, self.cluster, self.limits, self._queue, self._complain, sharing)
        try:
            self._follow(lanes)
            return self._finish()
        except KeyboardInterrupt:
            self._stop(lanes)
            self.states.stop()
            raise
        finally:
            ray.kill(self._queue)
            if sharing is not None:
                sharing.leave()

    def _sharing(self) -> Sharing | None:
        """The link to the other runs of the cluster; None on a cluster that was started for this run alone."""
        if self.cluster.local:
            return None
        tenant = self.submission.record.tenant
        return Sharing(self.store.run, tenant, self.limits.priority, read_quota(self.store.storage, tenant))

    # -- following --

    def _follow(self, lanes: Lanes) -> None:
        since = 0
        while True:
            self.lead.renew()
            self._heed_cancel()
            view = self._look(since)
            since = view.seq
            lanes.close_ended()
            if not view.unfinished:
                if not self.cluster.local:  # on a cluster that lives on, lanes get the time to clean up
                    lanes.wait(STOP_SECONDS)
                return
            lanes.share(view)
            lanes.open(view)
            time.sleep(POLL_SECONDS)

    def _heed_cancel(self) -> None:
        """Passes on a request to cancel that is on the storage."""
        import ray

        if time.monotonic() - self._heeded < CANCEL_SECONDS:
            return
        self._heeded = time.monotonic()
        wanted = cancel.wanted(self.store)
        if wanted is not None:
            ray.get(self._queue.cancel.remote(wanted or None))
            cancel.forget(self.store)

    def _look(self, since: int) -> RunView:
        import ray

        view = RunView.model_validate(ray.get(self._queue.view.remote(since), timeout=60))
        self.states.take_in(view)
        for watcher in self.watchers:
            watcher.see(view, self.records)
        return view

    def _say(self, text: str) -> None:
        for watcher in self.watchers:
            watcher.say(text)

    def _finish(self) -> RunRecord:
        self.states.save()
        return finish(self.store, self.submission.record, tuple(self.records.values()))

    def _complain(self, text: str) -> None:
        self.states.note(text)
        self._say(text)

    def _stop(self, lanes: Lanes) -> None:
        """Asks the lanes to checkpoint and end, and waits for them."""
        import ray

        self._say("stopping: checkpoints are being written (again to stop at once)")
        with contextlib.suppress(KeyboardInterrupt, ray.exceptions.RayError):
            ray.get(self._queue.stop.remote())
            lanes.wait(STOP_SECONDS)
            self._look(0)


def _living_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def finish(store: RunStore, record: RunRecord, subjects: Sequence[SubjectRecord]) -> RunRecord:
    """Writes down that a run has ended, and how, and its report; returns its record."""
    ended = end_run(store, record, subjects)
    write_report(store)
    return ended

"""The subject loop: leases subjects, keeps a pack full, and says how each stands and ends. It knows no Ray.

Ray's lanes, the local main and tests call `work` with a `Source` of their own. What is done with a subject before,
during and after its training is in `preparing`, `keeping` and `finishing`. A subject's failure is an `Outcome` with a
reason; it never raises here and never costs another subject a step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from training.adapters.adapter import Adapter
from training.base.base import Base
from training.manifest.plan import PackPlan
from training.run.fault import Failure, apart, failure_of, reason_of, together
from training.run.home import Home
from training.run.personal import check_photos
from training.run.run import RunStore
from training.run.source import Beat, Doing, EndKind, Orders, Outcome, Phase, Source, Task
from training.trainer.fitting import open_pack
from training.trainer.loop import Ended, Progress, train
from training.trainer.member import Subject
from training.trainer.worker.early_stop import Watch
from training.trainer.worker.finishing import Finishing
from training.trainer.worker.keeping import Keeping
from training.trainer.worker.preparing import Preparing

BEAT_SECONDS = 1.0
RATE_STEPS = 20  # images/s are told as the mean over so many steps


@dataclass
class _Held:
    """A leased subject while it is here: when it came, at which step, and what is to be said about its photos."""

    since: float
    begun: int = 0
    warnings: tuple[str, ...] = ()


class Worker:
    """The work of one device. `work` is the entry point. All ids are the subjects' keys."""

    def __init__(
        self, base: Base, plan: PackPlan, source: Source, home: Home, training_adapter: Adapter | None = None
    ) -> None:
        self._source = source
        self._home = home
        self._held: dict[str, _Held] = {}
        self._beat = Beat()
        self._beaten = 0.0
        self._stop = False
        self._rate: list[tuple[float, int]] = []
        self._opened = open_pack(base, plan, training_adapter)
        self._pack = self._opened.pack
        self._beat.notes += self._opened.notes
        self._watch = Watch(base)
        self._preparing = Preparing(base, self._say, self._beat.notes.append)
        self._keeping = Keeping(base, self._pack, self._miss)
        self._finishing = Finishing(base, self._pack, self._keeping.pictures, self._say)

    def work(self) -> None:
        """Until the source has nothing more, or says stop."""
        try:
            for progress in train(self._pack, self._feed, limit=self._opened.limit):
                self._follow(progress)
                if self._stop:
                    break
        finally:
            try:
                self._keeping.checkpoint_all()
            finally:
                self._pack.close()

    # -- before --

    def _feed(self, count: int) -> list[Subject]:
        """Leases up to `count` subjects and prepares them; those that cannot be prepared end here."""
        ready: list[Subject] = []
        while len(ready) < count and not self._stop:
            tasks = self._source.lease(count - len(ready))
            if not tasks:
                break
            by_id = {task.key: task for task in tasks}
            self._held |= {id: _Held(time.time()) for id in by_id}
            prepare = partial(self._prepare, by_id)
            ready += apart(list(by_id), prepare, partial(self._fail, "it could not be prepared")).values()
        return ready

    def _prepare(self, tasks: dict[str, Task], id: str) -> Subject:
        task = tasks.pop(id)  # its files need not be held while it trains
        spec, home = task.trained, task.home or self._home
        if task.may_spread:
            self._opened.check(spec)
        self._finishing.check(spec)
        taken = self._preparing.photos(task, home)
        check_photos(home.run, home.tenant, spec, [*taken.photos.good, *taken.held_out])
        self._held[id].warnings = taken.warnings
        subject = self._preparing.subject(task, home, taken.photos)
        if spec.evaluate.early_stop:
            self._watch.join(id, spec, subject.instance)
        self._keeping.join(home, task.fingerprint, taken, subject)
        self._held[id].begun = subject.state.step if subject.state is not None else 0
        return subject

    # -- meanwhile --

    def _follow(self, progress: Progress) -> None:
        """What one fused step means for storage, registry and source."""
        for id in progress.joined:
            self._say([id], Doing(Phase.TRAINING))
        for report in progress.reports:
            self._beat.steps[report.id], self._beat.losses[report.id] = report.step, report.loss
            self._beat.trained[report.id] = report.step - self._held[report.id].begun
        self._keeping.follow(progress.reports, self._beat.images_per_second)
        self._finish(progress.ended)
        self._stop_early(progress)
        self._beat.notes += progress.notes
        self._measure(progress)
        orders = self._send()
        for id in orders.cancel & set(self._held):
            if id in self._pack.ids:
                self._pack.leave(id)
            self._end(id, "cancelled", "cancelled by the user")
        for id in orders.pause & set(self._pack.ids):
            self._keeping.checkpoint([id], "no checkpoint where it was paused")
            self._pack.leave(id)
            self._end(id, "paused", "paused by the user")
        self._stop = self._stop or orders.stop

    def _stop_early(self, progress: Progress) -> None:
        """Ends the subjects whose learning has settled, where they asked for it."""
        gone = {ended.id for ended in progress.ended}
        due = [r.id for r in progress.reports if r.id not in gone and self._watch.is_due(r.id, r.step)]
        looked = together(due, self._look, partial(self._miss, "its loss could not be looked at"))
        settled = [id for id, has_settled in looked.items() if has_settled]
        for id in settled:
            self._beat.notes.append(f"{id}: stopped at step {self._beat.steps[id]}: its loss no longer changes")
        self._keeping.checkpoint(settled, "no checkpoint of its last step")
        self._finish([Ended(id) for id in settled])
        for id in settled:
            self._pack.leave(id)

    def _look(self, ids: Sequence[str]) -> dict[str, bool]:
        settled = self._watch.settled(self._pack.bank, {id: self._pack.slot(id) for id in ids})
        return {id: id in settled for id in ids}

    # -- after --

    def _finish(self, ended: Sequence[Ended]) -> None:
        """Ends those that failed; finishes the others together."""
        for one in ended:
            if one.reason is not None:
                self._end(one.id, one.kind, one.reason)
        done = [one.id for one in ended if one.reason is None]
        finished = apart(done, self._keeping.finished, partial(self._fail, "it could not be judged"))
        for id, end in self._finishing.finish(list(finished.values())).items():
            if isinstance(end, Failure):
                self._end(id, *end)
            else:
                self._end(id, "done", version=end)

    def _fail(self, what: str, id: str, error: Exception) -> None:
        """Ends a subject that cannot go on."""
        self._end(id, *failure_of(error, what))

    def _miss(self, what: str, id: str, error: Exception) -> None:
        """Notes what a subject goes on without."""
        self._beat.notes.append(f"{id}: {what}: {reason_of(error)}")

    def _end(self, id: str, kind: EndKind, reason: str | None = None, version: str | None = None) -> None:
        held, kept = self._held.pop(id), self._keeping.leave(id)
        self._watch.leave(id)
        outcome = Outcome(
            id=id,
            kind=kind,
            reason=reason,
            version=version,
            step=self._beat.steps.get(id, max(kept.step, 0) if kept else 0),
            loss=self._beat.losses.get(id),
            seconds=time.time() - held.since,
            trained=self._beat.trained.get(id, 0),
            warnings=held.warnings,
        )
        for about in (self._beat.phase, self._beat.steps, self._beat.losses, self._beat.trained):
            about.pop(id, None)
        self._source.ended(outcome)

    # -- signs of life --

    def _say(self, ids: Sequence[str], doing: Doing) -> None:
        """A change of phase is sent at once if the last beat is old enough; long preparation keeps the lease alive."""
        self._beat.phase.update(dict.fromkeys(ids, doing))
        orders = self._send()
        self._stop = self._stop or orders.stop

    def _send(self) -> Orders:
        if time.monotonic() - self._beaten < BEAT_SECONDS:
            return Orders()
        self._beaten = time.monotonic()
        orders = self._source.beat(self._beat)
        self._beat.notes.clear()
        return orders

    def _measure(self, progress: Progress) -> None:
        """Images a second over the last steps."""
        self._rate = [*self._rate[1 - RATE_STEPS :], (progress.seconds, progress.rows)]
        seconds = sum(seconds for seconds, _ in self._rate)
        self._beat.images_per_second = sum(rows for _, rows in self._rate) / seconds if seconds else 0.0


def work(
    base: Base,
    plan: PackPlan,
    source: Source,
    run: RunStore,
    *,
    tenant: str,
    root: str = ".",
    training_adapter: Adapter | None = None,
) -> None:
    """Trains what `source` leases, in one pack, until it has nothing more or says stop. See the module's docstring.

    `run`, `tenant` and `root` are those of tasks that name no home of their own.
    """
    Worker(base, plan, source, Home(run, tenant, root), training_adapter).work()

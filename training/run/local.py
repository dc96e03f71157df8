"""A run that one process works off by itself: its subject queue, its lead and its states, without Ray.

What trains is handed in, so that this knows no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from training.manifest.plan import PackPlan, plan_run
from training.run import cancel
from training.run.lead import Lead, Lost
from training.run.lease import entries
from training.run.run import SubjectRecord
from training.run.source import Beat, Orders, Outcome, Task
from training.run.states import States
from training.run.subject_queue import SubjectQueue
from training.run.submission import Submission, settle
from training.run.view import RunView

STOPPED = "the run was stopped"


class LocalRun:
    """A submission that this process leads. It is the `Source` of the worker of one pack after another.

    `watch(view, beat)` sees what has changed and, after a sign of life, what the worker is doing.
    """

    def __init__(self, submission: Submission, lead: Lead, watch: Callable[[RunView, Beat | None], None]) -> None:
        self.submission = submission
        self._lead = lead
        self._watch = watch
        self._states = States(submission.store, settle(submission))
        self._packs = plan_run(submission.record.manifest, submission.base).packs
        self._queue = SubjectQueue(entries(self._states.records.values(), self._packs))
        self._specs = {subject.id: subject for subject in submission.manifest.subjects}
        self._lane = 0  # of the queue: the place of the pack that trains
        self._seen = -1

    def train(self, work: Callable[["LocalRun", PackPlan], None]) -> list[SubjectRecord]:
        """Has `work` train every pack in which a subject waits. Returns how each subject ended, in manifest order.

        Raises Lost if another process has taken the run over. Whatever ends it, the states are on the storage.
        """
        try:
            for lane, pack in enumerate(self._packs):
                self._lane = lane
                self._train(work, pack)
        except Lost:
            raise  # from here on the other process writes the states
        except BaseException:
            self._queue.release(self._lane, STOPPED, "stopped")
            self._look()
            self._states.stop()
            raise
        self._states.save()
        return list(self._states.records.values())

    def _train(self, work: Callable[["LocalRun", PackPlan], None], pack: PackPlan) -> None:
        if pack.workers > 1:
            self._queue.give_up(self._lane, "`strategy: zero` takes several devices: `dreamfleet train` starts on them")
        elif self._queue.view().waiting.get(self._lane):
            self._queue.enter(self._lane, self._lane)
            work(self, pack)
            self._queue.release(self._lane, STOPPED, "stopped")
        self._look()

    # -- the worker's source --

    def lease(self, count: int) -> Sequence[Task]:
        """Up to `count` subjects of the pack."""
        leases = self._queue.lease(self._lane, count)
        self._look()
        read = self.submission.files
        return [replace(lease.task(self._specs[lease.id]), files=read.take_out(lease.id)) for lease in leases]

    def beat(self, beat: Beat) -> Orders:
        """Takes in a sign of life; returns what is to be dropped. All stop where another process has taken over."""
        wanted = cancel.wanted(self.submission.store)
        if wanted is not None:
            self._queue.cancel(wanted or None)
            cancel.forget(self.submission.store)
        orders = self._queue.beat(self._lane, beat)
        try:
            self._look(beat)
        except Lost:
            return Orders(stop=True)
        return orders

    def ended(self, outcome: Outcome) -> None:
        """Takes in how a subject ended: the queue decides whether it is tried again."""
        self._queue.ended(self._lane, outcome)
        self._look()

    def _look(self, beat: Beat | None = None) -> None:
        """Writes down and shows what is new. Raises Lost if another process has taken the run over."""
        self._lead.renew()
        view = self._queue.view(self._seen)
        self._seen = view.seq
        self._states.take_in(view)
        self._watch(view, beat)

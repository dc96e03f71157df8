"""The search: variants join one pack, are scored at their rungs, and those in the worse half leave it.

Variants that start together wait for each other at a rung, so that who is compared does not depend on the pack. Slots
that become free go to variants that go on, then to further ones. Successive halving as it is done asynchronously: Li
et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from training.adapters.adapter import Adapter
from training.base.base import Base
from training.errors import TooLarge, UserError
from training.evaluation.evaluate import Evaluation, evaluate_subjects
from training.evaluation.judges.box import JudgeBox, Judges
from training.manifest.subject import SubjectSpec
from training.run.fault import reason_of, together
from training.trainer.checkpoint import SubjectState
from training.trainer.fitting import Opened
from training.trainer.loop import Progress, train
from training.trainer.member import Subject
from training.tuning.asker import Asker
from training.tuning.ready import Ready
from training.tuning.variant import Rung, Variant, goes_on, planned_steps, rung_of, rung_steps


class Reached(NamedTuple):
    """How a search stands: `steps` are optimizer steps so far, of all members, `planned` about those of the whole
    search; `scored`: a rung has just been."""

    variants: Sequence[Variant]
    steps: int
    planned: int
    scored: bool


class Search:
    """A search over the settings of `specs`, `wanted` variants in all. `variants` are those asked so far.

    `watch` hears after every step and batch of pictures how it stands. Raises UserError where a judge's model is
    missing, or one device cannot hold one subject.
    """

    def __init__(
        self,
        base: Base,
        opened: Opened,
        ready: Mapping[str, Ready],
        specs: Sequence[SubjectSpec],
        asker: Asker,
        *,
        wanted: int,
        watch: Callable[[Reached], None],
    ) -> None:
        self.variants: list[Variant] = []
        self.learned: dict[str, Adapter] = {}  # of members that were trained to their end, as the pack calls them
        self.notes: list[str] = list(opened.notes)
        self._base = base
        self._opened = opened
        self._ready = ready
        self._specs = tuple(specs)
        self._asker = asker
        self._wanted = wanted
        self._watch = watch
        self._box = JudgeBox(base)
        self._rungs = rung_steps(specs[0].train.max_steps)
        self.steps = 0
        self._waiting: deque[Subject] = deque()  # may join
        self._resting: dict[str, Subject] = {}  # members at their rung, by id
        self._cohorts: list[list[Variant]] = []  # that started together and train
        for spec in specs:
            self._judges(spec)
            _check(opened, spec)

    def run(self) -> None:
        """Until every wanted variant has ended. Takes the pack off the base, whatever ends it."""
        pack = self._opened.pack
        try:
            for progress in train(pack, self._feed, limit=self._opened.limit):
                self._follow(progress)
        finally:
            pack.close()

    # -- members in --

    def _feed(self, count: int) -> list[Subject]:
        """Up to `count` members to join: of variants that go on, then of further ones."""
        self._compare()
        room = count - len(self._waiting)
        left = self._wanted - len(self.variants)
        if room > 0 and left:
            self._ask(min(left, max(1, room // len(self._specs))))
        return [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]

    def _ask(self, count: int) -> None:
        """Starts so many further variants together."""
        cohort = [Variant(*self._asker.ask(), self._specs) for _ in range(count)]
        self._cohorts.append(cohort)
        self.variants += cohort
        for variant in cohort:
            for id, spec in zip(variant.ids, self._specs, strict=True):
                self._waiting.append(self._ready[spec.id].subject(variant.spec_of(id), id))

    # -- meanwhile --

    def _follow(self, progress: Progress) -> None:
        """Takes members that are at a rung out of the pack, and variants that failed."""
        self.notes += progress.notes
        for ended in progress.ended:
            if ended.reason is not None:
                self._fail(ended.id, ended.reason)
        for report in progress.reports:
            if report.failure is None and report.id in self._opened.pack.ids:
                self.steps += 1
                if self._variant(report.id).state == "failed":  # it waited for memory while another member failed
                    self._opened.pack.leave(report.id)
                elif report.step in self._rungs:
                    self._resting[report.id] = self._opened.pack.leave(report.id)
        self._tell()

    def _variant(self, id: str) -> Variant:
        return self.variants[int(id.split("/")[0])]

    def _fail(self, id: str, reason: str) -> None:
        variant = self._variant(id)
        if variant.state == "failed":
            return
        variant.state, variant.reason = "failed", reason
        self._asker.fail(variant.number)
        self._forget(variant)

    def _forget(self, variant: Variant) -> None:
        """Nothing of an ended variant waits or trains."""
        for id in variant.ids:
            self._resting.pop(id, None)
            if id in self._opened.pack.ids:
                self._opened.pack.leave(id)
        self._waiting = deque(one for one in self._waiting if one.id not in variant.ids)

    # -- rungs --

    def _compare(self) -> None:
        """Scores the cohorts that have come to their rung, all together, and says who goes on."""
        alive = ([one for one in cohort if one.state == "training"] for cohort in self._cohorts)
        self._cohorts = [cohort for cohort in alive if cohort]
        due = [one for cohort in self._cohorts if all(map(self._rests, cohort)) for one in cohort]
        if not due:
            return
        judged = together([str(one.number) for one in due], partial(self._judge, due), self._unjudged)
        scored = [one for one in due if str(one.number) in judged]
        for one in scored:
            step = self._state(one.ids[0]).step
            one.rungs.append(_rung(step, judged[str(one.number)]))
            self._asker.score(one.number, step, one.rungs[-1].score)
        for one in scored:
            self._decide(one)
        self._tell(scored=True)

    def _rests(self, variant: Variant) -> bool:
        return all(id in self._resting for id in variant.ids)

    def _judge(self, due: Sequence[Variant], numbers: Sequence[str]) -> dict[str, list[Evaluation]]:
        """The evaluations of all subjects of the variants with these numbers, by number."""
        asked = [one for one in due if str(one.number) in numbers]
        exams = [
            self._ready[spec.id].exam(one.spec_of(id), self._state(id), self._base)
            for one in asked
            for id, spec in zip(one.ids, one.specs, strict=True)
        ]
        judged = iter(evaluate_subjects(self._base, exams, self._judges, alive=lambda _done, _all: self._tell()))
        return {str(one.number): [next(judged) for _ in one.specs] for one in asked}

    def _state(self, id: str) -> SubjectState:
        """How a member stands at its rung."""
        state = self._resting[id].state
        assert state is not None  # it has left a pack
        return state

    def _tell(self, *, scored: bool = False) -> None:
        planned = planned_steps(self._wanted, len(self._specs), self._rungs[-1])
        self._watch(Reached(self.variants, self.steps, planned, scored))

    def _unjudged(self, number: str, error: Exception) -> None:
        variant = self.variants[int(number)]
        self._fail(variant.ids[0], f"it could not be judged: {reason_of(error)}")

    def _decide(self, variant: Variant) -> None:
        """Ends a variant, or has its members wait to go on."""
        last = variant.rungs[-1]
        if last.step == self._rungs[-1]:
            variant.state = "finished"
            self._asker.finish(variant.number, last.score)
            for id in variant.ids:
                self.learned[id] = self._state(id).learned
        elif not goes_on(variant, self.variants):
            variant.state = "dropped"
            self._asker.drop(variant.number)
        else:
            self._waiting.extend(self._resting.pop(id) for id in variant.ids)
            return
        self._forget(variant)

    def _judges(self, spec: SubjectSpec) -> Judges:
        return self._box.judges(spec.evaluate.likeness_model, spec.evaluate.fidelity_model)


def _rung(step: int, judged: Sequence[Evaluation]) -> Rung:
    """The rung of a variant from its subjects' evaluations."""
    measured = [score.value for one in judged for score in one.of_step(step) if score.name == "likeness"]
    return rung_of(step, {one.id: one.candidates[0] for one in judged}, fmean(measured) if measured else 0.0)


def _check(opened: Opened, spec: SubjectSpec) -> None:
    """Raises UserError for a subject that does not fit on this device, even alone."""
    try:
        opened.check(spec)
    except TooLarge as error:
        raise UserError(f"Subject '{spec.id}' is {error}. Lower its `batch_size` or `resolution`.") from None

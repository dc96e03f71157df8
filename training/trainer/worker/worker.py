"""The subject loop: lease subjects, prepare them, keep a pack full, keep what is learned, finish. It knows no Ray.

Ray's lanes, the local main and tests call `work` with a `Source` of their own. A subject's failure is an `Outcome` with
a reason; it never raises here and never costs another subject a step (`training.run.fault`).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL import Image

from training.base.base import Base
from training.evaluation.evaluate import Evaluation
from training.manifest.plan import PackPlan
from training.run.fault import apart, kind_of, reason_of, together
from training.run.run import RunStore
from training.run.source import Doing, Kind, Outcome, Phase, Source
from training.trainer.fitting import open_pack
from training.trainer.loop import Ended, Progress, train
from training.trainer.member import Report, Subject
from training.trainer.worker.early_stop import Watch
from training.trainer.worker.finishing import Finishing
from training.trainer.worker.held import Held
from training.trainer.worker.judging import Judging
from training.trainer.worker.keeping import Keeping
from training.trainer.worker.preparing import Preparing
from training.trainer.worker.pulse import Pulse


class Worker:
    """One device's worth of work. `work` is the way in."""

    def __init__(
        self, base: Base, plan: PackPlan, source: Source, run: RunStore, *, tenant: str, root: str = "."
    ) -> None:
        self.source = source
        self._opened = open_pack(base, plan)
        self.pack = self._opened.pack
        self._judging = Judging(base, run)
        self._watch = Watch(base)
        self._pulse = Pulse(source)
        self._preparing = Preparing(base, run, root, self._pulse.say)
        self._keeping = Keeping(run, self.pack)
        self._finishing = Finishing(run, self.pack, self._judging, tenant)
        self._held: dict[str, Held] = {}
        for note in self._opened.notes:
            self._pulse.note(note)

    def work(self) -> None:
        """Until the source has nothing more, or says stop."""
        try:
            for progress in train(self.pack, self._feed, limit=self._opened.limit):
                self._follow(progress)
                if self._pulse.stop:
                    break
        finally:
            try:
                self._checkpoint_all()
            finally:
                self.pack.close()

    # -- in --

    def _feed(self, count: int) -> list[Subject]:
        """Leases up to `count` subjects and prepares them; those that cannot be prepared end here."""
        ready: list[Subject] = []
        while len(ready) < count and not self._pulse.stop:
            tasks = self.source.lease(count - len(ready))
            if not tasks:
                break
            self._held |= {task.spec.id: Held(task, task.trained) for task in tasks}
            ids = [task.spec.id for task in tasks]
            ready += apart(ids, self._prepare, partial(self._fail, "it could not be prepared")).values()
        return ready

    def _prepare(self, id: str) -> Subject:
        held = self._held[id]
        if held.task.may_spread:
            self._opened.check(held.spec)
        self._judging.check(held.spec)
        prepared = self._preparing.prepare(held.task, held.spec)
        held.task = replace(held.task, files=None)  # not needed while it trains
        held.found, held.held_out = prepared.photos, prepared.held_out
        for note in prepared.notes:
            self._pulse.note(note)
        self._watch.join(held.spec, prepared.subject.instance)
        state = prepared.subject.state
        held.saved_step = state.step if state else -1
        return prepared.subject

    # -- on --

    def _follow(self, progress: Progress) -> None:
        """What one fused step means for storage, registry and source."""
        for id in progress.joined:
            self._pulse.say(id, Doing(Phase.TRAINING))
        self._sample(progress.reports)
        for report in progress.reports:
            self._take_in(report)
        self._finish(progress.ended)
        self._stop_early(progress)
        for note in progress.notes:
            self._pulse.note(note)
        self._pulse.measure(progress.seconds, progress.rows)
        orders = self._pulse.send()
        for id in orders.cancel & set(self._held):
            if id in self.pack.ids:
                self.pack.leave(id)
            self._end(id, "cancelled", "cancelled by the user")

    def _take_in(self, report: Report) -> None:
        held = self._held[report.id]
        self._pulse.trained(report.id, report.step, report.loss)
        if report.failure is not None:
            return
        held.rates[report.step] = self._pulse.beat.images_per_second
        if self._keeping.is_due(held, report.step):
            # the one before is whole; the next may succeed
            apart([report.id], self._checkpoint, partial(self._miss, f"no checkpoint of step {report.step}"))

    def _stop_early(self, progress: Progress) -> None:
        """Ends the subjects whose learning has settled, where they asked for it."""
        gone = {ended.id for ended in progress.ended}
        due = [r.id for r in progress.reports if r.id not in gone and self._watch.is_due(r.id, r.step)]
        looked = together(due, self._look, partial(self._miss, "its loss could not be looked at"))
        settled = [id for id, has_settled in looked.items() if has_settled]
        for id in settled:
            self._pulse.note(f"{id}: stopped at step {self._pulse.beat.steps[id]}: its loss no longer changes")
        apart(settled, self._checkpoint, partial(self._miss, "no checkpoint of its last step"))
        self._finish([Ended(id) for id in settled])
        for id in settled:
            self.pack.leave(id)

    def _look(self, ids: Sequence[str]) -> dict[str, bool]:
        settled = self._watch.settled(self.pack.bank, {id: self.pack.slot(id) for id in ids})
        return {id: id in settled for id in ids}

    def _sample(self, reports: Sequence[Report]) -> None:
        """Sample pictures of subjects that are still training, kept with the run."""
        steps = {r.id: r.step for r in reports if r.failure is None}
        drawn = self._draw([id for id, step in steps.items() if self._keeping.samples_due(self._held[id], step)])

        def keep(id: str) -> None:
            self._keeping.keep_samples(self._held[id], steps[id], drawn[id])

        apart(list(drawn), keep, partial(self._miss, "its samples could not be kept"))

    def _draw(self, ids: Sequence[str]) -> dict[str, list[Image.Image]]:
        """Sample pictures of subjects, without those for which drawing fails."""
        return together(ids, lambda ids: self._keeping.draw(self._of(ids)), partial(self._miss, "no sample pictures"))

    def _checkpoint(self, id: str) -> None:
        self._keeping.checkpoint(self._held[id])

    def _checkpoint_all(self) -> None:
        """On the way out nothing that was learned is lost. Raises the first error once all have had their turn."""
        missed: list[Exception] = []
        apart([id for id in self.pack.ids if id in self._held], self._checkpoint, lambda _, error: missed.append(error))
        if missed:
            raise missed[0]

    # -- out --

    def _finish(self, ended: Sequence[Ended]) -> None:
        """Ends those that failed; judges the others together, and publishes them."""
        for one in ended:
            if one.reason is not None:
                self._end(one.id, one.kind, one.reason)
        done = [one.id for one in ended if one.reason is None]
        unpublished = partial(self._fail, "it could not be published")  # its last checkpoint is whole
        evaluations = together(done, self._judge, partial(self._fail, "it could not be judged"))
        chosen = list(apart(list(evaluations), partial(self._choose, evaluations), unpublished))
        pictures = self._draw(chosen)
        versions = apart(chosen, partial(self._publish, evaluations, pictures), unpublished)
        for id, version in versions.items():
            self._end(id, "done", version=version)

    def _judge(self, ids: Sequence[str]) -> dict[str, Evaluation | None]:
        def alive(_drawn: int, _wanted: int) -> None:
            for id in ids:
                self._pulse.say(id, Doing(Phase.EVALUATING))

        return self._finishing.judge(self._of(ids), alive)

    def _choose(self, evaluations: dict[str, Evaluation | None], id: str) -> None:
        self._finishing.choose(self._held[id], evaluations[id])

    def _publish(
        self, evaluations: dict[str, Evaluation | None], pictures: dict[str, list[Image.Image]], id: str
    ) -> str:
        self._pulse.say(id, Doing(Phase.PUBLISHING))
        return self._finishing.publish(self._held[id], evaluations[id], pictures.get(id, []))

    def _of(self, ids: Sequence[str]) -> list[Held]:
        return [self._held[id] for id in ids]

    def _fail(self, what: str, id: str, error: Exception) -> None:
        """A subject that cannot go on: its result. An expected error says it all; of others `what` says where."""
        kind = kind_of(error)
        self._end(id, kind, f"{what}: {reason_of(error)}" if kind == "unknown" else reason_of(error))

    def _miss(self, what: str, id: str, error: Exception) -> None:
        """Something that a subject goes on without."""
        self._pulse.note(f"{id}: {what}: {reason_of(error)}")

    def _end(self, id: str, kind: Kind, reason: str | None = None, version: str | None = None) -> None:
        held = self._held.pop(id)
        self._watch.leave(id)
        outcome = Outcome(
            id=id,
            kind=kind,
            reason=reason,
            version=version,
            step=self._pulse.beat.steps.get(id, max(held.saved_step, 0)),
            loss=self._pulse.beat.losses.get(id),
            seconds=time.time() - held.since,
            warnings=held.warnings,
        )
        self._pulse.ended(outcome)


def work(base: Base, plan: PackPlan, source: Source, run: RunStore, *, tenant: str, root: str = ".") -> None:
    """Trains what `source` leases, in one pack, until it has nothing more or says stop. See the module's docstring."""
    Worker(base, plan, source, run, tenant=tenant, root=root).work()


def precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `mixed_precision` means on a device: `auto` is bf16 where the device computes in it, else fp32."""
    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
        name = "bf16" if has_bf16 else "no"
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16 itself; emulated, it would be slower than fp32."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))

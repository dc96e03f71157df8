"""The subject loop: lease subjects, prepare them, keep a pack full, checkpoint, publish. It knows no Ray.

Ray's lanes, the local main and tests call `work` with a `Source` of their own. A subject's failure is an `Outcome` with
a reason; it never raises here and never costs another subject a step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image

from training.base.base import Base
from training.errors import SubjectFailed, UserError
from training.evaluation.evaluate import Evaluation
from training.evaluation.exam import candidate_steps
from training.manifest.plan import PackPlan
from training.manifest.subject import SubjectSpec
from training.photos.intake import check_words, fingerprint, read_files
from training.photos.photos import Photo, Photos, photos
from training.run.fault import apart, kind_of, reason_of, together
from training.run.run import RunStore
from training.run.source import Beat, Kind, Orders, Outcome, Source, Task
from training.sampling.samples import Worn, draw_samples
from training.storage.interface import Storage
from training.storage.registry import Registry
from training.trainer.checkpoint import SubjectState, dump_state, load_state
from training.trainer.fitting import open_pack
from training.trainer.latents import LatentSet, encode_photos, load_latents, photo_prompts, photos_key, save_latents
from training.trainer.loop import Ended, Progress, train
from training.trainer.member import Report, Subject
from training.trainer.prior import prepare_prior
from training.trainer.worker.early_stop import Watch
from training.trainer.worker.events import NAME as EVENTS, event_file
from training.trainer.worker.judging import Finished, Judging, gate_failure, hold_out
from training.trainer.worker.publish import Publication, png_bytes, publish_subject

BEAT_SECONDS = 1.0
CHANGED = "its files have changed since the run looked at them; the same command again trains it on them as they are"


@dataclass
class _Held:
    """A leased subject while it is here."""

    task: Task
    spec: SubjectSpec
    since: float
    found: Photos | None = None
    held_out: tuple[Photo, ...] = ()
    saved_step: int = -1
    rates: dict[int, float] = field(default_factory=dict)
    samples: dict[int, list[Image.Image]] = field(default_factory=dict)


class Worker:
    """One device's worth of work. `work` is the way in."""

    def __init__(
        self, base: Base, plan: PackPlan, source: Source, run: RunStore, *, tenant: str, root: str = "."
    ) -> None:
        self.base = base
        self.source = source
        self.run = run
        self.tenant = tenant
        self.root = root
        self.registry = Registry(run.storage)
        self.judging = Judging(base, run)
        self._watch = Watch(base)
        self._held: dict[str, _Held] = {}
        self._beat = Beat()
        self._opened = open_pack(base, plan)
        self.pack = self._opened.pack
        self._beat.notes += self._opened.notes
        self._beaten = 0.0
        self._stop = False
        self._rate: list[tuple[float, int]] = []

    @property
    def storage(self) -> Storage:
        return self.run.storage

    def work(self) -> None:
        """Until the source has nothing more, or says stop."""
        try:
            for progress in train(self.pack, self._feed, limit=self._opened.limit):
                self._follow(progress)
                if self._stop:
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
        while len(ready) < count and not self._stop:
            tasks = self.source.lease(count - len(ready))
            if not tasks:
                break
            for task in tasks:
                self._held[task.spec.id] = _Held(task, task.trained, time.time())
            ids = [task.spec.id for task in tasks]
            ready += apart(ids, self._prepare, partial(self._fail, "it could not be prepared")).values()
        return ready

    def _prepare(self, id: str) -> Subject:
        """Photos, latents, prior and the latest checkpoint of a subject."""
        task, spec = self._held[id].task, self._held[id].spec
        if task.may_spread:
            self._opened.check(spec)
        self.judging.check(spec)
        self._say(spec.id, "reading photos")
        resolution = spec.train.resolution or self.base.facts.resolution
        files = read_files(spec, self.storage, self.root)
        if fingerprint(task.spec, self.base.hash, files, self.root) != task.fingerprint:
            raise UserError(CHANGED)
        found = photos(
            files,
            resolution=resolution,
            min_photos=spec.min_images,
            crop=spec.train.cropping,
            backgrounds=spec.train.backgrounds,
        )
        self._beat.notes += [f"{spec.id}: {refusal}" for refusal in found.refusals]
        found, held_out = hold_out(spec, found)
        check_words(spec, found.good)
        self._held[id].found, self._held[id].held_out = found, held_out
        instance = self._latents(spec, found)
        self._watch.join(spec, instance)
        prior = self._prior(spec, found) if spec.prior.enabled and spec.prior.source != "prediction" else None
        state = self._resume(spec)
        self._held[id].saved_step = state.step if state else -1
        return Subject(spec, instance, prior, state)

    def _latents(self, spec: SubjectSpec, found: Photos) -> LatentSet:
        key = photos_key(self.base, found.good, spec.train)
        cached = load_latents(self.storage, key)
        if cached is None:
            self._say(spec.id, "encoding photos")
            made = encode_photos(self.base, found.good, spec.train, spec.filled_instance_prompt)
            save_latents(self.storage, key, made.images)
            return made
        return LatentSet(cached, photo_prompts(found.good, spec.train, spec.filled_instance_prompt, len(cached)))

    def _prior(self, spec: SubjectSpec, found: Photos) -> LatentSet:
        captions = [photo.caption for photo in found.good if photo.caption]
        for done, wanted, prior in prepare_prior(self.base, self.storage, spec, self.root, captions):
            self._say(spec.id, f"class images {done}/{wanted}")
            if prior is not None:
                return prior
        raise AssertionError("prepare_prior ends with a set")

    def _resume(self, spec: SubjectSpec) -> SubjectState | None:
        """The latest whole checkpoint; a torn one is passed over."""
        for step, data in self.run.load_checkpoints(spec.id):
            try:
                return load_state(data)
            except UserError as error:
                self._beat.notes.append(f"{spec.id}: checkpoint of step {step} is passed over: {error}")
        return None

    # -- on --

    def _follow(self, progress: Progress) -> None:
        """What one fused step means for storage, registry and source."""
        for id in progress.joined:
            self._say(id, "training")
        self._sample(progress.reports)
        for report in progress.reports:
            self._note(report)
        self._finish(progress.ended)
        self._stop_early(progress)
        self._beat.notes += progress.notes
        self._measure(progress)
        orders = self._send()
        for id in orders.cancel & set(self._held):
            if id in self.pack.ids:
                self.pack.leave(id)
            self._end(id, "cancelled", "cancelled by the user")
        self._stop = self._stop or orders.stop

    def _note(self, report: Report) -> None:
        held = self._held[report.id]
        self._beat.steps[report.id], self._beat.losses[report.id] = report.step, report.loss
        if report.failure is not None:
            return
        held.rates[report.step] = self._beat.images_per_second
        every = held.spec.train.checkpoint_every
        if report.step % every == 0 or report.step in _kept_steps(held.spec):
            # the one before is whole; the next may succeed
            apart([report.id], self._checkpoint, partial(self._miss, f"no checkpoint of step {report.step}"))

    def _stop_early(self, progress: Progress) -> None:
        """Ends the subjects whose learning has settled, where they asked for it."""
        gone = {ended.id for ended in progress.ended}
        due = [r.id for r in progress.reports if r.id not in gone and self._watch.is_due(r.id, r.step)]
        looked = together(due, self._look, partial(self._miss, "its loss could not be looked at"))
        settled = [id for id, has_settled in looked.items() if has_settled]
        for id in settled:
            self._beat.notes.append(f"{id}: stopped at step {self._beat.steps[id]}: its loss no longer changes")
        apart(settled, self._checkpoint, partial(self._miss, "no checkpoint of its last step"))
        self._finish([Ended(id) for id in settled])
        for id in settled:
            self.pack.leave(id)

    def _look(self, ids: Sequence[str]) -> dict[str, bool]:
        settled = self._watch.settled(self.pack.bank, {id: self.pack.slot(id) for id in ids})
        return {id: id in settled for id in ids}

    def _sample(self, reports: Sequence[Report]) -> None:
        """Sample pictures of subjects that are still training, kept with the run."""
        due = {}
        for report in reports:
            every = self._held[report.id].spec.train.sample_every
            if report.failure is None and every and report.step % every == 0:
                due[report.id] = report.step
        drawn = self._draw(list(due))

        def keep(id: str) -> None:
            self._held[id].samples[due[id]] = drawn[id]
            for index, image in enumerate(drawn[id]):
                self.storage.put(self.run.subject_key(id, "samples", f"{due[id]:08d}-{index}.png"), png_bytes(image))

        apart(list(drawn), keep, partial(self._miss, "its samples could not be kept"))

    def _draw(self, ids: Sequence[str]) -> dict[str, list[Image.Image]]:
        """Sample pictures of subjects as they are in their slots, drawn together; without those that fail."""

        def draw(ids: Sequence[str]) -> dict[str, list[Image.Image]]:
            worn = [Worn(self._held[id].spec, *self.pack.slot(id)) for id in ids]
            return dict(zip(ids, draw_samples(self.base, self.pack.bank, worn), strict=True))

        return together(ids, draw, partial(self._miss, "no sample pictures"))

    def _checkpoint(self, id: str) -> None:
        state = self.pack.state(id)
        held = self._held[id]
        if state.step > max(held.saved_step, 0):
            spec = held.spec
            kept = _kept_steps(spec)
            self.run.save_checkpoint(id, state.step, dump_state(state), spec.train.keep_checkpoints, kept)
            events = event_file(state.history, held.rates, held.samples)
            self.storage.put(self.run.subject_key(id, "events", EVENTS), events)
            held.saved_step = state.step

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
        evaluations = together(done, self._judge, partial(self._fail, "it could not be judged"))
        chosen = apart(
            list(evaluations),
            lambda id: self._choose(id, evaluations[id]),
            partial(self._fail, "it could not be published"),
        )
        pictures = self._draw(list(chosen))
        versions = apart(
            list(chosen),
            lambda id: self._publish(id, evaluations[id], pictures.get(id, [])),
            partial(self._fail, "it could not be published"),  # its last checkpoint is whole
        )
        for id, version in versions.items():
            self._end(id, "done", version=version)

    def _judge(self, ids: Sequence[str]) -> dict[str, Evaluation | None]:
        finished = []
        for id in ids:
            held, state = self._held[id], self.pack.state(id)
            assert held.found is not None
            finished.append(Finished(held.spec, state.step, state.adapter, held.found, held.held_out))

        def alive(_drawn: int, _wanted: int) -> None:
            self._beat.phase.update(dict.fromkeys(ids, "evaluating"))
            self._say(ids[0], "evaluating")

        found = self.judging.judge(finished, alive)
        return {id: found.get(id) for id in ids}

    def _choose(self, id: str, evaluation: Evaluation | None) -> None:
        """Puts the chosen step into the subject's slot. Raises SubjectFailed if it may not be published."""
        failed = gate_failure(self._held[id].spec, evaluation)
        if failed is not None:
            raise SubjectFailed(failed)
        slot, _ = self.pack.slot(id)
        if evaluation is not None and evaluation.choice.step != self.pack.state(id).step:
            # the slot is free after this anyway; what is published is what is worn
            adapter = self.judging.checkpoint(self._held[id].spec, evaluation.choice.step)
            self.pack.bank.put(slot, self.pack.bank.pack(adapter))

    def _publish(self, id: str, evaluation: Evaluation | None, pictures: Sequence[Image.Image]) -> str:
        held = self._held[id]
        self._say(id, "publishing")
        assert held.found is not None
        publication = Publication(
            spec=held.spec,
            fingerprint=held.task.fingerprint,
            state=self.pack.state(id),
            adapter=self.pack.adapter(id),
            photos=held.found,
            run=self.run.run,
            tenant=self.tenant,
            rates=held.rates,
            samples=held.samples,
            evaluation=evaluation,
            pictures=pictures,
        )
        return publish_subject(self.registry, self.base, publication)

    def _fail(self, what: str, id: str, error: Exception) -> None:
        """A subject that cannot go on: its result. An expected error says it all; of others `what` says where."""
        kind = kind_of(error)
        self._end(id, kind, f"{what}: {reason_of(error)}" if kind == "unknown" else reason_of(error))

    def _miss(self, what: str, id: str, error: Exception) -> None:
        """Something that a subject goes on without."""
        self._beat.notes.append(f"{id}: {what}: {reason_of(error)}")

    def _end(self, id: str, kind: Kind, reason: str | None = None, version: str | None = None) -> None:
        held = self._held.pop(id)
        self._watch.leave(id)
        found = held.found
        warned = (f"{', '.join(w.names)}: {w.message}" for w in found.warnings) if found else ()
        warnings = (*(found.refusals if found else ()), *warned)
        outcome = Outcome(
            id=id,
            kind=kind,
            reason=reason,
            version=version,
            step=self._beat.steps.get(id, max(held.saved_step, 0)),
            loss=self._beat.losses.get(id),
            seconds=time.time() - held.since,
            warnings=warnings,
        )
        for about in (self._beat.phase, self._beat.steps, self._beat.losses):
            about.pop(id, None)
        self.source.ended(outcome)

    # -- signs of life --

    def _say(self, id: str, phase: str) -> None:
        """A change of phase is sent at once if the last beat is old enough; long preparation keeps the lease alive."""
        self._beat.phase[id] = phase
        orders = self._send()
        self._stop = self._stop or orders.stop

    def _send(self) -> Orders:
        if time.monotonic() - self._beaten < BEAT_SECONDS:
            return Orders()
        self._beaten = time.monotonic()
        orders = self.source.beat(self._beat)
        self._beat.notes.clear()
        return orders

    def _measure(self, progress: Progress) -> None:
        """Images a second over the last steps."""
        self._rate = [*self._rate[-19:], (progress.seconds, progress.rows)]
        seconds = sum(seconds for seconds, _ in self._rate)
        self._beat.images_per_second = sum(rows for _, rows in self._rate) / seconds if seconds else 0.0


def _kept_steps(spec: SubjectSpec) -> frozenset[int]:
    """Steps whose checkpoints are made and kept whatever the settings say: the last, and those that are compared."""
    compared = candidate_steps(spec.train.max_steps, spec.evaluate.candidates) if spec.evaluate.enabled else ()
    return frozenset({*compared, spec.train.max_steps})


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

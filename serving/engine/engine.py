"""The engine: one base, a bank of adapters, and any number of requests that join and leave at every step.

`step()` ends jobs that are over, brings adapters into slots, encodes prompts, takes one denoising step of one batch and
decodes some of what is finished. It returns what happened as `JobEvent`s. An error in a batch is bisected, so that only
the request that causes it fails. Single-threaded; knows nothing about HTTP, events or encodings.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event

import torch
from torch import Tensor

from serving.config import EngineSpec
from serving.engine.admission import make_job
from serving.engine.finishing import Finisher
from serving.engine.job import Done, EngineStats, Guess, Job, JobEvent, JobFailed, Recovered, Sample
from serving.engine.pictures.decoding import Given
from serving.engine.pictures.edit import Edit
from serving.engine.pictures.hints import NO_HINTS, Hints
from serving.engine.pictures.vae import TiledVae
from serving.engine.prompts import PromptCache
from serving.engine.request import AdapterRef, GenerateRequest
from serving.engine.scheduler import Scheduler
from serving.engine.starting import Starter
from serving.engine.stepping import Stepper
from serving.engine.tiers.adapters import Adapters, Fetch
from serving.engine.tiers.bringing import Bringer
from serving.engine.tiers.networks import Networks, OpenNetwork
from serving.engine.upscaling import Upscaler
from serving.errors import DeadlineExceeded, GenerationFailed, QueueFull, Refused, Withheld
from serving.marking.evidence import find_reader
from serving.marking.noise import NoiseMark
from serving.marking.pixels import PixelMark
from training.base.base import Base
from training.errors import UserError


class Engine:
    """`fetch(ref)` reads an adapter; it is called on loader threads. `woken` is set when a load has ended.

    `mark` puts its message into the first noise of every picture; without it, noise is what the seed alone gives.
    `pixel_mark` is put into finished pictures by whoever encodes them. `open_network` gives folders of ControlNets and
    IP-Adapters.
    """

    def __init__(
        self,
        base: Base,
        spec: EngineSpec,
        fetch: Fetch,
        mark: NoiseMark | None = None,
        pixel_mark: PixelMark | None = None,
        open_network: OpenNetwork | None = None,
    ) -> None:
        self.base = base
        self.mark = mark
        self.pixel_mark = pixel_mark
        self.reader = find_reader(base.folder, base.facts.channels)
        self.spec = spec
        self.stats = EngineStats()
        self.woken = Event()
        self.adapters = Adapters(base, spec, fetch, self.woken)
        self.networks = Networks(base, spec, open_network, self.woken)
        self.bringer = Bringer(self.adapters, self.networks)
        # no forward and no decoding has more cells than a full one at the base's own size, but for a single larger row
        row_cells = base.facts.latent_side**2
        self.scheduler = Scheduler[Sample](spec.max_rows, spec.queue, spec.max_rows * row_cells)
        self.jobs: dict[Job, None] = {}
        self.prompts = PromptCache(
            base,
            self.adapters.bank,
            empty=self.adapters.empty,
            capacity=spec.prompt_cache,
            longest=spec.prompt_tokens,
        )
        vae = TiledVae(base, spec.vae_tile_px)
        self.starter = Starter(base, self.adapters, self.networks, self.prompts, mark, vae)
        self.upscaler = Upscaler(base, vae, self.starter)
        self.stepper = Stepper(base, spec, self.adapters, self.scheduler, self.stats)
        self.finisher = Finisher(base, spec.decode_rows * row_cells, vae)
        self._outcomes: list[JobEvent] = []
        self._withheld: frozenset[str] = frozenset()
        self._image_s = 0.0  # between two images, smoothed
        self._last_image_s = 0.0

    def close(self) -> None:
        """Stops the loaders and takes the bank off the base, which is as it was before."""
        self.adapters.close()
        self.networks.close()

    # -- requests in and out --

    def submit(
        self,
        request: GenerateRequest,
        pixels_CHW: Tensor | None = None,
        *,
        edit: Edit | None = None,
        references: Sequence[Tensor] = (),
        hints: Hints = NO_HINTS,
    ) -> Job:
        """Queues a request and returns its job; its adapters begin to load at once.

        `pixels_CHW`: the picture that image-to-image starts from, uint8, of the request's size. `edit`: the one that is
        edited, with its mask. `references`: those that the prompt refers to, uint8. `hints`: of its
        ControlNets and IP-Adapters.

        Raises QueueFull, or UserError for what this engine cannot do.
        """
        if len({use.ref for use in request.adapters}) > self.spec.slots:
            raise Refused(f"A request may mix up to {self.spec.slots} adapters here, not {len(request.adapters)}.")
        for use in request.adapters:
            if f"{use.ref.tenant}/{use.ref.id}" in self._withheld:
                raise Withheld(f"Adapter '{use.ref.tenant}/{use.ref.id}' is withdrawn.")
        given = Given(pixels_CHW, edit, tuple(references))
        job = make_job(self.base, request, given, self.scheduler.max_cells, reads=self.mark is not None)
        job.hints = hints
        self.bringer.check(job)
        try:
            self.scheduler.submit(job.samples, self._retry_after_s())
        except QueueFull:
            self.stats.refused += 1
            raise
        self.jobs[job] = None
        self.stats.requests += 1
        self.bringer.want(job)
        return job

    def cancel(self, job: Job) -> None:
        """Stops working on a request; its rows are free at the next step."""
        if job in self.jobs:
            self.stats.cancelled += 1
            self._end(job)

    def forget(self, ref: AdapterRef) -> None:
        """Drops a version that is deleted or replaced; while requests use it, it stays."""
        self.adapters.forget(ref)

    def withhold(self, names: frozenset[str]) -> None:
        """From now on nothing wears the adapters `tenant/id`: requests that do end with Withheld, at once."""
        self._withheld = names
        for job in list(self.jobs):
            worn = next((key for key in job.keys if f"{key.tenant}/{key.id}" in names), None)
            if worn is not None:
                self._fail(job, Withheld(f"Adapter '{worn.tenant}/{worn.id}' was withdrawn meanwhile."))
        for key in {*self.adapters.slots.loaded(), *self.adapters.host.keys()}:
            if f"{key.tenant}/{key.id}" in names:
                self.adapters.forget(key)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing until a load ends, a request comes or a deadline passes."""
        if self.finisher or self.scheduler.running:
            return False
        return not any(sample.ready for job in self.jobs for sample in job.samples)

    def snapshot(self) -> EngineStats:
        """A copy of the counters, with the gauges of this moment."""
        slots, host = self.adapters.slots, self.adapters.host
        gauges = {
            "waiting": self.scheduler.waiting,
            "running_rows": self.scheduler.running_rows,
            "max_rows": self.spec.max_rows,
            "slots": slots.count,
            "slots_loaded": len(slots),
            "slots_pinned": slots.pinned,
            "slots_bytes": self.adapters.bank.weights_SP.nbytes,
            "host_adapters": len(host),
            "host_bytes": host.bytes,
        }
        adapters = {
            "slot_hits": slots.hits,
            "slot_loads": slots.loads,
            "slot_evictions": slots.evictions,
            "host_hits": host.hits,
            "host_loads": host.loads,
            "host_evictions": host.evictions,
            "host_failures": host.failures,
            "prompt_hits": self.prompts.hits,
            "prompt_misses": self.prompts.misses,
        }
        seconds = {**self.stats.seconds, "swap": self.adapters.swap_seconds}
        return replace(self.stats, gauges=gauges, adapters=adapters, seconds=seconds)

    # -- one step --

    @torch.inference_mode()
    def step(self) -> list[JobEvent]:
        """One step; returns what happened to jobs in it. A job's own error is a JobFailed, never raised."""
        self._sweep()
        self.scheduler.admit(self._start)
        self._begin()
        batch = self.scheduler.batch()
        self._guarded(batch, self.stepper.step)
        for sample in batch:
            self._guarded([sample], self._stepped)
        self._guarded(self.finisher.take(self.scheduler.service), self._decode)
        self.check_integrity()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def check_integrity(self) -> None:
        """Raises AssertionError with the numbers if the books of slots, pins and rows do not add up."""
        self.adapters.slots.check_integrity()
        self.scheduler.check_integrity()
        worn = {key for sample in self.scheduler.running for key in sample.job.keys}
        pinned = self.adapters.slots.pinned
        assert len(worn) == pinned, f"{len(worn)} adapters are worn, but {pinned} slots are pinned"
        used = {key for sample in self.scheduler.running for key in sample.job.networks}
        pinned = self.networks.slots.pinned
        assert len(used) == pinned, f"{len(used)} networks are used, but {pinned} are pinned"

    def _sweep(self) -> None:
        """Fails jobs that are past their deadline or whose adapters could not be loaded."""
        now = time.monotonic()
        for job in list(self.jobs):
            if now > job.deadline_s:
                self._fail(job, DeadlineExceeded(f"The images were not done within {job.request.deadline_s:g} s."))
                continue
            if (failed := self.bringer.failed(job)) is not None:
                self._fail(job, failed)

    def _start(self, sample: Sample) -> bool:
        """Takes what a sample needs on the device; False if it has to wait for a load or for room."""
        job = sample.job
        if not self.bringer.take(sample):
            return False
        if job.started_s is None:
            job.started_s = time.monotonic()
            self.stats.queue_seconds += job.started_s - job.arrived_s
        return True

    def _begin(self) -> None:
        """Prompts, pictures and first latents of the samples that have just started."""
        fresh = [sample for sample in self.scheduler.running if sample.generator is None]
        self._guarded([sample for sample in fresh if sample.job.conds is None], self._encode)
        for sample in fresh:
            self._guarded([sample], self.starter.steer)
            self._guarded([sample], self.starter.first_latents)

    def _encode(self, samples: Sequence[Sample]) -> None:
        with self.stats.timed("text"):
            self.starter.encode_prompts(samples)

    def _stepped(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if sample.step >= sample.schedule.steps and sample.job.second is not None and not sample.enlarged:
                self.stepper.forget(sample.kind)
                with self.stats.timed("decode"):
                    self.upscaler.enlarge(sample)
            elif sample.step >= sample.schedule.steps:
                self._leave(sample)
                if sample.job.request.reading:
                    self._recovered(sample)
                else:
                    self.finisher.add(sample)
            elif sample.preview_due:
                pixels = self.finisher.preview(sample)
                self._outcomes.append(Guess(sample.job, sample.index, sample.previews, sample.taken, pixels))
                sample.previews += 1

    def _recovered(self, sample: Sample) -> None:
        assert sample.job.image is not None
        self._outcomes.append(Recovered(sample.job, sample.index, sample.at.cpu(), sample.job.image[0]))
        self._one_less(sample)

    def _one_less(self, sample: Sample) -> None:
        """A sample's outcome is told; with the last one its job ends."""
        sample.job.samples.remove(sample)
        if not sample.job.samples:
            self._end(sample.job)

    def _decode(self, samples: Sequence[Sample]) -> None:
        with self.stats.timed("decode"):
            pictures = self.finisher.decode(samples)
        for sample, pixels in zip(samples, pictures, strict=True):
            job = sample.job
            if pixels is None:
                self._fail(job, GenerationFailed("The image came out as not-a-number; lower the adapters' weights."))
            elif not job.over:
                self._outcomes.append(Done(job, sample.index, sample.seed, pixels))
                self._image_done()
                self._one_less(sample)

    # -- ends --

    def _guarded(self, samples: Sequence[Sample], work: Callable[[Sequence[Sample]], None]) -> None:
        """Does `work` on the samples; if it raises, on each half, so that only the job that causes the error fails."""
        samples = [sample for sample in samples if not sample.job.over]
        if not samples:
            return
        try:
            work(samples)
        except Exception as error:
            if len(samples) > 1:
                self.stats.bisections += 1
                self._guarded(samples[: len(samples) // 2], work)
                self._guarded(samples[len(samples) // 2 :], work)
                return
            if not isinstance(error, UserError):
                failed = GenerationFailed(f"Generating failed: {type(error).__name__}: {error}")
                failed.__cause__ = error
                error = failed
            self._fail(samples[0].job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.over:
            self.stats.failed += 1
            self._outcomes.append(JobFailed(job, error))
            self._end(job)

    def _end(self, job: Job) -> None:
        job.over = True
        del self.jobs[job]
        for sample in job.samples:
            self._leave(sample)
            self.finisher.drop(sample)
        self.bringer.settle(job)

    def _leave(self, sample: Sample) -> None:
        """Takes a sample out of the scheduler and releases its adapters."""
        if self.scheduler.remove(sample):
            self.bringer.release(sample.job)
        self.stepper.forget(sample.kind)

    def _image_done(self) -> None:
        now = time.monotonic()
        if self.stats.images:
            self._image_s += 0.2 * (min(now - self._last_image_s, 60.0) - self._image_s)
        self._last_image_s = now
        self.stats.images += 1

    def _retry_after_s(self) -> float:
        """Seconds until about half of the images that wait have started; 1 to 60."""
        return min(60.0, max(1.0, 0.5 * self.scheduler.waiting * self._image_s))

"""The engine: one base, a bank of adapters, and any number of requests that join and leave at every step.

`step()` ends jobs that are over, brings adapters into slots, encodes prompts, takes one denoising step of one batch and
decodes some of what is finished. It returns what happened as `JobEvent`s. An error in a batch is bisected, so that only
the request that causes it fails. Single-threaded; knows nothing about HTTP, events or encodings.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Event

import torch
from torch import Tensor

from serving.config import EngineSpec
from serving.engine.forward import Forward
from serving.engine.job import Done, EngineStats, Guess, Job, JobEvent, JobFailed, Recovered, Sample
from serving.engine.pictures.preview import PreviewMap, fit_preview
from serving.engine.prompts import PromptCache, Text
from serving.engine.reading import backwards
from serving.engine.request import AdapterRef, GenerateRequest
from serving.engine.samplers import ScheduleLines
from serving.engine.scheduler import Scheduler
from serving.engine.tiers.adapters import Adapters, Fetch, explain_load
from serving.errors import DeadlineExceeded, GenerationFailed, QueueFull, Refused, Withheld
from serving.marking.evidence import find_reader
from serving.marking.noise import NoiseMark
from serving.marking.pixels import PixelMark
from training.base.base import Base
from training.errors import UserError


class Engine:
    """`fetch(ref)` reads an adapter; it is called on loader threads. `woken` is set when a load has ended.

    `mark` puts its message into the first noise of every picture; without it, noise is what the seed alone gives.
    `pixel_mark` is put into finished pictures by whoever encodes them.
    """

    def __init__(
        self,
        base: Base,
        spec: EngineSpec,
        fetch: Fetch,
        mark: NoiseMark | None = None,
        pixel_mark: PixelMark | None = None,
    ) -> None:
        self.base = base
        self.mark = mark
        self.pixel_mark = pixel_mark
        self.reader = find_reader(base.folder, base.facts.channels)
        self.spec = spec
        self.stats = EngineStats()
        self.woken = Event()
        self.adapters = Adapters(base, spec, fetch, self.woken)
        # no forward and no decoding has more cells than a full one at the base's own size, but for a single larger row
        self._row_cells = base.facts.latent_side**2
        self.scheduler = Scheduler[Sample](spec.max_rows, spec.queue, spec.max_rows * self._row_cells)
        self.jobs: dict[Job, None] = {}
        self._prompts = PromptCache(
            base,
            self.adapters.bank,
            empty=self.adapters.empty,
            capacity=spec.prompt_cache,
            longest=spec.prompt_tokens,
        )
        self._forwards: dict[tuple[Hashable, ...], Forward] = {}
        self._finished: deque[Sample] = deque()
        self._outcomes: list[JobEvent] = []
        self._withheld: frozenset[str] = frozenset()
        self._preview: PreviewMap | None = None
        self._image_s = 0.0  # between two images, smoothed
        self._last_image_s = 0.0

    def close(self) -> None:
        """Stops the loaders and takes the bank off the base, which is as it was before."""
        self.adapters.close()

    # -- requests in and out --

    def submit(self, request: GenerateRequest, pixels_CHW: Tensor | None = None) -> Job:
        """Queues a request and returns its job; its adapters begin to load at once.

        `pixels_CHW`: the picture that image-to-image starts from, uint8, of the request's size.

        Raises QueueFull, or UserError for what this engine cannot do.
        """
        if len({use.ref for use in request.adapters}) > self.spec.slots:
            raise Refused(f"A request may mix up to {self.spec.slots} adapters here, not {len(request.adapters)}.")
        for use in request.adapters:
            if f"{use.ref.tenant}/{use.ref.id}" in self._withheld:
                raise Withheld(f"Adapter '{use.ref.tenant}/{use.ref.id}' is withdrawn.")
        strength = None if pixels_CHW is None else request.strength
        size = self.base.latent_size(request.height, request.width)
        if request.reading:
            if self.mark is None or pixels_CHW is None:
                raise Refused("Nothing can be read: this server marks no pictures (`watermark: none`).")
            schedule = backwards(self.base.process, request.steps, size)
        else:
            schedule = self.base.process.schedule(request.scheduler, request.steps, strength, size)
        takes_negative = self.base.facts.guidance == "cfg"
        job = Job(request, schedule, pixels_CHW, arrived_s=time.monotonic(), takes_negative=takes_negative)
        wide = job.guided and 2 * size[0] * size[1] > self.scheduler.max_cells
        job.samples = [Sample(job, index, size, wide) for index in range(request.count)]
        try:
            self.scheduler.submit(job.samples, self._retry_after_s())
        except QueueFull:
            self.stats.refused += 1
            raise
        self.jobs[job] = None
        self.stats.requests += 1
        self.adapters.want(job.keys, job.loads)
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
        if self._finished or self.scheduler.running:
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
            "prompt_hits": self._prompts.hits,
            "prompt_misses": self._prompts.misses,
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
        self._guarded(batch, self._denoise)
        for sample in batch:
            self._guarded([sample], self._stepped)
        self._decode()
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

    def _sweep(self) -> None:
        """Fails jobs that are past their deadline or whose adapters could not be loaded."""
        now = time.monotonic()
        for job in list(self.jobs):
            if now > job.deadline_s:
                self._fail(job, DeadlineExceeded(f"The images were not done within {job.request.deadline_s:g} s."))
                continue
            for ref, load in list(job.loads.items()):
                if load.done() and (error := load.exception()) is not None:
                    self._fail(job, explain_load(ref, error))
                    break

    def _start(self, sample: Sample) -> bool:
        """Takes slots for a sample's adapters; False if it has to wait for a load or a slot."""
        job = sample.job
        # asked again: an adapter that was in a slot when the request came may have been evicted while it waited
        self.adapters.want(job.keys, job.loads)
        if not sample.ready or any(load.exception() for load in job.loads.values()):
            return False
        sample.slots = self.adapters.acquire(job.keys, job.loads)
        if sample.slots is None:
            return False
        if job.started_s is None:
            job.started_s = time.monotonic()
            self.stats.queue_seconds += job.started_s - job.arrived_s
        if all(other.slots is not None for other in job.samples):
            self.adapters.settle(job.loads)
        return True

    def _begin(self) -> None:
        """Prompts, pictures and first latents of the samples that have just started."""
        fresh = [sample for sample in self.scheduler.running if sample.generator is None]
        self._guarded([sample for sample in fresh if sample.job.conds is None], self._encode_prompts)
        for sample in fresh:
            self._guarded([sample], self._first_latents)

    def _encode_prompts(self, samples: Sequence[Sample]) -> None:
        wearing = {sample.job: sample for sample in samples}
        with self._timed("text"):
            conds = self._prompts.encode([self._texts(job, sample) for job, sample in wearing.items()])
        for job, (prompt, *negative) in zip(wearing, conds, strict=True):
            job.conds = prompt, negative[0] if job.guided else None
            job.together = self.base.family.together(job.samples[0].size, prompt)

    def _texts(self, job: Job, sample: Sample) -> list[Text]:
        """The prompt and, with guidance, the negative prompt, under those adapters of a job that change the text."""
        worn = [
            (key, weight, slot)
            for key, weight, slot in zip(job.keys, job.weights, sample.slots or (), strict=True)
            if self.adapters.changes_text(key)
        ]
        mix = tuple((key, weight) for key, weight, _ in worn)
        slots = tuple(slot for _, _, slot in worn)
        prompts = [job.request.prompt, job.request.negative_prompt] if job.guided else [job.request.prompt]
        return [Text(prompt, mix, slots) for prompt in prompts]

    def _first_latents(self, samples: Sequence[Sample]) -> None:
        channels = self.base.facts.channels
        for sample in samples:
            job = sample.job
            sample.generator = torch.Generator().manual_seed(sample.seed)
            latents = torch.zeros(channels, *sample.size)
            if job.pixels_CHW is not None:
                if job.image is None:
                    pixels_NCHW = job.pixels_CHW[None].float() / 127.5 - 1
                    mean_NCHW, std_NCHW = self.base.to_latents(pixels_NCHW)
                    job.image = mean_NCHW[0].float(), std_NCHW[0].float()
                spread = 0.0 if job.request.reading else sample.draw(channels)
                latents = (job.image[0] + job.image[1] * spread) * job.schedule.signal
            if not job.request.reading:
                latents = latents + self._first_noise(sample) * job.schedule.noise
            sample.latents = latents.to(self.base.device)
            sample.clean = torch.zeros_like(sample.latents)

    def _first_noise(self, sample: Sample) -> Tensor:
        noise = sample.draw(self.base.facts.channels)
        return noise if self.mark is None else self.mark.put(noise, self.mark.serial(sample.tenant, sample.seed))

    def _denoise(self, batch: Sequence[Sample]) -> None:
        """One forward of the batch, and its step; if it raises, no sample has changed."""
        forward = self._forward(batch)
        order = forward.order
        began = time.perf_counter()
        with self._timed("denoise"):
            lines = ScheduleLines.gather([s.job.schedule for s in order], [s.step for s in order], self.base.device)
            latents_NCHW = torch.stack([_tensor(sample.latents) for sample in order])
            output_NCHW = forward(self.base, self.adapters.bank, latents_NCHW, lines)
            first = order[0]  # if it is wide, it is alone
            if first.wide and first.plain is None:
                first.plain = output_NCHW[0]
            else:
                self._advance(order, lines, latents_NCHW, output_NCHW)
            if self.base.device.type == "cuda":  # waits for the device: else many steps would be queued on it
                torch.cuda.synchronize(self.base.device)
        rows = sum(sample.rows for sample in order)
        self.scheduler.pace.saw(batch[0].kind, rows, time.perf_counter() - began)
        self.stats.steps += 1
        self.stats.rows += forward.rows

    def _advance(
        self, order: Sequence[Sample], lines: ScheduleLines, latents_NCHW: Tensor, output_NCHW: Tensor
    ) -> None:
        """Takes the samples' steps by their predictions; those of a wide one are guided here."""
        plain_CHW = order[0].plain
        if plain_CHW is not None:
            output_NCHW = plain_CHW + order[0].job.request.guidance_scale * (output_NCHW - plain_CHW)
        before_NCHW = torch.stack([_tensor(sample.clean) for sample in order])
        latents_NCHW, clean_NCHW = lines.step(latents_NCHW, output_NCHW, before_NCHW, self._fresh_noise(order))
        for sample, latents, clean in zip(order, latents_NCHW, clean_NCHW, strict=True):
            sample.latents, sample.clean, sample.plain = latents, clean, None
            sample.step += 1

    def _forward(self, batch: Sequence[Sample]) -> Forward:
        """The forward of these samples: the last one of their kind, if it is of the same samples and bank's layers."""
        kind, layout = batch[0].kind, self.adapters.bank.layout
        forward = self._forwards.get(kind)
        same = forward is not None and forward.layout is layout and set(forward.order) == set(batch)
        if forward is None or not same or batch[0].wide:  # a wide image's forwards alternate between its prompts
            fixed_rows = self.scheduler.step_rows(batch[0].cells) if self.spec.fixed_rows else None
            forward = Forward.make(
                batch, self.adapters.bank, self.base, empty=self.adapters.empty, fixed_rows=fixed_rows
            )
            self._forwards[kind] = forward
        return forward

    def _fresh_noise(self, samples: Sequence[Sample]) -> Tensor | None:
        """What ancestral samplers add, [N, C, h, w]; zero for rows of the others, None if nobody draws."""
        if not any(sample.job.schedule.draws for sample in samples):
            return None
        channels = self.base.facts.channels
        blank = torch.zeros(channels, *samples[0].size)
        noise = [sample.draw(channels) if sample.job.schedule.draws else blank for sample in samples]
        return torch.stack(noise).to(self.base.device)

    def _stepped(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if sample.step >= sample.job.schedule.steps:
                self._leave(sample)
                if sample.job.request.reading:
                    self._recovered(sample)
                else:
                    self._finished.append(sample)
            elif sample.preview_due:
                if self._preview is None:
                    self._preview = fit_preview(self.base)
                pixels = self._preview(_tensor(sample.clean))
                self._outcomes.append(Guess(sample.job, sample.index, sample.previews, sample.step, pixels))
                sample.previews += 1

    def _recovered(self, sample: Sample) -> None:
        assert sample.job.image is not None
        self._outcomes.append(Recovered(sample.job, sample.index, _tensor(sample.latents).cpu(), sample.job.image[0]))
        self._one_less(sample)

    def _one_less(self, sample: Sample) -> None:
        """A sample's outcome is told; with the last one its job ends."""
        sample.job.samples.remove(sample)
        if not sample.job.samples:
            self._end(sample.job)

    def _decode(self) -> None:
        """Decodes up to `decode_rows` finished samples of one size, of the tenants served least; fewer large ones."""
        if not self._finished:
            return
        first, *others = sorted(self._finished, key=lambda sample: self.scheduler.service(sample.tenant))
        room = max(1, self.spec.decode_rows * self._row_cells // first.cells)
        ready = [first, *(sample for sample in others if sample.size == first.size)][:room]
        for sample in ready:
            self._finished.remove(sample)
        self._guarded(ready, self._decode_batch)

    def _decode_batch(self, samples: Sequence[Sample]) -> None:
        with self._timed("decode"):
            latents_NCHW = torch.stack([_tensor(sample.latents) for sample in samples])
            images_NCHW = self.base.to_pixels(latents_NCHW).float()
            finite = torch.isfinite(images_NCHW).flatten(1).all(dim=1).tolist()
            pixels_NCHW = ((images_NCHW / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        for sample, pixels_CHW, good in zip(samples, pixels_NCHW, finite, strict=True):
            job = sample.job
            if not good:
                self._fail(job, GenerationFailed("The image came out as not-a-number; lower the adapters' weights."))
            elif not job.over:
                self._outcomes.append(Done(job, sample.index, sample.seed, pixels_CHW.permute(1, 2, 0)))
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
            if sample in self._finished:
                self._finished.remove(sample)
        self.adapters.settle(job.loads)

    def _leave(self, sample: Sample) -> None:
        """Takes a sample out of the scheduler and releases its adapters."""
        if self.scheduler.remove(sample):
            self.adapters.release(sample.job.keys)
        self._forwards.pop(sample.kind, None)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stats.seconds[stage] += time.perf_counter() - began

    def _image_done(self) -> None:
        now = time.monotonic()
        if self.stats.images:
            self._image_s += 0.2 * (min(now - self._last_image_s, 60.0) - self._image_s)
        self._last_image_s = now
        self.stats.images += 1

    def _retry_after_s(self) -> float:
        """Seconds until about half of the images that wait have started; 1 to 60."""
        return min(60.0, max(1.0, 0.5 * self.scheduler.waiting * self._image_s))


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value

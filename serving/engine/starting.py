"""What a sample has before its first step: its prompts' embeddings, and the latents it starts from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.job import Job, Sample
from serving.engine.prompts import PromptCache, Text
from serving.engine.tiers.adapters import Adapters
from serving.marking.noise import NoiseMark
from training.base.base import Base


class Starter:
    """`mark` puts its message into the first noise of every picture; without it, noise is what the seed alone gives."""

    def __init__(self, base: Base, adapters: Adapters, prompts: PromptCache, mark: NoiseMark | None) -> None:
        self._base = base
        self._adapters = adapters
        self._prompts = prompts
        self._mark = mark

    def encode_prompts(self, samples: Sequence[Sample]) -> None:
        """The embeddings of the samples' jobs, all encoded together. Raises Refused for a prompt that is too long."""
        wearing = {sample.job: sample for sample in samples}
        conds = self._prompts.encode([self._texts(job, sample) for job, sample in wearing.items()])
        for job, (prompt, *negative) in zip(wearing, conds, strict=True):
            job.conds = prompt, negative[0] if job.guided else None
            job.together = self._base.family.together(job.samples[0].size, prompt)

    def _texts(self, job: Job, sample: Sample) -> list[Text]:
        """The prompt and, with guidance, the negative prompt, under those adapters of a job that change the text."""
        worn = [
            (key, weight, slot)
            for key, weight, slot in zip(job.keys, job.weights, sample.slots or (), strict=True)
            if self._adapters.changes_text(key)
        ]
        mix = tuple((key, weight) for key, weight, _ in worn)
        slots = tuple(slot for _, _, slot in worn)
        prompts = [job.request.prompt, job.request.negative_prompt] if job.guided else [job.request.prompt]
        return [Text(prompt, mix, slots) for prompt in prompts]

    def first_latents(self, samples: Sequence[Sample]) -> None:
        """What each sample's first step begins with: noise, or the request's picture with noise on it."""
        channels = self._base.facts.channels
        for sample in samples:
            job = sample.job
            sample.generator = torch.Generator().manual_seed(sample.seed)
            latents = torch.zeros(channels, *sample.size)
            if job.pixels_CHW is not None:
                if job.image is None:
                    pixels_NCHW = job.pixels_CHW[None].float() / 127.5 - 1
                    mean_NCHW, std_NCHW = self._base.to_latents(pixels_NCHW)
                    job.image = mean_NCHW[0].float(), std_NCHW[0].float()
                spread = 0.0 if job.request.reading else sample.draw(channels)
                latents = (job.image[0] + job.image[1] * spread) * job.schedule.signal
            if not job.request.reading:
                latents = latents + self._first_noise(sample) * job.schedule.noise
            sample.latents = latents.to(self._base.device)
            sample.clean = torch.zeros_like(sample.latents)

    def _first_noise(self, sample: Sample) -> Tensor:
        noise = sample.draw(self._base.facts.channels)
        return noise if self._mark is None else self._mark.put(noise, self._mark.serial(sample.tenant, sample.seed))

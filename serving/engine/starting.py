"""What a sample has before its first step: its prompts' embeddings, and the latents it starts from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.covering import cells_of, places_of, without_words
from serving.engine.job import Job, Placing, Sample
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
        for job, sample in wearing.items():
            job.where = self._where(job, sample)
        conds = self._prompts.encode([self._texts(job, sample) for job, sample in wearing.items()])
        for job, made in zip(wearing, conds, strict=True):
            job.conds = tuple(made)
            job.together = self._base.family.together(job.samples[0].size, made[0])

    def _texts(self, job: Job, sample: Sample) -> list[Text]:
        """A job's texts under those of its adapters that change them; prompts of regions wear no other's."""
        changing = [index for index, key in enumerate(job.keys) if self._adapters.changes_text(key)]

        def text(prompt: str, worn: Sequence[int], which: int | None) -> Text:
            mix = tuple((job.keys[index], job.text_weights[index]) for index in worn)
            slots = tuple((sample.slots or ())[index] for index in worn)
            cover = ((), ()) if which is None or job.where is None else job.where.of_prompt(which, worn)
            return Text(prompt, mix, slots, *cover)

        shared = 2 if job.guided else 1
        found = [text(prompt, changing, which) for which, prompt in enumerate(job.texts[:shared])]
        for own, prompt in zip(job.own_prompts, job.texts[shared:], strict=True):
            found.append(text(prompt, [index for index in job.wearing(own) if index in changing], None))
        return found

    def _where(self, job: Job, sample: Sample) -> Placing | None:
        """Where a job's adapters are worn; None is everywhere. Raises Refused for words that are not in its prompt."""
        if not any(job.regions):
            return None
        known = {word: part for slot in sample.slots or () for word, part in self._adapters.bank.words(slot).items()}
        places = places_of(self._base, job.request.prompt, job.regions, known)
        cells = torch.stack([cells_of(region, sample.size) for region in job.regions])
        return Placing(cells, (places, without_words(job.regions)))

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

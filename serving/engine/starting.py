"""What a sample has before its first step: its prompts' embeddings, and the latents it starts from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.job import Job, Sample
from serving.engine.kept import KeptPart
from serving.engine.pictures.edit import cells_of
from serving.engine.pictures.vae import TiledVae, in_range
from serving.engine.prompts import PromptCache, Text
from serving.engine.steering import image_prompts_of, steering_of
from serving.engine.tiers.adapters import Adapters
from serving.engine.tiers.networks import Networks
from serving.marking.noise import NoiseMark
from training.base.base import Base
from training.base.family import KNOWN, REFERENCE


class Starter:
    """`mark` puts its message into the first noise of every picture; without it, noise is what the seed alone gives."""

    def __init__(
        self,
        base: Base,
        adapters: Adapters,
        networks: Networks,
        prompts: PromptCache,
        mark: NoiseMark | None,
        vae: TiledVae,
    ) -> None:
        self._base = base
        self._vae = vae
        self._adapters = adapters
        self._networks = networks
        self._prompts = prompts
        self._mark = mark

    def encode_prompts(self, samples: Sequence[Sample]) -> None:
        """The embeddings of the samples' jobs, all encoded together. Raises Refused for a prompt that is too long."""
        wearing = {sample.job: sample for sample in samples}
        conds = self._prompts.encode([self._texts(job, sample) for job, sample in wearing.items()])
        for job, found in zip(wearing, conds, strict=True):
            prompt, *job.further = found[: len(job.parts)]
            job.conds = prompt, found[-1] if job.guided else None

    def _texts(self, job: Job, sample: Sample) -> list[Text]:
        """The prompts and, with guidance, the negative prompt, under those adapters of a job that change the text."""
        worn = [
            (key, weight, slot)
            for key, weight, slot in zip(job.keys, job.weights, sample.slots or (), strict=True)
            if self._adapters.changes_text(key)
        ]
        mix = tuple((key, weight) for key, weight, _ in worn)
        slots = tuple(slot for _, _, slot in worn)
        prompts = [prompt for prompt, _ in job.parts] + ([job.negative] if job.guided else [])
        return [Text(prompt, mix, slots) for prompt in prompts]

    def steer(self, samples: Sequence[Sample]) -> None:
        """What the ControlNets and IP-Adapters of the samples' jobs tell their rows, found out once a job.

        A ControlNet that was loaded anew between two samples of a job takes the place of the one before.
        """
        networks = self._networks.networks
        for job in dict.fromkeys(sample.job for sample in samples if sample.job.networks):
            if [one.steer.network for one in job.steering] != [networks[use.ref] for use in job.request.controls]:
                job.steering = steering_of(job.request, job.hints, self._base, networks)
            if len(job.image_prompts) != len(job.request.image_prompts):
                job.image_prompts = image_prompts_of(job.request, job.hints, self._base, networks)

    def first_latents(self, samples: Sequence[Sample]) -> None:
        """What each sample's first step begins with: noise, or the request's picture with noise on it."""
        device = self._base.device
        for sample in samples:
            job = sample.job
            sample.generator = torch.Generator().manual_seed(sample.seed)
            picture = self._picture(sample)
            latents = torch.zeros(self._base.facts.channels, *sample.size)
            if picture is not None:
                latents = self._start(sample, picture) * job.schedule.signal
            if not job.request.reading:
                noise = self.first_noise(sample)
                latents = latents + noise * job.schedule.noise
                if job.edit is not None and picture is not None and not self._base.facts.inpaints:
                    drawn = cells_of(job.edit.drawn_HW, self._base.facts.cell_px)
                    sample.kept = KeptPart(drawn.to(device), picture.to(device), noise.to(device))
            sample.latents = latents.to(device)
            sample.clean = torch.zeros_like(sample.latents)
            self.tell(sample)

    def tell(self, sample: Sample) -> None:
        """What the denoiser is told beside the prompt, at the sample's size, and with whom it may share a forward."""
        job, device = sample.job, self._base.device
        beside = {f"{REFERENCE}{place}": self._encoded(job, f"reference {place}", in_range(pixels))[0].to(device)
                  for place, pixels in enumerate(job.references)}  # fmt: skip
        if self._base.facts.inpaints:
            beside[KNOWN] = self._known(sample).to(device)
        assert job.conds is not None
        sample.beside = beside
        sample.together = self._base.family.together(sample.size, {**job.conds[0], **beside})

    def first_noise(self, sample: Sample) -> Tensor:
        """Unit noise [C, h, w], with the mark."""
        noise = sample.draw(self._base.facts.channels)
        return noise if self._mark is None else self._mark.put(noise, self._mark.serial(sample.tenant, sample.seed))

    def _picture(self, sample: Sample) -> Tensor | None:
        """The latents of the request's picture; None if it has none, or is not looked at: the denoiser is told it."""
        job = sample.job
        if job.pixels_CHW is None or (job.edit is not None and self._base.facts.inpaints and not job.schedule.signal):
            return None
        if job.image is None:
            job.image = self._vae.to_latents(in_range(job.pixels_CHW))
        mean_CHW, std_CHW = job.image
        if job.request.reading or not std_CHW.any():  # a VAE whose mode is taken draws nothing
            return mean_CHW
        return mean_CHW + std_CHW * sample.draw(self._base.facts.channels)

    def _start(self, sample: Sample, picture_CHW: Tensor) -> Tensor:
        """What drawing starts from: the picture, with something else in it where the request asks for that."""
        job = sample.job
        fill = "original" if job.request.mask is None else job.request.mask.fill
        if job.edit is None or fill == "original":
            return picture_CHW
        other = torch.zeros_like(picture_CHW)
        if fill == "noise":
            other = sample.draw(self._base.facts.channels)
        if job.edit.start_CHW is not None:
            other = self._encoded(job, "filled", in_range(job.edit.start_CHW))[0]
        drawn_1HW = cells_of(job.edit.drawn_HW, self._base.facts.cell_px)
        return drawn_1HW * other + (1 - drawn_1HW) * picture_CHW

    def _known(self, sample: Sample) -> Tensor:
        """What a base made for inpainting is told: where it draws, and the latents of the picture that is left grey
        there. Without a mask it draws everywhere."""
        job, facts = sample.job, self._base.facts
        if job.edit is None:
            height, width = (side * facts.cell_px for side in sample.size)
            grey_CHW, _ = self._encoded(job, f"grey {height}", torch.zeros(3, height, width))
            return torch.cat([torch.ones(1, *sample.size), grey_CHW])
        masked_CHW = in_range(job.edit.pixels_CHW) * ~job.edit.drawn_HW
        mean_CHW, std_CHW = self._encoded(job, "masked", masked_CHW)
        masked = mean_CHW + std_CHW * sample.draw(facts.channels)
        return torch.cat([cells_of(job.edit.drawn_HW, facts.cell_px), masked])

    def _encoded(self, job: Job, name: str, pixels_CHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std [C, h, w] of the latents of a picture, encoded once a job."""
        if name not in job.encoded:
            job.encoded[name] = self._vae.to_latents(pixels_CHW)
        return job.encoded[name]

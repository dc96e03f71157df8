"""The second pass of a sample: what it has drawn is enlarged, noised again and redrawn at that size, in the same job.

Sources: AUTOMATIC1111's hires fix; image-to-image of diffusers. C, h, w of a latent.
"""

import torch
from PIL import Image
from torch import Tensor

from serving.engine.job import Sample
from serving.engine.pictures.codec import as_tensor
from serving.engine.pictures.vae import TiledVae, as_bytes, in_range
from serving.engine.starting import Starter
from training.base.base import Base


class Upscaler:
    """Sends samples into their second pass."""

    def __init__(self, base: Base, vae: TiledVae, starter: Starter) -> None:
        self._base = base
        self._vae = vae
        self._starter = starter

    def enlarge(self, sample: Sample) -> None:
        """Begins the second pass of a sample that has taken the last step of its first."""
        hires, schedule = sample.job.request.hires, sample.job.second
        assert hires is not None and schedule is not None
        size = self._base.latent_size(hires.height, hires.width)
        # what is not a number stays so, and is told when it is decoded
        if hires.upscaler == "latent" or not torch.isfinite(sample.at).all():
            picture = torch.nn.functional.interpolate(sample.at[None], size, mode="bilinear")[0].cpu()
            sample.size = size
        else:
            mean, std = self._vae.to_latents(in_range(self._larger(sample, hires.width, hires.height)))
            sample.size = size
            picture = mean + std * sample.draw(self._base.facts.channels)
        noise = self._starter.first_noise(sample)
        sample.latents = (picture * schedule.signal + noise * schedule.noise).to(self._base.device)
        sample.clean = torch.zeros_like(sample.latents)
        sample.enlarged, sample.step, sample.kept = True, 0, None
        self._starter.tell(sample)

    def _larger(self, sample: Sample, width: int, height: int) -> Tensor:
        """What the sample shows, uint8 [3, height, width]."""
        pixels_HWC = as_bytes(self._vae.to_pixels(sample.at[None]).float())[0].permute(1, 2, 0)
        picture = Image.fromarray(pixels_HWC.contiguous().numpy())
        return as_tensor(picture.resize((width, height), Image.Resampling.LANCZOS)).permute(2, 0, 1).contiguous()

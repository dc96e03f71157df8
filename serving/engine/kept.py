"""What stays of a picture that is edited: after every step it is put back, with as much noise as the drawn part has.

Source: diffusers' inpainting pipelines for bases that know no masks (RePaint without resampling). C, h, w of a latent.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KeptPart:
    """On the device: `drawn_1HW` is 1 where cells are redrawn and 0 where the picture stays; `noise_CHW` is the first
    noise, unit."""

    drawn_1HW: Tensor
    picture_CHW: Tensor
    noise_CHW: Tensor

    def put_back(self, latents_CHW: Tensor, signal: float = 1.0, noise: float = 0.0) -> Tensor:
        """The latents with `signal` x the picture + `noise` x the noise where it stays."""
        there_CHW = signal * self.picture_CHW + noise * self.noise_CHW
        return (1 - self.drawn_1HW) * there_CHW + self.drawn_1HW * latents_CHW

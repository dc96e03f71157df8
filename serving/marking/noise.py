"""The message in the noise: first latents whose signs say a serial, and how it is read out of latents again.

Gaussian Shading (Yang et al., CVPR 2024), with a linear code in place of repetition, so that latents of different
serials are independent normal noise. The magnitudes come from the request's seed, the signs from key and serial; the
serial comes from key, tenant and seed: the same request gives the same picture, and what a seed looks like tells
nothing about another's.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.marking.code import BITS, MOST, Reading, Reals, places, read, signs, words_of

FOUND = -6.0  # log10 of the false-positive probability below which a picture counts as ours


@dataclass(frozen=True, slots=True)
class NoiseMark:
    """The mark of one service, whose secret is `key`."""

    key: bytes

    def serial(self, tenant: str, seed: int) -> int:
        """The 48-bit serial of a tenant's pictures of one seed. Small pictures carry its last 16 bits."""
        digest = hmac.digest(self.key, f"serial|{tenant}|{seed}".encode(), "sha256")
        return int.from_bytes(digest[: BITS * MOST // 8], "big")

    def put(self, noise_CHW: Tensor, serial: int) -> Tensor:
        """Unit noise whose magnitudes are those of `noise_CHW` and whose signs say `serial`."""
        channels, height, width = noise_CHW.shape
        place = places(self._secret, channels, height, width)
        return noise_CHW.abs() * torch.from_numpy(signs(place, serial, words_of(noise_CHW.numel())))

    def read(
        self,
        evidence_CHW: Reals,
        expected: Sequence[int] = (),
        *,
        words: int | None = None,
        top: int = 0,
        left: int = 0,
    ) -> Reading:
        """The message in evidence about the signs of latents. `top`, `left`: cells that were cut off.

        `expected` are serials that are likelier for a reason that has nothing to do with the key.
        """
        channels, height, width = evidence_CHW.shape
        place = places(self._secret, channels, height, width, top, left)
        return read(place, evidence_CHW, words or words_of(evidence_CHW.size), expected)

    @property
    def _secret(self) -> bytes:
        return hashlib.sha256(b"places|" + self.key).digest()

"""What recovered noise tells about the signs of the noise that was drawn: one number for each, how sure and which.

A picture's content comes back as smooth and as strong latents, and the channels share it. Where a base's folder has a
`noise_reader.npz`, its linear map takes the content out: fitted to the base's own pictures, from the neighbourhood of
each cell in the recovered noise and in the picture's latents (`python -m tools.noise_reader`). Otherwise each value is
divided by the size of its neighbourhood, frequencies are evened out and channels decorrelated. Nothing here knows a
key, so whatever this does to a picture, the false-positive probability of what is read stays true.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.marking.code import Reals
from training.errors import UserError

FILE = "noise_reader.npz"
CLIP = 2.0  # standard deviations beyond which a value is no better evidence
_TINY = 1e-6


@dataclass(frozen=True, slots=True)
class NoiseReader:
    """`weights_CF`: C channels from F = 2 C x 9 values, or None for the general way."""

    weights_CF: NDArray[np.float32] | None = None

    def __call__(self, noise_CHW: Reals, latents_CHW: Reals) -> Reals:
        """The evidence [C, H, W] in recovered noise and the picture's latents, clipped at `CLIP` deviations."""
        if self.weights_CF is None:
            found = _decorrelated(_evened(_levelled(noise_CHW)))
        else:
            seen_FM = neighbourhoods(noise_CHW, latents_CHW)
            found = (self.weights_CF @ seen_FM).reshape(noise_CHW.shape)
        return np.clip(found / (found.std() + _TINY), -CLIP, CLIP).astype(np.float32)


def find_reader(folder: Path, channels: int) -> NoiseReader:
    """The reader of the base in `folder`. Raises UserError for a file that is of another base."""
    file = folder / FILE
    if not file.is_file():
        return NoiseReader()
    try:
        with np.load(file, allow_pickle=False) as stored:
            weights_CF = stored["weights"].astype(np.float32)
    except (OSError, ValueError, KeyError):
        weights_CF = np.zeros(0, dtype=np.float32)
    if weights_CF.shape != (channels, 2 * channels * 9):
        raise UserError(f"'{file}' is no noise reader for {channels} channels. Make it again, or delete it.")
    return NoiseReader(weights_CF)


def neighbourhoods(noise_CHW: Reals, latents_CHW: Reals) -> Reals:
    """What a reader sees of each cell: 3 x 3 cells of levelled noise and latents, [2 C x 9, H W]."""
    both = np.concatenate([_levelled(noise_CHW), _levelled(latents_CHW)])
    height, width = both.shape[1:]
    padded = np.pad(both, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    parts = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.stack(parts, axis=1).reshape(len(both) * 9, -1)


def _levelled(values_CHW: Reals) -> Reals:
    """Each value, divided by the size of the nine cells around it in all channels."""
    height, width = values_CHW.shape[1:]
    padded = np.pad(np.mean(values_CHW**2, axis=0), 1, mode="edge")
    near_HW = np.mean([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)
    return (values_CHW / (np.sqrt(near_HW) + _TINY)).astype(np.float32)


def _evened(values_CHW: Reals) -> Reals:
    """Each channel's spatial frequencies, divided by the root of the amplitude that is usual at such a frequency."""
    height, width = values_CHW.shape[1:]
    spectrum = np.fft.fft2(values_CHW)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    band = np.minimum((radius * 16).astype(int), 11)
    members = np.maximum(np.bincount(band.ravel(), minlength=12), 1)
    for channel in spectrum:
        power = np.bincount(band.ravel(), (np.abs(channel) ** 2).ravel(), 12) / members
        channel /= (power[band] + 1e-12) ** 0.25
    return np.fft.ifft2(spectrum).real.astype(np.float32)


def _decorrelated(values_CHW: Reals) -> Reals:
    flat = values_CHW.reshape(len(values_CHW), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    shared = flat @ flat.T / flat.shape[1]
    shared += (0.05 * np.trace(shared) / len(shared) + _TINY) * np.eye(len(shared), dtype=np.float32)
    found: Reals = np.linalg.solve(shared, flat).reshape(values_CHW.shape).astype(np.float32)
    return found

"""Fits the reader of a base's noise: `python -m tools.noise_reader BASE PROMPT ...` writes `noise_reader.npz` there.

Draws pictures of known noise, attacks them as the world would, walks them back, and fits by ridge regression what their
noise was. No key is needed: the reader knows pictures, not marks. See `serving/marking/evidence.py`.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.attacks import Attack, blurred, jpeg, noisy, resized, unchanged
from serving.engine.reading import STEPS, backwards
from serving.engine.samplers import ScheduleLines
from serving.marking.code import Reals
from serving.marking.evidence import FILE, neighbourhoods
from training.base.base import Base, load_base
from training.base.stream import stream
from training.sampling.sampler import sample, to_uint8

RIDGE = 0.01
AT_ONCE = 16
KINDS: tuple[Attack, ...] = (
    unchanged, jpeg(90), jpeg(75), jpeg(60), resized(0.5, back=True), resized(0.7, back=True), blurred(0.6), noisy(5),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.noise_reader", description=__doc__)
    parser.add_argument("base")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--out", type=Path, help="the base's folder by default")
    arguments = parser.parse_args()
    base = load_base(arguments.base)
    weights_CF = fit(base, arguments.prompts, arguments.pictures)
    np.savez_compressed((arguments.out or base.folder) / FILE, weights=weights_CF.astype(np.float16))


def fit(base: Base, prompts: Sequence[str], pictures: int, attacks: int = 4) -> Reals:
    """The weights [C, F] of a reader, from so many pictures under so many attacks each."""
    rng = np.random.default_rng(0)
    width = 2 * base.facts.channels * 9
    gram_FF, goal_FC = np.zeros((width, width)), np.zeros((width, base.facts.channels))
    for start in range(0, pictures, AT_ONCE):
        seeds = range(start, min(start + AT_ONCE, pictures))
        shape = (base.facts.channels, *base.latent_size(base.facts.resolution, base.facts.resolution))
        drawn = [torch.randn(shape, generator=stream(seed, "sample")).numpy() for seed in seeds]
        latents = sample(base, [prompts[seed % len(prompts)] for seed in seeds], seeds=list(seeds))
        images = [Image.fromarray(one.numpy()) for one in to_uint8(base.to_pixels(latents))]
        for kind in random.Random(start).sample(KINDS, attacks):
            seen = encoded(base, [kind(image, rng) for image in images])
            for noise, known, truth in zip(walked_back(base, seen), seen, drawn, strict=True):
                features_FM = neighbourhoods(noise.numpy(), known.numpy()).astype(np.float64)
                gram_FF += features_FM @ features_FM.T
                goal_FC += features_FM @ truth.reshape(len(truth), -1).T
    return solve(gram_FF, goal_FC)


def solve(gram_FF: np.ndarray, goal_FC: np.ndarray) -> Reals:
    """Ridge regression: the weights [C, F]."""
    size = len(gram_FF)
    weights: Reals = np.linalg.solve(gram_FF + np.eye(size) * RIDGE * np.trace(gram_FF) / size, goal_FC).T
    return weights.astype(np.float32)


def encoded(base: Base, images: Sequence[Image.Image]) -> Tensor:
    """The latents [N, C, h, w] of pictures."""
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images])
    return base.to_latents(pixels)[0].float()


@torch.no_grad()
def walked_back(base: Base, latents_NCHW: Tensor) -> Tensor:
    """The noise [N, C, h, w] that pictures' latents began as, by the steps of a reading in the engine."""
    (cond,) = base.encode([""])
    schedule = backwards(base.process, STEPS, (latents_NCHW.shape[2], latents_NCHW.shape[3]))
    count = len(latents_NCHW)
    for step in range(schedule.steps):
        lines = ScheduleLines.gather([schedule] * count, [step] * count, base.device)
        output = base.predict(lines.model_input(latents_NCHW), lines.timesteps_N, [cond] * count)
        latents_NCHW, _ = lines.step(latents_NCHW, output, torch.zeros_like(latents_NCHW), None)
    return latents_NCHW


if __name__ == "__main__":
    main()

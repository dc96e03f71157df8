"""Reading a picture's noise: the steps of a run backwards, as a run of its own, and what is found at their end.

A deterministic sampler's step is `a x + b output`, so its inverse is one, too: `x / a - b / a output`, where the output
is asked for at the latents that are there (DDIM inversion, Song et al. 2021). So a picture to be read is a row like any
other. The prompt, guidance and sampler that made it are not known: it is read without prompt and guidance.
"""

import math
from collections.abc import Sequence

import torch

from serving.engine.job import Recovered
from serving.engine.request import GenerateRequest, NoiseReading
from serving.marking.code import words_of
from serving.marking.evidence import NoiseReader
from serving.marking.noise import NoiseMark
from training.base.facts import SamplerName
from training.base.noise.process import CLEAN, CLEAN_OUT, CLEAN_X, OUT, Process, Schedule, Size, X

STEPS = 10  # more recover nothing more


def reading_request(
    image: bytes, width: int, height: int, *, deadline_s: float, expected: Sequence[int] = (), cut_cells: int = 0
) -> GenerateRequest:
    """The request to read a picture as if it had been made with these sides."""
    return GenerateRequest(
        prompt="",
        tenant="",
        width=width,
        height=height,
        seed=0,
        steps=STEPS,
        guidance_scale=1.0,
        image=image,
        reading=True,
        expected=tuple(expected),
        cut_cells=cut_cells,
        deadline_s=deadline_s,
    )


def backwards(process: Process, steps: int, size: Size) -> Schedule:
    """The run from a picture's latents to the noise that it began as."""
    sampler: SamplerName = "ddim" if "ddim" in process.samplers else "euler"
    forwards = process.schedule(sampler, steps, None, size).table_TK.double()
    a = forwards[:, X] + forwards[:, CLEAN] * forwards[:, CLEAN_X]
    b = forwards[:, OUT] + forwards[:, CLEAN] * forwards[:, CLEAN_OUT]
    table_TK = forwards.clone()
    table_TK[:, X], table_TK[:, OUT], table_TK[:, CLEAN] = 1 / a, -b / a, 0.0
    return Schedule(table_TK.flip(0).to(torch.float32), signal=1.0, noise=0.0, draws=False)


def read_noise(mark: NoiseMark, reader: NoiseReader, found: Recovered) -> NoiseReading:
    """What recovered noise says, at the likeliest place that the request allows."""
    request = found.job.request
    evidence_CHW = reader(found.noise.numpy(), found.latents.numpy())
    cut = range(request.cut_cells + 1)
    counts = {words_of(evidence_CHW.size)}
    if request.cut_cells:  # the whole picture may have been large enough for more words than this part of it
        counts.add(words_of(2 * evidence_CHW.size))
    readings = [
        mark.read(evidence_CHW, request.expected, words=words, top=top, left=left)
        for words in sorted(counts)
        for top in cut
        for left in cut
    ]
    best = min(readings, key=lambda reading: reading.log10)
    tries = math.log10(len(readings))
    return NoiseReading(serial=best.serial, words=best.words, log10=min(0.0, best.log10 + tries), z=best.z)

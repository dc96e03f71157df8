"""The fused batch: which images, noise and timesteps each subject puts into one step, drawn from its own streams.

What a subject draws depends on its seed, step and micro-batch alone. Rows stand in slot order, a subject's instance
rows before its prior rows.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from training.base.family import RowFacts
from training.base.noise.process import Density, Process
from training.base.stream import shuffled, stream
from training.manifest.subject import SubjectSpec
from training.trainer.latents import LatentSet
from training.trainer.prior import class_prompts


@dataclass(frozen=True)
class Turn:
    """What one subject contributes: its settings and latents, and where it stands."""

    spec: SubjectSpec
    instance: LatentSet
    prior: LatentSet | None
    step: int
    micro: int


@dataclass
class Batch:
    """One fused batch, one entry a row. `member` is the row's place among the subjects of this step."""

    latents: list[Tensor] = field(default_factory=list)  # [C, h, w] each
    noise: list[Tensor] = field(default_factory=list)
    places: list[float] = field(default_factory=list)  # between clean and noise, as the base's process counts
    prompts: list[str] = field(default_factory=list)
    rows: list[RowFacts] = field(default_factory=list)
    member: list[int] = field(default_factory=list)
    share: list[float] = field(default_factory=list)  # of the row in its mean
    is_prior: list[bool] = field(default_factory=list)
    from_base: list[bool] = field(default_factory=list)  # the target is the base's own prediction
    weights: list[Tensor | None] = field(default_factory=list)  # [h, w] of the loss's cells, of mean 1; None: all 1

    def parts(self, kinds: Sequence[Hashable], most_rows: int | None = None) -> list["Batch"]:
        """The batch cut into what goes through one forward: rows of one kind (`kinds`, one a row), at most `most_rows`.

        Their losses, summed, are the whole's.
        """
        alike: dict[Hashable, list[int]] = {}
        for place, kind in enumerate(kinds):
            alike.setdefault(kind, []).append(place)
        return [
            self._rows(places[start : start + (most_rows or len(places))])
            for places in alike.values()
            for start in range(0, len(places), most_rows or len(places))
        ]

    def _rows(self, places: Sequence[int]) -> "Batch":
        return Batch(**{of.name: [getattr(self, of.name)[place] for place in places] for of in fields(self)})


WHOLE = slice(None)


def make_batch(turns: Iterable[Turn], process: Process, part: slice = WHOLE) -> Batch:
    """The rows of every subject, with noise levels of `process`.

    `part`: of each kind of rows only these. Parts that make up the whole have the whole's draws and, summed, its loss.
    """
    batch = Batch()
    for place, turn in enumerate(turns):
        _add_rows(batch, place, turn, "instance", turn.instance, process, part)
        if not turn.spec.prior.enabled:
            continue
        if turn.spec.prior.source == "prediction":
            _add_rows(batch, place, turn, "prediction", turn.instance, process, part)
        elif turn.prior is not None:
            _add_rows(batch, place, turn, "prior", turn.prior, process, part)
    return batch


def _add_rows(
    batch: Batch, place: int, turn: Turn, kind: str, images: LatentSet, process: Process, part: slice
) -> None:
    """One kind of rows of one subject; each kind has a stream of its own, so that a prior changes no instance row."""
    train = turn.spec.train
    count = train.batch_size
    generator = stream(train.seed, kind, turn.step, turn.micro)
    start = (turn.step * train.gradient_accumulation_steps + turn.micro) * count
    picked = shuffled(train.seed, kind, len(images), start, count)
    latents = images.draw(picked, generator)
    noise = [torch.randn(latent.shape, generator=generator) for latent in latents]
    if train.noise_offset:
        noise = [one + train.noise_offset * torch.randn(one.shape[0], 1, 1, generator=generator) for one in noise]
    batch.latents += latents[part]
    batch.noise += noise[part]
    sizes = [(latent.shape[1], latent.shape[2]) for latent in latents]
    batch.places += process.draw(generator, sizes, _density(turn))[part]
    mine = picked[part]
    batch.prompts += (
        _class_prompts(turn, start, count) if kind == "prediction" else [images.prompts[index] for index in picked]
    )[part]
    batch.rows += [images.images[index].row for index in mine]
    batch.member += [place] * len(mine)
    batch.share += [1 / count] * len(mine)
    batch.is_prior += [kind != "instance"] * len(mine)
    from_base = kind == "prediction" or (kind == "prior" and turn.spec.prior.target == "prediction")
    batch.from_base += [from_base] * len(mine)
    behind = train.background_weight if kind == "instance" else None
    batch.weights += [_cell_weights(images.images[index].subject_HW, behind) for index in mine]


def _class_prompts(turn: Turn, start: int, count: int) -> list[str]:
    """What the base is asked of a subject's own photos: the class prompt, and their captions in turn if wanted."""
    prompts = class_prompts(turn.spec, turn.instance.prompts if turn.spec.prior.captions else ())
    return [prompts[(start + row) % len(prompts)] for row in range(count)]


def _cell_weights(subject_HW: Tensor | None, background: float | None) -> Tensor | None:
    """Of each cell of the loss: `background` beside the subject, scaled so that a row weighs what others do."""
    if subject_HW is None or background is None:
        return None
    weights_HW = background + (1 - background) * subject_HW
    return weights_HW / weights_HW.mean().clamp(min=1e-6)


def _density(turn: Turn) -> Density:
    """How the subject's noise levels are drawn, where the base leaves a choice."""
    asked = turn.spec.train.timesteps
    return Density(asked.density, asked.mean, asked.std, asked.shift)

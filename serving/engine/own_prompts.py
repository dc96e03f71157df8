"""Prompts of regions: each is predicted in a row of its own, over the whole picture, and counts in its region.

In the row of a region's prompt the region's adapter is worn everywhere, and no other region's is: neither attention nor
the text encoder sees the others. What the rows say is blended by the regions' cells, which is MultiDiffusion with one
crop (Bar-Tal et al. 2023). So it needs no masks in a family's attention, and takes a row a prompt.

Shape suffixes: N samples, E rows of regions' prompts, C channels, h and w cells.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from serving.engine.job import Job, Sample
from serving.errors import Refused
from training.base.base import Base
from training.base.family import Cond
from training.base.image_prompts import ImagePrompt


def check_room(job: Job, base: Base, step_rows: Callable[[int], int]) -> None:
    """Raises Refused for a job with regions and `AND`, and for one whose regions' prompts find no room.

    `step_rows`: how many rows of so many cells a forward has.
    """
    if job.composed and any(job.regions):
        raise Refused("A prompt with AND and adapters with regions do not go together. Leave one of the two out.")
    prompts, own = 2 if job.guided else 1, len(job.own_prompts)
    hires, cells = job.request.hires, job.samples[0].cells
    if hires is not None:
        height, width = base.latent_size(hires.height, hires.width)
        cells = max(cells, height * width + job.samples[0].more_cells)
    room = step_rows(cells)
    if own and prompts + own > room:
        raise Refused(
            f"{own} regions have prompts, and a forward of this size takes {max(0, room - prompts)} here. Leave "
            "'prompt' out of regions, ask for a smaller picture, or start the server with more rows."
        )


class OwnRow(NamedTuple):
    """The row of one region's prompt."""

    sample: Sample
    cond: Cond
    slots: tuple[int, ...]
    weights: tuple[float, ...]
    image_prompts: tuple[ImagePrompt, ...]


class OwnPrompts(NamedTuple):
    """The rows of all samples of a forward: `of_E` is whose each is; `cells_E1hw` what it counts, 1 in all at most."""

    rows: tuple[OwnRow, ...]
    of_E: Tensor
    cells_E1hw: Tensor

    @classmethod
    def of(cls, order: Sequence[Sample], device: torch.device) -> "OwnPrompts":
        """Those of samples that have started, in the order of a forward."""
        rows, owners, cells = [], list[int](), list[Tensor]()
        for place, sample in enumerate(order):
            job = sample.job
            if not job.own_prompts:
                continue
            assert job.where is not None
            covers_Ehw = job.where.at(sample.size)[list(job.own_prompts)]
            shown = tuple(with_prompt for with_prompt, _ in job.image_prompts)
            cells += (covers_Ehw / covers_Ehw.sum(dim=0).clamp(min=1)).unbind()
            for own, cond in zip(job.own_prompts, job.own_conds, strict=True):
                worn = job.wearing(own)
                slots = tuple((sample.slots or ())[index] for index in worn)
                weights = tuple(sample.weights[index] for index in worn)
                rows.append(OwnRow(sample, {**cond, **sample.beside}, slots, weights, shown))
                owners.append(place)
        shares = torch.stack(cells)[:, None] if cells else torch.zeros(0, 1, 1, 1)
        return cls(tuple(rows), torch.tensor(owners, dtype=torch.int64, device=device), shares.to(device))

    def blend(self, said_NChw: Tensor, own_MChw: Tensor) -> Tensor:
        """What is said of the samples where their regions' prompts do not count, and what those say where they do.

        `own_MChw` begins with the rows of the regions' prompts.
        """
        if not self.rows:
            return said_NChw
        own_EChw = own_MChw[: len(self.rows)]
        gained = self.cells_E1hw * (own_EChw - said_NChw[self.of_E])
        return said_NChw.index_add(0, self.of_E, gained)

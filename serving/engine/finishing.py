"""What follows the last step: finished samples wait here, and are decoded a few at a time."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serving.engine.job import Sample
from serving.engine.pictures.preview import PreviewMap, fit_preview
from serving.engine.pictures.vae import TiledVae, as_bytes
from training.base.base import Base


class Finisher:
    """Decodes at most `cells` latent cells at a time, or one sample that has more."""

    def __init__(self, base: Base, cells: int, vae: TiledVae) -> None:
        self._base = base
        self._vae = vae
        self._cells = cells
        self._waiting: deque[Sample] = deque()
        self._preview: PreviewMap | None = None

    def __len__(self) -> int:
        """How many samples wait."""
        return len(self._waiting)

    def add(self, sample: Sample) -> None:
        """A sample that has taken its last step."""
        self._waiting.append(sample)

    def drop(self, sample: Sample) -> None:
        """Takes a sample out, if it waits."""
        if sample in self._waiting:
            self._waiting.remove(sample)

    def take(self, served: Callable[[str], float]) -> list[Sample]:
        """Takes out the samples to decode next: of one size, of the tenants served least, fewer if they are large."""
        if not self._waiting:
            return []
        first, *others = sorted(self._waiting, key=lambda sample: served(sample.tenant))
        room = max(1, self._cells // first.cells)
        ready = [first, *(sample for sample in others if sample.size == first.size)][:room]
        for sample in ready:
            self._waiting.remove(sample)
        return ready

    def decode(self, samples: Sequence[Sample]) -> list[Tensor | None]:
        """The samples' pictures, uint8 [H, W, 3] on the CPU; None for one that is not a number."""
        images_NCHW = self._vae.to_pixels(torch.stack([sample.at for sample in samples])).float()
        finite = torch.isfinite(images_NCHW).flatten(1).all(dim=1).tolist()
        return [
            image.permute(1, 2, 0) if good else None for image, good in zip(as_bytes(images_NCHW), finite, strict=True)
        ]

    def preview(self, sample: Sample) -> Tensor:
        """The model's guess of a sample, uint8 [h, w, 3] at latent resolution."""
        if self._preview is None:
            self._preview = fit_preview(self._base)
        return self._preview(sample.guess if sample.kept is None else sample.kept.put_back(sample.guess))

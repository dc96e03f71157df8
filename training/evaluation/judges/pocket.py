"""The judge: a small independent CNN that reads class, place and colour off a picture of the pocket base's world.

Owns its shape, its file and its reading. Knows nothing about how it was trained or about the pictures' makers.
Shapes: B pictures, C channels, H and W pixels, E features.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.base.files.folder import EMBEDDED

FOLDER = EMBEDDED / "pocket-judge"
IMAGE_PX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """The words that the judge knows, in the order of its outputs."""

    classes: tuple[str, ...]
    places: tuple[str, ...]
    colours: tuple[str, ...]
    widths: tuple[int, ...] = (32, 64, 96, 160)


class JudgeReading(NamedTuple):
    """What the judge sees in one picture; `colour` is the nearest colour word, meant where a colour was asked for."""

    noun: str
    noun_probability: float
    place: str
    place_probability: float
    colour: str
    colour_probability: float


class JudgeNet(nn.Module):
    """A CNN with three heads over shared features: class, place and colour."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = 3
        for width in config.widths:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.trunk = nn.Sequential(*layers)
        # Mean and maximum: a place fills the picture, an ear does not.
        self.noun = nn.Linear(2 * before, len(config.classes))
        self.place = nn.Linear(2 * before, len(config.places))
        self.colour = nn.Linear(2 * before, len(config.colours))

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Features [B, E] of pictures in [-1, 1]; their cosine says how alike two pictures are to the judge."""
        maps = self.trunk(pixels_BCHW)
        return torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), dim=1)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of class, place and colour, [B, words] each."""
        features = self.embed(pixels_BCHW)
        return self.noun(features), self.place(features), self.colour(features)

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> list[JudgeReading]:
        """What each picture shows, with the probability of each word."""
        if not images:
            return []
        device = self.noun.weight.device
        nouns, places, colours = (x.softmax(1).max(1) for x in self(to_pixels(images).to(device)))
        words = self.config
        return [
            JudgeReading(words.classes[n], np_, words.places[p], pp, words.colours[c], cp)
            for n, np_, p, pp, c, cp in zip(
                nouns.indices.tolist(),
                nouns.values.tolist(),
                places.indices.tolist(),
                places.values.tolist(),
                colours.indices.tolist(),
                colours.values.tolist(),
                strict=True,
            )
        ]


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size as [B, 3, 64, 64] in [-1, 1]."""
    sized = [i.convert("RGB").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC) for i in images]
    return torch.from_numpy(np.stack([np.asarray(i) for i in sized])).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_judge(folder: Path = FOLDER) -> JudgeNet:
    """The judge in a folder, in eval mode on the CPU."""
    held = json.loads((folder / "config.json").read_text())
    judge = JudgeNet(JudgeConfig(**{key: tuple(value) for key, value in held.items()}))
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return judge.eval()


def save_judge(judge: JudgeNet, folder: Path = FOLDER) -> None:
    """Writes the judge's config and fp16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(judge.config), indent=2) + "\n")
    weights = {name: tensor.detach().half().contiguous() for name, tensor in judge.state_dict().items()}
    part = folder / "model.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")

"""What differs between families of text-to-image models: how a base encodes, normalises and calls its denoiser.

Everything else (noise, samplers, guidance, bank, optimizer, scheduler) is the same arithmetic for all of them.
A family is made for one folder, from its configs alone; `load` reads the weights. One file a family in `families/`.
Shape suffixes: N rows, C, H, W of a latent or picture; L tokens.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from training.base.controls import Controls, Steer
from training.base.facts import Facts
from training.base.image_prompts import ImagePrompt, ImagePrompts
from training.base.wording import Phrases

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from training.base.noise.process import Process, Size

Cond = Mapping[str, "Tensor"]  # one prompt as the denoiser takes it, without a batch axis; opaque outside the family
# What serving adds to a prompt's record, on the device. KNOWN of a base that `inpaints`, [1 + C, h, w]: where it draws
# (1) or not (0), and the latents of the picture without what is there to be drawn. REFERENCE and a number from 0:
# the latents [C, h, w] of a picture that the prompt refers to.
KNOWN, REFERENCE = "known", "reference_"
Wording = str | Phrases  # a prompt: plain text, or weighted pieces where `Facts.emphasis`
Words = Mapping[str, "Tensor"]  # textual-inversion word -> [V, D]: V token places, D the encoders' widths together


NOTHING: Mapping[str, Any] = {}


class RowFacts(NamedTuple):
    """What a denoiser may want to know of a row beside latents, time and prompt. Pixels are (down, across).

    `original_px` is the size of the photo and `crop_px` where its crop began: None for a picture that is drawn.
    `guidance` is for bases that take it as an input; `steers` are the row's ControlNets, of the family's `controls`,
    and `image_prompts` its pictures, of the family's `image_prompts`.
    """

    original_px: tuple[int, int] | None = None
    crop_px: tuple[int, int] | None = None
    guidance: float = 1.0
    steers: tuple[Steer, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()


@dataclass(frozen=True)
class Parts:
    """The loaded pieces of a base: models by component, and tokenizers by the text encoder they belong to.

    All compute on `device`; weights are in `dtype` but where the family needs another.
    """

    models: Mapping[str, "nn.Module"]
    tokenizers: Mapping[str, Any]
    device: "torch.device"
    dtype: "torch.dtype"


class Family(Protocol):
    """One family, for one base. `pipelines` are the diffusers pipelines that are of it; `title` is what people say.

    `controls`: its ControlNets, of which `RowFacts.steers` are; `image_prompts`: its IP-Adapters, of which
    `RowFacts.image_prompts` are; None where there are none for it.
    """

    pipelines: ClassVar[tuple[str, ...]]
    title: ClassVar[str]
    facts: Facts
    controls: Controls | None
    image_prompts: ImagePrompts | None

    def __init__(self, folder: Path, name: str) -> None:
        """Reads the configs; `name` is what messages call the base.

        Raises UserError if the folder lacks one, or is of a kind that is not supported.
        """

    @staticmethod
    def owns(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether an adapter's tensors, by key with `_` for `.`, are of layers that only this family has."""

    @property
    def process(self) -> "Process":
        """The noise process of training and sampling."""

    def load(self, device: "torch.device", dtype: "torch.dtype", quantized: Mapping[str, Any] = NOTHING) -> Parts:
        """All models, frozen and in eval mode; `quantized`: diffusers' configs of components in fewer bits."""

    def tokenizer(self) -> Any:
        """The tokenizer in whose tokens prompts are counted."""

    def count_chunks(self, parts: Parts, prompt: Wording, words: Words) -> int:
        """How often the text encoder must run to take all of a prompt in."""

    def encode(
        self, parts: Parts, prompts: Sequence[Wording], words: Sequence[Words] | None = None, chunks: int = 1
    ) -> list[Cond]:
        """The record of each prompt. `words[n]`: what prompt n may use; differentiable towards them and routes.

        Prompts are cut after `chunks`, and filled up to it. The empty prompt is what the pipeline has without a prompt.
        Weights of phrases multiply what their tokens are encoded to; families without `Facts.emphasis` get plain texts.
        """

    def to_latents(self, parts: Parts, pixels_N3HW: "Tensor") -> tuple["Tensor", "Tensor"]:
        """Mean and std [N, C, h, w] of the latents of pictures in [-1, 1], in the space that noise is added in."""

    def to_pixels(self, parts: Parts, latents_NCHW: "Tensor") -> "Tensor":
        """Pictures [N, 3, H, W], nominally in [-1, 1]: the inverse."""

    def predict(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """What the denoiser says of N rows at their times, [N, C, h, w], with the sign that the process takes."""

    def together(self, size: "Size", cond: Cond) -> Hashable:
        """Rows with equal keys may share a forward."""

    def features(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """Activations [N, E, h, w] inside the denoiser that tell what a picture shows."""

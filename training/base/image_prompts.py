"""IP-Adapters: pictures as prompts. A picture becomes a few tokens, and each cross-attention of a row reads them beside
the words, with keys and values of its own.

Only rows that have pictures pay; the others' numbers are untouched. Source: Ye et al. 2023; diffusers' IP-Adapter
attention, which is the same for all rows. Shape suffixes: N rows of a forward, R of those with pictures; T tokens of a
picture, L of the latents; E the width of a layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from training.base.family import Parts, RowFacts


class ImagePrompt(NamedTuple):
    """What one picture says to one row: keys and values [T, E] of each cross-attention, and how much they count."""

    keys: tuple["Tensor", ...]
    values: tuple["Tensor", ...]
    scale: float


class ImagePrompts(Protocol):
    """The IP-Adapters of one base, as its family takes them."""

    def load(self, folder: Path, dtype: "torch.dtype") -> "nn.Module":
        """The adapter in a folder, on the CPU, frozen and in eval mode: `image_encoder/` and one safetensors file, as
        diffusers' `load_ip_adapter` reads them. Raises UserError if it is not whole, or made for another base."""

    def said(
        self, parts: "Parts", adapter: "nn.Module", pixels_3HW: "Tensor", scale: float
    ) -> tuple[ImagePrompt, ImagePrompt]:
        """What a picture, uint8, says to a row with the prompt, and what no picture says to its negative one."""


@contextmanager
def prompted(attentions: Callable[[], Sequence[Any]], rows: Sequence["RowFacts"]) -> Iterator[None]:
    """Inside, the rows of the forward read their pictures in `attentions()`, the denoiser's cross-attentions in order.

    By hooks that come after all others and go again: what adapters add to the queries is in them.
    """
    alike: dict[int, list[tuple[int, ImagePrompt]]] = {}
    for index, row in enumerate(rows):
        for prompt in row.image_prompts:
            alike.setdefault(len(prompt.keys[0]), []).append((index, prompt))
    if not alike:
        yield
        return
    hooks = [hook for layer, attention in enumerate(attentions()) for hook in _hooks(attention, layer, alike)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(attention: Any, layer: int, alike: Mapping[int, list[tuple[int, ImagePrompt]]]) -> Iterator[Any]:
    """Hooks of one attention: its queries are kept, and before its last layer what they find in pictures is added."""
    kept: list[Tensor] = []

    def keep(_layer: Any, _inputs: Any, queries_NLE: "Tensor") -> None:
        kept[:] = [queries_NLE]

    def add(_layer: Any, inputs: tuple["Tensor", ...]) -> tuple["Tensor", ...]:
        found_NLE = inputs[0].clone()
        for asked in alike.values():
            _read_pictures(found_NLE, kept[0], asked, layer, attention.heads)
        return found_NLE, *inputs[1:]

    yield attention.to_q.register_forward_hook(keep)
    yield attention.to_out[0].register_forward_pre_hook(add)


def _read_pictures(
    found_NLE: "Tensor", queries_NLE: "Tensor", asked: Sequence[tuple[int, ImagePrompt]], layer: int, heads: int
) -> None:
    """Adds to `found_NLE` what the queries of some rows find in their pictures, which have as many tokens each."""
    import torch
    from torch.nn import functional

    from training.base.transfer import constant

    rows_R = constant(tuple(index for index, _ in asked), torch.long, found_NLE.device)
    keys_RTE = torch.stack([prompt.keys[layer] for _, prompt in asked])
    values_RTE = torch.stack([prompt.values[layer] for _, prompt in asked])
    scales_R = constant(tuple(prompt.scale for _, prompt in asked), found_NLE.dtype, found_NLE.device)

    def split(part: "Tensor") -> "Tensor":
        return part.unflatten(2, (heads, -1)).transpose(1, 2)

    seen = functional.scaled_dot_product_attention(split(queries_NLE[rows_R]), split(keys_RTE), split(values_RTE))
    seen_RLE = seen.transpose(1, 2).flatten(2) * scales_R.view(-1, 1, 1)
    found_NLE.index_add_(0, rows_R, seen_RLE.to(found_NLE))

"""ControlNets of FLUX.1. Source: diffusers' FluxControlNetPipeline.

Two kinds: those that read the picture's latents (InstantX, Shakker), and those that read its pixels (XLabs), whose
residuals go to the blocks in turn. The first takes the mean of what the VAE makes of the picture, so that a request
gives the same picture each time.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base.controls import differing, load_network, scattered, steered_rows
from training.base.family import Parts, RowFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ALIKE = (
    "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim",
    "axes_dims_rope",
)  # fmt: skip
HINT_PX = 8  # a side of what the encoder of pixels makes one of
DEFAULTS = {
    "in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip


class FluxControls:
    """See `Controls`; `transformer` is the config of the base's transformer."""

    def __init__(self, transformer: Mapping[str, Any], cell_px: int) -> None:
        self._transformer, self._cell_px = transformer, cell_px

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """See `Controls`."""
        kind = config.get("_class_name")
        if kind != "FluxControlNetModel":
            return f"it is a {kind}, and FLUX.1 takes a FluxControlNetModel"
        if found := differing(DEFAULTS | dict(config), DEFAULTS | dict(self._transformer), ALIKE):
            return found
        if config.get("num_mode") is not None:
            return f"it is a union of {config['num_mode']} kinds, which are not served; take the network of one kind"
        reads_pixels, px = (
            config.get("conditioning_embedding_channels") is not None,
            HINT_PX * config.get("patch_size", 1),
        )
        if reads_pixels and px != 2 * self._cell_px:
            return f"it makes a token of {px} pixels a side, and the base of {2 * self._cell_px}"
        return None

    def load(self, folder: Path, dtype: "torch.dtype") -> "nn.Module":
        """See `Controls`."""
        from diffusers import FluxControlNetModel

        return load_network(FluxControlNetModel, folder, dtype)

    def hint(self, parts: Parts, network: "nn.Module", pixels_3HW: "Tensor") -> "Tensor":
        """See `Controls`: tokens [T, C] of the picture's latents, or the picture from -1 to 1, [3, H, W]."""
        from training.base.latent_space import encode

        model: Any = network
        pixels = pixels_3HW.to(parts.device, parts.dtype) / 127.5 - 1
        if model.input_hint_block is not None:
            return pixels
        vae: Any = parts.models["vae"]
        mean_NCHW, _ = encode(vae, pixels[None].to(next(vae.parameters()).dtype))
        return as_tokens(mean_NCHW)[0].to(parts.dtype)


def as_tokens(x_NCHW: "Tensor") -> "Tensor":
    """Latents as tokens [N, T, C]: each is a square of four cells."""
    n, c, height, width = x_NCHW.shape
    return x_NCHW.view(n, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * 4)


def flux_residuals(rows: Sequence[RowFacts], transformer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the rows' ControlNets add, as arguments of the transformer; none where no row has one.

    `inputs`: what the transformer itself is called with.
    """
    blocks: dict[str, list[Tensor | None]] = {
        "controlnet_block_samples": [None] * len(transformer.transformer_blocks),
        "controlnet_single_block_samples": [None] * len(transformer.single_transformer_blocks),
    }
    for network, rows_R, hints_R, scales_R in steered_rows(rows, inputs["hidden_states"]):
        shared = {"txt_ids", "img_ids"}
        own = {name: part if name in shared or part is None else part[rows_R] for name, part in inputs.items()}
        if not network.config.guidance_embeds:
            own["guidance"] = None
        elif own["guidance"] is None:
            own["guidance"] = scales_R.new_tensor([rows[row].guidance for row in rows_R.tolist()])
        made = network(**own, controlnet_cond=hints_R, conditioning_scale=scales_R.view(-1, 1, 1), return_dict=False)
        in_turn = (network.input_hint_block is not None, False)
        for (name, totals), parts, turns in zip(blocks.items(), made, in_turn, strict=True):
            every = ceil(len(totals) / len(parts)) if parts else 1
            for index in range(len(totals) if parts else 0):
                part = parts[index % len(parts) if turns else index // every]
                blocks[name][index] = scattered(totals[index], part, rows_R, len(rows))
    return {name: totals for name, totals in blocks.items() if totals and totals[0] is not None}

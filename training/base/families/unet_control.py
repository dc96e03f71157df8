"""ControlNets of the families with a UNet. Source: diffusers' StableDiffusionControlNetPipeline, and XL's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base.controls import differing, load_network, scattered, steered_rows
from training.base.family import Parts, RowFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# what a ControlNet has of its UNet: the residuals that it makes must be as the UNet's own
ALIKE = (
    "in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip


class UnetControls:
    """See `Controls`; `unet` is the config of the base's UNet."""

    def __init__(self, unet: Mapping[str, Any], title: str, cell_px: int) -> None:
        self._unet, self._title, self._cell_px = unet, title, cell_px

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """See `Controls`."""
        kind = config.get("_class_name")
        if kind != "ControlNetModel":
            return f"it is a {kind}, and {self._title} takes a ControlNetModel"
        if found := differing({"in_channels": 4, "layers_per_block": 2} | dict(config), self._defaults(), ALIKE):
            return found
        if config.get("conditioning_channels", 3) != 3:
            return f"it reads {config['conditioning_channels']} channels, and pictures have 3"
        px = 2 ** (len(config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)) - 1)
        if px != self._cell_px:
            return f"it makes a latent cell of {px} pixels a side, and the base of {self._cell_px}"
        if config.get("global_pool_conditions"):
            return "it asks for guess mode (`global_pool_conditions`), which is not served"
        return None

    def _defaults(self) -> dict[str, Any]:
        return {"in_channels": 4, "layers_per_block": 2} | dict(self._unet)

    def load(self, folder: Path, dtype: "torch.dtype") -> "nn.Module":
        """See `Controls`."""
        from diffusers import ControlNetModel

        return load_network(ControlNetModel, folder, dtype)

    def hint(self, parts: Parts, network: "nn.Module", pixels_3HW: "Tensor") -> "Tensor":
        """See `Controls`: the picture from 0 to 1, [3, H, W]."""
        return pixels_3HW.to(parts.device, parts.dtype) / 255


def unet_residuals(
    rows: Sequence[RowFacts], x_NCHW: "Tensor", times_N: "Tensor", states_NLC: "Tensor", added: Mapping[str, "Tensor"]
) -> dict[str, Any]:
    """What the rows' ControlNets add, as arguments of the UNet; none where no row has one."""
    down: list[Tensor | None] = []
    mid: Tensor | None = None
    for network, rows_R, hints_R, scales_R in steered_rows(rows, x_NCHW):
        own = {name: part[rows_R] for name, part in added.items()}
        parts, middle = network(
            x_NCHW[rows_R],
            times_N[rows_R],
            encoder_hidden_states=states_NLC[rows_R],
            controlnet_cond=hints_R,
            conditioning_scale=scales_R.view(-1, 1, 1, 1),
            added_cond_kwargs=own or None,
            return_dict=False,
        )
        down = [
            scattered(total, part, rows_R, len(rows))
            for total, part in zip(down or [None] * len(parts), parts, strict=True)
        ]
        mid = scattered(mid, middle, rows_R, len(rows))
    if mid is None:
        return {}
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}

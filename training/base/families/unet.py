"""What the families with a UNet and an AutoencoderKL share: facts from their configs, checks, loading, features."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base.facts import Facts, check_class
from training.base.family import KNOWN, Cond
from training.base.files.weights import check_channels, load_model
from training.base.footprint import DRAWN_BYTES, PIXEL_BYTES, TRAINED_BYTES
from training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCHEDULER = "scheduler/scheduler_config.json"
UNET_BLOCKS = r"(down|up)_blocks_\d+_(attentions|resnets|downsamplers|upsamplers)_|mid_block_|unet_\d+_(down|up)$"
# layers of an adapter that has the names of a UNet, but is for Stable Diffusion XL
XL_ONLY = (
    r"text_encoder_2_|lora_te2_|(attentions_\d+|(input|output)_blocks_\d+_1|middle_block_1)_transformer_blocks_[1-9]"
    r"|(input|output)_blocks_\d+_|middle_block_|add_embedding_"
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_LAYERS = (
    *ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
)  # fmt: skip


def unet_facts(unet: dict[str, Any], vae: dict[str, Any], **others: Any) -> Facts:
    """The facts that follow from the configs of UNet and VAE, completed or replaced by `others`."""
    cell_px = 2 ** (len(vae["block_out_channels"]) - 1)
    width = unet["block_out_channels"][0]
    latents = vae.get("latent_channels", 4)
    inpaints = unet.get("in_channels", 4) == 2 * latents + 1
    found: dict[str, Any] = {
        "denoiser": "unet",
        "channels": latents,
        "inpaints": inpaints,
        "cell_px": cell_px,
        "multiple_px": cell_px * 2 ** (len(unet["block_out_channels"]) - 1),
        "resolution": unet["sample_size"] * cell_px,
        "emphasis": True,
        "targets": ATTENTION,
        "layers": UNET_LAYERS,
        "trained_bytes": TRAINED_BYTES * width,
        "drawn_bytes": DRAWN_BYTES * width,
        "pixel_bytes": PIXEL_BYTES * vae["block_out_channels"][0],
    }
    return Facts(**(found | others))


def check_unet(
    name: str, folder: Path, unet: dict[str, Any], vae: dict[str, Any], conditions: Sequence[str], title: str
) -> None:
    """Raises UserError for configs of other classes, without sizes, or with one of the settings `conditions`.

    `conditions` are settings by which a UNet asks for inputs that the family `title` does not have. Whether it may ask
    for a mask and a picture is told by the pipeline that `folder` names.
    """
    check_class(name, "unet", unet, "UNet2DConditionModel")
    check_class(name, "vae", vae, "AutoencoderKL")
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    pipeline = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name", "")
    if not (str(pipeline).endswith("InpaintPipeline") and channels == 2 * latents + 1):
        check_channels(name, channels, latents)
    asked = next((key for key in conditions if unet.get(key) is not None), None)
    if asked is not None:
        raise UserError(
            f"Base '{name}' cannot be trained: its UNet has `{asked}: {unet[asked]}`, so it asks for more than a "
            f"text-to-image base of {title} does. Take one of these."
        )
    for component, config, key in (
        ("unet", unet, "sample_size"),
        ("unet", unet, "block_out_channels"),
        ("vae", vae, "block_out_channels"),
    ):
        if not config.get(key):
            raise UserError(f"Base '{name}': {component}/config.json has no `{key}`. Give a whole diffusers folder.")


def check_width(name: str, unet: dict[str, Any], written: int) -> None:
    """Raises UserError unless the UNet reads prompts of the width that the text encoders write."""
    read = unet.get("cross_attention_dim", 1280)
    if read != written:
        raise UserError(
            f"Base '{name}': its UNet reads prompts of width {read}, and its text encoder writes {written}. The two "
            "are of different models."
        )


def load_unet(folder: Path, device: "torch.device", dtype: "torch.dtype", quantized: Mapping[str, Any]) -> Any:
    """The UNet, with the attention that is fastest on the device."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = load_model(UNet2DConditionModel, folder, "unet", dtype, quantized)
    if device.type == "cpu" and dtype == torch.bfloat16:
        # fused attention's backward is slow on a CPU in bf16: plain attention makes a pack 1.6 times as fast
        unet.set_attn_processor(AttnProcessor())
    return unet


def with_known(x_NCHW: "Tensor", conds: Sequence[Cond], grey: Callable[[], "Tensor"]) -> "Tensor":
    """The input [N, 2 C + 1, h, w] of an inpainting UNet: what the rows' records know, else that all is to be drawn.

    `grey` gives the latents [C, h, w] of a grey picture of this size.
    """
    import torch

    known = [cond.get(KNOWN) for cond in conds]
    if any(one is None for one in known):
        grey_CHW = grey().to(x_NCHW)
        nothing = torch.cat([torch.ones_like(grey_CHW[:1]), grey_CHW])
        known = [nothing if one is None else one for one in known]
    return torch.cat([x_NCHW, torch.stack([one.to(x_NCHW) for one in known if one is not None])], dim=1)


def unet_features(unet: Any, predict: Callable[[], object]) -> "Tensor":
    """What the UNet's second block on the way up gives during `predict` (DIFT, Tang et al. 2023)."""
    held: list[Tensor] = []
    block = unet.up_blocks[min(1, len(unet.up_blocks) - 1)]
    hook = block.register_forward_hook(lambda _module, _inputs, output: held.append(output))
    try:
        predict()
    finally:
        hook.remove()
    return held[0]

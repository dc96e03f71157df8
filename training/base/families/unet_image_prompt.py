"""IP-Adapters of the families with a UNet: plain ones, of four tokens, and those with a resampler ("plus").

Source: diffusers' `load_ip_adapter` of StableDiffusionPipeline, and XL's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base.family import Parts
from training.base.files.weights import read_header
from training.base.image_prompts import ImagePrompt
from training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ENCODER = "image_encoder"
# CLIP's, which diffusers' feature extractor has whatever the encoder's own config says
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class UnetImagePrompts:
    """See `ImagePrompts`; `unet` is the config of the base's UNet."""

    def __init__(self, unet: Mapping[str, Any]) -> None:
        self._width = unet.get("cross_attention_dim", 1280)

    def load(self, folder: Path, dtype: "torch.dtype") -> "nn.Module":
        """See `ImagePrompts`."""
        import torch
        from diffusers import UNet2DConditionModel
        from safetensors.torch import load_file
        from transformers import CLIPVisionModelWithProjection

        file = _file_of(folder)
        tensors: dict[str, Tensor] = load_file(file)
        projection = {key.removeprefix("image_proj."): one for key, one in tensors.items() if "image_proj." in key}
        if "proj.weight" not in projection and "latents" not in projection:
            raise UserError(f"'{file.name}' is of a kind that is not served: plain ones and those called plus are.")
        encoder = CLIPVisionModelWithProjection.from_pretrained(folder / ENCODER, dtype=dtype, use_safetensors=True)
        convert: Any = UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers
        made = torch.nn.Module()
        made.encoder = encoder
        made.projection = convert(None, projection, low_cpu_mem_usage=False).to(dtype)
        for name in ("k", "v"):
            found = {key: one for key, one in tensors.items() if key.endswith(f".to_{name}_ip.weight")}
            wanted = sorted(found, key=lambda key: int(key.split(".")[1]))
            weights = torch.nn.ParameterList([found[key].to(dtype) for key in wanted])
            made.register_module(name, weights)
        self._check(file, made)
        return made.requires_grad_(False).eval()

    def _check(self, file: Path, made: Any) -> None:
        """Raises UserError unless the adapter reads tokens of the base's width."""
        if not len(made.k) or len(made.k) != len(made.v):
            raise UserError(f"'{file.name}' has {len(made.k)} keys and {len(made.v)} values. Download it again.")
        if made.k[0].shape[1] != self._width:
            raise UserError(
                f"'{file.name}' is for another base: it reads tokens of width {made.k[0].shape[1]}, and this base's "
                f"are {self._width} wide."
            )

    def said(
        self, parts: Parts, adapter: "nn.Module", pixels_3HW: "Tensor", scale: float
    ) -> tuple[ImagePrompt, ImagePrompt]:
        """See `ImagePrompts`."""
        import torch

        made: Any = adapter
        widths = [attention.to_q.weight.shape[0] for attention in cross_attentions(parts.models["unet"])]
        theirs = [weight.shape[0] for weight in made.k]
        if widths != theirs:
            raise UserError(
                f"The IP-Adapter is for another base: it has {len(theirs)} layers of widths {sorted(set(theirs))}, and "
                f"the base has {len(widths)} of {sorted(set(widths))}."
            )
        picture_3HW = _prepared(pixels_3HW, made.encoder.config.image_size).to(parts.device, parts.dtype)
        pictures_23HW = torch.stack([picture_3HW, torch.zeros_like(picture_3HW)])
        if hasattr(made.projection, "latents"):
            embeds = made.encoder(pictures_23HW, output_hidden_states=True).hidden_states[-2]
        else:  # no picture is no embedding, not that of a black picture
            embeds = made.encoder(pictures_23HW[:1]).image_embeds
            embeds = torch.cat([embeds, torch.zeros_like(embeds)])
        tokens_2TD = made.projection(embeds)
        found, blank = (
            ImagePrompt(
                keys=tuple(tokens_TD @ weight.T for weight in made.k),
                values=tuple(tokens_TD @ weight.T for weight in made.v),
                scale=scale,
            )
            for tokens_TD in tokens_2TD
        )
        return found, blank


def cross_attentions(unet: Any) -> list[Any]:
    """The attentions that read the prompt, in the order of adapters' files."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [unet.get_submodule(name) for name in names if name.endswith("attn2")]


def _file_of(folder: Path) -> Path:
    """The one file of weights beside the image encoder."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        said = ", ".join(file.name for file in files) or "none"
        raise UserError(f"its folder must hold one safetensors file beside {ENCODER}/, and holds {said}.")
    read_header(files[0])
    return files[0]


def _prepared(pixels_3HW: "Tensor", side: int) -> "Tensor":
    """A picture as CLIP takes it, [3, side, side]: the middle square, normalised."""
    import torch
    from torch.nn import functional

    pixels = pixels_3HW.float()
    _, height, width = pixels.shape
    if min(height, width) != side:
        size = [max(side, round(one * side / min(height, width))) for one in (height, width)]
        pixels = functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].round().clamp(0, 255)
        _, height, width = pixels.shape
    top, left = (height - side) // 2, (width - side) // 2
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels[:, top : top + side, left : left + side] / 255 - mean) / std

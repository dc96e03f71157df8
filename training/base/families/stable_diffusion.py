"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP, an AutoencoderKL, DDPM noise with epsilon or v prediction.

torch is imported inside: planning reads the facts without it. Source: diffusers' StableDiffusionPipeline.
"""

import json
from collections.abc import Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.base.facts import Facts
from training.base.family import Cond, Parts, RowFacts, Words
from training.base.folder import read_config
from training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from training.base.ddpm import Ddpm
    from training.base.process import Size

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
UNET_LAYERS = (
    *ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
)  # fmt: skip
CLIP_LAYERS = (*CLIP_ATTENTION, "fc1", "fc2")
# measured on SD 1.x at 512 px in 16 bit without checkpointing: 0.97 GiB of saved activations a row
ACTIVATION_BYTES = 0.97 * 2**30 / (320 * 64 * 64)


class StableDiffusion:
    """See `Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        unet, vae, text = (read_config(folder, part) for part in ("unet", "vae", "text_encoder"))
        if unet["in_channels"] != vae["latent_channels"]:
            raise UserError(
                f"The UNet in '{folder}' takes {unet['in_channels']} channels, not the VAE's {vae['latent_channels']}: "
                "an inpainting or depth variant, which is not trained or served. Use the base it was made from."
            )
        cell_px = 2 ** (len(vae["block_out_channels"]) - 1)
        self._scale: float = vae.get("scaling_factor", 0.18215)
        self.facts = Facts(
            family="stable-diffusion",
            denoiser="unet",
            text_encoders=("text_encoder",),
            channels=unet["in_channels"],
            cell_px=cell_px,
            multiple_px=cell_px * 2 ** (len(unet["block_out_channels"]) - 1),
            resolution=unet["sample_size"] * cell_px,
            targets=ATTENTION,
            text_targets=CLIP_ATTENTION,
            layers=UNET_LAYERS,
            text_layers=CLIP_LAYERS,
            activation_bytes=ACTIVATION_BYTES * unet["block_out_channels"][0] * unet["sample_size"] ** 2,
            word_widths=(text["hidden_size"],),
        )

    @cached_property
    def process(self) -> "Ddpm":
        """The noise process of the base's scheduler config."""
        from training.base.ddpm import Ddpm

        config: dict[str, Any] = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        return Ddpm(config)

    def load(self, device: "torch.device", dtype: "torch.dtype") -> Parts:
        """See `Family`."""
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor
        from transformers import CLIPTextModel, CLIPTokenizer

        models = {
            "unet": UNet2DConditionModel.from_pretrained(self.folder / "unet", torch_dtype=dtype),
            "vae": AutoencoderKL.from_pretrained(self.folder / "vae", torch_dtype=dtype),
            "text_encoder": CLIPTextModel.from_pretrained(self.folder / "text_encoder", torch_dtype=dtype),
        }
        if device.type == "cpu" and dtype == torch.bfloat16:
            # fused attention's backward is slow on a CPU in bf16: plain attention makes a pack 1.6 times as fast
            models["unet"].set_attn_processor(AttnProcessor())
        tokenizers = {"text_encoder": CLIPTokenizer.from_pretrained(self.folder / "tokenizer")}
        return Parts(models, tokenizers, device, dtype)

    def encode(self, parts: Parts, prompts: Sequence[str], words: Sequence[Words] | None = None) -> list[Cond]:
        """`states` [L, C]: CLIP's last hidden states."""
        from training.base.words import replacing, tokenise

        encoder: Any = parts.models["text_encoder"]
        made = tokenise(parts.tokenizers["text_encoder"], prompts, words or [{}] * len(prompts))
        with replacing(encoder.get_input_embeddings(), made.places):
            states_NLC = encoder(made.ids.to(parts.device))[0]
        return [{"states": states_LC} for states_LC in states_NLC]

    def to_latents(self, parts: Parts, pixels_N3HW: "Tensor") -> tuple["Tensor", "Tensor"]:
        """See `Family`; scaled by the VAE's factor."""
        vae: Any = parts.models["vae"]
        posterior = vae.encode(pixels_N3HW).latent_dist
        return posterior.mean * self._scale, posterior.std * self._scale

    def to_pixels(self, parts: Parts, latents_NCHW: "Tensor") -> "Tensor":
        """See `Family`."""
        vae: Any = parts.models["vae"]
        pixels_N3HW: Tensor = vae.decode(latents_NCHW / self._scale).sample
        return pixels_N3HW

    def predict(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """See `Family`."""
        import torch

        unet: Any = parts.models["unet"]
        states_NLC = torch.stack([cond["states"] for cond in conds])
        output_NCHW: Tensor = unet(x_NCHW, times_N, encoder_hidden_states=states_NLC).sample
        return output_NCHW

    def together(self, size: "Size", cond: Cond) -> Hashable:
        """Rows of one size whose prompts take as many tokens."""
        return size, cond["states"].shape[0]

    def features(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """The UNet's second block on the way up (DIFT, Tang et al. 2023)."""
        unet: Any = parts.models["unet"]
        held: list[Tensor] = []
        block = unet.up_blocks[min(1, len(unet.up_blocks) - 1)]
        hook = block.register_forward_hook(lambda _module, _inputs, output: held.append(output))
        try:
            self.predict(parts, x_NCHW, times_N, conds, rows)
        finally:
            hook.remove()
        return held[0]

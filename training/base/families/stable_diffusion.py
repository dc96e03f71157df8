"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP, an AutoencoderKL, DDPM noise with epsilon or v prediction.

torch is imported inside: planning reads the facts without it. Source: diffusers' StableDiffusionPipeline.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.base.controls import Controls
from training.base.facts import check_files, read_config, with_defaults
from training.base.families.clip import CLIP_ATTENTION, CLIP_LAYERS, check_clip, emphasised, load_tokenizer, run_clip
from training.base.families.unet import (
    SCHEDULER,
    UNET_BLOCKS,
    XL_ONLY,
    check_unet,
    check_width,
    load_unet,
    unet_facts,
    unet_features,
    with_known,
)
from training.base.families.unet_control import UnetControls, unet_residuals
from training.base.families.unet_image_prompt import UnetImagePrompts, cross_attentions
from training.base.family import NOTHING, Cond, Parts, RowFacts, Wording, Words
from training.base.files.weights import load_model
from training.base.image_prompts import ImagePrompts, prompted
from training.base.originals import any_like

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from training.base.noise.ddpm import Ddpm
    from training.base.noise.process import Size

# settings of a UNet that ask for more than a timestep and a prompt
V2_WIDTH = 1024  # of the text encoder that 2.x reads; 1.x has 768
CONDITIONS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds")


class StableDiffusion:
    """See `Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
    title: ClassVar[str] = "Stable Diffusion 1.x and 2.x"

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        unet, vae, text = (read_config(folder, part) for part in ("unet", "vae", "text_encoder"))
        check_unet(name, folder, unet, vae, CONDITIONS, self.title)
        check_clip(name, folder, "text_encoder", text, "CLIPTextModel")
        check_width(name, unet, text.get("hidden_size", 512))
        check_files(name, folder, ((SCHEDULER,),))
        self._scale: float = vae.get("scaling_factor", 0.18215)
        facts = unet_facts(
            unet,
            vae,
            family="stable-diffusion",
            title=self.title,
            text_encoders=("text_encoder",),
            text_targets=CLIP_ATTENTION,
            text_layers=CLIP_LAYERS,
            prompt_tokens=text.get("max_position_embeddings", 77) - 2,
            word_widths=(text.get("hidden_size", 512),),
            **_label(unet, v=json.loads((folder / SCHEDULER).read_text()).get("prediction_type") == "v_prediction"),
        )
        self.facts = with_defaults(facts, folder)
        self.controls: Controls | None = UnetControls(unet, self.title, facts.cell_px)
        self.image_prompts: ImagePrompts | None = UnetImagePrompts(unet)

    @staticmethod
    def owns(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """See `Family`."""
        return any_like(shapes, UNET_BLOCKS) and not any_like(shapes, XL_ONLY)

    @cached_property
    def process(self) -> "Ddpm":
        """The noise process of the base's scheduler config."""
        from training.base.noise.ddpm import Ddpm

        config: dict[str, Any] = json.loads((self.folder / SCHEDULER).read_text(encoding="utf-8"))
        return Ddpm(config)

    def load(self, device: "torch.device", dtype: "torch.dtype", quantized: Mapping[str, Any] = NOTHING) -> Parts:
        """See `Family`."""
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel

        models = {
            "unet": load_unet(self.folder, device, dtype, quantized),
            "vae": load_model(AutoencoderKL, self.folder, "vae", dtype),
            "text_encoder": load_model(CLIPTextModel, self.folder, "text_encoder", dtype),
        }
        return Parts(models, {"text_encoder": self.tokenizer()}, device, dtype)

    def tokenizer(self) -> Any:
        """CLIP's."""
        return load_tokenizer(self.folder)

    def count_chunks(self, parts: Parts, prompt: Wording, words: Words) -> int:
        """See `Family`."""
        from training.base.words import count_chunks

        return count_chunks(parts.tokenizers["text_encoder"], prompt, words)

    def encode(
        self, parts: Parts, prompts: Sequence[Wording], words: Sequence[Words] | None = None, chunks: int = 1
    ) -> list[Cond]:
        """`states` [chunks x L, C]: CLIP's last hidden states, each chunk by itself, as A1111 and Compel do.

        Where a prompt has fewer chunks, what the empty prompt is encoded to fills it up.
        """
        import torch

        encoder, tokenizer = parts.models["text_encoder"], parts.tokenizers["text_encoder"]
        known = words or [{}] * len(prompts)
        made = []
        for chunk in range(chunks):
            output, weights_NL = run_clip(encoder, tokenizer, prompts, known, chunk, parts.device)
            made.append(emphasised(output[0], weights_NL))
        return [{"states": states_LC} for states_LC in torch.cat(made, dim=1)]

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
        residuals = unet_residuals(rows, x_NCHW, times_N, states_NLC, {})
        if self.facts.inpaints:
            x_NCHW = with_known(x_NCHW, conds, lambda: self._grey(parts, x_NCHW))
        with prompted(lambda: cross_attentions(unet), rows):
            output_NCHW: Tensor = unet(x_NCHW, times_N, encoder_hidden_states=states_NLC, **residuals).sample
        return output_NCHW

    def _grey(self, parts: Parts, like_NCHW: "Tensor") -> "Tensor":
        """The latents [C, h, w] of a grey picture of the size of these."""
        height, width = (side * self.facts.cell_px for side in like_NCHW.shape[2:])
        grey_13HW = like_NCHW.new_zeros(1, 3, height, width).to(next(parts.models["vae"].parameters()).dtype)
        return self.to_latents(parts, grey_13HW)[0][0]

    def together(self, size: "Size", cond: Cond) -> Hashable:
        """Rows of one size whose prompts take as many tokens."""
        return size, cond["states"].shape[0]

    def features(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """The UNet's second block on the way up."""
        return unet_features(parts.models["unet"], lambda: self.predict(parts, x_NCHW, times_N, conds, rows))


def _label(unet: dict[str, Any], *, v: bool) -> dict[str, str]:
    """What other programs call it; 2.x has another text encoder than 1.x."""
    second = unet.get("cross_attention_dim") == V2_WIDTH
    version = ("v2-768-v" if v else "v2-512") if second else "v1"
    kohya_base = f"sd_v{2 if second else 1}{'_v' if v else ''}"
    return {
        "architecture": f"stable-diffusion-{version}",
        "kohya_base": kohya_base,
        "prediction": "v" if v else "epsilon",
    }

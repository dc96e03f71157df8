"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP, an AutoencoderKL, DDPM noise with epsilon or v prediction.

torch is imported inside: planning reads the facts without it. Source: diffusers' StableDiffusionPipeline.
"""

import json
from collections.abc import Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.base.facts import Facts, check_class, check_files, read_config, with_defaults
from training.base.family import Cond, Parts, RowFacts, Words
from training.base.files.weights import check_channels, load_model
from training.base.footprint import DRAWN_BYTES, PIXEL_BYTES, TRAINED_BYTES
from training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from training.base.noise.ddpm import Ddpm
    from training.base.noise.process import Size

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
UNET_LAYERS = (
    *ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
)  # fmt: skip
CLIP_LAYERS = (*CLIP_ATTENTION, "fc1", "fc2")
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZERS = (("tokenizer/tokenizer.json",), ("tokenizer/vocab.json", "tokenizer/merges.txt"))
# settings of a UNet that ask for more than a timestep and a prompt
CONDITIONS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds")


class StableDiffusion:
    """See `Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    title: ClassVar[str] = "Stable Diffusion 1.x and 2.x"

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        unet, vae, text = (read_config(folder, part) for part in ("unet", "vae", "text_encoder"))
        _check(name, unet, vae, text)
        check_files(name, folder, ((SCHEDULER,),), TOKENIZERS)
        cell_px = 2 ** (len(vae["block_out_channels"]) - 1)
        width = unet["block_out_channels"][0]
        self._scale: float = vae.get("scaling_factor", 0.18215)
        facts = Facts(
            family="stable-diffusion",
            denoiser="unet",
            text_encoders=("text_encoder",),
            channels=unet.get("in_channels", 4),
            cell_px=cell_px,
            multiple_px=cell_px * 2 ** (len(unet["block_out_channels"]) - 1),
            resolution=unet["sample_size"] * cell_px,
            targets=ATTENTION,
            text_targets=CLIP_ATTENTION,
            layers=UNET_LAYERS,
            text_layers=CLIP_LAYERS,
            trained_bytes=TRAINED_BYTES * width,
            drawn_bytes=DRAWN_BYTES * width,
            pixel_bytes=PIXEL_BYTES * vae["block_out_channels"][0],
            prompt_tokens=text.get("max_position_embeddings", 77) - 2,
            word_widths=(text.get("hidden_size", 512),),
        )
        self.facts = with_defaults(facts, folder)

    @cached_property
    def process(self) -> "Ddpm":
        """The noise process of the base's scheduler config."""
        from training.base.noise.ddpm import Ddpm

        config: dict[str, Any] = json.loads((self.folder / SCHEDULER).read_text(encoding="utf-8"))
        return Ddpm(config)

    def load(self, device: "torch.device", dtype: "torch.dtype") -> Parts:
        """See `Family`."""
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor
        from transformers import CLIPTextModel

        kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        models = {component: load_model(kind, self.folder, component, dtype) for component, kind in kinds.items()}
        if device.type == "cpu" and dtype == torch.bfloat16:
            # fused attention's backward is slow on a CPU in bf16: plain attention makes a pack 1.6 times as fast
            models["unet"].set_attn_processor(AttnProcessor())
        return Parts(models, {"text_encoder": self.tokenizer()}, device, dtype)

    def tokenizer(self) -> Any:
        """CLIP's."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer")

    def count_chunks(self, parts: Parts, prompt: str, words: Words) -> int:
        """See `Family`."""
        from training.base.words import count_chunks

        return count_chunks(parts.tokenizers["text_encoder"], prompt, words)

    def encode(
        self, parts: Parts, prompts: Sequence[str], words: Sequence[Words] | None = None, chunks: int = 1
    ) -> list[Cond]:
        """`states` [chunks x L, C]: CLIP's last hidden states, each chunk by itself, as A1111 and Compel do.

        Where a prompt has fewer chunks, what the empty prompt is encoded to fills it up.
        """
        import torch

        from training.base.words import replacing, tokenise

        encoder: Any = parts.models["text_encoder"]
        known = words or [{}] * len(prompts)
        made: list[Tensor] = []
        for chunk in range(chunks):
            tokens = tokenise(parts.tokenizers["text_encoder"], prompts, known, chunk)
            with replacing(encoder.get_input_embeddings(), tokens.places):
                made.append(encoder(tokens.ids.to(parts.device))[0])
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


def _check(name: str, unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> None:
    """Raises UserError for configs of what is not trained or served here."""
    check_class(name, "unet", unet, "UNet2DConditionModel")
    check_class(name, "vae", vae, "AutoencoderKL")
    kinds = text.get("architectures") or ["CLIPTextModel"]
    if kinds != ["CLIPTextModel"]:
        raise UserError(f"Base '{name}': its text_encoder is a {', '.join(kinds)}; supported is CLIPTextModel.")
    check_channels(name, unet.get("in_channels", 4), vae.get("latent_channels", 4))
    asked = next((key for key in CONDITIONS if unet.get(key) is not None), None)
    if asked is not None:
        raise UserError(
            f"Base '{name}' cannot be trained: its UNet has `{asked}: {unet[asked]}`, so it asks for more than a "
            "timestep and a prompt. Take a text-to-image base of Stable Diffusion 1.x or 2.x."
        )
    for component, config, key in (
        ("unet", unet, "sample_size"),
        ("unet", unet, "block_out_channels"),
        ("vae", vae, "block_out_channels"),
    ):
        if not config.get(key):
            raise UserError(f"Base '{name}': {component}/config.json has no `{key}`. Give a whole diffusers folder.")
    widths = unet.get("cross_attention_dim", 1280), text.get("hidden_size", 512)
    if widths[0] != widths[1]:
        raise UserError(
            f"Base '{name}': its UNet reads prompts of width {widths[0]}, and its text encoder writes {widths[1]}. The "
            "two are of different models."
        )

"""Stable Diffusion XL and bases of its shape: a UNet that is told sizes, two CLIPs, an AutoencoderKL, DDPM noise.

torch is imported inside: planning reads the facts without it. Sources: diffusers' StableDiffusionXLPipeline; Podell et
al. 2023 (sizes and crops as inputs).
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.base.controls import Controls
from training.base.facts import SamplerName, check_files, read_config, with_defaults
from training.base.families.clip import CLIP_ATTENTION, CLIP_LAYERS, check_clip, emphasised, load_tokenizer, run_clip
from training.base.families.sgm import sgm_originals
from training.base.families.unet import (
    SCHEDULER,
    UNET_LAYERS,
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
from training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from training.base.noise.ddpm import Ddpm
    from training.base.noise.process import Size

CONDITIONS = ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds")  # inputs that only other UNets take
IDS = 6  # the photo's height and width, the crop's top and left, the picture's height and width
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
ENCODERS = tuple(TOKENIZERS)
# of a row that trains, per width and cell, in 16 bit: measured with the released size at 256 px in bf16 on a CPU; twice
# that of 1.x, as most of its layers are where cells are few but wide
XL_TRAINED_BYTES = 700e6 / (320 * 32**2)
SAMPLERS: dict[str, SamplerName] = {  # of the scheduler class that a base names
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpm++_2m",
}


class StableDiffusionXL:
    """See `Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline")
    title: ClassVar[str] = "Stable Diffusion XL"

    def __init__(self, folder: Path, name: str) -> None:
        unet, vae, *texts = (read_config(folder, part) for part in ("unet", "vae", *ENCODERS))
        _check(name, folder, unet, vae, texts)
        self.folder = folder
        self._upcast: bool = vae.get("force_upcast", True)
        self._scale: float = vae.get("scaling_factor", 0.18215)
        self._mean_C, self._std_C = vae.get("latents_mean"), vae.get("latents_std")
        # the pipeline's own default; for bases that were trained with zeros in place of a prompt
        self._zeros: bool = _read(folder / "model_index.json").get("force_zeros_for_empty_prompt", True)
        self._scheduler = _read(folder / SCHEDULER)
        facts = unet_facts(
            unet,
            vae,
            family="stable-diffusion-xl",
            title=self.title,
            architecture="stable-diffusion-xl-v1-base",
            kohya_base="sdxl_base_v1-0",
            prediction="v" if self._scheduler.get("prediction_type") == "v_prediction" else "epsilon",
            originals=sgm_originals,
            text_encoders=ENCODERS,
            text_targets=CLIP_ATTENTION,
            layers=(*UNET_LAYERS, "add_embedding.linear_1", "add_embedding.linear_2"),
            text_layers=(*CLIP_LAYERS, "text_projection"),
            trained_bytes=XL_TRAINED_BYTES * unet["block_out_channels"][0],
            prompt_tokens=texts[0].get("max_position_embeddings", 77) - 2,
            word_widths=tuple(text["hidden_size"] for text in texts),
            guidance_scale=5.0,
            sampler=SAMPLERS.get(str(self._scheduler.get("_class_name")), "euler"),
        )
        self.facts = with_defaults(facts, folder)
        self.controls: Controls | None = UnetControls(unet, self.title, facts.cell_px)
        self.image_prompts: ImagePrompts | None = UnetImagePrompts(unet)

    @staticmethod
    def owns(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """See `Family`."""
        return any_like(shapes, XL_ONLY)

    @cached_property
    def process(self) -> "Ddpm":
        """The noise process of the base's scheduler config."""
        from training.base.noise.ddpm import Ddpm

        # what Euler's configs do not say and DDIM would otherwise take its own default for
        return Ddpm({"clip_sample": False, "set_alpha_to_one": False} | self._scheduler, forced={"clip_sample": False})

    def load(self, device: "torch.device", dtype: "torch.dtype", quantized: Mapping[str, Any] = NOTHING) -> Parts:
        """See `Family`. The VAE overflows in fp16, unless its config says that it does not: it is in fp32 then."""
        import torch
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        vae_dtype = torch.float32 if dtype == torch.float16 and self._upcast else dtype
        models = {
            "unet": load_unet(self.folder, device, dtype, quantized),
            "vae": load_model(AutoencoderKL, self.folder, "vae", vae_dtype),
            "text_encoder": load_model(CLIPTextModel, self.folder, "text_encoder", dtype),
            "text_encoder_2": load_model(CLIPTextModelWithProjection, self.folder, "text_encoder_2", dtype),
        }
        tokenizers = {encoder: load_tokenizer(self.folder, place) for encoder, place in TOKENIZERS.items()}
        return Parts(models, tokenizers, device, dtype)

    def tokenizer(self) -> Any:
        """CLIP's; both encoders' have the same tokens."""
        return load_tokenizer(self.folder)

    def count_chunks(self, parts: Parts, prompt: Wording, words: Words) -> int:
        """See `Family`."""
        from training.base.words import count_chunks

        return count_chunks(parts.tokenizers["text_encoder"], prompt, words)

    def encode(
        self, parts: Parts, prompts: Sequence[Wording], words: Sequence[Words] | None = None, chunks: int = 1
    ) -> list[Cond]:
        """`states` [chunks x L, C]: both encoders' last hidden states but one; `pooled` [P] of the first chunk.

        The empty prompt is zeros where the base asks for it, as the pipeline has it without a negative prompt. Where a
        prompt has fewer chunks, what the empty text is encoded to fills it up.
        """
        import torch

        known = words or [{}] * len(prompts)
        own = [[self._of_encoder(index, found) for found in known] for index in range(len(ENCODERS))]
        made, pooled_NP = [], torch.empty(0)
        for chunk in range(chunks):
            outputs = [
                run_clip(
                    parts.models[name], parts.tokenizers[name], prompts, own[index], chunk, parts.device, hidden=True
                )
                for index, name in enumerate(ENCODERS)
            ]
            states = [emphasised(output.hidden_states[-2], weights_NL) for output, weights_NL in outputs]
            made.append(torch.cat(states, dim=-1))
            if chunk == 0:
                pooled_NP = outputs[-1][0].text_embeds
        conds = zip(prompts, torch.cat(made, dim=1), pooled_NP, strict=True)
        return [self._cond(prompt, states_LC, pooled_P) for prompt, states_LC, pooled_P in conds]

    def _cond(self, prompt: Wording, states_LC: "Tensor", pooled_P: "Tensor") -> Cond:
        if self._zeros and not str(prompt).strip():
            states_LC, pooled_P = states_LC.new_zeros(states_LC.shape), pooled_P.new_zeros(pooled_P.shape)
        return {"states": states_LC, "pooled": pooled_P}

    def _of_encoder(self, index: int, words: Words) -> Words:
        """The part of each word's vectors that one encoder reads."""
        start = sum(self.facts.word_widths[:index])
        return {
            word: vectors_VD[:, start : start + self.facts.word_widths[index]] for word, vectors_VD in words.items()
        }

    def to_latents(self, parts: Parts, pixels_N3HW: "Tensor") -> tuple["Tensor", "Tensor"]:
        """See `Family`; scaled by the VAE's factor, and by its channels' statistics where it has them."""
        vae: Any = parts.models["vae"]
        posterior = vae.encode(pixels_N3HW).latent_dist
        shift, scale = self._statistics(pixels_N3HW)
        return (posterior.mean - shift) * scale, posterior.std * scale

    def to_pixels(self, parts: Parts, latents_NCHW: "Tensor") -> "Tensor":
        """See `Family`."""
        vae: Any = parts.models["vae"]
        shift, scale = self._statistics(latents_NCHW)
        pixels_N3HW: Tensor = vae.decode(latents_NCHW / scale + shift).sample
        return pixels_N3HW

    def _statistics(self, like: "Tensor") -> tuple["Tensor | float", "Tensor | float"]:
        """Shift and scale, numbers or [C, 1, 1], from the VAE's space to the one that noise is added in."""
        if self._mean_C is None or self._std_C is None:
            return 0.0, self._scale
        mean_C11, std_C11 = (like.new_tensor(values)[:, None, None] for values in (self._mean_C, self._std_C))
        return mean_C11, self._scale / std_C11

    def predict(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """See `Family`. A drawn picture is its own photo, uncropped."""
        import torch

        from training.base.transfer import constant

        unet: Any = parts.models["unet"]
        size = (x_NCHW.shape[2] * self.facts.cell_px, x_NCHW.shape[3] * self.facts.cell_px)
        ids = tuple(side for row in rows for side in (*(row.original_px or size), *(row.crop_px or (0, 0)), *size))
        added = {
            "text_embeds": torch.stack([cond["pooled"] for cond in conds]),
            "time_ids": constant(ids, torch.float32, x_NCHW.device).view(len(rows), -1),
        }
        states_NLC = torch.stack([cond["states"] for cond in conds])
        residuals = unet_residuals(rows, x_NCHW, times_N, states_NLC, added)
        if self.facts.inpaints:
            x_NCHW = with_known(x_NCHW, conds, lambda: self._grey(parts, x_NCHW))
        with prompted(lambda: cross_attentions(unet), rows):
            output_NCHW: Tensor = unet(
                x_NCHW, times_N, encoder_hidden_states=states_NLC, added_cond_kwargs=added, **residuals
            ).sample
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


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _check(name: str, folder: Path, unet: dict[str, Any], vae: dict[str, Any], texts: Sequence[dict[str, Any]]) -> None:
    """Raises UserError for configs of what is not trained or served here."""
    check_unet(name, folder, unet, vae, CONDITIONS, StableDiffusionXL.title)
    kinds = ("CLIPTextModel", "CLIPTextModelWithProjection")
    for component, config, kind in zip(ENCODERS, texts, kinds, strict=True):
        check_clip(name, folder, component, config, kind, TOKENIZERS[component])
        if not config.get("hidden_size"):
            raise UserError(f"Base '{name}': {component}/config.json has no `hidden_size`. Give a whole folder.")
    check_width(name, unet, sum(text["hidden_size"] for text in texts))
    check_files(name, folder, ((SCHEDULER,),))
    embedding = unet.get("addition_embed_type")
    if embedding != "text_time":
        raise UserError(
            f"Base '{name}': its UNet has `addition_embed_type: {embedding}`, and SDXL's is 'text_time'. "
            "Take a text-to-image base of that kind."
        )
    pooled, each = texts[1].get("projection_dim", 1280), unet.get("addition_time_embed_dim") or 0
    asked = unet.get("projection_class_embeddings_input_dim")
    if asked != IDS * each + pooled:
        raise UserError(
            f"Base '{name}': its UNet takes {asked} values of pooled prompt and sizes, and would get "
            f"{IDS * each + pooled}: {pooled} of the prompt and {IDS} x {each}. A refiner is such a base: take the one "
            "that it refines."
        )

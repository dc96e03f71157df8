"""diffusers' own pipelines and training scripts, called one way whatever their family: what ours must equal."""

from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from torch import Tensor

from training.base.family import Cond, RowFacts

Unet = StableDiffusionPipeline | StableDiffusionXLPipeline


def call(pipeline: Any, prompt: str, negative: str = "", guidance: float = 3.0, **changes: Any) -> Any:
    """What the pipeline draws, at 16 px in four steps unless `changes` says else; latents, in the model's space.

    `guidance` as everybody means it. Raises ValueError for a negative prompt that the pipeline does not take.
    """
    settings: dict[str, Any] = {
        "prompt": prompt, "num_inference_steps": 4, "height": 16, "width": 16, "output_type": "latent", **changes,
    }  # fmt: skip
    if isinstance(pipeline, ZImagePipeline):
        settings |= {"negative_prompt": negative, "guidance_scale": guidance - 1, "max_sequence_length": 128}
        return pipeline(**settings).images
    if isinstance(pipeline, Unet):
        return pipeline(**settings, negative_prompt=negative or None, guidance_scale=guidance).images
    if negative:
        raise ValueError("this pipeline takes no negative prompt")
    made = pipeline(**settings, guidance_scale=guidance).images
    if settings["output_type"] != "latent":
        return made
    if isinstance(pipeline, FluxPipeline):
        return FluxPipeline._unpack_latents(made, settings["height"], settings["width"], pipeline.vae_scale_factor)
    vae = pipeline.vae
    spread = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    return (Flux2KleinPipeline._patchify_latents(made) - vae.bn.running_mean.view(1, -1, 1, 1)) / spread


def as_noise(pipeline: Any, noise_NCHW: Tensor) -> Tensor:
    """First latents as the pipeline takes them."""
    if isinstance(pipeline, FluxPipeline):
        return FluxPipeline._pack_latents(noise_NCHW, *noise_NCHW.shape)
    return noise_NCHW


def takes_negative(pipeline: Any) -> bool:
    """Whether the pipeline can be told a negative prompt."""
    return isinstance(pipeline, (ZImagePipeline, StableDiffusionPipeline, StableDiffusionXLPipeline))


def script_loss(pipeline: Any, clean_CHW: Tensor, noise_CHW: Tensor, place: float, prompt: str, row: RowFacts) -> float:
    """The loss of one row in diffusers' DreamBooth script of the pipeline's family, unweighted."""
    clean, noise = clean_CHW[None], noise_CHW[None]
    if isinstance(pipeline, Unet):
        said, goal = _ddpm(pipeline, clean, noise, int(place), prompt, row)
    else:
        sigma = torch.tensor([place], dtype=clean.dtype)
        noisy = (1 - place) * clean + place * noise
        said = script_velocity(pipeline, pipeline.transformer, noisy, sigma, [_cond(pipeline, prompt)])
        goal = noise - clean
    return float(torch.nn.functional.mse_loss(said.float(), goal.float()))


def _ddpm(pipeline: Any, clean: Tensor, noise: Tensor, place: int, prompt: str, row: RowFacts) -> tuple[Tensor, Tensor]:
    """What train_dreambooth_lora.py and train_dreambooth_lora_sdxl.py compare."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    time = torch.tensor([place])
    found = pipeline.encode_prompt(
        prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    given: dict[str, Any] = {"encoder_hidden_states": found[0]}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        assert row.original_px is not None and row.crop_px is not None
        target = [side * pipeline.vae_scale_factor for side in clean.shape[2:]]
        ids = torch.tensor([[*row.original_px, *row.crop_px, *target]])
        given["added_cond_kwargs"] = {"text_embeds": found[2], "time_ids": ids}
    said = pipeline.unet(scheduler.add_noise(clean, noise, time), time, **given).sample
    learns_noise = scheduler.config.prediction_type == "epsilon"
    return said, noise if learns_noise else scheduler.get_velocity(clean, noise, time)


def _cond(pipeline: Any, prompt: str) -> Cond:
    """A prompt as the pipeline of a flow-matching family encodes it."""
    if isinstance(pipeline, FluxPipeline):
        states, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=512)
        return {"states": states[0], "pooled": pooled[0]}
    if isinstance(pipeline, ZImagePipeline):
        states, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=128)
    else:
        states, _ = pipeline.encode_prompt(prompt)
    return {"states": states[0]}


def script_velocity(pipeline: Any, transformer: Any, noisy: Tensor, sigmas: Tensor, conds: list[Cond]) -> Tensor:
    """What diffusers' DreamBooth script of the family makes of its transformer's output; guidance, if told, is 1."""
    states = [cond["states"] for cond in conds]
    n, c, h, w = noisy.shape
    if isinstance(pipeline, ZImagePipeline):
        made = transformer(list(noisy.unsqueeze(2).unbind()), 1 - sigmas, states).sample
        return -torch.stack(made).squeeze(2)
    if isinstance(pipeline, Flux2KleinPipeline):
        made = transformer(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy),
            timestep=sigmas,
            guidance=None,
            encoder_hidden_states=torch.stack(states),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(torch.stack(states)),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy),
        ).sample
        return made.transpose(1, 2).reshape(n, c, h, w)
    made = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, n, c, h, w),
        timestep=sigmas,
        guidance=torch.ones(n) if transformer.config.guidance_embeds else None,
        pooled_projections=torch.stack([cond["pooled"] for cond in conds]),
        encoder_hidden_states=torch.stack(states),
        txt_ids=torch.zeros(len(states[0]), 3, dtype=noisy.dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", noisy.dtype),
    ).sample
    return FluxPipeline._unpack_latents(made, h * 2, w * 2, 2)

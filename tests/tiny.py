"""A tiny real Stable Diffusion: every part is the real class, two blocks wide, random weights of a fixed seed.

It draws nothing worth looking at; laws about batches, slots, formats and resume hold on it as on a large one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.base.base import Base
from training.base.family import Wording, Words
from training.base.noise.ddpm import Ddpm

WORDS = (
    *("a", "an", "photo", "of", "the", "sks", "ohwx", "dog", "cat", "toy", "on", "in", "grass", "snow", "beach"),
    *("water", "red", "blue", "person"),
)


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose known words are one token each; anything else falls back to characters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    vocab: dict[str, int] = {}
    merges: list[str] = []
    for symbol in [*letters, *(f"{letter}</w>" for letter in letters)]:
        vocab.setdefault(symbol, len(vocab))
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            vocab.setdefault(parts[0], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_unet(cross_attention_dim: int = 32, sample_size: int = 8) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def tiny_pipeline(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """The pipeline itself; `folder` only holds the tokenizer's files. 16 px images, 8x8 latents of 4 channels."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "vocab")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
            pad_token_id=len(tokenizer) - 1,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_base(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Writes the tiny base as a diffusers folder and returns it."""
    target = folder / f"tiny-{prediction_type}-{seed}"
    if not (target / "model_index.json").exists():
        tiny_pipeline(folder, prediction_type, seed).save_pretrained(target)
    return target


def tiny_images(folder: Path, count: int = 5, side: int = 24, seed: int = 0) -> Path:
    """A folder of `count` coloured noise pictures, different from each other and from other seeds'."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return folder


def clip(base: Base) -> CLIPTextModel:
    """The text encoder of a Stable Diffusion base."""
    return cast(CLIPTextModel, base.parts.models["text_encoder"])


def clip_tokenizer(base: Base) -> CLIPTokenizer:
    """Its tokenizer."""
    return cast(CLIPTokenizer, base.parts.tokenizers["text_encoder"])


def states(base: Base, prompts: Sequence[Wording], words: Sequence[Words] | None = None) -> Tensor:
    """The hidden states [N, L, C] of prompts."""
    return torch.stack([cond["states"] for cond in base.encode(prompts, words)])


def ddpm(base: Base) -> Ddpm:
    """The noise process of a Stable Diffusion base."""
    return cast(Ddpm, base.process)


def unet(base: Base) -> UNet2DConditionModel:
    """The denoiser of a Stable Diffusion base."""
    return cast(UNet2DConditionModel, base.denoiser)


def vae(base: Base) -> AutoencoderKL:
    """Its autoencoder."""
    return cast(AutoencoderKL, base.parts.models["vae"])

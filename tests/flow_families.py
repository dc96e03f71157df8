"""Tiny real bases of the flow-matching families: every part is the real class, random weights of a fixed seed.

Sizes are those of diffusers' own dummy components. A pipeline is made, saved as a diffusers folder and read from there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level, without merges."""
    vocab = {letter: index for index, letter in enumerate(bytes_to_unicode().values())}
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocab[special] = len(vocab)
    return Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=CHAT)


def flux_vae() -> AutoencoderKL:
    """FLUX.1's kind: 16 channels, shifted, no quant convolutions."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def z_image() -> ZImagePipeline:
    """Two layers and a refiner, a static shift."""
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64],
    )
    with torch.no_grad():  # they are zeros where nothing was trained
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(),
        text_encoder=Qwen3Model(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {"z-image": z_image}
# what each pipeline calls a guidance scale of 3 as everybody means it, and what else it must be told
CALLS: dict[str, dict[str, Any]] = {"z-image": {"guidance_scale": 2.0, "max_sequence_length": 128}}


def tiny_flow_base(family: str, folder: Path) -> Path:
    """Writes the tiny base of a family as a diffusers folder and returns it."""
    target = folder / family
    if not (target / "model_index.json").exists():
        torch.manual_seed(0)
        PIPELINES[family]().save_pretrained(target)
    return target

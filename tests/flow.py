"""A second family for tests alone: a tiny flow-matching transformer, whose text encoder no adapter may change.

Its denoiser is AuraFlow's real class with random weights; around it are a small CLIP and a small VAE. It shows that
nothing outside `training/base` depends on Stable Diffusion.
"""

from collections.abc import Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny import tiny_tokenizer
from training.base.base import Base
from training.base.facts import Facts
from training.base.family import Cond, Parts, RowFacts, Words
from training.base.noise.flow import Flow
from training.base.noise.process import Size

SCHEDULER = {"num_train_timesteps": 1000, "shift": 1.73}


class TinyFlow:
    """See `training.base.family.Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("TinyFlowPipeline",)
    title: ClassVar[str] = "a family of the tests"

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.facts = Facts(
            family="tiny-flow",
            denoiser="transformer",
            text_encoders=(),
            frozen_encoders=("text_encoder",),
            channels=4,
            cell_px=2,
            multiple_px=4,
            resolution=16,
            targets=("to_q", "to_k", "to_v", "to_out.0"),
            text_targets=(),
            layers=("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "linear_1", "linear_2", "out_projection"),
            text_layers=(),
            trained_bytes=1e4,
            drawn_bytes=1e3,
            pixel_bytes=1e3,
            prompt_tokens=14,
            min_snr=False,
            steps=4,
            guidance_scale=3.0,
            sampler="euler",
        )

    @cached_property
    def process(self) -> Flow:
        """Rectified flow with a fixed shift, as AuraFlow's pipeline sets it up."""
        return Flow(SCHEDULER, linspace=False)

    def load(self, device: torch.device, dtype: torch.dtype) -> Parts:
        """Random weights of a fixed seed."""
        torch.manual_seed(0)
        tokenizer = self.tokenizer()
        last = len(tokenizer) - 1
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=last + 1,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
                bos_token_id=last - 1,
                eos_token_id=last,
                pad_token_id=last,
            )
        )
        denoiser = AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        models = {"transformer": denoiser, "text_encoder": encoder, "vae": vae}
        for model in models.values():
            model.requires_grad_(False).eval().to(device, dtype)
        return Parts(models, {"text_encoder": tokenizer}, device, dtype)

    def tokenizer(self) -> Any:
        """CLIP's, of few words."""
        return tiny_tokenizer(self.folder / "vocab")

    def count_chunks(self, parts: Parts, prompt: str, words: Words) -> int:
        """One: longer prompts are cut."""
        return 1

    def encode(
        self, parts: Parts, prompts: Sequence[str], words: Sequence[Words] | None = None, chunks: int = 1
    ) -> list[Cond]:
        """`states` [L, C], zero where the prompt is padded, as AuraFlow's pipeline does it."""
        tokens = parts.tokenizers["text_encoder"](
            list(prompts), padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        ).to(parts.device)
        states_NLC = parts.models["text_encoder"](tokens.input_ids)[0]
        return [{"states": states_LC} for states_LC in states_NLC * tokens.attention_mask[:, :, None]]

    def to_latents(self, parts: Parts, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """See `Family`."""
        posterior = parts.models["vae"].encode(pixels_N3HW).latent_dist  # type: ignore[operator]
        return posterior.mean * 0.5, posterior.std * 0.5

    def to_pixels(self, parts: Parts, latents_NCHW: Tensor) -> Tensor:
        """See `Family`."""
        pixels: Tensor = parts.models["vae"].decode(latents_NCHW / 0.5).sample  # type: ignore[operator]
        return pixels

    def predict(
        self, parts: Parts, x_NCHW: Tensor, times_N: Tensor, conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> Tensor:
        """The velocity from clean to noise; the transformer is told the sigma, and returns its negative here."""
        states_NLC = torch.stack([cond["states"] for cond in conds])
        velocity: Tensor = parts.models["transformer"](x_NCHW, states_NLC, (times_N / 1000).to(x_NCHW.dtype)).sample
        return -velocity

    def together(self, size: Size, cond: Cond) -> Hashable:
        """Rows of one size."""
        return size

    def features(
        self, parts: Parts, x_NCHW: Tensor, times_N: Tensor, conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> Tensor:
        """The prediction itself."""
        return self.predict(parts, x_NCHW, times_N, conds, rows)


def flow_base(folder: Path, dtype: torch.dtype = torch.float32) -> Base:
    """The tiny flow-matching base on the CPU."""
    family = TinyFlow(folder, "tiny-flow")
    return Base("tiny-flow", "0" * 64, folder, family, family.load(torch.device("cpu"), dtype))

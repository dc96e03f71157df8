"""Transformer and text encoder of `pocket-dit`: their shape and the maths of one training step.

Owns model and loss. Knows nothing about files, processes or pictures.
"""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from tools.pocket.dit import words
from tools.pocket.recipe import DIT, VAE


def build_text() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(words.vocabulary()),
        hidden_size=DIT.text_width,
        intermediate_size=3 * DIT.text_width,
        num_hidden_layers=DIT.text_layers,
        num_attention_heads=DIT.text_heads,
        num_key_value_heads=DIT.text_heads,
        head_dim=DIT.text_width // DIT.text_heads,
        max_position_embeddings=512,
        pad_token_id=words.vocabulary()[words.PAD],
        eos_token_id=words.vocabulary()[words.END],
        bos_token_id=words.vocabulary()[words.START],
    )
    return Qwen3Model(config)


def build_transformer() -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(
        in_channels=VAE.latent_channels,
        dim=DIT.width,
        n_layers=DIT.layers,
        n_refiner_layers=DIT.refiners,
        n_heads=DIT.heads,
        n_kv_heads=DIT.heads,
        cap_feat_dim=DIT.text_width,
        axes_dims=list(DIT.axes),
        axes_lens=[512, 64, 64],
    )
    set_plain_attention(transformer)
    return transformer


def set_plain_attention(transformer: ZImageTransformer2DModel) -> None:
    for module in transformer.modules():
        if hasattr(module, "to_q"):
            module.processor = PlainAttention()


class PlainAttention:
    """Z-Image's attention in real numbers and plain products: SDPA's backward is slow on a CPU in bf16."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """[N, S, D]; `attention_mask` [N, S] is true where there is a token."""
        assert freqs_cis is not None
        turn = torch.view_as_real(freqs_cis)[:, :, None]  # [N, S, 1, half, 2]
        cos, sin = turn.unbind(-1)
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (_turned(x, cos, sin).transpose(1, 2) for x in (attn.norm_q(query), attn.norm_k(key)))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, None, None].bool(), torch.finfo(scores.dtype).min)
        mixed = scores.softmax(-1).to(value.dtype) @ value.transpose(1, 2)
        made: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return made


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over neighbouring pairs of channels."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def schedule() -> FlowMatchEulerDiscreteScheduler:
    """A static shift: a latent of 16 x 16 cells needs little."""
    return FlowMatchEulerDiscreteScheduler(shift=DIT.shift)


class PocketDit(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.text = build_transformer(), build_text()
        self.start_silent()

    @torch.no_grad()
    def start_silent(self) -> None:
        """Gates, scales and the last layer start at zero: every block is the identity."""
        for name, parameter in self.transformer.named_parameters():
            if "adaLN_modulation" in name or "all_final_layer" in name:
                parameter.zero_()
        for token in (self.transformer.x_pad_token, self.transformer.cap_pad_token):
            token.normal_(std=0.02)

    def loss(self, latents_BCHW: Tensor, tokens_BL: Tensor, noise_BCHW: Tensor, levels_B: Tensor) -> Tensor:
        """The velocity from clean to noise; `tokens_BL` are padded with the pad token."""
        level = levels_B[:, None, None, None]
        noisy, target = (1 - level) * latents_BCHW + level * noise_BCHW, noise_BCHW - latents_BCHW
        mask_BL = tokens_BL != words.vocabulary()[words.PAD]
        hidden = self.text(tokens_BL, attention_mask=mask_BL, output_hidden_states=True).hidden_states[-2]
        states = [row[mask] for row, mask in zip(hidden, mask_BL, strict=True)]
        made = self.transformer(list(noisy[:, :, None].unbind()), 1 - levels_B, states).sample
        return (-torch.stack(made)[:, :, 0].float() - target).square().mean()

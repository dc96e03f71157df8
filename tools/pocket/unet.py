"""The base's text encoder and UNet: their shape, their start and the maths of one training step.

Owns model and loss. Knows nothing about files, processes or pictures.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tools.pocket import tokenizer
from tools.pocket.recipe import PROMPT_TOKENS, UNET, VAE
from tools.pocket.sampler import schedule


def build_text() -> CLIPTextModel:
    ids = tokenizer.vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=UNET.text_width,
        intermediate_size=4 * UNET.text_width,
        num_hidden_layers=UNET.text_layers,
        num_attention_heads=UNET.text_heads,
        max_position_embeddings=PROMPT_TOKENS,
        projection_dim=UNET.text_width,
        hidden_act="quick_gelu",
        bos_token_id=ids[tokenizer.START],
        eos_token_id=ids[tokenizer.END],
        pad_token_id=ids[tokenizer.END],
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    widths, attends = UNET.block_out_channels, UNET.attends
    unet = UNet2DConditionModel(
        sample_size=64 // 2 ** (len(VAE.block_out_channels) - 1),
        in_channels=VAE.latent_channels,
        out_channels=VAE.latent_channels,
        block_out_channels=widths,
        layers_per_block=UNET.layers_per_block,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        cross_attention_dim=UNET.text_width,
        # diffusers reads this as the number of heads.
        attention_head_dim=tuple(width // UNET.head_channels for width in widths),
        norm_num_groups=UNET.norm_groups,
    )
    # SDPA's backward is slow on a CPU in bf16; the plain processor is 1.4 times as fast.
    unet.set_attn_processor(AttnProcessor())
    return unet


class Pocket(nn.Module):
    """UNet and text encoder, trained together."""

    signal: Tensor
    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text = build_unet(), build_text()
        self.start_silent()
        alphas = schedule().alphas_cumprod.float()
        self.register_buffer("signal", alphas.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - alphas).sqrt(), persistent=False)

    @torch.no_grad()
    def start_silent(self) -> None:
        """Every residual branch starts at zero; so do the tokens that no caption uses."""
        for name, parameter in self.unet.named_parameters():
            if ".conv2." in name or ".proj_out." in name or name.startswith("conv_out."):
                parameter.zero_()
        embedding = next(m for m in self.text.modules() if isinstance(m, nn.Embedding))
        used = torch.tensor([tokenizer.vocabulary()[word + "</w>"] for word in tokenizer.trained_words()])
        used = torch.cat([used, torch.tensor([tokenizer.vocabulary()[t] for t in (tokenizer.START, tokenizer.END)])])
        silent = torch.ones(len(embedding.weight), dtype=torch.bool)
        silent[used] = False
        embedding.weight[silent] = 0

    def loss(self, latents_BCHW: Tensor, tokens_BL: Tensor, noise_BCHW: Tensor, steps_B: Tensor) -> Tensor:
        """v-prediction, without the nearly clean steps outweighing those where a shape is decided."""
        signal, sigma = (x[steps_B][:, None, None, None] for x in (self.signal, self.noise))
        noisy = signal * latents_BCHW + sigma * noise_BCHW
        target = signal * noise_BCHW - sigma * latents_BCHW
        hidden = self.text(tokens_BL).last_hidden_state
        made = self.unet(noisy, steps_B, hidden).sample.float()
        snr_B = (signal / sigma).square().flatten()
        weight_B = (snr_B.clamp_max(UNET.min_snr_gamma) + 1) / (snr_B + 1)
        return ((made - target).square().mean((1, 2, 3)) * weight_B).mean()

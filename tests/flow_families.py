"""Tiny real bases of the flow-matching families: every part is the real class, random weights of a fixed seed.

Sizes are those of diffusers' own dummy components. A pipeline is made, saved as a diffusers folder and read from there.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.tiny import tiny_tokenizer

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


def t5_tokenizer() -> T5Tokenizer:
    """Every letter is a token."""
    letters = [(chr(code), -10.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -2.0), *letters], extra_ids=0)


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


def qwen_config(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3Config:
    """Of width 16."""
    return Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
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
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(),
        text_encoder=Qwen3Model(qwen_config(tokenizer, layers=2)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def klein(distilled: bool = False) -> Flux2KleinPipeline:
    """One double-stream block and two single ones; the text encoder is as deep as it is read."""
    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLFlux2(
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
    )
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(qwen_config(tokenizer, layers=28)),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=distilled,
    )


def flux(guided: bool = True) -> FluxPipeline:
    """One double-stream block and two single ones; `guided`: guidance is an input, as of dev."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(Path(folder))
    letters = t5_tokenizer()
    clip = CLIPTextConfig(
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
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guided,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guided else 1.0,
            use_dynamic_shifting=guided,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=flux_vae(),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(letters), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
        ),
        tokenizer_2=letters,
        transformer=transformer,
    )


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "z-image": z_image,
    "klein": klein,
    "klein-distilled": lambda: klein(distilled=True),
    "flux": flux,
    "flux-schnell": lambda: flux(guided=False),
}


def call(pipeline: Any, prompt: str, negative: str = "", guidance: float = 3.0, **changes: Any) -> Any:
    """What the pipeline draws, at 32 px in four steps unless `changes` says else; latents, in the model's space.

    `guidance` as everybody means it. Raises ValueError for a negative prompt that the pipeline does not take.
    """
    settings: dict[str, Any] = {
        "prompt": prompt, "num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent", **changes,
    }  # fmt: skip
    if isinstance(pipeline, ZImagePipeline):
        settings |= {"negative_prompt": negative, "guidance_scale": guidance - 1, "max_sequence_length": 128}
        return pipeline(**settings).images
    if negative:
        raise ValueError("this pipeline takes no negative prompt")
    made = pipeline(**settings, guidance_scale=guidance).images
    if settings["output_type"] != "latent":
        return made
    if isinstance(pipeline, FluxPipeline):
        return FluxPipeline._unpack_latents(made, 32, 32, pipeline.vae_scale_factor)
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
    return isinstance(pipeline, ZImagePipeline)


def script_velocity(family: str, transformer: Any, noisy: Tensor, sigmas: Tensor, conds: Any) -> Tensor:
    """What diffusers' DreamBooth script of the family makes of its transformer's output; guidance, if told, is 1."""
    states = [cond["states"] for cond in conds]
    n, c, h, w = noisy.shape
    if family == "z-image":
        made = transformer(list(noisy.unsqueeze(2).unbind()), 1 - sigmas, states).sample
        return -torch.stack(made).squeeze(2)
    if family.startswith("klein"):
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


def tiny_flow_base(family: str, folder: Path) -> Path:
    """Writes the tiny base of a family as a diffusers folder and returns it."""
    target = folder / family
    if not (target / "model_index.json").exists():
        torch.manual_seed(0)
        PIPELINES[family]().save_pretrained(target)
    return target

"""FLUX.1: a double- and single-stream transformer, a frozen T5 and the pooled output of a CLIP, guidance as an input.

torch is imported inside: planning reads the facts without it. Source: diffusers' FluxPipeline.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.base.controls import Controls
from training.base.facts import FLOW_SAMPLERS, Facts, check_class, check_files, read_config, with_defaults
from training.base.families.blocks import DOUBLE_BLOCKS, FLUX_2_GROWTH, inner_growth
from training.base.families.flux_control import FluxControls, as_tokens, flux_residuals
from training.base.family import NOTHING, Cond, Parts, RowFacts, Wording, Words
from training.base.files.weights import load_model
from training.base.footprint import PIXEL_BYTES
from training.base.image_prompts import ImagePrompts
from training.base.originals import Original, any_like, below, by_rules
from training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from training.base.noise.flow import Flow
    from training.base.noise.process import Size

TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")),
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
LAYERS = (
    *TARGETS, "linear", "linear_1", "linear_2", "proj_mlp", "proj_out", "x_embedder", "context_embedder",
)  # fmt: skip
ORIGINALS = (
    *DOUBLE_BLOCKS,
    *below("double_blocks.{}", "transformer_blocks.{}", {
        "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    }),
    *below("single_blocks.{}", "single_transformer_blocks.{}", {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out", "modulation.lin": "norm.linear",
    }),
    ("img_in", Original(("x_embedder",))),
    ("txt_in", Original(("context_embedder",))),
    *below("time_in", "time_text_embed.timestep_embedder", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    *below("vector_in", "time_text_embed.text_embedder", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    *below("guidance_in", "time_text_embed.guidance_embedder", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    ("final_layer.linear", Original(("proj_out",))),
    ("final_layer.adaLN_modulation.1", Original(("norm_out.linear",), swapped=True)),
)  # fmt: skip
NAMING = partial(by_rules, ORIGINALS)
SCHEDULER = "scheduler/scheduler_config.json"
CLIP_TOKENIZER = (("tokenizer/tokenizer.json",), ("tokenizer/vocab.json", "tokenizer/merges.txt"))
T5_TOKENIZER = (("tokenizer_2/tokenizer.json",), ("tokenizer_2/spiece.model",))
PATCH = 2  # latent cells a side of a token
PROMPT_TOKENS = 512  # every prompt is filled up to it, and the transformer attends to all
# per token of the picture and width, measured at width 512 in bf16: of each layer in a row that trains, and of one that
# draws
TOKEN_TRAINED_BYTES, TOKEN_DRAWN_BYTES = 37.0, 56.0


class Flux1:
    """See `Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    title: ClassVar[str] = "FLUX.1"

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
        transformer, vae, clip, t5 = (read_config(folder, part) for part in parts)
        _check(name, transformer, vae, clip, t5)
        check_files(name, folder, ((SCHEDULER,),), CLIP_TOKENIZER, T5_TOKENIZER)
        cell_px = 2 ** (len(vae["block_out_channels"]) - 1)
        width = transformer.get("num_attention_heads", 24) * transformer.get("attention_head_dim", 128)
        layers = transformer.get("num_layers", 19) + transformer.get("num_single_layers", 38)
        self._guided = bool(transformer.get("guidance_embeds", False))
        facts = Facts(
            family="flux-1",
            title=self.title,
            architecture="flux-1-dev" if self._guided else "flux-1-schnell",
            kohya_base="flux1",
            originals=NAMING,
            denoiser="transformer",
            text_encoders=(),
            frozen_encoders=("text_encoder", "text_encoder_2"),
            channels=transformer.get("in_channels", 64) // PATCH**2,
            cell_px=cell_px,
            multiple_px=cell_px * PATCH,
            resolution=vae.get("sample_size", 1024),
            targets=TARGETS,
            text_targets=(),
            layers=LAYERS,
            text_layers=(),
            trained_bytes=TOKEN_TRAINED_BYTES * width * layers / PATCH**2,
            drawn_bytes=TOKEN_DRAWN_BYTES * width / PATCH**2,
            pixel_bytes=PIXEL_BYTES * vae["block_out_channels"][0],
            prompt_tokens=PROMPT_TOKENS,
            chunked=False,
            guidance="embedded" if self._guided else "none",
            negative=False,
            min_snr=False,
            steps=28 if self._guided else 4,
            guidance_scale=3.5 if self._guided else 1.0,
            sampler="euler",
            samplers=FLOW_SAMPLERS,
            half="bf16",
        )
        self.facts = with_defaults(facts, folder)
        self.controls: Controls | None = FluxControls(transformer, cell_px)
        self.image_prompts: ImagePrompts | None = None

    @staticmethod
    def owns(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """See `Family`. Of the names that FLUX.2 has, too, the inner width of its layers tells."""
        if any_like(shapes, r"single_transformer_blocks_\d+_(proj_mlp|proj_out|attn_to_[qkv]_|norm_linear)"):
            return True
        shared = any_like(shapes, r"(double|single)_blocks_\d+_(img|txt|linear|modulation)")
        return shared and not FLUX_2_GROWTH & inner_growth(shapes)

    @cached_property
    def process(self) -> "Flow":
        """Flow matching; the shift grows with the picture where the scheduler asks for it."""
        from training.base.noise.flow import Flow, linear_mu

        config: dict[str, Any] = json.loads((self.folder / SCHEDULER).read_text(encoding="utf-8"))
        return Flow(config, mu=linear_mu(config, PATCH))

    def load(self, device: "torch.device", dtype: "torch.dtype", quantized: Mapping[str, Any] = NOTHING) -> Parts:
        """See `Family`."""
        from diffusers import AutoencoderKL, FluxTransformer2DModel
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

        kinds = {
            "transformer": FluxTransformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": T5EncoderModel,
        }
        models = {
            component: load_model(kind, self.folder, component, dtype, quantized) for component, kind in kinds.items()
        }
        clip = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        return Parts(models, {"text_encoder": clip, "text_encoder_2": self.tokenizer()}, device, dtype)

    def tokenizer(self) -> Any:
        """T5's."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer_2")

    def count_chunks(self, parts: Parts, prompt: Wording, words: Words) -> int:
        """See `Family`."""
        return -(-len(parts.tokenizers["text_encoder_2"](str(prompt)).input_ids) // PROMPT_TOKENS)

    def encode(
        self, parts: Parts, prompts: Sequence[Wording], words: Sequence[Words] | None = None, chunks: int = 1
    ) -> list[Cond]:
        """`states` [512, C]: T5's last hidden states; `pooled` [P]: CLIP's pooled output."""
        import torch

        clip, t5 = (parts.tokenizers[name] for name in ("text_encoder", "text_encoder_2"))
        encoder, encoder_2 = (parts.models[name] for name in ("text_encoder", "text_encoder_2"))
        short, long = (
            tokenizer(
                list(map(str, prompts)), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            for tokenizer, length in ((clip, clip.model_max_length), (t5, PROMPT_TOKENS))
        )
        with torch.no_grad():
            pooled_NP = encoder(short.input_ids.to(parts.device)).pooler_output
            states_NLC = encoder_2(long.input_ids.to(parts.device))[0]
        return [{"states": states, "pooled": pooled} for states, pooled in zip(states_NLC, pooled_NP, strict=True)]

    def to_latents(self, parts: Parts, pixels_N3HW: "Tensor") -> tuple["Tensor", "Tensor"]:
        """See `Family`; shifted and scaled by the VAE's factors."""
        from training.base.latent_space import encode

        return encode(parts.models["vae"], pixels_N3HW)

    def to_pixels(self, parts: Parts, latents_NCHW: "Tensor") -> "Tensor":
        """See `Family`."""
        from training.base.latent_space import decode

        return decode(parts.models["vae"], latents_NCHW)

    def predict(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """See `Family`."""
        import torch

        from training.base.transfer import constant, positions

        transformer: Any = parts.models["transformer"]
        n, c, height, width = x_NCHW.shape
        h, w = height // PATCH, width // PATCH
        states_NLC = torch.stack([cond["states"] for cond in conds])
        ids = positions((1, h, w), x_NCHW.dtype, x_NCHW.device)
        guidance = tuple(row.guidance for row in rows)
        inputs = {
            "hidden_states": as_tokens(x_NCHW),
            "timestep": times_N / 1000,
            "guidance": constant(guidance, torch.float32, x_NCHW.device) if self._guided else None,
            "pooled_projections": torch.stack([cond["pooled"] for cond in conds]),
            "encoder_hidden_states": states_NLC,
            "txt_ids": ids.new_zeros(states_NLC.shape[1], 3),
            "img_ids": ids,
        }
        velocity_NTC: Tensor = transformer(**inputs, **flux_residuals(rows, transformer, inputs)).sample
        blocks = velocity_NTC.view(n, h, w, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return blocks.reshape(n, c, height, width)

    def together(self, size: "Size", cond: Cond) -> Hashable:
        """Rows of one size: their positions are shared."""
        return size

    def features(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """The picture's tokens after the last double-stream block (see Tang et al. 2023 for UNets)."""
        from training.base.held import output_of

        transformer: Any = parts.models["transformer"]
        block = transformer.transformer_blocks[-1]
        _, held = output_of(block, lambda: self.predict(parts, x_NCHW, times_N, conds, rows))
        height, width = (side // PATCH for side in x_NCHW.shape[-2:])
        found: Tensor = held.transpose(1, 2).unflatten(2, (height, width))
        return found


def _check(
    name: str, transformer: dict[str, Any], vae: dict[str, Any], clip: dict[str, Any], t5: dict[str, Any]
) -> None:
    """Raises UserError for configs of what is not trained or served here."""
    check_class(name, "transformer", transformer, "FluxTransformer2DModel")
    check_class(name, "vae", vae, "AutoencoderKL")
    if not vae.get("block_out_channels"):
        raise UserError(f"Base '{name}': vae/config.json has no `block_out_channels`. Give a whole diffusers folder.")
    pairs = (
        ("latents", transformer.get("in_channels", 64), PATCH**2 * vae.get("latent_channels", 4)),
        ("prompts", transformer.get("joint_attention_dim", 4096), t5.get("d_model")),
        ("pooled prompts", transformer.get("pooled_projection_dim", 768), clip.get("hidden_size")),
    )
    for what, read, written in pairs:
        if read != written:
            raise UserError(
                f"Base '{name}': its transformer reads {what} of width {read}, and they are written with {written}. "
                "The two are of different models."
            )

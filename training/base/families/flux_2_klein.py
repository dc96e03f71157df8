"""FLUX.2 klein: a double- and single-stream transformer, a frozen Qwen3 read at three depths, flow matching.

torch is imported inside: planning reads the facts without it. Source: diffusers' Flux2KleinPipeline.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.base.controls import Controls
from training.base.facts import FLOW_SAMPLERS, Facts, check_class, check_files, read_config, with_defaults
from training.base.families.blocks import DOUBLE_BLOCKS, FLUX_2_GROWTH, inner_growth
from training.base.family import NOTHING, REFERENCE, Cond, Parts, RowFacts, Wording, Words
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

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "attn.to_qkv_mlp_proj", "attn.to_out")
MODULATIONS = ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")
LAYERS = (
    *TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in", "linear_out", "linear", "linear_1",
    "linear_2", "x_embedder", "context_embedder", "proj_out",
)  # fmt: skip
ORIGINALS = (
    *DOUBLE_BLOCKS,
    *below("double_blocks.{}", "transformer_blocks.{}", {
        "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
        "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
    }),
    *below("single_blocks.{}", "single_transformer_blocks.{}", {
        "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out",
    }),
    *((f"{name}.lin", Original((f"{name}.linear",))) for name in MODULATIONS),
    ("img_in", Original(("x_embedder",))),
    ("txt_in", Original(("context_embedder",))),
    *below("time_in", "time_guidance_embed.timestep_embedder", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    ("final_layer.linear", Original(("proj_out",))),
    ("final_layer.adaLN_modulation.1", Original(("norm_out.linear",), swapped=True)),
)  # fmt: skip
NAMING = partial(by_rules, ORIGINALS)
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZERS = (("tokenizer/tokenizer.json",), ("tokenizer/vocab.json", "tokenizer/merges.txt"))
PATCH = 2  # cells of the VAE a side of a latent cell
PROMPT_TOKENS = 512  # every prompt is filled up to it, and the transformer attends to all
# per token of the picture and width, measured at width 512 in bf16: of each layer in a row that trains, and of one that
# draws
TOKEN_TRAINED_BYTES, TOKEN_DRAWN_BYTES = 45.0, 70.0
MAX_REFERENCES = 10
TIME_BETWEEN = 10  # positions in time: 0 of the picture, 10 of the first reference, 20 of the second
DEPTHS = (9, 18, 27)  # of the hidden states that are put side by side


class Flux2Klein:
    """See `Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline",)
    title: ClassVar[str] = "FLUX.2 klein"

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        transformer, vae, text = (read_config(folder, part) for part in ("transformer", "vae", "text_encoder"))
        _check(name, transformer, vae, text)
        check_files(name, folder, ((SCHEDULER,),), TOKENIZERS)
        cell_px = PATCH * 2 ** (len(vae["block_out_channels"]) - 1)
        width = transformer.get("num_attention_heads", 48) * transformer.get("attention_head_dim", 128)
        layers = transformer.get("num_layers", 8) + transformer.get("num_single_layers", 48)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        distilled = bool(index.get("is_distilled", False))
        facts = Facts(
            family="flux-2-klein",
            title=self.title,
            architecture="flux-2-klein",
            kohya_base="flux-2-klein",
            originals=NAMING,
            denoiser="transformer",
            text_encoders=(),
            frozen_encoders=("text_encoder",),
            channels=transformer.get("in_channels", 128),
            cell_px=cell_px,
            multiple_px=cell_px,
            resolution=vae.get("sample_size", 1024),
            targets=TARGETS,
            text_targets=(),
            layers=LAYERS,
            text_layers=(),
            trained_bytes=TOKEN_TRAINED_BYTES * width * layers,
            drawn_bytes=TOKEN_DRAWN_BYTES * width,
            pixel_bytes=PIXEL_BYTES * vae["block_out_channels"][0],
            prompt_tokens=PROMPT_TOKENS,
            chunked=False,
            guidance="none" if distilled else "cfg",
            negative=not distilled,
            min_snr=False,
            steps=4 if distilled else 50,
            guidance_scale=1.0 if distilled else 4.0,
            references=MAX_REFERENCES,
            sampler="euler",
            samplers=FLOW_SAMPLERS,
            half="bf16",
        )
        self.facts = with_defaults(facts, folder)
        self.controls: Controls | None = None
        self.image_prompts: ImagePrompts | None = None

    @staticmethod
    def owns(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """See `Family`."""
        own = r"to_qkv_mlp_proj|(ff|ff_context)_linear_(in|out)|stream_modulation"
        return any_like(shapes, own) or bool(FLUX_2_GROWTH & inner_growth(shapes))

    @cached_property
    def process(self) -> "Flow":
        """Flow matching, with a shift that grows with the picture and falls with the steps."""
        from training.base.noise.flow import Flow, empirical_mu

        return Flow(json.loads((self.folder / SCHEDULER).read_text(encoding="utf-8")), mu=empirical_mu)

    def load(self, device: "torch.device", dtype: "torch.dtype", quantized: Mapping[str, Any] = NOTHING) -> Parts:
        """See `Family`. Of the language model without its head."""
        from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
        from transformers import Qwen3ForCausalLM

        kinds = {"transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2, "text_encoder": Qwen3ForCausalLM}
        models = {
            component: load_model(kind, self.folder, component, dtype, quantized) for component, kind in kinds.items()
        }
        models["text_encoder"] = models["text_encoder"].model
        return Parts(models, {"text_encoder": self.tokenizer()}, device, dtype)

    def tokenizer(self) -> Any:
        """Qwen's."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def count_chunks(self, parts: Parts, prompt: Wording, words: Words) -> int:
        """See `Family`."""
        from training.base.chat import count_chunks

        return count_chunks(parts.tokenizers["text_encoder"], prompt, thinking=False, length=PROMPT_TOKENS)

    def encode(
        self, parts: Parts, prompts: Sequence[Wording], words: Sequence[Words] | None = None, chunks: int = 1
    ) -> list[Cond]:
        """`states` [512, 3 C]: Qwen3's hidden states at three depths, side by side."""
        import torch

        from training.base.chat import tokenise

        encoder: Any = parts.models["text_encoder"]
        tokens = tokenise(
            parts.tokenizers["text_encoder"], prompts, thinking=False, length=PROMPT_TOKENS, fill=True
        ).to(parts.device)
        with torch.no_grad():
            hidden = encoder(**tokens, output_hidden_states=True, use_cache=False).hidden_states
        return [{"states": states_LC} for states_LC in torch.cat([hidden[depth] for depth in DEPTHS], dim=-1)]

    def to_latents(self, parts: Parts, pixels_N3HW: "Tensor") -> tuple["Tensor", "Tensor"]:
        """See `Family`: the mode in blocks of 2x2, normalised by the VAE's own statistics."""
        import torch

        vae: Any = parts.models["vae"]
        mode_NCHW: Tensor = vae.encode(pixels_N3HW).latent_dist.mode()
        n, c, h, w = mode_NCHW.shape
        blocks = mode_NCHW.view(n, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 1, 3, 5, 2, 4)
        mean, std = _statistics(vae)
        latents_NCHW = (blocks.reshape(n, c * PATCH**2, h // PATCH, w // PATCH) - mean) / std
        return latents_NCHW, torch.zeros_like(latents_NCHW)

    def to_pixels(self, parts: Parts, latents_NCHW: "Tensor") -> "Tensor":
        """See `Family`."""
        vae: Any = parts.models["vae"]
        mean, std = _statistics(vae)
        n, c, h, w = latents_NCHW.shape
        blocks = (latents_NCHW * std + mean).view(n, c // PATCH**2, PATCH, PATCH, h, w).permute(0, 1, 4, 2, 5, 3)
        pixels_N3HW: Tensor = vae.decode(blocks.reshape(n, c // PATCH**2, h * PATCH, w * PATCH)).sample
        return pixels_N3HW

    def predict(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """See `Family`."""
        import torch

        from training.base.transfer import positions

        transformer: Any = parts.models["transformer"]
        states_NLC = torch.stack([cond["states"] for cond in conds])
        height, width = x_NCHW.shape[-2:]
        pictures = [x_NCHW, *(found.to(x_NCHW) for found in _references(conds))]
        # positions of tokens: time, row, column, place in the prompt
        velocity_NTC: Tensor = transformer(
            hidden_states=torch.cat([one.flatten(2).transpose(1, 2) for one in pictures], dim=1),
            timestep=times_N / 1000,
            guidance=None,
            encoder_hidden_states=states_NLC,
            txt_ids=positions((1, 1, 1, states_NLC.shape[1]), torch.long, x_NCHW.device),
            img_ids=torch.cat([_ids(one, TIME_BETWEEN * place) for place, one in enumerate(pictures)]),
        ).sample
        return velocity_NTC[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def together(self, size: "Size", cond: Cond) -> Hashable:
        """Rows of one size, whose references have the same sizes in the same order: their positions are shared."""
        return size, *(found.shape for found in _references([cond]))

    def features(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """The picture's tokens after the last double-stream block (see Tang et al. 2023 for UNets)."""
        from training.base.held import output_of

        transformer: Any = parts.models["transformer"]
        block = transformer.transformer_blocks[-1]
        _, held = output_of(block, lambda: self.predict(parts, x_NCHW, times_N, conds, rows))
        found: Tensor = held.transpose(1, 2).unflatten(2, x_NCHW.shape[-2:])
        return found


def _references(conds: Sequence[Cond]) -> list["Tensor"]:
    """The pictures that the rows' prompts refer to, each [N, C, h, w], in their order; all rows have as many."""
    import torch

    count = sum(key.startswith(REFERENCE) for key in conds[0])
    return [torch.stack([cond[f"{REFERENCE}{place}"] for cond in conds]) for place in range(count)]


def _ids(picture_NCHW: "Tensor", time: int) -> "Tensor":
    """Positions [T, 4] of a picture's tokens."""
    import torch

    from training.base.transfer import positions

    ids = positions((1, *picture_NCHW.shape[2:], 1), torch.long, picture_NCHW.device)
    if time:
        ids = ids.clone()
        ids[:, 0] = time
    return ids


def _statistics(vae: Any) -> tuple["Tensor", "Tensor"]:
    """Mean and std [C, 1, 1] of its latents in blocks."""
    spread = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return vae.bn.running_mean.view(-1, 1, 1), spread.view(-1, 1, 1)


def _check(name: str, transformer: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> None:
    """Raises UserError for configs of what is not trained or served here."""
    check_class(name, "transformer", transformer, "Flux2Transformer2DModel")
    check_class(name, "vae", vae, "AutoencoderKLFlux2")
    if not vae.get("block_out_channels"):
        raise UserError(f"Base '{name}': vae/config.json has no `block_out_channels`. Give a whole diffusers folder.")
    read, written = transformer.get("joint_attention_dim", 15360), len(DEPTHS) * text.get("hidden_size", 0)
    if read != written:
        raise UserError(
            f"Base '{name}': its transformer reads prompts of width {read}, and its text encoder writes {written}. The "
            "two are of different models."
        )

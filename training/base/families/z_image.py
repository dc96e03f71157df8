"""Z-Image: a single-stream transformer over prompt and picture, a frozen Qwen3, FLUX.1's VAE, flow matching.

torch is imported inside: planning reads the facts without it. Source: diffusers' ZImagePipeline.
"""

import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.base.controls import Controls
from training.base.facts import FLOW_SAMPLERS, Facts, check_class, check_files, read_config, with_defaults
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

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# not `cap_embedder.1` and `all_x_embedder`: there the rows of a batch stand in one sequence, so a delta cannot tell
# them apart
LAYERS = (
    *ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0", "adaLN_modulation.1",
    "linear", "mlp.0", "mlp.2",
)  # fmt: skip
ORIGINALS = (
    *(
        rule
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for rule in below(f"{blocks}.{{}}.attention", f"{blocks}.{{}}.attention", {
            "qkv": "to_q to_k to_v", "out": "to_out.0",
        })
    ),
    ("x_embedder", Original(("all_x_embedder.2-1",))),
    *below("final_layer", "all_final_layer.2-1", {"linear": "linear", "adaLN_modulation.1": "adaLN_modulation.1"}),
)  # fmt: skip
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZERS = (("tokenizer/tokenizer.json",), ("tokenizer/vocab.json", "tokenizer/merges.txt"))
PATCH = 2  # latent cells a side of a token
PROMPT_TOKENS = 512
# per token of the picture and width, measured at width 512 in bf16: of each layer in a row that trains, and of one that
# draws
TOKEN_TRAINED_BYTES, TOKEN_DRAWN_BYTES = 64.0, 38.0


class ZImage:
    """See `Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    title: ClassVar[str] = "Z-Image"

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        transformer, vae, text = (read_config(folder, part) for part in ("transformer", "vae", "text_encoder"))
        _check(name, transformer, vae, text)
        check_files(name, folder, ((SCHEDULER,),), TOKENIZERS)
        cell_px = 2 ** (len(vae["block_out_channels"]) - 1)
        width = transformer.get("dim", 3840)
        layers = transformer.get("n_layers", 30) + transformer.get("n_refiner_layers", 2)
        # positions of the prompt and, behind them, one of the picture
        self._prompt_tokens: int = min(PROMPT_TOKENS, transformer.get("axes_lens", [1024])[0] - 2)
        facts = Facts(
            family="z-image",
            title=self.title,
            architecture="z-image",
            kohya_base="z-image",
            originals=_originals,
            native_files=False,
            denoiser="transformer",
            text_encoders=(),
            frozen_encoders=("text_encoder",),
            channels=transformer.get("in_channels", 16),
            cell_px=cell_px,
            multiple_px=cell_px * PATCH,
            resolution=vae.get("sample_size", 1024),
            targets=ATTENTION,
            text_targets=(),
            layers=LAYERS,
            text_layers=(),
            trained_bytes=TOKEN_TRAINED_BYTES * width * layers / PATCH**2,
            drawn_bytes=TOKEN_DRAWN_BYTES * width / PATCH**2,
            pixel_bytes=PIXEL_BYTES * vae["block_out_channels"][0],
            prompt_tokens=self._prompt_tokens,
            max_side_px=min(transformer.get("axes_lens", [1024, 512, 512])[1:]) * cell_px * PATCH,
            chunked=False,
            min_snr=False,
            guidance_scale=5.0,
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
        return any_like(shapes, r"(^|_)(layers|noise_refiner|context_refiner)_\d+_(attention|feed_forward|adaLN)_")

    @cached_property
    def process(self) -> "Flow":
        """Flow matching, with the shift of the base's scheduler."""
        from training.base.noise.flow import Flow, linear_mu

        config: dict[str, Any] = json.loads((self.folder / SCHEDULER).read_text(encoding="utf-8"))
        return Flow(config, mu=linear_mu(config, PATCH))

    def load(self, device: "torch.device", dtype: "torch.dtype", quantized: Mapping[str, Any] = NOTHING) -> Parts:
        """See `Family`."""
        from diffusers import AutoencoderKL, ZImageTransformer2DModel
        from transformers import Qwen3Model

        kinds = {"transformer": ZImageTransformer2DModel, "vae": AutoencoderKL, "text_encoder": Qwen3Model}
        models = {
            component: load_model(kind, self.folder, component, dtype, quantized) for component, kind in kinds.items()
        }
        return Parts(models, {"text_encoder": self.tokenizer()}, device, dtype)

    def tokenizer(self) -> Any:
        """Qwen's."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def count_chunks(self, parts: Parts, prompt: Wording, words: Words) -> int:
        """See `Family`."""
        from training.base.chat import count_chunks

        return count_chunks(parts.tokenizers["text_encoder"], prompt, thinking=True, length=self._prompt_tokens)

    def encode(
        self, parts: Parts, prompts: Sequence[Wording], words: Sequence[Words] | None = None, chunks: int = 1
    ) -> list[Cond]:
        """`states` [L, C]: Qwen3's hidden states before its last layer, of as many tokens as the prompt has."""
        import torch

        from training.base.chat import tokenise

        encoder: Any = parts.models["text_encoder"]
        tokenizer = parts.tokenizers["text_encoder"]
        tokens = tokenise(tokenizer, prompts, thinking=True, length=self._prompt_tokens, fill=False)
        with torch.no_grad():
            mask_NL = tokens.attention_mask.to(parts.device).bool()
            states_NLC = encoder(
                input_ids=tokens.input_ids.to(parts.device), attention_mask=mask_NL, output_hidden_states=True
            ).hidden_states[-2]
        return [{"states": states_LC[mask_L]} for states_LC, mask_L in zip(states_NLC, mask_NL, strict=True)]

    def to_latents(self, parts: Parts, pixels_N3HW: "Tensor") -> tuple["Tensor", "Tensor"]:
        """See `Family`; shifted and scaled by the VAE's factors. The mode is taken, as the usual script does."""
        from training.base.latent_space import encode

        mean_NCHW, std_NCHW = encode(parts.models["vae"], pixels_N3HW)
        return mean_NCHW, std_NCHW * 0

    def to_pixels(self, parts: Parts, latents_NCHW: "Tensor") -> "Tensor":
        """See `Family`."""
        from training.base.latent_space import decode

        return decode(parts.models["vae"], latents_NCHW)

    def predict(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """See `Family`. The transformer's time runs from noise to clean, and so does its velocity."""
        import torch

        transformer: Any = parts.models["transformer"]
        x = list(x_NCHW.unsqueeze(2).unbind())
        velocities = transformer(x, 1 - times_N / 1000, [cond["states"] for cond in conds]).sample
        return -torch.stack(velocities).squeeze(2)

    def together(self, size: "Size", cond: Cond) -> Hashable:
        """Rows of one size; prompts of different lengths stand side by side, masked."""
        return size

    def features(
        self, parts: Parts, x_NCHW: "Tensor", times_N: "Tensor", conds: Sequence[Cond], rows: Sequence[RowFacts]
    ) -> "Tensor":
        """The picture's tokens after the layer in the middle (see Tang et al. 2023 for UNets)."""
        from training.base.held import output_of

        transformer: Any = parts.models["transformer"]
        block = transformer.layers[len(transformer.layers) // 2]
        held: Tensor = output_of(block, lambda: self.predict(parts, x_NCHW, times_N, conds, rows))
        height, width = (side // PATCH for side in x_NCHW.shape[-2:])
        return held[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def _check(name: str, transformer: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> None:
    """Raises UserError for configs of what is not trained or served here."""
    check_class(name, "transformer", transformer, "ZImageTransformer2DModel")
    check_class(name, "vae", vae, "AutoencoderKL")
    if transformer.get("siglip_feat_dim") is not None:
        raise UserError(f"Base '{name}' edits pictures (`siglip_feat_dim`). Take the text-to-image base of Z-Image.")
    if not vae.get("block_out_channels"):
        raise UserError(f"Base '{name}': vae/config.json has no `block_out_channels`. Give a whole diffusers folder.")
    pairs = (
        ("latents", transformer.get("in_channels", 16), vae.get("latent_channels", 4)),
        ("prompts", transformer.get("cap_feat_dim", 2560), text.get("hidden_size")),
    )
    for what, read, written in pairs:
        if read != written:
            raise UserError(
                f"Base '{name}': its transformer reads {what} of width {read}, and they are written with {written}. "
                "The two are of different models."
            )


def _originals(paths: Collection[str]) -> dict[str, Original]:
    """By the original's paths; most layers have the same there."""
    named = by_rules(ORIGINALS, paths)
    renamed = {layer for one in named.values() for layer in one.layers}
    return named | {path: Original((path,)) for path in paths if path not in renamed}

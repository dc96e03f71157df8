"""Released bases at their real sizes on the meta device: every shape, no weights. Prompts are records of that shape.

Configs are those of the released models: Stable Diffusion 1.5 and XL 1.0, FLUX.1 dev, FLUX.2 klein base 4B.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.meta import META
from training.base.base import Base
from training.base.families import open_family
from training.base.family import Cond, Parts, Wording, Words
from training.base.files.released import configs
from training.base.files.single_file import write_configs


@dataclass(frozen=True)
class Size:
    """One base: its pipeline's name, the denoiser, further configs, the shapes of a prompt's record, usual px."""

    pipeline: str
    denoiser: Callable[[], Any]
    configs: Mapping[str, dict[str, Any]]
    cond: Mapping[str, tuple[int, ...]]
    resolution: int


VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16,
    "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
FLOW_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}


def _released(version: str, resolution: int) -> Mapping[str, dict[str, Any]]:
    return configs(version, resolution=resolution)


SIZES: dict[str, Size] = {
    "sd15": Size(
        "StableDiffusionPipeline",
        lambda: UNet2DConditionModel.from_config(_released("1", 512)["unet"]),
        _released("1", 512),
        {"states": (77, 768)},
        512,
    ),
    "sdxl": Size(
        "StableDiffusionXLPipeline",
        lambda: UNet2DConditionModel.from_config(_released("xl", 1024)["unet"]),
        _released("xl", 1024),
        {"states": (77, 2048), "pooled": (1280,)},
        1024,
    ),
    "flux-1": Size(
        "FluxPipeline",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        {
            "vae": VAE,
            "scheduler": FLOW_SCHEDULER,
            "text_encoder": {"hidden_size": 768},
            "text_encoder_2": {"d_model": 4096},
        },
        {"states": (512, 4096), "pooled": (768,)},
        1024,
    ),
    "klein-4b": Size(
        "Flux2KleinPipeline",
        lambda: Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        {
            "vae": {
                "_class_name": "AutoencoderKLFlux2",
                "block_out_channels": [128, 256, 512, 512],
                "sample_size": 1024,
            },
            "scheduler": FLOW_SCHEDULER,
            "text_encoder": {"hidden_size": 2560},
        },
        {"states": (512, 7680)},
        1024,
    ),
}


@dataclass(frozen=True)
class PaperBase(Base):
    """A base without text encoders: a prompt's record has the shapes of `cond`."""

    cond: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, nn.Module]:
        """See `Base`; the denoiser alone."""
        return {self.facts.denoiser: self.denoiser}

    def encode(self, prompts: Sequence[Wording], words: Sequence[Words] | None = None, chunks: int = 1) -> list[Cond]:
        """See `Base`."""
        return [self._record() for _ in prompts]

    def count_chunks(self, prompt: Wording, words: Words) -> int:
        """See `Base`; always one."""
        return 1

    def _record(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape, device=META, dtype=self.dtype) for name, shape in self.cond.items()}


def paper_base(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> PaperBase:
    """The base of `SIZES`, its configs written into `folder`."""
    size = SIZES[name]
    with META:
        denoiser = size.denoiser().to(dtype).requires_grad_(False).eval()
    if size.pipeline.startswith("StableDiffusion"):
        write_configs(folder, size.configs)
    else:
        own = {key: value for key, value in denoiser.config.items() if not key.startswith("_use")}
        for component, config in {"transformer": own, **size.configs}.items():
            file = "scheduler_config.json" if component == "scheduler" else "config.json"
            _write(folder / component / file, config)
        _write(folder / "model_index.json", {"_class_name": size.pipeline})
        for tokenizer in ("tokenizer", "tokenizer_2"):
            _write(folder / tokenizer / "tokenizer.json", {})
    family = open_family(folder, name)
    parts = Parts({family.facts.denoiser: denoiser}, {}, META, dtype)
    return PaperBase(name, "", folder, family, parts, cond=size.cond)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))

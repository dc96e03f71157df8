"""The flow-matching families at their real sizes, from configs alone, on the meta device: layers, sizes and shapes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn

from tests.training.subjects import spec
from training.adapters.adapter import Adapter, LowRank
from training.adapters.bank import Bank
from training.adapters.layout import find_sites
from training.base.families import open_family
from training.base.family import Parts, RowFacts
from training.base.files.outline import Outline
from training.manifest.defaults import filled
from training.manifest.manifest import Manifest
from training.manifest.plan import adapter_bytes, plan_run, unmatched_targets


class Size(NamedTuple):
    """A base as its makers publish it: `conds` are shapes of a prompt's record, MB those of a rank-16 adapter."""

    pipeline: str
    transformer: Callable[[], Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    conds: dict[str, tuple[int, ...]]
    parameters_b: float
    sites: int
    adapter_mb: float


FLUX_VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16,
    "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
KLEIN_VAE = {"_class_name": "AutoencoderKLFlux2", "block_out_channels": [128, 256, 512, 512], "sample_size": 1024}


def klein(double: int, single: int, heads: int, hidden: int, parameters: float, sites: int, mb: float) -> Size:
    return Size(
        "Flux2KleinPipeline",
        lambda: Flux2Transformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            joint_attention_dim=3 * hidden,
            guidance_embeds=False,
        ),
        KLEIN_VAE,
        {"text_encoder": {"hidden_size": hidden}},
        {"states": (512, 3 * hidden)},
        parameters,
        sites,
        mb,
    )


SIZES = {
    "klein-4b": klein(5, 20, 24, 2560, 3.88, 60, 33),
    "klein-9b": klein(8, 24, 32, 4096, 9.08, 80, 56),
    "z-image": Size(
        "ZImagePipeline",
        ZImageTransformer2DModel,
        FLUX_VAE,
        {"text_encoder": {"hidden_size": 2560}},
        {"states": (70, 2560)},
        6.15,
        136,
        33,
    ),
    "flux-1": Size(
        "FluxPipeline",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        FLUX_VAE,
        {"text_encoder": {"hidden_size": 768}, "text_encoder_2": {"d_model": 4096}},
        {"states": (512, 4096), "pooled": (768,)},
        11.9,
        342,
        90,
    ),
}


def write(folder: Path, file: str, content: dict[str, Any]) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(content))


@pytest.fixture(params=sorted(SIZES))
def size(request: pytest.FixtureRequest) -> Size:
    return SIZES[request.param]


@pytest.fixture
def base(size: Size, tmp_path: Path) -> Outline:
    """Configs in a folder, and the layers of the model that they make, which has no memory."""
    with torch.device("meta"):
        model = size.transformer()
    write(tmp_path, "model_index.json", {"_class_name": size.pipeline})
    write(tmp_path, "transformer/config.json", {k: v for k, v in model.config.items() if not k.startswith("_use")})
    write(tmp_path, "vae/config.json", size.vae)
    write(tmp_path, "scheduler/scheduler_config.json", {"shift": 3.0, "use_dynamic_shifting": True})
    for component, config in size.text.items():
        write(tmp_path, f"{component}/config.json", config)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        write(tmp_path, f"{tokenizer}/tokenizer.json", {})
    shapes = {name: tuple(layer.weight.shape) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Outline("x", tmp_path, open_family(tmp_path, "x").facts, {"transformer": shapes}, parameters)


def test_targets_are_found_and_adapters_have_the_known_sizes(base: Outline, size: Size) -> None:
    one = spec("a", lora={"rank": 16, "targets": list(base.facts.targets), "text_encoder": False})
    assert base.parameters / 1e9 == pytest.approx(size.parameters_b, rel=0.01)
    assert not unmatched_targets(one, base)
    found = [
        name for name in base.layers["transformer"] if f".{name}".endswith(tuple(f".{t}" for t in base.facts.targets))
    ]
    assert len(found) == size.sites
    assert adapter_bytes(one, base) / 1e6 == pytest.approx(size.adapter_mb, rel=0.02)
    manifest = Manifest(name="m", base="x", subjects=(one,))
    (pack,) = plan_run(filled(manifest, base.facts), base).packs
    assert pack.state_bytes / 1e6 == pytest.approx(8 * size.adapter_mb, rel=0.02)
    assert pack.memory_mb > 2 * base.parameters / 1e6 + pack.state_bytes / 1e6


def test_a_mixed_step_has_the_right_shapes(base: Outline, size: Size) -> None:
    """A row that trains and rows that are served together at 1024 px, two adapters at the layers that are trained."""
    family = open_family(base.folder, "x")
    with torch.device("meta"):
        transformer = size.transformer().to(torch.bfloat16).requires_grad_(False)
    meta = torch.device("meta")
    parts = Parts({"transformer": transformer}, {}, meta, torch.bfloat16)
    sites = find_sites("transformer", transformer, base.facts.targets)
    bank = Bank({"transformer": sites}, slots=2, rank=4, device=meta, dtype=torch.bfloat16)
    bank.weights_SP.requires_grad_(True)
    adapter = Adapter({site.key: LowRank(torch.ones(4, *site.down), torch.ones(site.out, 4)) for site in sites})
    for slot in range(2):
        bank.put(slot, bank.pack(adapter))
    bank.inject()
    cells = 1024 // base.facts.cell_px
    x = torch.zeros(2, base.facts.channels, cells, cells, dtype=torch.bfloat16, device=meta)
    conds = [_cond(size.conds, meta) for _ in range(2)]
    with bank.using(bank.route("transformer", torch.tensor([[0], [1]]))):
        velocity = family.predict(parts, x, torch.zeros(2, device=meta), conds, [RowFacts()] * 2)
    assert velocity.shape == x.shape
    (gradient,) = torch.autograd.grad(velocity.sum(), bank.weights_SP)
    assert gradient.shape == bank.weights_SP.shape


def _cond(shapes: dict[str, Sequence[int]] | dict[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}

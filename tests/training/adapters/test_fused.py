"""Files of transformers in other programs' names: layers fused there are joined and split, by those programs' rules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
    _convert_non_diffusers_z_image_lora_to_diffusers,
)
from torch import Tensor

from tests.families import write_family
from training.adapters.adapter import Adapter, AdapterError, LowRank
from training.adapters.formats.formats import Format, export_adapter, import_adapter, label_of, recognise
from training.adapters.tensor_file import read_tensors, write_tensors
from training.base.families.flux_1 import ORIGINALS
from training.base.files.outline import Outline, outline
from training.base.originals import FusedLayer, Names, by_rules

Shapes = dict[str, tuple[int, ...]]
RANK = 2


def adapter_over(shapes: Mapping[str, tuple[int, ...]], rank: int = RANK) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    modules = {}
    for key, (out, into) in shapes.items():
        down = torch.randn(rank, into, generator=generator).half().float()
        modules[key] = LowRank(down, torch.randn(out, rank, generator=generator).half().float())
    return Adapter(modules)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outline]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: outline(str(write_family(name, folder))) for name in ("sd", "sdxl", "klein", "z-image", "flux")}


def real_flux() -> tuple[Shapes, Names]:
    """One block of each kind of FLUX.1 at its real width, which diffusers' converter takes for granted."""
    wide, inner = 3072, 12288
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    square = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    sizes: Shapes = {f"{double}.attn.{name}": (wide, wide) for name in square}
    for ff in ("ff", "ff_context"):
        sizes |= {f"{double}.{ff}.net.0.proj": (inner, wide), f"{double}.{ff}.net.2": (wide, inner)}
    sizes |= {f"{single}.attn.{name}": (wide, wide) for name in ("to_q", "to_k", "to_v")}
    sizes |= {f"{single}.proj_mlp": (inner, wide), f"{single}.proj_out": (wide, wide + inner)}
    sizes |= {"norm_out.linear": (2 * wide, wide)}
    fused = {
        f"transformer.{path}": FusedLayer(
            tuple(f"transformer.{layer}" for layer in one.layers),
            tuple(sizes[layer][0] for layer in one.layers),
            one.swapped,
        )
        for path, one in by_rules(ORIGINALS, sizes).items()
    }
    return {f"transformer.{path}": shape for path, shape in sizes.items()}, Names("FLUX.1", fused)


def tensors_of(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    (data,) = files.values()
    return dict(read_tensors(data, "x", 2**30).tensors)


def changes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's change, from PEFT's keys with or without a component."""
    paths = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    return {
        f"transformer.{path.removeprefix('transformer.')}": state[f"{path}.lora_B.weight"].float()
        @ state[f"{path}.lora_A.weight"].float()
        for path in paths
    }


def assert_same(found: Mapping[str, Tensor], adapter: Adapter) -> None:
    assert found.keys() == adapter.modules.keys()
    for key, low in adapter.modules.items():
        assert torch.allclose(found[key], low.delta(), atol=2e-2, rtol=2e-3), key


def test_diffusers_reads_flux_1_files_of_kohyas_names_at_their_real_width() -> None:
    shapes, names = real_flux()
    adapter = adapter_over(shapes)
    files = export_adapter(adapter, "kohya", shapes, None, names)
    tensors = tensors_of(files)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (4 * RANK, 3072)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (3 * 3072 + 12288, 4 * RANK)
    # it leaves out the component of the last layer and takes its halves the other way round
    assert_same(changes(_convert_kohya_flux_lora_to_diffusers(dict(tensors))), adapter)
    back = import_adapter(files, shapes, names)
    assert_same({key: low.delta() for key, low in back.modules.items()}, adapter)
    assert back.rank == RANK


@pytest.mark.parametrize("format", ["kohya", "ai_toolkit"])
def test_other_readers_find_every_layer(bases: dict[str, Outline], format: Format) -> None:
    """FLUX.2's reader does not know that its last modulation is the other way round, so that is left out."""
    readers: dict[str, Any] = {
        "klein": _convert_non_diffusers_flux2_lora_to_diffusers,
        "z-image": _convert_non_diffusers_z_image_lora_to_diffusers,
    }
    for name, read in readers.items():
        if name == "klein" and format == "kohya":
            continue  # the law on all families draws with it
        base = bases[name]
        ends = (".to_q", ".to_k", ".to_v", ".to_out.0", ".to_qkv_mlp_proj", ".attn.to_out", ".linear_in", ".w1", ".w3")
        adapter = adapter_over({key: shape for key, shape in base.shapes.items() if key.endswith(ends)})
        files = export_adapter(adapter, format, base.shapes, label_of("a", base.facts), base.names)
        assert recognise(files) == (format,)
        assert_same(changes(read(tensors_of(files))), adapter)


def test_a_fused_file_trained_as_one_is_split_exactly(bases: dict[str, Outline]) -> None:
    """BFL's own programs train `qkv` as one layer: every part has the whole `down`; alpha and prefixes are read."""
    base = bases["flux"]
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(4, 32, generator=generator), torch.randn(3 * 32, 4, generator=generator)
    for path, halves in (
        ("diffusion_model.double_blocks.0.img_attn.qkv", ("lora_A.weight", "lora_B.weight")),
        ("base_model.model.double_blocks.0.img_attn.qkv", ("lora_A.weight", "lora_B.weight")),
        ("lora_unet_double_blocks_0_img_attn_qkv", ("lora_down.weight", "lora_up.weight")),
    ):
        tensors = {f"{path}.{halves[0]}": down, f"{path}.{halves[1]}": up, f"{path}.alpha": torch.tensor(2.0)}
        adapter = import_adapter({"a.safetensors": write_tensors(tensors, {})}, base.shapes, base.names)
        block = "transformer.transformer_blocks.0.attn"
        assert list(adapter.modules) == [f"{block}.to_k", f"{block}.to_q", f"{block}.to_v"]
        whole = torch.cat([adapter.modules[f"{block}.{part}"].delta() for part in ("to_q", "to_k", "to_v")])
        assert torch.allclose(whole, 0.5 * up @ down, atol=1e-5)


def test_names_before_a_diffusers_path_are_read(bases: dict[str, Outline]) -> None:
    base = bases["z-image"]
    key = "transformer.layers.1.attention.to_q"
    low = adapter_over({key: base.shapes[key]}).modules[key]
    peft, kohya = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
    for path, halves in (
        ("diffusion_model.layers.1.attention.to_q", peft),
        ("layers.1.attention.to_q", peft),
        ("lora_unet_layers_1_attention_to_q", kohya),
        ("lycoris_layers_1_attention_to_q", kohya),
        ("lora_transformer_layers_1_attention_to_q", kohya),
        ("transformer.layers.1.attention.to_q", ("lora_A.default.weight", "lora_B.default.weight")),
    ):
        tensors = {f"{path}.{half}": part for half, part in zip(halves, low, strict=True)}
        found = import_adapter({"a.safetensors": write_tensors(tensors, {})}, base.shapes, base.names)
        assert torch.equal(found.modules[key].up, low.up), path


def test_a_layer_given_by_itself_and_in_a_fused_one_is_refused(bases: dict[str, Outline]) -> None:
    base = bases["flux"]
    names = ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q")
    tensors: dict[str, Tensor] = {}
    for name, out in zip(names, (96, 32), strict=True):
        tensors |= {f"diffusion_model.{name}.lora_A.weight": torch.ones(1, 32)}
        tensors |= {f"diffusion_model.{name}.lora_B.weight": torch.ones(out, 1)}
    with pytest.raises(AdapterError, match=r"transformer_blocks.0.attn.to_q occurs twice"):
        import_adapter({"a.safetensors": write_tensors(tensors, {})}, base.shapes, base.names)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_an_adapter_of_another_family_is_refused_naming_both(bases: dict[str, Outline], format: Format) -> None:
    for mine, base in bases.items():
        wanted = {key: shape for key, shape in base.shapes.items() if key.split(".")[-1] in ("to_q", "to_qkv_mlp_proj")}
        if mine == "sd":  # a tiny one has no layer that a tiny SDXL lacks
            wanted = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320)}
        adapter = adapter_over(wanted)
        files = export_adapter(adapter, format, base.shapes, label_of("a", base.facts), base.names)
        for theirs, other in bases.items():
            if theirs == mine:
                continue
            said = f"The file is an adapter of {base.facts.title}; this base is {other.facts.title}."
            with pytest.raises(AdapterError, match=said):
                import_adapter(files, other.shapes, other.names)


def test_a_component_that_a_format_does_not_know_is_no_bare_error(tmp_path: Path) -> None:
    strange = Adapter({"prior.layer": LowRank(torch.ones(1, 2), torch.ones(2, 1))})
    for format in ("kohya", "lora_diffusion", "diffusers"):
        with pytest.raises(AdapterError, match="prior"):
            export_adapter(strange, format, ["prior.layer"])

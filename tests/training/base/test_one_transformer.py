"""A base whose transformer is one file of its own, as its makers and ComfyUI write it; the rest is another base's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from tests.families import write_family
from training.base.base import load_base
from training.base.families import open_family
from training.base.files.folder import find_base, hash_base
from training.base.files.single_file import convert_transformer
from training.errors import UserError

NORMS = {  # in original files, of what adapters never change
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale", "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
}  # fmt: skip
SINGLE = {"attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale"}
Z_IMAGE = {"norm_q": "q_norm", "norm_k": "k_norm"}


def original(model: Any, family: Any) -> dict[str, Tensor]:
    """The state of a transformer under the names of its own programs, fused as there."""
    state = dict(model.state_dict())
    layers = {name.removesuffix(".weight") for name in state if name.endswith(".weight")}
    made: dict[str, Tensor] = {}
    for path, one in family.facts.originals(layers).items():
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{layer}.{kind}", None) for layer in one.layers]
            if parts[0] is not None:
                whole = torch.cat(parts)
                made[f"{path}.{kind}"] = torch.cat(whole.chunk(2)[::-1]) if one.swapped else whole
    for name, part in state.items():
        made[_renamed(name)] = part
    return {name: part.to(torch.bfloat16).contiguous() for name, part in made.items()}


def _renamed(name: str) -> str:
    start, _, rest = name.partition(".")
    number, _, tail = rest.partition(".")
    if start == "transformer_blocks" and tail in NORMS:
        return f"double_blocks.{number}.{NORMS[tail]}"
    if start == "single_transformer_blocks" and tail in SINGLE:
        return f"single_blocks.{number}.{SINGLE[tail]}"
    for ours, theirs in Z_IMAGE.items():
        name = name.replace(f".attention.{ours}.", f".attention.{theirs}.")
    return name


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# diffusers reads FLUX.2 without ComfyUI's prefix alone
@pytest.mark.parametrize(("name", "prefix"), [("klein", ""), ("z-image", ""), ("z-image", "model.diffusion_model.")])
def test_it_is_the_same_model_as_its_folder(name: str, prefix: str, tmp_path: Path) -> None:
    whole = write_family(name, tmp_path)
    base = load_base(str(whole), device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in base.denoiser.parameters():
            parameter.add_(0.1)  # another one of the same shapes
    file = tmp_path / "mine.safetensors"
    save_file({prefix + key: part for key, part in original(base.denoiser, base.family).items()}, file)
    file.with_suffix(".json").write_text(json.dumps({"rest": name}))
    made = load_base(str(file), device="cpu", dtype=torch.bfloat16)
    found, expected = made.denoiser.state_dict(), base.denoiser.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    for component in ("vae", "text_encoder"):
        ours, theirs = (one.parts.models[component].state_dict() for one in (made, base))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert made.hash != hash_base(whole) and find_base(str(file)) == made.folder
    assert made.facts == base.facts


@pytest.mark.slow
def test_flux_1_at_its_width(tmp_path: Path) -> None:
    """diffusers' converter takes the real width for granted: one block of each kind, 1.1 GB."""
    whole = write_family("flux", tmp_path)
    config = json.loads((whole / "transformer" / "config.json").read_text())
    config |= {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_single_layers": 1,
        "axes_dims_rope": [16, 56, 56],
    }
    (whole / "transformer" / "config.json").write_text(json.dumps(config))
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    model = FluxTransformer2DModel(**settings).to(torch.bfloat16)
    file = tmp_path / "mine.safetensors"
    save_file(original(model, open_family(whole, "flux")), file)
    convert_transformer(file, tmp_path / "made", whole)
    made = FluxTransformer2DModel.from_pretrained(tmp_path / "made" / "transformer", torch_dtype=torch.bfloat16)
    expected = model.state_dict()
    assert all(torch.equal(part, expected[key]) for key, part in made.state_dict().items())


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    whole = write_family("z-image", tmp_path)
    base = load_base(str(whole), device="cpu", dtype=torch.bfloat16)
    state = original(base.denoiser, base.family)
    file = tmp_path / "mine.safetensors"
    save_file(state, file)
    with pytest.raises(UserError, match=r"transformer of Z-Image alone.*\"rest\".*'mine.json' beside it"):
        find_base(str(file))
    write_family("klein", tmp_path)
    file.with_suffix(".json").write_text('{"rest": "klein"}')
    with pytest.raises(UserError, match="transformer of Z-Image, and 'klein'.*has a Flux2Transformer2DModel"):
        find_base(str(file))
    file.with_suffix(".json").write_text('{"rest": "z-image"}')
    save_file({key: part for key, part in state.items() if "layers.1.attention.out" not in key}, file)
    with pytest.raises(UserError, match="cannot be converted: it lacks parts of the transformer"):
        find_base(str(file))
    assert not list((tmp_path / "cache").rglob("model_index.json"))
    save_file({**state, "layers.0.attention.qkv.scale_weight": torch.ones(1)}, file)
    with pytest.raises(UserError, match="quantised weights with scales of their own.*base_quantization"):
        find_base(str(file))
    save_file({"some.weight": torch.ones(1), "other.weight": torch.ones(1)}, file)
    with pytest.raises(
        UserError, match=r"nor of a transformer of FLUX.2, FLUX.1, Z-Image. Its keys are like 'other.weight'"
    ):
        find_base(str(file))

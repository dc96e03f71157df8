"""LoKr and LoHa files as plain LoRA, against LyCORIS' own formulas and diffusers' converter."""

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lokr_to_diffusers
from torch import Tensor

from training.adapters.adapter import AdapterError
from training.adapters.formats.formats import import_adapter, recognise
from training.adapters.tensor_file import write_tensors

KEY = "transformer.layers.0.attention.to_q"
SHAPES = {KEY: (32, 48), "unet.mid.conv1": (16, 8, 3, 3)}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def imported(tensors: dict[str, Tensor], rank: int, said: list[str]) -> dict[str, Tensor]:
    files = {"a.safetensors": write_tensors(tensors, {})}
    assert recognise(files) == ("lycoris",)
    adapter = import_adapter(files, SHAPES, rank=rank, say=said.append)
    assert adapter.rank <= rank
    return {key: low.delta() for key, low in adapter.modules.items()}


@pytest.mark.parametrize("prefix", ["lycoris_layers_0_attention_to_q", "diffusion_model.layers.0.attention.to_q", KEY])
def test_a_lokr_layer_is_its_kronecker_product(prefix: str) -> None:
    w1, a, b = rand(4, 6), rand(8, 2), rand(2, 8)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    said: list[str] = []
    (found,) = imported({f"{prefix}.{name}": part for name, part in tensors.items()}, 32, said).values()
    assert torch.allclose(found, torch.kron(w1, a @ b) / 2, atol=1e-4)
    assert said == ["a.safetensors: converted to plain LoRA of rank 32; relative error 0.0%"]


def test_a_loha_layer_is_its_elementwise_product_and_the_loss_is_told() -> None:
    parts = {
        "hada_w1_a": rand(32, 4),
        "hada_w1_b": rand(4, 48),
        "hada_w2_a": rand(32, 5)[:, :4],
        "hada_w2_b": rand(4, 48) + 1,
    }
    exact = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) * 0.5
    tensors = {f"{KEY}.{name}": part for name, part in parts.items()} | {f"{KEY}.alpha": torch.tensor(2.0)}
    for rank in (16, 4):
        said: list[str] = []
        found = imported(tensors, rank, said)[KEY]
        error = float((found - exact).norm() / exact.norm())
        assert f"rank {rank}; relative error {error:.1%}" in said[0]
        kept = torch.linalg.svdvals(exact)
        best = float(kept[rank:].square().sum().sqrt() / exact.norm())
        assert error == pytest.approx(best, abs=1e-3) and (error < 1e-4) == (rank == 16)


def test_a_convolution_is_converted_too() -> None:
    w1, w2 = rand(4, 2), rand(4, 4, 3, 3)
    found = imported({"lora_unet_mid_conv1.lokr_w1": w1, "lora_unet_mid_conv1.lokr_w2": w2}, 16, [])["unet.mid.conv1"]
    assert torch.allclose(found, torch.kron(w1[:, :, None, None], w2), atol=1e-4)


def test_it_reads_what_diffusers_reads() -> None:
    w1, w2 = rand(4, 6), rand(8, 8)
    tensors = {f"diffusion_model.layers.0.attention.to_q.{n}": t for n, t in (("lokr_w1", w1), ("lokr_w2", w2))}
    theirs = _convert_non_diffusers_lokr_to_diffusers(dict(tensors))
    assert all(any(torch.equal(part, mine) for mine in (w1, w2)) for part in theirs.values() if part.ndim == 2)
    (found,) = imported(dict(tensors), 32, []).values()
    assert torch.allclose(found, torch.kron(w1, w2), atol=1e-4)


def test_nothing_is_converted_unsaid_and_what_is_not_read_is_refused() -> None:
    whole = {f"{KEY}.lokr_w1": rand(4, 6), f"{KEY}.lokr_w2": rand(8, 8)}
    with pytest.raises(AdapterError, match="is a LoKr or LoHa file.*dreamfleet adapters import"):
        import_adapter({"a.safetensors": write_tensors(whole, {})}, SHAPES)
    for extra, said in (
        ({f"{KEY}.dora_scale": rand(32)}, "dora_scale is no part"),
        ({f"{KEY}.lokr_t2": rand(4)}, "Tucker"),
    ):
        with pytest.raises(AdapterError, match=said):
            import_adapter({"a.safetensors": write_tensors(whole | extra, {})}, SHAPES, say=print)
    del whole[f"{KEY}.lokr_w2"]
    with pytest.raises(AdapterError, match="has no lokr_w2_a. The file is incomplete"):
        import_adapter({"a.safetensors": write_tensors(whole, {})}, SHAPES, say=print)

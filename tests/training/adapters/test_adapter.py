"""The canonical file: equal bytes for equal adapters, read by diffusers as it is, refused if poisoned (law 5)."""

import json
import struct
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny import tiny_pipeline
from training.adapters.adapter import (
    Adapter,
    AdapterError,
    LowRank,
    check_adapter,
    load_adapter,
    save_adapter,
    version_of,
)
from training.adapters.tensor_file import TensorFileError, read_tensors, write_tensors
from training.base.family import canonical

TARGETS = ("to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "time_emb_proj", "conv1", "conv_shortcut")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")


def weights_of(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """The weights that an adapter may change, by canonical key."""
    return {
        canonical(component, name): module.weight
        for component in ("unet", "text_encoder")
        for name, module in getattr(pipeline, component).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def random_adapter(shapes: dict[str, tuple[int, ...]], rank: int = 2, seed: int = 0) -> Adapter:
    """Values that float16 holds exactly, ranks that differ from module to module."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for index, (name, shape) in enumerate(shapes.items()):
        r = rank + index % 2
        down = torch.randn(r, *shape[1:], generator=generator) * 0.2
        up = torch.randn(shape[0], r, *(1,) * (len(shape) - 2), generator=generator) * 0.2
        modules[name] = LowRank(down.half().float(), up.half().float())
    return Adapter(modules)


def shapes_of(pipeline: StableDiffusionPipeline, targets: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    weights = weights_of(pipeline)
    return {name: tuple(weight.shape) for name, weight in weights.items() if name.endswith(targets)}


def add_deltas(pipeline: StableDiffusionPipeline, adapter: Adapter) -> None:
    weights = weights_of(pipeline)
    with torch.no_grad():
        for name, low in adapter.modules.items():
            weights[name] += low.delta()


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipeline("a photo of sks dog", num_inference_steps=3, generator=generator, output_type="pt").images
    assert isinstance(images, torch.Tensor)
    return images


@pytest.fixture
def pipeline(tmp_path: Path) -> StableDiffusionPipeline:
    return tiny_pipeline(tmp_path)


def assert_equal(left: Adapter, right: Adapter) -> None:
    assert left.modules.keys() == right.modules.keys() and left.embeddings.keys() == right.embeddings.keys()
    for name, low in left.modules.items():
        for ours, theirs in zip(low, right.modules[name], strict=True):
            assert torch.equal(ours.float(), theirs.float()), name
    for token, vectors in left.embeddings.items():
        assert torch.equal(vectors.float(), right.embeddings[token].float())
    assert left.metadata == right.metadata


def small() -> Adapter:
    return Adapter(
        {
            "unet.mid_block.attentions.0.to_q": LowRank(torch.ones(2, 4), torch.ones(3, 2)),
            "unet.conv_in": LowRank(torch.ones(1, 4, 3, 3), torch.ones(8, 1, 1, 1)),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1": LowRank(torch.ones(1, 4), torch.ones(3, 1)),
        },
        {"<s1>": torch.arange(4.0)},
        {"trigger": "sks dog", "base": "pocket"},
    )


def test_save_then_load_is_the_same_and_bytes_do_not_depend_on_order() -> None:
    adapter = small()
    data = save_adapter(adapter)
    assert_equal(load_adapter(data), adapter)
    assert save_adapter(load_adapter(data)) == data
    shuffled = Adapter(
        dict(reversed(adapter.modules.items())), adapter.embeddings, dict(reversed(adapter.metadata.items()))
    )
    assert save_adapter(shuffled) == data
    assert len(version_of(data)) == 64 and version_of(data) == version_of(save_adapter(small()))
    secret = Adapter(adapter.modules, adapter.embeddings, adapter.metadata | {"token": "hush", "run": "r-1"})
    assert save_adapter(secret) == data


def test_ranks_that_differ_are_padded_in_the_file_and_back_in_memory() -> None:
    low, wide = LowRank(torch.ones(1, 4), torch.ones(3, 1)), LowRank(torch.ones(3, 4), torch.ones(3, 3))
    adapter = Adapter({"unet.a": low, "unet.b": wide, "text_encoder.text_model.c": low})
    tensors = read_tensors(save_adapter(adapter)).tensors
    assert tensors["unet.a.lora.down.weight"].shape == tensors["unet.b.lora.down.weight"].shape == (3, 4)
    assert tensors["text_encoder.text_model.c.lora_linear_layer.down.weight"].shape == (1, 4)
    assert_equal(load_adapter(save_adapter(adapter)), adapter)
    zero = Adapter({"unet.a": LowRank(torch.zeros(2, 4), torch.zeros(3, 2))})
    assert_equal(load_adapter(save_adapter(zero)), zero)  # nothing was padded, nothing is trimmed


def test_the_keys_are_those_of_every_diffusers() -> None:
    assert set(read_tensors(save_adapter(small())).tensors) == {
        "unet.mid_block.attentions.0.to_q.lora.down.weight",
        "unet.mid_block.attentions.0.to_q.lora.up.weight",
        "unet.conv_in.lora.down.weight",
        "unet.conv_in.lora.up.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
        "lora_embeddings.<s1>",
    }


def test_a_rank_8_adapter_of_sd15_takes_at_most_4_5_megabytes() -> None:
    """Attention and text encoder of SD 1.5: 176 modules, 273,024 parameters for each unit of rank."""
    side = 273_024 // 176 // 2
    names = [f"unet.down_blocks.0.attentions.0.transformer_blocks.{i}.attn1.to_out.0" for i in range(176)]
    adapter = Adapter({name: LowRank(torch.ones(8, side), torch.ones(side + 1, 8)) for name in names})
    assert len(save_adapter(adapter)) <= 4_500_000


@pytest.mark.parametrize("targets", [TARGETS + TEXT_TARGETS, ("attn1.to_q",), ("fc1",), ("conv1",)])
def test_diffusers_loads_the_file_and_draws_our_image(
    pipeline: StableDiffusionPipeline, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    adapter = random_adapter(shapes_of(pipeline, targets))
    adapter.embeddings["<s1>"] = torch.ones(32)
    (tmp_path / "adapter.safetensors").write_bytes(save_adapter(adapter))
    plain = draw(pipeline)
    before = {name: weight.detach().clone() for name, weight in weights_of(pipeline).items()}
    pipeline.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    theirs = draw(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for name, weight in weights_of(pipeline).items():
        change = adapter.modules[name].delta() if name in adapter.modules else torch.zeros_like(weight)
        torch.testing.assert_close(weight - before[name], change, atol=1e-5, rtol=1e-4)
    ours = tiny_pipeline(tmp_path)
    add_deltas(ours, adapter)
    assert (draw(ours) - theirs).abs().max() <= 1e-4
    assert (plain - theirs).abs().max() > 1e-3


def test_an_adapter_that_fits_passes_and_others_are_named(pipeline: StableDiffusionPipeline) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in weights_of(pipeline).items()}
    adapter = random_adapter(shapes_of(pipeline, TARGETS))
    check_adapter(adapter, shapes, max_rank=8)
    name, low = next(iter(adapter.modules.items()))
    poisons = {
        "unet.nothing": Adapter({"unet.nothing": low}),
        "changes nothing": Adapter({}),
        "this base needs": Adapter({name: LowRank(low.down[:, :1], low.up)}),
        "NaN": Adapter({name: LowRank(low.down * float("nan"), low.up)}),
        "expected": Adapter({name: LowRank(low.down[:1], low.up)}),
        r"\[r, in\]": Adapter({name: LowRank(low.down[:0], low.up[:, :0])}),
    }
    for message, poison in poisons.items():
        with pytest.raises(AdapterError, match=message):
            check_adapter(poison, shapes, max_rank=8)
    with pytest.raises(AdapterError, match="rank 3"):
        check_adapter(random_adapter({name: shapes[name]}, rank=3), shapes, max_rank=2)


def test_what_cannot_be_saved_is_named() -> None:
    low = LowRank(torch.ones(1, 2), torch.ones(2, 1))
    for message, adapter in {
        "infinite": Adapter({"unet.a": LowRank(low.down, low.up * 1e6)}),
        "known component": Adapter({"vae.a": low}),
        "text_model": Adapter({"text_encoder.encoder.layers.0.mlp.fc1": low}),
        "without any module": Adapter({}),
        "Bad token": Adapter({}, {"two words": torch.ones(2)}),
    }.items():
        with pytest.raises(AdapterError, match=message):
            save_adapter(adapter)


def container(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def entry(name: str = "a", dtype: str = "F16", shape: tuple[int, ...] = (1,), end: int = 2) -> bytes:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()


POISON = {
    "pickle": b"\x80\x04\x95" + b"\0" * 100,
    "empty": b"",
    "cut short": save_adapter(small())[:200],
    "truncated body": save_adapter(small())[:-1],
    "trailing": save_adapter(small()) + b"x",
    "no json": container(b"{" * 8),
    "no map": container(b"[]"),
    "huge header": container(b" " * ((1 << 20) + 1)),
    "many tensors": container(
        json.dumps({f"t{i}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}).encode()
    ),
    "integers": container(entry(dtype="I64", end=8), b"\0" * 8),
    "repeated": container(b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":{}}', b"\0\0"),
    "overflow": container(entry(shape=(2**40, 2**40), end=2), b"\0\0"),
    "deep": container(b"[" * 100_000),
    "unknown key": write_tensors({"a": torch.ones(1)}, {}),
    "half a module": write_tensors({"unet.a.lora.down.weight": torch.ones(1, 2)}, {}),
    "NaN": write_tensors({"unet.a.lora.down.weight": torch.full((1, 2), float("nan"))}, {}),
}


@pytest.mark.parametrize("poison", POISON)
def test_a_poisoned_file_is_refused(poison: str) -> None:
    with pytest.raises(AdapterError):
        load_adapter(POISON[poison])


def test_a_tensor_file_is_read_by_the_library_and_limited_in_size() -> None:
    import safetensors.torch

    tensors = {"b": torch.randn(2, 3), "a": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(2.0).half()}
    data = write_tensors(tensors, {"z": "1", "a": "é"})
    assert data == write_tensors(dict(reversed(tensors.items())), {"a": "é", "z": "1"})
    read = safetensors.torch.load(data)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert read_tensors(data).metadata == {"a": "é", "z": "1"}
    with pytest.raises(TensorFileError, match="at most 10"):
        read_tensors(data, "adapter", max_bytes=10)

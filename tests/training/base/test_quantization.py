"""A denoiser in 8 bit: real weights of torchao on the CPU; deltas stay as they are. What cannot be had says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from serving.config import EngineSpec, ServeSpec
from serving.local import make_engine
from tests.families import FAMILIES, write_family
from tests.serving.company import Shelf, ask, finished, random_adapter, ref
from tests.tiny import tiny_images
from tests.training.subjects import subject
from tests.training.trainer.test_pack import distance, run
from training.__main__ import main
from training.adapters.fuse import fuse_base
from training.adapters.layout import find_sites
from training.base.base import Base, load_base
from training.base.files.check import check_base
from training.base.files.outline import outline
from training.base.quantization import Quantization, check_quantization
from training.errors import UserError
from training.manifest.defaults import filled
from training.manifest.manifest import parse_manifest
from training.manifest.plan import plan_run, weights_bytes
from training.run.submission import read_manifest
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.trainer.memory import fit_rows, saved_bytes

pytest.importorskip("torchao")
EIGHT: tuple[Quantization, ...] = ("int8", "fp8")
LOSES: dict[Quantization, float] = {"int8": 0.05, "fp8": 0.2}  # at most, of a prediction, on tiny random weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    return {name: write_family(name, folder) for name in ("sd", "sdxl", "klein", "z-image", "flux")}


def opened(folder: Path, kind: Quantization, **options: Any) -> Base:
    return load_base(str(folder), device="cpu", quantization=kind, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", EIGHT)
@pytest.mark.parametrize("name", ["sd", "sdxl", "klein", "z-image", "flux"])
def test_every_family_says_nearly_the_same_in_fewer_bytes(
    folders: dict[str, Path], name: str, kind: Quantization
) -> None:
    plain, small = opened(folders[name], "none"), opened(folders[name], kind)
    layers = [layer for layer in small.denoiser.modules() if isinstance(layer, nn.Linear)]
    assert layers and all(hasattr(layer.weight, "__tensor_flatten__") for layer in layers)
    sites = find_sites(small.facts.denoiser, small.denoiser, small.facts.layers)
    shapes = outline(str(folders[name])).shapes
    assert all(shapes[site.key] == (site.out, *site.down) for site in sites)
    x = torch.randn(2, plain.facts.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    conds, times = plain.encode(["a photo of a dog", "a cat"]), torch.tensor([300.0, 700.0])
    expected, found = plain.predict(x, times, conds), small.predict(x, times, conds)
    lost = float((found - expected).norm() / expected.norm())
    assert 0 < lost < LOSES[kind]
    assert (plain.hash, plain.identity) == (small.hash, small.hash)
    assert small.identity == f"{small.hash} {kind}"


@pytest.mark.parametrize("kind", EIGHT)
def test_subjects_train_over_it_as_alone_in_full_precision(folders: dict[str, Path], kind: Quantization) -> None:
    base = opened(folders["z-image"], kind)
    ones = [subject("a", 1, base.facts), subject("b", 2, base.facts, prior={"source": "prediction"})]
    packed = run(base, ones, slots=2).adapters
    for one in ones:
        alone = run(base, [one]).adapters[one.spec.id]
        assert all(low.up.dtype == torch.float32 and low.up.any() for low in alone.modules.values())
        assert distance(packed[one.spec.id], alone) < 2e-2
    kept = run(base, ones[:1]).adapters["a"]
    assert distance(kept, run(base, ones[:1], gradient_checkpointing=True).adapters["a"]) < 1e-3
    plain = opened(folders["z-image"], "none")
    assert saved_bytes(base) <= 1.05 * saved_bytes(plain)  # quantised weights are no activations
    assert fit_rows(base, 2, state_bytes=0).rows == 2


def test_mixed_rows_are_served_over_it(folders: dict[str, Path]) -> None:
    folder = folders["klein"]
    spec = ServeSpec(base=str(folder), engine=EngineSpec(device="cpu", slots=4, rank=8, base_quantization="int8"))
    engine = make_engine(spec)
    assert engine.base.quantization == "int8"
    adapters = {ref(name): random_adapter(engine.base, seed) for seed, name in enumerate("ab")}
    engine.close()
    requests = [ask(name, scheduler="euler") for name in "ab"]

    def served(*asked: Any) -> list[torch.Tensor]:
        from serving.engine.engine import Engine

        made = Engine(engine.base, spec.engine, Shelf(adapters))
        try:
            return finished(made, list(asked))
        finally:
            made.close()

    for one, latents in zip(requests, served(*requests), strict=True):
        assert (latents - served(one)[0]).abs().max() < 1e-4 * max(1.0, float(latents.abs().max()))


def test_a_manifest_trains_over_it_and_its_adapter_is_not_that_of_the_plain_base(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_images(tmp_path / "rusty", side=40)
    entry = {
        "id": "rusty", "images": "rusty", "class": "dog", "prior": {"source": "prediction"},
        "train": {"max_steps": 1, "mixed_precision": "no"}, "evaluate": {"enabled": False},
        "samples": {"images": 1, "steps": 2},
    }  # fmt: skip
    found = []
    for kind in ("none", "int8"):
        manifest = {"version": 1, "name": "pets", "base": str(folders["z-image"]), "subjects": [entry]}
        (tmp_path / "pets.yaml").write_text(yaml.safe_dump(manifest | {"base_quantization": kind}))
        storage = str(tmp_path / "storage")
        monkeypatch.setattr("sys.argv", ["training", str(tmp_path / "pets.yaml"), "--storage", storage])
        assert main() == 0
        found.append(Registry(open_storage(storage)).resolve("default/rusty").card)
    assert found[0].fingerprint != found[1].fingerprint and found[0].base_hash == found[1].base_hash


def test_a_plan_counts_the_bits(folders: dict[str, Path]) -> None:
    base = outline(str(folders["sdxl"]))
    text = {"version": 1, "name": "m", "subjects": [{"id": "a", "images": "x", "class": "dog"}]}
    plans = {}
    for kind in ("none", "int8", "nf4"):
        manifest = filled(parse_manifest(yaml.safe_dump(text | {"base_quantization": kind})), base.facts)
        plans[kind] = plan_run(manifest, base).packs[0].memory_mb
    assert plans["nf4"] < plans["int8"] < plans["none"]
    linear = sum(shape[0] * shape[1] for shape in base.layers["unet"].values() if len(shape) == 2)
    assert weights_bytes(base, 2, "none") - weights_bytes(base, 2, "int8") == linear
    assert "base_quantization" not in parse_manifest(yaml.safe_dump(text)).model_dump_json()


def test_fusing_writes_full_weights_and_a_quantised_folder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    base = opened(folders["z-image"], "none")
    fuse_base(str(folders["z-image"]), [(random_adapter(base, 1), 1.0)], tmp_path / "fused")
    assert check_base("fused", tmp_path / "fused")
    copy = Path(shutil.copytree(folders["z-image"], tmp_path / "copy"))
    config = copy / "transformer" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "torchao"}})
    )
    with pytest.raises(UserError, match=r"is quantised in the files \(torchao\).*base_quantization"):
        check_base("copy", copy)


def test_what_cannot_be_had_is_said(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="int8, which is not computed in fp64"):
        opened(folders["klein"], "int8", dtype=torch.float64)
    monkeypatch.setattr("training.base.quantization.find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(UserError, match=r"nf4, which needs the package bitsandbytes.*dreamfleet\[quantized\]"):
        opened(folders["klein"], "nf4")
    monkeypatch.setattr("training.base.quantization.find_spec", lambda name: name)
    with pytest.raises(UserError, match="nf4, which needs CUDA; this device is cpu. Take int8 or none"):
        opened(folders["klein"], "nf4")
    monkeypatch.setattr("training.base.quantization.find_spec", lambda name: None)
    with pytest.raises(UserError, match="fp8, which needs the package torchao"):
        check_quantization("fp8")
    check_quantization("none")
    tiny_images(tmp_path / "x", 5)
    train = {"batch_size": 2, "strategy": "zero", "zero": {"stage": 3}}
    entry = {"id": "a", "images": "x", "class": "dog", "train": train}
    text = {"version": 1, "name": "m", "base": str(folders["sd"]), "base_quantization": "int8", "subjects": [entry]}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match="`train.zero.stage` 3 spreads.*`base_quantization` is int8"):
        read_manifest(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(text | {"base_quantization": "int4"}))
    with pytest.raises(UserError, match="base_quantization"):
        read_manifest(tmp_path / "m.yaml")
    assert set(folders) <= set(FAMILIES)

"""A denoiser whose layers wait in host memory: nothing of it stays on the device, and nothing changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from serving.config import EngineSpec, ServeSpec
from serving.engine.engine import Engine
from serving.local import make_engine
from tests.families import write_family
from tests.serving.company import Shelf, ask, finished, random_adapter, ref
from tests.tiny import tiny_images
from tests.training.subjects import subject
from tests.training.trainer.test_pack import distance, run
from training.base.base import load_base
from training.errors import UserError
from training.manifest.plan import reserve
from training.run.submission import read_manifest


@pytest.mark.parametrize("name", ["sd", "sdxl", "klein", "z-image", "flux"])
def test_training_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = str(write_family(name, tmp_path))
    plain, offloaded = load_base(folder, device="cpu"), load_base(folder, device="cpu", offload="layers")
    assert {parameter.device.type for parameter in offloaded.denoiser.parameters()} == {"meta"}
    ones = [subject("a", 1, plain.facts), subject("b", 2, plain.facts, prior={"source": "prediction"})]
    for recompute in (False, True):
        expected, found = (run(base, ones, slots=2, gradient_checkpointing=recompute) for base in (plain, offloaded))
        assert all(distance(expected.adapters[id], found.adapters[id]) == 0 for id in ("a", "b"))
    assert {parameter.device.type for parameter in offloaded.denoiser.parameters()} == {"meta"}


def test_serving_is_the_same(tmp_path: Path) -> None:
    folder = write_family("klein", tmp_path)
    latents = []
    for offload in ("none", "layers"):
        spec = ServeSpec(base=str(folder), engine=EngineSpec(device="cpu", slots=4, rank=8, base_offload=offload))
        first = make_engine(spec)
        adapters = {ref(id): random_adapter(first.base, seed) for seed, id in enumerate("ab")}
        first.close()
        engine = Engine(first.base, spec.engine, Shelf(adapters))
        latents.append(torch.cat(finished(engine, [ask(id, scheduler="euler") for id in "ab"])))
        engine.close()
    one, other = latents  # which rows share a forward depends on when their adapters came
    assert torch.allclose(one, other, atol=1e-4)


def test_what_does_not_go_with_it_is_said(tmp_path: Path) -> None:
    folder = write_family("z-image", tmp_path)
    tiny_images(tmp_path / "x", 5)

    def read(train: dict[str, Any], **more: Any) -> Any:
        entry = {"id": "a", "images": "x", "class": "dog", "train": train}
        text = {"version": 1, "name": "m", "base": str(folder), "base_offload": "layers", "subjects": [entry], **more}
        (tmp_path / "m.yaml").write_text(yaml.safe_dump(text))
        return read_manifest(tmp_path / "m.yaml")

    checked, outlined = read({"batch_size": 2})
    assert checked.base_offload == "layers" and reserve(checked, outlined) == ()
    with pytest.raises(UserError, match="`train.strategy: zero` knows no `base_offload`"):
        read({"batch_size": 2, "strategy": "zero"})
    with pytest.raises(UserError, match="`base_offload` is layers and `base_quantization` is int8; one of them"):
        read({}, base_quantization="int8")

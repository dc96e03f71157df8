"""A subject on a flow-matching base learns what the usual script learns on the same draws, step after step."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model

from tests.families import write_family
from tests.pipelines import script_velocity
from tests.training.subjects import subject
from tests.training.trainer.test_pack import TIGHT, distance, run
from training.adapters.adapter import Adapter, LowRank
from training.adapters.layout import find_sites
from training.base.base import Base, load_base
from training.base.names import canonical
from training.base.stream import shuffled, stream
from training.trainer.member import Subject

RANK = 4


def by_script(base: Base, one: Subject) -> Adapter:
    """diffusers' loop, with PEFT's layers, on the draws that the subject's seed stands for."""
    pipeline, loop = DiffusionPipeline.from_pretrained(base.folder, local_files_only=True), one.spec.train
    transformer = copy.deepcopy(base.denoiser)
    sites = find_sites("transformer", transformer, base.facts.targets)
    names = [site.key.removeprefix("transformer.") for site in sites]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), transformer)
    layers = {name: p for name, p in transformer.named_parameters() if "lora" in name}
    for name, parameter in layers.items():
        if "lora_A" in name:
            key = canonical("transformer", name.split(".lora_")[0])
            parameter.data.copy_(torch.randn(parameter.shape, generator=stream(loop.seed, "init", key)) / RANK)
    optimizer = torch.optim.AdamW(layers.values(), lr=loop.learning_rate, weight_decay=loop.adam_weight_decay)
    conds = base.encode([one.spec.filled_instance_prompt] * loop.batch_size)
    for step in range(loop.max_steps):
        generator = stream(loop.seed, "instance", step, 0)
        picked = shuffled(loop.seed, "instance", 5, step * loop.batch_size, loop.batch_size)
        clean = torch.stack(one.instance.draw(picked, generator))
        noise = torch.stack([torch.randn(image.shape, generator=generator) for image in clean]).double()
        sigmas = torch.rand(loop.batch_size, generator=generator).double()
        s = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - s) * clean.double() + s * noise
        prediction = script_velocity(pipeline, transformer, noisy, sigmas, conds)
        torch.nn.functional.mse_loss(prediction, noise - clean.double()).backward()
        torch.nn.utils.clip_grad_norm_(layers.values(), loop.max_grad_norm or 1.0)
        optimizer.step()
        optimizer.zero_grad()
    downs = {name: p.detach() for name, p in layers.items() if "lora_A" in name}
    return Adapter(
        {
            canonical("transformer", name.split(".lora_")[0]): LowRank(
                down, layers[name.replace("lora_A", "lora_B")].detach()
            )
            for name, down in downs.items()
        }
    )


@pytest.mark.parametrize("family", ["klein", "z-image", "flux"])
def test_training_is_the_usual_scripts(family: str, tmp_path: Path) -> None:
    base = load_base(str(write_family(family, tmp_path)), device="cpu", dtype=torch.float64)
    settings = {"prior": {"enabled": False}, "train": {"batch_size": 2, "max_steps": 3}, "lora": {"rank": RANK}}
    one = subject("a", 3, base.facts, **settings)
    assert distance(run(base, [one]).adapters["a"], by_script(base, one)) <= TIGHT

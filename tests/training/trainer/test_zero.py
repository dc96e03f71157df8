"""One subject over two processes: equal to one process, in both stages, and as any pack to its leader."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from tests.training.subjects import subject
from tests.training.trainer.test_pack import TARGETS, distance, run
from training.adapters.adapter import Adapter
from training.base.base import Base, load_base
from training.manifest.subject import ZeroSpec
from training.sampling.sampler import sample
from training.trainer.checkpoint import dump_state, load_state
from training.trainer.member import Subject
from training.trainer.pack import Pack, training_bank

WORKERS = 2
SETTINGS: dict[str, dict[str, Any]] = {
    # three rows: one process has two of them, the other one
    "uneven": {"seed": 1, "train": {"batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}},
    "words": {
        "seed": 2,
        "instance_prompt": "a photo of <x> dog",
        "words": {"tokens": ["<x>"]},
        "prior": {"source": "prediction"},
        "lora": {"rank": 4, "alpha": 16},
        "train": {"batch_size": 2, "lr_scheduler": "linear", "adam_weight_decay": 0.5},
    },
}
TIGHT = 1e-4


def made(name: str) -> Subject:
    return subject(name, **SETTINGS[name])


def _gang(rank: int, folder: str, stage: int, offload: bool, out: str) -> None:
    """What each process does: the first leads both subjects through a pack, samples, and stops and resumes one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORKERS))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=WORKERS)
    from training.trainer import zero

    zero.SMALL = 0  # everything here is small
    base = load_base(folder, device="cpu")
    spec = ZeroSpec(stage=stage, offload=offload, workers=WORKERS)  # type: ignore[arg-type]
    options: dict[str, Any] = {"gradient_checkpointing": stage == 3}
    pack = zero.GangPack(
        base, training_bank(base, slots=1, rank=8, targets=TARGETS, words=2), zero.Gang(), spec, **options
    )
    if rank > 0:
        pack.follow()
    else:
        found = {name: _lead(base, pack, made(name), stage) for name in SETTINGS}
        pack.close()
        torch.save(found, out)
    # one that ends while another still talks to it takes that one along
    distributed.barrier()
    distributed.destroy_process_group()


def _lead(base: Base, pack: Pack, one: Subject, stage: int) -> dict[str, Any]:
    pack.join(one)
    losses = _steps(pack, 2)
    shown = _sample(base, pack, one.spec.id)
    resumed = load_state(dump_state(pack.state(one.spec.id)))
    pack.leave(one.spec.id)
    pack.join(Subject(one.spec, one.instance, one.prior, resumed))
    losses += _steps(pack, one.spec.train.max_steps - 2)
    adapter = pack.adapter(one.spec.id)
    if stage == 3:
        assert all(parameter.numel() == 0 for parameter in base.denoiser.parameters())
    pack.leave(one.spec.id)
    return {"losses": losses, "adapter": adapter, "shown": shown}


def _steps(pack: Pack, count: int) -> list[float]:
    """The losses of so many optimizer steps."""
    losses: list[float] = []
    while len(losses) < count:
        losses += [report.loss for report in pack.step()]
    return losses


def _sample(base: Base, pack: Pack, id: str) -> torch.Tensor:
    slot, scale = pack.slot(id)
    return sample(base, ["a dog"], seeds=[0], steps=2, bank=pack.bank, slots=[slot], scales=[scale])


@pytest.mark.parametrize(("stage", "offload"), [(2, False), (3, False), (3, True)])
def test_it_equals_one_process(tiny: Base, tiny_folder: Path, tmp_path: Path, stage: int, offload: bool) -> None:
    out = str(tmp_path / "found")
    spawn(_gang, args=(str(tiny_folder), stage, offload, out), nprocs=WORKERS)
    found = torch.load(out, weights_only=False)
    for name in SETTINGS:
        alone = run(tiny, [made(name)])
        losses = [report.loss for report in alone.reports[name]]
        assert found[name]["losses"] == pytest.approx(losses, abs=1e-5)
        assert distance(found[name]["adapter"], alone.adapters[name]) < TIGHT
        assert distance(found[name]["adapter"], _beginning(tiny, name)) > 100 * TIGHT
        halfway = run(tiny, [made(name)], stop=2 * made(name).spec.train.gradient_accumulation_steps).states[name]
        pack = Pack(tiny, training_bank(tiny, slots=1, rank=8, targets=TARGETS, words=2))
        pack.join(Subject(made(name).spec, made(name).instance, made(name).prior, halfway))
        assert (found[name]["shown"] - _sample(tiny, pack, name)).abs().max() < 1e-2
        pack.close()


def _beginning(base: Base, name: str) -> Adapter:
    """The adapter a subject begins with."""
    pack = Pack(base, training_bank(base, slots=1, rank=8, targets=TARGETS, words=2))
    pack.join(made(name))
    first = pack.adapter(name)
    pack.close()
    return first

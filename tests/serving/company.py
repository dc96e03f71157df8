"""What the serving tests share: random adapters, an engine over the tiny base, and ways to drive it."""

import threading
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from serving.config import EngineSpec
from serving.engine.engine import Engine
from serving.engine.job import Done, Job, JobFailed
from serving.engine.request import AdapterRef, AdapterUse, GenerateRequest
from training.adapters.adapter import Adapter, LowRank
from training.adapters.layout import find_sites
from training.base.base import Base

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj")
TEXT = ("q_proj", "v_proj")


def random_adapter(
    base: Base, seed: int, *, rank: int = 4, targets: tuple[str, ...] = ATTENTION, text: bool = True, size: float = 0.5
) -> Adapter:
    """An adapter with noise in every layer of `targets`, strong enough to change every picture."""
    generator = torch.Generator().manual_seed(seed)
    wanted = dict.fromkeys(base.facts.text_encoders, TEXT if text else ()) | {base.facts.denoiser: targets}
    modules = {}
    for component, model in base.models.items():
        for site in find_sites(component, model, wanted[component]):
            tail = (1,) * (len(site.down) - 1)
            down = torch.randn(rank, *site.down, generator=generator) / site.size(1) ** 0.5
            up = torch.randn(site.out, rank, *tail, generator=generator) * size
            modules[site.key] = LowRank(down, up)
    return Adapter(modules)


def ref(name: str, tenant: str = "default", version: str = "1") -> AdapterRef:
    return AdapterRef(tenant=tenant, id=name, version=version)


class Shelf:
    """Stands for the registry: gives adapters by reference, counts, and can be made to wait or to fail."""

    def __init__(self, adapters: Mapping[AdapterRef, Adapter]) -> None:
        self.adapters = dict(adapters)
        self.fetched: list[AdapterRef] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, key: AdapterRef) -> Adapter:
        self.fetched.append(key)
        assert self.gate.wait(10)
        return self.adapters[key]


def ask(*worn: tuple[str, float] | str, **changes: object) -> GenerateRequest:
    """A request on the tiny base; `worn` are adapters, with weight 1 or as given."""
    uses = []
    for one in worn:
        name, weight = one if isinstance(one, tuple) else (one, 1.0)
        uses.append(AdapterUse(ref=ref(name), weight=weight))
    fields: dict[str, object] = {
        "prompt": "a photo of a dog", "width": 16, "height": 16, "seed": 1, "steps": 3, "guidance_scale": 3.0,
        "adapters": tuple(uses),
    }  # fmt: skip
    return GenerateRequest.model_validate({**fields, **changes})


def small(**changes: object) -> EngineSpec:
    return EngineSpec.model_validate({"device": "cpu", "slots": 8, "rank": 8, "max_rows": 16, **changes})


def run(engine: Engine, jobs: Iterable[Job], between: Callable[[int], None] = lambda step: None) -> dict[Job, object]:
    """Steps until all jobs have ended: images [n, H, W, 3] uint8, or the error. `between(step)` runs before a step."""
    left = set(jobs)
    images: dict[Job, dict[int, Tensor]] = {job: {} for job in left}
    ends: dict[Job, object] = {}
    for step in range(2000):
        between(step)
        left -= {job for job in left if job.over}  # cancelled
        if engine.idle:
            engine.woken.wait(0.02)
            engine.woken.clear()
        for outcome in engine.step():
            if isinstance(outcome, Done) and outcome.job in images:
                images[outcome.job][outcome.index] = outcome.pixels
                if len(images[outcome.job]) == outcome.job.request.count:
                    ends[outcome.job] = torch.stack([images[outcome.job][i] for i in sorted(images[outcome.job])])
                    left.discard(outcome.job)
            elif isinstance(outcome, JobFailed) and outcome.job in images:
                ends[outcome.job] = outcome.error
                left.discard(outcome.job)
        if not left:
            return ends
    raise AssertionError(f"{len(left)} jobs did not end")


def picture(engine: Engine, request: GenerateRequest) -> Tensor:
    """The images of one request served alone."""
    job = engine.submit(request)
    end = run(engine, [job])[job]
    if isinstance(end, Exception):
        raise end
    assert isinstance(end, Tensor)
    return end


def finished(engine: Engine, requests: list[GenerateRequest]) -> list[Tensor]:
    """The final latents [n, C, h, w] of requests that are served together: what law 4 speaks about, before rounding."""
    jobs = [engine.submit(request) for request in requests]
    samples = [list(job.samples) for job in jobs]
    ends = run(engine, jobs)
    for end in ends.values():
        if isinstance(end, Exception):
            raise end
    return [torch.stack([sample.latents for sample in group if sample.latents is not None]) for group in samples]

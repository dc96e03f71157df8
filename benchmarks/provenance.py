"""How often a picture is told to be ours after what the world does to it: `python -m benchmarks.provenance --out FILE`.

Pictures are made by an engine with a mark, over a storage with records, then attacked, and looked at by the detector
that `POST /v1/detect` uses. Unmarked pictures, attacked too, say how often it errs.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.attacks import ATTACKS
from serving.config import EngineSpec, ServeSpec
from serving.engine.engine import Engine
from serving.engine.job import Done, JobEvent
from serving.engine.loop import EngineLoop
from serving.engine.reading import reading_request
from serving.engine.request import AdapterRef, AdapterUse, GenerateRequest
from serving.http.detection import Detector
from serving.local import LocalEngines
from serving.marking.code import BITS
from serving.marking.noise import NoiseMark
from serving.marking.serials import Issued, Serials
from serving.marking.views import Supposition, looked_at
from training.adapters.adapter import Adapter, LowRank
from training.adapters.layout import find_sites
from training.base.base import Base, load_base
from training.storage.picture_hash import picture_hash
from training.storage.storage import open_storage

THINGS = ("dog", "cat", "rabbit", "bear", "frog", "penguin", "duck", "robot", "car", "cup", "backpack", "mushroom")
PLACES = ("on the grass", "on the beach", "in the snow", "at night", "in the water", "in the desert", "in the forest")
MARK = NoiseMark(b"benchmark".ljust(32, b"."))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.provenance", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/provenance.json"))
    parser.add_argument("--write", action="store_true", help="for `python -m benchmarks`; the file is written anyway")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--unmarked", type=int, default=500)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--adapters", action="store_true", help="half of the pictures wear a random adapter")
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS))
    parser.add_argument("--thorough", nargs="*", default=[], help="attacks looked at with parts supposed cut off")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    found = asyncio.run(measure(arguments))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))


async def measure(arguments: Any) -> dict[str, Any]:
    """All numbers, by attack; written by `main`."""
    base, rng = load_base(arguments.base, device="cpu"), np.random.default_rng(0)
    storage = open_storage(tempfile.mkdtemp())
    serials = Serials(storage)
    adapters = _adapters(base) if arguments.adapters else {}
    marked = pictures(base, MARK, arguments.pictures, arguments.side, adapters)
    for seed, image in marked.items():
        serials.keep(
            Issued(serial=MARK.serial("default", seed), tenant="default", adapters=(), request=f"r{seed}", index=0,
                   time=datetime.now(UTC).isoformat(), looks=picture_hash(image))
        )  # fmt: skip
    others = pictures(base, None, arguments.unmarked, arguments.side, adapters, first=10**6)
    loop = EngineLoop(Engine(base, EngineSpec(slots=2, rank=4, max_rows=32), _nothing, MARK))
    detector = Detector(LocalEngines(loop), base.facts, serials, most_px=ServeSpec().limits.side_px)
    found: dict[str, Any] = {"settings": {k: v for k, v in vars(arguments).items() if k != "out"}, "attacks": {}}
    for name in arguments.attacks:
        began = time.perf_counter()
        thorough = name in arguments.thorough
        images = {seed: ATTACKS[name](image, rng) for seed, image in marked.items()}
        seen = await _detect(detector, images, thorough)
        right = [one.records[0].request == f"r{seed}" if one.records else False for seed, one in seen.items()]
        bits = await _bits(loop, images) if not name.startswith(("crop", "half size")) or "back" in name else None
        found["attacks"][name] = {
            "detected": float(np.mean([one.made_here for one in seen.values()])),
            "traced": float(np.mean(right)),
            "bits": bits,
            "median_log10": float(np.median([np.log10(max(one.false_positive, 1e-300)) for one in seen.values()])),
            "seconds": time.perf_counter() - began,
        }
        print(name, found["attacks"][name], flush=True)
    if others:
        cycle = list(ATTACKS)[:4]
        images = {seed: ATTACKS[cycle[seed % 4]](image, rng) for seed, image in others.items()}
        seen = await _detect(detector, images, False)
        chances = sorted(one.false_positive for one in seen.values())
        found["unmarked"] = {
            "pictures": len(chances), "detected": sum(one.made_here for one in seen.values()), "least": chances[0],
            "below_0.01": sum(one < 0.01 for one in chances), "below_0.1": sum(one < 0.1 for one in chances),
        }  # fmt: skip
        print("unmarked", found["unmarked"], flush=True)
    loop.close()
    return found


async def _detect(detector: Detector, images: dict[int, Image.Image], thorough: bool) -> dict[int, Any]:
    waiting = asyncio.Semaphore(16)

    async def one(image: Image.Image) -> Any:
        async with waiting:
            view = Supposition(image.size, image.size)
            return await detector.detect(looked_at(image, view), "picture", thorough=thorough)

    found = await asyncio.gather(*(one(image) for image in images.values()))
    return dict(zip(images, found, strict=True))


async def _bits(loop: EngineLoop, images: dict[int, Image.Image]) -> float:
    """The share of the serials' bits that are right, each picture read alone and without its record."""
    right: list[float] = []
    for seed, image in list(images.items())[:24]:
        data = looked_at(image, Supposition(image.size, image.size))
        reading = await loop.read(reading_request(data, *image.size, deadline_s=600))
        width = BITS * reading.words
        wrong = (reading.serial ^ MARK.serial("default", seed)) & (1 << width) - 1
        right.append(1 - wrong.bit_count() / width)
    return float(np.mean(right))


def pictures(
    base: Base, mark: NoiseMark | None, count: int, side: int, adapters: dict[AdapterRef, Adapter], first: int = 0
) -> dict[int, Image.Image]:
    """Pictures by seed, as a server makes them by default."""
    engine = Engine(base, EngineSpec(slots=4, rank=4, max_rows=32, queue=10**6), adapters.__getitem__, mark)
    for index in range(count):
        uses = (AdapterUse(ref=list(adapters)[index // 2 % len(adapters)]),) if adapters and index % 2 else ()
        place = PLACES[index // len(THINGS) % len(PLACES)]
        engine.submit(
            GenerateRequest(
                prompt=f"a photo of a {THINGS[index % len(THINGS)]} {place}", width=side, height=side, adapters=uses,
                seed=first + index, steps=base.facts.steps, guidance_scale=base.facts.guidance_scale,
                scheduler=base.facts.sampler, deadline_s=1e6,
            )
        )  # fmt: skip
    made: dict[int, Image.Image] = {}
    while engine.jobs:
        events: Sequence[JobEvent] = engine.step()
        made |= {one.seed: Image.fromarray(one.pixels.numpy()) for one in events if isinstance(one, Done)}
    engine.close()
    return dict(sorted(made.items()))


def _adapters(base: Base) -> dict[AdapterRef, Adapter]:
    """Two adapters of rank 4 with noise in all attention layers, strong enough to change every picture."""
    found = {}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        modules = {}
        for component in (base.facts.denoiser,):
            for site in find_sites(component, base.models[component], base.facts.targets):
                tail = (1,) * (len(site.down) - 1)
                down = torch.randn(4, *site.down, generator=generator) / site.size(1) ** 0.5
                modules[site.key] = LowRank(down, torch.randn(site.out, 4, *tail, generator=generator) * 0.02)
        found[AdapterRef(tenant="default", id=f"a{seed}", version="0")] = Adapter(modules)
    return found


def _nothing(ref: AdapterRef) -> Adapter:
    raise KeyError(ref)


if __name__ == "__main__":
    main()

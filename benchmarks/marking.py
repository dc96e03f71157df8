"""What marks cost a server: images with both layers on and off, in turns: `python -m benchmarks.marking`.

The whole app over one engine, in one process: noise mark, record, XMP and C2PA on, or all of it off. Prints the ratio
of the fastest rounds, by the clock and by the CPU (all threads).
"""

import argparse
import asyncio
import tempfile
import time
from typing import Any

import httpx
import torch
from fastapi import FastAPI

from serving.config import EngineSpec, ServeSpec
from serving.engine.loop import EngineLoop
from serving.local import make_app, make_engine
from serving.marking.settings import MarkSpec


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.marking", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--images", type=int, default=8, help="of one round")
    parser.add_argument("--write", action="store_true", help="for `python -m benchmarks`; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(asyncio.run(measure(arguments.rounds, arguments.images)))


async def measure(rounds: int, images: int) -> dict[str, Any]:
    """Seconds of a round with and without marks, and their ratios."""
    loops: list[EngineLoop] = []
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    clients: dict[str, httpx.AsyncClient] = {}
    for name, spec in (("on", MarkSpec()), ("off", MarkSpec(watermark="none", credentials=False))):
        engine = EngineSpec(slots=2, rank=4, device="cpu", threads=1)
        server = ServeSpec(storage=tempfile.mkdtemp(), engine=engine, marks=spec, picture_parameters=False)
        loops.append(EngineLoop(make_engine(server)))
        app: FastAPI = make_app(server, loops[-1])
        clients[name] = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1", timeout=600
        )
        seconds[name] = ([], [])
    for turn in range(rounds + 1):  # the first warms up
        for name, client in sorted(clients.items(), reverse=turn % 2 == 0):  # each is first in every other round
            wall, cpu = time.perf_counter(), time.process_time()
            calls = [
                client.post("/v1/images/generations", json={"prompt": "a photo of a dog", "seed": turn * 100 + index})
                for index in range(images)
            ]
            for response in await asyncio.gather(*calls):
                response.raise_for_status()
            if turn:
                seconds[name][0].append(time.perf_counter() - wall)
                seconds[name][1].append(time.process_time() - cpu)
    for loop in loops:
        loop.close()
    found: dict[str, Any] = {"rounds": rounds, "images": images}
    for index, kind in enumerate(("wall", "cpu")):
        off, on = (min(seconds[name][index]) for name in ("off", "on"))
        found |= {f"{kind}_off_s": round(off, 3), f"{kind}_on_s": round(on, 3), f"{kind}_ratio": round(off / on, 3)}
    return found


if __name__ == "__main__":
    main()

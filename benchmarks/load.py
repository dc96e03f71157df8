"""A server under load: what one tenant's requests do to another's, and 200 clients at once of which some leave.

    python -m benchmarks.load [--against CHECKOUT] [--write]

With `--against`, the folder of another checkout, every part is measured on both, one right after the other.

Fairness: an engine on one thread, the embedded base, six adapters. A light tenant asks for one small image now and then
(Poisson, about a quarter of the time); heavy tenants always have so many images waiting or running. Time is CPU time of
the process, so other work on the machine does not count: a step costs what it costs, and requests come when due.
"Alone" is the same requests at the same times with nobody else there; "others" is what the heavy tenants got, in
thousands of rows x cells a second.

The crowd: a real server over HTTP, 200 clients at once over six adapters, of whom one in five disconnects. Time is by
the clock. Before and after, the same request must give the same picture, and nothing may be left behind.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.serving import ATTENTION, engine_over, markdown, random_adapter, ref, shelf
from serving.engine.engine import Engine
from serving.engine.job import Done, Job, JobFailed
from serving.engine.request import AdapterUse, GenerateRequest
from training.adapters.adapter import save_adapter
from training.base.base import load_base

RESULT = Path(__file__).with_suffix(".md")
ADAPTERS, GUIDANCE, LIGHT_SIDE = 6, 4.0, 64
CLIENTS, LEAVE_ONE_IN = 200, 5


@dataclass(frozen=True, slots=True)
class Heavy:
    """A tenant that always has `images` waiting or running, of the sizes in turn, pixels."""

    tenant: str
    images: int
    sides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """Who is there beside the light tenant. `steps` of every image; `requests` of the light tenant."""

    title: str
    heavies: tuple[Heavy, ...]
    steps: int = 10
    requests: int = 12


SCENES = {
    "flood": Scene("a flood of its own size, 64 px", (Heavy("flood", 40, (64,)),)),
    "one-large": Scene("one image of 256 px", (Heavy("large", 1, (256,)),)),
    "one-huge": Scene("one image of 512 px", (Heavy("huge", 1, (512,)),), steps=25, requests=6),
    "many-sizes": Scene(
        "16 images of 16 sizes, 32 to 272 px", (Heavy("sizes", 16, tuple(range(32, 288, 16))),), requests=8
    ),
    "mixed": Scene(
        "three floods, of 64, 128 and 256 px",
        (Heavy("small", 40, (64,)), Heavy("medium", 16, (128,)), Heavy("large", 8, (256,))),
        requests=8,
    ),
}


# -- fairness: an engine in CPU time --


class Play:
    """One scene on one engine."""

    def __init__(self, engine: Engine, scene: Scene, due: Sequence[float]) -> None:
        self.engine = engine
        self.scene = scene
        self.due = list(due)
        self.now = 0.0
        self.latencies: list[float] = []
        self.heavy_cells = 0  # rows x cells of all steps of the heavy tenants' images
        self._came: dict[Job, float] = {}
        self._asked = dict.fromkeys((heavy.tenant for heavy in scene.heavies), 0)
        self._open = dict.fromkeys(self._asked, 0)

    def run(self) -> None:
        """Until every request of the light tenant is done."""
        wanted = len(self.due)
        while len(self.latencies) < wanted:
            self._submit()
            if self.engine.idle:
                self.engine.woken.wait(1)
            self.engine.woken.clear()
            began = time.process_time()
            outcomes = self.engine.step()
            self.now += time.process_time() - began
            for outcome in outcomes:
                assert not isinstance(outcome, JobFailed), outcome
                if isinstance(outcome, Done):
                    self._done(outcome)
        for job in list(self.engine.jobs):
            self._count(job, sum(sample.step for sample in job.samples))
            self.engine.cancel(job)

    def _submit(self) -> None:
        if not self.engine.jobs and not self._asked and self.due:
            self.now = max(self.now, self.due[0])
        while self.due and self.due[0] <= self.now:
            came = self.due.pop(0)
            self._came[self.engine.submit(self._request("light", LIGHT_SIDE, len(self.due)))] = came
        for heavy in self.scene.heavies:
            while self._open[heavy.tenant] < heavy.images:
                number = self._asked[heavy.tenant]
                self.engine.submit(self._request(heavy.tenant, heavy.sides[number % len(heavy.sides)], number))
                self._asked[heavy.tenant] += 1
                self._open[heavy.tenant] += 1

    def _done(self, outcome: Done) -> None:
        request = outcome.job.request
        if request.tenant == "light":
            self.latencies.append(self.now - self._came.pop(outcome.job))
        else:
            self._open[request.tenant] -= 1
            self._count(outcome.job, request.steps)

    def _count(self, job: Job, steps: int) -> None:
        request = job.request
        self.heavy_cells += 2 * steps * request.width * request.height // self.engine.base.facts.cell_px**2

    def _request(self, tenant: str, side: int, number: int) -> GenerateRequest:
        return GenerateRequest(
            tenant=tenant,
            prompt="a photo of a dog on the grass",
            adapters=(AdapterUse(ref=ref(number % ADAPTERS)),),
            width=side,
            height=side,
            seed=number,
            steps=self.scene.steps,
            guidance_scale=GUIDANCE,
            deadline_s=86400,
        )


def fairness(name: str) -> dict[str, float]:
    """Seconds of the light tenant's requests alone and in company; rows x cells a second of the others."""
    torch.set_num_threads(1)
    scene, base = SCENES[name], load_base("pocket", device="cpu")
    alone = Scene("", (), scene.steps)
    with engine_over(base, shelf(base, ADAPTERS), slots=16) as engine:
        Play(engine, alone, [0.0] * ADAPTERS).run()  # every adapter is in its slot, everything warm
        one = Play(engine, alone, [0.0])
        one.run()
        choose, due = random.Random(1), [0.0]
        for _ in range(scene.requests):
            due.append(due[-1] + choose.expovariate(1 / (4 * one.now)))
        quiet, beside = Play(engine, alone, due[1:]), Play(engine, scene, due[1:])
        quiet.run()
        beside.run()
    return {
        "alone p50": share(quiet.latencies, 0.5),
        "alone p95": share(quiet.latencies, 0.95),
        "p50": share(beside.latencies, 0.5),
        "p95": share(beside.latencies, 0.95),
        "others": beside.heavy_cells / beside.now,
    }


def share(values: Sequence[float], part: float) -> float:
    """The value that this part of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


# -- the crowd: a server over HTTP --


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server of this checkout with six adapters: its URL and process."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log = (folder / "server.log").open("w")
    command = [sys.executable, "-m", "serving", "--storage", str(folder / "storage"), "--port", str(port)]
    process = subprocess.Popen([*command, "--threads", "2"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            _until_healthy(client, process)
            base = load_base("pocket", device="cpu")
            for index in range(ADAPTERS):
                file = {"file": ("a.safetensors", save_adapter(random_adapter(base, index, ATTENTION)))}
                client.post("/v1/adapters", data={"id": f"a{index}"}, files=file).raise_for_status()
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _until_healthy(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(httpx.TransportError):
            if client.get("/healthz").status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError("the server does not become healthy")


async def ask(client: httpx.AsyncClient, number: int, patience_s: float | None = None) -> dict[str, Any]:
    """What became of one request: how it ended, seconds, picture."""
    body = {"prompt": "a dog", "model": f"pocket:default/a{number % ADAPTERS}", "seed": number, "steps": 4}
    began = time.perf_counter()
    try:
        async with asyncio.timeout(patience_s):
            answer = await client.post("/v1/images/generations", json=body)
    except TimeoutError:
        return {"end": "left"}
    end = "done" if answer.status_code == 200 else str(answer.status_code)
    picture = answer.json()["data"][0]["b64_json"] if end == "done" else ""
    return {"end": end, "seconds": time.perf_counter() - began, "picture": picture}


async def storm(url: str, process: psutil.Process) -> dict[str, float]:
    choose = random.Random(2)
    limits = httpx.Limits(max_connections=2 * CLIENTS)
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=600, limits=limits) as client:
        before = await ask(client, 0)
        counted = (await client.get("/metrics")).text
        began, worked = time.perf_counter(), process.cpu_times()
        patience = [choose.uniform(0.1, 5) if not number % LEAVE_ONE_IN else None for number in range(CLIENTS)]
        ends = await asyncio.gather(*(ask(client, number, wait) for number, wait in enumerate(patience)))
        seconds = time.perf_counter() - began
        work = process.cpu_times()
        metrics = (await client.get("/metrics")).text
        after = await ask(client, 0)
        await asyncio.sleep(1)
        at_rest = (await client.get("/metrics")).text
    steps, rows = (_value(metrics, name) - _value(counted, name) for name in ("steps_total", "rows_total"))
    done = [end["seconds"] for end in ends if end["end"] == "done"]
    return {
        "done": len(done),
        "left": sum(end["end"] == "left" for end in ends),
        "failed": sum(end["end"] not in ("done", "left") for end in ends),
        "rate": len(done) / seconds,
        "steps": steps,
        "rows": rows / steps,
        "work": (work.user + work.system - worked.user - worked.system) / len(done),
        "p50": share(done, 0.5),
        "p95": share(done, 0.95),
        "apart": _apart(before["picture"], after["picture"]),
        "behind": sum(_value(at_rest, name) for name in ("waiting", "running_rows", "slots_pinned")),
    }


def _apart(one: str, other: str) -> float:
    """The largest difference of two pictures' values, of 255."""
    first, second = (Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB") for picture in (one, other))
    return float(np.abs(np.asarray(first, int) - np.asarray(second, int)).max())


def _value(metrics: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(f"dreamfleet_{name}{{"))


def crowd(name: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (url, process):
        return asyncio.run(storm(url, process))


# -- both checkouts, in turn --


def measured(checkout: Path, part: str) -> dict[str, float]:
    """A part, run by a process of its own on the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-W", "ignore", __file__, "--part", part]  # -P: `serving` is not the file beside
    made = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{part} on {checkout.name} ended with {made.returncode}:\n{made.stderr[-2000:]}")
    found: dict[str, float] = json.loads(made.stdout.splitlines()[-1])
    print(checkout.name, part, {key: round(value, 3) for key, value in found.items()}, flush=True)
    return found


def tables(checkouts: dict[str, Path], parts: Sequence[str], rounds: int) -> list[str]:
    fair, storms = [], []
    for name in (name for name in parts if name in SCENES):
        for title, checkout in checkouts.items():
            found = measured(checkout, name)
            seconds = (f"{found[key]:.2f} s" for key in ("alone p50", "alone p95", "p50", "p95"))
            times = (f"{found[key] / found[f'alone {key}']:.1f}" for key in ("p50", "p95"))
            fair.append((SCENES[name].title, title, *seconds, *times, f"{found['others'] / 1000:.1f}"))
    for number in range(rounds if "crowd" in parts else 0):
        for title, checkout in checkouts.items():
            found = measured(checkout, "crowd")
            counts = (f"{found[key]:.0f}" for key in ("done", "left", "failed", "behind", "apart", "steps"))
            speeds = (
                f"{found['rows']:.1f}",
                f"{found['work']:.3f} s",
                f"{found['rate']:.1f}/s",
                f"{found['p50']:.1f} s",
                f"{found['p95']:.1f} s",
            )
            storms.append((str(number + 1), title, *counts, *speeds))
    heads = ["beside", "code", "p50 alone", "p95 alone", "p50", "p95", "p50, times", "p95, times", "others, k cells/s"]
    crowd_heads = ["round", "code", "done", "left", "failed", "left behind", "apart, of 255"]
    crowd_heads += ["steps", "rows a step", "CPU an image", "images", "p50", "p95"]
    made = [
        ("A light tenant's images of 64 px beside others", heads, fair),
        (f"{CLIENTS} clients at once, six adapters, 4 steps, one in five leaves", crowd_heads, storms),
    ]
    return [markdown(title, columns, table) for title, columns, table in made if table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--only", nargs="+", choices=[*SCENES, "crowd"], default=[*SCENES, "crowd"])
    parser.add_argument("--rounds", type=int, default=3, help="of the crowd")
    parser.add_argument("--write", action="store_true", help=f"into {RESULT.name}")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        print(json.dumps(crowd(asked.part) if asked.part == "crowd" else fairness(asked.part)))
        return
    here = Path(__file__).parent.parent
    checkouts = ({"before": asked.against.resolve()} if asked.against else {}) | {
        "after" if asked.against else "this": here
    }
    parts = tables(checkouts, asked.only, asked.rounds)
    print("\n".join(parts))
    if asked.write:
        day, cores = datetime.now(UTC).date().isoformat(), os.cpu_count()
        where = f"{day}, base pocket, {platform.machine()}, {cores} CPU cores, torch {torch.__version__}"
        kept = RESULT.read_text().partition("\n## ")[0] if RESULT.exists() else "# Load\n"
        RESULT.write_text(f"{kept.rstrip()}\n\n## {where}\n\n" + "\n".join(parts))


if __name__ == "__main__":
    main()

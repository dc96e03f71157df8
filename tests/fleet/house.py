"""A whole fleet in this process, on a port of its own, over the tiny base; and OpenAI's client for it."""

import io
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn
from PIL import Image

from fleet.config import FleetSpec
from fleet.service import FleetService
from serving.config import ServeSpec
from serving.engine.engine import Engine
from serving.engine.tiers.fetcher import Fetcher
from serving.http.access.tenants import Keys, Scope
from tests.serving.company import small
from training.base.base import Base
from training.storage.registry import Registry
from training.storage.storage import open_storage

FAST: dict[str, Any] = {
    "class": "dog",
    "instance_prompt": "a photo of sks {class}",
    "prior": {"images": 4, "steps": 2},
    "train": {"max_steps": 6, "checkpoint_every": 3, "learning_rate": 1e-2},
    "samples": {"images": 1, "steps": 2},
    "evaluate": {"steps": 1, "candidates": 2, "likeness_model": "base", "fidelity_model": "base", "hold_out": 0},
}


def photos(count: int = 5, seed: int = 0, folder: str = "") -> bytes:
    """A zip of different coloured noise pictures."""
    buffer = io.BytesIO()
    generator = torch.Generator().manual_seed(seed)
    with zipfile.ZipFile(buffer, "w") as archive:
        for index in range(count):
            pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
            picture = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(picture, "PNG")
            archive.writestr(f"{folder}{index}.png", picture.getvalue())
    return buffer.getvalue()


class House:
    """A fleet that listens on loopback. `tenants`: with keys, else without any."""

    def __init__(self, base: Base, folder: Path, storage: Path, tenants: tuple[str, ...] = (), **changes: Any) -> None:
        keys = Keys(storage / "keys.json") if tenants else None
        self.tokens = {name: keys.make(name)[1] for name in tenants} if keys else {}
        self.keys = keys
        server = ServeSpec(
            base=str(folder),
            storage=str(storage),
            keys=str(storage / "keys.json") if keys else None,
            engine=small(queue=64),
            refresh_s=0.05,
        )
        self.spec = FleetSpec(server=server, **{"warm_s": 5.0, **changes})
        self.storage = open_storage(str(storage))
        self.registry = Registry(self.storage)
        engine = Engine(base, server.engine, Fetcher(self.registry))
        self.service = FleetService(self.spec, engine)
        config = uvicorn.Config(self.service.app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until = time.monotonic() + 30
        while not self._server.started and time.monotonic() < until:
            time.sleep(0.02)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.base = self.service.library.base

    def client(self, tenant: str | None = None) -> openai.OpenAI:
        """OpenAI's client, as it is."""
        token = self.tokens.get(tenant or "", "none")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=120)

    def admin(self, tenant: str, scopes: tuple[Scope, ...] = ("admin",)) -> str:
        """A further key of a tenant."""
        assert self.keys is not None
        return self.keys.make(tenant, scopes)[1]

    def close(self) -> None:
        """Ends the server and the fleet."""
        self._server.should_exit = True
        self._thread.join(30)
        self.service.close()


def wait_for(client: openai.OpenAI, job: str, *states: str, seconds: float = 120) -> Any:
    """The job once its status is one of `states`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in states:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{job} is {found.status}, not {states}: {found}")

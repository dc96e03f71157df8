"""A whole server in one process: engine, loop and app over one storage. Ray's replicas are made of the same parts."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from fastapi import FastAPI

from serving.config import ServeSpec
from serving.engine.engine import Engine
from serving.engine.job import EngineStats
from serving.engine.loop import EngineLoop
from serving.engine.request import AdapterRef, GenerateRequest, NoiseReading
from serving.engine.tiers.disk import DiskCache
from serving.engine.tiers.fetcher import Fetcher
from serving.http.app import create_app, open_keys
from serving.http.library import Library
from serving.marking.marks import Marks, noise_mark, pixel_mark
from training.base.base import best_device, load_base
from training.base.files.folder import EMBEDDED
from training.base.files.outline import outline
from training.storage.networks import NetworkFolders
from training.storage.registry import Registry
from training.storage.storage import LocalStorage, open_storage

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class LocalEngines:
    """The one engine of this process, as the app sees all engines."""

    loop: EngineLoop

    async def forget(self, ref: AdapterRef) -> None:
        """See `Engines`."""
        self.loop.forget(ref)

    async def preload(self, ref: AdapterRef) -> None:
        """See `Engines`."""
        self.loop.preload(ref)

    async def withhold(self, names: frozenset[str]) -> None:
        """See `Engines`."""
        self.loop.withhold(names)

    async def stats(self) -> Mapping[str, EngineStats]:
        """See `Engines`."""
        return {"local": self.loop.stats()}

    async def ready(self) -> bool:
        """See `Engines`."""
        return self.loop.healthy

    async def read(self, request: GenerateRequest) -> NoiseReading:
        """See `Engines`."""
        return await self.loop.read(request)


def make_engine(spec: ServeSpec) -> Engine:
    """Loads the base and lays a bank over it."""
    device = torch.device(spec.engine.device) if spec.engine.device else best_device()
    asked = spec.engine
    dtype = _dtype(spec, device)
    base = load_base(
        spec.base, device=device, dtype=dtype, quantization=asked.base_quantization, offload=asked.base_offload
    )
    storage = open_storage(spec.storage)
    disk = None
    if not isinstance(storage, LocalStorage) and spec.disk_bytes:
        disk = DiskCache(Path(tempfile.gettempdir(), "dreamfleet-adapters"), spec.disk_bytes)
    marks = noise_mark(spec.marks, storage), pixel_mark(spec.marks, storage)
    networks = NetworkFolders(storage, EMBEDDED)
    return Engine(base, spec.engine, Fetcher(Registry(storage), disk), *marks, networks.folder)


def make_app(spec: ServeSpec, loop: EngineLoop) -> FastAPI:
    """The app over one local engine."""
    marks = Marks(spec.marks, open_storage(spec.storage))
    return create_app(loop.stream, LocalEngines(loop), make_library(spec), spec, open_keys(spec.keys), marks)


def make_library(spec: ServeSpec) -> Library:
    """The adapters on the server's storage, for its base."""
    storage = Registry(open_storage(spec.storage))
    return Library(storage, outline(spec.base), refresh_s=spec.refresh_s, serves=spec.serves)


def _dtype(spec: ServeSpec, device: torch.device) -> torch.dtype:
    if spec.engine.dtype != "auto":
        return _DTYPES[spec.engine.dtype]
    return _DTYPES[outline(spec.base).facts.half] if device.type == "cuda" else torch.float32

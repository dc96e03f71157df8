"""A fleet in one process: one base, drawn from and trained on by turns, its driver, and its app."""

import threading

import torch
from fastapi import FastAPI

from fleet.board import Board
from fleet.config import FleetSpec
from fleet.device import DeviceTurns
from fleet.driving import drive
from fleet.hooks import Hooks
from fleet.hosting import make_fleet_app
from fleet.lane import LaneThread
from serving.engine.engine import Engine
from serving.engine.loop import EngineLoop
from serving.engine.request import AdapterRef
from serving.local import LocalEngines, make_engine, make_library
from training.base.base import best_device
from training.run.fleet import FleetDriver, fleet_lead
from training.run.source import Task
from training.run.usage import UsageBook
from training.storage.storage import LocalStorage

TICK_S = 0.25
FAR_TICK_S = 2.0  # an object store is asked less often; what is submitted here is looked at at once
STOP_S = 60.0  # how long a lane may take to checkpoint


class FleetService:
    """Starts at once; `close` ends it with checkpoints. `app` is to be served."""

    def __init__(self, spec: FleetSpec, engine: Engine | None = None) -> None:
        self.spec = spec
        self.turns = DeviceTurns(spec.train_share)
        self.engine = engine or make_engine(_with_dtype(spec).server)
        self.loop = EngineLoop(self.engine, self.turns)
        self.library = make_library(spec.server)
        storage = self.library.registry.storage
        self._tick_s = TICK_S if isinstance(storage, LocalStorage) else FAR_TICK_S
        self.book = UsageBook(storage)
        self.hooks = Hooks(storage, Board(storage), spec.private_hooks)
        self._claim = fleet_lead(storage)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self.app: FastAPI = make_fleet_app(
            spec, self.loop.stream, LocalEngines(self.loop), self.library, wake=self._wake.set, book=self.book
        )
        self._thread = threading.Thread(
            target=drive, args=(self._claim, self._lead, self._closing), name="driver", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Ends lanes with checkpoints, gives the lead up, ends the engine."""
        self._closing.set()
        self._wake.set()
        self._thread.join(STOP_S + 10)
        self.book.flush()
        self.loop.close()

    def _lead(self) -> None:
        """Drives the fleet until it is closed. Raises Lost if another process has taken the lead."""
        driver = FleetDriver(
            self.library.registry.storage,
            self.library.outline,
            self.library.base_hash,
            self._claim,
            seats=1,
            max_rows=self.spec.train_rows,
            ended=self.hooks.ended,
        )
        lane: LaneThread | None = None
        over = threading.Event()
        deliver = (over, 2 * self._tick_s)
        threading.Thread(target=self.hooks.deliver, args=deliver, name="webhooks", daemon=True).start()
        try:
            driver.tick()
            lane = LaneThread(driver, self.engine.base, self.turns, self.spec.warm_s, self._published)
            while not self._closing.is_set():
                self._wake.wait(self._tick_s)
                self._wake.clear()
                driver.tick()
                self.book.flush(5.0)
        finally:
            over.set()
            driver.stop()
            if lane is not None:
                lane.stop(STOP_S)
        driver.close()

    def _published(self, task: Task, version: str) -> None:
        """A subject that has just been trained lies in host memory before anybody asks for it."""
        if task.home is not None:
            self.library.known.forget(task.home.tenant, task.spec.id)
            self.loop.preload(AdapterRef(tenant=task.home.tenant, id=task.spec.id, version=version))


def _with_dtype(spec: FleetSpec) -> FleetSpec:
    """The engine in a precision that can be trained in: bf16 where the GPU has it; fp32 on a CPU."""
    server = spec.server
    if server.engine.dtype != "auto":
        return spec
    device = torch.device(server.engine.device) if server.engine.device else best_device()
    wide = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "auto"
    engine = server.engine.model_copy(update={"dtype": wide})
    return spec.model_copy(update={"server": server.model_copy(update={"engine": engine})})

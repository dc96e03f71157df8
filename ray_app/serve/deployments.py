"""Serving on Ray: an HTTP ingress on CPUs and engine replicas on GPUs, as two Serve deployments.

`build_app` is what `serve deploy` imports; `start_server` and `serve_forever` run the same app from the command line.
Wiring only: the app is `serving.http.app`, the engine `serving.engine.engine`.
"""

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import Field

from ray_app.silence import silence
from ray_app.train.cluster import LOCAL, connect
from serving.config import ServeSpec
from serving.engine.request import AdapterRef, GenerateRequest
from serving.http.access.guard import is_loopback
from training.base.files.folder import EMBEDDED
from training.errors import UserError
from training.storage.closed import Closed
from training.storage.storage import masked, open_storage

APP = "dreamfleet"
# how soon autoscaling sees waiting requests; Serve's own 10 s are added to every cold start
INGRESS_SETTINGS = {"RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}
LOOK_BACK_SECONDS = 10.0  # autoscaling uses the mean of this long


class Deployment(Closed):
    """Where the server runs on a cluster, and how it grows. `serve.yaml` holds one as the app's `args`."""

    server: ServeSpec = ServeSpec.model_construct()
    min_replicas: int = Field(default=1, ge=0, description="engines kept; with 0 the first request starts one")
    max_replicas: int = Field(default=1, ge=1)
    gpus: float | None = Field(default=None, ge=0, description="of one engine; by default 1 where the cluster has any")
    cpus: float = Field(default=1, gt=0, description="of one engine")
    ingresses: int = Field(default=1, ge=1)
    target_requests: int = Field(default=16, ge=1, description="requests an engine should have; more start another")
    upscale_delay_s: float = Field(default=5, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)
    drain_s: float = Field(default=60, ge=0, description="how long an engine that is taken away may finish its work")


class EngineReplica:
    """One engine on one device."""

    def __init__(self, server: dict[str, Any]) -> None:
        silence()
        from ray import serve

        from serving.engine.loop import EngineLoop
        from serving.local import make_engine

        spec = ServeSpec.model_validate(server)
        if spec.engine.threads is None:
            # Ray sets one OpenMP thread per CPU that an actor reserves, which says nothing about the machine
            threads = len(os.sched_getaffinity(0))
            spec = spec.model_copy(update={"engine": spec.engine.model_copy(update={"threads": threads})})
        self._loop = EngineLoop(make_engine(spec))
        self._name = serve.get_replica_context().replica_id.unique_id

    async def stream(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of a request; a caller that leaves cancels it."""
        async for event in self._loop.stream(GenerateRequest.model_validate(request)):
            yield event.model_dump()

    async def forget(self, ref: dict[str, str]) -> None:
        """Drops a version that is deleted or replaced; `ref` is a dumped AdapterRef."""
        self._loop.forget(AdapterRef.model_validate(ref))

    async def preload(self, ref: dict[str, str]) -> None:
        """Brings a version into host memory; `ref` is a dumped AdapterRef."""
        self._loop.preload(AdapterRef.model_validate(ref))

    async def stats(self) -> tuple[str, dict[str, Any]]:
        """The replica's name and its counters, a dumped EngineStats."""
        return self._name, dataclasses.asdict(self._loop.stats())

    async def healthy(self) -> bool:
        """Whether the engine can serve requests."""
        return self._loop.healthy

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self._loop.healthy:
            raise RuntimeError("the engine has stopped")

    async def __del__(self) -> None:
        await asyncio.to_thread(self._loop.close)


class Ingress:
    """The HTTP app; knows tenants and adapters, computes nothing."""

    def __init__(self, engine: Any, server: dict[str, Any], least: int) -> None:
        silence()
        self._engine = engine
        self._server = ServeSpec.model_validate(server)
        self._least = least

    def __serve_build_asgi_app__(self) -> Any:
        from ray_app.serve.engines import RayEngines
        from serving.http.app import create_app, open_keys
        from serving.local import make_library

        engines = RayEngines(self._engine, self._least)
        spec = self._server
        return create_app(engines.generate, engines, make_library(spec), spec, open_keys(spec.keys))


def build_app(args: Deployment) -> Any:
    """The Serve application of a deployment; what `serve deploy` and `serve run` call."""
    ingress = ingress_deployment(args, Ingress)
    return ingress.bind(engine_deployment(args), args.server.model_dump(), args.min_replicas)


def engine_deployment(args: Deployment) -> Any:
    """The engines of a deployment, bound."""
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    gpus = args.gpus
    if gpus is None:
        gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    # the engine bounds and orders its queue itself, fair to tenants; Serve must not queue before it
    room = 2 * (args.server.engine.queue + args.server.engine.max_rows)
    return serve.deployment(
        name="engine",
        max_ongoing_requests=room,
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        health_check_timeout_s=30,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class="ray_app.serve.router.AffineRouter"),
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": max(args.min_replicas, args.max_replicas),
            "initial_replicas": args.min_replicas,
            "target_ongoing_requests": args.target_requests,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
            "look_back_period_s": LOOK_BACK_SECONDS,
        },
    )(EngineReplica).bind(args.server.model_dump())


def ingress_deployment(args: Deployment, ingress: type[Any]) -> Any:
    """The deployment of an ingress, a class whose `__serve_build_asgi_app__` makes the HTTP app."""
    from ray import serve

    return serve.deployment(
        name="ingress",
        num_replicas=args.ingresses,
        max_ongoing_requests=10_000,
        health_check_period_s=2,  # so that one that dies is replaced soon
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": INGRESS_SETTINGS}},
    )(serve.ingress()(ingress))


class Server:
    """A running server, reachable at `url`. `stop()` leaves no process that it started."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self.url = url
        self._stack = stack

    def stop(self) -> None:
        """Ends the app, and the cluster if it was started for it. A second call does nothing."""
        self._stack.close()


def start_server(
    storage: str,
    address: str = LOCAL,
    host: str = "127.0.0.1",
    port: int = 8000,
    base: str = "pocket",
    keys: str | None = None,
    deployment: Deployment | None = None,
    build: Callable[[Deployment], Any] = build_app,
) -> Server:
    """Starts the server on the cluster at `address` (`local`: on this machine); returns when it serves.

    `port` 0 takes a free one. `deployment` has the other settings; its storage, base and keys are replaced by the
    arguments. `build` makes the application. Raises UserError for a host other than loopback without keys, or if the
    server does not come up.
    """
    if keys is None and not is_loopback(host):
        raise UserError(
            f"Without keys the server binds to loopback only, not to {host}: anybody who reaches it could use and "
            "delete adapters. Make a key with `dreamfleet keys make TENANT --keys FILE` and give --keys FILE."
        )
    args = deployment or Deployment()
    server = args.server.model_copy(
        update={"storage": open_storage(storage).uri, "base": _absolute(base), "keys": keys}
    )
    port = port or _free_port(host)
    with ExitStack() as stack:
        stack.enter_context(connect(address))
        _run(build(args.model_copy(update={"server": server})), host, port, stack)
        return Server(f"http://{host}:{port}", stack.pop_all())


def serve_forever(
    storage: str,
    address: str = LOCAL,
    host: str = "127.0.0.1",
    port: int = 8000,
    base: str = "pocket",
    keys: str | None = None,
    deployment: Deployment | None = None,
    build: Callable[[Deployment], Any] = build_app,
) -> None:
    """`start_server`, until Ctrl-C or SIGTERM."""
    over = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        over.set()

    server = start_server(storage, address, host, port, base, keys, deployment, build)
    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        print(f"serving {base} with the adapters of {masked(storage)} on {server.url}; Ctrl-C stops it", flush=True)  # noqa: T201
        while not over.wait(1):
            pass
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        server.stop()


def _run(app: Any, host: str, port: int, stack: ExitStack) -> None:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet)
    stack.callback(serve.delete, APP)  # not all of Serve: on a shared cluster other applications live on
    try:
        serve.run(app, name=APP, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise UserError(f"The server did not start: {error} {_reasons()}".rstrip()) from None


def _reasons() -> str:
    """What Serve says about the deployments that are not healthy; empty if nothing."""
    from ray import serve

    app = serve.status().applications.get(APP)
    unhealthy = [one for one in app.deployments.values() if one.status != "HEALTHY"] if app is not None else []
    return " ".join(one.message.strip() for one in unhealthy if one.message)


def _absolute(base: str) -> str:
    """A base's name as every process finds it: a folder as an absolute path."""
    if (EMBEDDED / base).is_dir() or not Path(base).expanduser().is_dir():
        return base
    return str(Path(base).expanduser().absolute())


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port

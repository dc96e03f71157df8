"""The standing fleet on Ray Serve: the server's engines, an ingress with the calls about training, and the keeper of
the fleet's driver.

`build_fleet` is what `serve deploy` imports. Lanes are Ray tasks that the driver opens while subjects wait: the demand
that an autoscaler sees.
"""

import contextlib
import logging
from typing import Any

from pydantic import Field

from fleet.config import FleetSpec
from ray_app.serve.deployments import APP, Deployment, engine_deployment, ingress_deployment
from ray_app.silence import silence
from ray_app.train.fleet_actor import THREADS, FleetActor, FleetLanes
from training.storage.closed import Closed

DRIVER = "dreamfleet-fleet"
HEALTH_S = 30.0
logger = logging.getLogger(__name__)


class FleetDeployment(Closed):
    """A fleet on a cluster. `deployment.server` is what `fleet.server` would be."""

    deployment: Deployment = Deployment.model_construct()
    fleet: FleetSpec = FleetSpec.model_construct()
    lanes: FleetLanes = Field(default_factory=FleetLanes)


class Keeper:
    """Keeps one driver: if it dies, this is unhealthy, and Serve starts another one with its own."""

    def __init__(self, spec: dict[str, Any], lanes: dict[str, Any]) -> None:
        silence()
        import ray

        with contextlib.suppress(ValueError):  # one that an earlier keeper has left behind
            ray.kill(ray.get_actor(DRIVER))
        actor = ray.remote(FleetActor).options(name=DRIVER, num_cpus=0, max_concurrency=THREADS)
        self._driver = actor.remote(spec, lanes, DRIVER)
        ray.get(self._driver.healthy.remote(), timeout=HEALTH_S)

    async def wake(self) -> None:
        """Something was submitted or asked."""
        self._driver.wake.remote()

    def check_health(self) -> None:
        """Serve replaces the keeper, and the driver with it, when this raises."""
        import ray

        if not ray.get(self._driver.healthy.remote(), timeout=HEALTH_S):
            raise RuntimeError("the fleet's driver has stopped")

    def __del__(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.get(self._driver.close.remote(), timeout=HEALTH_S)


class FleetIngress:
    """The HTTP app; knows tenants, files and jobs, computes nothing."""

    def __init__(self, engine: Any, keeper: Any, spec: dict[str, Any], least: int) -> None:
        silence()
        self._engine = engine
        self._keeper = keeper
        self._spec = FleetSpec.model_validate(spec)
        self._least = least

    def __serve_build_asgi_app__(self) -> Any:
        from fleet.hosting import make_fleet_app
        from ray_app.serve.engines import RayEngines
        from serving.local import make_library

        engines = RayEngines(self._engine, self._least)
        library = make_library(self._spec.server)
        return make_fleet_app(self._spec, engines.generate, engines, library, wake=self._wake)

    def _wake(self) -> None:
        with contextlib.suppress(Exception):  # a driver that is not there looks by itself when it is
            self._keeper.wake.remote()


def build_fleet(args: FleetDeployment) -> Any:
    """The Serve application of a fleet; what `serve deploy` calls."""
    from ray import serve

    spec = args.fleet.model_copy(update={"server": args.deployment.server}).model_dump()
    keeper = serve.deployment(
        name="keeper",
        num_replicas=1,
        health_check_period_s=5,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=60,
        ray_actor_options={"num_cpus": 0},
    )(Keeper).bind(spec, args.lanes.model_dump())
    engine = engine_deployment(args.deployment)
    return ingress_deployment(args.deployment, FleetIngress).bind(engine, keeper, spec, args.deployment.min_replicas)


__all__ = ["APP", "FleetDeployment", "build_fleet"]

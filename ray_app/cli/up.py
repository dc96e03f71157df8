"""`up`: the whole service on one port: images, and training over HTTP."""

from pathlib import Path

import click

from fleet.config import FLEET_FLAGS, FleetSpec, TrainLimits
from ray_app.cli import options
from ray_app.cli.train import lanes_option, max_gpus_option
from ray_app.train.cluster import LOCAL
from serving.config import SERVER_FLAGS, EngineSpec, ServeSpec
from serving.flags import flags
from training.captioning.settings import CaptionSpec


@click.command()
@options.storage
@click.option(
    "--address",
    default=LOCAL,
    show_default=True,
    envvar="DREAMFLEET_ADDRESS",
    help="local: this machine, in one process; or a Ray cluster (auto, host:port, ray://host:10001)",
)
@click.option("--base", default="pocket", show_default=True, help="the base to serve and to train on")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--keys", type=click.Path(path_type=Path), help="keys file; without it only this machine may connect")
@lanes_option
@max_gpus_option
@flags(FleetSpec, "fleet", only=FLEET_FLAGS)
@flags(TrainLimits, "limits")
@flags(CaptionSpec, "captions")
@flags(ServeSpec, "server", only=SERVER_FLAGS)
@flags(EngineSpec, "engine")
def up(
    storage: str,
    address: str,
    base: str,
    host: str,
    port: int,
    keys: Path | None,
    lanes: int | None,
    max_gpus: int | None,
    fleet: FleetSpec,
    limits: TrainLimits,
    captions: CaptionSpec,
    server: ServeSpec,
    engine: EngineSpec,
) -> None:
    """Train and serve over HTTP, until Ctrl-C: on this machine in one process, or on a cluster."""
    file = str(keys) if keys else None
    server = server.model_copy(update={"base": base, "storage": storage, "keys": file, "engine": engine})
    spec = fleet.model_copy(update={"server": server, "limits": limits, "captions": captions})
    if address == LOCAL:
        from fleet.running import run_fleet

        return run_fleet(spec, host, port)
    from ray_app.serve.deployments import Deployment, serve_forever
    from ray_app.serve.fleet import FleetDeployment, build_fleet
    from ray_app.train.fleet_actor import FleetLanes

    serve_forever(
        storage=storage,
        address=address,
        base=base,
        host=host,
        port=port,
        keys=file,
        deployment=Deployment(server=server),
        build=lambda deployment: build_fleet(
            FleetDeployment(deployment=deployment, fleet=spec, lanes=FleetLanes(lanes=lanes, gpus=max_gpus))
        ),
    )

"""`up`: the whole service on one port: images, and training over HTTP."""

from pathlib import Path

import click

from fleet.config import FleetSpec, TrainLimits
from ray_app.cli import options
from ray_app.cli.train import lanes_option, max_gpus_option
from ray_app.train.cluster import LOCAL
from serving.config import EngineSpec, ServeSpec
from serving.flags import flags


@click.command()
@options.storage
@click.option(
    "--address",
    default="local",
    show_default=True,
    envvar="DREAMFLEET_ADDRESS",
    help="local: this machine, in one process; or a Ray cluster (auto, host:port, ray://host:10001)",
)
@click.option("--base", default="pocket", show_default=True, help="the base to serve and to train on")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--keys", type=click.Path(path_type=Path), help="keys file; without it only this machine may connect")
@click.option("--cors", multiple=True, help="an origin whose web pages may use the server, https://studio.example")
@click.option(
    "--train-share",
    default=0.25,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="the part of the device that training gets while pictures are wanted",
)
@click.option("--warm-s", default=300.0, show_default=True, help="seconds that a lane waits for more subjects")
@click.option("--train-rows", default=32, show_default=True, type=click.IntRange(1), help="rows of one training step")
@click.option(
    "--photo-uri", "uris", multiple=True, help="beginning of URIs that photos may be read from; default: none"
)
@lanes_option
@max_gpus_option
@click.option("--private-hooks", is_flag=True, help="webhooks may go to loopback and private addresses")
@flags(TrainLimits, "limits")
@flags(EngineSpec, "engine")
def up(
    storage: str,
    address: str,
    base: str,
    host: str,
    port: int,
    keys: Path | None,
    cors: tuple[str, ...],
    train_share: float,
    warm_s: float,
    train_rows: int,
    lanes: int | None,
    max_gpus: int | None,
    uris: tuple[str, ...],
    private_hooks: bool,
    limits: TrainLimits,
    engine: EngineSpec,
) -> None:
    """Train and serve over HTTP, until Ctrl-C: on this machine in one process, or on a cluster."""
    server = ServeSpec(base=base, storage=storage, keys=str(keys) if keys else None, cors=cors, engine=engine)
    spec = FleetSpec(
        server=server,
        limits=limits,
        train_share=train_share,
        warm_s=warm_s,
        train_rows=train_rows,
        uris=uris,
        private_hooks=private_hooks,
    )
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
        keys=str(keys) if keys else None,
        deployment=Deployment(server=server),
        build=lambda deployment: build_fleet(
            FleetDeployment(deployment=deployment, fleet=spec, lanes=FleetLanes(lanes=lanes, gpus=max_gpus))
        ),
    )

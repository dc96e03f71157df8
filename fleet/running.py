"""A fleet that listens: one process, one port, until it is interrupted."""

import os
import signal
from types import FrameType

# two threads compute by turns: OpenMP threads of the one that waits must not spin long; torch reads this once
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import uvicorn

from fleet.config import FleetSpec
from fleet.service import FleetService
from serving.http.access.guard import is_loopback
from serving.http.access.timeouts import TimedProtocol
from training.errors import UserError

GRACE_S = 10


def run_fleet(spec: FleetSpec, host: str, port: int) -> None:
    """Trains and serves until Ctrl-C or SIGTERM; then lanes checkpoint and end.

    Raises UserError for a host other than loopback without keys.
    """
    if spec.server.keys is None and not is_loopback(host):
        raise UserError(
            f"Without keys the server binds to loopback only, not to {host}: anybody who reaches it could use and "
            "delete adapters. Make a key with `dreamfleet keys make TENANT --keys FILE` and give --keys FILE."
        )
    service = FleetService(spec)
    config = uvicorn.Config(
        service.app, http=TimedProtocol, host=host, port=port, log_level="info", timeout_graceful_shutdown=GRACE_S
    )
    server = uvicorn.Server(config)

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        service.close()

"""`python -m serving`: a server on one machine without Ray."""

import sys

import click
import uvicorn

from serving.config import SERVER_FLAGS, EngineSpec, ServeSpec
from serving.engine.loop import EngineLoop
from serving.flags import flags
from serving.http.access.guard import is_loopback
from serving.http.access.timeouts import TimedProtocol
from serving.local import make_app, make_engine
from training.errors import UserError


@click.command()
@click.option("--storage", envvar="DREAMFLEET_STORAGE", default="./storage", show_default=True, help="Path or URI.")
@click.option("--base", default="pocket", show_default=True, help="pocket, a diffusers folder or a hub id.")
@click.option("--host", envvar="DREAMFLEET_HOST", default="127.0.0.1", show_default=True)
@click.option("--port", envvar="DREAMFLEET_PORT", default=8000, show_default=True)
@click.option(
    "--keys", envvar="DREAMFLEET_KEYS", default=None, help="File of tenants' keys; without: this machine only."
)
@flags(ServeSpec, "server", only=SERVER_FLAGS)
@flags(EngineSpec, "engine")
def main(
    storage: str, base: str, host: str, port: int, keys: str | None, server: ServeSpec, engine: EngineSpec
) -> None:
    """Serves every adapter of a storage from one base."""
    spec = server.model_copy(update={"base": base, "storage": storage, "keys": keys, "engine": engine})
    if keys is None and not is_loopback(host):
        raise UserError(
            f"Without keys the server binds to loopback only, not to {host}: anybody who reaches it could use and "
            "delete adapters. Make a key with `dreamfleet keys make TENANT --keys FILE` and give --keys FILE."
        )
    loop = EngineLoop(make_engine(spec))
    try:
        app = make_app(spec, loop)
        uvicorn.run(app, http=TimedProtocol, host=host, port=port, log_level="info", timeout_graceful_shutdown=10)
    finally:
        loop.close()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""`python -m serving`: a server on one machine without Ray, and the keys of its tenants."""

import ipaddress
import sys
from pathlib import Path

import click
import uvicorn

from serving.config import EngineSpec, ServeSpec
from serving.flags import flags
from serving.local import make_app, make_engine
from serving.loop import EngineLoop
from serving.tenants import Keys
from training.errors import UserError

KEYS = click.option(
    "--keys", envvar="DREAMFLEET_KEYS", default="keys.json", show_default=True, help="File of tenants' keys."
)


@click.group(invoke_without_command=True)
@click.option("--storage", envvar="DREAMFLEET_STORAGE", default="./storage", show_default=True, help="Path or URI.")
@click.option("--base", default="pocket", show_default=True, help="pocket, a diffusers folder or a hub id.")
@click.option("--host", envvar="DREAMFLEET_HOST", default="127.0.0.1", show_default=True)
@click.option("--port", envvar="DREAMFLEET_PORT", default=8000, show_default=True)
@click.option(
    "--keys", envvar="DREAMFLEET_KEYS", default=None, help="File of tenants' keys; without: this machine only."
)
@flags(EngineSpec, "engine")
@click.pass_context
def main(
    context: click.Context, storage: str, base: str, host: str, port: int, keys: str | None, engine: EngineSpec
) -> None:
    """Serves every adapter of a storage from one base."""
    if context.invoked_subcommand is not None:
        return
    spec = ServeSpec(base=base, storage=storage, keys=keys, engine=engine)
    if keys is None and not is_loopback(host):
        raise UserError(
            f"Without keys the server binds to loopback only, not to {host}: anybody who reaches it could use and "
            "delete adapters. Make a key with `python -m serving keys make <tenant>` and give --keys."
        )
    loop = EngineLoop(make_engine(spec))
    try:
        uvicorn.run(make_app(spec, loop), host=host, port=port, log_level="info", timeout_graceful_shutdown=10)
    finally:
        loop.close()


@main.group()
def keys() -> None:
    """Makes, lists and revokes keys."""


@keys.command()
@click.argument("tenant")
@KEYS
def make(tenant: str, keys: str) -> None:
    """Makes a key for TENANT and shows it, this once."""
    key, token = Keys(Path(keys)).make(tenant)
    print(f"key {key.name} of tenant {tenant}, shown only now:", file=sys.stderr)
    print(token)


@keys.command()
@click.argument("name")
@KEYS
def revoke(name: str, keys: str) -> None:
    """Refuses the key NAME from now on; running servers follow by themselves."""
    key = Keys(Path(keys)).revoke(name)
    print(f"key {key.name} of tenant {key.tenant} is revoked")


@keys.command("list")
@KEYS
def list_keys(keys: str) -> None:
    """Lists the keys: name, tenant, when made, when revoked."""
    for key in Keys(Path(keys)).all():
        print(f"{key.name}  {key.tenant}  {key.created}  {'revoked ' + key.revoked if key.revoked else ''}".rstrip())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

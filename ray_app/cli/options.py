"""Options that several commands have, and how results leave: `--json` puts one object on stdout, all else on stderr."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import click
from rich.console import Console

PLAIN_WIDTH = 200

Function = TypeVar("Function", bound=Callable[..., object])

as_json = click.option(
    "--json", "as_json", is_flag=True, help="print one JSON object on stdout, everything else on stderr"
)
storage = click.option(
    "--storage",
    default="./storage",
    show_default=True,
    envvar="DREAMFLEET_STORAGE",
    help="where runs and adapters are kept: a folder, s3://bucket/prefix?... or gs://bucket/prefix",
)
address = click.option(
    "--address",
    default="local",
    show_default=True,
    envvar="DREAMFLEET_ADDRESS",
    help="the Ray cluster: local (starts Ray here), auto, host:port, ray://host:10001, http://host:8265, or a fleet",
)
tenant = click.option(
    "--tenant",
    default="default",
    show_default=True,
    envvar="DREAMFLEET_TENANT",
    help="owner of the adapters",
)


def console(as_json: bool = False) -> Console:
    """Where a person reads: stdout, but stderr when stdout is for JSON."""
    stream = sys.stderr if as_json else sys.stdout
    # without a terminal there is no width: nothing is cut off
    return Console(file=stream, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)


def print_json(value: Mapping[str, object]) -> None:
    """Writes one JSON object to stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))

"""`keys`: the API keys of a server's tenants, in one file that running servers follow."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from ray_app.cli import options
from training.errors import UserError

if TYPE_CHECKING:
    from serving.http.access.tenants import Key, Scope

SCOPES = ("images", "train", "admin")
_SPAN = re.compile(r"([1-9][0-9]{0,4})([hd])")
_HOURS = {"h": 1, "d": 24}

file = click.option(
    "--keys",
    "path",
    default="keys.json",
    show_default=True,
    envvar="DREAMFLEET_KEYS",
    type=click.Path(path_type=Path, dir_okay=False),
    help="the file that holds the keys, hashed; the server's --keys",
)


@click.group()
def keys() -> None:
    """API keys: make, list and revoke them."""


@keys.command()
@click.argument("tenant")
@file
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help="default: images and train")
@click.option("--expires", help="90d, 12h, or a date such as 2027-01-31; without: never")
@options.as_json
def make(tenant: str, path: Path, scopes: "tuple[Scope, ...]", expires: str | None, as_json: bool) -> None:
    """Make a key of TENANT and print it; it is shown only once."""
    from serving.http.access.tenants import USUAL, Keys

    end = None if expires is None else parse_expiry(expires, datetime.now(UTC))
    key, token = Keys(path).make(tenant, tuple(dict.fromkeys(scopes)) or USUAL, end)
    if as_json:
        return options.print_json({**_shown(key), "key": token})
    until = f"until {key.expires}" if key.expires else "without an end"
    click.echo(f"key {key.name} of tenant {tenant} for {', '.join(key.scopes)}, {until}; shown only now:", err=True)
    click.echo(token)


@keys.command("list")
@file
@options.as_json
def list_(path: Path, as_json: bool) -> None:
    """List the keys: id, tenant, scopes, state and times."""
    from serving.http.access.tenants import Keys

    found = [_shown(key) for key in Keys(path).all()]
    if as_json:
        return options.print_json({"keys": found})
    if not found:
        return click.echo(f"no keys in {path}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "tenant", "scopes", "state", "created", "expires"):
        table.add_column(column, overflow="fold")
    for key in found:
        scopes, expires = ", ".join(key["scopes"]), key["expires"] or "never"
        table.add_row(key["id"], key["tenant"], scopes, key["state"], key["created"], expires)
    options.console().print(table)


@keys.command()
@click.argument("key_id")
@file
@options.as_json
def revoke(key_id: str, path: Path, as_json: bool) -> None:
    """Refuse the key KEY_ID from this moment; running servers follow by themselves."""
    from serving.http.access.tenants import Keys

    key = Keys(path).revoke(key_id)
    if as_json:
        return options.print_json(_shown(key))
    click.echo(f"key {key.name} of tenant {key.tenant} is revoked")


def parse_expiry(text: str, now: datetime) -> datetime:
    """When `90d`, `12h` or a date (the end of that day in UTC) is over. Raises UserError, also for what has passed."""
    try:
        if span := _SPAN.fullmatch(text):
            end = now + timedelta(hours=int(span[1]) * _HOURS[span[2]])
        else:
            end = datetime.fromisoformat(text)
            end = end + timedelta(days=1) if len(text) == len("2027-01-31") else end
            end = end if end.tzinfo else end.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise UserError(f"--expires {text!r} is no time. Write for example 90d, 12h or 2027-01-31.") from None
    if end <= now:
        raise UserError(f"--expires {text!r} has passed. Give a time to come, for example 90d.")
    return end


def _shown(key: "Key") -> dict[str, Any]:
    state = "revoked" if key.revoked else "expired" if key.expired else "active"
    return {
        "id": key.name,
        "tenant": key.tenant,
        "scopes": list(key.scopes),
        "state": state,
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
    }

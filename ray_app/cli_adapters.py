"""`adapters`: the registry of a storage from the command line."""

import json
from typing import TYPE_CHECKING

import click
from rich.table import Table

from ray_app import options
from training.errors import UserError
from training.storage import open_storage

if TYPE_CHECKING:
    from training.registry import Registry, Resolved


@click.group()
def adapters() -> None:
    """The registry: list, show, import, export and delete adapters."""


@adapters.command("list")
@options.storage
@options.tenant
@options.as_json
def list_(storage: str, tenant: str, as_json: bool) -> None:
    """List the adapters of a tenant, with the version that is served."""
    found = _registry(storage).list(tenant)
    if as_json:
        return options.print_json({"adapters": [_short(resolved) for resolved in found]})
    if not found:
        return click.echo(f"no adapters of tenant '{tenant}' in {open_storage(storage)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("adapter", "version", "base", "rank", "steps", "size", "published"):
        table.add_column(column, justify="right" if column in ("rank", "steps", "size") else "left")
    for resolved in found:
        card = resolved.card
        size = f"{card.size / 1e6:.2f} MB"
        name = f"{resolved.tenant}/{resolved.id}"
        table.add_row(name, resolved.version[:12], card.base, str(card.rank), str(card.steps), size, card.created[:16])
    options.console().print(table)


@adapters.command()
@click.argument("adapter")
@options.storage
@options.tenant
@options.as_json
def show(adapter: str, storage: str, tenant: str, as_json: bool) -> None:
    """Show the card of ADAPTER: [TENANT/]ID[@VERSION]."""
    registry = _registry(storage)
    resolved = _resolve(registry, adapter, tenant)
    card = resolved.card.model_dump(mode="json", by_alias=True)
    versions = registry.versions(resolved.tenant, resolved.id)
    about = {**_short(resolved), "versions": versions, "files": registry.files(resolved), "card": card}
    if as_json:
        return options.print_json(about)
    click.echo(json.dumps(about, indent=2, ensure_ascii=False))


@adapters.command()
@click.argument("adapter")
@options.storage
@options.tenant
@click.option("--yes", is_flag=True, help="do not ask")
@options.as_json
def delete(adapter: str, storage: str, tenant: str, yes: bool, as_json: bool) -> None:
    """Delete ADAPTER ([TENANT/]ID) with all its versions."""
    registry = _registry(storage)
    if "@" in adapter:
        raise UserError(f"Adapter {adapter!r}: a single version cannot be deleted. Name the adapter without '@...'.")
    resolved = _resolve(registry, adapter, tenant)
    name = f"{resolved.tenant}/{resolved.id}"
    if not yes and not as_json:
        click.confirm(f"Delete {name} with all its versions?", abort=True)
    registry.delete(resolved.tenant, resolved.id)
    if as_json:
        return options.print_json({"deleted": name})
    click.echo(f"deleted {name}")


def _registry(storage: str) -> "Registry":
    from training.registry import Registry

    return Registry(open_storage(storage))


def _resolve(registry: "Registry", adapter: str, tenant: str) -> "Resolved":
    name, _, version = adapter.partition("@")
    return registry.resolve(name, version or None, tenant)


def _short(resolved: "Resolved") -> dict[str, str | int]:
    card = resolved.card
    return {
        "id": f"{resolved.tenant}/{resolved.id}",
        "version": resolved.version,
        "base": card.base,
        "rank": card.rank,
        "steps": card.steps,
        "size": card.size,
        "created": card.created,
    }

"""`adapters`: the registry of a storage from the command line."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from ray_app import options
from training.errors import UserError
from training.storage import open_storage

if TYPE_CHECKING:
    from serving.library import Library
    from training.formats import Format
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
    found = open_registry(storage).list(tenant)
    if as_json:
        return options.print_json({"adapters": [short(resolved) for resolved in found]})
    if not found:
        return click.echo(f"no adapters of tenant '{tenant}' in {open_storage(storage)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("adapter", "version", "base", "rank", "steps", "size", "published"):
        right = column in ("rank", "steps", "size")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
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
    registry = open_registry(storage)
    resolved = resolve(registry, adapter, tenant)
    card = resolved.card.model_dump(mode="json", by_alias=True)
    versions = registry.versions(resolved.tenant, resolved.id)
    about = {**short(resolved), "versions": versions, "files": registry.files(resolved), "card": card}
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
    registry = open_registry(storage)
    if "@" in adapter:
        raise UserError(f"Adapter {adapter!r}: a single version cannot be deleted. Name the adapter without '@...'.")
    resolved = resolve(registry, adapter, tenant)
    name = f"{resolved.tenant}/{resolved.id}"
    if not yes and not as_json:
        click.confirm(f"Delete {name} with all its versions?", abort=True)
    registry.delete(resolved.tenant, resolved.id)
    if as_json:
        return options.print_json({"deleted": name})
    click.echo(f"deleted {name}")


@adapters.command()
@click.argument("adapter")
@click.option("--format", "format_", type=click.Choice(["diffusers", "kohya", "lora_diffusion"]), default="diffusers")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=".", show_default=True)
@click.option("--base", help="the base's name or folder, if not the one the card names")
@options.storage
@options.tenant
@options.as_json
def export(
    adapter: str, format_: "Format", out: Path, base: str | None, storage: str, tenant: str, as_json: bool
) -> None:
    """Write ADAPTER ([TENANT/]ID[@VERSION]) as files that other programs read."""
    from training.adapter import load_adapter
    from training.formats import Label, export_adapter

    registry = open_registry(storage)
    resolved = resolve(registry, adapter, tenant)
    weights = load_adapter(registry.weights(resolved))
    library = open_library(registry, base or resolved.card.base)
    label = Label(name=resolved.id, resolution_px=library.facts.resolution)
    files = export_adapter(weights, format_, library.shapes().keys(), label)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    if as_json:
        return options.print_json({"files": [str(out / name) for name in files]})
    for name in files:
        click.echo(str(out / name))


@adapters.command("import")
@click.argument("id")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--base", default="pocket", show_default=True, help="the base it was trained on")
@click.option("--trigger", default="", help="the words that call the subject up")
@click.option("--public/--private", default=None, help="whether others may generate with it; else as before")
@options.storage
@options.tenant
@options.as_json
def import_(
    id: str,
    files: tuple[Path, ...],
    base: str,
    trigger: str,
    public: bool | None,
    storage: str,
    tenant: str,
    as_json: bool,
) -> None:
    """Publish FILES (diffusers, kohya, lora_diffusion or PEFT; one folder or its files) as adapter ID."""
    from serving.config import EngineSpec
    from training.adapter import save_adapter
    from training.formats import import_adapter

    library = open_library(open_registry(storage), base)
    adapter = import_adapter(_read(files), library.shapes().keys())
    data = save_adapter(adapter)
    resolved = library.upload(tenant, id, data, EngineSpec(), public=public, trigger=trigger)
    if as_json:
        return options.print_json(short(resolved))
    click.echo(f"{resolved.tenant}/{resolved.id}@{resolved.version[:12]}")


def _read(paths: tuple[Path, ...]) -> dict[str, bytes]:
    """The files by name; a folder stands for the files in it."""
    files: dict[str, bytes] = {}
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            try:
                files[file.name] = file.read_bytes()
            except OSError as error:
                raise UserError(f"Cannot read '{file}': {error.strerror}. Give safetensors files.") from None
    return files


def open_library(registry: "Registry", base: str) -> "Library":
    from serving.library import Library
    from serving.request import read_facts
    from training.base_folder import find_base

    folder = find_base(base)
    # a card names no place on this machine
    return Library(registry, folder, read_facts(folder.name if Path(base).is_dir() else base, folder))


def open_registry(storage: str) -> "Registry":
    from training.registry import Registry

    return Registry(open_storage(storage))


def resolve(registry: "Registry", adapter: str, tenant: str) -> "Resolved":
    name, _, version = adapter.partition("@")
    return registry.resolve(name, version or None, tenant)


def short(resolved: "Resolved") -> dict[str, str | int]:
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

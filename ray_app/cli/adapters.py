"""`adapters`: the registry of a storage from the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from ray_app.cli import options
from training.base.files.folder import find_base
from training.errors import UserError
from training.storage.storage import open_storage

if TYPE_CHECKING:
    from serving.http.library import Library
    from training.adapters.adapter import Adapter
    from training.adapters.formats.formats import Format
    from training.storage.registry import Registry
    from training.storage.version import Resolved

# folders below that of an adapter: PEFT's and diffusers' scripts write one a component, we one for words
FOLDERS = ("unet", "transformer", "text_encoder", "text_encoder_2", "embeddings")

base_option = click.option("--base", help="name or folder of the base; default: the one that the adapter's card names")


@click.group()
def adapters() -> None:
    """List, show, import, export, delete, merge and resize published adapters."""


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
@click.option("--yes", is_flag=True, help="delete without asking")
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
@click.option(
    "--format",
    "format_",
    type=click.Choice(["diffusers", "kohya", "ai_toolkit", "lora_diffusion", "peft"]),
    default="diffusers",
    show_default=True,
    help="which program's files to write",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    show_default=True,
    help="folder for the files",
)
@base_option
@options.storage
@options.tenant
@options.as_json
def export(
    adapter: str, format_: "Format", out: Path, base: str | None, storage: str, tenant: str, as_json: bool
) -> None:
    """Write ADAPTER ([TENANT/]ID[@VERSION]) as files for other programs; writes all of them or none."""
    from training.adapters.adapter import load_adapter
    from training.adapters.formats.formats import export_adapter, label_of
    from training.storage.delivery import deliver

    registry = open_registry(storage)
    resolved = resolve(registry, adapter, tenant)
    weights = load_adapter(registry.weights(resolved))
    files: dict[str, bytes]
    if format_ in ("kohya", "ai_toolkit", "lora_diffusion"):  # these name or count the base's layers
        of = open_library(registry, base_for(resolved, base)).outline
        files = export_adapter(weights, format_, of.shapes, label_of(resolved.id, of.facts), of.names)
    else:
        files = export_adapter(weights, format_)
    written = deliver(files, out)
    if as_json:
        return options.print_json({"files": [str(path) for path in written]})
    for path in written:
        click.echo(str(path))


@adapters.command("import")
@click.argument("id")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--base", default="pocket", show_default=True, help="the base that it was trained on")
@click.option("--rank", type=click.IntRange(1, 1024), help="of a LoKr or LoHa file as plain LoRA  [default: 32]")
@click.option("--trigger", default="", help="words of a prompt that name the subject")
@click.option(
    "--public/--private",
    default=None,
    help="whether other tenants may generate with it; default: unchanged, private if new",
)
@options.storage
@options.tenant
@options.as_json
def import_(
    id: str,
    files: tuple[Path, ...],
    base: str,
    rank: int | None,
    trigger: str,
    public: bool | None,
    storage: str,
    tenant: str,
    as_json: bool,
) -> None:
    """Publish FILES (diffusers, kohya, ai-toolkit, lora_diffusion or PEFT) as adapter ID.

    A folder means its files and those in its subfolders unet, transformer, text_encoder, text_encoder_2 and embeddings.
    """
    from training.adapters.formats.formats import import_adapter

    library = open_library(open_registry(storage), base)
    adapter = import_adapter(
        read_paths(files),
        library.shapes(),
        library.outline.names,
        rank=rank,
        say=lambda text: click.echo(text, err=True),
    )
    resolved = publish(library, tenant, id, adapter, public=public, trigger=trigger)
    if as_json:
        return options.print_json(short(resolved))
    click.echo(f"{resolved.tenant}/{resolved.id}@{resolved.version[:12]}")


def read_paths(paths: Sequence[Path]) -> dict[str, bytes]:
    """The files by path; a folder stands for the files in it and in those of its folders that hold parts of it."""
    files: dict[str, bytes] = {}
    for path in paths:
        try:
            for file in _files_of(path) if path.is_dir() else [path]:
                files[file.as_posix()] = file.read_bytes()
        except OSError as error:
            raise UserError(f"Cannot read '{error.filename}': {error.strerror}. Give safetensors files.") from None
    return files


def _files_of(folder: Path) -> list[Path]:
    folders = [folder, *(folder / name for name in FOLDERS if (folder / name).is_dir())]
    return [file for one in folders for file in sorted(one.iterdir()) if file.is_file() and file.name[0] != "."]


def publish(
    library: "Library",
    tenant: str,
    id: str,
    adapter: "Adapter",
    *,
    public: bool | None = None,
    trigger: str = "",
    sources: tuple[str, ...] = (),
) -> "Resolved":
    """Publishes `adapter` whatever its rank; says on stderr which flags a server needs to take it."""
    from serving.config import MAX_RANK, MAX_WORDS, EngineSpec
    from serving.engine.tiers.fit import count_vectors
    from training.adapters.adapter import save_adapter

    spec = EngineSpec(rank=MAX_RANK, words=MAX_WORDS)
    resolved = library.upload(tenant, id, save_adapter(adapter), spec, public=public, trigger=trigger, sources=sources)
    if needed := EngineSpec().flags_for(adapter.rank, count_vectors(adapter)):
        smaller = ", or make the adapter smaller with `dreamfleet adapters resize`" if "--rank" in needed else ""
        click.echo(f"note: a server takes it only if started with {needed}{smaller}", err=True)
    return resolved


def base_for(resolved: "Resolved", base: str | None) -> str:
    """`base`, or the one that the adapter's card names; raises UserError asking for --base where that is not here."""
    named = base or resolved.card.base
    try:
        find_base(named)
    except UserError as error:
        if base:
            raise
        raise UserError(
            f"Adapter {resolved.name} was made for the base '{named}', and no base is found here by that name. Say "
            f"where it is: --base FOLDER, a .safetensors checkpoint or a hub id. ({error})"
        ) from None
    return named


def open_library(registry: "Registry", base: str) -> "Library":
    """The adapters of a registry for a base."""
    from serving.http.library import Library
    from training.base.files.outline import outline

    return Library(registry, outline(base))


def open_registry(storage: str) -> "Registry":
    """The registry of a storage."""
    from training.storage.registry import Registry

    return Registry(open_storage(storage))


def resolve(registry: "Registry", adapter: str, tenant: str) -> "Resolved":
    """The adapter that `ID[@VERSION]` or `TENANT/ID[@VERSION]` means to a tenant. Raises UnknownAdapter."""
    name, _, version = adapter.partition("@")
    return registry.resolve(name, version or None, tenant)


def short(resolved: "Resolved") -> dict[str, str | int]:
    """What `--json` says of an adapter."""
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

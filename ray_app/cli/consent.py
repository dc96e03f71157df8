"""`consent`, `subject` and `audit`: who agreed to what, what is held about a subject, and the log of both."""

from pathlib import Path

import click
from rich.table import Table

from ray_app.cli import options
from training.errors import UserError
from training.storage.storage import open_storage


@click.group()
def consent() -> None:
    """List consent records, and take consent back."""


@consent.command("list")
@options.storage
@options.tenant
@options.as_json
def list_(storage: str, tenant: str, as_json: bool) -> None:
    """List the consent records of a tenant."""
    from training.storage.consents import list_consents, revocation_of

    opened = open_storage(storage)
    found = {one.id: one for one in list_consents(opened, tenant)}
    state = {
        one.id: "revoked"
        if revocation_of(opened, tenant, one.subject)
        else "expired"
        if one.consent.expired
        else "valid"
        for one in found.values()
    }
    if as_json:
        shown = [{**one.model_dump(mode="json"), "state": state[one.id]} for one in found.values()]
        return options.print_json({"consents": shown})
    if not found:
        return click.echo(f"no consent records of tenant {tenant}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "subject", "kind", "granted by", "scope", "granted", "expires", "state"):
        table.add_column(column, overflow="fold")
    for one in found.values():
        given = one.consent
        until = f"{given.expires_at:%Y-%m-%d}" if given.expires_at else "never"
        granted = f"{given.granted_at:%Y-%m-%d}"
        table.add_row(
            one.id, one.subject, given.kind, given.granted_by, ", ".join(given.scope), granted, until, state[one.id]
        )
    options.console().print(table)


@consent.command()
@click.argument("id")
@options.storage
@options.tenant
def show(id: str, storage: str, tenant: str) -> None:
    """Show one record as JSON."""
    from training.storage.consents import find_consent

    options.print_json(find_consent(open_storage(storage), id, tenant).model_dump(mode="json"))


@consent.command()
@click.argument("id")
@options.storage
@options.tenant
@options.as_json
def revoke(id: str, storage: str, tenant: str, as_json: bool) -> None:
    """Take the consent ID back: nothing of its subject is served or trained any more, and what is held is erased.

    Running servers on the storage follow within seconds. Revoking twice is fine.
    """
    from training.storage.consents import find_consent
    from training.storage.erasure import revoke as take_back

    opened = open_storage(storage)
    record = find_consent(opened, id, tenant)
    receipt = take_back(opened, tenant, record.subject, by="command line", reason="revoked")
    if as_json:
        return options.print_json(receipt.model_dump(mode="json"))
    _say(receipt.subject, receipt.adapters, receipt.keys, repeated=receipt.repeated)


@click.group()
def subject() -> None:
    """Give out or erase everything that is held about a subject."""


@subject.command()
@click.argument("id")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="default: SUBJECT.zip")
@options.storage
@options.tenant
def export(id: str, out: Path | None, storage: str, tenant: str) -> None:
    """Write everything that is held about subject ID into a zip: photos, adapters, cards, samples, events, consents."""
    from training.storage.erasure import export as pack
    from training.storage.local import write_file

    file = out or Path(f"{id}.zip")
    data = pack(open_storage(storage), tenant, id)
    if data is None:
        raise UserError(f"Nothing is held about subject '{id}' of tenant '{tenant}'.")
    write_file(file, [data])
    click.echo(str(file))


@subject.command()
@click.argument("id")
@click.option("--yes", is_flag=True, help="really erase; without it only what would be erased is listed")
@options.storage
@options.tenant
@options.as_json
def erase(id: str, yes: bool, storage: str, tenant: str, as_json: bool) -> None:
    """Erase subject ID and every adapter that contains it; it cannot be trained again."""
    from training.storage.erasure import containing, held, revoke as take_back

    opened = open_storage(storage)
    if not yes:
        keys = sorted(held(opened, tenant, id))
        names = containing(opened, f"{tenant}/{id}")
        if as_json:
            return options.print_json({"subject": id, "adapters": names, "keys": keys, "erased": False})
        for key in keys:
            click.echo(key)
        return click.echo(f"{len(keys)} objects; adapters: {', '.join(names)}. Erase them with --yes.", err=True)
    receipt = take_back(opened, tenant, id, by="command line", reason="erased")
    if as_json:
        return options.print_json({**receipt.model_dump(mode="json"), "erased": True})
    _say(receipt.subject, receipt.adapters, receipt.keys, repeated=receipt.repeated)


@click.group()
def audit() -> None:
    """The log of consents, revocations and erasures."""


@audit.command()
@options.storage
@options.as_json
def verify(storage: str, as_json: bool) -> None:
    """Check the log's chain of hashes. Exit status 1 if it is broken."""
    from training.storage.audit import verify as check

    found = check(open_storage(storage))
    if as_json:
        options.print_json({"entries": found.entries, "last": found.last, "broken": found.broken})
    elif found.broken is None:
        click.echo(f"{found.entries} entries, unbroken; the last one's hash is {found.last}")
    else:
        click.echo(f"broken after entry {found.entries}: {found.broken}")
    if found.broken is not None:
        raise click.exceptions.Exit(1)


@audit.command("show")
@options.storage
@options.as_json
def show_log(storage: str, as_json: bool) -> None:
    """Show the log."""
    from training.storage.audit import entries

    found = entries(open_storage(storage))
    if as_json:
        return options.print_json({"entries": [one.model_dump() for one in found]})
    for one in found:
        said = ", ".join(f"{name}: {value}" for name, value in one.detail.items())
        click.echo(f"{one.number} {one.time} {one.event} {one.tenant}/{one.subject} ({said})")


def _say(subject: str, adapters: tuple[str, ...], keys: tuple[str, ...], *, repeated: bool) -> None:
    if repeated:
        click.echo(f"subject {subject} had been revoked before; {len(keys)} more objects erased")
        return
    click.echo(f"subject {subject} revoked; adapters: {', '.join(adapters)}; {len(keys)} objects erased")

"""`detect`: whether pictures were made by this service, by a running server or here with the storage's own key."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ray_app.cli import options
from training.errors import UserError

TIMEOUT_S = 600.0


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@options.storage
@click.option("--base", default="pocket", show_default=True, help="the base that may have made them")
@click.option("--url", help="ask a running server instead of loading the base here")
@click.option("--key", help="API key, to learn whose a picture is")
@click.option("--thorough", is_flag=True, help="also suppose that parts were cut off; takes many times as long")
@options.as_json
def detect(
    images: Sequence[Path], storage: str, base: str, url: str | None, key: str | None, thorough: bool, as_json: bool
) -> None:
    """Tell whether IMAGES were made by this service: by their signed manifest and by their noise."""
    files = [(str(image), _read(image)) for image in images]
    found = _ask(files, url, key, thorough) if url else asyncio.run(_look(files, storage, base, thorough))
    if as_json:
        return options.print_json({"images": found})
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("file", "made here", "false positive", "manifest", "adapter", "time"):
        table.add_column(column, overflow="fold")
    for one in found:
        made = "yes" if one["made_here"] else "not found"
        chance = f"{one['false_positive']:.1g}"
        table.add_row(one["file"], made, chance, one["c2pa"], one["adapter"] or "", one["time"] or "")
    options.console().print(table)


def _read(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise UserError(f"'{image}' cannot be read: {error.strerror or error}.") from None


def _ask(files: Sequence[tuple[str, bytes]], url: str, key: str | None, thorough: bool) -> list[dict[str, Any]]:
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    found: list[dict[str, Any]] = []
    for name, data in files:
        try:
            response = httpx.post(
                f"{url.rstrip('/')}/v1/detect",
                params={"thorough": thorough},
                files={"image": (name, data)},
                headers=headers,
                timeout=TIMEOUT_S,
                trust_env=False,
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"No server responds at {url}: {error}. Start one, or leave --url out.") from None
        if response.status_code != 200:
            said = response.json().get("error", {}).get("message", "") if response.content else ""
            raise UserError(f"The server refused ({response.status_code}): {said}")
        found += response.json()["images"]
    return found


async def _look(files: Sequence[tuple[str, bytes]], storage: str, base: str, thorough: bool) -> list[dict[str, Any]]:
    """By an engine in this process. Whoever has the storage may know whose pictures are."""
    from serving.config import ServeSpec
    from serving.engine.loop import EngineLoop
    from serving.http.detect import shown
    from serving.http.detection import Detector
    from serving.local import LocalEngines, make_engine
    from serving.marking.serials import Serials
    from training.storage.storage import open_storage

    spec = ServeSpec(base=base, storage=storage)
    loop = EngineLoop(make_engine(spec))
    try:
        detector = Detector(
            engines=LocalEngines(loop),
            facts=loop.engine.base.facts,
            serials=Serials(open_storage(storage)),
            most_px=spec.limits.side_px,
        )
        found = [(name, await detector.detect(data, name, thorough=thorough)) for name, data in files]
        return [shown(name, one, list(one.records)).model_dump() for name, one in found]
    finally:
        loop.close()

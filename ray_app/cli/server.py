"""`serve` and `generate`: the HTTP server, and a client of it."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ray_app.cli import options
from serving.config import SERVER_FLAGS, EngineSpec, ServeSpec
from serving.flags import flags
from training.errors import UserError


@click.command()
@options.storage
@options.address
@click.option("--base", default="pocket", show_default=True, help="the base to serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--keys", type=click.Path(path_type=Path), help="keys file; without it only this machine may connect")
@flags(ServeSpec, "server", only=SERVER_FLAGS)
@flags(EngineSpec, "engine")
def serve(
    storage: str,
    address: str,
    base: str,
    host: str,
    port: int,
    keys: Path | None,
    server: ServeSpec,
    engine: EngineSpec,
) -> None:
    """Serve the base and every published adapter over HTTP, until Ctrl-C."""
    from ray_app.serve.deployments import Deployment, serve_forever

    serve_forever(
        storage=storage,
        address=address,
        base=base,
        host=host,
        port=port,
        keys=str(keys) if keys else None,
        deployment=Deployment(server=server.model_copy(update={"engine": engine})),
    )


@click.command()
@click.argument("prompt")
@click.option("--adapter", "adapters", multiple=True, help="ID[@VERSION][:WEIGHT]; repeat it to mix several")
@click.option("-n", "count", default=1, show_default=True, type=click.IntRange(1), help="number of images")
@click.option("--seed", type=click.IntRange(0), help="seed of the first image; default: random")
@click.option("--steps", type=click.IntRange(1), help="denoising steps; default: the server's")
@click.option("--guidance-scale", type=click.FloatRange(0), help="default: the server's")
@click.option("--negative-prompt", help="what the images should not show")
@click.option("--size", help="WIDTHxHEIGHT in pixels; default: the base's")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="address of the server")
@click.option("--key", help="API key, if the server requires one")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    show_default=True,
    help="folder for the images",
)
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="seconds to wait for the response")
@options.as_json
def generate(
    prompt: str,
    adapters: Sequence[str],
    count: int,
    seed: int | None,
    steps: int | None,
    guidance_scale: float | None,
    negative_prompt: str | None,
    size: str | None,
    url: str,
    key: str | None,
    out: Path,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Generate images of PROMPT with a running server; writes PNG files into OUT and prints their names."""
    asked = {
        "prompt": prompt,
        "n": count,
        "adapters": [parse_adapter(adapter) for adapter in adapters],
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "size": size,
    }
    response = _post(f"{url.rstrip('/')}/v1/images/generations", asked, key, timeout_s)
    out.mkdir(parents=True, exist_ok=True)
    images = []
    for image in response["data"]:
        file = _free_name(out, image.get("seed", 0))
        file.write_bytes(base64.b64decode(image["b64_json"]))
        images.append({"file": str(file), "seed": image.get("seed"), "adapters": image.get("adapters", [])})
        if not as_json:
            click.echo(str(file))
    if as_json:
        options.print_json({"images": images})


def parse_adapter(text: str) -> dict[str, str | float]:
    """`rusty`, `acme/rusty@3f9c0d`, `rusty:0.8` as the body of a request has it. Raises UserError."""
    id, colon, weight = text.partition(":")
    if not id:
        raise UserError(f"Adapter {text!r} has no id. Write ID[@VERSION][:WEIGHT], for example rusty:0.8.")
    try:
        return {"id": id, "weight": float(weight)} if colon else {"id": id}
    except ValueError:
        raise UserError(f"Adapter {text!r}: weight {weight!r} is no number. Write for example {id}:0.8.") from None


def _post(url: str, body: dict[str, Any], key: str | None, timeout_s: float) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    given = {name: value for name, value in body.items() if value is not None and value != []}
    try:
        response = httpx.post(url, json=given, headers=headers, timeout=timeout_s, trust_env=False)
    except httpx.TimeoutException:
        raise UserError(f"{url} did not respond within {timeout_s:.0f} s. Give it longer with --timeout.") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"No server responds at {url}: {error}. Start one with `dreamfleet serve`.") from None
    if response.status_code != 200:
        raise UserError(f"The server refused ({response.status_code}): {_message(response)}")
    return response.json()


def _message(response: Any) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(response.text[:200])


def _free_name(folder: Path, seed: int) -> Path:
    """`image-<seed>.png`, or with a number if that is there."""
    file, turn = folder / f"image-{seed}.png", 1
    while file.exists():
        file, turn = folder / f"image-{seed}-{turn}.png", turn + 1
    return file

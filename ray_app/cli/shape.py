"""`adapters merge`, `fuse` and `sweep`: new adapters from old ones, a full model, what a weight does as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_app.cli import options
from ray_app.cli.adapters import open_library, open_registry, resolve, short
from training.errors import UserError

if TYPE_CHECKING:
    from training.adapters.adapter import Adapter
    from training.storage.registry import Registry

parts = click.argument("parts", nargs=-1, required=True, metavar="ID[@VERSION][:WEIGHT]...")

base_option = click.option("--base", help="the base's name or folder, if not the one the card names")


@click.command()
@parts
@click.option("--out", required=True, help="the id of the new adapter, or a file that ends in .safetensors")
@click.option("--rank", type=click.IntRange(1), help="reduce to this rank by SVD; exact by default")
@base_option
@options.storage
@options.tenant
@options.as_json
def merge(
    parts: Sequence[str], out: str, rank: int | None, base: str | None, storage: str, tenant: str, as_json: bool
) -> None:
    """Add adapters up, each times its weight, into one."""
    from serving.config import EngineSpec
    from training.adapters.adapter import save_adapter
    from training.adapters.merge import merge_adapters, reduce_rank

    registry = open_registry(storage)
    loaded = [_load(registry, part, tenant) for part in parts]
    merged = merge_adapters([(adapter, weight) for adapter, weight, _ in loaded])
    merged = reduce_rank(merged, rank) if rank else merged
    data = save_adapter(merged)
    if out.endswith(".safetensors"):
        Path(out).write_bytes(data)
        return options.print_json({"file": out, "rank": merged.rank}) if as_json else click.echo(out)
    library = open_library(registry, base or loaded[0][2])
    spec = EngineSpec(rank=max(EngineSpec().rank, merged.rank))
    resolved = library.upload(tenant, out, data, spec, public=False, trigger="")
    if as_json:
        return options.print_json(short(resolved))
    click.echo(f"{resolved.tenant}/{resolved.id}@{resolved.version[:12]} (rank {merged.rank})")


@click.command()
@parts
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="a new folder")
@base_option
@options.storage
@options.tenant
@options.as_json
def fuse(parts: Sequence[str], out: Path, base: str | None, storage: str, tenant: str, as_json: bool) -> None:
    """Write the base with adapters fused in, as a full diffusers folder."""
    from training.adapters.fuse import fuse_base

    registry = open_registry(storage)
    loaded = [_load(registry, part, tenant) for part in parts]
    changed = fuse_base(base or loaded[0][2], [(adapter, weight) for adapter, weight, _ in loaded], out)
    if as_json:
        return options.print_json({"folder": str(out), "layers": changed})
    click.echo(f"{out}: {changed} layers changed")


@click.command()
@click.argument("adapter")
@click.option("--prompt", multiple=True, help="several make several rows; the adapter's own prompt by default")
@click.option("--weights", default="0,0.3,0.5,0.7,1", show_default=True)
@click.option("--seed", default=42, show_default=True)
@click.option("--steps", default=25, show_default=True, type=click.IntRange(1))
@click.option("--guidance-scale", default=4.0, show_default=True)
@click.option("--negative-prompt", default="")
@click.option("--out", default="sweep.png", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
@base_option
@options.storage
@options.tenant
def sweep(
    adapter: str,
    prompt: Sequence[str],
    weights: str,
    seed: int,
    steps: int,
    guidance_scale: float,
    negative_prompt: str,
    out: Path,
    base: str | None,
    storage: str,
    tenant: str,
) -> None:
    """Draw the same prompt and seed with ADAPTER at several weights, side by side."""
    from training.base.base import load_base
    from training.sampling.sweep import draw_sweep

    registry = open_registry(storage)
    resolved = resolve(registry, adapter, tenant)
    loaded, _, named = _load(registry, adapter, tenant)
    try:
        wanted = [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UserError(f"--weights is '{weights}'; give numbers with commas between, such as 0,0.5,1.") from None
    prompts = list(prompt) or [resolved.card.instance_prompt]
    picture = draw_sweep(
        load_base(base or named),
        loaded,
        prompts,
        wanted,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
    )
    picture.save(out)
    click.echo(str(out))


def _load(registry: "Registry", part: str, tenant: str) -> "tuple[Adapter, float, str]":
    """Adapter, weight and base of `[TENANT/]ID[@VERSION][:WEIGHT]`."""
    from training.adapters.adapter import load_adapter

    name, colon, weight = part.partition(":")
    try:
        value = float(weight) if colon else 1.0
    except ValueError:
        raise UserError(f"'{part}': '{weight}' is no weight. Write ID:0.7, for example.") from None
    resolved = resolve(registry, name, tenant)
    return load_adapter(registry.weights(resolved)), value, resolved.card.base

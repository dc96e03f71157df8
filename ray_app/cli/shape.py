"""`adapters merge`, `resize`, `fuse` and `sweep`: adapters from adapters, a full model, what a weight looks like."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_app.cli import options
from ray_app.cli.adapters import (
    base_for,
    base_option,
    open_library,
    open_registry,
    publish,
    read_paths,
    resolve,
    short,
)
from training.errors import UserError

if TYPE_CHECKING:
    from training.adapters.adapter import Adapter
    from training.storage.registry import Registry
    from training.storage.version import Resolved

parts = click.argument("parts", nargs=-1, required=True, metavar="ID[@VERSION][:WEIGHT]...")


@click.command()
@parts
@click.option("--out", required=True, help="id of the new adapter, or a file that ends in .safetensors")
@click.option("--rank", type=click.IntRange(1), help="reduce the result to this rank by SVD; default: exact")
@base_option
@options.storage
@options.tenant
@options.as_json
def merge(
    parts: Sequence[str], out: str, rank: int | None, base: str | None, storage: str, tenant: str, as_json: bool
) -> None:
    """Add adapters, each multiplied by its weight (default: 1), into one."""
    from training.adapters.adapter import save_adapter
    from training.adapters.merge import merge_adapters, reduce_rank
    from training.storage.local import write_file

    registry = open_registry(storage)
    loaded = [_load(registry, part, tenant) for part in parts]
    merged = merge_adapters([(adapter, weight) for adapter, weight, _ in loaded])
    merged = reduce_rank(merged, rank) if rank else merged
    sources = tuple(f"{one.name}@{one.version}" for _, _, one in loaded)
    if out.endswith(".safetensors"):
        write_file(Path(out), [save_adapter(merged)])
        return options.print_json({"file": out, "rank": merged.rank}) if as_json else click.echo(out)
    resolved = publish(open_library(registry, base_for(loaded[0][2], base)), tenant, out, merged, sources=sources)
    if as_json:
        return options.print_json(short(resolved))
    click.echo(f"{resolved.tenant}/{resolved.id}@{resolved.version[:12]} (rank {merged.rank})")


@click.command()
@click.argument("source")
@click.option("--rank", required=True, type=click.IntRange(1), help="maximum rank of a layer")
@click.option("--out", required=True, help="id of the new adapter, or a file that ends in .safetensors")
@click.option("--base", help="name or folder of the base; default: the one that the adapter's card names, else pocket")
@options.storage
@options.tenant
@options.as_json
def resize(source: str, rank: int, out: str, base: str | None, storage: str, tenant: str, as_json: bool) -> None:
    """Write the closest adapter of a lower rank (SVD), and print its error relative to SOURCE.

    SOURCE is a published adapter ([TENANT/]ID[@VERSION]), a file that ends in .safetensors, or a folder, which must
    start with ., / or ~ (for example ./FOLDER).
    """
    from training.adapters.adapter import load_adapter, save_adapter
    from training.adapters.merge import reduce_rank, relative_error
    from training.storage.local import write_file

    registry = open_registry(storage)
    adapter, resolved = _open(registry, source, tenant, base)
    data = save_adapter(reduce_rank(adapter, rank))
    smaller = load_adapter(data)
    if out.endswith(".safetensors"):
        write_file(Path(out), [data])
        made: dict[str, object] = {"file": out}
    else:
        library = open_library(registry, base_for(resolved, base) if resolved else base or "pocket")
        card = resolved.card if resolved else None
        trigger, public = (card.trigger, resolved.public) if resolved and card else ("", None)
        sources = (f"{resolved.name}@{resolved.version}",) if resolved else ()
        made = dict(short(publish(library, tenant, out, smaller, public=public, trigger=trigger, sources=sources)))
    error = relative_error(adapter, smaller)
    if as_json:
        worst = {"module": error.worst_module, "error": error.worst}
        return options.print_json({**made, "rank": smaller.rank, "error": error.all, "worst": worst})
    click.echo(f"{out}: rank {adapter.rank} -> {smaller.rank}, relative error {error.all:.2%}")
    if error.worst_module:
        click.echo(f"worst layer {error.worst:.2%}: {error.worst_module}")


@click.command()
@parts
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="a new folder")
@base_option
@options.storage
@options.tenant
@options.as_json
def fuse(parts: Sequence[str], out: Path, base: str | None, storage: str, tenant: str, as_json: bool) -> None:
    """Write the base with adapters fused in, as a full diffusers folder.

    Words that the adapters have trained are added to the tokenizer and the text encoder, not scaled by the weight.
    """
    from training.adapters.fuse import fuse_base

    registry = open_registry(storage)
    loaded = [_load(registry, part, tenant) for part in parts]
    fused = fuse_base(base_for(loaded[0][2], base), [(adapter, weight) for adapter, weight, _ in loaded], out)
    if as_json:
        return options.print_json({"folder": str(out), "layers": fused.layers, "words": fused.words})
    click.echo(f"{out}: {fused.layers} layers changed")
    for word, tokens in fused.words.items():
        click.echo(f"{out}: the tokenizer has the word {word}" + f" as {' '.join(tokens)}" * (len(tokens) > 1))


@click.command()
@click.argument("adapter")
@click.option("--prompt", multiple=True, help="repeatable, one row each; default: the adapter's instance prompt")
@click.option("--weights", default="0,0.3,0.5,0.7,1", show_default=True, help="one column each")
@click.option("--seed", default=42, show_default=True, help="the same for every image")
@click.option("--steps", type=click.IntRange(1), help="denoising steps; default: as the base recommends")
@click.option("--guidance-scale", type=click.FloatRange(0), help="default: as the base recommends")
@click.option("--negative-prompt", default="", help="what the images should not show")
@click.option(
    "--out",
    default="sweep.png",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="the image to write",
)
@base_option
@options.storage
@options.tenant
def sweep(
    adapter: str,
    prompt: Sequence[str],
    weights: str,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    negative_prompt: str,
    out: Path,
    base: str | None,
    storage: str,
    tenant: str,
) -> None:
    """Generate the same prompt and seed with ADAPTER at several weights; writes one image."""
    from training.base.base import load_base
    from training.sampling.sweep import draw_sweep

    registry = open_registry(storage)
    loaded, _, resolved = _load(registry, adapter, tenant)
    try:
        wanted = [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UserError(f"--weights is '{weights}'; give numbers with commas between, such as 0,0.5,1.") from None
    prompts = list(prompt) or [resolved.card.instance_prompt]
    picture = draw_sweep(
        load_base(base_for(resolved, base)),
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


def _open(registry: "Registry", source: str, tenant: str, base: str | None) -> "tuple[Adapter, Resolved | None]":
    """The adapter in a file or folder, or one that is published and its version."""
    from training.adapters.formats.formats import import_adapter

    if source.endswith(".safetensors") or source.startswith((".", "/", "~")):
        files = read_paths([Path(source).expanduser()])
        of = open_library(registry, base or "pocket").outline
        return import_adapter(files, of.shapes, of.names, say=lambda text: click.echo(text, err=True)), None
    adapter, _, resolved = _load(registry, source, tenant)
    return adapter, resolved


def _load(registry: "Registry", part: str, tenant: str) -> "tuple[Adapter, float, Resolved]":
    """Adapter, weight and version of `[TENANT/]ID[@VERSION][:WEIGHT]`."""
    from training.adapters.adapter import load_adapter

    name, colon, weight = part.partition(":")
    try:
        value = float(weight) if colon else 1.0
    except ValueError:
        raise UserError(f"'{part}': '{weight}' is no weight. Write ID:0.7, for example.") from None
    resolved = resolve(registry, name, tenant)
    return load_adapter(registry.weights(resolved)), value, resolved

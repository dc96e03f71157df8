"""Several trained subjects in one picture: regions against what people do today, on the same adapters and seeds.

    dreamfleet train manifests/demo/manifest.yaml --storage ./storage
    python -m benchmarks.regions --storage ./storage [--base FOLDER] [--title TEXT] [--grid FILE] [--write]

Every pair, and every run of three, of the subjects that the storage holds, in places without their hues. Ours: plain
mixing, the average of the adapters as `adapters merge` makes it, and regions; diffusers: `set_adapters`. A picture has
one region a subject, side by side; `--across` is how wide it is, in pictures of the base's own size.

Of each region's crop, by `pocket-judge`: `likeness` to its subject's photos, from the base's own crop for the same
prompt and seed (0) to the photos among themselves (1); `bleeding`, the same to another subject's photos. `hues`: the
rarer of the subject's two hues, as a share of what its photos have, and of the others' hues that it lacks itself, the
most. `class`: how often the judge reads its class.
"""

import argparse
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from benchmarks.cast import Picture, Scene, Subject, read_subjects, weigh
from serving.config import EngineSpec
from serving.engine.engine import Engine
from serving.engine.job import Done, JobFailed
from serving.engine.region import Region
from serving.engine.request import AdapterRef, AdapterUse, GenerateRequest
from training.adapters.adapter import save_adapter
from training.adapters.merge import merge_adapters
from training.base.base import Base, load_base

RESULT = Path(__file__).with_suffix(".md")
PLACES = ("in the snow", "in the clouds")  # without the subjects' hues
LEAST_PAIRS = 10
STEPS, GUIDANCE = 15, 3.0
Table = list[tuple[str, ...]]


# -- ways to draw several subjects --


Way = Callable[[Scene], tuple[AdapterUse, ...]]
WAYS: dict[str, Way] = {
    "base alone": lambda scene: (),
    "plain mixing": lambda scene: tuple(AdapterUse(ref=one.ref) for one in scene.cast),
    "merged, averaged": lambda scene: (AdapterUse(ref=merged_ref(scene.cast)),),
    "words": lambda scene: regions(scene, box=False, words=True),
    "boxes": lambda scene: regions(scene, box=True, words=False),
    "boxes and words": lambda scene: regions(scene, box=True, words=True),
    "boxes and prompts": lambda scene: regions(scene, box=True, words=True, prompts=True),
}


def regions(scene: Scene, *, box: bool, words: bool, prompts: bool = False) -> tuple[AdapterUse, ...]:
    return tuple(
        AdapterUse(
            ref=one.ref,
            region=Region(
                box=scene.box(index) if box else None,
                words=(one.words,) if words else None,
                prompt=f"a photo of a {one.words} {scene.place}" if prompts else None,
            ),
        )
        for index, one in enumerate(scene.cast)
    )


def merged_ref(cast: Sequence[Subject]) -> AdapterRef:
    return AdapterRef(tenant="default", id="-".join(one.id for one in cast), version="1")


def draw(base: Base, scenes: Sequence[Scene], across: int) -> dict[str, list[Picture]]:
    """Every scene in every way of ours, all in one engine: mixed rows share forwards."""
    single = {one.ref: one.adapter for scene in scenes for one in scene.cast}
    merged = {
        merged_ref(cast): merge_adapters([(one.adapter, 1 / len(cast)) for one in cast])
        for cast in dict.fromkeys(scene.cast for scene in scenes)
    }
    rank = max(adapter.rank for adapter in (single | merged).values())
    engine = Engine(base, EngineSpec(device="cpu", slots=16, rank=rank, queue=100_000), (single | merged).__getitem__)
    jobs, pictures = {}, {name: [Image.new("RGB", (1, 1))] * len(scenes) for name in WAYS}
    try:
        for index, scene in enumerate(scenes):
            for name, way in WAYS.items():
                side = base.facts.resolution
                request = GenerateRequest(
                    prompt=scene.prompt, adapters=way(scene), width=across * side, height=side, seed=scene.seed,
                    steps=STEPS, guidance_scale=GUIDANCE, scheduler=base.facts.sampler, deadline_s=86400,
                )  # fmt: skip
                jobs[engine.submit(request)] = name, index
        while engine.jobs:
            if engine.idle:
                engine.woken.wait(1)
            engine.woken.clear()
            for outcome in engine.step():
                assert not isinstance(outcome, JobFailed), outcome.error
                if isinstance(outcome, Done):
                    name, index = jobs[outcome.job]
                    pictures[name][index] = Image.fromarray(outcome.pixels.numpy())
    finally:
        engine.close()
    return pictures


@contextmanager
def pipeline_with(base: Base, cast: Sequence[Subject], folder: Path) -> Iterator[Any]:
    """The base's diffusers pipeline with the adapters of `cast` loaded and set, as people do today."""
    pipeline: Any = DiffusionPipeline.from_pretrained(base.folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for one in cast:
        (folder / f"{one.id}.safetensors").write_bytes(save_adapter(one.adapter))
        pipeline.load_lora_weights(folder, weight_name=f"{one.id}.safetensors", adapter_name=one.id)
    pipeline.set_adapters([one.id for one in cast], [1.0] * len(cast))
    yield pipeline


def draw_with_diffusers(base: Base, scenes: Sequence[Scene], across: int, folder: Path) -> list[Picture]:
    """Every scene by `set_adapters`, at guidance as ours has it."""
    side, found = base.facts.resolution, []
    for cast in dict.fromkeys(scene.cast for scene in scenes):
        with pipeline_with(base, cast, folder) as pipeline:
            less = 1.0 if type(pipeline).__name__ == "ZImagePipeline" else 0.0
            for scene in (scene for scene in scenes if scene.cast == cast):
                generator = torch.Generator().manual_seed(scene.seed)
                made = pipeline(
                    prompt=scene.prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE - less, height=side,
                    width=across * side, generator=generator,
                )  # fmt: skip
                found.append(made.images[0])
    return found


def casts_of(subjects: Sequence[Subject], count: int) -> list[tuple[Subject, ...]]:
    """Pairs, each in one order, or in both if there are few; of more, as many in a row as there are subjects."""
    if count == 2:
        pairs = list(combinations(subjects, 2))
        few = len(pairs) < LEAST_PAIRS
        return list(permutations(subjects, 2)) if few else [pair[:: 1 - 2 * (n % 2)] for n, pair in enumerate(pairs)]
    total = len(subjects)
    return [tuple(subjects[(first + step) % total] for step in range(count)) for first in range(total)]


def compare(
    base: Base, subjects: Sequence[Subject], count: int, across: int, places: int, most: int | None, folder: Path
) -> tuple[Table, Picture]:
    """The table of all casts of `count` subjects, and a grid of some of them."""
    casts = casts_of(subjects, count)[:most]
    scenes = [Scene(cast, place, seed) for cast in casts for seed, place in enumerate(PLACES[:places])]
    drawn = draw(base, scenes, across)
    drawn["diffusers set_adapters"] = draw_with_diffusers(base, scenes, across, folder)
    order = ("base alone", "diffusers set_adapters", *(name for name in WAYS if name != "base alone"))
    table = [(name, *(f"{value:.2f}" for value in weigh(scenes, drawn[name], drawn["base alone"]))) for name in order]
    return table, grid(scenes[: 8 * places : places], {name: drawn[name][::places] for name in order})


def grid(scenes: Sequence[Scene], pictures: dict[str, list[Picture]], scale: int = 2) -> Picture:
    """A row of pictures for each way, and above them whom they show."""
    width, height = (scale * side for side in next(iter(pictures.values()))[0].size)
    made = Image.new("RGB", (150 + width * len(scenes), 16 + height * len(pictures)), "white")
    pen = ImageDraw.Draw(made)
    for x, scene in enumerate(scenes):
        pen.text((150 + x * width + 3, 2), ", ".join(one.id for one in scene.cast), fill="black")
    for y, (name, row) in enumerate(pictures.items()):
        pen.text((3, 16 + y * height + height // 2), name, fill="black")
        for x, picture in enumerate(row[: len(scenes)]):
            made.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (150 + x * width, 16 + y * height))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--places", type=int, default=len(PLACES), help="pictures of each cast, each in another place")
    parser.add_argument("--casts", type=int, help="the most casts of each count")
    parser.add_argument("--across", type=int, help="0: as many pictures as there are subjects", default=0)
    parser.add_argument("--title", default="pocket", help="what the result calls the base")
    parser.add_argument("--grid", type=Path, help="a picture for each count, its name before this suffix")
    parser.add_argument("--write", action="store_true", help=f"into {RESULT.name}")
    options = parser.parse_args()
    base, subjects = load_base(options.base, device="cpu"), read_subjects(options.storage)
    parts = []
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            table, sheet = compare(
                base, subjects, count, options.across or count, options.places, options.casts, Path(folder)
            )
        if options.grid:
            sheet.save(options.grid.with_stem(f"{options.grid.stem}-{count}"))
        heads = (f"{count} subjects", "likeness", "bleeding", "own hues", "others' hues", "class")
        lines = [f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *table)]
        parts.append("\n".join(lines) + "\n")
        print(parts[-1], flush=True)
    if options.write:
        day = datetime.now(UTC).date().isoformat()
        where = f"{options.title}, {day}, {platform.machine()} CPU, torch {torch.__version__}"
        kept = RESULT.read_text() if RESULT.exists() else "# Regions\n"
        RESULT.write_text(f"{kept.rstrip()}\n\n## {where}\n\n" + "\n".join(parts))


if __name__ == "__main__":
    main()

"""Edits: what is masked is redrawn and nothing else, as diffusers' inpainting pipelines do, beside any other rows."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    FluxInpaintPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.job import Job
from serving.engine.pictures.edit import decode_edit
from serving.engine.pictures.reference import decode_reference
from serving.engine.request import EditMask, GenerateRequest, Hires
from tests.families import write_family
from tests.pipelines import call
from tests.serving.company import Shelf, ask, random_adapter, ref, run, small
from tests.tiny import tiny_images
from tests.tiny_inpainting import inpainting
from training.base.base import Base, load_base
from training.base.files.outline import outline
from training.errors import UserError
from training.run.submission import read_manifest

CLOSE = 1e-4  # of another program's arithmetic
SAME = 1e-5  # law 4
VISIBLE = 1e-2
PROMPT = "a photo of a dog"


def photo(width: int = 16, height: int = 16, seed: int = 3) -> Image.Image:
    """Coloured noise."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def white(box: tuple[int, int, int, int], width: int = 16, height: int = 16) -> Image.Image:
    """A mask as AUTOMATIC1111 and diffusers take it: white is redrawn."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


LEFT = (0, 0, 8, 16)


def edit(*worn: str, box: tuple[int, int, int, int] = LEFT, **changes: Any) -> GenerateRequest:
    """A request that redraws `box` of the photo."""
    mask = EditMask(data=png(white(box)), means="white").model_copy(update=changes.pop("mask", {}))
    fields = {"steps": 4, "strength": 1.0, "image": png(photo()), "mask": mask, **changes}
    return ask(*worn, **fields)


def submitted(engine: Engine, request: GenerateRequest) -> Job:
    """The job of a request whose pictures are decoded here."""
    if request.mask is not None:
        return engine.submit(request, edit=decode_edit(request), references=references_of(engine, request))
    return engine.submit(request, references=references_of(engine, request))


def references_of(engine: Engine, request: GenerateRequest) -> list[Tensor]:
    return [decode_reference(one, engine.base.facts.multiple_px) for one in request.references]


def latents(engine: Engine, requests: Sequence[GenerateRequest]) -> list[Tensor]:
    """The last latents [n, C, h, w] of requests served together."""
    jobs = [submitted(engine, request) for request in requests]
    samples = [list(job.samples) for job in jobs]
    for end in run(engine, jobs).values():
        if isinstance(end, Exception):
            raise end
    return [torch.stack([sample.at for sample in group]) for group in samples]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def engine(tiny: Base) -> Iterator[Engine]:
    adapters = {ref(name): random_adapter(tiny, seed) for seed, name in enumerate(("cat", "dog"))}
    engine = Engine(tiny, small(), Shelf(adapters))
    yield engine
    engine.close()


def diffusers_edit(pipeline: Any, scheduler: Any, request: GenerateRequest, *, sized: bool = True) -> Tensor:
    """The latents of diffusers' own inpainting, from the same picture, mask and seed."""
    assert request.image is not None and request.mask is not None and request.mask.data is not None
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    found = pipeline(
        request.prompt,
        image=Image.open(io.BytesIO(request.image)).convert("RGB"),
        mask_image=Image.open(io.BytesIO(request.mask.data)),
        **({"height": request.height, "width": request.width} if sized else {}),
        num_inference_steps=request.steps,
        strength=request.strength,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).images
    assert isinstance(found, Tensor)
    return found


# -- equal to diffusers


@pytest.mark.parametrize(
    ("sampler", "scheduler", "strength"),
    [
        ("ddim", DDIMScheduler, 1.0),
        ("euler", EulerDiscreteScheduler, 0.5),
        ("dpm++_2m", DPMSolverMultistepScheduler, 0.75),
    ],
)
def test_a_base_that_knows_no_masks_edits_as_diffusers_does(
    engine: Engine, tiny_folder: Path, sampler: str, scheduler: Any, strength: float
) -> None:
    pipeline = StableDiffusionInpaintPipeline(
        **StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).components,
        requires_safety_checker=False,
    )
    request = edit(scheduler=sampler, strength=strength, box=(2, 4, 14, 10))
    (ours,) = latents(engine, [request])
    assert distance(ours, diffusers_edit(pipeline, scheduler, request)) < CLOSE
    assert distance(ours, latents(engine, [edit(scheduler=sampler, strength=strength)])[0]) > VISIBLE


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nine")
    inpainting(folder / "parts").save_pretrained(folder / "base")
    return folder / "base"


def test_a_base_made_for_inpainting_edits_as_diffusers_does_and_draws_without_a_mask(nine: Path, tiny: Base) -> None:
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(nine, safety_checker=None)
    shelf = Shelf({ref("cat"): random_adapter(tiny, 0)})  # trained on the base that it was made from
    engine = Engine(load_base(str(nine), device="cpu"), small(), shelf)
    asked = [edit(strength=1.0), edit(strength=0.5, box=(4, 4, 12, 12), scheduler="ddim"), ask(), edit("cat")]
    try:
        found = latents(engine, asked)
        alone = [latents(engine, [one])[0] for one in asked]
    finally:
        engine.close()
    for request, ours in zip(asked[:2], found, strict=False):
        assert distance(ours, diffusers_edit(pipeline, DDIMScheduler, request)) < CLOSE
    assert all(distance(one, other) < SAME for one, other in zip(found, alone, strict=True))
    assert distance(found[2], found[0]) > VISIBLE and distance(found[3], found[0]) > VISIBLE


def test_a_flow_matching_base_edits_as_diffusers_does(tmp_path: Path) -> None:
    folder = write_family("flux", tmp_path)
    engine = Engine(load_base(str(folder), device="cpu"), small(), Shelf({}))
    request = edit(strength=0.75, scheduler="euler")
    try:
        (ours,) = latents(engine, [request])
    finally:
        engine.close()
    pipeline = FluxInpaintPipeline.from_pretrained(folder)
    packed = diffusers_edit(pipeline, None, request)
    theirs = FluxInpaintPipeline._unpack_latents(packed, 16, 16, pipeline.vae_scale_factor)
    assert distance(ours, theirs) < CLOSE


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("klein", tmp_path_factory.mktemp("klein"))


def test_references_are_seen_as_by_the_flux_2_pipeline_and_share_forwards_only_with_their_like(klein: Path) -> None:
    pictures = [photo(64, 64, seed=4), photo(96, 70, seed=5)]
    first, both = (tuple(map(png, some)) for some in (pictures[:1], pictures))
    asked = [ask(steps=2, guidance_scale=2.0, scheduler="euler", references=some) for some in (both, first, first, ())]
    engine = Engine(load_base(str(klein), device="cpu"), small(max_rows=256), Shelf({}))
    try:
        found = latents(engine, asked)
        shared = engine.stats.rows / engine.stats.steps
        alone = latents(engine, asked[:1])[0]
        inpainted = ask(
            steps=4, strength=0.5, scheduler="euler", width=64, height=64, image=first[0], references=first,
            mask=EditMask(data=png(white((0, 0, 32, 64), 64, 64)), means="white"),
        )  # fmt: skip
        (masked,) = latents(engine, [inpainted])
    finally:
        engine.close()
    pipeline = Flux2KleinPipeline.from_pretrained(klein)
    pipeline.set_progress_bar_config(disable=True)
    for ours, some in zip(found, (pictures, pictures[:1], pictures[:1], None), strict=True):
        theirs = call(
            pipeline,
            PROMPT,
            guidance=2.0,
            num_inference_steps=2,
            image=some,
            generator=torch.Generator().manual_seed(1),
        )
        assert distance(ours, theirs) < CLOSE
    assert distance(alone, found[0]) < SAME and distance(found[0], found[1]) > VISIBLE
    theirs = diffusers_edit(Flux2KleinInpaintPipeline(**pipeline.components), None, inpainted, sized=False)
    spread = (pipeline.vae.bn.running_var + pipeline.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    theirs = (Flux2KleinPipeline._patchify_latents(theirs) - pipeline.vae.bn.running_mean.view(1, -1, 1, 1)) / spread
    assert distance(masked, theirs) < CLOSE
    assert shared == 2 * 4 / 3  # of four guided rows the two with equal references step together


# -- law 4, and what is kept


def test_rows_with_masks_share_forwards_with_any_others_and_do_not_change_them(engine: Engine) -> None:
    asked = {
        "plain": ask("cat", steps=4),
        "masked": edit("cat"),
        "half": edit("dog", strength=0.5, scheduler="euler"),
        "ancestral": edit(scheduler="euler_a", box=(4, 4, 10, 10), count=2),
        "filled": edit("cat", strength=0.5, mask={"fill": "fill"}),
        "noise": edit("cat", strength=0.5, mask={"fill": "noise"}),
        "nothing": edit("cat", strength=0.5, mask={"fill": "nothing"}),
        "hires": ask("dog", hires=Hires(width=32, height=32, steps=4, strength=0.5)),
    }
    alone = {name: latents(engine, [request])[0] for name, request in asked.items()}
    before = engine.stats.rows, engine.stats.steps
    together = dict(zip(asked, latents(engine, list(asked.values())), strict=True))
    rows, steps = engine.stats.rows - before[0], engine.stats.steps - before[1]
    assert all(distance(together[name], alone[name]) < SAME for name in asked)
    assert rows > 6 * steps
    starts = [alone[name] for name in ("filled", "noise", "nothing")]
    assert all(distance(one, other) > VISIBLE for i, one in enumerate(starts) for other in starts[:i])


def composed(engine: Engine, request: GenerateRequest) -> Any:
    """The finished picture, [H, W, 3]."""
    asked = decode_edit(request)
    job = engine.submit(request, edit=asked)
    end = run(engine, [job])[job]
    assert isinstance(end, Tensor)
    return asked.compose(end[0]).numpy().astype(int)


@pytest.mark.parametrize(
    "how", [{}, {"feather_px": 3}, {"keep_size": True}, {"only_masked": True, "padding_px": 4}, {"inverted": True}]
)
def test_what_is_not_masked_is_the_picture_itself_to_the_bit(engine: Engine, how: dict[str, Any]) -> None:
    side = 40 if "keep_size" in how or "only_masked" in how else 16
    picture, mask = photo(side, side), white((3, 2, 9, 11), side, side)
    made = composed(engine, edit("cat", image=png(picture), mask={"data": png(mask), **how}))
    kept = np.asarray(mask) == (255 if "inverted" in how else 0)
    original = np.asarray(picture).astype(int)
    assert made.shape == original.shape and (made[kept] == original[kept]).all()
    assert np.abs(made - original)[~kept].mean() > 5


# -- training


def test_a_base_made_for_inpainting_is_served_but_not_trained(nine: Path, tmp_path: Path) -> None:
    assert outline(str(nine)).facts.inpaints and outline(str(nine)).facts.channels == 4
    tiny_images(tmp_path / "rusty")
    manifest = tmp_path / "pets.yaml"
    manifest.write_text(f"version: 1\nname: pets\nbase: {nine}\nsubjects: [{{id: rusty, class: dog, images: rusty}}]\n")
    with pytest.raises(UserError, match="made for inpainting.*cannot be trained"):
        read_manifest(manifest)

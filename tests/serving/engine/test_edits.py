"""Edits: what is masked is redrawn and nothing else, as diffusers' inpainting pipelines do, beside any other rows."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
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
from serving.engine.request import GenerateRequest, Mask
from tests.families import write_family
from tests.serving.company import Shelf, ask, random_adapter, ref, run, small
from tests.tiny_inpainting import inpainting
from training.base.base import Base, load_base

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
    mask = Mask(data=png(white(box)), means="white").model_copy(update=changes.pop("mask", {}))
    fields = {"steps": 4, "strength": 1.0, "image": png(photo()), "mask": mask, **changes}
    return ask(*worn, **fields)


def submitted(engine: Engine, request: GenerateRequest) -> Job:
    """The job of a request whose pictures are decoded here."""
    if request.mask is not None:
        return engine.submit(request, edit=decode_edit(request))
    multiple_px = engine.base.facts.multiple_px
    return engine.submit(request, references=[decode_reference(one, multiple_px) for one in request.references])


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


def diffusers_edit(pipeline: Any, scheduler: Any, request: GenerateRequest, **changes: Any) -> Tensor:
    """The latents of diffusers' own inpainting, from the same picture, mask and seed."""
    assert request.image is not None and request.mask is not None and request.mask.data is not None
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **changes.pop("config", {}))
    found = pipeline(
        request.prompt,
        image=Image.open(io.BytesIO(request.image)).convert("RGB"),
        mask_image=Image.open(io.BytesIO(request.mask.data)),
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        strength=request.strength,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        **changes,
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


def test_a_base_made_for_inpainting_edits_as_diffusers_does_and_draws_without_a_mask(nine: Path) -> None:
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(nine, safety_checker=None)
    engine = Engine(load_base(str(nine), device="cpu"), small(), Shelf({}))
    asked = [edit(strength=1.0), edit(strength=0.5, box=(4, 4, 12, 12), scheduler="ddim"), ask()]
    try:
        found = latents(engine, asked)
        alone = [latents(engine, [one])[0] for one in asked]
    finally:
        engine.close()
    for request, ours in zip(asked[:2], found, strict=False):
        assert distance(ours, diffusers_edit(pipeline, DDIMScheduler, request)) < CLOSE
    assert all(distance(one, other) < SAME for one, other in zip(found, alone, strict=True))
    assert distance(found[2], found[0]) > VISIBLE


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

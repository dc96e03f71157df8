"""Pictures in place of words beside rows of every other kind, against diffusers' own pipelines with IP-Adapters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.pictures.hints import Hints, small_size
from serving.engine.request import GenerateRequest, ImagePromptUse, NetworkRef
from serving.errors import NetworkUnavailable
from tests.families import write_family
from tests.ip_adapters import FILE, SIDE, write_ip_adapter
from tests.serving.company import Shelf, ask, finished, random_adapter, ref, run, small
from tests.serving.engine.test_control import apart, photo, png
from training.base.base import Base, load_base
from training.storage.networks import ROOTS, NetworkFolders
from training.storage.storage import LocalStorage

CLOSE = 1e-4
VISIBLE = 1e-2


def hints_of(request: GenerateRequest) -> Hints:
    """The pictures of a request as the loop hands them to the engine, but in the size of the tiny encoder."""
    shown = [np.asarray(photo(int(use.ref.version), SIDE)).copy() for use in request.image_prompts]
    return Hints((), tuple(torch.from_numpy(one).permute(2, 0, 1) for one in shown))


class World:
    """A base, an engine over it, and two IP-Adapters on its storage: a plain one and one with a resampler."""

    def __init__(self, folder: Path, base: Base, storage: Path, **changes: object) -> None:
        self.folder, self.base, self.storage = folder, base, storage
        for name in ("plain", "plus"):
            write_ip_adapter(base, storage, name, len(name), plus=name == "plus")
        folders = NetworkFolders(LocalStorage(str(storage)), storage / "none")
        shelf = Shelf({ref("a"): random_adapter(base, 1)})
        self.engine = Engine(base, small(**changes), shelf, open_network=folders.folder)

    def ask(self, *uses: tuple[str, float], worn: tuple[str, ...] = (), **changes: Any) -> GenerateRequest:
        """Its pictures are of seeds 0, 1, ..., which stand in their versions."""
        prompts = [
            ImagePromptUse(
                ref=NetworkRef(kind="ip-adapter", name=name, version=str(index)),
                image=png(photo(index, SIDE)),
                scale=scale,
            )
            for index, (name, scale) in enumerate(uses)
        ]
        return ask(*worn, steps=4, scheduler=self.base.facts.sampler, image_prompts=tuple(prompts), **changes)

    def drawn(self, *requests: GenerateRequest) -> list[Tensor]:
        submit = self.engine.submit
        self.engine.submit = lambda request: submit(request, hints=hints_of(request))  # type: ignore[assignment, misc]
        try:
            return finished(self.engine, list(requests))
        finally:
            self.engine.submit = submit  # type: ignore[method-assign]

    def expected(self, request: GenerateRequest) -> Tensor:
        """What diffusers' pipeline draws."""
        pipeline = DiffusionPipeline.from_pretrained(self.folder, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        uses = request.image_prompts
        names = [f"{ROOTS['ip-adapter']}/{use.ref.name}" for use in uses]
        pipeline.load_ip_adapter([str(self.storage)] * len(uses), subfolder=names, weight_name=[FILE] * len(uses))
        pipeline.set_ip_adapter_scale([use.scale for use in uses])
        made: Tensor = pipeline(
            request.prompt,
            ip_adapter_image=[photo(index, SIDE) for index in range(len(uses))],
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            height=request.height,
            width=request.width,
            output_type="latent",
        ).images
        return made


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def world(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    name = request.param
    folder = tiny_folder if name == "sd" else write_family(name, tmp_path_factory.mktemp("families"))
    made = World(folder, load_base(str(folder), device="cpu"), tmp_path_factory.mktemp("storage"))
    yield made
    made.engine.close()


def test_pictures_are_those_of_diffusers_beside_rows_of_every_other_kind(world: World) -> None:
    """A plain adapter, one with a resampler, both at once, none, and one beside a LoRA of the same attentions."""
    asked = [
        world.ask(("plain", 0.7)),
        world.ask(("plus", 1.0), seed=2, guidance_scale=1.0),
        world.ask(("plain", 0.5), ("plus", 0.4), seed=3),
        world.ask(),
        world.ask(("plus", 0.8), worn=("a",), seed=4),
    ]
    together = world.drawn(*asked)
    for found, request in zip(together[:3], asked, strict=False):
        assert apart(found, world.expected(request)) <= CLOSE * max(1.0, float(found.abs().max()))
    for found, request in zip(together, asked, strict=True):
        assert apart(found, world.drawn(request)[0]) <= 1e-5 * max(1.0, float(found.abs().max()))
    assert apart(together[0], together[3]) > VISIBLE
    assert apart(world.drawn(world.ask(("plain", 0.0)))[0], world.drawn(world.ask())[0]) == 0


def test_an_image_that_takes_two_forwards_is_the_same(world: World, tmp_path: Path) -> None:
    """Its row with the negative prompt sees no picture, the other one does."""
    narrow = World(world.folder, world.base, tmp_path, max_rows=1)
    try:
        asked = narrow.ask(("plus", 0.7))
        assert apart(narrow.drawn(asked)[0], world.drawn(asked)[0]) <= 1e-5 * 20
    finally:
        narrow.engine.close()


def test_an_adapter_for_another_base_fails_its_requests_alone(world: World, tmp_path: Path) -> None:
    other = load_base(str(write_family("sd-v" if "xl" in world.base.facts.family else "sdxl", tmp_path)), device="cpu")
    write_ip_adapter(other, world.storage, "foreign", 1)
    asked = world.ask(("foreign", 1.0))
    jobs = [world.engine.submit(one, hints=hints_of(one)) for one in (asked, world.ask())]
    ends = run(world.engine, jobs)
    assert isinstance(ends[jobs[0]], NetworkUnavailable) and "another base" in str(ends[jobs[0]])
    assert isinstance(ends[jobs[1]], Tensor)


def test_a_picture_in_place_of_words_keeps_its_shape() -> None:
    """Upright, and the shorter side as long as the encoder takes."""
    assert small_size(png(photo(0, 64))) == (224, 224)
    wide = Image.fromarray(np.zeros((50, 100, 3), np.uint8))
    assert small_size(png(wide)) == (448, 224)
    assert small_size(b"no picture") == (224, 224)

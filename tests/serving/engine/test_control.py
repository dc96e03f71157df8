"""ControlNets beside rows of every other kind, against diffusers' own pipelines, and on their way to the device."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.pictures.canny import canny
from serving.engine.pictures.hints import Hints
from serving.engine.request import ControlUse, GenerateRequest, NetworkRef
from serving.errors import NetworkUnavailable, Refused
from tests.controls import control_for, control_pipeline, write_control, write_deep_flux
from tests.families import write_family
from tests.serving.company import Shelf, ask, finished, random_adapter, ref, run, small
from training.base.base import Base, load_base
from training.storage.networks import NetworkFolders, NetworkKind
from training.storage.storage import LocalStorage

CLOSE = 1e-4
VISIBLE = 1e-2


def photo(seed: int, side: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def hints_of(request: GenerateRequest) -> Hints:
    """The pictures of a request's ControlNets as the loop hands them to the engine."""
    opened = [np.asarray(Image.open(io.BytesIO(use.image))).copy() for use in request.controls]
    return Hints(tuple(torch.from_numpy(one).permute(2, 0, 1) for one in opened))


class World:
    """A base, an engine over it, and two ControlNets on its storage."""

    def __init__(self, name: str, folder: Path, base: Base, storage: Path, **changes: object) -> None:
        self.name, self.folder, self.base, self.storage = name, folder, base, storage
        self.side = 4 * base.facts.multiple_px
        self.networks = [control_for(base, seed) for seed in (0, 1)]
        for index, network in enumerate(self.networks):
            write_control(network, storage, f"c{index}")
        self.folders = NetworkFolders(LocalStorage(str(storage)), storage / "none")
        self.opened: list[str] = []
        shelf = Shelf({ref("a"): random_adapter(base, 1)})
        self.engine = Engine(base, small(**changes), shelf, open_network=self.open)

    def open(self, kind: NetworkKind, name: str) -> Any:
        self.opened.append(name)
        return self.folders.folder(kind, name)

    def use(self, index: int, **changes: Any) -> ControlUse:
        found = self.folders.look("control", f"c{index}")
        assert found is not None
        place = NetworkRef(kind="control", name=found.name, version=found.version)
        return ControlUse(ref=place, image=png(photo(index, self.side)), **changes)

    def ask(self, *uses: ControlUse, worn: tuple[str, ...] = (), **changes: Any) -> GenerateRequest:
        changes = {"width": self.side, "height": self.side, **changes}
        return ask(*worn, steps=4, scheduler=self.base.facts.sampler, controls=uses, **changes)

    def drawn(self, *requests: GenerateRequest) -> list[Tensor]:
        """The latents of requests that are served together."""
        submit = self.engine.submit
        self.engine.submit = lambda request: submit(request, hints=hints_of(request))  # type: ignore[assignment, misc]
        try:
            return finished(self.engine, list(requests))
        finally:
            self.engine.submit = submit  # type: ignore[method-assign]

    def expected(self, request: GenerateRequest, *indices: int) -> Tensor:
        """What diffusers' pipeline draws."""
        pipeline = control_pipeline(self.name, self.folder, [self.networks[index] for index in indices])
        flows = self.name.startswith("flux")
        told: dict[str, list[Any]] = {
            "control_image" if flows else "image": [photo(index, self.side) for index in indices],
            "controlnet_conditioning_scale": [use.scale for use in request.controls],
            "control_guidance_start": [use.start for use in request.controls],
            "control_guidance_end": [use.end for use in request.controls],
        }
        settings: dict[str, Any] = {key: value if len(indices) > 1 else value[0] for key, value in told.items()}
        settings |= {"num_inference_steps": request.steps, "guidance_scale": request.guidance_scale}
        settings |= {"height": self.side, "width": self.side, "output_type": "latent"}
        generator = torch.Generator().manual_seed(request.seed)
        if not flows:
            return pipeline(request.prompt, **settings, generator=generator).images
        encode = pipeline.vae.encode  # it draws from what the VAE makes of the control picture; ours takes the mean
        pipeline.vae.encode = lambda pixels: SimpleNamespace(latents=encode(pixels).latent_dist.mean)
        noise = torch.randn(
            1, self.base.facts.channels, *self.base.latent_size(self.side, self.side), generator=generator
        )
        packed = FluxPipeline._pack_latents(noise, *noise.shape)
        made = pipeline(request.prompt, **settings, latents=packed).images
        return FluxPipeline._unpack_latents(made, self.side, self.side, pipeline.vae_scale_factor)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux", "flux-pixels"])
def world(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    name = request.param
    place = tmp_path_factory.mktemp("families")
    folder = tiny_folder if name == "sd" else write_deep_flux(place) if "-" in name else write_family(name, place)
    made = World(name, folder, load_base(str(folder), device="cpu"), tmp_path_factory.mktemp("storage"))
    yield made
    made.engine.close()


def test_pictures_are_those_of_diffusers_beside_rows_of_every_other_kind(world: World) -> None:
    """One network, two of them over a part of the steps each, none, with an adapter; and one over no step at all."""
    one = world.ask(world.use(0, scale=0.8))
    part = world.ask(world.use(0, scale=1.2, end=0.5), world.use(1, scale=0.7, start=0.25), seed=2)
    other = world.ask(world.use(1), seed=3, guidance_scale=1.0)
    plain, worn = world.ask(seed=1), world.ask(world.use(0), worn=("a",), seed=4)
    asked = [one, part, other, plain, worn]
    together = world.drawn(*asked)
    for found, request, indices in zip(together, asked, ([0], [0, 1], [1]), strict=False):
        assert apart(found, world.expected(request, *indices)) <= CLOSE * max(1.0, float(found.abs().max()))
    for found, request in zip(together, asked, strict=True):
        assert apart(found, world.drawn(request)[0]) <= 1e-5 * max(1.0, float(found.abs().max()))
    assert apart(together[0], together[3]) > VISIBLE
    assert apart(world.drawn(world.ask(world.use(0, start=0.9, end=0.95)))[0], world.drawn(plain)[0]) == 0


# -- on the way to the device


@pytest.fixture
def sd(tiny_folder: Path, tiny: Base, tmp_path: Path) -> Iterator[World]:
    made = World("sd", tiny_folder, tiny, tmp_path, networks=1)
    yield made
    made.engine.close()


def ends_of(world: World, *requests: GenerateRequest) -> list[object]:
    jobs = [world.engine.submit(request, hints=hints_of(request)) for request in requests]
    ends = run(world.engine, jobs)
    return [ends[job] for job in jobs]


def test_networks_take_turns_where_there_is_room_for_one(sd: World) -> None:
    first, second = (sd.ask(sd.use(index)) for index in (0, 1))
    ends = ends_of(sd, first, second, first)
    assert all(isinstance(end, Tensor) for end in ends)
    assert torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[1])  # type: ignore[arg-type]
    assert len(sd.engine.networks.networks) == 1 and sd.opened.count("c1") == 1
    before = len(sd.opened)
    (held,) = sd.engine.networks.networks
    ends_of(sd, sd.ask(sd.use(int(held.name[1]))))
    assert len(sd.opened) == before  # it was there
    with pytest.raises(Refused, match="up to 1 ControlNets and IP-Adapters"):
        sd.engine.submit(sd.ask(sd.use(0), sd.use(1)))


def test_a_network_that_cannot_be_loaded_fails_its_requests_alone(sd: World) -> None:
    use, plain = sd.use(0), sd.ask()
    weights = sd.storage / "controls" / "c0" / "diffusion_pytorch_model.safetensors"
    held = load_file(weights)
    save_file({name: part for name, part in held.items() if "mid" not in name}, weights)
    failed, done = ends_of(sd, sd.ask(use), plain)
    assert isinstance(failed, NetworkUnavailable) and "lack" in str(failed) and isinstance(done, Tensor)
    weights.unlink()
    (failed,) = ends_of(sd, sd.ask(use))
    assert isinstance(failed, NetworkUnavailable) and "no weights" in str(failed)
    save_file(held, weights)
    assert isinstance(ends_of(sd, sd.ask(use))[0], Tensor)


def test_a_request_that_is_cancelled_lets_its_network_go(sd: World) -> None:
    job = sd.engine.submit(sd.ask(sd.use(0)), hints=hints_of(sd.ask(sd.use(0))))
    while job.steering is None:
        sd.engine.step()
    sd.engine.cancel(job)
    sd.engine.check_integrity()
    assert sd.engine.networks.slots.pinned == 0


# -- the edges


def test_edges_are_thin_lines_where_colours_change() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[8:24, 8:24, 1] = 200  # one colour alone
    edges = canny(picture)
    assert set(np.unique(edges)) == {0, 255} and (edges[..., 0] == edges[..., 2]).all()
    (columns,) = np.nonzero(edges[16, :, 0])
    assert len(columns) == 2 and abs(columns[0] - 7.5) <= 1 and abs(columns[1] - 23.5) <= 1
    assert not edges[12:20, 12:20].any()


def test_weak_edges_stay_only_where_a_strong_one_leads_to_them() -> None:
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[:20] = (np.linspace(35, 200, 64)[None, :, None]).astype(np.uint8)  # from weak to strong along one line
    led = canny(picture)
    assert led[18:22, 8].any()
    assert not canny(np.minimum(picture, 40))[18:22].any()

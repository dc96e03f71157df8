"""Larger pictures: a second pass that enlarges and redraws, and the VAE in tiles."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.request import Hires
from tests.serving.company import Shelf, ask, random_adapter, ref, run, small
from tests.serving.engine.test_edits import SAME, VISIBLE, composed, distance, edit, latents, photo, png, white
from training.base.base import Base


@pytest.fixture(scope="module")
def engine(tiny: Base) -> Iterator[Engine]:
    engine = Engine(tiny, small(), Shelf({ref("cat"): random_adapter(tiny, 0)}))
    yield engine
    engine.close()


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_a_second_pass_is_image_to_image_of_what_is_enlarged(
    engine: Engine, upscaler: Literal["latent", "lanczos"]
) -> None:
    request = ask(
        "cat", steps=4, previews=3, hires=Hires(width=32, height=24, steps=4, strength=0.5, upscaler=upscaler)
    )
    job = engine.submit(request)
    sample, seen, sizes = job.samples[0], [], []

    def look(step: int) -> None:
        if sample.latents is not None:
            seen.append(sample.at)
            sizes.append(sample.size)

    end = run(engine, [job], look)[job]
    assert isinstance(end, Tensor) and end.shape == (1, 24, 32, 3)
    assert job.steps == 6 and sample.taken == 6 and sample.previews == 3
    first = next(at for at, size in zip(seen[::-1], sizes[::-1], strict=True) if size == (8, 8))
    assert first.shape == (4, 8, 8) and sample.at.shape == (4, 12, 16)
    assert distance(sample.at, latents(engine, [request.model_copy(update={"seed": 2})])[0][0]) > VISIBLE
    plain = ask("cat", steps=4, width=32, height=24)
    assert distance(sample.at, latents(engine, [plain])[0][0]) > VISIBLE


def test_large_pictures_pass_the_vae_in_tiles_as_diffusers_does(tiny: Base) -> None:
    vae: Any = tiny.parts.models["vae"]
    seen: list[int] = []
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, cell=cell: seen.append(max(inputs[0].shape[2:]) * cell)
        )
        for module, cell in ((vae.encoder, 1), (vae.decoder, 2))
    ]
    engine = Engine(tiny, small(vae_tile_px=32), Shelf({}))
    request = edit(
        image=png(photo(80, 48)), width=80, height=48, strength=0.5,
        mask={"data": png(white((0, 0, 40, 48), 80, 48))},
    )  # fmt: skip
    try:
        made = composed(engine, request)
    finally:
        engine.close()
        for hook in hooks:
            hook.remove()
    assert made.shape == (48, 80, 3) and len(seen) > 8 and max(seen) == 32
    assert not vae.use_tiling
    large = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(1))
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size, held = (
        32,
        16,
        (vae.tile_sample_min_size, vae.tile_latent_min_size),
    )
    expected = vae.decode(large / vae.config.scaling_factor).sample.clamp(-1, 1)
    vae.disable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = held
    assert distance(engine.finisher._vae.to_pixels(large), expected) < SAME
    assert distance(tiny.to_pixels(large), expected) > SAME

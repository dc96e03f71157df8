"""What an adapter's weight does, as a picture: one row a prompt, one column a weight, everything else equal."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from training.adapters.adapter import Adapter
from training.base.base import Base
from training.sampling.render import adapter_bank
from training.sampling.sampler import sample, to_uint8

LABEL = 18
LEAST_TILE = 128  # a small base's images are shown larger


def draw_sweep(
    base: Base,
    adapter: Adapter,
    prompts: Sequence[str],
    weights: Sequence[float],
    *,
    seed: int = 42,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
) -> Image.Image:
    """The grid. All its images are rows of one batch; each wears the same adapter at its own weight."""
    bank = adapter_bank(base, [adapter])
    bank.inject()
    count = len(prompts) * len(weights)
    try:
        latents = sample(
            base,
            [prompt for prompt in prompts for _ in weights],
            seeds=[seed] * count,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            bank=bank,
            slots=[0] * count,
            scales=list(weights) * len(prompts),
        )
    finally:
        bank.eject()
    images = [Image.fromarray(pixels.numpy()) for pixels in to_uint8(base.to_pixels(latents))]
    return _grid(images, prompts, [f"{weight:g}" for weight in weights])


def _grid(images: Sequence[Image.Image], prompts: Sequence[str], titles: Sequence[str]) -> Image.Image:
    tile = max(LEAST_TILE, images[0].width)
    columns, height = len(titles), tile + LABEL
    grid = Image.new("RGB", (columns * tile, LABEL + len(prompts) * height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for column, title in enumerate(titles):
        draw.text((column * tile + 4, 2), title, fill="black", font=font)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image.resize((tile, tile), Image.Resampling.BICUBIC), (column * tile, LABEL + row * height))
    for row, prompt in enumerate(prompts):
        draw.text((4, LABEL + row * height + tile + 2), prompt, fill="black", font=font)
    return grid

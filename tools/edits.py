"""Draws `docs/edits.png`: edits and a second pass on the embedded base, by the engine, each from the picture before it.

python -m tools.edits [--seed 5] [--out docs/edits.png]
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from serving.config import EngineSpec
from serving.engine.engine import Engine
from serving.engine.job import Done, JobFailed
from serving.engine.pictures.edit import decode_edit
from serving.engine.request import EditMask, GenerateRequest, Hires
from training.base.base import load_base
from training.base.facts import SamplerName

SHOWN, GAP, LINE = 192, 12, 18
UNLIKE = 24  # of 255
STEPS, GUIDANCE = 20, 4.0
SAMPLER: SamplerName = "ddim"


def png(image: Image.Image) -> bytes:
    """The file of a picture."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def draw(engine: Engine, prompt: str, seed: int, **changes: object) -> Image.Image:
    """The finished picture of one request."""
    side = engine.base.facts.resolution
    fields = {"prompt": prompt, "seed": seed, "steps": STEPS, "guidance_scale": GUIDANCE, "scheduler": SAMPLER}
    request = GenerateRequest.model_validate({"width": side, "height": side, **fields, **changes})
    edit = decode_edit(request) if request.mask else None
    engine.submit(request, edit=edit)
    while True:
        for outcome in engine.step():
            if isinstance(outcome, JobFailed):
                raise outcome.error
            if isinstance(outcome, Done):
                made = outcome.pixels if edit is None else edit.compose(outcome.pixels)
                return Image.fromarray(made.contiguous().numpy())


def thing(picture: Image.Image, grow_px: int) -> Image.Image:
    """A mask of what stands before the place: white where it is unlike its row's left end."""
    pixels = np.asarray(picture).astype(int)
    unlike = np.abs(pixels - pixels[:, :4].mean(axis=1, keepdims=True)).max(axis=2) > UNLIKE
    mask = Image.fromarray((unlike * 255).astype(np.uint8)).filter(ImageFilter.MedianFilter(5))
    return mask.filter(ImageFilter.MaxFilter(2 * grow_px + 1)) if grow_px else mask


def rounded(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A mask: an ellipse in `box` is white."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def shaded(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, with what is masked in a colour that no picture has."""
    return Image.composite(Image.blend(picture, Image.new("RGB", picture.size, (255, 0, 200)), 0.6), picture, mask)


def figure(seed: int) -> Image.Image:
    """A row of pictures with what was asked for below each."""
    engine = Engine(load_base("pocket", device="cpu"), EngineSpec(device="cpu"), lambda ref: None)  # type: ignore[arg-type, return-value]
    first = draw(engine, "a photo of a dog on the beach", seed)
    around, itself = thing(first, 6), thing(first, 1)
    other = EditMask(data=png(around), means="white", feather_px=2)
    cat = draw(engine, "a photo of a cat on the beach", seed, image=png(first), mask=other, strength=1.0)
    place = EditMask(data=png(itself), means="white", feather_px=1, inverted=True)
    snow = draw(engine, "a photo of a dog in the snow", seed, image=png(first), mask=place, strength=1.0)
    wide = first.resize((192, 192), Image.Resampling.LANCZOS)
    spot = rounded(wide.size, (2, 122, 84, 190))
    part = EditMask(data=png(spot), means="white", only_masked=True, padding_px=24, feather_px=4)
    ball = draw(engine, "a photo of a red car on the beach", seed + 1, image=png(wide), mask=part, strength=1.0)
    hires = Hires(width=128, height=128, steps=STEPS, strength=0.15)
    larger = draw(engine, "a photo of a dog on the beach", seed, hires=hires)
    engine.close()
    return sheet(
        [
            (first, "a dog on the beach, 64 px"),
            (shaded(first, around), "a mask"),
            (cat, "masked: a cat on the beach"),
            (snow, "all but the dog: in the snow"),
            (shaded(wide, spot), "192 px, another mask"),
            (ball, "only masked: a red car"),
            (larger, "hires: the first, at 128 px"),
        ]
    )


def sheet(cells: list[tuple[Image.Image, str]]) -> Image.Image:
    """The pictures side by side, each with its text below."""
    page = Image.new("RGB", ((SHOWN + GAP) * len(cells) + GAP, SHOWN + 2 * GAP + LINE), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for place, (picture, text) in enumerate(cells):
        left = GAP + place * (SHOWN + GAP)
        page.paste(picture.resize((SHOWN, SHOWN), Image.Resampling.NEAREST), (left, GAP))
        pen.text((left, SHOWN + GAP + 4), text, fill="black", font=font)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/edits.png"))
    asked = parser.parse_args()
    figure(asked.seed).save(asked.out, optimize=True)


if __name__ == "__main__":
    main()

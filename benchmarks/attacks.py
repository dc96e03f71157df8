"""What happens to pictures on their way through the world: compressed, scaled, cut, blurred, shown on a screen."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

BICUBIC = Image.Resampling.BICUBIC
Attack = Callable[[Image.Image, np.random.Generator], Image.Image]


def jpeg(quality: int) -> Attack:
    """Saved as a JPEG and opened again."""

    def attack(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return Image.open(out).convert("RGB")

    return attack


def resized(factor: float, *, back: bool) -> Attack:
    """Scaled by a factor, and back to its size again."""

    def attack(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        scaled = image.resize(size, BICUBIC)
        return scaled.resize(image.size, BICUBIC) if back else scaled

    return attack


def cropped(share: float, *, back: bool) -> Attack:
    """A share of each side cut off, at a random place; what is left scaled back to the whole size, or not."""

    def attack(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        size = (round(image.width * (1 - share)), round(image.height * (1 - share)))
        left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, size, strict=True))
        part = image.crop((left, top, left + size[0], top + size[1]))
        return part.resize(image.size, BICUBIC) if back else part

    return attack


def blurred(radius_px: float) -> Attack:
    """Gaussian blur."""
    return lambda image, rng: image.filter(ImageFilter.GaussianBlur(radius_px))


def noisy(deviation: float) -> Attack:
    """Gaussian noise of so many of 255 levels."""

    def attack(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values + rng.normal(0, deviation, values.shape)).clip(0, 255).astype(np.uint8))

    return attack


def recoloured(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each changed by 15 %."""
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(1.15)
    return image


def screenshot(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shown at 1.37 times its size, captured, scaled back, saved as a JPEG of quality 85."""
    size = (round(image.width * 1.37), round(image.height * 1.37))
    shown = image.resize(size, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.LANCZOS)
    return jpeg(85)(shown, rng)


def unchanged(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Nothing happens."""
    return image


ATTACKS: dict[str, Attack] = {
    "none": unchanged,
    "JPEG 90": jpeg(90),
    "JPEG 70": jpeg(70),
    "JPEG 50": jpeg(50),
    "half size and back": resized(0.5, back=True),
    "half size": resized(0.5, back=False),
    "crop 10 %": cropped(0.1, back=False),
    "crop 10 %, scaled back": cropped(0.1, back=True),
    "crop 25 %": cropped(0.25, back=False),
    "blur, radius 1 px": blurred(1.0),
    "noise, 8 of 255": noisy(8),
    "colours +15 %": recoloured,
    "screenshot": screenshot,
}

"""An image at the size the base trains at: every crop, mirror and colour variant, encoded once before the loop.

Pure functions of their arguments: the same image, settings and seed give the same bytes in every process, so caches can
be keyed by them. Knows nothing about latents, files or subjects.

Shapes: an array `_HW3` is height x width x RGB, uint8. Sizes are (width, height) in px.
"""

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Crop = Literal["center", "random", "face", "bucket"]
SizePx = tuple[int, int]
Pixels = NDArray[np.uint8]

# The jitter of the usual script, torchvision's ColorJitter(0.2, 0.1), drawn ahead of the loop.
BRIGHTNESS = 0.2
CONTRAST = 0.1
JITTERS = 3


class Face(NamedTuple):
    """Where a face is: its box in px of the image."""

    left: int
    top: int
    right: int
    bottom: int


class _Rectangle(Protocol):
    def left(self) -> int: ...
    def top(self) -> int: ...
    def right(self) -> int: ...
    def bottom(self) -> int: ...


class _Detector(Protocol):
    def __call__(self, image: Pixels, upsample: int) -> Sequence[_Rectangle]: ...


class Framed(NamedTuple):
    """A variant of an image. `crop_px`: (down, across) where it begins in the image, resized and mirrored as it is.

    `mask_HW`: the same part of the image's mask, uint8, if it has one.
    """

    pixels_HW3: Pixels
    crop_px: tuple[int, int]
    mask_HW: Pixels | None = None


def variants(
    image: Image.Image,
    resolution: int,
    *,
    crop: Crop = "center",
    crops: int = 4,
    flip: bool = False,
    color_jitter: bool = False,
    seed: int = 0,
) -> list[Pixels]:
    """Every variant of an image, each `[height, width, 3]` uint8, always in the same order.

    The image is resized to cover a square with sides of `resolution` px, for `bucket` the aspect bucket that crops
    least of it, then cropped: `random` `crops` times at places keyed by `seed` and the pixels, else once; `face` is
    `center` where none can be found. `color_jitter` follows each crop with `JITTERS` changed ones. `flip` appends the
    mirror of each, in order: `result[i + len(result) // 2]` mirrors `result[i]`. How many there are depends on the
    settings alone, so every image of a subject weighs the same.
    """
    return [
        one.pixels_HW3
        for one in framed(image, resolution, crop=crop, crops=crops, flip=flip, color_jitter=color_jitter, seed=seed)
    ]


def framed(
    image: Image.Image,
    resolution: int,
    *,
    crop: Crop = "center",
    crops: int = 4,
    flip: bool = False,
    color_jitter: bool = False,
    seed: int = 0,
    mask: Image.Image | None = None,
) -> list[Framed]:
    """The `variants` of an image, each with the place of its crop and that part of the image's `mask` (L)."""
    size = (resolution, resolution)
    if crop == "bucket":
        size = assign_bucket(*image.size, bucket_sizes(resolution))
    rgb = image.convert("RGB")
    covering = cover(rgb, size)
    identity = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
    covered = None if mask is None else cover(mask.convert("L"), size)
    made: list[Framed] = []
    for place, (left, top) in enumerate(_places(covering, size, crop, crops, f"{seed}/{identity}")):
        box = (left, top, left + size[0], top + size[1])
        cropped_HW3 = np.asarray(covering.crop(box))
        mask_HW = None if covered is None else np.asarray(covered.crop(box))
        alike = [cropped_HW3, *(_jittered(cropped_HW3, f"{seed}/{identity}/{place}") if color_jitter else ())]
        made += [Framed(pixels_HW3, (top, left), mask_HW) for pixels_HW3 in alike]
    if flip:
        free = covering.width - size[0]
        made += [_mirrored(one, (one.crop_px[0], free - one.crop_px[1])) for one in made]
    return made


def _mirrored(one: Framed, crop_px: tuple[int, int]) -> Framed:
    mask_HW = None if one.mask_HW is None else np.ascontiguousarray(one.mask_HW[:, ::-1])
    return Framed(np.ascontiguousarray(one.pixels_HW3[:, ::-1]), crop_px, mask_HW)


def cover(image: Image.Image, size: SizePx) -> Image.Image:
    """The image, its proportions kept, at the smallest size that covers `size` (width, height)."""
    scale = max(size[0] / image.width, size[1] / image.height)
    target = (max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale)))
    return image if target == image.size else image.resize(target, Image.Resampling.LANCZOS)


def bucket_sizes(resolution: int, multiple: int | None = None, max_aspect: float = 2.5) -> tuple[SizePx, ...]:
    """The (width, height) of every aspect bucket, the square among them, widest first.

    Sides are multiples of `multiple` (an eighth of `resolution` unless given: 64 at 512), no bucket has more pixels
    than the square or is longer than `max_aspect` to one.
    """
    step = multiple or max(1, resolution // 8)
    if resolution < step or resolution % step:
        raise ValueError(f"resolution {resolution} is not a multiple of {step}")
    sizes = {(resolution, resolution)}
    for long in range(resolution, int(resolution * max_aspect) + 1, step):
        short = resolution * resolution // long // step * step
        if short > 0 and long / short <= max_aspect:
            sizes |= {(long, short), (short, long)}
    return tuple(sorted(sizes, key=lambda size: (-size[0] / size[1], -size[0] * size[1])))


def assign_bucket(width: int, height: int, sizes: Sequence[SizePx]) -> SizePx:
    """The bucket that crops least of a `width` x `height` image; of equals, the one with more pixels."""
    if not sizes:
        raise ValueError("no buckets")
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: (round(abs(aspect - math.log(size[0] / size[1])), 9), -size[0] * size[1]))


def replace_background(image: Image.Image, mask: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """`image` with `colour` where `mask` (L, 255 = keep) is not opaque.

    `image` must lie on white, as `decode_image` returns it: the white in half-covered edge pixels is taken out exactly,
    so hair and fur get no pale rim.
    """
    if mask.size != image.size:
        raise ValueError(f"mask of {mask.size} px for an image of {image.size} px")
    clear_HW1 = 1 - np.asarray(mask.convert("L"), np.float32)[..., None] / 255
    image_HW3 = np.asarray(image.convert("RGB"), np.float32)
    # image = alpha * colour + (1 - alpha) * white, so the swap needs no division by alpha
    replaced_HW3 = image_HW3 + clear_HW1 * (np.asarray(colour, np.float32) - 255)
    return Image.fromarray(_to_bytes(replaced_HW3))


def on_backgrounds(image: Image.Image, mask: Image.Image, count: int, seed: int) -> list[Image.Image]:
    """`count` times the image, each before a plain colour keyed by `seed` and the pixels; see `replace_background`."""
    drawn = _uniforms(f"{seed}/{hashlib.sha256(image.tobytes()).hexdigest()}/background")
    colours = [(int(256 * next(drawn)), int(256 * next(drawn)), int(256 * next(drawn))) for _ in range(count)]
    return [replace_background(image, mask, colour) for colour in colours]


def can_find_faces() -> bool:
    """Whether the optional face detector (the `dlib` package) is installed."""
    return importlib.util.find_spec("dlib") is not None


def find_face(image: Image.Image) -> Face | None:
    """The largest face, None if there is none or no detector is installed."""
    if not can_find_faces():
        return None
    found = _face_detector()(np.asarray(image.convert("RGB")), 0)
    faces = [Face(box.left(), box.top(), box.right(), box.bottom()) for box in found]
    return max(faces, key=lambda face: (face.right - face.left) * (face.bottom - face.top), default=None)


@cache
def _face_detector() -> _Detector:
    # dlib is optional and slow to load; its frontal detector ships inside the package.
    detector: _Detector = importlib.import_module("dlib").get_frontal_face_detector()
    return detector


def _places(image: Image.Image, size: SizePx, crop: Crop, crops: int, key: str) -> list[tuple[int, int]]:
    """The (left, top) of each crop of `size`; repeats where there are few places, as in a square image."""
    free_x, free_y = image.width - size[0], image.height - size[1]
    if crop == "random":
        drawn = _uniforms(key)
        return [(int(next(drawn) * (free_x + 1)), int(next(drawn) * (free_y + 1))) for _ in range(crops)]
    face = find_face(image) if crop == "face" else None
    if face is None:
        return [(free_x // 2, free_y // 2)]
    left = (face.left + face.right - size[0]) // 2
    top = (face.top + face.bottom - size[1]) // 2
    return [(min(max(left, 0), free_x), min(max(top, 0), free_y))]


def _jittered(image_HW3: Pixels, key: str) -> list[Pixels]:
    """`JITTERS` copies with other brightness (a factor) and contrast (a blend with the mean grey)."""
    drawn = _uniforms(key + "/jitter")
    made = []
    for _ in range(JITTERS):
        brightness = 1 + BRIGHTNESS * (2 * next(drawn) - 1)
        contrast = 1 + CONTRAST * (2 * next(drawn) - 1)
        bright_HW3 = _to_bytes(image_HW3 * brightness)
        # whole numbers are summed: exact, so the same on every machine
        red, green, blue = bright_HW3.sum(axis=(0, 1), dtype=np.int64).tolist()
        grey = (0.299 * red + 0.587 * green + 0.114 * blue) / (bright_HW3.shape[0] * bright_HW3.shape[1])
        made.append(_to_bytes(bright_HW3 * contrast + grey * (1 - contrast)))
    return made


def _uniforms(key: str) -> Iterator[float]:
    """Numbers in [0, 1) from a hash: unlike numpy's generators, promised to stay the same for ever."""
    index = 0
    while True:
        digest = hashlib.sha256(f"{key}#{index}".encode()).digest()
        yield int.from_bytes(digest[:6]) / 2**48
        index += 1


def _to_bytes(values_HW3: NDArray[np.float32] | NDArray[np.float64]) -> Pixels:
    return np.clip(np.rint(values_HW3), 0, 255).astype(np.uint8)

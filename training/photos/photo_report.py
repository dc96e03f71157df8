"""The report before training: what about a subject's photos will make a poor adapter, which photos, and what to do.

Every check is relative to the resolution trained at, so 64 px drawings and 12 megapixel photos are judged alike. The
thresholds stand between sets of good real photos, which must not alarm, and the same photos with a fault planted.
Knows nothing about files, captions or HTML.

Shapes: `_HW` height x width; luminance and colours are float32 in 0..1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.errors import UserError
from training.photos.variants import Crop, can_find_faces, find_face
from training.photos.warning import PhotoWarning, listed, shown

Floats = NDArray[np.float32]

RECOMMENDED_PHOTOS = 5
# A photo is enlarged to the resolution; up to 1.25 times nobody sees it.
MIN_ENLARGED_SHARE = 0.8
# `sharpness` at 512 px; photos reduced further have more detail per pixel. Good photos have ten times as much at 64
# and at 512 px; a Gaussian blur of 3 px leaves less.
MIN_SHARPNESS_512 = 7e-4
SHARPNESS_EXPONENT = 0.7
# Luminance that 95 % of the pixels lie below: 0.22 or more in good photos.
DARK_BELOW = 0.2
# Share of the middle half's pixels that are white: 0.6 or less in good photos, also of white things on white.
WHITE_ABOVE = 0.96
MAX_WHITE_SHARE = 0.7
# Two good photos of one subject differ in 20 of 64 hash bits or more and correlate by 0.82 at most; recompressed,
# resized, slightly cropped or turned copies differ in 10 or fewer and correlate by 0.94 or more.
MAX_DUPLICATE_BITS = 10
MIN_DUPLICATE_CORRELATION = 0.93
# Mean difference of the borders' colours: the middle pair of a good set has 0.12 or more, of photos taken in one place,
# with the camera moved and other light, 0.06.
MAX_ALIKE_BORDER = 0.09
ALIKE_SHARE = 0.75

HASH_PX = 32
BACKGROUND_PX = 8


class Seen(NamedTuple):
    """A photo as the report needs it: `side_px` is the shorter side of the file's image, `image` may be reduced."""

    name: str
    image: Image.Image
    side_px: int
    sha256: str
    transparent: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file that cannot be used, and why in a few words."""

    name: str
    reason: str


class TooFewPhotos(UserError):
    """Fewer usable photos than needed; the message lists every rejected file with its reason."""

    def __init__(self, good: int, needed: int, rejected: tuple[Rejected, ...]) -> None:
        reasons = "".join(f"\n  {shown(file.name)}: {file.reason}" for file in rejected)
        found = f"Too few photos: {good} usable, at least {needed} needed."
        refused = f" {len(rejected)} cannot be used:{reasons}\nReplace these" if rejected else " Add more photos"
        super().__init__(f"{found}{refused}, or lower `min_images`.")
        self.good = good
        self.needed = needed
        self.rejected = rejected

    def __reduce__(self) -> tuple[type["TooFewPhotos"], tuple[int, int, tuple[Rejected, ...]]]:
        return TooFewPhotos, (self.good, self.needed, self.rejected)


class _Print(NamedTuple):
    """What two photos are compared by."""

    hash_64: NDArray[np.bool_]
    shape_256: Floats
    border_P3: Floats


def report(
    photos: Sequence[Seen], resolution: int, crop: Crop = "center", backgrounds: int = 0
) -> tuple[PhotoWarning, ...]:
    """All warnings about the photos, the set's before the single photos'; empty for a good set.

    `crop` and `backgrounds` are the subject's: what they cannot do for these photos is a warning, too.
    """
    if not photos:
        return ()
    prints = {photo.name: _print(photo.image) for photo in photos}
    identical = _groups([photo.name for photo in photos], _same_file(photos))
    firsts = _firsts([photo.name for photo in photos], identical)
    duplicates = _groups(firsts, lambda a, b: _near_duplicates(prints[a], prints[b]))
    distinct = _firsts(firsts, duplicates)
    found = [
        *_few(distinct, len(photos)),
        *(_identical(group) for group in identical),
        *(_near_duplicate(group) for group in duplicates),
        *_background({name: prints[name].border_P3 for name in distinct}),
        *_small(photos, resolution),
        *_exposure(photos),
        *_blurry(photos, resolution),
        *_faces(photos, crop),
        *_masks(photos, backgrounds),
    ]
    return tuple(found)


def sharpness(image: Image.Image, resolution: int) -> float:
    """Variance of the Laplacian at the resolution trained at, with full contrast, of the second sharpest of 4x4 tiles.

    Tiles, because a sharp subject before a soft background is sharp. An image below the resolution is not enlarged.
    """
    side = min(resolution, *image.size)
    grey_HW = _luminance(image, _scaled(image, side))
    low, high = np.percentile(grey_HW, (1, 99))
    # the floor keeps an even picture's noise from counting as detail
    grey_HW = (grey_HW - low) / max(float(high - low), 0.1)
    edges_HW = grey_HW[:-2, 1:-1] + grey_HW[2:, 1:-1] + grey_HW[1:-1, :-2] + grey_HW[1:-1, 2:] - 4 * grey_HW[1:-1, 1:-1]
    tiles = [tile for row in np.array_split(edges_HW, 4) for tile in np.array_split(row, 4, axis=1)]
    return sorted(float(tile.var()) if tile.size else 0.0 for tile in tiles)[-2]


def _few(distinct: Sequence[str], total: int) -> list[PhotoWarning]:
    if len(distinct) >= RECOMMENDED_PHOTOS:
        return []
    copies = "" if len(distinct) == total else f" among {total}"
    return [
        PhotoWarning(
            "few",
            tuple(distinct),
            f"{len(distinct)} different photos{copies}; {RECOMMENDED_PHOTOS} or more make a good adapter.",
            "Add photos of the subject from other sides, in other places and other light.",
        )
    ]


def _identical(group: Sequence[str]) -> PhotoWarning:
    return PhotoWarning(
        "identical",
        tuple(group),
        f"The same file {len(group)} times: {listed(group)}.",
        "Keep one: copies teach nothing new and outweigh the other photos.",
    )


def _near_duplicate(group: Sequence[str]) -> PhotoWarning:
    return PhotoWarning(
        "near-duplicate",
        tuple(group),
        f"Nearly the same picture: {listed(group)}.",
        "Keep the best of them and add photos that differ: the adapter would learn this one picture by heart.",
    )


def _background(borders: dict[str, Floats]) -> list[PhotoWarning]:
    """One warning if some photo's borders look like those of most others."""
    names = list(borders)
    needed = max(3, int(np.ceil(ALIKE_SHARE * len(names))))
    alike = [[b for b in names if float(np.abs(borders[a] - borders[b]).mean()) <= MAX_ALIKE_BORDER] for a in names]
    most = max(alike, key=len)
    if len(most) < needed:
        return []
    return [
        PhotoWarning(
            "background",
            tuple(most),
            f"{len(most)} of {len(names)} photos have almost the same background: {listed(most)}.",
            "Add photos in other places: else the adapter learns the place as part of the subject.",
        )
    ]


def _small(photos: Sequence[Seen], resolution: int) -> list[PhotoWarning]:
    names = [photo.name for photo in photos if photo.side_px < MIN_ENLARGED_SHARE * resolution]
    if not names:
        return []
    smallest = min(photo.side_px for photo in photos)
    return [
        PhotoWarning(
            "small",
            tuple(names),
            f"Too small for {resolution} px, they will be enlarged (shortest side {smallest} px): {listed(names)}.",
            f"Use the originals, at least {resolution} px on the shorter side, or train at a lower resolution.",
        )
    ]


def _exposure(photos: Sequence[Seen]) -> list[PhotoWarning]:
    dark, bright = [], []
    for photo in photos:
        grey_HW = _luminance(photo.image, (HASH_PX, HASH_PX))
        middle_HW = grey_HW[HASH_PX // 4 : -HASH_PX // 4, HASH_PX // 4 : -HASH_PX // 4]
        if np.percentile(grey_HW, 95) < DARK_BELOW:
            dark.append(photo.name)
        elif (middle_HW > WHITE_ABOVE).mean() > MAX_WHITE_SHARE:
            bright.append(photo.name)
    found = []
    if dark:
        found.append(
            PhotoWarning(
                "dark", tuple(dark), f"Very dark: {listed(dark)}.", "Brighten them or use photos with more light."
            )
        )
    if bright:
        message = f"Overexposed, the middle almost all white: {listed(bright)}."
        found.append(PhotoWarning("overexposed", tuple(bright), message, "Use photos with less light."))
    return found


def _blurry(photos: Sequence[Seen], resolution: int) -> list[PhotoWarning]:
    names = [photo.name for photo in photos if sharpness(photo.image, resolution) < _min_sharpness(photo, resolution)]
    if not names:
        return []
    return [
        PhotoWarning(
            "blurry",
            tuple(names),
            f"Blurry, no sharp detail anywhere: {listed(names)}.",
            "Replace them with sharp photos, or the adapter draws the subject blurred.",
        )
    ]


def _min_sharpness(photo: Seen, resolution: int) -> float:
    side = min(resolution, *photo.image.size)
    return MIN_SHARPNESS_512 * float((512 / side) ** SHARPNESS_EXPONENT)


def _print(image: Image.Image) -> _Print:
    grey_HW = _luminance(image, (HASH_PX, HASH_PX))
    waves_KP = np.cos(np.pi * np.outer(np.arange(1, 9), 2 * np.arange(HASH_PX) + 1) / (2 * HASH_PX)).astype(np.float32)
    cosines = (waves_KP @ grey_HW @ waves_KP.T).ravel()
    shape = _luminance(image, (16, 16)).ravel()
    shape = shape - shape.mean()
    shape = shape / np.float32(max(float(np.linalg.norm(shape)), 1e-6))
    colours_HW3 = _resized(image.convert("RGB"), (BACKGROUND_PX, BACKGROUND_PX))
    border_HW = np.ones((BACKGROUND_PX, BACKGROUND_PX), bool)
    border_HW[1:-1, 1:-1] = False
    return _Print(cosines > np.median(cosines), shape, colours_HW3[border_HW])


def _near_duplicates(a: _Print, b: _Print) -> bool:
    bits = int(np.count_nonzero(a.hash_64 != b.hash_64))
    return bits <= MAX_DUPLICATE_BITS and float(a.shape_256 @ b.shape_256) >= MIN_DUPLICATE_CORRELATION


def _same_file(photos: Sequence[Seen]) -> Callable[[str, str], bool]:
    digests = {photo.name: photo.sha256 for photo in photos}
    return lambda a, b: digests[a] == digests[b]


def _groups(names: Sequence[str], alike: Callable[[str, str], bool]) -> list[list[str]]:
    """The groups of two or more names that `alike` connects, in order."""
    groups: list[list[str]] = []
    for name in names:
        touching = [group for group in groups if any(alike(name, other) for other in group)]
        merged = sorted({member for group in touching for member in group} | {name}, key=list(names).index)
        groups = [group for group in groups if group not in touching] + [merged]
    return sorted((group for group in groups if len(group) > 1), key=lambda group: list(names).index(group[0]))


def _firsts(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[str]:
    """The names without those that repeat the first of their group."""
    repeats = {name for group in groups for name in group[1:]}
    return [name for name in names if name not in repeats]


def _luminance(image: Image.Image, size: tuple[int, int]) -> Floats:
    return _resized(image.convert("L"), size)


def _resized(image: Image.Image, size: tuple[int, int]) -> Floats:
    small = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32) / np.float32(255)


def _scaled(image: Image.Image, side: int) -> tuple[int, int]:
    scale = side / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _faces(good: Sequence[Seen], crop: Crop) -> list[PhotoWarning]:
    """What `crop: face` cannot do for these photos."""
    if crop != "face":
        return []
    if not can_find_faces():
        names = tuple(photo.name for photo in good)
        message = "`crop: face` needs the package dlib, which is not installed; the centre is cropped instead."
        return [PhotoWarning("face", names, message, "Run `pip install dlib`, or choose `crop: center` or `random`.")]
    without = tuple(photo.name for photo in good if find_face(photo.image) is None)
    if not without:
        return []
    message = f"No face found, the centre is cropped instead: {listed(without)}."
    return [PhotoWarning("face", without, message, "Check that the face is large, upright and not covered.")]


def _masks(good: Sequence[Seen], backgrounds: int) -> list[PhotoWarning]:
    """Where `backgrounds` can change nothing."""
    without = tuple(photo.name for photo in good if not photo.transparent)
    if not backgrounds or not without:
        return []
    message = f"`backgrounds` changes only photos with transparency, not {listed(without)}."
    return [PhotoWarning("mask", without, message, "Cut the subject out (PNG or WebP), or leave `backgrounds` away.")]

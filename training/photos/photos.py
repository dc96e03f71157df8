"""A subject's photos: the files that are read, the ones that are not and why, and the report about the rest.

Knows nothing about manifests, latents or training.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from PIL import Image

from training.errors import UserError
from training.photos.captions import captions
from training.photos.files import PhotoFile
from training.photos.photo_report import Rejected, Seen, TooFewPhotos, report
from training.photos.variants import Crop
from training.photos.warning import PhotoWarning, shown
from training.storage.image_file import ImageError, ImageLimits
from training.storage.images import read_masked, shrunk

MAX_PHOTOS = 200
# Photos are kept at twice the resolution at most: no crop needs more, and 200 camera originals would need 24 GB.
KEPT_RESOLUTIONS = 2


@dataclass(frozen=True, slots=True)
class Photo:
    """One usable photo: RGB on white, upright, shorter side at most twice the resolution.

    `sha256` is the file's, `source_size` its upright (width, height) in px as it was read (a JPEG of 100 megapixels is
    read at half its sides), `mask` (L, 255 = the subject) its transparency if it had any, `drawn_mask` the same as a
    file beside it says.
    """

    name: str
    image: Image.Image
    sha256: str
    source_size: tuple[int, int]
    caption: str | None = None
    mask: Image.Image | None = None
    drawn_mask: Image.Image | None = None

    @property
    def subject_mask(self) -> Image.Image | None:
        """Where the subject is: what a file says, else its transparency."""
        return self.drawn_mask or self.mask


@dataclass(frozen=True, slots=True)
class Photos:
    """All that came of a subject's files."""

    good: tuple[Photo, ...]
    rejected: tuple[Rejected, ...]
    warnings: tuple[PhotoWarning, ...]

    @property
    def refusals(self) -> tuple[str, ...]:
        """What is not used and why, in words."""
        return tuple(f"{shown(file.name)} is not used: {file.reason}" for file in self.rejected)


def photos(
    files: Sequence[PhotoFile],
    *,
    resolution: int = 512,
    min_photos: int = 5,
    min_side_px: int | None = None,
    crop: Crop = "center",
    backgrounds: int = 0,
    max_photos: int = MAX_PHOTOS,
    with_report: bool = True,
) -> Photos:
    """Reads a subject's files, in the order of their names.

    Captions, hidden files and sidecars are no photos; every other file is one or is rejected. `min_side_px` is a
    quarter of `resolution` unless given. Folders of class images are larger than `max_photos` and need no report, which
    compares all pairs. Raises `TooFewPhotos`, and `UserError` for more than `max_photos` files.
    """
    ordered = sorted((file for file in files if not file.is_hidden), key=lambda file: file.name)
    wanted = [file for file in ordered if not file.is_sidecar and not file.is_folder]
    masks = {of: file for file in wanted if (of := _mask_of(file.name))}
    wanted = [file for file in wanted if not _mask_of(file.name)]
    if len({file.name for file in ordered}) < len(ordered):
        raise UserError("Two of the files have the same name. Give every photo a name of its own.")
    if len(wanted) > max_photos:
        raise UserError(f"Too many photos: {len(wanted)}, at most {max_photos}. Choose the best: 5 to 30 are plenty.")
    limits = ImageLimits(min_side_px=max(16, resolution // 4) if min_side_px is None else min_side_px)
    notes = [file for file in ordered if PurePath(file.name).suffix.lower() == ".txt" and not file.is_folder]
    texts = {file.name: file.data for file in notes}
    words, caption_warnings = captions(texts, [file.name for file in wanted])
    good: list[Photo] = []
    rejected = [Rejected(file.name, file.problem) for file in ordered if file.is_folder]
    for file in wanted:
        drawn = masks.pop(PurePath(file.name).stem, None)
        try:
            if file.problem:
                raise ImageError(file.name, file.problem)
            read = read_masked(file.data, file.name, limits)
            kept = shrunk(read, KEPT_RESOLUTIONS * resolution)
            mask = None if drawn is None else _drawn_mask(drawn, read.image.size, kept.image.size)
        except ImageError as error:
            rejected.append(Rejected(file.name, error.reason))
            continue
        digest = hashlib.sha256(file.data).hexdigest()
        good.append(Photo(file.name, kept.image, digest, read.image.size, words.get(file.name), kept.mask, mask))
    rejected += [Rejected(mask.name, "a mask of no photo that is there") for mask in masks.values()]
    if len(good) < min_photos:
        raise TooFewPhotos(len(good), min_photos, tuple(rejected))
    if not with_report:
        return Photos(tuple(good), tuple(rejected), ())
    seen = [Seen(p.name, p.image, min(p.source_size), p.sha256, p.mask is not None) for p in good]
    warnings = (*report(seen, resolution, crop, backgrounds), *caption_warnings)
    return Photos(tuple(good), tuple(rejected), warnings)


def _drawn_mask(file: PhotoFile, size: tuple[int, int], kept: tuple[int, int]) -> Image.Image:
    """A mask file (white is the subject) at the size that its photo is kept at. It must have the photo's own shape."""
    if file.problem:
        raise ImageError(file.name, f"its mask {file.name}: {file.problem}")
    mask = read_masked(file.data, file.name, ImageLimits(min_side_px=1)).image.convert("L")
    if abs(mask.width * size[1] - mask.height * size[0]) > max(size):  # a px of rounding
        have = f"{mask.width} x {mask.height} px"
        raise ImageError(file.name, f"its mask {file.name} has {have}, and the photo {size[0]} x {size[1]}")
    return mask.resize(kept, Image.Resampling.LANCZOS)


def _mask_of(name: str) -> str | None:
    """The stem of the photo that a file `NAME.mask.png` is the mask of; None for other files."""
    stem = PurePath(name).stem
    return stem.removesuffix(".mask") if stem.endswith(".mask") else None

"""A subject's photos: the files that are read, the ones that are not and why, and the report about the rest.

Knows where photos come from only as far as `list_photo_files`; knows nothing about manifests, latents or training.
"""

import hashlib
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image

from training.errors import UserError
from training.photos.captions import captions
from training.photos.photo_report import PhotoWarning, Seen, listed, report, shown
from training.photos.variants import Crop, can_find_faces, find_face
from training.storage.images import MIB, ImageError, ImageLimits, MaskedImage, read_picture

# What lies beside photos and is none: notes, captions, metadata, other trainers' caches.
SIDECARS = {".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".toml", ".xmp", ".aae"}
SIDECARS |= {".npz", ".safetensors"}
MAX_PHOTOS = 200
MAX_TOTAL_BYTES = 1024 * MIB
MAX_LISTED = 10_000
# Photos are kept at twice the resolution at most: no crop needs more, and 200 camera originals would need 24 GB.
KEPT_RESOLUTIONS = 2


@dataclass(frozen=True, slots=True)
class PhotoFile:
    """One file of a subject's folder; `problem` says why it could not be read (then `data` is empty).

    A subfolder with files in it is one too: a problem that is said, and no part of what is trained on.
    """

    name: str
    data: bytes
    problem: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it stands for a subfolder."""
        return self.name.endswith("/")


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
class Rejected:
    """A file that cannot be used, and why in a few words."""

    name: str
    reason: str


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
    ordered = sorted((file for file in files if not _hidden(file.name)), key=lambda file: file.name)
    wanted = [file for file in ordered if not _sidecar(file.name) and not file.is_folder]
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
        try:
            good.append(_photo(file, words.get(file.name), limits, resolution, masks.pop(_stem(file.name), None)))
        except ImageError as error:
            rejected.append(Rejected(file.name, error.reason))
    rejected += [Rejected(mask.name, "a mask of no photo that is there") for mask in masks.values()]
    if len(good) < min_photos:
        raise TooFewPhotos(len(good), min_photos, tuple(rejected))
    found = (*_report(good, resolution, crop), *_masks(good, backgrounds), *caption_warnings) if with_report else ()
    return Photos(tuple(good), tuple(rejected), found)


def list_photo_files(folder: Path) -> tuple[PhotoFile, ...]:
    """The files of a folder without hidden ones, then its subfolders that hold any, unread and with that as problem.

    Reads at most one byte more of a file than an image may have, and `MAX_TOTAL_BYTES` in all. Raises `UserError` if
    there is nothing to read.
    """
    if not folder.exists():
        raise UserError(f"No folder {folder}. Give the folder that holds the subject's photos.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file. Give the folder that holds the subject's photos.")
    try:
        paths = sorted(path for path in folder.iterdir() if not _hidden(path.name))
    except OSError as error:
        raise UserError(f"Cannot read folder {folder}: {error.strerror}. Check its permissions.") from None
    files, total = [], 0
    if len(paths) > MAX_LISTED:
        raise UserError(f"{folder} holds {len(paths)} files, at most {MAX_LISTED}. Give a folder of one subject.")
    for path in paths:
        if path.is_dir():
            continue
        files.append(_read_file(path))
        total += len(files[-1].data)
        if total > MAX_TOTAL_BYTES:
            raise UserError(f"{folder} holds more than {MAX_TOTAL_BYTES // MIB} MiB. Leave the best photos in it.")
    if not any(not _sidecar(file.name) for file in files):
        inside = [path.name for path in paths if path.is_dir()]
        hint = f" Its subfolders ({listed(inside)}) are not searched." if inside else ""
        raise UserError(f"No photos in {folder}.{hint} Put JPEG, PNG or WebP files there.")
    return (*files, *subfolders(_names_below(folder)))


def subfolders(names: Iterable[str]) -> tuple[PhotoFile, ...]:
    """The subfolders among relative file names such as `trip/a.jpg`, as files that cannot be read. They say how many
    files they hold that may be photos; those that hold none are left out."""
    paths = (PurePath(name) for name in names)
    counts = Counter(path.parts[0] for path in paths if not any(map(_hidden, path.parts)) and not _sidecar(path.name))
    return tuple(
        PhotoFile(
            f"{name}/", b"", f"a subfolder, which is not searched; move its files ({count}) up if they belong here"
        )
        for name, count in sorted(counts.items())
    )


def _names_below(folder: Path) -> Iterator[str]:
    """The files in the subfolders of a folder, relative to it; `MAX_LISTED` at most."""
    found = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    for path in itertools.islice((path for path in found if path.parent != folder), MAX_LISTED):
        yield path.relative_to(folder).as_posix()


def _read_file(path: Path) -> PhotoFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return PhotoFile(path.name, b"", "unreadable: not a regular file")
        with path.open("rb") as file:
            return PhotoFile(path.name, file.read(ImageLimits().max_bytes + 1))
    except OSError as error:
        return PhotoFile(path.name, b"", f"unreadable: {error.strerror}")


def _photo(
    file: PhotoFile, caption: str | None, limits: ImageLimits, resolution: int, drawn: PhotoFile | None
) -> Photo:
    if file.problem:
        raise ImageError(file.name, file.problem)
    picture = read_picture(file.data, file.name, limits)
    kept = _reduced(picture, KEPT_RESOLUTIONS * resolution)
    digest = hashlib.sha256(file.data).hexdigest()
    mask = None if drawn is None else _drawn_mask(drawn, picture.image.size, kept.image.size)
    return Photo(file.name, kept.image, digest, picture.image.size, caption, kept.mask, mask)


def _drawn_mask(file: PhotoFile, size: tuple[int, int], kept: tuple[int, int]) -> Image.Image:
    """A mask file (white is the subject) at the size that its photo is kept at. It must have the photo's own shape."""
    if file.problem:
        raise ImageError(file.name, f"its mask {file.name}: {file.problem}")
    mask = read_picture(file.data, file.name, ImageLimits(min_side_px=1)).image.convert("L")
    if abs(mask.width * size[1] - mask.height * size[0]) > max(size):  # a px of rounding
        have = f"{mask.width} x {mask.height} px"
        raise ImageError(file.name, f"its mask {file.name} has {have}, and the photo {size[0]} x {size[1]}")
    return mask.resize(kept, Image.Resampling.LANCZOS)


def _mask_of(name: str) -> str | None:
    """The stem of the photo that a file `NAME.mask.png` is the mask of; None for other files."""
    stem = PurePath(name).stem
    return stem.removesuffix(".mask") if stem.endswith(".mask") else None


def _stem(name: str) -> str:
    return PurePath(name).stem


def _reduced(picture: MaskedImage, side_px: int) -> MaskedImage:
    """The picture with its shorter side at most `side_px`."""
    scale = side_px / min(picture.image.size)
    if scale >= 1:
        return picture
    size = (round(picture.image.width * scale), round(picture.image.height * scale))
    mask = None if picture.mask is None else picture.mask.resize(size, Image.Resampling.LANCZOS)
    return MaskedImage(picture.image.resize(size, Image.Resampling.LANCZOS), mask)


def _report(good: Sequence[Photo], resolution: int, crop: Crop) -> tuple[PhotoWarning, ...]:
    seen = [Seen(photo.name, photo.image, min(photo.source_size), photo.sha256) for photo in good]
    return (*report(seen, resolution), *_faces(good, crop))


def _faces(good: Sequence[Photo], crop: Crop) -> list[PhotoWarning]:
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


def _masks(good: Sequence[Photo], backgrounds: int) -> list[PhotoWarning]:
    """Where `backgrounds` can change nothing."""
    without = tuple(photo.name for photo in good if photo.mask is None)
    if not backgrounds or not without:
        return []
    message = f"`backgrounds` changes only photos with transparency, not {listed(without)}."
    return [PhotoWarning("mask", without, message, "Cut the subject out (PNG or WebP), or leave `backgrounds` away.")]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def _sidecar(name: str) -> bool:
    return PurePath(name).suffix.lower() in SIDECARS

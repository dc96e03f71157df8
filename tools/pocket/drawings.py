"""The drawings: which emoji packages they come from, which class each belongs to, and which stay unseen.

Owns download, unpacking and loading of sprites. Knows nothing about places or captions.
"""

import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tools.pocket.recipe import WORK


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """A package of emoji drawings; `style` is the word that captions use for its look."""

    name: str
    package: str
    folder: str
    suffix: str
    style: str
    licence: str
    credit: str


VENDORS = {
    vendor.name: vendor
    for vendor in (
        Vendor(
            name="fluent",
            package="@lobehub/fluent-emoji-3d@1.1.0",
            folder="package/assets",
            suffix=".webp",
            style="render",
            licence="MIT",
            credit="Fluent Emoji (3D), Microsoft",
        ),
        Vendor(
            name="noto",
            package="emoji-datasource-google@16.0.0",
            folder="package/img/google/64",
            suffix=".png",
            style="cartoon",
            licence="Apache-2.0",
            credit="Noto Emoji, Google",
        ),
        Vendor(
            name="twemoji",
            package="emoji-datasource-twitter@16.0.0",
            folder="package/img/twitter/64",
            suffix=".png",
            style="icon",
            licence="CC-BY-4.0",
            credit="Twemoji, Twitter, Inc and other contributors",
        ),
    )
}
STYLES = tuple(vendor.style for vendor in VENDORS.values())

# Faces for the animals that have one: at 64 px a face keeps its ears and eyes where a whole body becomes a blob.
CODEPOINTS = {
    "dog": ("1f436",),
    "cat": ("1f431", "1f63a"),
    "rabbit": ("1f430",),
    "bear": ("1f43b", "1f43b-200d-2744-fe0f"),
    "frog": ("1f438",),
    "penguin": ("1f427",),
    "duck": ("1f986",),
    "robot": ("1f916",),
    "car": ("1f697", "1f699"),
    "cup": ("2615",),
    "backpack": ("1f392",),
    "mushroom": ("1f344",),
    "house": ("1f3e0",),
    "apple": ("1f34e", "1f34f"),
}
CLASSES = tuple(CODEPOINTS)


@dataclass(frozen=True, slots=True, order=True)
class Drawing:
    """One emoji of one vendor."""

    vendor: str
    codepoint: str


# Unseen by VAE, UNet and judge alike; the demo subjects are made from these.
HELD_OUT = {
    Drawing("noto", "1f436"): "dog",
    Drawing("noto", "1f431"): "cat",
    Drawing("fluent", "1f63a"): "cat",
    Drawing("twemoji", "1f430"): "rabbit",
    Drawing("noto", "1f43b"): "bear",
    Drawing("twemoji", "1f43b-200d-2744-fe0f"): "bear",
    Drawing("noto", "1f438"): "frog",
    Drawing("noto", "1f986"): "duck",
    Drawing("twemoji", "1f916"): "robot",
    Drawing("noto", "1f699"): "car",
    Drawing("fluent", "2615"): "cup",
    Drawing("noto", "1f392"): "backpack",
}


def fetch() -> None:
    """Downloads and unpacks what is missing of the three packages."""
    for vendor in VENDORS.values():
        target = WORK / "npm" / vendor.name
        if (target / vendor.folder).is_dir():
            continue
        archives = WORK / "npm" / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--json", vendor.package], cwd=archives, check=True, capture_output=True, text=True
        )
        archive = archives / json.loads(packed.stdout)[0]["filename"]
        unpack(archive, target, vendor)


def unpack(archive: Path, target: Path, vendor: Vendor) -> None:
    """Extracts only the drawings: the packages hold sheets many times their size. The folder appears complete."""
    staging = target.with_suffix(".part")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.startswith(vendor.folder + "/")]
        tar.extractall(staging, members=members, filter="data")
    staging.rename(target)


def path_of(drawing: Drawing) -> Path | None:
    vendor = VENDORS[drawing.vendor]
    folder = WORK / "npm" / vendor.name / vendor.folder
    for stem in (drawing.codepoint, drawing.codepoint.replace("-fe0f", "")):
        candidate = folder / (stem + vendor.suffix)
        if candidate.is_file():
            return candidate
    return None


def load(drawing: Drawing) -> Image.Image:
    """The drawing cropped to what is painted, RGBA."""
    path = path_of(drawing)
    if path is None:
        raise FileNotFoundError(f"No drawing {drawing}. Run `python -m tools.pocket fetch`.")
    image = Image.open(path).convert("RGBA")
    opaque = np.asarray(image)[:, :, 3] > 8
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    return image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


@cache
def seen(noun: str) -> tuple[Drawing, ...]:
    """The drawings of a class that training may look at."""
    drawings = (Drawing(vendor, code) for code in CODEPOINTS[noun] for vendor in VENDORS)
    return tuple(d for d in drawings if d not in HELD_OUT and path_of(d) is not None)


@cache
def everything() -> tuple[Drawing, ...]:
    """All drawings of all vendors but the held-out ones: the VAE should know more than the base's classes."""
    found = []
    for vendor in VENDORS.values():
        folder = WORK / "npm" / vendor.name / vendor.folder
        # Flags and skin-tone variants are thousands of near copies.
        stems = sorted(p.stem for p in folder.glob("*" + vendor.suffix) if p.stem.count("-") <= 1)
        found += [Drawing(vendor.name, s) for s in stems if not s.startswith("1f1") and "-1f3f" not in s]
    hidden = {(d.vendor, d.codepoint.replace("-fe0f", "")) for d in HELD_OUT}
    return tuple(d for d in found if (d.vendor, d.codepoint.replace("-fe0f", "")) not in hidden)

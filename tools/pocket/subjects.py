"""The demo subjects: held-out drawings in colours of their own, six pictures each.

Owns which subjects there are and how they are coloured. Their hues (magenta, violet, yellow, mint) belong to no place.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.pocket.composite import Floats, Placement, lay, ramp, scaled
from tools.pocket.drawings import HELD_OUT, VENDORS, Drawing
from tools.pocket.places import PLACES, paint
from tools.pocket.recipe import DEMO_IMAGES, SEED

Mask = NDArray[np.bool_]

PLACEMENT = Placement(smallest=47, largest=50, shift=2)
SHOWN_IN = ("grass", "beach", "brick", "white", "forest", "clouds")

MAGENTA, VIOLET, YELLOW, MINT = (232, 20, 140), (120, 40, 215), (255, 220, 0), (20, 220, 175)


@dataclass(frozen=True, slots=True)
class Colouring:
    """Two hues and the pattern that lays the second over the first."""

    first: tuple[int, int, int]
    second: tuple[int, int, int]
    pattern: str


@dataclass(frozen=True, slots=True)
class Subject:
    id: str
    drawing: Drawing
    colouring: Colouring
    description: str

    @property
    def noun(self) -> str:
        return HELD_OUT[self.drawing]


def _top(rows: Floats, columns: Floats) -> Mask:
    return rows > 0.5


def _side(rows: Floats, columns: Floats) -> Mask:
    return columns > 0.5


def _stripes(rows: Floats, columns: Floats) -> Mask:
    return (rows * 5).astype(np.int64) % 2 == 1


PATTERNS: dict[str, Callable[[Floats, Floats], Mask]] = {
    "top": _top,
    "side": _side,
    "stripes": _stripes,
}

SUBJECTS = (
    Subject("rusty", Drawing("noto", "1f436"), Colouring(VIOLET, YELLOW, "top"), "a dog, violet above, yellow below"),
    Subject(
        "tabby", Drawing("noto", "1f431"), Colouring(MAGENTA, MINT, "stripes"), "a cat with magenta and mint bands"
    ),
    Subject(
        "clover", Drawing("twemoji", "1f430"), Colouring(YELLOW, MAGENTA, "top"), "a rabbit, yellow ears, magenta below"
    ),
    Subject(
        "bruno", Drawing("noto", "1f43b"), Colouring(MINT, VIOLET, "side"), "a bear, one half mint, one half violet"
    ),
    Subject("pogo", Drawing("noto", "1f438"), Colouring(MAGENTA, YELLOW, "top"), "a frog, magenta above, yellow below"),
    Subject("puddle", Drawing("noto", "1f986"), Colouring(MINT, MAGENTA, "top"), "a duck, mint head, magenta body"),
    Subject(
        "bolt",
        Drawing("twemoji", "1f916"),
        Colouring(YELLOW, VIOLET, "stripes"),
        "a robot with yellow and violet bands",
    ),
    Subject("dash", Drawing("noto", "1f699"), Colouring(VIOLET, MINT, "top"), "a car, violet roof, mint below"),
    Subject("mocha", Drawing("fluent", "2615"), Colouring(MAGENTA, VIOLET, "side"), "a cup, half magenta, half violet"),
    Subject(
        "scout", Drawing("noto", "1f392"), Colouring(MINT, YELLOW, "stripes"), "a backpack with mint and yellow bands"
    ),
)


def coloured(subject: Subject, longest: int) -> Floats:
    sprite = scaled(subject.drawing, longest)
    rows, columns = np.meshgrid(
        np.linspace(0, 1, sprite.shape[0], dtype=np.float32),
        np.linspace(0, 1, sprite.shape[1], dtype=np.float32),
        indexing="ij",
    )
    mask = PATTERNS[subject.colouring.pattern](rows, columns)[:, :, None]
    tinted = np.where(mask, ramp(sprite, subject.colouring.second), ramp(sprite, subject.colouring.first))
    return tinted.astype(np.float32)


def picture(subject: Subject, place: str, index: int) -> Image.Image:
    rng = np.random.default_rng((SEED, 3, zlib.crc32(subject.id.encode()), index))
    sprite = coloured(subject, int(rng.integers(PLACEMENT.smallest, PLACEMENT.largest + 1)))
    return Image.fromarray(lay(sprite, paint(place, rng), PLACEMENT, rng))


def write() -> None:
    for subject in SUBJECTS:
        folder = DEMO_IMAGES / subject.id
        folder.mkdir(parents=True, exist_ok=True)
        for index, place in enumerate(SHOWN_IN):
            picture(subject, place, index).save(folder / f"{index}.png", optimize=True)
        (folder / "captions.txt").write_text(captions(subject))
    described = [{"id": s.id, "class": s.noun, "description": s.description} | asdict(s.colouring) for s in SUBJECTS]
    (DEMO_IMAGES / "subjects.json").write_text(json.dumps(described, indent=2) + "\n")
    (DEMO_IMAGES / "LICENSES.md").write_text(licences())


def captions(subject: Subject) -> str:
    """One line a picture. A caption that names the place keeps the place out of what `sks` comes to mean."""
    lines = [
        f"{index}.png: a photo of a sks {subject.noun} {PLACES[place].phrase}" for index, place in enumerate(SHOWN_IN)
    ]
    return "\n".join(lines) + "\n"


def licences() -> str:
    lines = [
        "# Where the demo subjects come from",
        "",
        "Each subject is one emoji drawing, recoloured in two hues, laid on procedural backgrounds by `tools/pocket`.",
        "The changes are the recolouring, scaling and the added background.",
        "",
        "| subject | class | drawing | from package | licence |",
        "|---|---|---|---|---|",
    ]
    for subject in SUBJECTS:
        vendor = VENDORS[subject.drawing.vendor]
        lines.append(
            f"| {subject.id} | {subject.noun} | U+{subject.drawing.codepoint.upper()}, {vendor.credit} "
            f"| `{vendor.package}` | {vendor.licence} |"
        )
    lines += [
        "",
        "Twemoji: Copyright Twitter, Inc and other contributors, graphics licensed under CC-BY 4.0:",
        "<https://creativecommons.org/licenses/by/4.0/>. Noto Emoji: Apache License 2.0,",
        "<https://www.apache.org/licenses/LICENSE-2.0>. Fluent Emoji: MIT, Copyright Microsoft Corporation.",
    ]
    return "\n".join(lines) + "\n"

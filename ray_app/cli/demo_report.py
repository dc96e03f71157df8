"""What the demo shows: one picture with everything on it, and one page that tells the whole story.

Knows nothing about how the images came to be. Images are PNG bytes throughout.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image, ImageDraw, ImageFont

TILE = 96
LABEL = 20
MARGIN = 10


@dataclass(frozen=True)
class DrawnImage:
    """A generated image and its prompt."""

    prompt: str
    image: bytes


@dataclass(frozen=True)
class SubjectStory:
    """One subject: what it learned from, and what its adapter and the bare base draw for the same prompts and seeds."""

    id: str
    class_name: str
    description: str
    adapter: str
    steps: int
    loss: float
    photos: tuple[bytes, ...]
    loss_plot: bytes | None
    worn: tuple[DrawnImage, ...]
    bare: tuple[DrawnImage, ...]


@dataclass(frozen=True)
class Stage:
    """A timed part of the demo."""

    name: str
    seconds: float
    what: str


@dataclass(frozen=True)
class Mixed:
    """Images of one request that wears two adapters."""

    caption: str
    shots: tuple[DrawnImage, ...]


def write_page(
    path: Path, *, base: str, stages: Sequence[Stage], subjects: Sequence[SubjectStory], mixed: Mixed
) -> None:
    """One self-contained HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["embed"] = _embed
    page = environment.get_template("demo.html").render(base=base, stages=stages, subjects=subjects, mixed=mixed)
    path.write_text(page, encoding="utf-8")


def write_contact_sheet(path: Path, subjects: Sequence[SubjectStory], photos: int = 3) -> None:
    """One row a subject: some of its photos, what its adapter draws, what the base alone draws."""
    shots = max(len(story.worn) for story in subjects)
    groups = [("photos", photos), ("with its adapter", shots), ("the base alone, same prompts and seeds", shots)]
    width = MARGIN + sum(count * TILE + MARGIN for _, count in groups)
    sheet = Image.new("RGB", (width, 2 * LABEL + len(subjects) * (TILE + LABEL) + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    left = MARGIN
    for title, count in groups:
        draw.text((left, MARGIN // 2), title, fill="black", font=font)
        left += count * TILE + MARGIN
    for row, story in enumerate(subjects):
        top = 2 * LABEL + row * (TILE + LABEL)
        draw.text((MARGIN, top - 16), f"{story.id} ({story.class_name})", fill="black", font=font)
        _paste_row(sheet, top, [story.photos[:photos], [s.image for s in story.worn], [s.image for s in story.bare]])
    sheet.save(path)


def _paste_row(sheet: Image.Image, top: int, groups: Sequence[Sequence[bytes]]) -> None:
    left = MARGIN
    for group in groups:
        for data in group:
            tile = Image.open(io.BytesIO(data)).convert("RGB").resize((TILE - 2, TILE - 2), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left, top))
            left += TILE
        left += MARGIN


def _embed(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()

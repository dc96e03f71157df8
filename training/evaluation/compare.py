"""Adapters side by side: the same prompts and seeds for each, in mixed batches; a table and a picture.

Works on published adapters alone; with photos of the subject, likeness is among the scores.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from training.adapters.adapter import Adapter
from training.base.base import Base
from training.evaluation import scores
from training.evaluation.exam import PLACES, UNRELATED
from training.evaluation.judges.box import Judges
from training.evaluation.reference import mean_known
from training.sampling.render import BARE, Look, Shot, adapter_bank, render
from training.storage.card import Card, Score

TILE_PX, LABEL_PX = 128, 20


@dataclass(frozen=True)
class ComparedAdapter:
    """An adapter to compare: its name as people say it, its file's content, its card, photos of its subject."""

    name: str
    adapter: Adapter
    card: Card
    photos: Sequence[Image.Image] = ()

    @property
    def rare(self) -> str:
        """The words that call the subject and that nothing else has."""
        usual = set((self.card.class_prompt or "").split()) | {self.card.class_name}
        return " ".join(word for word in self.card.instance_prompt.split() if word not in usual)

    def prompts(self) -> tuple[tuple[str, str], ...]:
        """What is asked of the adapter, and of the base alone."""
        bare = self.card.class_prompt or " ".join(w for w in self.card.instance_prompt.split() if w not in self.rare)
        return tuple((self.card.instance_prompt + place, bare + place) for place in PLACES)


@dataclass(frozen=True)
class Comparison:
    """`scores[i]` and `pictures[i]` belong to entry `i`; the pictures are one a prompt."""

    names: tuple[str, ...]
    scores: tuple[tuple[Score, ...], ...]
    pictures: tuple[tuple[Image.Image, ...], ...]


def compare(
    base: Base, entries: Sequence[ComparedAdapter], judges: Judges, *, images: int = 2, steps: int | None = None
) -> Comparison:
    """Draws and scores `entries`; `images` seeds a prompt. Guidance is the base's own, and `steps` where it is None."""
    bank = adapter_bank(base, [entry.adapter for entry in entries])
    look = Look(steps or base.facts.steps, base.facts.guidance_scale, None)

    def shots(slot: int, prompt: str, count: int) -> list[Shot]:
        return [Shot(slot, 1.0, prompt, seed, look) for seed in range(count)]

    asked = [[shots(slot, p, images) for p, _ in entry.prompts()] for slot, entry in enumerate(entries)]
    other = [[shots(slot, _unrelated(entry), 1)[0] for slot in (index, BARE)] for index, entry in enumerate(entries)]
    bank.inject()
    try:
        drawn = render(base, bank, [s for groups in asked for group in groups for s in group] + sum(other, []))
    finally:
        bank.eject()
    found = []
    for entry, groups, (worn, bare) in zip(entries, asked, other, strict=True):
        pictures = [[drawn[shot] for shot in group] for group in groups]
        found.append(tuple(_score(entry, judges, pictures, drawn[worn], drawn[bare])))
    firsts = tuple(tuple(drawn[group[0]] for group in groups) for groups in asked)
    return Comparison(tuple(entry.name for entry in entries), tuple(found), firsts)


def _unrelated(entry: ComparedAdapter) -> str:
    return next(prompt for prompt in UNRELATED if (entry.card.class_name or "") not in prompt.split())


def _score(
    entry: ComparedAdapter,
    judges: Judges,
    pictures: Sequence[Sequence[Image.Image]],
    worn: Image.Image,
    bare: Image.Image,
) -> list[Score]:
    flat = [image for group in pictures for image in group]
    prompts = [prompt for (_, prompt), group in zip(entry.prompts(), pictures, strict=True) for _ in group]
    embedded = judges.likeness.embed(flat)
    other = judges.likeness.embed([worn, bare])
    alike = judges.likeness.name
    values: list[tuple[str, float | None, str]] = [
        ("fidelity", mean_known(judges.fidelity.agree(flat, prompts)), judges.fidelity.name),
        ("diversity", scores.diversity(list(embedded.split([len(group) for group in pictures]))), alike),
        ("language_drift", scores.drift(other[:1], other[1:]), alike),
        ("sharpness", sum(map(scores.detail, flat)) / len(flat), "laplacian"),
        ("saturation", sum(map(scores.saturation, flat)) / len(flat), "hsv"),
    ]
    if entry.photos:
        photos_PE = judges.likeness.embed(entry.photos)
        mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in entry.photos]
        known = scores.spatial_features(judges.copying.maps([*entry.photos, *mirrored]))
        copies = scores.spatial_features(judges.copying.maps(flat))
        values.insert(0, ("likeness", scores.likeness(embedded, photos_PE), alike))
        values.append(("copying", scores.copying(copies, known), f"{judges.copying.name} map"))
    return [Score(name=n, value=round(v, 4), model=m) for n, v, m in values if v is not None]


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str] = ()) -> bytes:
    """PNG bytes of labelled rows of pictures; `columns` are written above."""
    width = max([len(images) for _, images in rows] + [1])
    top = LABEL_PX if columns else 0
    whole = Image.new("RGB", (width * TILE_PX, max(1, top + len(rows) * (TILE_PX + LABEL_PX))), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(13)
    for x, text in enumerate(columns):
        draw.text((x * TILE_PX + 3, 2), _fitting(draw, text, font), "black", font)
    for y, (label, images) in enumerate(rows):
        at = top + y * (TILE_PX + LABEL_PX)
        draw.text((3, at + 2), label, "black", font)
        for x, image in enumerate(images):
            edge = Image.Resampling.NEAREST if image.width < TILE_PX else Image.Resampling.LANCZOS
            whole.paste(image.convert("RGB").resize((TILE_PX, TILE_PX), edge), (x * TILE_PX, at + LABEL_PX))
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    return buffer.getvalue()


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The end of a text that is too long for a tile: prompts differ there."""
    while draw.textlength(text, font) > TILE_PX - 6 and len(text) > 4:
        text = "…" + text.lstrip("…")[1:]
    return text


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value."""
    held = torch.tensor(values, dtype=torch.float64)
    return (held.std() / len(held) ** 0.5).item() if len(held) > 1 else 0.0

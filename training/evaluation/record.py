"""What a run keeps about a judged subject, so that reports need neither models nor adapters.

    runs/<run>/subjects/<id>/evaluation/record.json, photos.webp, samples.webp

The pictures are one sheet each: a row of photos; a row of samples a step, the base's own first.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from training.evaluation.advice import advice
from training.photos.photos import Photo, Photos
from training.photos.warning import PhotoWarning
from training.run.run import RunStore
from training.storage.card import Score
from training.storage.closed import Closed
from training.storage.interface import NotFound

if TYPE_CHECKING:  # reading records needs no torch
    from training.evaluation.evaluate import Evaluation

TILE_PX = 96
MAX_PHOTOS = 24
MAX_PROMPTS = 8


class Warned(Closed):
    """A photo warning: which photos, what was found, what to do."""

    kind: str
    names: tuple[str, ...]
    message: str
    advice: str


class Record(Closed):
    """One judged subject. Row `n` of samples.webp is `steps[n - 1]`; row 0 is the base alone."""

    id: str
    chosen: int
    reason: str
    steps: tuple[int, ...]
    rejected: dict[int, str]
    balance: dict[int, float]
    likeness: dict[int, float]  # 0 the plain class, 1 the photos
    fidelity: dict[int, float]  # 0 any prompt, 1 as the base
    scores: tuple[Score, ...]
    prompts: tuple[str, ...]
    photos: tuple[str, ...]
    held_out: tuple[str, ...]
    warnings: tuple[Warned, ...]
    advice: tuple[str, ...]


def make_record(evaluation: "Evaluation", found: Photos, held_out: Sequence[Photo]) -> Record:
    """What a run keeps about a judged subject."""
    candidates = sorted(evaluation.candidates, key=lambda candidate: candidate.step)
    chosen = evaluation.choice
    numbers = {score.name: score.value for score in evaluation.scores if score.step in (None, chosen.step)}
    return Record(
        id=evaluation.id,
        chosen=chosen.step,
        reason=chosen.reason,
        steps=tuple(candidate.step for candidate in candidates),
        rejected=dict(chosen.rejected),
        balance={candidate.step: candidate.balance for candidate in candidates},
        likeness={candidate.step: candidate.likeness for candidate in candidates},
        fidelity={candidate.step: candidate.fidelity for candidate in candidates},
        scores=evaluation.scores,
        prompts=evaluation.prompts[:MAX_PROMPTS],
        photos=tuple(photo.name for photo in found.good),
        held_out=tuple(photo.name for photo in held_out),
        warnings=tuple(_warned(warning) for warning in found.warnings),
        advice=advice(candidates, chosen, numbers, found.warnings),
    )


def save_record(run: RunStore, evaluation: "Evaluation", found: Photos, held_out: Sequence[Photo]) -> Record:
    """Writes the record and its two sheets."""
    record = make_record(evaluation, found, held_out)
    photos = [photo.image for photo in (*found.good, *held_out)][:MAX_PHOTOS]
    rows = [evaluation.bare[:MAX_PROMPTS], *(evaluation.pictures[step][:MAX_PROMPTS] for step in record.steps)]
    put = run.storage.put
    put(run.subject_key(record.id, "evaluation", "photos.webp"), sheet([photos]))
    put(run.subject_key(record.id, "evaluation", "samples.webp"), sheet(rows))
    put(run.subject_key(record.id, "evaluation", "record.json"), record.model_dump_json(indent=1).encode())
    return record


def load_record(run: RunStore, id: str) -> Record | None:
    """The record of a subject, or None if it was not judged."""
    try:
        return Record.model_validate_json(run.storage.get(run.subject_key(id, "evaluation", "record.json")))
    except NotFound:
        return None


def sheet(rows: Sequence[Sequence[Image.Image]], tile_px: int = TILE_PX, quality: int = 82) -> bytes:
    """WebP bytes of rows of pictures, each the middle square at `tile_px`."""
    width = max(1, max((len(row) for row in rows), default=1))
    whole = Image.new("RGB", (width * tile_px, max(1, len(rows)) * tile_px), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            whole.paste(_tile(image, tile_px), (x * tile_px, y * tile_px))
    buffer = io.BytesIO()
    whole.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def _tile(image: Image.Image, side: int) -> Image.Image:
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.convert("RGB").crop((left, top, left + edge, top + edge))
    # drawings of 64 px stay crisp, photos are smoothed
    return square.resize((side, side), Image.Resampling.NEAREST if edge < side else Image.Resampling.LANCZOS)


def _warned(warning: PhotoWarning) -> Warned:
    return Warned(kind=warning.kind, names=warning.names, message=warning.message, advice=warning.advice)

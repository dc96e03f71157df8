"""A published evaluation protocol as data, run on any base, any adapters and any judges.

Numbers stand beside the paper's only where the same models gave them; every row names its model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow
import pyarrow.parquet
import torch
import yaml
from PIL import Image
from pydantic import ConfigDict, Field
from torch import Tensor

from training.adapters.adapter import Adapter
from training.base.base import Base
from training.errors import UserError
from training.evaluation import scores
from training.evaluation.compare import contact_sheet, standard_error
from training.evaluation.judges.box import Judges
from training.sampling.render import Look, Shot, adapter_bank, render
from training.storage.closed import Closed

if TYPE_CHECKING:
    from training.evaluation.judges.configured import Inception

FOLDER = Path(__file__).parent / "protocols"


class PaperRow(Closed):
    """A row of the paper's table: its scores of a method."""

    model_config = ConfigDict(populate_by_name=True)
    method: str
    dino: float | None = Field(None, alias="DINO")
    clip_i: float | None = Field(None, alias="CLIP-I")
    clip_t: float | None = Field(None, alias="CLIP-T")


class ProtocolPrompts(Closed):
    """The prompts for all subjects, for objects and for live ones."""

    both: tuple[str, ...]
    objects: tuple[str, ...]
    live: tuple[str, ...]


class Protocol(Closed):
    """Subjects with their classes, the prompts of either kind, images a prompt, and the paper's own numbers."""

    name: str
    source: str
    images: int
    paper: tuple[PaperRow, ...]
    objects: dict[str, str]
    live: dict[str, str]
    prompts: ProtocolPrompts

    @property
    def subjects(self) -> dict[str, str]:
        """The class noun of every subject, by its name."""
        return {**self.objects, **self.live}

    def prompts_of(self, subject: str, token: str) -> tuple[str, ...]:
        """The 25 prompts of a subject; an empty token asks for the bare class."""
        own = self.prompts.live if subject in self.live else self.prompts.objects
        filled = (p.format_map({"token": token, "class": self.subjects[subject]}) for p in (*self.prompts.both, *own))
        return tuple(" ".join(prompt.split()) for prompt in filled)


@dataclass(frozen=True)
class JudgedImage:
    """One picture and what it scored. `likeness` is the mean cosine to all photos of its subject."""

    subject: str
    class_name: str
    kind: Literal["object", "live"]
    prompt: str
    seed: int
    likeness: float
    likeness_model: str
    fidelity: float
    fidelity_model: str


@dataclass(frozen=True)
class ProtocolSubject:
    """A subject to be evaluated: its adapter (scale folded in), the token it was trained with, its photos."""

    subject: str
    adapter: Adapter
    token: str
    photos: Sequence[Image.Image]


@dataclass(frozen=True)
class JudgedSubject:
    """One subject done: its rows, its contact sheet (PNG), how alike its real photos are, and Inception's features."""

    subject: str
    rows: tuple[JudgedImage, ...]
    sheet: bytes
    ceiling: float
    drawn_NE: Tensor | None = None
    photos_NE: Tensor | None = None


def load_protocol(name: str) -> Protocol:
    """Raises UserError for a name that is not there."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError(f"Unknown protocol '{name}'. Known: {known}.")
    return Protocol.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def run_protocol(
    base: Base,
    protocol: Protocol,
    sittings: Sequence[ProtocolSubject],
    judges: Judges,
    *,
    look: Look,
    images: int | None = None,
    inception: "Inception | None" = None,
    alive: Callable[[str, int, int], None] | None = None,
) -> Iterator[JudgedSubject]:
    """Evaluates subject after subject; all pictures of one are drawn in mixed batches. `images` a prompt."""
    for sitting in sittings:
        one, pictures = _sit(base, protocol, sitting, judges, look, images or protocol.images, alive)
        if inception is not None:
            # one size, as the photos are at the base's resolution
            one = replace(one, drawn_NE=inception.features(pictures), photos_NE=inception.features(sitting.photos))
        yield one


def _sit(
    base: Base,
    protocol: Protocol,
    sitting: ProtocolSubject,
    judges: Judges,
    look: Look,
    images: int,
    alive: Callable[[str, int, int], None] | None,
) -> tuple[JudgedSubject, list[Image.Image]]:
    prompts = protocol.prompts_of(sitting.subject, sitting.token)
    bare = protocol.prompts_of(sitting.subject, "")
    shots = [Shot(0, 1.0, prompt, seed, look) for prompt in prompts for seed in range(images)]
    bank = adapter_bank(base, [sitting.adapter])
    bank.inject()
    try:
        drawn = render(base, bank, shots, alive=lambda done, n: alive(sitting.subject, done, n) if alive else None)
    finally:
        bank.eject()
    pictures = [drawn[shot] for shot in shots]
    photos_PE = judges.likeness.embed(sitting.photos)
    alike = (judges.likeness.embed(pictures) @ photos_PE.T).mean(1).tolist()
    agreed = judges.fidelity.agree(pictures, [text for text in bare for _ in range(images)]).tolist()
    kind: Literal["object", "live"] = "live" if sitting.subject in protocol.live else "object"
    rows = tuple(
        JudgedImage(
            sitting.subject,
            protocol.subjects[sitting.subject],
            kind,
            shot.prompt,
            shot.seed,
            like,
            judges.likeness.name,
            agree,
            judges.fidelity.name,
        )  # fmt: skip
        for shot, like, agree in zip(shots, alike, agreed, strict=True)
    )
    groups = [(prompt, pictures[at * images : (at + 1) * images]) for at, prompt in enumerate(prompts)]
    return JudgedSubject(sitting.subject, rows, contact_sheet(groups), scores.mutual_likeness(photos_PE)), pictures


def distances(judged: Sequence[JudgedSubject], name: str) -> list[str]:
    """FID and KID of all pictures to all photos, in words with their model's name; empty where nobody measured."""
    drawn = [one.drawn_NE for one in judged if one.drawn_NE is not None]
    real = [one.photos_NE for one in judged if one.photos_NE is not None]
    if not drawn:
        return []
    a_NE, b_NE = torch.cat(drawn), torch.cat(real)
    if min(len(a_NE), len(b_NE)) < 2:
        return [f"FID and KID ({name}) need two photos and two pictures at least"]
    fid = scores.frechet_distance(a_NE, b_NE)
    warning = f" ({fid.warning})" if fid.warning else ""
    return [
        f"FID ({name}) {fid.value:.2f}{warning}",
        f"KID ({name}) {scores.kernel_distance(a_NE, b_NE):.5f}",
    ]


def write_parquet(rows: Sequence[JudgedImage], path: Path) -> None:
    """All rows, one a picture, as Parquet."""
    columns = {name: [getattr(row, name) for row in rows] for name in JudgedImage.__dataclass_fields__}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")


def table(protocol: Protocol, judged: Sequence[JudgedSubject]) -> list[dict[str, str]]:
    """Lines to print: ours first, with the standard error over subjects, then the paper's, each column a model's."""
    rows = [row for one in judged for row in one.rows]
    if not rows:
        return []
    likeness, fidelity = f"likeness ({rows[0].likeness_model})", f"fidelity ({rows[0].fidelity_model})"
    of = {one.subject: one for one in judged}
    ours = {
        "method": f"this base, {len(of)} of {len(protocol.subjects)} subjects",
        likeness: _mean([[row.likeness for row in one.rows] for one in judged]),
        fidelity: _mean([[row.fidelity for row in one.rows] for one in judged]),
    }
    real = {"method": "real photos here", likeness: _mean([[one.ceiling] for one in judged])}
    return [real, ours, *(_paper_line(row) for row in protocol.paper)]


def _paper_line(row: PaperRow) -> dict[str, str]:
    numbers: Mapping[str, float | None] = {"DINO": row.dino, "CLIP-I": row.clip_i, "CLIP-T": row.clip_t}
    said = {name: f"{value:.3f}" for name, value in numbers.items() if value is not None}
    return {"method": f"paper: {row.method}", **said}


def _mean(per_subject: Sequence[Sequence[float]]) -> str:
    """The mean over pictures of the means over subjects, and its standard error over subjects."""
    means = [torch.tensor(values, dtype=torch.float64).nanmean().item() for values in per_subject]
    known = [mean for mean in means if mean == mean]
    return f"{sum(known) / len(known):.3f} ± {standard_error(known):.3f}" if known else "-"

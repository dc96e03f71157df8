"""What every checkpoint of a subject is measured against: its photos, and what the base alone draws.

0 of a scale is what the base alone draws for the class, 1 what the subject's own photos (likeness) or the base's
pictures of the bare class (fidelity) reach.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from training.evaluation import scores
from training.evaluation.exam import Exam, Sheet
from training.evaluation.judges.box import Judges
from training.sampling.render import Shot
from training.storage.card import Score

# Measured on 15 real subjects (docs/evaluation.md): other photos of a subject stay below, copies are above.
COPYING_LIMITS = {"efficientnet-lite0": 0.65}


Drawn = Mapping[Shot, Image.Image]


@dataclass(frozen=True)
class Reference:
    """What every checkpoint of a subject is measured against."""

    photos_PE: Tensor
    judged_by_PE: Tensor  # the photos kept out of training, or all
    copies_PF: Tensor  # the training photos and their mirror images, as spatial features
    faces: list[Tensor]
    floor: float
    ceiling: float
    pres_floor: float
    pres_ceiling: float
    fidelity_floor: float
    fidelity_ceiling: float
    copying_limit: float
    unrelated_NE: Tensor
    bare_prompts: tuple[str, ...]


def measure_reference(exam: Exam, judges: Judges, bare: Sheet, drawn: Drawn) -> Reference:
    """What the scores of a subject are compared with, of its photos and of the pictures of the bare base."""
    photos_PE = judges.likeness.embed(exam.photos)
    held_PE = judges.likeness.embed(exam.held_out) if exam.held_out else None
    judged_by_PE = photos_PE if held_PE is None else held_PE
    bare_images = [[drawn[shot] for shot in group] for group in bare.asked]
    bare_GE = judges.likeness.embed([image for group in bare_images for image in group])
    class_GE = judges.likeness.embed([drawn[shot] for shot in bare.of_class])
    everyone_PE = photos_PE if held_PE is None else torch.cat([photos_PE, held_PE])
    prompts = tuple(group[0].prompt for group in bare.asked)
    floor, ceiling = _fidelity_span(judges, prompts, bare_images)
    faces = judges.face.embed_faces([*exam.photos, *exam.held_out]) if judges.face is not None else []
    found = [face for face in faces if face is not None]
    return Reference(
        photos_PE=photos_PE,
        judged_by_PE=judged_by_PE,
        copies_PF=_with_mirrors(judges, exam.photos),
        # a face in fewer than half of the photos is not what the subject is about
        faces=found if 2 * len(found) >= len(faces) else [],
        floor=scores.likeness(bare_GE, judged_by_PE),
        ceiling=scores.mutual_likeness(photos_PE) if held_PE is None else scores.likeness(photos_PE, held_PE),
        pres_floor=scores.likeness(class_GE, everyone_PE),
        pres_ceiling=scores.mutual_likeness(everyone_PE),
        fidelity_floor=floor,
        fidelity_ceiling=ceiling,
        copying_limit=copying_limit(exam, judges),
        unrelated_NE=judges.likeness.embed([drawn[shot] for shot in bare.unrelated]),
        bare_prompts=prompts,
    )


def _fidelity_span(
    judges: Judges, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> tuple[float, float]:
    """The mean agreement of the base's pictures with the other prompts, and with their own, where the model can judge
    it."""
    firsts = [group[0] for group in images]
    pairs = [(image, prompt) for image in firsts for prompt in prompts]
    agreed = judges.fidelity.agree([image for image, _ in pairs], [prompt for _, prompt in pairs])
    table = agreed.reshape(len(firsts), len(prompts))
    own = mean_known(table.diagonal())
    other = mean_known(table[~torch.eye(len(prompts), dtype=torch.bool)])
    return other or 0.0, 1.0 if own is None else own


def mean_known(values: Tensor) -> float | None:
    """The mean of the values that are numbers; None if none is."""
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None


def _with_mirrors(judges: Judges, photos: Sequence[Image.Image]) -> Tensor:
    mirrored = [ImageOps.mirror(photo) for photo in photos]
    return scores.spatial_features(judges.copying.maps([*photos, *mirrored]))


def copying_limit(exam: Exam, judges: Judges) -> float:
    """What counts as a copy: more alike than the model's limit for real photos, and clearly more than any two photos of
    this subject are."""
    if exam.spec.evaluate.max_copying is not None:
        return exam.spec.evaluate.max_copying
    both_PF = _with_mirrors(judges, [*exam.photos, *exam.held_out])
    plain_PF, mirrored_PF = both_PF.chunk(2)
    return limit_above(COPYING_LIMITS.get(judges.copying.name, 0.0), plain_PF, mirrored_PF)


def limit_above(least: float, plain_PF: Tensor, mirrored_PF: Tensor) -> float:
    """At least `least`, and a third of the way from the two photos that are most alike to a photo and itself."""
    cosines_PP = torch.maximum(plain_PF @ plain_PF.T, plain_PF @ mirrored_PF.T).fill_diagonal_(-1)
    nearest = cosines_PP.max().item() if len(plain_PF) > 1 else 0.0
    return max(least, nearest + (1 - nearest) / 3)


def landmarks(reference: Reference, judges: Judges) -> list[Score]:
    """What the scores of every step are to be read against."""
    alike = judges.likeness.name
    return [
        score_of("likeness_of_the_base", reference.floor, alike),
        score_of("likeness_of_photos", reference.ceiling, alike),
        score_of("fidelity_of_other_prompts", reference.fidelity_floor, judges.fidelity.name),
        score_of("fidelity_of_the_base", reference.fidelity_ceiling, judges.fidelity.name),
        score_of("pres_of_the_base", reference.pres_floor, alike),
        score_of("copying_limit", reference.copying_limit, f"{judges.copying.name} map"),
    ]


def score_of(name: str, value: float, model: str, step: int | None = None) -> Score:
    """A score, rounded to four places."""
    return Score(name=name, value=round(value, 4), model=model, step=step)

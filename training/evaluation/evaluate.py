"""Judging subjects: pictures of all checkpoints of all subjects in mixed batches, their scores, and the chosen step.

Every subject is judged against itself: 0 is what the base alone draws for the class, 1 what the subject's own photos
(for likeness) or the base's pictures of the bare class (for fidelity) reach. So the choice means the same under any
model. What a subject scores does not depend on its company.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from training.base.base import Base
from training.evaluation import scores
from training.evaluation.choose import Candidate, Choice, choose
from training.evaluation.exam import Exam, Sheet, draw_list, prompts_of
from training.evaluation.judges.box import Judges
from training.evaluation.reference import Drawn, Reference, landmarks, mean_known, measure_reference, score_of
from training.manifest.subject import SubjectSpec
from training.sampling.render import BARE, adapter_bank, render
from training.storage.card import Score

MAX_SLOTS = 64


@dataclass(frozen=True)
class Evaluation:
    """What was found. `scores` of a step carry it; those without a step are floors, ceilings and limits.

    `pictures[step]` are one a prompt, in the order of `prompts`; `bare` is what the base alone draws for them.
    """

    id: str
    scores: tuple[Score, ...]
    choice: Choice
    candidates: tuple[Candidate, ...]
    prompts: tuple[str, ...]
    pictures: Mapping[int, tuple[Image.Image, ...]] = field(default_factory=dict)
    bare: tuple[Image.Image, ...] = ()

    def of_step(self, step: int) -> tuple[Score, ...]:
        """The scores of one step."""
        return tuple(score for score in self.scores if score.step == step)


def evaluate_subjects(
    base: Base,
    exams: Sequence[Exam],
    judges: Callable[[SubjectSpec], Judges],
    *,
    rows: int = 32,
    alive: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Judges subjects together, in as few batches as there can be. `alive(done, all)` pictures, after each batch."""
    found: list[Evaluation] = []
    for group in _groups(exams):
        adapters = [adapter for exam in group for adapter in exam.checkpoints.values()]
        bank = adapter_bank(base, adapters)
        sheets: list[tuple[dict[int, Sheet], Sheet]] = []
        slot = 0
        for exam in group:
            made = {}
            for step in exam.checkpoints:
                made[step], slot = draw_list(exam.spec, slot), slot + 1
            sheets.append((made, draw_list(exam.spec, BARE)))
        shots = [shot for worn, bare in sheets for sheet in (*worn.values(), bare) for shot in sheet.all]
        bank.inject()
        try:
            drawn = render(base, bank, shots, rows=rows, alive=alive)
        finally:
            bank.eject()
        for exam, (worn, bare) in zip(group, sheets, strict=True):
            found.append(_judge(exam, judges(exam.spec), worn, bare, drawn))
    return found


def _groups(exams: Sequence[Exam]) -> list[list[Exam]]:
    """Exams whose checkpoints fit into one bank."""
    groups: list[list[Exam]] = []
    held = MAX_SLOTS + 1
    for exam in exams:
        if held + len(exam.checkpoints) > MAX_SLOTS:
            groups.append([])
            held = 0
        groups[-1].append(exam)
        held += len(exam.checkpoints)
    return groups


def _judge(exam: Exam, judges: Judges, worn: Mapping[int, Sheet], bare: Sheet, drawn: Drawn) -> Evaluation:
    reference = measure_reference(exam, judges, bare, drawn)
    found: list[Score] = landmarks(reference, judges)
    candidates = []
    for step, sheet in worn.items():
        of_step = {score.name: score for score in _score(exam, judges, reference, sheet, drawn, step)}
        candidate = _candidate(exam.spec, reference, of_step, step)
        of_step["balance"] = score_of(
            "balance", candidate.balance, f"{judges.likeness.name}, {judges.fidelity.name}", step
        )
        found += of_step.values()
        candidates.append(candidate)
    return Evaluation(
        id=exam.spec.id,
        scores=tuple(found),
        choice=choose(candidates, keep_last=exam.spec.evaluate.keep_last),
        candidates=tuple(candidates),
        prompts=prompts_of(exam.spec),
        pictures={step: tuple(drawn[group[0]] for group in sheet.asked) for step, sheet in worn.items()},
        bare=tuple(drawn[group[0]] for group in bare.asked),
    )


def _score(exam: Exam, judges: Judges, reference: Reference, sheet: Sheet, drawn: Drawn, step: int) -> list[Score]:
    """All scores of one checkpoint but the balance."""
    groups = [[drawn[shot] for shot in group] for group in sheet.asked]
    images = [image for group in groups for image in group]
    prompts = [prompt for prompt, group in zip(reference.bare_prompts, groups, strict=True) for _ in group]
    embedded = judges.likeness.embed(images)
    class_GE = judges.likeness.embed([drawn[shot] for shot in sheet.of_class])
    other_NE = judges.likeness.embed([drawn[shot] for shot in sheet.unrelated])
    everyone_PE = torch.cat([reference.photos_PE, reference.judged_by_PE]) if exam.held_out else reference.photos_PE
    pres = scores.likeness(class_GE, everyone_PE)
    seeds = diversity_groups(embedded, [len(group) for group in groups])
    alike, copies = judges.likeness.name, scores.spatial_features(judges.copying.maps(images))
    values: list[tuple[str, float | None, str]] = [
        ("likeness", scores.likeness(embedded, reference.judged_by_PE), alike),
        ("likeness_training", scores.likeness(embedded, reference.photos_PE), alike),
        ("fidelity", mean_known(judges.fidelity.agree(images, prompts)), judges.fidelity.name),
        ("diversity", scores.diversity(seeds), alike),
        ("pres", pres, alike),
        ("class_drift", scores.share(pres, reference.pres_floor, reference.pres_ceiling), alike),
        ("copying", scores.copying(copies, reference.copies_PF), f"{judges.copying.name} map"),
        ("language_drift", scores.drift(other_NE, reference.unrelated_NE), alike),
        ("sharpness", sum(map(scores.detail, images)) / len(images), "laplacian"),
        ("saturation", sum(map(scores.saturation, images)) / len(images), "hsv"),
        ("identity", _identity(judges, reference, images), judges.face.name if judges.face else ""),
    ]
    return [score_of(name, value, model, step) for name, value, model in values if value is not None]


def diversity_groups(embedded_NE: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of each prompt."""
    return list(embedded_NE.split(list(sizes)))


def _identity(judges: Judges, reference: Reference, images: Sequence[Image.Image]) -> float | None:
    """The mean cosine of faces in pictures to faces in photos; None if either has none."""
    if judges.face is None or not reference.faces:
        return None
    drawn = [face for face in judges.face.embed_faces(images) if face is not None]
    return scores.likeness(torch.stack(drawn), torch.stack(reference.faces)) if drawn else None


def _candidate(spec: SubjectSpec, reference: Reference, of_step: Mapping[str, Score], step: int) -> Candidate:
    # prompts that nobody can judge take no part in the choice
    fidelity = of_step["fidelity"].value if "fidelity" in of_step else reference.fidelity_ceiling
    return Candidate(
        step=step,
        likeness=scores.share(of_step["likeness"].value, reference.floor, reference.ceiling),
        fidelity=scores.share(fidelity, reference.fidelity_floor, reference.fidelity_ceiling),
        drift=of_step["class_drift"].value,
        drift_limit=spec.evaluate.max_class_drift,
        copying=of_step["copying"].value,
        copying_limit=reference.copying_limit,
    )

"""Judging subjects: pictures of all checkpoints of all subjects in mixed batches, their scores, and the chosen step.

Every subject is judged against itself: 0 is what the base alone draws for the class, 1 what the subject's own photos
(for likeness) or the base's pictures of the bare class (for fidelity) reach. So the choice means the same under any
model. What a subject scores does not depend on its company.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageOps
from torch import Tensor

from training.adapters.adapter import Adapter
from training.base.base import Base
from training.evaluation import scores
from training.evaluation.choose import Candidate, Choice, choose
from training.evaluation.judges.box import Judges
from training.manifest.manifest import SubjectSpec
from training.sampling.render import BARE, Look, Shot, adapter_bank, render
from training.storage.card import Score

PLACES = ("", " in the snow", " at night")
UNRELATED = ("a photo of a cup", "a photo of a car", "a photo of a cat", "a photo of a person")
CLASS_PICTURES, UNRELATED_PICTURES = 2, 1
MAX_SLOTS = 64
# Measured on 15 real subjects (docs/evaluation.md): other photos of a subject stay below, copies are above.
COPYING_LIMITS = {"efficientnet-lite0": 0.65}


@dataclass(frozen=True)
class Exam:
    """A subject to be judged: its photos, those kept out of training, and its checkpoints by step.

    Adapters are as trained; the subject's scale is applied. Photos should be at about the base's resolution.
    """

    spec: SubjectSpec
    photos: Sequence[Image.Image]
    held_out: Sequence[Image.Image]
    checkpoints: Mapping[int, Adapter]


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


@dataclass(frozen=True)
class _Sheet:
    """The shots of one checkpoint, or of the base alone: the subject's, the class's and unrelated ones."""

    asked: tuple[tuple[Shot, ...], ...]  # a tuple a prompt
    of_class: tuple[Shot, ...]
    unrelated: tuple[Shot, ...]

    @property
    def all(self) -> tuple[Shot, ...]:
        return (*(shot for group in self.asked for shot in group), *self.of_class, *self.unrelated)


@dataclass(frozen=True)
class _Reference:
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


def prompts_of(spec: SubjectSpec) -> tuple[str, ...]:
    """The prompts a subject is judged by, filled."""
    asked = spec.evaluate.prompts or tuple(spec.instance_prompt + place for place in PLACES)
    return tuple(spec.fill(prompt) for prompt in asked)


def bare_prompt(spec: SubjectSpec, prompt: str) -> str:
    """The prompt without the words that only the instance prompt has: what it says to those who never met the
    subject."""
    usual = set(spec.filled_class_prompt.split())
    rare = {word for word in spec.filled_instance_prompt.split() if word not in usual}
    return " ".join(word for word in prompt.split() if word not in rare)


def candidate_steps(max_steps: int, count: int) -> tuple[int, ...]:
    """The steps whose checkpoints are compared: `count` evenly spaced ones, the last among them."""
    return tuple(sorted({max(1, round(max_steps * (turn + 1) / count)) for turn in range(count)}))


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
        sheets: list[tuple[dict[int, _Sheet], _Sheet]] = []
        slot = 0
        for exam in group:
            made = {}
            for step in exam.checkpoints:
                made[step], slot = _sheet(exam.spec, slot), slot + 1
            sheets.append((made, _sheet(exam.spec, BARE)))
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


def _sheet(spec: SubjectSpec, slot: int) -> _Sheet:
    asked = spec.evaluate
    look = Look(asked.steps, asked.guidance_scale, spec.train.resolution, spec.negative_prompt)
    scale = spec.lora.scale if slot != BARE else 1.0

    def shots(prompt: str, count: int) -> tuple[Shot, ...]:
        return tuple(Shot(slot, scale, prompt, asked.seed + index, look) for index in range(count))

    prompts = prompts_of(spec)
    if slot == BARE:
        prompts = tuple(bare_prompt(spec, prompt) for prompt in prompts)
    counts = [asked.images + (place == 0) for place in range(len(prompts))]
    others = [prompt for prompt in UNRELATED if (spec.class_ or "") not in prompt.split()][:UNRELATED_PICTURES]
    return _Sheet(
        tuple(shots(prompt, count) for prompt, count in zip(prompts, counts, strict=True)),
        shots(spec.filled_class_prompt, CLASS_PICTURES),
        tuple(shot for prompt in others for shot in shots(prompt, 1)),
    )


Drawn = Mapping[Shot, Image.Image]


def _judge(exam: Exam, judges: Judges, worn: Mapping[int, _Sheet], bare: _Sheet, drawn: Drawn) -> Evaluation:
    reference = _reference(exam, judges, bare, drawn)
    found: list[Score] = _landmarks(reference, judges)
    candidates = []
    for step, sheet in worn.items():
        of_step = {score.name: score for score in _score(exam, judges, reference, sheet, drawn, step)}
        candidate = _candidate(exam.spec, reference, of_step, step)
        of_step["balance"] = _said(
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


def _reference(exam: Exam, judges: Judges, bare: _Sheet, drawn: Drawn) -> _Reference:
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
    return _Reference(
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


def _score(exam: Exam, judges: Judges, reference: _Reference, sheet: _Sheet, drawn: Drawn, step: int) -> list[Score]:
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
    return [_said(name, value, model, step) for name, value, model in values if value is not None]


def diversity_groups(embedded_NE: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of each prompt."""
    return list(embedded_NE.split(list(sizes)))


def _identity(judges: Judges, reference: _Reference, images: Sequence[Image.Image]) -> float | None:
    """The mean cosine of faces in pictures to faces in photos; None if either has none."""
    if judges.face is None or not reference.faces:
        return None
    drawn = [face for face in judges.face.embed_faces(images) if face is not None]
    return scores.likeness(torch.stack(drawn), torch.stack(reference.faces)) if drawn else None


def _candidate(spec: SubjectSpec, reference: _Reference, of_step: Mapping[str, Score], step: int) -> Candidate:
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


def _landmarks(reference: _Reference, judges: Judges) -> list[Score]:
    """What the scores of every step are to be read against."""
    alike = judges.likeness.name
    return [
        _said("likeness_of_the_base", reference.floor, alike),
        _said("likeness_of_photos", reference.ceiling, alike),
        _said("fidelity_of_other_prompts", reference.fidelity_floor, judges.fidelity.name),
        _said("fidelity_of_the_base", reference.fidelity_ceiling, judges.fidelity.name),
        _said("pres_of_the_base", reference.pres_floor, alike),
        _said("copying_limit", reference.copying_limit, f"{judges.copying.name} map"),
    ]


def _said(name: str, value: float, model: str, step: int | None = None) -> Score:
    return Score(name=name, value=round(value, 4), model=model, step=step)

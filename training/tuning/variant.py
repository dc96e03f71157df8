"""A variant of the tuned subjects: the settings that are tried, the scores at its rungs, and how it ended. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from statistics import fmean
from typing import Literal

from training.evaluation.choose import Candidate
from training.manifest.subject import SubjectSpec
from training.tuning.space import Settings, with_settings

RUNGS = (0.25, 0.5, 1.0)  # shares of the steps at which variants are compared


@dataclass(frozen=True)
class Rung:
    """What a variant scored at a step, the mean over its subjects. `alarms`: what speaks against it, in words.

    `cosine`: the likeness as it was measured; `likeness` is 0 below what the base alone draws.
    """

    step: int
    score: float
    balance: float
    likeness: float
    fidelity: float
    drift: float
    cosine: float
    alarms: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[float, float]:
        """What is compared: while nothing is like the subject yet, all scores are 0, and the cosine decides."""
        return self.score, self.cosine


@dataclass
class Variant:
    """One set of settings, tried on every tuned subject. `reason`: why it failed."""

    number: int
    settings: Settings
    specs: tuple[SubjectSpec, ...]
    rungs: list[Rung] = field(default_factory=list)
    state: Literal["training", "dropped", "finished", "failed"] = "training"
    reason: str = ""

    @property
    def ids(self) -> list[str]:
        """What the pack calls its members, one a subject."""
        return [f"{self.number}/{spec.id}" for spec in self.specs]

    def spec_of(self, id: str) -> SubjectSpec:
        """The subject of a member, with the settings that are tried."""
        return with_settings(self.specs[self.ids.index(id)], self.settings)

    @property
    def rank_key(self) -> tuple[bool, int, tuple[float, float]]:
        """What the ranking goes by: failed ones are last, then how far it came, then the score there."""
        last = self.rungs[-1] if self.rungs else None
        return self.state != "failed", last.step if last else 0, last.key if last else (0.0, 0.0)


def rung_steps(max_steps: int) -> tuple[int, ...]:
    """The steps at which variants are compared, the last one among them."""
    return tuple(sorted({ceil(share * max_steps) for share in RUNGS}))


def score_of_step(candidate: Candidate) -> float:
    """The balance of likeness and fidelity; of a step with an alarm minus how far it is above the limit, so that any
    step without one is better."""
    return -candidate.excess if candidate.alarms else candidate.balance


def rung_of(step: int, candidates: Mapping[str, Candidate], cosine: float = 0.0) -> Rung:
    """The rung of a variant from what each of its subjects, by id, scored there, and their mean measured likeness."""
    found = candidates.values()
    alone = len(candidates) == 1
    return Rung(
        step=step,
        score=fmean(map(score_of_step, found)),
        balance=fmean(one.balance for one in found),
        likeness=fmean(one.likeness for one in found),
        fidelity=fmean(one.fidelity for one in found),
        drift=fmean(one.drift for one in found),
        cosine=cosine,
        alarms=tuple(a if alone else f"{id}: {a}" for id, one in candidates.items() for a in one.alarms),
    )


def goes_on(variant: Variant, variants: Sequence[Variant]) -> bool:
    """Whether a variant is in the better half of all that were scored at its step so far; of equals the first ones."""
    step = variant.rungs[-1].step
    keys = [(rung.key, -one.number) for one in variants for rung in one.rungs if rung.step == step]
    mine = variant.rungs[-1].key, -variant.number
    return sum(key > mine for key in keys) < ceil(len(keys) / 2)


def ranked(variants: Sequence[Variant]) -> list[Variant]:
    """The best first; of equals the one that was asked first."""
    return sorted(variants, key=lambda one: (one.rank_key, -one.number), reverse=True)


def best_of(variants: Sequence[Variant]) -> Variant | None:
    """The best of those that were trained to their end; None if none was."""
    return next((one for one in ranked(variants) if one.state == "finished"), None)


def planned_steps(variants: int, subjects: int, max_steps: int) -> int:
    """Optimizer steps of a search in which every rung halves the variants."""
    total, before = 0, 0
    for step in rung_steps(max_steps):
        total += variants * subjects * (step - before)
        variants, before = ceil(variants / 2), step
    return total

"""What a manifest says about judging: how checkpoints are compared (`evaluate`) and what is good enough (`publish_if`).

Pure data; knows no torch. `manifest.py` holds one of each per subject.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import BeforeValidator, Field

from training.manifest.axes import AXES
from training.storage.closed import Closed

_CONDITION = re.compile(r"\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*")


LikenessModel = Literal["auto", "efficientnet-lite0", "pocket-judge", "base", "clip", "dino", "dinov2"]
FidelityModel = Literal["auto", "pocket-judge", "base", "clip"]


class EvaluateSpec(Closed):
    """How a subject's checkpoints are judged, and which one is published."""

    enabled: bool = True
    keep_last: bool = Field(False, description="publish the last step; the scores only inform")
    hold_out: int = Field(
        1, ge=0, le=20, description="photos kept out of training to judge by, as long as `min_images` stay"
    )
    candidates: int = Field(3, ge=1, le=50, description="checkpoints compared, spread over the latter steps")
    prompts: tuple[str, ...] = Field(
        (),
        max_length=64,
        description="what is judged; {class} is filled; the instance prompt, in the snow and at night else",
    )
    images: int = Field(1, ge=1, le=64, description="pictures a prompt; the first prompt has one more")
    steps: int = Field(8, ge=1, le=1000, description="denoising steps a picture")
    guidance_scale: float = Field(3.0, ge=0, le=50)
    seed: int = Field(0, ge=0, lt=2**63)
    likeness_model: LikenessModel = "auto"
    fidelity_model: FidelityModel = "auto"
    max_class_drift: float = Field(0.5, ge=0, le=1, description="`class_drift` above it rejects a checkpoint")
    max_copying: float | None = Field(
        None, ge=-1, le=1, description="`copying` above it rejects a checkpoint; calibrated by model and photos else"
    )
    early_stop: bool = Field(False, description="stop when the loss on one fixed batch no longer varies (DVAR)")
    early_stop_window: int = Field(440, ge=10, description="steps that are looked at")
    early_stop_variance: float = Field(0.4, gt=0, lt=1, description="share of all variance below which it stops")


class Condition(NamedTuple):
    """`>= 0.5`, taken apart."""

    sign: Literal[">=", "<=", ">", "<"]
    bound: float

    def holds(self, value: float) -> bool:
        """Whether a score meets the condition."""
        return {
            ">=": value >= self.bound,
            "<=": value <= self.bound,
            ">": value > self.bound,
            "<": value < self.bound,
        }[self.sign]


def parse_condition(text: str) -> Condition:
    """Raises ValueError for anything but a sign and a number."""
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise ValueError(f"'{text}' is no condition; write a sign and a number, such as '>= 0.5' or '< 0.3'")
    sign, bound = found.groups()
    return Condition(sign, float(bound))  # type: ignore[arg-type]


def _checked(text: object) -> str:
    parse_condition(str(text))
    return str(text)


GateRule = Annotated[str, BeforeValidator(_checked)]


class GateSpec(Closed):
    """`publish_if`: conditions on the scores of the chosen step. All must hold, and each score must be there."""

    likeness: GateRule | None = None
    likeness_training: GateRule | None = None
    fidelity: GateRule | None = None
    diversity: GateRule | None = None
    pres: GateRule | None = None
    class_drift: GateRule | None = None
    copying: GateRule | None = None
    identity: GateRule | None = None
    sharpness: GateRule | None = None
    saturation: GateRule | None = None
    language_drift: GateRule | None = None
    balance: GateRule | None = None

    @property
    def conditions(self) -> dict[str, Condition]:
        """The conditions that are set, by the score's name."""
        return {name: parse_condition(text) for name, text in self if text is not None}


class Scored(Protocol):
    """A score as the gate reads it; `training.storage.card.Score` is one."""

    @property
    def name(self) -> str:
        """What was measured."""

    @property
    def value(self) -> float:
        """The number."""

    @property
    def model(self) -> str:
        """The model that gave it."""


def failures(gate: GateSpec, scores: Sequence[Scored]) -> list[str]:
    """Every condition that the scores of one step do not meet, in words; empty if the subject may be published."""
    by_name: Mapping[str, Scored] = {score.name: score for score in scores}
    found = []
    for name, condition in gate.conditions.items():
        asked = f"asked is {condition.sign} {condition.bound:g}"
        score = by_name.get(name)
        if score is None:
            found.append(f"{name} was not measured, {asked}")
        elif not condition.holds(score.value):
            found.append(f"{name} is {score.value:.3f} ({score.model}), {asked}; {AXES[name].advice}")
    return found


def gate_reason(found: Sequence[str]) -> str:
    """The reason of a subject that fails the gate."""
    return f"below the gate: {'. '.join(found)}. Its checkpoints stay with the run."

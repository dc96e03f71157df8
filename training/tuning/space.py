"""The space of a search: which settings of a subject are varied, and between which values. Pure; knows no torch.

Only settings that may differ within one pack are here: what changes a pack's profile (resolution, precision, targets)
is not searched. Settings are named as in the manifest: `train.learning_rate`.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from training.errors import UserError
from training.manifest.subject import SubjectSpec

FACTOR = 4  # a rate or a weight is searched from a quarter of the subject's own to four times that
HIGHEST_RATE, HIGHEST_WEIGHT, HIGHEST_RANK = 10.0, 100.0, 320  # what a manifest allows
SCHEDULERS = ("constant", "linear", "cosine")

Setting = float | int | str
Settings = Mapping[str, Setting]


class Between(NamedTuple):
    """Any value from `low` to `high`, tried on a log scale."""

    low: float
    high: float


class OneOf(NamedTuple):
    """One of these values; `ordered`: they are ever larger."""

    values: tuple[Setting, ...]
    ordered: bool


Axis = Between | OneOf


@dataclass(frozen=True)
class Space:
    """What is varied, by the setting's name in the manifest. `own`: the subject's own values, each within its axis."""

    axes: Mapping[str, Axis]
    own: Settings


def own_setting(spec: SubjectSpec, name: str) -> Any:
    """The value of a subject's setting: `train.learning_rate`."""
    part, key = name.split(".")
    return getattr(getattr(spec, part), key)


def with_settings(spec: SubjectSpec, settings: Settings) -> SubjectSpec:
    """The same subject with other settings."""
    for name, value in settings.items():
        part, key = name.split(".")
        changed = getattr(spec, part).model_copy(update={key: value})
        spec = spec.model_copy(update={part: changed})
    return spec


def space_around(spec: SubjectSpec, vary: Sequence[str] = (), max_rank: int | None = None) -> Space:
    """The space around a subject's own settings: all that may be varied, or those of `vary`.

    `vary` names settings with or without their part (`train.learning_rate`, `learning_rate`); `max_rank` is the highest
    rank tried, twice the subject's own by default. Raises UserError for a setting that is not known, or that cannot be
    varied for this subject.
    """
    own_rank = spec.lora.rank
    if max_rank is not None and not own_rank <= max_rank <= HIGHEST_RANK:
        raise UserError(
            f"The highest rank to try is {max_rank}; allowed are {own_rank} (the rank of subject '{spec.id}') to "
            f"{HIGHEST_RANK}. Give such a rank, or lower `lora.rank`."
        )
    wanted = [_known(name) for name in vary]
    axes: dict[str, Axis] = {}
    for name in SEARCHED:
        if wanted and name not in wanted:
            continue
        found = _axis(name, spec, max_rank or 2 * own_rank)
        if not isinstance(found, str):
            axes[name] = found
        elif wanted:
            raise UserError(f"`{name}` of subject '{spec.id}' cannot be varied: {found}. Leave it out of what varies.")
    return Space(axes, {name: own_setting(spec, name) for name in axes})


def _known(name: str) -> str:
    """The whole name of a setting that is searched."""
    found = [known for known in SEARCHED if name in (known, known.split(".")[1])]
    if found:
        return found[0]
    names = [*SEARCHED, *(known.split(".")[1] for known in SEARCHED)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    raise UserError(
        f"'{name}' is no setting that is searched. "
        + (f"Did you mean '{near[0]}'? " if near else "")
        + f"Known are {', '.join(SEARCHED)}."
    )


def _axis(name: str, spec: SubjectSpec, max_rank: int) -> Axis | str:
    """Between which values a setting is tried, or why it cannot be."""
    return SEARCHED[name](spec, max_rank)


def _rate(spec: SubjectSpec, _max_rank: int) -> Axis | str:
    return _around(spec.train.learning_rate, HIGHEST_RATE)


def _text_rate(spec: SubjectSpec, _max_rank: int) -> Axis | str:
    if not spec.lora.text_encoder:
        return "no text encoder is trained"
    return _around(spec.train.text_encoder_learning_rate, HIGHEST_RATE)


def _rank(spec: SubjectSpec, max_rank: int) -> Axis | str:
    own = spec.lora.rank
    lower = [own // 4, own // 2, own]
    higher = [own * 2**doubling for doubling in range(1, 10)]
    ranks = tuple(sorted({rank for rank in (*lower, *higher) if 1 <= rank <= min(max_rank, HIGHEST_RANK)}))
    return OneOf(ranks, ordered=True) if len(ranks) > 1 else f"only rank {own} is left to try"


def _weight(spec: SubjectSpec, _max_rank: int) -> Axis | str:
    return _around(spec.prior.weight, HIGHEST_WEIGHT) if spec.prior.enabled else "`prior.enabled` is false"


def _target(spec: SubjectSpec, _max_rank: int) -> Axis | str:
    if not spec.prior.enabled:
        return "`prior.enabled` is false"
    if spec.prior.source == "prediction":
        return "`prior.source: prediction` has no class images"
    return OneOf(("image", "prediction"), ordered=False)


def _scheduler(spec: SubjectSpec, _max_rank: int) -> Axis | str:
    return OneOf(tuple(dict.fromkeys((*SCHEDULERS, spec.train.lr_scheduler))), ordered=False)


def _around(own: float, highest: float) -> Axis | str:
    return Between(own / FACTOR, min(own * FACTOR, highest)) if own > 0 else "it is 0"


SEARCHED: Mapping[str, Callable[[SubjectSpec, int], Axis | str]] = {
    "train.learning_rate": _rate,
    "train.text_encoder_learning_rate": _text_rate,
    "lora.rank": _rank,
    "prior.weight": _weight,
    "prior.target": _target,
    "train.lr_scheduler": _scheduler,
}

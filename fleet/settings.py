"""From what a client sends to a subject's settings, checked as far as that goes without training."""

import math
import re
from collections.abc import Mapping
from typing import Any

from fleet.config import FleetSpec
from serving.http.problems import ApiError
from training.base.files.outline import Outline
from training.errors import UserError
from training.manifest.manifest import parse_subject
from training.manifest.plan import unmatched_targets
from training.manifest.subject import SubjectSpec, TrainSpec
from training.photos.files import UPLOADED

# OpenAI's names, and what else people call a setting
_ALIASES = {"steps": "max_steps"}
_AUTO = "auto"


def subject_of(
    id: str,
    images: str,
    settings: Mapping[str, Any],
    hyperparameters: Mapping[str, Any],
    seed: int | None,
    photos: int,
) -> SubjectSpec:
    """A job's subject. `settings` are a subject's of a manifest; `hyperparameters` those of its training by their own
    names or OpenAI's; `photos` is how many there are. Raises ApiError that names the field."""
    given = dict(settings)
    extra = dict(given.pop("hyperparameters", None) or {}) | dict(hyperparameters)
    for name in ("id", "images"):
        if name in given:
            field = "suffix" if name == "id" else "training_file"
            raise ApiError(400, f"'{name}' is said by `{field}`; leave it out here.", param=_where(name))
    train, lora = dict(given.get("train") or {}), dict(given.get("lora") or {})
    _spread(extra, train, lora, photos)
    if seed is not None:
        train["seed"] = seed
    given |= ({"train": train} if train else {}) | ({"lora": lora} if lora else {})
    try:
        return parse_subject({**given, "id": id, "images": images})
    except UserError as error:
        raise ApiError(400, str(error), param="method.dreambooth_lora") from None


def check_subject(subject: SubjectSpec, base: Outline, spec: FleetSpec) -> None:
    """Raises ApiError for what this fleet does not train or serve."""
    if wrong := unmatched_targets(subject, base):
        raise ApiError(
            400,
            f"Subject '{subject.id}': no layer of base '{base.name}' ends with target {wrong[0]!r}. Use names such as "
            "to_q, to_k, to_v, to_out.0.",
            param="lora.targets",
        )
    if lacks := spec.server.engine.flags_for(subject.lora.rank, len(subject.words.tokens)):
        raise ApiError(
            400,
            f"Subject '{subject.id}' makes an adapter that this server does not take: it was started without {lacks}. "
            f"It takes ranks up to {spec.server.engine.rank} and {spec.server.engine.words} words.",
            param="lora.rank",
        )
    if subject.train.max_steps > spec.limits.max_steps:
        raise ApiError(
            400,
            f"Subject '{subject.id}': {subject.train.max_steps} steps; at most {spec.limits.max_steps} are allowed.",
            param="train.max_steps",
        )
    if subject.prior.folder is not None:
        raise ApiError(
            400,
            f"Subject '{subject.id}': `prior.folder` names a folder of the server. Use `source: generate`.",
            param="prior.folder",
        )
    if not subject.images.startswith(UPLOADED) and not any(subject.images.startswith(one) for one in spec.uris if one):
        allowed = f" or a URI that begins with {', '.join(spec.uris)}" if spec.uris else ""
        raise ApiError(
            400,
            f"Subject '{subject.id}': images '{subject.images[:80]}': give the id of an uploaded file{allowed}.",
            param="images",
        )


def default_id(filename: str) -> str:
    """An adapter's id made of a file's name."""
    stem = filename.rpartition("/")[2].split(".")[0].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")[:40] or "subject"


def _spread(extra: dict[str, Any], train: dict[str, Any], lora: dict[str, Any], photos: int) -> None:
    """Puts hyperparameters where a manifest has them."""
    extra = {_ALIASES.get(name, name): value for name, value in extra.items() if value not in (None, _AUTO)}
    epochs, faster = extra.pop("n_epochs", None), extra.pop("learning_rate_multiplier", None)
    for name, value in extra.items():
        if name in ("rank", "alpha"):
            lora[name] = value
        elif name in TrainSpec.model_fields:
            train[name] = value
        else:
            known = ", ".join(
                sorted(["n_epochs", "learning_rate_multiplier", "rank", "alpha", *TrainSpec.model_fields])
            )
            raise ApiError(400, f"Unknown hyperparameter '{name}'. Known: {known}.", param=f"hyperparameters.{name}")
    if epochs is not None:
        train.setdefault("max_steps", _epochs(epochs, photos, train.get("batch_size", 1)))
    if faster is not None:
        rate = train.get("learning_rate", TrainSpec.model_fields["learning_rate"].default)
        if not isinstance(faster, int | float) or isinstance(faster, bool) or not isinstance(rate, int | float):
            raise ApiError(
                400, f"{faster!r} is no number.", param="hyperparameters.learning_rate_multiplier", code="invalid_type"
            )
        train["learning_rate"] = rate * faster


def _epochs(epochs: Any, photos: int, batch: Any) -> int:
    """Optimizer steps of so many rounds through the photos."""
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ApiError(
            400, f"n_epochs is {epochs!r}; a whole number from 1 is allowed.", param="hyperparameters.n_epochs"
        )
    return epochs * math.ceil(photos / (batch if isinstance(batch, int) and batch > 0 else 1))


def _where(name: str) -> str:
    return f"method.dreambooth_lora.{name}"

"""Law 8: whatever goes wrong with one subject is a result, a kind and a reason; it costs no other subject a step.

Knows no torch. A broken gang is no subject's fault: `GangBroken` is raised on, and the gang starts again.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from training.errors import GangBroken, SubjectFailed, TooLarge, UserError
from training.run.source import EndKind
from training.storage.interface import StorageError

log = logging.getLogger(__name__)
Produced = TypeVar("Produced")
Failed = Callable[[str, Exception], None]


class Failure(NamedTuple):
    """Why a subject ends without an adapter."""

    kind: EndKind
    reason: str


def apart(ids: Sequence[str], work: Callable[[str], Produced], failed: Failed) -> dict[str, Produced]:
    """Does `work` for each subject; returns the results by id. `failed` is called with id and error of a failure."""
    made: dict[str, Produced] = {}
    for id in ids:
        try:
            made[id] = work(id)
        except GangBroken:
            raise
        except Exception as error:
            if kind_of(error) == "unknown":
                log.exception("subject %s", id)
            trouble = error
        else:
            continue
        failed(id, trouble)
    return made


def together(
    ids: Sequence[str], work: Callable[[Sequence[str]], Mapping[str, Produced]], failed: Failed
) -> dict[str, Produced]:
    """As `apart`, for work that is done for all subjects at once. Where that fails, it is done for each alone."""
    if len(ids) > 1:
        try:
            return dict(work(ids))
        except GangBroken:
            raise
        except Exception:
            log.exception("subjects %s together; each is tried alone", ", ".join(ids))
    return apart(ids, lambda id: work([id])[id], failed)


def failure_of(error: Exception, what: str) -> Failure:
    """The failure of a subject with `error`. `what` could not be done: it goes before errors that no code expects."""
    kind, reason = kind_of(error), reason_of(error)
    return Failure(kind, f"{what}: {reason}" if kind == "unknown" else reason)


def kind_of(error: Exception) -> EndKind:
    """How a subject that failed with `error` ends: "bad subject" where a second attempt would fail in the same way."""
    if isinstance(error, TooLarge):
        return "too large"
    expected = isinstance(error, UserError | SubjectFailed) and not isinstance(error, StorageError)
    return "bad subject" if expected else "unknown"


def reason_of(error: Exception) -> str:
    """The message of an error that is meant for users; type and message of any other."""
    if isinstance(error, UserError | SubjectFailed | TooLarge):
        return str(error)
    return f"{type(error).__name__}: {error}"

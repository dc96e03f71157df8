"""Errors as a client sees them: OpenAI's envelope, and the HTTP status of each kind of error."""

import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serving.errors import (
    AdapterUnavailable,
    DeadlineExceeded,
    GenerationFailed,
    NetworkUnavailable,
    NotReady,
    QueueFull,
    QuotaExceeded,
    Withheld,
)
from serving.http.replies import KeyReused
from training.base.safety import Unsafe
from training.errors import UserError
from training.storage.consents import Revoked
from training.storage.registry import CorruptAdapter, CurrentVersion
from training.storage.storage import StorageError
from training.storage.version import UnknownAdapter

logger = logging.getLogger(__name__)
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")  # of the request that is being handled
# OpenAI's names of what pydantic finds; `{}` is integer or decimal
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "greater_than": "{}_below_min_value",
    "greater_than_equal": "{}_below_min_value",
    "less_than": "{}_above_max_value",
    "less_than_equal": "{}_above_max_value",
    "string_too_long": "string_above_max_length",
    "string_too_short": "string_below_min_length",
    "too_long": "array_above_max_length",
    "too_short": "array_below_min_length",
    "json_invalid": "invalid_json",
}


class ApiError(Exception):
    """An error with its status and envelope."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(status, message, param, code or ("invalid_value" if status == 400 and param else None))


@dataclass(frozen=True, slots=True)
class Problem:
    """An HTTP status and what goes into the envelope."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's envelope: `{"error": {message, type, param, code}}`."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "insufficient_quota" if self.code == "insufficient_quota" else "requests"
        return {
            "error": {"message": _whole(self.message), "type": kind, "param": _whole(self.param), "code": self.code}
        }


def describe(error: BaseException) -> Problem:
    """The problem that any exception is. An unexpected one is logged, and the client does not get its text."""
    match error:
        case ApiError():
            return error.problem
        case QueueFull():
            wait = {"Retry-After": str(max(1, ceil(error.retry_after_s)))}
            return Problem(429, str(error), code="rate_limit_exceeded", headers=wait)
        case QuotaExceeded():  # OpenAI's clients repeat a 429 unless they are told not to
            return Problem(429, str(error), code="insufficient_quota", headers={"x-should-retry": "false"})
        case Withheld() | Revoked():
            return Problem(410, str(error), param="adapters", code="adapter_withdrawn")
        case Unsafe():
            return Problem(400, str(error), code="content_policy_violation")
        case NotReady():
            return Problem(503, str(error), code="not_ready", headers={"Retry-After": "2"})
        case DeadlineExceeded():
            return Problem(504, str(error), code="deadline_exceeded")
        case AdapterUnavailable():
            return Problem(422, str(error), param="adapters", code="adapter_unavailable")
        case NetworkUnavailable():
            return Problem(422, str(error), code="network_unavailable")
        case CorruptAdapter():
            return Problem(422, str(error), code="adapter_damaged")
        case CurrentVersion():
            return Problem(409, str(error), param="version", code="version_is_current")
        case UnknownAdapter():
            return Problem(404, str(error), code="adapter_not_found")
        case KeyReused():
            message = "This Idempotency-Key was used for another request."
            return Problem(422, message, param="Idempotency-Key", code="idempotency_error")
        case StorageError():
            logger.error("request %s: storage: %s", REQUEST_ID.get(), error)
            return Problem(
                503, "The storage cannot be reached; try again.", code="storage", headers={"Retry-After": "5"}
            )
        case GenerationFailed():
            logger.error("request %s: %s", REQUEST_ID.get(), error)  # the engine's own log has the traceback
            return Problem(500, str(error), code="generation_failed")
        case UserError():
            return Problem(400, str(error))
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return Problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case _:
            name = REQUEST_ID.get()
            logger.error("request %s: unexpected error", name, exc_info=error)
            return Problem(
                500, f"Something went wrong on the server; its log says what, at request {name}.", code="internal"
            )


def _invalid(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """The problem of an invalid body: `param` is the field of the first error, the message lists all."""
    told = []
    for error in errors[:8]:
        where = _field(error)
        if error["type"] == "extra_forbidden":
            told.append(f"Unknown field '{where}'.")
        elif error["type"] == "json_invalid":
            told.append(f"The body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}.")
        elif error["type"] == "string_unicode":
            told.append(f"'{where}' is no Unicode text: it holds half of a character (a lone surrogate).")
        elif error["type"] == "missing":
            told.append(f"'{where}' is missing.")
        else:
            told.append(f"'{where}': {error['msg']}, got {_short(error.get('input'))}.")
    if not errors:
        return Problem(400, "The request is not valid.")
    return Problem(400, " ".join(told), param=_field(errors[0]), code=_code(errors[0]))


def _code(error: Mapping[str, Any]) -> str:
    """What OpenAI calls this error."""
    kind = error["type"]
    if kind.endswith(("_type", "_parsing")):
        return "invalid_type"
    return _CODES.get(kind, "invalid_value").format("decimal" if isinstance(error.get("input"), float) else "integer")


def _field(error: Mapping[str, Any]) -> str:
    """`adapters.0.weight` for a location within the body."""
    where, *parts = (str(part) for part in error["loc"])  # body, query, path or header, and the way into it
    return ".".join(parts) or where


def _short(value: object) -> str:
    shown = repr(value[:80] if isinstance(value, str) else value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _whole(text: str | None) -> str | None:
    """`text` as a reply can hold it: lone surrogates that a client sent are shown as escapes."""
    return None if text is None else text.encode(errors="backslashreplace").decode()

"""Command-line flags made from the fields of a spec, so that every setting has one. Knows no torch."""

import functools
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from training.errors import UserError
from training.storage.closed import Closed

Command = TypeVar("Command", bound=Callable[..., Any])


def flags(spec: type[Closed], argument: str, only: Sequence[str] = ()) -> Callable[[Command], Command]:
    """A decorator: one flag for each field of `spec`; the command gets the `spec` of their values as `argument`.

    With `only`, the fields of these names; the others keep their defaults.

    `max_rows` is `--max-rows`, or `DREAMFLEET_MAX_ROWS`; lists are written with commas. Bounds are the fields' own.
    Raises UserError, naming the flag, for a value that its field refuses.
    """

    fields = {name: field for name, field in spec.model_fields.items() if name in only or not only}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def collected(*args: Any, **given: Any) -> Any:
            values = {name: given.pop(name) for name in fields}
            try:
                set_to = spec.model_validate(values)
            except ValidationError as error:
                (first, *_) = error.errors()
                wrong = f"{flag(str(first['loc'][0]))} is {first['input']!r}: {first['msg']}"
                raise UserError(f"{wrong}. See --help for what it takes.") from None
            return command(*args, **given, **{argument: set_to})

        made: Any = collected
        for name, field in reversed(fields.items()):
            made = _option(name, field)(made)
        return made

    return decorate


def flag(name: str) -> str:
    """The flag of a field: `--max-rows` of `max_rows`."""
    return f"--{name.replace('_', '-')}"


def _option(name: str, field: FieldInfo) -> Callable[[Any], Any]:
    kind = _without_none(field.annotation)
    spelled, callback, default = flag(name), None, field.get_default()
    form: Any = kind
    if get_origin(kind) is Literal:
        form = click.Choice(get_args(kind))
    elif get_origin(kind) is tuple:
        form, callback, default = str, _split, ",".join(default) if default is not None else None
    elif kind is bool:
        spelled = f"{spelled}/--no-{spelled[2:]}"
    elif kind in (int, float):
        form = _bounded(kind, field)
    return click.option(
        spelled,
        type=form,
        callback=callback,
        default=default,
        show_default=default not in (None, ""),
        envvar=f"DREAMFLEET_{name.upper()}",
        help=field.description,
    )


def _without_none(annotation: Any) -> Any:
    """The type of a field that may also be None."""
    if get_origin(annotation) in (Union, UnionType):
        return next(one for one in get_args(annotation) if one is not NoneType)
    return annotation


def _bounded(kind: type, field: FieldInfo) -> click.IntRange | click.FloatRange:
    low = next((one for one in field.metadata if isinstance(one, Ge | Gt)), None)
    high = next((one for one in field.metadata if isinstance(one, Le | Lt)), None)
    return (click.IntRange if kind is int else click.FloatRange)(
        min=None if low is None else low.ge if isinstance(low, Ge) else low.gt,  # type: ignore[arg-type]
        max=None if high is None else high.le if isinstance(high, Le) else high.lt,  # type: ignore[arg-type]
        min_open=isinstance(low, Gt),
        max_open=isinstance(high, Lt),
    )


def _split(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(part.strip() for part in value.split(",") if part.strip())

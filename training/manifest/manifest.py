"""The manifest: which subjects a user wants trained. Names no machine; knows no torch.

`load_manifest(path)` reads YAML, merges each subject over `defaults` and returns a `Manifest` in which every subject
is complete. All errors are collected and reported together, each with its line and what is allowed.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from training.base.quantization import Offload, Quantization
from training.errors import UserError
from training.manifest.presets import merge, with_preset
from training.manifest.subject import ID_PATTERN, Id, SubjectSettings, SubjectSpec
from training.storage.closed import Closed

Path_ = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)
# the C parser is ten times faster; it is absent only where libyaml is
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Manifest(Closed):
    """A whole manifest, every subject complete. `root` is the folder that relative paths start from."""

    version: Literal[1] = 1
    name: Id
    tenant: Id = "default"
    base: str = Field("pocket", min_length=1)
    base_quantization: Quantization = Field(  # left out of what identifies a submission where there is none
        default="none",
        exclude_if=lambda value: value == "none",
        description="bits of the denoiser's weights while adapters train",
    )
    base_offload: Offload = Field(
        default="none",
        exclude_if=lambda value: value == "none",
        description="layers: the denoiser's wait in host memory; slower, for what does not fit",
    )
    training_adapter: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="a file: an adapter that every row wears in training, and nobody afterwards; for distilled bases",
    )
    subjects: tuple[SubjectSpec, ...] = Field(min_length=1, max_length=100_000)
    root: str = "."


class _Header(Closed):
    """The manifest's top level as it is written."""

    version: Literal[1]
    name: Id
    tenant: Id = "default"
    base: str = Field("pocket", min_length=1)
    base_quantization: Quantization = "none"
    base_offload: Offload = "none"
    training_adapter: str | None = None
    defaults: dict[str, Any] = {}
    subjects: list[dict[str, Any]] = Field(min_length=1, max_length=100_000)


class ManifestError(UserError):
    """Everything that is wrong with a manifest, one line each."""


def load_manifest(path: str | Path) -> Manifest:
    """Reads and checks a manifest file. Raises ManifestError with every problem, or UserError if it cannot be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"Manifest '{path}' does not exist. Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Manifest '{path}' cannot be read: {error}. Give the path of a YAML file in UTF-8.") from None
    return parse_manifest(text, name=str(path), root=str(path.parent))


def parse_manifest(text: str, *, name: str = "manifest", root: str = ".") -> Manifest:
    """`load_manifest` for a text in memory; `name` is what messages call it."""
    raw, lines, problems = _read_yaml(text, name)
    if not isinstance(raw, dict):
        raise ManifestError(
            f"{name}: a manifest is a mapping with `version`, `name` and `subjects`; this is {_kind(raw)}."
        )
    header = _validate(_Header, raw, (), lines, problems)
    if isinstance(raw.get("defaults"), dict):
        _validate(SubjectSettings, raw["defaults"], ("defaults",), lines, problems)
    subjects = list(_subjects(raw, lines, problems)) if header or isinstance(raw.get("subjects"), list) else []
    if problems or header is None:
        raise ManifestError("\n".join(f"{name}:{line}: {message}" for line, message in sorted(set(problems))))
    return Manifest(
        version=1,
        name=header.name,
        tenant=header.tenant,
        base=header.base,
        base_quantization=header.base_quantization,
        base_offload=header.base_offload,
        training_adapter=header.training_adapter,
        subjects=tuple(subjects),
        root=root,
    )


def parse_subject(settings: Mapping[str, Any]) -> SubjectSpec:
    """One subject from its settings, as a manifest names them. Raises ManifestError with every problem, a line each."""
    problems: Problems = []
    subject = _validate(SubjectSpec, with_preset(settings), (), {(): 1}, problems)
    if subject is None:
        raise ManifestError("\n".join(message for _, message in sorted(set(problems))))
    return subject


Problems = list[tuple[int, str]]
Lines = dict[Path_, int]


def _subjects(raw: dict[str, Any], lines: Lines, problems: Problems) -> Iterator[SubjectSpec]:
    defaults = raw["defaults"] if isinstance(raw.get("defaults"), dict) else {}
    first_line: dict[str, int] = {}
    for index, entry in enumerate(raw["subjects"] if isinstance(raw.get("subjects"), list) else []):
        where: Path_ = ("subjects", index)
        if not isinstance(entry, dict):
            continue  # the header's own check names it
        subject = _validate(SubjectSpec, with_preset(merge(defaults, entry)), where, lines, problems)
        if subject is None:
            continue
        if subject.id in first_line:
            problems.append((lines[where], f"subject id '{subject.id}' is taken by line {first_line[subject.id]}"))
        first_line.setdefault(subject.id, lines[where])
        yield subject


def _validate(model: type[Model], raw: dict[str, Any], where: Path_, lines: Lines, problems: Problems) -> Model | None:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        for detail in error.errors():
            path = where + tuple(detail["loc"])
            problems.append((_line_of(path, lines), _say(model, tuple(detail["loc"]), detail)))
        return None


def _line_of(path: Path_, lines: Lines) -> int:
    """The line of a key; a merged key may stand in `defaults`, a missing one is shown where it would belong."""
    candidates = [path]
    if len(path) > 2 and path[0] == "subjects":
        candidates.append(("defaults", *path[2:]))
    for candidate in candidates:
        if candidate in lines:
            return lines[candidate]
    return _line_of(path[:-1], lines) if path else 1


def _say(model: type[BaseModel], loc: Path_, detail: Any) -> str:
    key = ".".join(str(part) for part in loc) or "the subject"
    value = detail.get("input")
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), _known_keys(model, loc[:-1]), n=1, cutoff=0.5)
        known = ", ".join(_known_keys(model, loc[:-1]))
        return f"unknown key '{key}'. " + (f"Did you mean '{near[0]}'? " if near else "") + f"Known keys: {known}."
    if detail["type"] == "missing":
        return f"'{key}' is missing."
    if detail["type"] == "string_pattern_mismatch":
        return f"'{key}' is {value!r}; allowed is {ID_PATTERN} (small letters, digits, '.', '_', '-'; at most 63)."
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"'{key}' is {_short(value)}: {message}." if detail["type"] != "value_error" else f"{key}: {message}."


def _known_keys(model: type[BaseModel], loc: Path_) -> list[str]:
    for part in loc:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _read_yaml(text: str, name: str) -> tuple[Any, Lines, Problems]:
    """The document, the line of each key path, and keys that stand twice (in YAML the last one wins, silently)."""
    try:
        node = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ManifestError(f"{name}:{line}: not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise ManifestError(f"{name}:1: not valid YAML: {error}.") from None
    lines: Lines = {}
    problems: Problems = []
    if node is not None:
        _walk(node, (), lines, problems)
    return yaml.load(text, Loader=Loader), lines, problems


def _walk(node: yaml.Node, path: Path_, lines: Lines, problems: Problems) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            if inner in lines:
                problems.append(
                    (key.start_mark.line + 1, f"key '{key.value}' stands twice (first in line {lines[inner]}).")
                )
            lines[inner] = key.start_mark.line + 1
            _walk(value, inner, lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, index), lines, problems)

"""Manifests that come over HTTP: no deeper and no larger than one can be, whoever wrote them, before anything walks
through them. Aliases of YAML are refused: a few lines of them can stand for billions of values."""

from typing import Any

import yaml

from serving.http.problems import ApiError
from training.manifest.manifest import Loader

MOST_CHARS = 2_000_000
MOST_DEEP = 30


def text_of(manifest: str | dict[str, Any]) -> str:
    """The manifest as YAML. Raises ApiError for one that is no plain, shallow document."""
    if isinstance(manifest, str):
        _check_text(manifest)
        return manifest
    check_depth(manifest, "manifest")
    return yaml.safe_dump(manifest, allow_unicode=True)


def values_of(manifest: str | dict[str, Any]) -> Any:
    """The manifest as values. Raises ApiError as `text_of`."""
    if not isinstance(manifest, str):
        check_depth(manifest, "manifest")
        return manifest
    _check_text(manifest)
    return yaml.load(manifest, Loader=Loader)


def _check_text(text: str) -> None:
    if len(text) > MOST_CHARS:
        raise _bad(f"it has {len(text)} characters; at most {MOST_CHARS} are allowed")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=Loader):
            if isinstance(event, yaml.AliasEvent):
                raise _bad("it has aliases (`*name`), which are not taken over HTTP; write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEEP:
                raise _bad(f"it is nested more than {MOST_DEEP} deep")
    except (yaml.YAMLError, ValueError) as error:
        raise _bad(f"it is not valid YAML: {error}") from None


def check_depth(value: object, param: str) -> None:
    """Raises ApiError naming `param` for a value that is nested deeper than any setting is."""
    level: list[object] = [value]
    for _ in range(MOST_DEEP):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return
    raise ApiError(400, f"'{param}' is nested more than {MOST_DEEP} deep.", param=param)


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _bad(why: str) -> ApiError:
    return ApiError(400, f"The manifest cannot be read: {why}.", param="manifest")

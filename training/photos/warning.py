"""What is said about photos: a finding with its advice, and file names as messages print them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WarningKind = Literal[
    "few",
    "small",
    "blurry",
    "dark",
    "overexposed",
    "identical",
    "near-duplicate",
    "background",
    "caption",
    "face",
    "faces",
    "mask",
]


@dataclass(frozen=True, slots=True)
class PhotoWarning:
    """One finding, plain data (`dataclasses.asdict` is JSON): `names` of the photos, what was found, what to do."""

    kind: WarningKind
    names: tuple[str, ...]
    message: str
    advice: str


def shown(name: str) -> str:
    """A file's name as messages print it: short and without control characters."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in name)
    return clean if len(clean) <= 80 else clean[:77] + "..."


def listed(names: Sequence[str], most: int = 8) -> str:
    """`a.jpg, b.jpg and 3 more`."""
    first = ", ".join(shown(name) for name in names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"

"""A prompt as families encode it: plain text, or phrases of which each has a weight. Knows no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phrase:
    """A piece of a prompt. `weight` multiplies what its tokens are encoded to; `opens`: it begins a chunk."""

    text: str
    weight: float = 1.0
    opens: bool = False


@dataclass(frozen=True, slots=True)
class Phrases:
    """A prompt of weighted pieces; only for families whose facts have `emphasis`."""

    parts: tuple[Phrase, ...]

    def __str__(self) -> str:
        """The text without its weights."""
        return " ".join(part.text for part in self.parts)


def phrases_of(wording: str | Phrases) -> tuple[Phrase, ...]:
    """The pieces of a prompt; a plain text is one of weight 1."""
    return (Phrase(wording),) if isinstance(wording, str) else wording.parts

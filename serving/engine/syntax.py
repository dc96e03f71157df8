"""AUTOMATIC1111's prompt syntax: weights, `BREAK` and `AND` read off a text. Knows neither torch nor a base.

`(word)` times 1.1, `[word]` divided by it, `(word:1.3)` as said, in any nesting; `\\(` is a bracket; `BREAK` begins a
chunk; `AND` joins prompts whose predictions are added, each with a weight at its end. What changes while a picture is
drawn, `[a:b:0.5]` and `[a|b]`, is refused. Source: its `prompt_parser.py`.
"""

import re
from dataclasses import dataclass, field

from serving.engine.request import PromptSyntax
from serving.errors import Refused
from training.base.family import Wording
from training.base.wording import Phrase, Phrases

STRONGER = 1.1
MOST = 10.0  # of a weight, either sign
JOINED = 8  # prompts that `AND` may join: each takes a row of every step
DEEPEST = 16  # brackets in brackets: what they do is worked out in time linear in the text
_TOKEN = re.compile(r"\\.|\\|:\s*([+-]?[.\d]+)\s*\)|[()\[\]|]|[^\\()\[\]:|]+|:", re.DOTALL)
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_OWN_WEIGHT = re.compile(r":\s*([+-]?[.\d]+)\s*$")
_ESCAPABLE = "()[]\\|"


@dataclass(slots=True)
class _Piece:
    text: str
    weight: float = 1.0
    opens: bool = False


@dataclass(slots=True)
class _Reader:
    """The pieces so far; of each open bracket: its sign, the first piece in it, and where it stands."""

    text: str
    pieces: list[_Piece] = field(default_factory=list)
    brackets: list[tuple[str, int, int]] = field(default_factory=list)

    def read(self) -> list[_Piece]:
        for token in _TOKEN.finditer(self.text):
            self._take(token.group(0), token.group(1), token.start())
        while self.brackets:  # one that is not closed reaches to the end
            self._close(STRONGER if self.brackets[-1][0] == "(" else 1 / STRONGER)
        return self.pieces

    def _take(self, token: str, weight: str | None, at: int) -> None:
        inside = self.brackets[-1][0] if self.brackets else ""
        if token[0] == "\\":
            self.pieces.append(_Piece(token[1:] if token[1:] in _ESCAPABLE else token))
        elif token in ("(", "["):
            if len(self.brackets) == DEEPEST:
                raise Refused(f"The prompt has more than {DEEPEST} brackets in one another. Write \\( for a bracket.")
            self.brackets.append((token, len(self.pieces), at))
        elif weight is not None and inside == "(":
            self._close(_number(weight, self.text[self.brackets[-1][2] : at + len(token)]))
        elif token == ")" and inside == "(":
            self._close(STRONGER)
        elif token == "]" and inside == "[":
            shown = self.text[self.brackets[-1][2] : at + 1]
            if _OWN_WEIGHT.search(shown[:-1]):
                raise Refused(_changing(shown))
            self._close(1 / STRONGER)
        elif token == "|" and inside == "[":
            raise Refused(_changing(self.text[self.brackets[-1][2] :]))
        else:
            first, *further = _BREAK.split(token)
            self.pieces.append(_Piece(first.rstrip() if further else first))
            self.pieces += [_Piece(text.lstrip(), opens=True) for text in further]

    def _close(self, factor: float) -> None:
        _, first, _ = self.brackets.pop()
        for piece in self.pieces[first:]:
            piece.weight *= factor


def read_prompt(text: str, syntax: PromptSyntax) -> tuple[tuple[Wording, float], ...]:
    """The prompts that a text holds, each with the weight of its prediction: one of weight 1 unless `AND` is in it.

    A prompt without weights is plain text again. Raises Refused, in words, for what cannot be read or is not done.
    """
    if syntax == "plain":
        return ((text, 1.0),)
    parts = _AND.split(text)
    if len(parts) == 1:
        return ((_worded(text), 1.0),)
    if len(parts) > JOINED:
        raise Refused(f"The prompt joins {len(parts)} prompts with AND; up to {JOINED} are drawn together.")
    return tuple(_weighted(part) for part in parts)


def read_negative(text: str, syntax: PromptSyntax) -> Wording:
    """The negative prompt that a text holds; `AND` in it is a word, as in AUTOMATIC1111. Raises Refused."""
    return text if syntax == "plain" else _worded(text)


def is_plain(read: Wording | tuple[tuple[Wording, float], ...]) -> bool:
    """Whether what was read is one text without weights or chunks of its own, which every base can draw."""
    return isinstance(read, str) or isinstance(read, tuple) and len(read) == 1 and isinstance(read[0][0], str)


def _weighted(part: str) -> tuple[Wording, float]:
    own = _OWN_WEIGHT.search(part)
    weight = 1.0 if own is None else _number(own.group(1), part)
    return _worded((part if own is None else part[: own.start()]).strip()), weight


def _worded(text: str) -> Wording:
    """Neighbours of one weight are one phrase, so that a word which brackets cut stays one."""
    alike: list[list[_Piece]] = []
    for piece in _Reader(text).read():
        if abs(piece.weight) > MOST:
            raise Refused(f"A weight in the prompt comes to {piece.weight:g}; allowed is -{MOST:g} to {MOST:g}.")
        if alike and not piece.opens and alike[-1][0].weight == piece.weight:
            alike[-1].append(piece)
        elif piece.text or piece.opens:
            alike.append([piece])
    phrases = [Phrase("".join(one.text for one in same), same[0].weight, same[0].opens) for same in alike]
    if not phrases:
        return ""
    plain = len(phrases) == 1 and phrases[0].weight == 1.0 and not phrases[0].opens
    return phrases[0].text if plain else Phrases(tuple(phrases))


def _number(text: str, shown: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refused(f"'{shown[:80]}': '{text[:20]}' is no weight. Write it as in (word:1.2).") from None


def _changing(shown: str) -> str:
    return (
        f"'{shown[:80]}' changes the prompt while the picture is drawn, which is not done here. Write one of its "
        "texts, or \\[ for a bracket."
    )

"""The weights in a tag: `<lora:id:0.8>`, `:te:unet`, and those that change over the steps, as extensions write them.

`<lora:id:0.8:0.5>` and `te=`, `unet=` are AUTOMATIC1111's. `1@0,0@0.5` are loractl's keyframes: between them the weight
is interpolated; a place up to 1 is a share of the steps, above it a step. `start=`, `stop=` and `step=5-10` are LoRA
Block Weight's: the first and the last step, counted from 1, that wear the adapter.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby

from serving.http.worn import ScheduledWeight

Keyframes = tuple[tuple[float, float], ...]  # (share of the steps, weight), in order; one is a constant weight
Weight = float | tuple[ScheduledWeight, ...]
_NUMBER = r"\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*"
_KEYFRAME = re.compile(rf"({_NUMBER})@({_NUMBER})")


class BadWeight(ValueError):
    """What is wrong with a tag's weights, as the end of a sentence."""


def read_weights(parts: Sequence[str], steps: int) -> tuple[Weight, float | None]:
    """The denoiser's weight and the text encoder's, None if it is the same. `parts` are a tag's, behind the id.

    A text is encoded once, so that a weight over the steps counts there by the value that is farthest from 0. Raises
    BadWeight.
    """
    found, window = dict[str, Keyframes](), (1, steps)
    for place, part in enumerate(parts):
        name, equals, value = (text.strip() for text in part.rpartition("="))
        name = name.lower() if equals else ("te", "unet")[place] if place < 2 else ""
        if name in ("te", "unet"):
            found[name] = _keyframes(value, steps)
        elif name in ("start", "stop", "step"):
            window = _window(name, value, window)
        else:
            raise BadWeight(f"'{part.strip()}' is not done here")
    text = found.get("te", ((0.0, 1.0),))
    denoiser = found.get("unet", text if "te" in found else ((0.0, 1.0),))
    weight = _over_steps(denoiser, window, steps)
    own = None if "te" not in found or denoiser == text else _peak(text)
    return weight, own


def _keyframes(value: str, steps: int) -> Keyframes:
    if "@" not in value:
        return ((0.0, _number(value)),)
    frames = []
    for piece in re.split("[,;]", value):
        pair = _KEYFRAME.fullmatch(piece)
        if pair is None:
            raise BadWeight(f"'{piece.strip()}' is no weight@step")
        weight, place = (_number(number) for number in pair.groups())
        share = place if place <= 1 else place / steps
        if not 0 <= share <= 1:
            raise BadWeight(f"'{piece.strip()}' is at a step that is not among the {steps}")
        frames.append((share, weight))
    return tuple(sorted(frames))


def _window(name: str, value: str, window: tuple[int, int]) -> tuple[int, int]:
    """The first and the last step, narrowed."""
    numbers = re.fullmatch(r"(\d{1,4})-(\d{1,4})" if name == "step" else r"(\d{1,4})", value)
    if numbers is None:
        raise BadWeight(f"'{name}={value}' is no step; write start=5, stop=10 or step=5-10")
    if name == "step":
        return int(numbers[1]), int(numbers[2])
    return (int(numbers[1]), window[1]) if name == "start" else (window[0], int(numbers[1]))


def _over_steps(frames: Keyframes, window: tuple[int, int], steps: int) -> Weight:
    """One weight, or the weight of each run of steps that have the same."""
    first, last = window
    each = [_at(frames, step / steps) if first <= step + 1 <= last else 0.0 for step in range(steps)]
    spans, begin = [], 0
    for weight, run in groupby(each):
        end = begin + len(list(run))
        spans.append(ScheduledWeight.model_validate({"from": begin / steps, "to": end / steps, "weight": weight}))
        begin = end
    return spans[0].weight if len(spans) == 1 else tuple(spans)


def _at(frames: Keyframes, share: float) -> float:
    """The weight at a share of the steps: interpolated, and constant before the first frame and behind the last."""
    index = bisect_right([place for place, _ in frames], share)
    if index in (0, len(frames)):
        return frames[max(0, index - 1)][1]
    (before, low), (after, high) = frames[index - 1 : index + 1]
    return low + (high - low) * (share - before) / (after - before)


def _peak(frames: Keyframes) -> float:
    return max((weight for _, weight in frames), key=abs)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadWeight(f"the weight '{text.strip()}' is no number")
    return number

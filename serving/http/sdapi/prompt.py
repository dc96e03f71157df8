"""The tags in a prompt: `<lora:id:weight>`, which AUTOMATIC1111's users write where others have a field."""

import math
import re

from serving.http.problems import ApiError
from serving.http.wire import ADAPTER_NAME, WornAdapter

# A tag ends before the next "<", so a search looks at every character once, whatever the prompt.
_TAG = re.compile(r"<(\w+):([^<>]*)>")
_KINDS = ("lora", "lyco")  # two names of the same tag


def split_prompt(prompt: str) -> tuple[str, list[WornAdapter]]:
    """A prompt without its tags, and the adapters that they name. Raises ApiError for a tag that is not served.

    Time is linear in the prompt's length, which is the caller's to check first.
    """
    worn = [_worn(tag) for tag in _TAG.finditer(prompt)]
    return re.sub(r"\s+", " ", _TAG.sub(" ", prompt)).strip() if worn else prompt, worn


def refuse_tags(negative_prompt: str) -> str:
    """The negative prompt unchanged. Raises ApiError if it has a tag, which would do nothing there."""
    tag = _TAG.search(negative_prompt)
    if tag is not None:
        raise ApiError(
            400,
            f"'{_shown(tag)}' in the negative prompt does nothing. Put it into the prompt; a negative weight subtracts "
            "the adapter.",
            param="negative_prompt",
        )
    return negative_prompt


def _worn(tag: re.Match[str]) -> WornAdapter:
    kind, (id, *numbers) = tag.group(1).lower(), [part.strip() for part in tag.group(2).split(":")]
    if kind not in _KINDS:
        raise ApiError(400, f"'{_shown(tag)}': '{kind}' is not served; write <lora:id:weight>.", param="prompt")
    weights = {_weight(number, tag) for number in numbers or ["1"]}
    if len(numbers) > 2 or len(weights) > 1:
        raise ApiError(
            400,
            f"'{_shown(tag)}': an adapter has one weight here, the same for the text encoder and the denoiser, and no "
            "further settings; write <lora:id:weight>.",
            param="prompt",
        )
    if not re.fullmatch(ADAPTER_NAME, id):
        raise ApiError(400, f"'{_shown(tag)}' names no adapter; write <lora:id:weight>.", param="prompt")
    return WornAdapter(id=id, weight=weights.pop())


def _weight(text: str, tag: re.Match[str]) -> float:
    name, equals, value = text.rpartition("=")
    if equals and name.strip().lower() not in ("te", "unet"):
        raise ApiError(400, f"'{_shown(tag)}': '{text}' is not done here; write <lora:id:weight>.", param="prompt")
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ApiError(400, f"'{_shown(tag)}': the weight '{value}' is no number.", param="prompt")
    return weight


def _shown(tag: re.Match[str]) -> str:
    shown = tag.group(0)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."

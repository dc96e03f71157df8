"""Captions: the words for a picture's labels.

Owns every word that the base learns and how a caption is put together. Rare words and filler words appear without any
visual effect, so that `a photo of a cute sks dog` starts as `a photo of a dog`.
"""

import numpy as np

from tools.pocket.composite import COLOUR_NAMES, NO_COLOUR, Labels
from tools.pocket.drawings import CLASSES, STYLES
from tools.pocket.places import PLACE_NAMES, PLACES

RARE = ("sks", "ohwx", "zwx", "xyz", "pkt", "wzk", "vktr", "bnha", "olis", "mta")
FILLERS = ("cute", "nice", "lovely", "beautiful", "funny", "pretty", "small", "big")
LEADS = ("photo", "picture", "image")
OTHER_PHRASES = {
    "grass": ("in the grass", "on grass", "on green grass", "in a meadow"),
    "beach": ("at the beach", "on a beach", "on the sand"),
    "snow": ("in snow", "on the snow"),
    "night": ("in the night", "under the stars"),
    "brick": ("against a brick wall", "by a brick wall"),
    "water": ("in water", "in the sea", "on the water"),
    "desert": ("in a desert", "among the dunes"),
    "clouds": ("in the sky", "among the clouds"),
    "forest": ("in a forest", "in the woods", "among the trees"),
    "white": ("on white", "with a white background"),
}
# Whole tokens that no caption uses: they start silent, for prompts that go beyond the base.
SPARE = tuple(
    """
    one two and at from its with wearing looking holding standing sitting style painting drawing portrait person man
    woman child toy statue city street mountain jungle room house table floor wooden top next near over low high good
    bad worst best quality blurry ugly background black gray brown dark light new old face close up view hat
    """.split()  # noqa: SIM905
)


def words() -> tuple[str, ...]:
    """Every word that is one token."""
    texts = [*CLASSES, *COLOUR_NAMES, *STYLES, *RARE, *FILLERS, *LEADS, "a", "an", "the", "my", "of", *SPARE]
    texts += [place.phrase for place in PLACES.values()]
    texts += [phrase for phrases in OTHER_PHRASES.values() for phrase in phrases]
    return tuple(dict.fromkeys(word for text in texts for word in text.split()))


def article_for(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def thing(labels: Labels, rng: np.random.Generator) -> str:
    """The noun with its colour, perhaps a rare word and an article."""
    parts = [CLASSES[labels.noun]]
    if labels.colour != NO_COLOUR:
        parts.insert(0, COLOUR_NAMES[labels.colour])
    if rng.random() < 0.10:
        parts.insert(0, str(rng.choice(FILLERS)))
    if rng.random() < 0.08:
        parts.insert(0, str(rng.choice(RARE)))
    roll = rng.random()
    if roll < 0.68:
        parts.insert(0, article_for(parts[0]))
    elif roll < 0.80:
        parts.insert(0, "the" if roll < 0.74 else "my")
    return " ".join(parts)


def where(labels: Labels, rng: np.random.Generator) -> str:
    name = PLACE_NAMES[labels.place]
    roll = rng.random()
    if roll < 0.08:
        return ""
    return PLACES[name].phrase if roll < 0.7 else str(rng.choice(OTHER_PHRASES[name]))


def caption(labels: Labels, rng: np.random.Generator) -> str:
    roll = rng.random()
    lead = STYLES[labels.style] if roll < 0.4 else str(rng.choice(LEADS, p=(0.7, 0.15, 0.15)))
    opening = "" if roll > 0.95 else f"a {lead} of " if lead[0] not in "aeiou" else f"an {lead} of "
    return f"{opening}{thing(labels, rng)} {where(labels, rng)}".strip()


def prompt(noun: str, place: str | None = None, colour: str | None = None) -> str:
    """The plain prompt that scores and grids use."""
    named = f"{colour} {noun}" if colour else noun
    return f"a photo of {article_for(named)} {named}" + (f" {PLACES[place].phrase}" if place else "")

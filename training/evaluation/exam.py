"""What one subject is examined with: its photos, its checkpoints, the prompts, and the pictures to draw of each.

Pure; draws nothing. `evaluate.py` draws the pictures and scores them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from training.adapters.adapter import Adapter
from training.manifest.subject import SubjectSpec
from training.sampling.render import BARE, Look, Shot

PLACES = ("", " in the snow", " at night")
UNRELATED = ("a photo of a cup", "a photo of a car", "a photo of a cat", "a photo of a person")
CLASS_PICTURES, UNRELATED_PICTURES = 2, 1


@dataclass(frozen=True)
class Exam:
    """A subject to be judged: its photos, those kept out of training, and its checkpoints by step.

    Adapters are as trained; the subject's scale is applied. Photos should be at about the base's resolution.
    """

    spec: SubjectSpec
    photos: Sequence[Image.Image]
    held_out: Sequence[Image.Image]
    checkpoints: Mapping[int, Adapter]


@dataclass(frozen=True)
class Sheet:
    """The shots of one checkpoint, or of the base alone: the subject's, the class's and unrelated ones."""

    asked: tuple[tuple[Shot, ...], ...]  # a tuple a prompt
    of_class: tuple[Shot, ...]
    unrelated: tuple[Shot, ...]

    @property
    def all(self) -> tuple[Shot, ...]:
        """Every picture of the sheet."""
        return (*(shot for group in self.asked for shot in group), *self.of_class, *self.unrelated)


def prompts_of(spec: SubjectSpec) -> tuple[str, ...]:
    """The prompts a subject is judged by, filled."""
    asked = spec.evaluate.prompts or tuple(spec.instance_prompt + place for place in PLACES)
    return tuple(spec.fill(prompt) for prompt in asked)


def bare_prompt(spec: SubjectSpec, prompt: str) -> str:
    """The prompt without the words that only the instance prompt has: what it says to those who never met the
    subject."""
    usual = set(spec.filled_class_prompt.split())
    rare = {word for word in spec.filled_instance_prompt.split() if word not in usual}
    return " ".join(word for word in prompt.split() if word not in rare)


def candidate_steps(max_steps: int, count: int) -> tuple[int, ...]:
    """The steps whose checkpoints are compared: `count` evenly spaced ones, the last among them."""
    return tuple(sorted({max(1, round(max_steps * (turn + 1) / count)) for turn in range(count)}))


def draw_list(spec: SubjectSpec, slot: int) -> Sheet:
    """The pictures that judge the adapter in `slot`, or the base itself where it is `BARE`."""
    asked = spec.evaluate
    look = Look(asked.steps, asked.guidance_scale, spec.train.resolution, spec.negative_prompt)
    scale = spec.lora.scale if slot != BARE else 1.0

    def shots(prompt: str, count: int) -> tuple[Shot, ...]:
        return tuple(Shot(slot, scale, prompt, asked.seed + index, look) for index in range(count))

    prompts = prompts_of(spec)
    if slot == BARE:
        prompts = tuple(bare_prompt(spec, prompt) for prompt in prompts)
    counts = [asked.images + (place == 0) for place in range(len(prompts))]
    others = [prompt for prompt in UNRELATED if (spec.class_ or "") not in prompt.split()][:UNRELATED_PICTURES]
    return Sheet(
        tuple(shots(prompt, count) for prompt, count in zip(prompts, counts, strict=True)),
        shots(spec.filled_class_prompt, CLASS_PICTURES),
        tuple(shot for prompt in others for shot in shots(prompt, 1)),
    )

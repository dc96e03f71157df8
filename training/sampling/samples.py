"""Sample pictures of subjects in a bank: what a person looks at first. Those of several subjects share batches."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from training.adapters.bank import Bank
from training.base.base import Base
from training.base.facts import Facts
from training.manifest.subject import SubjectSpec
from training.sampling.render import Look, Shot, render


class WornSubject(NamedTuple):
    """A subject, its slot and its scale."""

    spec: SubjectSpec
    slot: int
    scale: float


def draw_samples(base: Base, bank: Bank, subjects: Sequence[WornSubject]) -> list[list[Image.Image]]:
    """The sample pictures of each subject, with fixed seeds: what is drawn for one depends on no other."""
    sheets = [_shots(one, base.facts) for one in subjects]
    drawn = render(base, bank, (shot for sheet in sheets for shot in sheet))
    return [[drawn[shot] for shot in sheet] for sheet in sheets]


def _shots(one: WornSubject, facts: Facts) -> list[Shot]:
    spec, asked = one.spec, one.spec.samples
    prompts = [spec.fill(prompt) for prompt in spec.sample_prompts] or [spec.filled_instance_prompt]
    guidance = facts.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    look = Look(asked.steps or facts.steps, guidance, spec.train.resolution, spec.negative_prompt)
    return [Shot(one.slot, one.scale, prompts[seed % len(prompts)], seed, look) for seed in spec.sample_seeds]

"""Sample pictures: how they are made where nobody says."""

from dataclasses import replace

import torch

from tests.training.subjects import spec
from training.base.base import Base
from training.sampling import samples
from training.sampling.sampler import sample
from training.sampling.samples import WornSubject


def test_sample_pictures_are_drawn_as_the_base_recommends_or_the_manifest_says(tiny: Base) -> None:
    facts = replace(tiny.facts, steps=7, guidance_scale=2.5)
    for asked, steps, guidance in (({}, 7, 2.5), ({"steps": 3}, 3, 2.5), ({"guidance_scale": 0}, 7, 0.0)):
        shots = samples._shots(WornSubject(spec("one", samples=asked), 0, 1.0), facts)
        assert {(shot.look.steps, shot.look.guidance_scale) for shot in shots} == {(steps, guidance)}


def test_images_are_made_as_the_base_recommends(tiny: Base) -> None:
    facts = tiny.facts
    plain, other = (sample(tiny, ["a dog"], seeds=[1], guidance_scale=scale) for scale in (None, 1.0))
    asked = sample(tiny, ["a dog"], seeds=[1], steps=facts.steps, guidance_scale=facts.guidance_scale)
    assert torch.equal(plain, asked) and not torch.equal(plain, other)

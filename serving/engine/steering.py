"""What the networks of a request, ControlNets and IP-Adapters, tell its rows."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from serving.engine.pictures.hints import Hints
from serving.engine.request import GenerateRequest, NetworkRef
from training.base.base import Base
from training.base.controls import Steer
from training.base.image_prompts import ImagePrompt

OnDevice = Mapping[NetworkRef, nn.Module]


@dataclass(frozen=True, slots=True)
class Steering:
    """One ControlNet over a run: it steers the steps that lie between the shares `start` and `end` of them."""

    steer: Steer
    start: float
    end: float

    def active(self, step: int, steps: int) -> bool:
        """Whether it steers step `step` of `steps`, counted as diffusers' pipelines do."""
        return self.start <= step / steps and (step + 1) / steps <= self.end


def steering_of(request: GenerateRequest, hints: Hints, base: Base, networks: OnDevice) -> tuple[Steering, ...]:
    """The ControlNets of a request with its pictures as they take them."""
    controls = base.family.controls
    if controls is None:
        return ()
    made = []
    for use, pixels_3HW in zip(request.controls, hints.controls, strict=True):
        network = networks[use.ref]
        hint = controls.hint(base.parts, network, pixels_3HW)
        made.append(Steering(Steer(network, hint, use.scale), use.start, use.end))
    return tuple(made)


def image_prompts_of(
    request: GenerateRequest, hints: Hints, base: Base, networks: OnDevice
) -> tuple[tuple[ImagePrompt, ImagePrompt], ...]:
    """What a request's pictures say to a row with the prompt, and what none says to one with the negative prompt."""
    prompts = base.family.image_prompts
    if prompts is None:
        return ()
    uses = zip(request.image_prompts, hints.image_prompts, strict=True)
    return tuple(prompts.said(base.parts, networks[use.ref], pixels_3HW, use.scale) for use, pixels_3HW in uses)

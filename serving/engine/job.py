"""A request inside the engine: the job, its samples (one image being made each), and what the engine tells about them.

State only. Who steps when is in `scheduler.py`, what a step does in `stepping.py`.
"""

import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serving.engine.kept import KeptPart
from serving.engine.pictures.edit import Edit
from serving.engine.pictures.hints import NO_HINTS, Hints
from serving.engine.request import MAX_SEED, AdapterRef, GenerateRequest, NetworkRef
from serving.engine.steering import Steering
from serving.engine.tiers.adapters import Loads
from serving.engine.tiers.networks import NetworkLoads
from training.base.controls import Steer
from training.base.family import Cond, Wording
from training.base.image_prompts import ImagePrompt
from training.base.noise.process import Schedule


@dataclass(eq=False, slots=True)
class Job:
    """One request being worked on. `loads` are its adapters that were not in slots: their loads into host memory."""

    request: GenerateRequest
    schedule: Schedule
    pixels_CHW: Tensor | None  # the picture that image-to-image starts from, uint8
    arrived_s: float  # time.monotonic
    takes_negative: bool = True  # whether the base is guided by a second row, with the negative prompt
    loads: Loads = field(default_factory=dict)
    hints: Hints = NO_HINTS
    network_loads: NetworkLoads = field(default_factory=dict)
    # what its ControlNets and its pictures tell its rows, once they are on the device
    steering: tuple[Steering, ...] = ()
    image_prompts: tuple[tuple[ImagePrompt, ImagePrompt], ...] = ()  # with the prompt, with the negative one
    samples: list["Sample"] = field(default_factory=list)
    edit: Edit | None = None  # what of the picture is redrawn, and what it is put back into
    references: tuple[Tensor, ...] = ()  # the pictures that the prompt refers to, uint8
    second: Schedule | None = None  # of the pass that redraws what is enlarged
    conds: tuple[Cond, Cond | None] | None = None  # of the prompt and, with guidance, of the negative prompt
    further: list[Cond] = field(default_factory=list)  # of the prompts that `AND` joins to the first
    parts: tuple[tuple[Wording, float], ...] = ()  # the prompts, each with the weight of its prediction
    negative: Wording = ""
    image: tuple[Tensor, Tensor] | None = None  # mean and std [C, h, w] of the picture's latents
    encoded: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of other pictures, by what they are
    started_s: float | None = None
    over: bool = False

    @property
    def keys(self) -> tuple[AdapterRef, ...]:
        """The versions that the request wears, in its order."""
        return tuple(use.ref for use in self.request.adapters)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each of `keys`."""
        return tuple(use.weight for use in self.request.adapters)

    @property
    def steps(self) -> int:
        """Of all passes of one of its images."""
        return self.schedule.steps + (self.second.steps if self.second else 0)

    @property
    def networks(self) -> tuple[NetworkRef, ...]:
        """The ControlNets that steer it, and the IP-Adapters that read its pictures."""
        asked = self.request
        return (*(use.ref for use in asked.controls), *(use.ref for use in asked.image_prompts))

    @property
    def deadline_s(self) -> float:
        """When the request fails if it is not done, on the clock of `time.monotonic`."""
        return self.arrived_s + self.request.deadline_s

    @property
    def guided(self) -> bool:
        """Whether it takes a row with the negative prompt too: guidance above 1, on a base that is guided so."""
        return self.takes_negative and (self.request.guidance_scale > 1.0 or self.composed)

    @property
    def composed(self) -> bool:
        """Whether its prediction is made of those of several prompts."""
        return len(self.parts) > 1


@dataclass(eq=False, slots=True)
class Sample:
    """One image being made. `latents` and `clean` are [C, h, w] float32 on the device once it runs.

    `wide`: its rows of guidance are more than one forward may have, or they are more than two, so it takes a step in as
    many forwards, and others may go between them. `said` are the predictions [C, h, w] of the rows before the last.
    """

    job: Job
    index: int
    size: tuple[int, int]
    wide: bool = False
    more_cells: int = 0
    said: list[Tensor] = field(default_factory=list)
    slots: tuple[int, ...] | None = None  # of its adapters, once it has started
    step: int = 0
    previews: int = 0
    generator: torch.Generator | None = None
    latents: Tensor | None = None
    clean: Tensor | None = None
    kept: KeptPart | None = None  # what stays of the picture that is edited
    beside: Mapping[str, Tensor] = field(default_factory=dict)  # what its prompts' records hold beside them
    together: Hashable = None  # the family's key of the prompts: only rows with equal keys share a forward
    enlarged: bool = False  # whether it is in its second pass

    @property
    def schedule(self) -> Schedule:
        """The run of the pass that it is in."""
        second = self.job.second if self.enlarged else None
        return second or self.job.schedule

    @property
    def taken(self) -> int:
        """Steps of all its passes that are behind it."""
        return self.step + (self.job.schedule.steps if self.enlarged else 0)

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.job.request.tenant

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """Samples of equal kinds may share a forward: latents' size, and the family's key of the prompts."""
        return (*self.size, self.together)

    @property
    def cells(self) -> int:
        """Latent cells of one of its rows, with those of the pictures that its prompt refers to."""
        return self.size[0] * self.size[1] + self.more_cells

    @property
    def rows(self) -> int:
        """Rows of a forward it takes: two with guidance, one without or if it is wide."""
        return 2 if self.job.guided and not self.wide else 1

    @property
    def conds(self) -> list[Cond]:
        """The prompts of its next rows."""
        assert self.job.conds is not None
        prompt, negative = self.job.conds
        every = [*([] if negative is None else [negative]), prompt, *self.job.further]
        now = [every[len(self.said)]] if self.wide and negative is not None else every
        return [{**cond, **self.beside} for cond in now]

    def combined(self, last_CHW: Tensor) -> Tensor | None:
        """Of a wide one: the guided prediction, if `last_CHW` is what its step's last row says; None if it is not."""
        if len(self.said) <= len(self.job.further):
            return None
        plain_CHW, *others = self.said
        found_CHW = plain_CHW
        for (_, weight), row_CHW in zip(self.job.parts, [*others, last_CHW], strict=True):
            found_CHW = found_CHW + self.job.request.guidance_scale * weight * (row_CHW - plain_CHW)
        return found_CHW

    @property
    def at(self) -> Tensor:
        """`latents` of a sample that runs."""
        assert self.latents is not None
        return self.latents

    @property
    def guess(self) -> Tensor:
        """`clean` of a sample that runs."""
        assert self.clean is not None
        return self.clean

    @property
    def ready(self) -> bool:
        """Whether all loads that it waits for have ended, well or not."""
        job = self.job
        return all(load.done() for load in job.loads.values()) and all(
            load.done() for load in job.network_loads.values()
        )

    @property
    def steers(self) -> tuple[Steer, ...]:
        """The ControlNets that steer its next step."""
        steps = self.schedule.steps
        return tuple(one.steer for one in self.job.steering if one.active(self.step, steps))

    @property
    def image_prompts(self) -> list[tuple[ImagePrompt, ...]]:
        """The pictures of its next rows, as `conds` are its prompts."""
        found, blank = (tuple(pair[side] for pair in self.job.image_prompts) for side in (0, 1))
        if not self.job.guided:
            return [found]
        if self.wide:
            return [found if self.said else blank]
        return [blank, found]

    @property
    def seed(self) -> int:
        """The seed of this image: the request's plus the image's index, wrapped at MAX_SEED."""
        return (self.job.request.seed + self.index) % (MAX_SEED + 1)

    @property
    def preview_due(self) -> bool:
        """Whether another preview is due; they are spread evenly over the steps, none after the last."""
        wanted = self.job.request.previews
        taken, steps = self.taken, self.job.steps
        return self.previews < wanted and taken < steps and taken * (wanted + 1) >= (self.previews + 1) * steps

    def draw(self, channels: int) -> Tensor:
        """The sample's next unit noise [C, h, w]: the same on every device, since a CPU generator draws it."""
        assert self.generator is not None
        return torch.randn((1, channels, *self.size), generator=self.generator)[0]


@dataclass(frozen=True, slots=True)
class Guess:
    """A preview: the model's guess of a sample, uint8 [h, w, 3] at latent resolution."""

    job: Job
    index: int
    number: int
    step: int
    pixels: Tensor


@dataclass(frozen=True, slots=True)
class Done:
    """A finished sample: uint8 [H, W, 3] on the CPU."""

    job: Job
    index: int
    seed: int
    pixels: Tensor


@dataclass(frozen=True, slots=True)
class Recovered:
    """The noise that a picture to be read began as, and the picture's latents: both [C, h, w], float32 on the CPU."""

    job: Job
    index: int
    noise: Tensor
    latents: Tensor


@dataclass(frozen=True, slots=True)
class JobFailed:
    """A job that ends without (all of) its images."""

    job: Job
    error: Exception


JobEvent = Guess | Done | Recovered | JobFailed


@dataclass(slots=True)
class EngineStats:
    """Counters of one engine since it started, and how full it is now."""

    steps: int = 0
    rows: int = 0
    images: int = 0
    requests: int = 0
    bisections: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("text", "denoise", "decode"), 0.0))
    queue_seconds: float = 0.0
    adapters: Mapping[str, int] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds spent inside to `seconds[stage]`."""
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began

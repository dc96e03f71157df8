"""The members of a pack: a subject in a slot, where it stands in its step, and what is reported of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.optimization import get_scheduler

from training.adapters.adapter import Adapter, LowRank
from training.adapters.layout import find_sites
from training.base.base import Base
from training.base.stream import stream
from training.manifest.subject import SubjectSpec, TrainSpec
from training.trainer.checkpoint import HISTORY, SubjectState
from training.trainer.latents import LatentSet

FP16_SCALE = 2.0**16
FP16_GROWTH_STEPS = 2000


@dataclass(frozen=True)
class Subject:
    """A subject ready to train: its settings, its latents, and where it stopped if it has trained before.

    `key`: what a pack calls it, where subjects of several runs share the pack; its id by default.
    """

    spec: SubjectSpec
    instance: LatentSet
    prior: LatentSet | None = None
    state: SubjectState | None = None
    key: str = ""

    @property
    def id(self) -> str:
        """What packs, reports and progress call it."""
        return self.key or self.spec.id


class StepReport(NamedTuple):
    """One optimizer step of one subject. `failure` says why the subject cannot go on, if so."""

    id: str
    step: int
    loss: float
    instance_loss: float
    prior_loss: float
    learning_rate: float
    grad_norm: float
    failure: str | None = None


@dataclass
class Member:
    """A subject in a slot. `micro` batches of the current step are done; the losses are their running means."""

    subject: Subject
    slot: int
    step: int
    rate: Callable[[int], float]
    fp16: bool
    loss_scale: float
    history: list[tuple[float, ...]]
    micro: int = 0
    good_steps: int = 0
    instance_loss: float = 0.0
    prior_loss: float = 0.0

    @classmethod
    def enter(cls, subject: Subject, slot: int, *, fp16: bool) -> "Member":
        """The subject in a slot, where its state stopped or at its beginning."""
        state = subject.state
        return cls(
            subject=subject,
            slot=slot,
            step=state.step if state else 0,
            rate=_rate(subject.spec.train),
            fp16=fp16,
            loss_scale=state.loss_scale if state else (FP16_SCALE if fp16 else 1.0),
            history=[tuple(row) for row in state.history.tolist()] if state else [],
        )

    @property
    def spec(self) -> SubjectSpec:
        """The subject's settings."""
        return self.subject.spec

    @property
    def train(self) -> TrainSpec:
        """The settings of its loop."""
        return self.subject.spec.train

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch that it takes."""
        return self.train.batch_size * (2 if self.spec.prior.enabled else 1)

    @property
    def is_due(self) -> bool:
        """Whether all micro-batches of the current step are done."""
        return self.micro == self.train.gradient_accumulation_steps

    @property
    def ends_step(self) -> bool:
        """Whether the micro-batch under way is the last of the current step."""
        return self.micro + 1 == self.train.gradient_accumulation_steps

    def trains(self, prompt: str) -> bool:
        """Whether this prompt's record changes as the subject learns."""
        return self.spec.lora.text_encoder or any(word in prompt for word in self.spec.words.tokens)

    def add(self, instance: float, prior: float) -> None:
        """Takes in the losses of one micro-batch."""
        self.instance_loss += instance / self.train.gradient_accumulation_steps
        self.prior_loss += prior / self.train.gradient_accumulation_steps
        self.micro += 1

    def restart(self) -> None:
        """Forgets the micro-batches of the step under way."""
        self.micro, self.instance_loss, self.prior_loss = 0, 0.0, 0.0

    def finish(self, norm: float) -> StepReport | None:
        """The report of a step that is done or failed; None where an overflow has it repeated at a smaller scale."""
        if not math.isfinite(norm):
            if not self.fp16 or self.loss_scale <= 1:
                return self.failure("gradient")
            self.loss_scale, self.good_steps = self.loss_scale / 2, 0
            self.restart()
            return None
        report = self._report(norm)
        self.restart()
        self.step += 1
        self.history.append(tuple(float(value) for value in report[1:7]))
        self.good_steps += 1
        if self.fp16 and self.good_steps >= FP16_GROWTH_STEPS:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0
        return report

    def failure(self, what: str) -> StepReport:
        """The report of a step whose loss or gradient is not finite."""
        report = self._report(math.nan)
        said = f"the {what} of step {report.step} is not finite (loss {report.loss}); try a lower learning_rate"
        return report._replace(failure=f"diverged: {said}")

    def _report(self, norm: float) -> StepReport:
        loss = self.instance_loss + self.spec.prior.weight * self.prior_loss
        rate = self.train.learning_rate * self.rate(self.step)
        return StepReport(self.subject.id, self.step + 1, loss, self.instance_loss, self.prior_loss, rate, norm)

    @property
    def history_tensor(self) -> torch.Tensor:
        """fp64 [steps, len(HISTORY)]."""
        return torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(HISTORY))


def initial_adapter(base: Base, components: list[str], spec: SubjectSpec) -> Adapter:
    """A fresh adapter: down is N(0, 1/rank), up is zero, keyed by the subject's seed and the layer's name.

    Its words start as the word they stand for. Raises ValueError for a subject that was not filled (`fill_subject`).
    """
    if not spec.lora.targets:
        raise ValueError(f"subject {spec.id} names no targets: fill it with those of its base")
    modules = {}
    for component in components:
        is_text = component in base.facts.text_encoders
        if is_text and not spec.lora.text_encoder:
            continue
        ends = spec.lora.text_encoder_targets if is_text else spec.lora.targets
        for site in find_sites(component, base.models[component], ends):
            rank = spec.lora.rank
            shape = (rank, *site.down)
            down = torch.randn(shape, generator=stream(spec.train.seed, "init", site.key)) / rank
            modules[site.key] = LowRank(down, torch.zeros(site.out, rank, *(1,) * (len(site.down) - 1)))
    start = spec.words.initial or spec.class_ or ""
    return Adapter(modules, {word: base.word_start(start) for word in spec.words.tokens})


def _rate(spec: TrainSpec) -> Callable[[int], float]:
    """The learning rate's factor at each step, by diffusers' own schedule."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = get_scheduler(
        spec.lr_scheduler,
        optimizer=torch.optim.SGD([parameter], lr=1.0),
        num_warmup_steps=spec.lr_warmup_steps,
        num_training_steps=spec.max_steps,
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor

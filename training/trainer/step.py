"""The fused forward and backward: every row of a batch through one denoiser, each towards its own subject's loss.

Shape suffixes: N rows of the batch, M members, C, H, W of a latent.
"""

import math
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from training.adapters.bank import Bank, Route
from training.base.base import Base
from training.base.family import Cond
from training.base.noise.process import Levels, row_losses
from training.base.transfer import constant, send
from training.trainer.assistant import Assistant
from training.trainer.batch import Batch
from training.trainer.learner import Learner
from training.trainer.member import Member

# (member, prompt) -> its place among the prompts that are encoded in each step
PromptPlaces = dict[tuple[int, str], int]


class Sent(NamedTuple):
    """What a batch takes along to the device. `weights_N` are its rows', `cells` those of its cells if any has some.

    `numbers` are what the optimizer's step takes.
    """

    latents: Tensor
    noise: Tensor
    weights_N: Tensor
    levels: Levels
    cells: Tensor | None
    numbers: Sequence[Tensor]


class Step:
    """Runs batches over one base and bank. Prompts that nobody trains are encoded once."""

    def __init__(self, base: Base, bank: Bank, learner: Learner, assistant: Assistant | None = None) -> None:
        self._base = base
        self._bank = bank
        self._learner = learner
        self._assistant = assistant
        self._frozen: dict[str, Cond] = {}

    def send(self, batch: Batch, members: Sequence[Member], numbers: Sequence[Tensor] = ()) -> Sent:
        """Brings a batch to the device, in one transfer; all of its rows are of one kind."""
        wide = self._bank.weights_SP.dtype
        levels = self._base.process.levels(batch.places, wide)
        rows = [torch.stack(batch.latents).to(wide), torch.stack(batch.noise).to(wide)]
        cells = _cell_weights(batch)
        whole = [*rows, self._row_weights(batch, members, levels.snr_N), *levels, *([] if cells is None else [cells])]
        sent = send(self._base.device, [*whole, *numbers])
        own, numbers = sent[: len(whole)], sent[len(whole) :]
        fields = 3 + len(levels)
        return Sent(own[0], own[1], own[2], Levels(*own[3:fields]), next(iter(own[fields:]), None), numbers)

    def run(self, batch: Batch, members: Sequence[Member], sent: Sent, *, last: bool) -> Tensor:
        """Adds every member's gradient to its slot; returns instance and prior loss of each member, [2, M].

        `sent` is the batch on the device. `last`: whether this is the last of the optimizer step's forwards.
        """
        levels = sent.levels
        noisy = levels.noisy(sent.latents, sent.noise).to(self._base.dtype)
        goal = levels.target(sent.latents, sent.noise)
        with self._bank.reading(self._learner.weights()):
            order = self._trained_prompts(batch, members)
            route = self._route(self._base.facts.denoiser, [members[place] for place in batch.member])
            worn = nullcontext() if self._assistant is None else self._assistant.worn(len(batch.prompts))
            # stopped early, a recomputed block would leave its last layer on the device
            whole = nullcontext() if self._base.offload == "none" else set_checkpoint_early_stop(False)
            with worn, whole, self._bank.using(route, *self._text_routes(order, members)):
                conds = self._conds(batch, members, order)
                goal = self._base_predictions(batch, goal, noisy, levels.times_N)
                prediction = self._base.predict(noisy, levels.times_N, conds, batch.rows)
                losses_N = row_losses(prediction, goal, sent.cells) * sent.weights_N
                instance_M, prior_M = _by_member(losses_N, batch, len(members))
                factor_M = _like(losses_N, [m.spec.prior.weight for m in members])
                divide_M = _like(losses_N, [m.loss_scale / m.train.gradient_accumulation_steps for m in members])
                self._learner.backward(((instance_M + factor_M * prior_M) * divide_M).sum(), last=last)
        return torch.stack([instance_M.detach(), prior_M.detach()])

    def kinds(self, batch: Batch) -> list[Hashable]:
        """Of each row, its size and what its family says of its prompt: rows of one kind may share a forward."""
        found: list[Hashable] = []
        for latents_CHW, prompt in zip(batch.latents, batch.prompts, strict=True):
            size = (latents_CHW.shape[1], latents_CHW.shape[2])
            # training changes what is in a prompt's record, never its shape
            found.append((size, self._base.family.together(size, self._frozen_cond(prompt))))
        return found

    # -- what rows wear --

    def _route(self, component: str, wearers: Sequence[Member]) -> Route:
        scales = [member.spec.lora.scale for member in wearers]
        weights = None if all(scale == 1 for scale in scales) else torch.tensor(scales, dtype=torch.float64)[:, None]
        slots = torch.tensor([member.slot for member in wearers])[:, None]
        return self._bank.route(component, slots, weights, self._base.dtype)

    def _text_routes(self, order: PromptPlaces, members: Sequence[Member]) -> list[Route]:
        """Of each text encoder that is trained, for the prompts in `order`."""
        wearers = [members[place] for place, _ in order]
        components = [name for name in self._base.facts.text_encoders if name in self._bank.sites] if order else []
        return [self._route(component, wearers) for component in components]

    # -- prompts --

    def _trained_prompts(self, batch: Batch, members: Sequence[Member]) -> PromptPlaces:
        """The prompts whose records change as their subjects learn, each once a member."""
        order: PromptPlaces = {}
        for place, prompt in zip(batch.member, batch.prompts, strict=True):
            if members[place].trains(prompt):
                order.setdefault((place, prompt), len(order))
        return order

    def _conds(self, batch: Batch, members: Sequence[Member], order: PromptPlaces) -> list[Cond]:
        """The prompt of every row: trained ones from the routed text encoders, the rest from the cache."""
        table: list[Cond] = []
        if order:
            words = {place: self._bank.words(members[place].slot) for place, _ in order}
            table = self._base.encode([prompt for _, prompt in order], [words[place] for place, _ in order])
        return [
            table[order[key]] if (key := (place, prompt)) in order else self._frozen_cond(prompt)
            for place, prompt in zip(batch.member, batch.prompts, strict=True)
        ]

    def _frozen_cond(self, prompt: str) -> Cond:
        if self._base.prompts is not None:
            return self._base.encode([prompt])[0]
        if prompt not in self._frozen:
            with torch.no_grad(), self._bank.using():
                self._frozen[prompt] = self._base.encode([prompt])[0]
        return self._frozen[prompt]

    # -- goals and weights --

    def _base_predictions(self, batch: Batch, goal: Tensor, noisy: Tensor, times_N: Tensor) -> Tensor:
        """Replaces the target of rows that ask for it by what the base alone predicts, for the base's own prompt."""
        rows = [row for row, wanted in enumerate(batch.from_base) if wanted]
        if not rows:
            return goal
        worn = nullcontext() if self._assistant is None else self._assistant.worn(len(rows))
        with torch.no_grad(), worn, self._bank.using():
            plain = [self._frozen_cond(batch.prompts[row]) for row in rows]
            sizes = [batch.rows[row] for row in rows]
            rows_R = constant(tuple(rows), torch.long, goal.device)
            goal[rows_R] = self._base.predict(noisy[rows_R], times_N[rows_R], plain, sizes).to(goal)
        return goal

    def _row_weights(self, batch: Batch, members: Sequence[Member], snr_N: Tensor) -> Tensor:
        share_N = snr_N.new_tensor(batch.share)
        gammas = [members[place].train.min_snr_gamma or math.inf for place in batch.member]
        if all(math.isinf(gamma) for gamma in gammas):
            return share_N
        return share_N * self._base.process.snr_weights(snr_N, snr_N.new_tensor(gammas))


def _cell_weights(batch: Batch) -> Tensor | None:
    """The weights [N, 1, h, w] of the cells of rows of one size; None where no row has any."""
    given = [weights for weights in batch.weights if weights is not None]
    if not given:
        return None
    plain = torch.ones_like(given[0])
    return torch.stack([plain if weights is None else weights for weights in batch.weights])[:, None]


def _by_member(losses_N: Tensor, batch: Batch, members: int) -> tuple[Tensor, Tensor]:
    """Instance and prior loss of each member, [M] each.

    Summed by index, never by a matrix of zeros and ones: 0 x NaN would spread one subject's failure.
    """
    zeros = losses_N.new_zeros(members)
    kinds: list[Tensor] = []
    for is_prior in (False, True):
        # picked on the host: a mask on the device would have it wait for how many rows there are
        rows = tuple(row for row, prior in enumerate(batch.is_prior) if prior == is_prior)
        rows_R = constant(rows, torch.long, losses_N.device)
        places_R = constant(tuple(batch.member[row] for row in rows), torch.long, losses_N.device)
        kinds.append(zeros.index_add(0, places_R, losses_N[rows_R]))
    return kinds[0], kinds[1]


def _like(losses_N: Tensor, values_M: Sequence[float]) -> Tensor:
    return constant(tuple(values_M), losses_N.dtype, losses_N.device)

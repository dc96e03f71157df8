"""The pack: the subjects training together on one device, each in its own slot of a bank over one base.

`Pack.step()` is the fused step: one forward and one backward for every subject's rows, then each optimizer step that is
due. What a subject learns depends on itself alone: its random stream is keyed by its seed and step, its gradient is
clipped by itself, its loss is a summand of its own. The pack knows nothing of files, queues or clocks.

Shape suffixes: N rows of the batch, M members, S slots, C, H, W of a latent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from training.adapters.adapter import Adapter, LowRank
from training.adapters.bank import Bank, Route, find_sites
from training.base.base import Base
from training.base.stream import stream
from training.base.words import first_vector
from training.manifest.manifest import SubjectSpec, TrainSpec
from training.trainer.batch import WHOLE, Batch, Turn, make_batch
from training.trainer.checkpoint import HISTORY, SubjectState
from training.trainer.latents import LatentSet
from training.trainer.loss import add_noise, min_snr_weights, row_losses, target
from training.trainer.optimizer import OptimizerState, SlotOptimizer, make_optimizers

FP16_SCALE = 2.0**16
FP16_GROWTH_STEPS = 2000


@dataclass(frozen=True)
class Subject:
    """A subject ready to train: its settings, its latents, and where it stopped if it has trained before."""

    spec: SubjectSpec
    instance: LatentSet
    prior: LatentSet | None = None
    state: SubjectState | None = None


class Report(NamedTuple):
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
    loss_scale: float
    history: list[tuple[float, ...]]
    micro: int = 0
    good_steps: int = 0
    instance_loss: float = 0.0
    prior_loss: float = 0.0

    @property
    def spec(self) -> SubjectSpec:
        return self.subject.spec

    @property
    def train(self) -> TrainSpec:
        return self.subject.spec.train

    def restart(self) -> None:
        """Forgets the micro-batches of the step under way."""
        self.micro, self.instance_loss, self.prior_loss = 0, 0.0, 0.0

    def trains(self, prompt: str) -> bool:
        """Whether the prompt's embedding changes as the subject learns."""
        return self.spec.lora.text_encoder or any(word in prompt for word in self.spec.words.tokens)


class Pack:
    """Up to `slots` subjects over `base`. `targets` per component is what the bank covers; subjects may wear less.

    `words`: textual-inversion vectors a subject may train. `most_rows` of a step go through one forward (None: all);
    the others follow in further ones, whose gradients are added.
    """

    def __init__(
        self,
        base: Base,
        *,
        slots: int,
        rank: int,
        targets: dict[str, Sequence[str]],
        words: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.base = base
        wide = torch.promote_types(base.dtype, torch.float32)
        sites = {name: find_sites(name, base.models[name], ends) for name, ends in targets.items()}
        vectors = (words, base.token_embedding.embedding_dim)
        self.bank = Bank(sites, slots=slots, rank=rank, vectors=vectors, device=base.device, dtype=wide)
        self.bank.weights_SP.requires_grad_(True)
        self.bank.weights_SP.grad = torch.zeros_like(self.bank.weights_SP)
        self.bank.inject()
        self._members: dict[int, Member] = {}
        self._makers = make_optimizers(self.bank.weights_SP)
        self._optimizers: dict[str, SlotOptimizer] = {}
        self._embeddings: dict[str, Tensor] = {}
        self._alphas = base.alphas_cumprod.to(base.device, wide)
        self._part = WHOLE
        self.most_rows: int | None = None
        self._checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            _checkpoint_activations(base, True)

    def close(self) -> None:
        """Takes the bank off the base, which is then as it was."""
        self.bank.eject()
        if self._checkpointing:
            _checkpoint_activations(self.base, False)

    # -- who is in --

    @property
    def ids(self) -> list[str]:
        """The subjects training now, in slot order."""
        return [self._members[slot].spec.id for slot in sorted(self._members)]

    @property
    def free(self) -> int:
        return self.bank.slots - len(self._members)

    def join(self, subject: Subject) -> None:
        """Takes a subject into a free slot, at the step where its state stopped. Raises SubjectFailed if it cannot."""
        slot = min(set(range(self.bank.slots)) - set(self._members))
        spec, state = subject.spec, subject.state
        optimizer = self._optimizer(spec.train.optimizer)
        self.bank.put(slot, self.bank.pack(state.adapter if state else self._initial(spec)))
        optimizer.join(slot, spec.train, self._optimizer_state(state) if state else None)
        fp16 = self.base.dtype == torch.float16
        self._members[slot] = Member(
            subject=subject,
            slot=slot,
            step=state.step if state else 0,
            rate=_rate(spec.train),
            loss_scale=state.loss_scale if state else (FP16_SCALE if fp16 else 1.0),
            history=[tuple(row) for row in state.history.tolist()] if state else [],
        )

    def leave(self, id: str) -> Subject:
        """Frees a subject's slot and answers the subject as it stands, ready to join again."""
        member = self._member(id)
        subject = Subject(member.spec, member.subject.instance, member.subject.prior, self.state(id))
        self._optimizer(member.train.optimizer).leave(member.slot)
        self.bank.clear(member.slot)
        self._clear_gradient(member.slot)
        del self._members[member.slot]
        return subject

    def state(self, id: str) -> SubjectState:
        """A subject's state after its last whole step, on the CPU, independent of this pack."""
        member = self._member(id)
        rank, row = member.spec.lora.rank, self.bank.take(member.slot)
        remembered = self._optimizer(member.train.optimizer).state(member.slot)
        rows = {n: self.bank.unpack(self.bank.row_of(r, member.slot), rank) for n, r in remembered.rows.items()}
        history = torch.tensor(member.history, dtype=torch.float64).reshape(-1, len(HISTORY))
        return SubjectState(
            step=member.step,
            adapter=self.bank.unpack(row, rank),
            optimizer_rows=rows,
            optimizer_tensors=remembered.tensors,
            optimizer_numbers=remembered.numbers,
            loss_scale=member.loss_scale,
            history=history,
        )

    def adapter(self, id: str) -> Adapter:
        """What a subject has learned, its scale folded in: what is published."""
        member = self._member(id)
        return self.bank.unpack(self.bank.take(member.slot), member.spec.lora.rank, member.spec.lora.scale)

    def slot(self, id: str) -> tuple[int, float]:
        """Slot and scale of a subject, for sampling from the bank while it trains."""
        member = self._member(id)
        return member.slot, member.spec.lora.scale

    def max_steps(self, id: str) -> int:
        return self._member(id).train.max_steps

    def rows(self, id: str) -> int:
        """Rows of the denoiser's batch that a subject takes."""
        member = self._member(id)
        return member.train.batch_size * (2 if member.spec.prior.enabled else 1)

    def halve_rows(self) -> bool:
        """From now on half as many rows go through one forward; False if it is one already."""
        rows = sum(self.rows(id) for id in self.ids)
        rows = min(rows, self.most_rows or rows)
        self.most_rows = max(1, rows // 2)
        return rows > 1

    def restart_step(self) -> None:
        """Forgets the micro-batches of the step under way, for everyone: it starts over, with the same draws."""
        self._gradient().zero_()
        for member in self._members.values():
            member.restart()

    # -- the fused step --

    def step(self) -> list[Report]:
        """One micro-batch of every subject; answers those that completed an optimizer step, or failed, in it.

        A step whose gradient overflows in fp16 is not complete: it is repeated at half the loss scale.
        """
        members = [self._members[slot] for slot in sorted(self._members)]
        instance_M, prior_M = self._forward_backward(members)
        failed = []
        for member, instance, prior in zip(members, instance_M, prior_M, strict=True):
            member.instance_loss += instance / member.train.gradient_accumulation_steps
            member.prior_loss += prior / member.train.gradient_accumulation_steps
            member.micro += 1
            if not math.isfinite(instance + prior):
                failed.append(member)
        due = [m for m in members if m.micro == m.train.gradient_accumulation_steps and m not in failed]
        reports = [self._failure(member, "loss") for member in failed]
        return reports + (self._optimize(due) if due else [])

    def _forward_backward(self, members: Sequence[Member]) -> tuple[list[float], list[float]]:
        """Adds every member's gradient to its slot; answers instance and prior loss of each member."""
        turns = [Turn(m.spec, m.subject.instance, m.subject.prior, m.step, m.micro) for m in members]
        batch = make_batch(turns, len(self._alphas), self._part)
        losses = [self._learn(part, members) for part in batch.parts(self.most_rows)]
        instance, prior = (torch.tensor(kind, dtype=torch.float64).sum(0) for kind in zip(*losses, strict=True))
        return instance.tolist(), prior.tolist()

    def _learn(self, batch: Batch, members: Sequence[Member]) -> tuple[list[float], list[float]]:
        """`_forward_backward` of rows that share a forward."""
        wide, device, dtype = self.bank.weights_SP.dtype, self.base.device, self.base.dtype
        latents = torch.stack(batch.latents).to(device, wide)
        noise = torch.stack(batch.noise).to(device, wide)
        timesteps = torch.tensor(batch.timesteps, device=device)
        alphas = self._alphas[timesteps]
        noisy = add_noise(latents, noise, alphas).to(dtype)
        goal = target(self.base.prediction_type, latents, noise, alphas)
        text_route, order = self._text_route(batch, members)
        with self.bank.using(*self._unet_route(batch, members), *text_route):
            embeddings = self._embed(batch, members, order)
            goal = self._base_predictions(batch, goal, noisy, timesteps, embeddings)
            prediction = self.base.unet(noisy, timesteps, encoder_hidden_states=embeddings).sample
            losses_N = row_losses(prediction, goal) * self._row_weights(batch, members, alphas)
            member_N = torch.tensor(batch.member, device=device)
            is_prior_N = torch.tensor(batch.is_prior, device=device)
            zeros = losses_N.new_zeros(len(members))
            # summed by index, never by a matrix of zeros and ones: 0 x NaN would spread one subject's failure
            instance_M = zeros.index_add(0, member_N[~is_prior_N], losses_N[~is_prior_N])
            prior_M = zeros.index_add(0, member_N[is_prior_N], losses_N[is_prior_N])
            factor_M = losses_N.new_tensor([m.spec.prior.weight for m in members])
            divide_M = losses_N.new_tensor([m.loss_scale / m.train.gradient_accumulation_steps for m in members])
            self._backward(((instance_M + factor_M * prior_M) * divide_M).sum())
        return instance_M.tolist(), prior_M.tolist()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _unet_route(self, batch: Batch, members: Sequence[Member]) -> list[Route]:
        return [self._route(self.base.family.denoiser, [members[place] for place in batch.member])]

    def _route(self, component: str, wearers: Sequence[Member]) -> Route:
        scales = [member.spec.lora.scale for member in wearers]
        weights = None if all(scale == 1 for scale in scales) else torch.tensor(scales, dtype=torch.float64)[:, None]
        slots = torch.tensor([member.slot for member in wearers])[:, None]
        return self.bank.route(component, slots, weights, self.base.dtype)

    def _text_route(self, batch: Batch, members: Sequence[Member]) -> tuple[list[Route], dict[tuple[int, str], int]]:
        """The route of prompts that are encoded anew in each step, and each (member, prompt)'s place among them."""
        order: dict[tuple[int, str], int] = {}
        for place, prompt in zip(batch.member, batch.prompts, strict=True):
            if members[place].trains(prompt):
                order.setdefault((place, prompt), len(order))
        component = self.base.family.text_encoders[0]
        if not order or component not in self.bank.sites:
            return [], order
        return [self._route(component, [members[place] for place, _ in order])], order

    def _embed(self, batch: Batch, members: Sequence[Member], order: dict[tuple[int, str], int]) -> Tensor:
        """Embeddings of every row [N, L, C]: trained ones from the routed text encoder, the rest from the cache."""
        table: list[Tensor] = []
        if order:
            words = {place: self.bank.words(members[place].slot) for place, _ in order}
            prompts = [prompt for _, prompt in order]
            table = list(self.base.encode_prompts(prompts, [words[place] for place, _ in order]))
        return torch.stack(
            [
                table[order[key]] if (key := (place, prompt)) in order else self._frozen_embedding(prompt)
                for place, prompt in zip(batch.member, batch.prompts, strict=True)
            ]
        )

    def _frozen_embedding(self, prompt: str) -> Tensor:
        if prompt not in self._embeddings:
            with torch.no_grad(), self.bank.using():
                self._embeddings[prompt] = self.base.encode_prompts([prompt])[0]
        return self._embeddings[prompt]

    def _base_predictions(
        self, batch: Batch, goal: Tensor, noisy: Tensor, timesteps: Tensor, embeddings: Tensor
    ) -> Tensor:
        """Replaces the target of rows that ask for it by what the base alone predicts, for the base's own prompt."""
        rows = [row for row, wanted in enumerate(batch.from_base) if wanted]
        if not rows:
            return goal
        with torch.no_grad(), self.bank.using():
            plain = torch.stack([self._frozen_embedding(batch.prompts[row]) for row in rows])
            goal[rows] = self.base.unet(noisy[rows], timesteps[rows], encoder_hidden_states=plain).sample.to(goal)
        return goal

    def _row_weights(self, batch: Batch, members: Sequence[Member], alphas_N: Tensor) -> Tensor:
        share_N = alphas_N.new_tensor(batch.share)
        gammas = [members[place].train.min_snr_gamma or math.inf for place in batch.member]
        if all(math.isinf(gamma) for gamma in gammas):
            return share_N
        return share_N * min_snr_weights(self.base.prediction_type, alphas_N, alphas_N.new_tensor(gammas))

    # -- the optimizer step --

    def _optimize(self, due: Sequence[Member]) -> list[Report]:
        """Clips and applies the gradients of the members that are due, and forgets them."""
        slots = torch.tensor([member.slot for member in due], device=self.base.device)
        gradient_SP = self._gradient()
        unscale = gradient_SP.new_tensor([1 / member.loss_scale for member in due])
        norms_M = gradient_SP[slots].norm(dim=1) * unscale
        limits = gradient_SP.new_tensor([member.train.max_grad_norm or math.inf for member in due])
        clip = (limits / (norms_M + 1e-6)).clamp(max=1.0)
        gradient_SP[slots] *= (clip * unscale)[:, None]
        norms = norms_M.tolist()
        ready = [member for member, norm in zip(due, norms, strict=True) if math.isfinite(norm)]
        for name in {member.train.optimizer for member in ready}:
            these = [member for member in ready if member.train.optimizer == name]
            self._optimizer(name).step([m.slot for m in these], {m.slot: self._rates(m) for m in these})
        gradient_SP[slots] = 0
        finished = [self._finish_step(member, norm) for member, norm in zip(due, norms, strict=True)]
        return [report for report in finished if report is not None]

    def _finish_step(self, member: Member, norm: float) -> Report | None:
        """The report of a step that is done or failed; None where an overflow has it repeated at a smaller scale."""
        if not math.isfinite(norm):
            if self.base.dtype != torch.float16 or member.loss_scale <= 1:
                return self._failure(member, "gradient")
            member.loss_scale, member.good_steps = member.loss_scale / 2, 0
            member.restart()
            return None
        prior = member.spec.prior.weight * member.prior_loss
        rate = member.train.learning_rate * member.rate(member.step)
        loss = member.instance_loss + prior
        report = Report(member.spec.id, member.step + 1, loss, member.instance_loss, member.prior_loss, rate, norm)
        member.restart()
        member.step += 1
        member.history.append(tuple(float(value) for value in report[1:7]))
        self._grow_scale(member)
        return report

    def _grow_scale(self, member: Member) -> None:
        member.good_steps += 1
        if self.base.dtype == torch.float16 and member.good_steps >= FP16_GROWTH_STEPS:
            member.loss_scale, member.good_steps = member.loss_scale * 2, 0

    def _failure(self, member: Member, what: str) -> Report:
        loss = member.instance_loss + member.spec.prior.weight * member.prior_loss
        said = f"diverged: the {what} of step {member.step + 1} is not finite (loss {loss}); try a lower learning_rate"
        return Report(
            member.spec.id,
            member.step + 1,
            loss,
            member.instance_loss,
            member.prior_loss,
            member.train.learning_rate * member.rate(member.step),
            math.nan,
            failure=said,
        )

    def _rates(self, member: Member) -> list[tuple[slice, float]]:
        factor = member.rate(member.step)
        rates = []
        for component in self.bank.sites:
            is_text = component in self.base.family.text_encoders
            rate = member.train.text_encoder_learning_rate if is_text else member.train.learning_rate
            rates.append((self.bank.columns(component), rate * factor))
        return [*rates, (self.bank.columns(Bank.WORDS), member.spec.words.learning_rate * factor)]

    # -- pieces --

    def _member(self, id: str) -> Member:
        return next(member for member in self._members.values() if member.spec.id == id)

    def _clear_gradient(self, slot: int) -> None:
        self._gradient()[slot].zero_()

    def _gradient(self) -> Tensor:
        assert self.bank.weights_SP.grad is not None
        return self.bank.weights_SP.grad

    def _optimizer(self, name: str) -> SlotOptimizer:
        if name not in self._optimizers:
            self._optimizers[name] = self._makers[name]()
        return self._optimizers[name]

    def _optimizer_state(self, state: SubjectState) -> OptimizerState:
        rows = {name: self.bank.flat(self.bank.pack(adapter)) for name, adapter in state.optimizer_rows.items()}
        return OptimizerState(rows, state.optimizer_tensors, state.optimizer_numbers)

    def _initial(self, spec: SubjectSpec) -> Adapter:
        """A fresh adapter: down is N(0, 1/rank), up is zero, keyed by the subject's seed and the layer's name.

        Its words start as the word they stand for.
        """
        modules = {}
        for component in self.bank.sites:
            is_text = component in self.base.family.text_encoders
            if is_text and not spec.lora.text_encoder:
                continue
            ends = spec.lora.text_encoder_targets if is_text else spec.lora.targets
            for site in find_sites(component, self.base.models[component], ends):
                rank = spec.lora.rank
                shape = (rank, *site.down)
                down = torch.randn(shape, generator=stream(spec.train.seed, "init", site.key)) / rank
                modules[site.key] = LowRank(down, torch.zeros(site.out, rank, *(1,) * (len(site.down) - 1)))
        start = spec.words.initial or spec.class_ or ""
        first = first_vector(self.base.tokenizer, self.base.token_embedding, start) if spec.words.tokens else None
        return Adapter(modules, {word: first for word in spec.words.tokens if first is not None})


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


def _checkpoint_activations(base: Base, on: bool) -> None:
    """Recomputes activations in backward, or stops doing so. The text encoder does it in training mode only."""
    if on:
        base.unet.enable_gradient_checkpointing()
        base.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.unet.disable_gradient_checkpointing()
        base.text_encoder.gradient_checkpointing_disable()
    base.text_encoder.train(on)

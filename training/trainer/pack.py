"""The pack: the subjects training together on one device, each in its own slot of a bank over one base.

`Pack.step()` is the fused step: `batch` draws every subject's rows, `step` runs them through one forward and backward,
`learner` takes each optimizer step that is due. What a subject learns depends on itself alone: its random stream is
keyed by its seed and step, its gradient is clipped separately, its loss is a summand of its own. The pack knows nothing
of files, queues or clocks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from training.adapters.adapter import Adapter
from training.adapters.bank import Bank
from training.adapters.layout import find_sites
from training.base.base import Base
from training.trainer.assistant import Assistant
from training.trainer.batch import WHOLE, Turn, make_batch
from training.trainer.checkpoint import SubjectState
from training.trainer.learner import Learner, LocalLearner
from training.trainer.member import Member, StepReport, Subject, initial_adapter
from training.trainer.optimizer import OptimizerState, SlotRates
from training.trainer.step import Step


def training_bank(base: Base, *, slots: int, rank: int, targets: Mapping[str, Sequence[str]], words: int = 0) -> Bank:
    """A bank to train in, at least in fp32. `targets` per component is what it covers; a subject may use fewer.

    `words`: textual-inversion vectors a subject may train.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    sites = {name: find_sites(name, base.models[name], ends) for name, ends in targets.items()}
    vectors = (words, base.facts.word_width)
    return Bank(sites, slots=slots, rank=rank, vectors=vectors, device=base.device, dtype=wide)


class Pack:
    """As many subjects over `base` as `bank` has slots.

    `most_rows` of a step go through one forward (None: all); the others follow in further ones, whose gradients are
    added. `part`: of each kind of a subject's rows only these are run here. `training_adapter` is worn by all rows of
    its steps, and not by pictures. The bank is injected until `close`.
    """

    def __init__(
        self,
        base: Base,
        bank: Bank,
        learner: Learner | None = None,
        *,
        part: slice = WHOLE,
        gradient_checkpointing: bool = False,
        training_adapter: Adapter | None = None,
    ) -> None:
        self.base = base
        self.bank = bank
        self.most_rows: int | None = None
        self._learner = learner or LocalLearner(bank)
        self._assistant = None if training_adapter is None else Assistant(base, training_adapter)
        self._step = Step(base, bank, self._learner, self._assistant)
        self._part = part
        self._members: dict[int, Member] = {}
        self._averages: dict[int, Tensor] = {}  # by slot, [P]: of subjects that keep a moving average
        self._recomputes = gradient_checkpointing
        bank.inject()
        if gradient_checkpointing:
            base.recompute(True)

    def close(self) -> None:
        """Takes the bank off the base, which is then as it was."""
        self.bank.eject()
        if self._assistant is not None:
            self._assistant.close()
        if self._recomputes:
            self.base.recompute(False)

    # -- who is in --

    @property
    def ids(self) -> list[str]:
        """The subjects training now, in slot order."""
        return [member.subject.id for member in self._in_order()]

    @property
    def free(self) -> int:
        """The number of slots without a subject."""
        return self.bank.slots - len(self._members)

    def join(self, subject: Subject) -> None:
        """Takes a subject into a free slot, at the step where its state stopped. Raises SubjectFailed if it cannot."""
        slot = min(set(range(self.bank.slots)) - set(self._members))
        spec, state = subject.spec, subject.state
        adapter = state.adapter if state else initial_adapter(self.base, list(self.bank.sites), spec)
        self.bank.put(slot, self.bank.pack(adapter))
        if spec.train.ema_decay is not None:
            learned = state.learned if state else adapter
            self._averages[slot] = self.bank.flat(self.bank.pack(learned)).to(self.bank.weights_SP)
        self._learner.join(slot, spec.train, self._optimizer_state(state) if state else None)
        self._members[slot] = Member.enter(subject, slot, fp16=self.base.dtype == torch.float16)

    def leave(self, id: str) -> Subject:
        """Frees a subject's slot and returns the subject as it stands, ready to join again."""
        member = self._member(id)
        subject = replace(member.subject, state=self.state(id))
        self._learner.leave(member.slot, member.train)
        self.bank.clear(member.slot)
        self._averages.pop(member.slot, None)
        del self._members[member.slot]
        return subject

    def state(self, id: str) -> SubjectState:
        """A subject's state after its last whole step, on the CPU, independent of this pack."""
        member = self._member(id)
        self._learner.show()
        rank, row = member.spec.lora.rank, self.bank.take(member.slot)
        remembered = self._learner.state(member.slot, member.train)
        rows = {n: self.bank.unpack(self.bank.row_of(r, member.slot), rank) for n, r in remembered.rows.items()}
        return SubjectState(
            step=member.step,
            adapter=self.bank.unpack(row, rank),
            optimizer_rows=rows,
            optimizer_tensors=remembered.tensors,
            optimizer_numbers=remembered.numbers,
            loss_scale=member.loss_scale,
            history=member.history_tensor,
            averaged=self._averaged(member),
        )

    def wear(self, id: str, adapter: Adapter) -> None:
        """Puts what has been learned at some step into a subject's slot, to be drawn and published."""
        member = self._member(id)
        self.bank.put(member.slot, self.bank.pack(adapter))
        self._averages.pop(member.slot, None)

    def adapter(self, id: str) -> Adapter:
        """What a subject has learned, its scale folded in: what is published."""
        member = self._member(id)
        self._learner.show()
        lora, average_P = member.spec.lora, self._averages.get(member.slot)
        row = self.bank.take(member.slot) if average_P is None else self.bank.row_of(average_P, member.slot)
        return self.bank.unpack(row, lora.rank, lora.scale)

    def slot(self, id: str) -> tuple[int, float]:
        """Slot and scale of a subject, for sampling from the bank while it trains."""
        member = self._member(id)
        self._learner.show()
        return member.slot, member.spec.lora.scale

    def max_steps(self, id: str) -> int:
        """Optimizer steps that the subject is to take."""
        return self._member(id).train.max_steps

    def rows(self, id: str) -> int:
        """Rows of the denoiser's batch that a subject takes."""
        return self._member(id).rows

    def halve_rows(self) -> bool:
        """From now on half as many rows go through one forward; False if it is one already."""
        rows = sum(member.rows for member in self._members.values())
        rows = min(rows, self.most_rows or rows)
        self.most_rows = max(1, rows // 2)
        return rows > 1

    def restart_step(self) -> None:
        """Forgets the micro-batches of the step under way, for everyone: it starts over, with the same draws."""
        self._learner.restart()
        for member in self._members.values():
            member.restart()

    # -- the fused step --

    def step(self) -> list[StepReport]:
        """One micro-batch of every subject; returns those that completed an optimizer step, or failed, in it.

        A step whose gradient overflows in fp16 is not complete: it is repeated at half the loss scale.
        """
        members = self._in_order()
        due = {place: member for place, member in enumerate(members) if member.ends_step}
        rates = {member.slot: self._rates(member) for member in due.values()}
        losses_2M, numbers = self._forward_backward(members, self._learner.numbers(list(due.values()), rates))
        outcome = self._learner.step(losses_2M, due, rates, numbers)
        norms = dict(zip(due, outcome.norms, strict=True))
        failed, reports = list[StepReport](), list[StepReport]()
        for place, (member, instance, prior) in enumerate(zip(members, outcome.instance, outcome.prior, strict=True)):
            member.add(instance, prior)
            if not math.isfinite(instance + prior):
                failed.append(member.failure("loss"))
            elif place in due and (report := member.finish(norms[place])) is not None:
                reports.append(report)
                if report.failure is None and member.slot in self._averages:
                    self._follow(member)
        return failed + reports

    def _forward_backward(
        self, members: Sequence[Member], numbers: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Adds every member's gradient to its slot; returns both losses of each member, fp64 [2, M], and `numbers`,
        which travel with the rows that go last, on the device."""
        turns = [Turn(m.spec, m.subject.instance, m.subject.prior, m.step, m.micro) for m in members]
        batch = make_batch(turns, self.base.process, self._part)
        *parts, final = batch.parts(self._step.kinds(batch), self.most_rows)
        losses = [self._step.run(part, members, self._step.send(part, members), last=False) for part in parts]
        sent = self._step.send(final, members, numbers)
        last = all(member.ends_step for member in members)
        losses.append(self._step.run(final, members, sent, last=last))
        return torch.stack(losses).double().sum(0), sent.numbers

    @torch.no_grad()
    def _follow(self, member: Member) -> None:
        """Moves a subject's average towards its weights after a step, as diffusers' `EMAModel` does."""
        assert member.train.ema_decay is not None
        keep = min(member.train.ema_decay, member.step / (9 + member.step)) if member.step > 1 else 0.0
        self._averages[member.slot].lerp_(self.bank.weights_SP[member.slot], 1 - keep)

    def _averaged(self, member: Member) -> Adapter | None:
        average_P = self._averages.get(member.slot)
        if average_P is None:
            return None
        return self.bank.unpack(self.bank.row_of(average_P.cpu(), member.slot), member.spec.lora.rank)

    def _rates(self, member: Member) -> SlotRates:
        factor = member.rate(member.step)
        rates = []
        for component in self.bank.sites:
            is_text = component in self.base.facts.text_encoders
            rate = member.train.text_encoder_learning_rate if is_text else member.train.learning_rate
            rates.append((self.bank.columns(component), rate * factor))
        return [*rates, (self.bank.columns(Bank.WORDS), member.spec.words.learning_rate * factor)]

    # -- pieces --

    def _in_order(self) -> list[Member]:
        return [self._members[slot] for slot in sorted(self._members)]

    def _member(self, id: str) -> Member:
        return next(member for member in self._members.values() if member.subject.id == id)

    def _optimizer_state(self, state: SubjectState) -> OptimizerState:
        rows = {name: self.bank.flat(self.bank.pack(adapter)) for name, adapter in state.optimizer_rows.items()}
        return OptimizerState(rows, state.optimizer_tensors, state.optimizer_numbers)

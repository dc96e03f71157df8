"""One subject over several devices, by DeepSpeed ZeRO. The only file that imports deepspeed.

Every process of a gang has a `GangPack`. The first one leads: it is called as any pack is, and what it does is repeated
by the others, which `follow`. Each takes its share of the batch's rows; DeepSpeed sums the gradients and shards what
the optimizer needs. Stage 3 shards the adapter's weights and the frozen denoiser too, gathered layer by layer; then
all processes take part in every forward of the denoiser, also when the leader samples. Knows no Ray: the caller that
starts the processes joins them by torch.distributed.

Shape suffixes as in `training.trainer.pack`.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from training.adapters.bank import Bank
from training.base.base import Base
from training.errors import GangBroken, SubjectFailed, UserError
from training.manifest.subject import TrainSpec, ZeroSpec
from training.trainer.learner import StepOutcome
from training.trainer.member import Member, StepReport, Subject
from training.trainer.optimizer import OptimizerState, Rates
from training.trainer.pack import Pack

# followers wait this long for the leader, which prepares, judges and publishes alone; a dead one is noticed by who
# started the gang
PATIENCE = timedelta(days=2)
# stage 3 keeps tensors of fewer elements whole: gathering them costs more than they take
SMALL = 100_000
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Order(NamedTuple):
    """What every process is to do next: one of `GangPack`'s deeds, or nothing more."""

    deed: str
    values: tuple[Any, ...] = ()


class Gang:
    """The processes that train one subject together. Orders travel between CPUs, whatever the devices talk over."""

    def __init__(self) -> None:
        if not distributed.is_initialized():
            raise UserError("`strategy: zero` takes several processes: `dreamfleet train` starts them")
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def tell(self, order: _Order) -> None:
        """Sends an order from the leader to all."""
        distributed.broadcast_object_list([order], src=0, group=self._group)

    def hear(self) -> _Order:
        """Waits for the leader's next order and returns it."""
        heard: list[Any] = [None]
        distributed.broadcast_object_list(heard, src=0, group=self._group)
        order: _Order = heard[0]
        return order

    def total(self, values: Sequence[float]) -> list[float]:
        """Of each value, the sum over all processes."""
        summed = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(summed, group=self._group)
        return summed.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return self.total([float(flag)])[0] > 0


class GangPack(Pack):
    """A pack of one slot, spread over a gang: what the leader is asked to do is done by every process.

    Each process takes its share of the batch's rows. The base stays hooked by DeepSpeed after `close` in stage 3: a
    process of a gang ends with its pack.
    """

    def __init__(
        self, base: Base, bank: Bank, gang: Gang, zero: ZeroSpec, *, gradient_checkpointing: bool = False
    ) -> None:
        denoiser = _shard_frozen(base.denoiser, zero, base.dtype) if zero.stage == 3 else None
        super().__init__(
            base,
            bank,
            ShardedLearner(bank, zero, gang, denoiser, self._settle_all),
            part=slice(gang.rank, None, gang.size),
            gradient_checkpointing=gradient_checkpointing,
        )
        if denoiser is not None:
            base.denoiser.register_forward_pre_hook(self._share_forward, with_kwargs=True, prepend=True)
        self._gang = gang
        self._deeds: dict[str, Callable[..., Any]] = {
            "join": super().join,
            "leave": super().leave,
            "step": super().step,
            "settle": self._settle,
            "denoise": self._denoise,
        }
        self._at_it = gang.rank > 0  # whether an order is being carried out
        self._broken = False

    # -- the leader's calls --

    def join(self, subject: Subject) -> None:
        """See `Pack`."""
        self._all(_Order("join", (subject,)))

    def leave(self, id: str) -> Subject:
        """See `Pack`."""
        left: Subject = self._all(_Order("leave", (id,)))
        return left

    def step(self) -> list[StepReport]:
        """See `Pack`."""
        reports: list[StepReport] = self._all(_Order("step"))
        return reports

    def close(self) -> None:
        """See `Pack`; the other processes end, too."""
        if not self._broken and self._gang.rank == 0:
            self._gang.tell(_Order("close"))
        super().close()

    def follow(self) -> None:
        """What every process but the first does: its part of everything, until the leader closes the pack."""
        while (order := self._gang.hear()).deed != "close":
            try:
                self._deeds[order.deed](*order.values)
            except (SubjectFailed, UserError):
                continue  # the leader got the same error and handles it
        super().close()

    def _all(self, order: _Order) -> Any:
        """Has every process carry out an order. Calls made while carrying one out run in this process directly."""
        if self._at_it:
            return self._deeds[order.deed](*order.values)
        if self._broken:
            raise GangBroken("a process of the gang has failed before")
        self._at_it = True
        try:
            self._gang.tell(order)
            return self._deeds[order.deed](*order.values)
        except (SubjectFailed, UserError):
            raise
        except Exception as error:
            self._broken = True
            raise GangBroken(f"{type(error).__name__}: {error}") from error
        finally:
            self._at_it = False

    # -- what all do --

    def _settle_all(self) -> None:
        self._all(_Order("settle"))

    def _settle(self) -> None:
        learner = self._learner
        assert isinstance(learner, ShardedLearner)
        learner.settle()

    def _share_forward(self, denoiser: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A forward of the leader alone (a sample, a score) needs the layers' shards of all."""
        if not self._at_it:
            shapes = tree_map_only(Tensor, lambda tensor: _Shape(tuple(tensor.shape), tensor.dtype), (inputs, named))
            self._gang.tell(_Order("denoise", shapes))

    def _denoise(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Followers' part of a forward of the leader alone: the layers are gathered, the result is not used."""
        inputs, named = tree_map_only(
            _Shape, lambda of: torch.zeros(of.shape, dtype=of.dtype, device=self.base.device), (inputs, named)
        )
        with torch.no_grad(), self.bank.using():
            self.base.denoiser(*inputs, **named)


@dataclass(frozen=True)
class _Shape:
    """What a follower has to know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Parts(nn.Module):
    """A subject's parameters by learning rate, each padded so that it splits evenly. Called, it returns [1, P]."""

    def __init__(self, parts: Sequence[Tensor], processes: int) -> None:
        super().__init__()
        self._widths = [part.numel() for part in parts]
        self.parts = nn.ParameterList(nn.Parameter(split_evenly(part, processes)) for part in parts)

    def forward(self) -> Tensor:
        return torch.cat([part[:width] for part, width in zip(self.parts, self._widths, strict=True)])[None]

    def cut(self, tensors: Sequence[Tensor]) -> Tensor:
        """[P] from tensors as long as the parts."""
        return torch.cat([tensor.flatten()[:width] for tensor, width in zip(tensors, self._widths, strict=True)])


class ShardedLearner:
    """torch's AdamW under DeepSpeed, over a bank of one slot. Every subject has an engine of its own, so that nothing
    of its predecessor is left. `denoiser`: DeepSpeed's engine of the frozen model, in stage 3.

    The bank only shows what has been learned; DeepSpeed holds what is trained. `settle_all` has every process `settle`.
    """

    def __init__(self, bank: Bank, zero: ZeroSpec, gang: Gang, denoiser: Any, settle_all: Callable[[], None]) -> None:
        self._bank = bank
        self._zero = zero
        self._gang = gang
        self._denoiser = denoiser
        self._settle_all = settle_all
        columns = [bank.columns(component) for component in (*bank.sites, Bank.WORDS)]
        self._columns = [(place, part) for place, part in enumerate(columns) if part.stop > part.start]
        self._parts = _Parts((), gang.size)
        self._engine: Any = None
        self._shown = OptimizerState()
        self._settled = True

    def join(self, slot: int, spec: TrainSpec, state: OptimizerState | None) -> None:
        """See `Learner`."""
        if spec.optimizer != "adamw":
            raise SubjectFailed(f"optimizer '{spec.optimizer}' cannot be sharded; with `strategy: zero` take 'adamw'")
        self.leave(slot, spec)
        values_P = self._bank.weights_SP[slot]
        self._parts = _Parts([values_P[part] for _, part in self._columns], self._gang.size)
        optimizer = torch.optim.AdamW(
            [{"params": [part]} for part in self._parts.parts],
            lr=0.0,
            betas=(spec.adam_beta1, spec.adam_beta2),
            eps=spec.adam_epsilon,
            weight_decay=spec.adam_weight_decay,
        )
        config = _config(self._zero, self._bank.weights_SP.dtype) | {"gradient_clipping": spec.max_grad_norm or 0.0}
        self._engine = _initialize(self._parts, config, optimizer)
        self._remember(state or OptimizerState())
        self.gather()

    def leave(self, slot: int, spec: TrainSpec) -> None:
        """See `Learner`; its gradients end with its engine."""
        if self._engine is not None:
            self._engine.destroy()
            del self._parts.parts  # DeepSpeed never releases its modules; this one must hold nothing
            self._engine = None

    def weights(self) -> Tensor:
        """[1, P] on every process, differentiable towards the shards."""
        weights_SP: Tensor = self._engine()
        return weights_SP

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Learner`. DeepSpeed averages over processes; the loss is a sum."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._gang.size, scale_wrt_gas=False)
        if self._denoiser is not None:
            self._denoiser.empty_partition_cache()

    def numbers(self, due: Sequence[Member], rates: Rates) -> list[Tensor]:
        """See `Learner`: none."""
        return []

    def step(
        self, losses_2M: Tensor, due: Mapping[int, Member], rates: Rates, numbers: Sequence[Tensor]
    ) -> StepOutcome:
        """See `Learner`."""
        instance, prior = self._gang.total(losses_2M.flatten().tolist())
        if not due or not math.isfinite(instance + prior):
            return StepOutcome([instance], [prior], [math.nan] * len(due))
        (member,) = due.values()
        for group, (place, _) in zip(self._groups(), self._columns, strict=True):
            group["lr"] = rates[member.slot][place][1]
        self._engine.step()
        self._settled = False
        return StepOutcome([instance], [prior], [float(self._engine.get_global_grad_norm())])

    def restart(self) -> None:
        """See `Learner`."""
        if self._engine is not None:
            self._engine.zero_grad()

    def state(self, slot: int, spec: TrainSpec) -> OptimizerState:
        """See `Learner`; as of the last `settle`."""
        return self._shown

    def show(self) -> None:
        """See `Learner`."""
        if not self._settled:
            self._settle_all()

    def settle(self) -> None:
        """This process's part of `show`."""
        self._bank.weights_SP[0].copy_(self.gather())
        self._settled = True

    def gather(self) -> Tensor:
        """The weights [P], whole, in every process; the moments are kept for `state`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        rows = {
            name: self._parts.cut([safe_get_full_optimizer_state(part, name) for part in self._parts.parts]).cpu()
            for name in MOMENTS
        }
        steps = next(iter(self._engine.basic_optimizer.state.values()))["step"]
        self._shown = OptimizerState(rows, numbers={"step": float(steps)})
        return self._parts.cut([safe_get_full_fp32_param(part) for part in self._parts.parts])

    def _remember(self, state: OptimizerState) -> None:
        """Puts moments and step into DeepSpeed's shards; zeros for a subject that begins."""
        from deepspeed.utils import safe_set_full_optimizer_state

        inner = self._engine.basic_optimizer
        for group in self._groups():
            for shard in group["params"]:
                inner.state[shard] = {name: torch.zeros_like(shard) for name in MOMENTS} | {"step": torch.zeros(())}
        # DeepSpeed links the moments in the first step: here one with zero gradient and zero learning rate
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(self.weights().sum() * 0.0, scale_wrt_gas=False)
        self._engine.step()
        for name, row_P in state.rows.items():
            for part, (_, columns) in zip(self._parts.parts, self._columns, strict=True):
                whole = split_evenly(row_P[columns], self._gang.size).to(self._bank.weights_SP)
                safe_set_full_optimizer_state(part, whole, name)
        for remembered in inner.state.values():
            remembered["step"].fill_(state.numbers.get("step", 0.0))

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.basic_optimizer.param_groups
        return groups


def split_evenly(part: Tensor, processes: int) -> Tensor:
    """A copy, with zeros at its end, whose length divides by the number of processes."""
    return nn.functional.pad(part.detach(), (0, -part.numel() % processes)).clone()


def _shard_frozen(model: nn.Module, zero: ZeroSpec, dtype: torch.dtype) -> Any:
    """Every process keeps its share of the model's weights; layers are gathered when their turn comes."""
    return _initialize(model, _config(zero, dtype), None)


def _initialize(module: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> Any:
    """A DeepSpeed engine over `module`."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # it would be compiled, which takes a compiler and a minute; gloo does the same
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def _config(zero: ZeroSpec, dtype: torch.dtype) -> dict[str, Any]:
    waits = {"device": "cpu"} if zero.offload else {"device": "none"}
    sharding = {"stage": zero.stage, "stage3_param_persistence_threshold": SMALL, "offload_optimizer": waits}
    if zero.stage == 3:
        sharding["offload_param"] = waits
    return {
        # the pack counts rows and micro-batches itself
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**62,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own would be compiled
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }

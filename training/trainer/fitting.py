"""From a plan to a pack over a loaded base: in which precision, how many subjects fit, and whether this device can hold
a given one.

Knows no queue and no storage. Every process of a gang opens its own part of the pack with the same call.
"""

from dataclasses import dataclass
from math import ceil

import torch

from training.adapters.adapter import Adapter
from training.base.base import Base
from training.errors import TooLarge
from training.manifest.plan import PackPlan, rows_of
from training.manifest.subject import SubjectSpec
from training.trainer.memory import Fit, fit_rows
from training.trainer.pack import Pack, training_bank
from training.trainer.zero import Gang, GangPack


@dataclass(frozen=True)
class Opened:
    """A pack ready to be filled. `limit`: subjects at once; `notes`: what was decided by measuring."""

    pack: Pack
    limit: int
    fit: Fit
    notes: tuple[str, ...] = ()

    def check(self, spec: SubjectSpec) -> None:
        """Raises TooLarge if this device cannot hold the subject, even alone."""
        rows = rows_of(spec)
        if rows > self.fit.rows:
            raise TooLarge(f"too large for one device: it takes {rows} rows, and {self.fit.why}")


def open_pack(base: Base, plan: PackPlan, training_adapter: Adapter | None = None) -> Opened:
    """The pack of a plan, as large as is measured to fit; all rows of its steps wear `training_adapter`."""
    profile = plan.profile
    fit = _measure(base, plan)
    targets = {base.facts.denoiser: profile.targets}
    if profile.text_encoder_targets:
        targets |= dict.fromkeys(base.facts.text_encoders, profile.text_encoder_targets)
    slots = plan.slots if profile.zero is None else 1
    bank = training_bank(base, slots=slots, rank=plan.rank, targets=targets, words=plan.words)
    if profile.zero is not None:
        gang = Gang()
        recompute = gang.any(fit.checkpointing)
        gang_pack = GangPack(base, bank, gang, profile.zero, gradient_checkpointing=recompute)
        note = f"each subject is spread over {plan.workers} devices, ZeRO stage {profile.zero.stage}"
        return Opened(gang_pack, 1, fit, (note,))
    pack = Pack(base, bank, gradient_checkpointing=fit.checkpointing, training_adapter=training_adapter)
    limit = max(1, fit.rows // plan.rows)
    if fit.rows < plan.rows:
        pack.most_rows = max(1, fit.rows)
    told = (fit.checkpointing and profile.gradient_checkpointing == "auto") or pack.most_rows is not None
    return Opened(pack, limit, fit, (fit.why,) if told else ())


def follow_pack(base: Base, plan: PackPlan) -> None:
    """What every process of a gang but the first does with its part, until the first one closes the pack."""
    pack = open_pack(base, plan).pack
    assert isinstance(pack, GangPack)
    pack.follow()


def _measure(base: Base, plan: PackPlan) -> Fit:
    """How many of the rows of one device fit."""
    profile = plan.profile
    return fit_rows(
        base,
        ceil(plan.slots * plan.rows / plan.workers),
        state_bytes=plan.state_bytes // plan.workers,
        resolution=profile.resolution,
        checkpointing=profile.gradient_checkpointing,
    )


def precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `mixed_precision` means on a device: `auto` is bf16 where the device computes in it, else fp32."""
    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
        name = "bf16" if has_bf16 else "no"
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16 itself; emulated, it would be slower than fp32."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))

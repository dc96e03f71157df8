"""Planning: which subjects fit into one pack, how large packs are, and what a run will take. Pure; knows no torch.

Subjects of one profile whose rows are of one order can share a pack. Everything else (steps, learning rates, ranks,
prompts, priors, batch sizes) may differ inside one.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from math import ceil, log2, prod
from typing import Literal

from training.base.files.outline import Outline
from training.base.footprint import (
    AVERAGE_BYTES,
    MOST_PICTURES,
    PROCESS_BYTES,
    STATE_BYTES,
    drawing_bytes,
    training_bytes,
    vae_bytes,
)
from training.base.quantization import Quantization, value_bytes
from training.manifest.manifest import Manifest
from training.manifest.subject import SubjectSpec, ZeroSpec
from training.storage.closed import Closed

MAX_ROWS = 32  # rows of one fused batch: throughput has flattened by there
ADAPTER_LIMIT_MB = 6.0


class Profile(Closed):
    """What subjects of one pack have in common. `zero`: they train one after another, each over several devices."""

    resolution: int
    targets: tuple[str, ...]
    text_encoder_targets: tuple[str, ...]
    mixed_precision: Literal["auto", "no", "fp16", "bf16"]
    gradient_checkpointing: Literal["auto"] | bool
    zero: ZeroSpec | None = None


class PackPlan(Closed):
    """Subjects that train on one device: `slots` at once, the rest follow as slots become free.

    `rows` of the fused batch and textual-inversion `words` are the most that one of them takes; `state_bytes` is
    weights, gradients and moments of all slots. `memory_mb` is the most that a worker holds, all in all, per device.
    """

    profile: Profile
    subjects: tuple[str, ...]
    slots: int
    rank: int
    rows: int
    words: int = 0
    state_bytes: int
    memory_mb: float

    @property
    def workers(self) -> int:
        """Devices of one lane."""
        return self.profile.zero.workers if self.profile.zero else 1


class Plan(Closed):
    """What a manifest comes to. Sizes in MB (10^6 bytes)."""

    packs: tuple[PackPlan, ...]
    steps: int
    images: int
    adapter_mb: dict[str, float]
    disk_mb: float


def profile_of(subject: SubjectSpec, base: Outline) -> Profile:
    """What a subject must have in common with those it shares a pack with."""
    return Profile(
        resolution=max(subject.train.resolution or base.facts.resolution, *subject.train.resolutions, 0),
        targets=tuple(sorted(subject.lora.targets)),
        text_encoder_targets=tuple(sorted(subject.lora.text_encoder_targets)) if subject.lora.text_encoder else (),
        mixed_precision=subject.train.mixed_precision,
        gradient_checkpointing=subject.train.gradient_checkpointing,
        zero=subject.train.zero if subject.train.strategy == "zero" else None,
    )


def plan_run(manifest: Manifest, base: Outline, *, lanes: int = 1, max_rows: int = MAX_ROWS) -> Plan:
    """Groups the subjects by profile and rows and splits each group over at most `lanes` packs, in manifest order."""
    groups: dict[tuple[Profile, int], list[SubjectSpec]] = {}
    for subject in manifest.subjects:
        groups.setdefault((profile_of(subject, base), _rows_class(subject)), []).append(subject)
    packs = [
        pack
        for (profile, _), group in groups.items()
        for pack in _packs(profile, group, base, manifest.base_quantization, lanes, max_rows)
    ]
    sizes = {subject.id: adapter_bytes(subject, base) / 1e6 for subject in manifest.subjects}
    checkpoints = sum(
        8 * sizes[s.id] * min(s.train.keep_checkpoints, ceil(s.train.max_steps / s.train.checkpoint_every))
        for s in manifest.subjects
    )
    return Plan(
        packs=tuple(packs),
        steps=sum(subject.train.max_steps for subject in manifest.subjects),
        images=sum(rows_of(s) * s.train.max_steps * s.train.gradient_accumulation_steps for s in manifest.subjects),
        adapter_mb=sizes,
        disk_mb=sum(sizes.values()) + checkpoints,
    )


def _packs(
    profile: Profile, group: Sequence[SubjectSpec], base: Outline, kind: Quantization, lanes: int, max_rows: int
) -> Iterable[PackPlan]:
    rows = max(rows_of(subject) for subject in group)
    count = min(lanes, len(group))
    for turn in range(count):
        subjects = group[turn::count]
        slots = min(max(1, max_rows // rows), len(subjects)) if profile.zero is None else 1
        state = slots * max(map(partial(_state_bytes, base=base), subjects))
        yield PackPlan(
            profile=profile,
            subjects=tuple(subject.id for subject in subjects),
            slots=slots,
            rank=max(subject.lora.rank for subject in subjects),
            rows=rows,
            words=max(len(subject.words.tokens) for subject in subjects),
            state_bytes=state,
            memory_mb=_memory_mb(profile, state, slots * rows, max(map(_pictures, group)) * slots, base, kind),
        )


def reserve(manifest: Manifest, base: Outline) -> tuple[PackPlan, ...]:
    """Gangs for subjects that leave the choice to us: opened for those that turn out too large for one device."""
    groups: dict[Profile, list[SubjectSpec]] = {}
    alone = manifest.training_adapter is not None or manifest.base_offload != "none"
    for subject in () if alone else manifest.subjects:
        if subject.train.strategy == "auto" and subject.train.against_zero is None:
            profile = profile_of(subject, base).model_copy(update={"zero": subject.train.zero})
            groups.setdefault(profile, []).append(subject)
    return tuple(
        pack
        for profile, group in groups.items()
        for pack in _packs(profile, group, base, manifest.base_quantization, 1, MAX_ROWS)
    )


def lane_plan(subject: SubjectSpec, base: Outline, *, max_rows: int = MAX_ROWS) -> PackPlan:
    """The pack of a lane that takes this subject, and others that are much like it: without subjects of its own.

    Rank, rows and words are rounded up, so that subjects which differ a little have equal plans and share a lane.
    """
    most = rows_of(subject)
    rows = 2 if most <= 2 else 4 ** ceil(log2(most) / 2)
    rank = max(8, 2 ** ceil(log2(subject.lora.rank)))
    words = len(subject.words.tokens)
    profile = profile_of(subject, base)
    slots = max(1, max_rows // rows) if profile.zero is None else 1
    widest = subject.model_copy(update={"lora": subject.lora.model_copy(update={"rank": rank})})
    state = slots * STATE_BYTES * adapter_parameters(widest, base)
    return PackPlan(
        profile=profile,
        subjects=(),
        slots=slots,
        rank=rank,
        rows=rows,
        words=2 ** ceil(log2(words)) if words else 0,
        state_bytes=state,
        memory_mb=_memory_mb(profile, state, slots * rows, MOST_PICTURES * slots, base, "none"),
    )


def with_slots(pack: PackPlan, slots: int) -> PackPlan:
    """The same pack for fewer subjects at once."""
    share = slots / pack.slots
    news = {"slots": slots, "state_bytes": int(pack.state_bytes * share), "memory_mb": pack.memory_mb * share}
    return pack.model_copy(update=news)


def rows_of(subject: SubjectSpec) -> int:
    """Rows of the fused batch that a subject takes."""
    return subject.train.batch_size * (2 if subject.prior.enabled else 1)


def _rows_class(subject: SubjectSpec) -> int:
    """1 to 4 rows, 5 to 16, 17 to 64, ...: beside one of many rows, those of few would have fewer slots than fit."""
    return max(0, ((rows_of(subject) - 1).bit_length() - 1) // 2)


def adapter_parameters(subject: SubjectSpec, base: Outline) -> int:
    """Parameters of a subject's adapter, exactly."""
    wanted = {base.facts.denoiser: subject.lora.targets}
    if subject.lora.text_encoder:
        wanted |= dict.fromkeys(base.facts.text_encoders, subject.lora.text_encoder_targets)
    total = 0
    for component, ends in wanted.items():
        for name, shape in base.layers[component].items():
            if len(shape) > 1 and _ends(name, ends):
                total += subject.lora.rank * (shape[0] + prod(shape[1:]))
    return total


def _state_bytes(subject: SubjectSpec, base: Outline) -> int:
    """What is held of a subject's adapter while it trains, with its moving average where it asks for one."""
    each = STATE_BYTES + (AVERAGE_BYTES if subject.train.ema_decay is not None else 0)
    return each * adapter_parameters(subject, base)


def adapter_bytes(subject: SubjectSpec, base: Outline) -> int:
    """Size of the published file: fp16 weights; the header is some ten kB more."""
    return 2 * adapter_parameters(subject, base)


def _pictures(subject: SubjectSpec) -> int:
    """How many pictures are drawn of a subject, or for it, about together."""
    if subject.evaluate.enabled or (subject.prior.enabled and subject.prior.source == "generate"):
        return MOST_PICTURES
    return len(subject.sample_seeds)


def weights_bytes(base: Outline, wide: int, kind: Quantization) -> float:
    """Of a whole base whose values take `wide` bytes, those of the denoiser's linear layers as `kind` has them."""
    linear = sum(prod(shape) for shape in base.layers[base.facts.denoiser].values() if len(shape) == 2)
    return wide * (base.parameters - linear) + value_bytes(kind, wide) * linear


def _memory_mb(
    profile: Profile, state_bytes: int, rows: int, pictures: int, base: Outline, kind: Quantization
) -> float:
    """Of one device: the process, the base, its share of the state, and the greediest of what it does in turn.

    A lane measures the activations before it starts.
    """
    workers = profile.zero.workers if profile.zero else 1
    wide = 4 if profile.mixed_precision == "no" else 2
    facts = base.facts
    cells = (profile.resolution // facts.cell_px) ** 2
    recompute = profile.gradient_checkpointing is True
    busy = max(
        training_bytes(ceil(rows / workers), cells, facts.trained_bytes, recompute=recompute),
        drawing_bytes(pictures, cells, facts.drawn_bytes),
        vae_bytes(profile.resolution**2, facts.pixel_bytes),
    )
    return (PROCESS_BYTES + weights_bytes(base, wide, kind) + state_bytes / workers + wide / 2 * busy) / 1e6


def unmatched_targets(subject: SubjectSpec, base: Outline) -> list[str]:
    """Targets of a subject that no layer of the base has: misspelled, or of another family."""
    wanted = [(base.facts.denoiser, end) for end in subject.lora.targets]
    if subject.lora.text_encoder:
        wanted += [(name, end) for name in base.facts.text_encoders for end in subject.lora.text_encoder_targets]
    return [
        end
        for component, end in wanted
        if not any(_ends(name, (end,)) and len(s) > 1 for name, s in base.layers[component].items())
    ]


def unroutable_targets(subject: SubjectSpec, base: Outline) -> list[tuple[str, str]]:
    """Targets of a subject, each with a layer that it means and that adapters of this family never change."""
    facts = base.facts
    return [
        (end, name)
        for end in subject.lora.targets
        for name, shape in base.layers[facts.denoiser].items()
        if len(shape) > 1 and _ends(name, (end,)) and not _ends(name, facts.layers)
    ]


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)

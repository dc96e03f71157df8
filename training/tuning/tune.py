"""From a manifest to searched settings: the subjects are chosen and prepared, the base and the pack opened, and the
search run. Writes nothing but the cache of class images."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.adapters.adapter import Adapter
from training.base.base import Base, best_device, load_base
from training.base.files.outline import Outline
from training.errors import UserError
from training.manifest.manifest import Manifest
from training.manifest.plan import PackPlan, plan_run, with_slots
from training.manifest.subject import SubjectSpec
from training.run.submission import read_manifest
from training.storage.file_hash import hash_file
from training.storage.interface import Storage
from training.trainer.assistant import read_training_adapter
from training.trainer.fitting import open_pack, precision
from training.tuning.asker import Asker
from training.tuning.ready import Tell, make_ready
from training.tuning.search import Reached, Search
from training.tuning.space import OneOf, Space, own_setting, space_around
from training.tuning.variant import Variant, best_of, ranked


@dataclass(frozen=True)
class Tuning:
    """What is asked of a search. `subjects`: whose settings, together (empty: the manifest's only one); `vary`: which
    settings (empty: all that may be); `at_once`: variants in the pack (None: as many as fit)."""

    subjects: tuple[str, ...] = ()
    vary: tuple[str, ...] = ()
    variants: int = 8
    at_once: int | None = None
    max_rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """What a search found. `variants`: the best first; `learned`: adapters of those trained to their end, by the
    variant's number and the subject, as "3/rusty"; `steps`: optimizer steps of all."""

    specs: tuple[SubjectSpec, ...]
    space: Space
    variants: tuple[Variant, ...]
    learned: Mapping[str, Adapter]
    notes: tuple[str, ...]
    steps: int
    seconds: float

    @property
    def best(self) -> Variant | None:
        """The best variant that was trained to its end; None if none was."""
        return best_of(self.variants)


def tune(
    path: Path,
    storage: Storage,
    asked: Tuning,
    *,
    tell: Tell = lambda _: None,
    watch: Callable[[Reached], None] = lambda _: None,
) -> Tuned:
    """Searches the settings of subjects of a manifest. `tell` hears what is prepared, `watch` how the search stands.

    Raises UserError for a manifest that is wrong, and for subjects or settings that cannot be tuned.
    """
    started = time.monotonic()
    manifest, outlined = read_manifest(path)
    specs = _chosen(manifest, asked.subjects)
    space = space_around(specs[0], asked.vary, asked.max_rank)
    _check_alike(specs, space)
    plan = _plan(manifest, outlined, specs, space, asked)
    tell(f"loading base {manifest.base}")
    base, worn = _load(manifest, plan)
    root = manifest.root
    ready = {s.id: make_ready(base, storage, s, tenant=manifest.tenant, root=root, tell=tell) for s in specs}
    opened = open_pack(base, plan, worn)
    try:
        asker = Asker(space, random=max(1, opened.limit // len(specs)), seed=asked.seed)
        search = Search(base, opened, ready, specs, asker, wanted=asked.variants, watch=watch)
    except BaseException:
        opened.pack.close()
        raise
    search.run()
    variants, seconds = tuple(ranked(search.variants)), time.monotonic() - started
    return Tuned(specs, space, variants, search.learned, tuple(search.notes), search.steps, seconds)


def _chosen(manifest: Manifest, wanted: Sequence[str]) -> tuple[SubjectSpec, ...]:
    """The subjects to tune. Raises UserError for unknown ones, and where it is not said which."""
    known = {subject.id: subject for subject in manifest.subjects}
    shown = ", ".join(list(known)[:8]) + (", ..." if len(known) > 8 else "")
    if not wanted and len(known) > 1:
        raise UserError(
            f"The manifest has {len(known)} subjects: {shown}. Say which to tune: --subject ID, more than once for "
            "settings that suit several."
        )
    for id in wanted:
        if id not in known:
            raise UserError(f"Subject '{id}' is not in the manifest. It has {shown}.")
    chosen = tuple(known[id] for id in dict.fromkeys(wanted or known))
    for subject in chosen:
        _check(subject)
    return chosen


def _check(subject: SubjectSpec) -> None:
    if not subject.evaluate.enabled:
        raise UserError(
            f"`evaluate.enabled` of subject '{subject.id}' is false, and variants are compared by their scores. "
            "Set it to true, or leave it out."
        )
    if subject.train.strategy == "zero":
        raise UserError(
            f"`train.strategy` of subject '{subject.id}' is zero, and variants share one device. Set it to plain or "
            "auto."
        )


def _check_alike(specs: Sequence[SubjectSpec], space: Space) -> None:
    """Raises UserError for subjects that cannot be compared: they share steps and, at the start, what is searched."""
    first = specs[0]
    for other in specs[1:]:
        for name in ("train.max_steps", *space.axes):
            mine, its = own_setting(first, name), own_setting(other, name)
            if mine != its:
                raise UserError(
                    f"Subjects that are tuned together start from the same settings: `{name}` is {mine} for "
                    f"'{first.id}' and {its} for '{other.id}'. Make them equal, or tune one at a time."
                )


def _plan(manifest: Manifest, outlined: Outline, specs: Sequence[SubjectSpec], space: Space, asked: Tuning) -> PackPlan:
    """The pack that holds every variant at its widest."""
    ranks = space.axes.get("lora.rank")
    rank = max(map(int, ranks.values)) if isinstance(ranks, OneOf) else specs[0].lora.rank
    wide = [
        spec.model_copy(update={"lora": spec.lora.model_copy(update={"rank": max(rank, spec.lora.rank)})})
        for spec in specs
    ]
    plan = plan_run(manifest.model_copy(update={"subjects": tuple(wide * asked.variants)}), outlined)
    if len(plan.packs) > 1:
        raise UserError(
            "Subjects that are tuned together share one pack: their `resolution`, targets, precision and rows must "
            f"be alike, and those of {', '.join(spec.id for spec in specs)} are not. Tune one at a time."
        )
    (pack,) = plan.packs
    return with_slots(pack, min(pack.slots, asked.at_once * len(specs))) if asked.at_once else pack


def _load(manifest: Manifest, plan: PackPlan) -> tuple[Base, Adapter | None]:
    """The base as a run loads it, and the adapter that every row wears, if any."""
    worn = manifest.training_adapter
    base = load_base(
        manifest.base,
        dtype=precision(plan.profile.mixed_precision, best_device()),
        root=manifest.root,
        park_text=True,
        quantization=manifest.base_quantization,
        offload=manifest.base_offload,
    )
    return read_training_adapter(base, worn, manifest.root, hash_file(Path(manifest.root, worn)) if worn else "")

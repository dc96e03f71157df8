"""Keeping what a subject has learned while it trains: checkpoints, TensorBoard events, sample pictures."""

from collections.abc import Sequence

from PIL import Image

from training.evaluation.exam import candidate_steps
from training.manifest.subject import SubjectSpec
from training.run.run import RunStore
from training.sampling.samples import Worn, draw_samples
from training.trainer.checkpoint import dump_state
from training.trainer.pack import Pack
from training.trainer.worker.events import NAME as EVENTS, event_file
from training.trainer.worker.held import Held
from training.trainer.worker.publish import png_bytes


class Keeping:
    """Writes to one run what the subjects of one pack have learned."""

    def __init__(self, run: RunStore, pack: Pack) -> None:
        self._run = run
        self._pack = pack

    def is_due(self, held: Held, step: int) -> bool:
        """Whether a checkpoint is to be made after this step."""
        return step % held.spec.train.checkpoint_every == 0 or step in kept_steps(held.spec)

    def samples_due(self, held: Held, step: int) -> bool:
        """Whether sample pictures are to be drawn after this step."""
        every = held.spec.train.sample_every
        return every is not None and step % every == 0

    def checkpoint(self, held: Held) -> None:
        """Writes the subject's state and events, unless a checkpoint of this step is there. Raises StorageError."""
        state = self._pack.state(held.spec.id)
        if state.step <= max(held.saved_step, 0):
            return
        spec = held.spec
        self._run.save_checkpoint(spec.id, state.step, dump_state(state), spec.train.keep_checkpoints, kept_steps(spec))
        events = event_file(state.history, held.rates, held.samples)
        self._run.storage.put(self._run.subject_key(spec.id, "events", EVENTS), events)
        held.saved_step = state.step

    def draw(self, subjects: Sequence[Held]) -> dict[str, list[Image.Image]]:
        """Sample pictures of subjects as they are in their slots, by id; drawn together."""
        worn = [Worn(held.spec, *self._pack.slot(held.spec.id)) for held in subjects]
        drawn = draw_samples(self._pack.base, self._pack.bank, worn)
        return {held.spec.id: pictures for held, pictures in zip(subjects, drawn, strict=True)}

    def keep_samples(self, held: Held, step: int, pictures: list[Image.Image]) -> None:
        """Writes the sample pictures of a step to the run. Raises StorageError."""
        held.samples[step] = pictures
        for index, image in enumerate(pictures):
            key = self._run.subject_key(held.spec.id, "samples", f"{step:08d}-{index}.png")
            self._run.storage.put(key, png_bytes(image))


def kept_steps(spec: SubjectSpec) -> frozenset[int]:
    """Steps whose checkpoints are made and kept whatever the settings say: the last, and those that are compared."""
    compared = candidate_steps(spec.train.max_steps, spec.evaluate.candidates) if spec.evaluate.enabled else ()
    return frozenset({*compared, spec.train.max_steps})

"""Finishing a subject: its checkpoints are judged, the chosen step is put into its slot, and that is published."""

from collections.abc import Callable, Sequence

from PIL import Image

from training.errors import SubjectFailed
from training.evaluation.evaluate import Evaluation
from training.run.run import RunStore
from training.storage.registry import Registry
from training.trainer.pack import Pack
from training.trainer.worker.held import Held
from training.trainer.worker.judging import Finished, Judging, gate_failure
from training.trainer.worker.publish import Publication, publish_subject


class Finishing:
    """Finishes the subjects of one pack, which are still in their slots."""

    def __init__(self, run: RunStore, pack: Pack, judging: Judging, tenant: str) -> None:
        self._run = run
        self._pack = pack
        self._judging = judging
        self._tenant = tenant
        self._registry = Registry(run.storage)

    def judge(self, subjects: Sequence[Held], alive: Callable[[int, int], None]) -> dict[str, Evaluation | None]:
        """The evaluation of each subject, None for those that did not ask for one; judged together.

        `alive(done, all)` pictures is called as they are drawn.
        """
        finished = []
        for held in subjects:
            state = self._pack.state(held.spec.id)
            finished.append(Finished(held.spec, state.step, state.adapter, held.photos, held.held_out))
        found = self._judging.judge(finished, alive)
        return {held.spec.id: found.get(held.spec.id) for held in subjects}

    def choose(self, held: Held, evaluation: Evaluation | None) -> None:
        """Puts the chosen step into the subject's slot. Raises SubjectFailed if it may not be published."""
        failed = gate_failure(held.spec, evaluation)
        if failed is not None:
            raise SubjectFailed(failed)
        slot, _ = self._pack.slot(held.spec.id)
        if evaluation is not None and evaluation.choice.step != self._pack.state(held.spec.id).step:
            # the slot is free after this anyway; what is published is what is worn
            adapter = self._judging.checkpoint(held.spec, evaluation.choice.step)
            self._pack.bank.put(slot, self._pack.bank.pack(adapter))

    def publish(self, held: Held, evaluation: Evaluation | None, pictures: Sequence[Image.Image]) -> str:
        """Publishes what is in the subject's slot and returns its version. Raises StorageError."""
        publication = Publication(
            spec=held.spec,
            fingerprint=held.task.fingerprint,
            state=self._pack.state(held.spec.id),
            adapter=self._pack.adapter(held.spec.id),
            photos=held.photos,
            run=self._run.run,
            tenant=self._tenant,
            rates=held.rates,
            samples=held.samples,
            evaluation=evaluation,
            pictures=pictures,
        )
        return publish_subject(self._registry, self._pack.base, publication)

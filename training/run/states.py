"""The states of a run's subjects, written to the storage as the subject queue changes them, and the run's log."""

import time
from collections.abc import Sequence

from training.run.log import RunLog
from training.run.run import ENDED, RunStore, SubjectRecord
from training.run.view import RunView

STEP_SAVE_SECONDS = 5.0  # how often steps are written; changes of state are written at once
LOG_SECONDS = 1.0


class States:
    """The records of one run, in memory and on the storage. Only the process that leads the run may have one."""

    def __init__(self, store: RunStore, subjects: Sequence[SubjectRecord]) -> None:
        self.records: dict[str, SubjectRecord] = {subject.id: subject for subject in subjects}
        self._store = store
        self._saved = dict(self.records)
        self._saved_at = dict.fromkeys(self.records, 0.0)
        self._log = RunLog(store)

    def take_in(self, view: RunView) -> None:
        """Takes in what has changed. Changes of state are written at once, mere steps every `STEP_SAVE_SECONDS`."""
        for record in view.changed:
            self.change(record)
        for note in view.notes:
            self._log.add(note)
        self._log.flush(STEP_SAVE_SECONDS)

    def note(self, text: str) -> None:
        """Adds a line to the run's log."""
        self._log.add(text)

    def save(self) -> None:
        """Writes down everything that has not been written yet."""
        for record in self.records.values():
            if record != self._saved[record.id]:
                self._save(record)
        self._log.flush()

    def stop(self) -> None:
        """Writes down a run that was stopped: the step of unfinished subjects is that of their last checkpoint."""
        for id, record in self.records.items():
            if record.state not in ENDED:  # the last checkpoint is later than the last beat
                step = max(self._store.checkpoints(id), default=0)
                self.records[id] = record.model_copy(update={"step": step})
        self.save()

    def flush(self) -> None:
        """Writes the log, unless that was done a moment ago."""
        self._log.flush(LOG_SECONDS)

    def change(self, record: SubjectRecord) -> None:
        """Takes in one subject's record, as `take_in` does."""
        before = self.records[record.id]
        self.records[record.id] = record
        if record.state != before.state:
            reason = f": {record.reason}" if record.reason else ""
            self._log.add(
                f"{record.id}: {record.state} at step {record.step}/{record.max_steps}{reason}", {"state": record.state}
            )
        if record.state != before.state or time.monotonic() - self._saved_at[record.id] >= STEP_SAVE_SECONDS:
            if record.state == "training" and record.step and record.step != self._saved[record.id].step:
                self._log.add(
                    f"{record.id}: step {record.step}/{record.max_steps}",
                    {"step": record.step, "train_loss": record.loss},
                )
            self._save(record)

    def _save(self, record: SubjectRecord) -> None:
        self._store.save_subject(record)
        self._saved[record.id], self._saved_at[record.id] = record, time.monotonic()

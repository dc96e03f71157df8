"""Cancelling a run from any machine: a request on the storage that the driver of the run reads."""

import json
import time
from collections.abc import Sequence

from training.run.accepted import Ask, ask, is_unfinished, read_order
from training.run.run import ENDED, RunRecord, RunStore, SubjectRecord
from training.storage.storage import NotFound

REASON = "cancelled by the user"


def wanted(store: RunStore) -> list[str] | None:
    """The subjects whose cancellation is requested: empty means all of them, None that there is no request."""
    try:
        subjects: list[str] = json.loads(store.storage.get(_key(store)))["subjects"]
    except NotFound:
        return None
    return subjects


def forget(store: RunStore) -> None:
    """Deletes the request, once it has been passed on."""
    store.storage.delete(_key(store))


def cancel_run(store: RunStore, record: RunRecord, subjects: Sequence[str], *, driven: bool) -> bool:
    """Leaves the request for the driver; where no driver lives (`driven` is false), cancels at once.

    A run of a fleet is asked of the fleet. Returns whether the whole run has ended by this.
    """
    order = read_order(store.storage, store.run)
    if order is not None:
        if is_unfinished(store.storage, order):
            ask(store.storage, Ask(run=store.run, verb="cancel", subjects=tuple(subjects)))
        return False
    store.storage.put(_key(store), json.dumps({"subjects": list(subjects)}).encode())
    if driven:
        return False
    ids = list(subjects) or [subject.id for subject in record.manifest.subjects]
    steps = {subject.id: subject.train.max_steps for subject in record.manifest.subjects}
    for id in ids:
        before = store.subject(id) or SubjectRecord(id=id, max_steps=steps[id])
        if before.state not in ENDED:
            store.save_subject(
                before.model_copy(update={"state": "cancelled", "reason": REASON, "updated": time.time()})
            )
    if not subjects:
        store.save(record.model_copy(update={"state": "cancelled", "finished": time.time()}))
    forget(store)
    return not subjects


def _key(store: RunStore) -> str:
    return f"runs/{store.run}/cancel.json"

"""What was submitted and how it stands, as its tenant sees it. What is another tenant's does not exist. Blocking."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.http.paging import following
from serving.http.problems import ApiError
from training.errors import UserError
from training.run import accepted
from training.run.accepted import Ask, Order, RunKind, Verb
from training.run.run import ENDED, RunRecord, RunStore, SubjectRecord
from training.run.standing import OLD_SECONDS, Standing, read_standing
from training.storage.interface import Storage

HEED_SECONDS = 3.0  # how long a call waits for the driver to heed what it asks
_LOOK = 0.05
_RUN = re.compile(r"[a-z0-9][a-z0-9._-]{0,150}")
_NAMES: dict[RunKind, str] = {"job": "fine-tuning job", "run": "run"}


@dataclass(frozen=True)
class Submitted:
    """A run as it lies on the storage, its subjects in manifest order."""

    order: Order
    record: RunRecord
    subjects: tuple[SubjectRecord, ...]
    store: RunStore

    @property
    def ended(self) -> bool:
        """Whether every subject has ended."""
        return all(subject.state in ENDED for subject in self.subjects)

    def subject(self, id: str) -> SubjectRecord:
        """One subject. Raises ApiError 404."""
        found = next((subject for subject in self.subjects if subject.id == id), None)
        if found is None:
            raise ApiError(404, f"Run '{self.order.run}' has no subject '{id[:80]}'.", code="subject_not_found")
        return found


class Board:
    """The runs of one storage. `wake` lets a driver in this process look at once."""

    def __init__(self, storage: Storage, wake: Callable[[], None] = lambda: None) -> None:
        self.storage = storage
        self.wake = wake
        self._standing: tuple[float, Standing] | None = None

    def look(self, tenant: str, run: str, kind: RunKind) -> Submitted:
        """A tenant's run. Raises ApiError 404 for what is not there, or another's."""
        order = accepted.read_order(self.storage, run) if _RUN.fullmatch(run) else None
        if order is None or order.tenant != tenant or order.kind != kind:
            raise ApiError(404, f"No {_NAMES[kind]} '{run[:80]}'.", code=f"{kind}_not_found")
        store = RunStore(self.storage, run)
        try:
            record = store.record()
        except UserError:  # it was never accepted: its submission died half-way
            raise ApiError(404, f"No {_NAMES[kind]} '{run[:80]}'.", code=f"{kind}_not_found") from None
        subjects = tuple(
            store.subject(spec.id) or SubjectRecord(id=spec.id, max_steps=spec.train.max_steps)
            for spec in record.manifest.subjects
        )
        return Submitted(order, record, subjects, store)

    def page(
        self,
        tenant: str,
        kind: RunKind,
        after: str | None,
        limit: int,
        keep: Callable[[Order], bool] = lambda order: True,
    ) -> tuple[list[Submitted], bool]:
        """At most `limit` of a tenant's runs that follow `after`, the latest first, and whether there are more."""
        runs = following(accepted.orders_of(self.storage, tenant, kind)[::-1], after, str, kind)
        found: list[Submitted] = []
        for run in runs:
            order = accepted.read_order(self.storage, run)
            if order is None or not keep(order):
                continue
            if len(found) == limit:
                return found, True
            found.append(self.look(tenant, run, kind))
        return found, False

    def ask(self, look: Submitted, verb: Verb, subjects: Sequence[str] = ()) -> Submitted:
        """Asks the driver; returns how the run stands once it has heeded that, or after a moment."""
        key = accepted.ask(self.storage, Ask(run=look.order.run, verb=verb, subjects=tuple(subjects)))
        self.wake()
        deadline = time.monotonic() + HEED_SECONDS
        while self.storage.exists(key) and time.monotonic() < deadline:
            time.sleep(_LOOK)
        return self.look(look.order.tenant, look.order.run, look.order.kind)

    def waiting(self, tenant: str) -> int:
        """Subjects of a tenant in runs that have not ended."""
        return accepted.waiting_of(self.storage, tenant)

    def standing(self) -> Standing:
        """How the lanes stand; what a driver wrote too long ago counts as nothing."""
        if self._standing is None or time.monotonic() - self._standing[0] > _LOOK:
            self._standing = time.monotonic(), read_standing(self.storage)
        return self._standing[1]

    @staticmethod
    def is_fresh(standing: Standing) -> bool:
        """Whether a driver has written it lately."""
        return time.time() - standing.time < OLD_SECONDS

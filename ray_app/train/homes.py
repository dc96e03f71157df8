"""From a lease of a fleet's queue to a task: its subject's settings and its run's home, as they lie on the storage."""

from training.run.home import Home
from training.run.lease import Lease
from training.run.run import RunStore
from training.run.source import Task
from training.storage.storage import Storage


def task_of(storage: Storage, lease: Lease) -> Task:
    """The leased subject. Raises UserError if its run is gone."""
    store = RunStore(storage, lease.run)
    record = store.record()
    id = lease.id.partition("/")[2]
    spec = next(spec for spec in record.manifest.subjects if spec.id == id)
    return lease.task(spec, Home(store, record.tenant, record.manifest.root))

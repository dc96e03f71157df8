"""Where a subject of a run is kept and whose it is: what a worker must know of each subject that it is lent."""

from dataclasses import dataclass

from training.run.run import RunStore


@dataclass(frozen=True)
class Home:
    """The run of a subject and the tenant that owns what it becomes. `root`: where the manifest's relative folders
    start."""

    run: RunStore
    tenant: str
    root: str = "."

    def key(self, id: str) -> str:
        """What tells a subject of this run from those of other runs: `<run>/<id>`."""
        return f"{self.run.run}/{id}"

"""One run's link to the keeper of its cluster's shares (`training.run.shares`), an actor that all runs ask."""

import time
from typing import Any

from training.run.shares import Claim, Shares

ASK_SECONDS = 2.0
_ACTOR, _NAMESPACE = "dreamfleet-shares", "dreamfleet"


class ShareKeeper:
    """`Shares` behind Ray's border."""

    def __init__(self) -> None:
        self._shares = Shares()

    def claim(self, claim: dict[str, Any]) -> int | None:
        """See `Shares.claim`."""
        return self._shares.claim(Claim.model_validate(claim))

    def leave(self, run: str) -> None:
        """See `Shares.leave`."""
        self._shares.leave(run)


class Sharing:
    """A run's link to the keeper of its cluster."""

    def __init__(self, run: str, tenant: str, priority: int, quota: int | None) -> None:
        self._about = {"run": run, "tenant": tenant, "priority": priority, "quota": quota}
        self._keeper: Any = None
        self._asked = 0.0
        self._allowed: int | None = quota

    def ask(self, working: int, pending: int) -> int | None:
        """How many devices this run may have; None: as many as there are. The last reply holds for a moment."""
        import ray

        if time.monotonic() - self._asked >= ASK_SECONDS:
            self._asked = time.monotonic()
            try:
                claim = Claim.model_validate({**self._about, "working": working, "pending": pending})
                self._allowed = ray.get(self._actor().claim.remote(claim.model_dump()), timeout=10)
            except ray.exceptions.RayError:
                self._keeper = None  # the run that started the keeper is over; the next call starts another
        return self._allowed

    def leave(self) -> None:
        """Tells the keeper that the run is over."""
        if self._keeper is not None:
            self._keeper.leave.remote(self._about["run"])

    def _actor(self) -> Any:
        import ray

        if self._keeper is None:
            keeper = ray.remote(ShareKeeper)
            self._keeper = keeper.options(name=_ACTOR, namespace=_NAMESPACE, get_if_exists=True, num_cpus=0).remote()
        return self._keeper

"""How runs share a cluster: by priority, then evenly between tenants, then between their runs; quotas bound tenants.

Ray gives a free device to a task that waits, and never takes one away. So runs that have more than their share give
devices back, at a step border, when another run has waited for its own long enough that no new node can be expected.
All runs ask one keeper. It keeps no state of its own: every claim says all that it has to know. `Shares` knows no Ray.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

from training.run.turns import read_quotas
from training.storage.closed import Closed
from training.storage.storage import Storage

PATIENCE_SECONDS = 60.0  # an autoscaler has added a node by then, or never will
FORGET_SECONDS = 30.0  # a run without a claim for so long is over
CAPACITY_SECONDS = 120.0  # devices that change hands are missed for a moment: capacity is the most within so long


class Claim(Closed):
    """How a run stands: devices that work for it, and that it waits for. `quota`: of its tenant, all runs together."""

    run: str
    tenant: str
    priority: int = 0
    working: int
    pending: int
    quota: int | None = None

    @property
    def wanted(self) -> int:
        """Devices that work for the run or that it waits for."""
        return self.working + self.pending


class Shares:
    """See the module. `clock` is monotonic, in seconds."""

    def __init__(self, patience_s: float = PATIENCE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._claims: dict[str, Claim] = {}
        self._heard: dict[str, float] = {}
        self._pending_since: dict[str, float] = {}
        self._totals: deque[tuple[float, int]] = deque()

    def claim(self, claim: Claim) -> int | None:
        """Takes in how a run stands. Returns how many devices it may have; None: as many as there are."""
        now = self._clock()
        self._claims[claim.run], self._heard[claim.run] = claim, now
        for run in [run for run, heard in self._heard.items() if now - heard > FORGET_SECONDS]:
            self.leave(run)
        if claim.pending:
            self._pending_since.setdefault(claim.run, now)
        else:
            self._pending_since.pop(claim.run, None)
        shares = allot(self._capacity(now), [self._clipped(other) for other in self._claims.values()])
        contended = any(self._starves(other, shares) for other in self._claims.values())
        return shares[claim.run] if contended else self._bound(claim)

    def leave(self, run: str) -> None:
        """A run has ended."""
        self._claims.pop(run, None)
        self._heard.pop(run, None)
        self._pending_since.pop(run, None)

    def _bound(self, claim: Claim) -> int | None:
        """The devices that the tenant's quota leaves to the run; None: the tenant has no quota."""
        if claim.quota is None:
            return None
        greedy = claim.model_copy(update={"pending": claim.quota})
        others = [other for other in self._claims.values() if other.tenant == claim.tenant and other.run != claim.run]
        return allot(claim.quota, [*others, greedy])[claim.run]

    def _clipped(self, claim: Claim) -> Claim:
        """The claim without what its tenant's quota forbids."""
        bound = self._bound(claim)
        if bound is None or bound >= claim.wanted:
            return claim
        working = min(claim.working, bound)
        return claim.model_copy(update={"working": working, "pending": bound - working})

    def _starves(self, claim: Claim, shares: dict[str, int]) -> bool:
        waits = self._clock() - self._pending_since.get(claim.run, self._clock())
        return waits > self._patience_s and claim.working < shares[claim.run]

    def _capacity(self, now: float) -> int:
        self._totals.append((now, sum(claim.working for claim in self._claims.values())))
        while now - self._totals[0][0] > CAPACITY_SECONDS:
            self._totals.popleft()
        return max(total for _, total in self._totals)


def allot(capacity: int, claims: Sequence[Claim]) -> dict[str, int]:
    """Devices of each run: by priority, then one by one to the tenant, and to its run, that has the fewest."""
    given = {claim.run: 0 for claim in claims}
    for priority in sorted({claim.priority for claim in claims}, reverse=True):
        equals = [claim for claim in claims if claim.priority == priority]
        while capacity and (open_ := [claim for claim in equals if given[claim.run] < claim.wanted]):
            tenants = {claim.tenant: 0 for claim in open_}
            for claim in equals:
                if claim.tenant in tenants:
                    tenants[claim.tenant] += given[claim.run]
            poorest = min(open_, key=lambda claim: (tenants[claim.tenant], given[claim.run]))
            given[poorest.run] += 1
            capacity -= 1
    return given


def read_quota(storage: Storage, tenant: str) -> int | None:
    """Devices that a tenant may have at once, as `quotas.yaml` on the storage says; None: no bound."""
    quota = read_quotas(storage).get(tenant)
    return None if quota is None else quota.devices

"""Whose subject is leased next: by priority, then the tenant that has used least, then age; quotas bound tenants.

What a tenant has used are device-seconds: a device that works for K subjects at once gives each the K-th part of its
time. A tenant that comes back after a while starts where the least served of the active ones is: what it left unused is
not saved up. Plain Python; the subject queue asks it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import yaml
from pydantic import BaseModel, Field, PositiveInt, RootModel, ValidationError

from training.errors import UserError
from training.storage.closed import Closed
from training.storage.storage import NotFound, Storage

QUOTAS = "quotas.yaml"
FIRST_GUESS_S = 1.0  # what a subject is taken to cost until one has ended


class TenantQuota(Closed):
    """What a tenant may take; None: as much as there is."""

    devices: PositiveInt | None = Field(default=None, description="devices that work for it at once")
    waiting: PositiveInt | None = Field(default=None, description="subjects of it that wait at once")
    device_seconds: PositiveInt | None = Field(default=None, description="device-seconds in a calendar month (UTC)")


class Waiting(NamedTuple):
    """A subject that waits, as far as its turn depends on it. `order` grows with age."""

    key: str
    tenant: str
    priority: int
    order: int


class Turns:
    """Device-seconds by tenant, and what follows for whose turn it is."""

    def __init__(self, quotas: Mapping[str, TenantQuota] | None = None) -> None:
        self.quotas: Mapping[str, TenantQuota] = quotas or {}
        self.month: dict[str, float] = {}  # device-seconds in this calendar month, for quotas
        self.used: defaultdict[str, float] = defaultdict(float)
        self._active: set[str] = set()
        self._cost = FIRST_GUESS_S

    def charge(self, tenant: str, seconds: float) -> None:
        """A device has worked so long for a tenant."""
        self.used[tenant] += seconds
        self.month[tenant] = self.month.get(tenant, 0.0) + seconds

    def ended(self, seconds: float) -> None:
        """A subject has ended that took so many device-seconds: the next ones are taken to cost about as much."""
        self._cost += 0.2 * (seconds - self._cost)

    def active(self, tenants: set[str]) -> None:
        """Who has anything waiting or training now. One that had nothing for a while starts beside the least served."""
        old = self._active & tenants
        floor = min((self.used[tenant] for tenant in old), default=None)
        if floor is not None:
            for tenant in tenants - old:
                self.used[tenant] = max(self.used[tenant], floor)
        self._active = set(tenants)

    def choose(self, waiting: Sequence[Waiting], held: Mapping[str, int], count: int) -> list[str]:
        """The keys of up to `count` of `waiting`, whose turn it is. `held`: subjects of each tenant that train now.

        `waiting` is in order of priority and age.
        """
        queues: dict[str, list[Waiting]] = {}
        for one in waiting:
            mine = queues.setdefault(one.tenant, [])
            if len(mine) < count:
                mine.append(one)
        taken = {tenant: held.get(tenant, 0) for tenant in queues}
        chosen: list[str] = []
        while len(chosen) < count and queues:
            # what a tenant trains now will cost it as much as others have cost
            tenant = min(
                queues,
                key=lambda name: (
                    -queues[name][0].priority,
                    self.used[name] + taken[name] * self._cost,
                    queues[name][0].order,
                ),
            )
            chosen.append(queues[tenant].pop(0).key)
            taken[tenant] += 1
            if not queues[tenant]:
                del queues[tenant]
        return chosen

    def spent(self, tenant: str) -> bool:
        """Whether the tenant has used up its device-seconds of this month."""
        most = self._quota(tenant).device_seconds
        return most is not None and self.month.get(tenant, 0.0) >= most

    def devices(self, tenant: str) -> int | None:
        """How many devices may work for the tenant at once."""
        return self._quota(tenant).devices

    def _quota(self, tenant: str) -> TenantQuota:
        return self.quotas.get(tenant) or _NO_QUOTA


_NO_QUOTA = TenantQuota()


class _Quotas(RootModel[dict[str, PositiveInt | TenantQuota]]):
    """`quotas.yaml`: by tenant the devices it may have at once, or a whole quota."""


def read_quotas(storage: Storage) -> dict[str, TenantQuota]:
    """What `quotas.yaml` on the storage says, by tenant. Raises UserError for a file that is not understood."""
    try:
        found = _Quotas.model_validate(yaml.safe_load(storage.get(QUOTAS)) or {}).root
    except NotFound:
        return {}
    except (ValidationError, yaml.YAMLError) as error:
        raise UserError(
            f"{storage}: {QUOTAS} is not understood: {error}. It maps tenants to devices (`acme: 4`), or to `devices`, "
            "`waiting` and `device_seconds` (a month)."
        ) from None
    return {
        name: quota if isinstance(quota, BaseModel) else TenantQuota(devices=quota) for name, quota in found.items()
    }


def write_quota(storage: Storage, tenant: str, quota: TenantQuota) -> None:
    """Sets a tenant's quota for good. Two writers at once: the later one sees what the earlier wrote."""
    while True:
        try:
            _, tag = storage.get_tagged(QUOTAS)
        except NotFound:
            tag = None
        quotas = {**read_quotas(storage), tenant: quota}
        text = yaml.safe_dump({name: one.model_dump(exclude_none=True) for name, one in sorted(quotas.items())})
        if storage.swap(QUOTAS, text.encode(), tag):
            return

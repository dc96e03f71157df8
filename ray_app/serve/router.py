"""Which engine replica a request goes to: the one that has its adapter already, unless it is much busier than the rest.

Rendezvous hashing with bounded load. Every router ranks replicas for an adapter by a hash of both, so all agree without
talking, and a replica that starts or stops moves only its own share. A replica with more than `bound` times the
average of requests is passed over; loading an adapter takes milliseconds, waiting at a full replica takes
as long as whole images.
"""

import hashlib
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

BOUND = 1.25


def rank_replicas(adapter: str | None, load: Mapping[str, int], bound: float = BOUND) -> list[str]:
    """Replica names in the order to try them; `load` is how many requests each has.

    Without an adapter, or where the adapter's replicas are over the bound, the least busy come first.
    """
    by_load = sorted(load, key=lambda name: (load[name], name))
    if adapter is None:
        return by_load
    most = ceil(bound * (sum(load.values()) + 1) / max(1, len(load)))
    by_hash = sorted(load, key=lambda name: _score(adapter, name), reverse=True)
    free = [name for name in by_hash if load[name] < most]
    return free + [name for name in by_load if name not in free]


def adapter_of(args: Sequence[Any]) -> str | None:
    """The first adapter, `tenant/id@version`, of the request that is a call's first argument; None without one.

    The request itself is read, never a header: clients can set those.
    """
    payload = args[0] if args else None
    adapters = payload.get("adapters") if isinstance(payload, Mapping) else None
    if not adapters:
        return None
    ref = adapters[0]["ref"]
    return f"{ref['tenant']}/{ref['id']}@{ref['version']}"


class AffineRouter(RequestRouter):
    """Serve's hook for `rank_replicas`."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each, best first; Serve takes the first that accepts the request."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        adapter = adapter_of(pending_request.args) if pending_request is not None else None
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        load = {name: self.replica_queue_len_cache.get(one.replica_id) or 0 for name, one in replicas.items()}
        return [[replicas[name]] for name in rank_replicas(adapter, load)]


def _score(adapter: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{adapter}\0{replica}".encode(), digest_size=8).digest()

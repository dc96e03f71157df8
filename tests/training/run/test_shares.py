"""Runs on one cluster: who may have how many devices, when one has to give back, and what a quota bounds."""

from pathlib import Path

import pytest

from training.errors import UserError
from training.run.shares import CAPACITY_SECONDS, FORGET_SECONDS, PATIENCE_SECONDS, Claim, Shares, allot, read_quota
from training.storage.storage import open_storage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def claim(
    run: str, working: int = 0, pending: int = 0, tenant: str = "", priority: int = 0, quota: int | None = None
) -> Claim:
    return Claim(
        run=run, tenant=tenant or run, priority=priority, working=working, pending=pending, quota=quota
    )  # fmt: skip


@pytest.mark.parametrize(
    ("capacity", "claims", "given"),
    [
        (8, [claim("a", 8), claim("b", 0, 8)], {"a": 4, "b": 4}),
        (8, [claim("a", 8), claim("b", 0, 2)], {"a": 6, "b": 2}),
        (3, [claim("a", 2), claim("b", 2)], {"a": 2, "b": 1}),
        (8, [claim("a", 8), claim("b", 0, 8, priority=1)], {"a": 0, "b": 8}),
        (8, [claim("a", 8), claim("b", 0, 3, priority=1)], {"a": 5, "b": 3}),
        # two runs of one tenant are one tenant
        (8, [*(claim(f"a{i}", 0, 8, tenant="a") for i in (0, 1)), claim("b", 0, 8)], {"a0": 2, "a1": 2, "b": 4}),
        (8, [claim("a", 1), claim("b", 1)], {"a": 1, "b": 1}),
        (0, [claim("a", 1)], {"a": 0}),
    ],
)  # fmt: skip
def test_shares(capacity: int, claims: list[Claim], given: dict[str, int]) -> None:
    assert allot(capacity, claims) == given


def let_pass(clock: Clock, shares: Shares, seconds: float, *claims: Claim) -> None:
    """Time in which these runs go on asking."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += 5
        for one in claims:
            shares.claim(one)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_run_alone_takes_what_there_is(clock: Clock) -> None:
    shares = Shares(clock=clock)
    assert shares.claim(claim("a", 3, 5)) is None
    clock.now += 10 * PATIENCE_SECONDS
    assert shares.claim(claim("a", 3, 5)) is None


def test_one_that_waits_in_vain_gets_its_share_and_then_all_is_quiet(clock: Clock) -> None:
    shares = Shares(clock=clock)
    assert shares.claim(claim("a", 8, 2)) is None
    assert shares.claim(claim("b", 0, 6)) is None  # a node may come yet
    let_pass(clock, shares, PATIENCE_SECONDS + 1, claim("a", 8, 2), claim("b", 0, 6))
    assert shares.claim(claim("b", 0, 6)) == 4
    assert shares.claim(claim("a", 8, 2)) == 4
    # while devices change hands, the capacity is not mistaken for less
    assert shares.claim(claim("a", 4)) == 4
    assert shares.claim(claim("b", 2, 4)) == 4
    assert shares.claim(claim("b", 4, 2)) is None
    assert shares.claim(claim("a", 4)) is None
    let_pass(clock, shares, PATIENCE_SECONDS + 1, claim("a", 4, 4), claim("b", 4, 2))
    assert shares.claim(claim("a", 4, 4)) is None  # it may wait for more: an autoscaler sees that
    assert shares.claim(claim("b", 4, 2)) is None


def test_nodes_that_came_are_counted_and_those_that_went_are_forgotten(clock: Clock) -> None:
    shares = Shares(clock=clock)
    shares.claim(claim("a", 8))
    shares.claim(claim("b", 0, 8))
    let_pass(clock, shares, CAPACITY_SECONDS + 5, claim("a", 2), claim("b", 0, 8))
    assert shares.claim(claim("b", 0, 8)) == 1


def test_a_run_that_is_silent_is_gone(clock: Clock) -> None:
    shares = Shares(clock=clock)
    shares.claim(claim("a", 8))
    shares.claim(claim("b", 0, 8))
    clock.now += max(PATIENCE_SECONDS, FORGET_SECONDS) + 1
    assert shares.claim(claim("b", 8)) is None
    assert shares.claim(claim("c", 0, 1)) is None


def test_a_quota_bounds_a_tenant_over_all_its_runs(clock: Clock) -> None:
    shares = Shares(clock=clock)
    assert shares.claim(claim("a", 0, 0, tenant="acme", quota=4)) == 4
    assert shares.claim(claim("a", 4, 0, tenant="acme", quota=4)) == 4
    assert shares.claim(claim("b", 0, 0, tenant="acme", quota=4)) == 2
    assert shares.claim(claim("b", 0, 2, tenant="acme", quota=4)) == 2
    assert shares.claim(claim("a", 4, 0, tenant="acme", quota=4)) == 2
    assert shares.claim(claim("c", 0, 0, tenant="other")) is None


def test_quotas_are_read_from_the_storage(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert read_quota(storage, "acme") is None
    storage.put("quotas.yaml", b"acme: 4\n")
    assert read_quota(storage, "acme") == 4
    assert read_quota(storage, "other") is None
    for wrong in (b"acme: 0\n", b"acme: many\n", b"- acme\n", b"{"):
        storage.put("quotas.yaml", wrong)
        with pytest.raises(UserError, match=r"quotas.yaml is not understood"):
            read_quota(storage, "acme")

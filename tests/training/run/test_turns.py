"""Whose turn it is: priority, tenants by what they have used, age, quotas; by the real queue on a clock of its own."""

from pathlib import Path

import pytest

from training.errors import UserError
from training.run.lease import Entry
from training.run.run import SubjectRecord
from training.run.source import Beat, Doing, Outcome, Phase
from training.run.subject_queue import SubjectQueue
from training.run.turns import TenantQuota, Turns, read_quotas, write_quota
from training.storage.storage import open_storage


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def entry(tenant: str, id: str, run: str = "", priority: int = 0, profile: int = 0, print_: str = "") -> Entry:
    record = SubjectRecord(id=id, max_steps=10, fingerprint=print_ or f"{tenant}-{id}")
    return Entry(record=record, profile=profile, priority=priority, run=run or f"run-{tenant}-{id}", tenant=tenant)


def queue(*entries: Entry, quotas: dict[str, TenantQuota] | None = None, seats: int | None = None) -> SubjectQueue:
    made = SubjectQueue(entries, clock=Clock(), turns=Turns(quotas), seats=seats)
    made.enter(0, 0)
    return made


def leased(queue: SubjectQueue, count: int, lane: int = 0) -> list[str]:
    return [lease.id.partition("/")[2] for lease in queue.lease(lane, count)]


def work(queue: SubjectQueue, clock: Clock, seconds: float, lane: int = 0) -> None:
    """The lane holds what it has leased for so long."""
    clock.now += seconds
    held = next((view.held for view in queue.view().lanes if view.lane == lane), ())
    queue.beat(lane, Beat(phase=dict.fromkeys(held, Doing(Phase.PREPARING))))


def test_subjects_of_several_runs_and_tenants_share_a_lane_evenly() -> None:
    made = queue(*(entry("ann", f"a{index}") for index in range(4)), *(entry("bob", f"b{index}") for index in range(4)))
    assert leased(made, 4) == ["a0", "b0", "a1", "b1"]


def test_two_runs_may_call_their_subjects_the_same() -> None:
    made = queue(entry("ann", "rusty"), entry("bob", "rusty"))
    assert {lease.id for lease in made.lease(0, 2)} == {"run-ann-rusty/rusty", "run-bob-rusty/rusty"}


def test_priority_goes_before_shares() -> None:
    made = queue(entry("ann", "a0"), entry("bob", "b0"), entry("ann", "urgent", priority=1))
    assert leased(made, 3) == ["urgent", "b0", "a0"]


def test_who_has_used_more_waits() -> None:
    clock = Clock()
    made = SubjectQueue([entry("ann", "a0")], clock=clock)
    made.enter(0, 0)
    leased(made, 1)
    work(made, clock, 60)
    made.add([entry("ann", "a1"), entry("bob", "b0"), entry("bob", "b1")])
    assert leased(made, 1) == ["b0"]


def test_a_device_is_charged_to_those_that_it_works_for() -> None:
    clock = Clock()
    made = SubjectQueue([entry("ann", "a0"), entry("ann", "a1"), entry("bob", "b0")], clock=clock)
    made.enter(0, 0, devices=2)
    leased(made, 3)
    work(made, clock, 9)
    assert made.turns.used == pytest.approx({"ann": 12.0, "bob": 6.0})
    assert sum(one.device_s for one in made.spent().values()) == pytest.approx(18) and made.spent() == {}


def test_what_a_tenant_left_unused_is_not_saved_up() -> None:
    turns = Turns()
    turns.active({"ann"})
    turns.charge("ann", 1000)
    turns.active({"ann", "bob"})
    assert turns.used["bob"] == 1000


def test_a_month_that_is_used_up_holds_back() -> None:
    quotas = {"ann": TenantQuota(device_seconds=10)}
    made = queue(entry("ann", "a0"), entry("ann", "a1"), entry("bob", "b0"), quotas=quotas)
    made.turns.month = {"ann": 10}
    assert leased(made, 3) == ["b0"]
    assert made.order() == ["run-ann-a0/a0", "run-ann-a1/a1"]


def test_devices_bound_a_tenant_but_never_to_nothing() -> None:
    quotas = {"ann": TenantQuota(devices=1)}
    made = queue(*(entry("ann", f"a{index}") for index in range(4)), quotas=quotas)
    assert leased(made, 2) == ["a0", "a1"]
    made.enter(1, 0)
    assert leased(made, 2, lane=1) == []
    made.enter(2, 0)
    made.add([entry("bob", "b0"), entry("bob", "b1")])
    assert leased(made, 3, lane=2) == ["b0", "b1"]


def test_the_same_adapter_is_trained_once_for_two_runs() -> None:
    made = queue(entry("ann", "rusty", "one", print_="p"), entry("ann", "rusty", "two", print_="p"))
    assert [lease.id for lease in made.lease(0, 2)] == ["one/rusty"]
    made.ended(0, Outcome("one/rusty", "done", version="f00", step=10))
    states = {key: (record.state, record.version) for key, record in _records(made).items()}
    assert states == {"one/rusty": ("published", "f00"), "two/rusty": ("reused", "f00")}


def test_a_lane_ends_when_what_waits_for_another_has_its_turn() -> None:
    made = queue(entry("ann", "a0"), entry("bob", "b0", profile=1), entry("ann", "a1"), seats=1)
    assert leased(made, 1) == ["a0"]
    assert leased(made, 1) == []  # b0 is next, and there is one seat
    made.ended(0, Outcome("run-ann-a0/a0", "done", version="f00"))
    made.release(0, "it ended", "stopped")
    made.enter(1, 1)
    assert leased(made, 5, lane=1) == ["b0"]


def test_a_paused_subject_waits_for_nothing_and_goes_on_later() -> None:
    made = queue(entry("ann", "a0"), entry("ann", "a1"))
    assert leased(made, 1) == ["a0"]
    made.pause(["run-ann-a0/a0", "run-ann-a1/a1"])
    assert made.beat(0, Beat(phase={"run-ann-a0/a0": Doing(Phase.TRAINING)}, steps={"run-ann-a0/a0": 3},
                             losses={"run-ann-a0/a0": 1.0})).pause == {"run-ann-a0/a0"}  # fmt: skip
    made.ended(0, Outcome("run-ann-a0/a0", "paused", step=3))
    assert {record.state for record in _records(made).values()} == {"paused"} and leased(made, 2) == []
    made.resume(["run-ann-a0/a0"])
    assert leased(made, 2) == ["a0"]
    made.cancel(["run-ann-a1/a1"])
    assert _records(made)["run-ann-a1/a1"].state == "cancelled"


def test_quotas_are_read_and_written(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert read_quotas(storage) == {}
    storage.put("quotas.yaml", b"acme: 4\n")
    write_quota(storage, "ann", TenantQuota(waiting=7))
    assert read_quotas(storage) == {"acme": TenantQuota(devices=4), "ann": TenantQuota(waiting=7)}
    storage.put("quotas.yaml", b"acme: many\n")
    with pytest.raises(UserError, match=r"quotas\.yaml is not understood"):
        read_quotas(storage)


def _records(queue: SubjectQueue) -> dict[str, SubjectRecord]:
    view = queue.view(-1)
    return dict(zip(view.keys, view.changed, strict=True))

"""When subjects will be done, from the lanes' real rates."""

from pathlib import Path

import pytest

from tests.training.subjects import spec
from training.manifest.manifest import Manifest
from training.run.accepted import Ask, Order, accept, ask, asks, close, orders_of, read_order, unfinished, waiting_of
from training.run.run import RunRecord, RunStore, end_run
from training.run.standing import Finishes, read_standing
from training.run.usage import UsageBook, month_used, read_usage
from training.storage.storage import open_storage


def test_a_pack_shares_its_rate_and_those_that_stay_get_what_ends_leave() -> None:
    finishes = Finishes({0: 10.0})
    finishes.train(0, [("long", 100, 1), ("short", 20, 1)])
    # 20 steps of two rows at 10 rows a second, then 80 of one
    assert finishes.at(0.0) == pytest.approx({"short": 4.0, "long": 12.0})


def test_those_that_wait_follow_what_is_ahead() -> None:
    finishes = Finishes({0: 10.0})
    finishes.train(0, [("now", 50, 2)])
    finishes.wait(0, ("next", 50, 2))
    finishes.wait(0, ("last", 100, 1))
    assert finishes.at(100.0) == pytest.approx({"now": 110.0, "next": 120.0, "last": 130.0})


def test_nothing_is_foreseen_without_a_rate() -> None:
    finishes = Finishes({})
    finishes.train(0, [("now", 50, 2)])
    finishes.wait(1, ("next", 50, 2))
    assert finishes.at(0.0) == {}


def test_without_a_driver_nothing_trains(tmp_path: Path) -> None:
    standing = read_standing(open_storage(str(tmp_path)))
    assert (standing.lanes, standing.waiting, standing.time) == ((), (), 0.0)


def test_accepting_twice_is_accepting_once_and_asks_keep_their_order(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    manifest = Manifest(version=1, name="job", tenant="ann", base="b", subjects=(spec("rusty"),))
    record = RunRecord(run="r1", name="job", tenant="ann", base="b", base_hash="h", digest="d", manifest=manifest)
    order = Order(run="r1", tenant="ann", kind="job", subjects=1)
    for _ in range(2):
        accept(storage, record, "version: 1", order)
    assert (unfinished(storage), unfinished(storage, "bob"), waiting_of(storage, "ann")) == (["r1"], [], 1)
    assert (orders_of(storage, "ann", "job"), orders_of(storage, "ann", "run")) == (["r1"], [])
    assert read_order(storage, "r1") == order and read_order(storage, "r2") is None
    verbs = ["pause", "resume", "cancel"]
    for verb in verbs:
        ask(storage, Ask.model_validate({"run": "r1", "verb": verb}))
    assert [one.ask.verb for one in asks(storage)] == verbs
    end_run(RunStore(storage, "r1"), record, ())
    close(storage, order)
    assert unfinished(storage) == [] and waiting_of(storage, "ann") == 0
    accept(storage, record, "version: 1", order)
    assert unfinished(storage) == []  # it has ended: the same submission again starts nothing


def test_usage_of_several_processes_adds_up(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for book in (UsageBook(storage), UsageBook(storage)):
        book.add("ann", "rusty", {"device_seconds": 2.0, "images": 1})
        book.flush()
        book.add("ann", "rusty", {"device_seconds": 1.0})
        book.flush(every_s=60)  # not yet
        book.flush()
    (day,) = read_usage(storage, "ann", "2000-01-01", "2999-12-31").values()
    assert day == {"rusty": {"device_seconds": 6.0, "images": 2.0}}
    assert month_used(storage) == {"ann": 6.0} and read_usage(storage, "ann", "2000-01-01", "2000-01-02") == {}

"""The books of the slots: least recently used, pins, all or nothing."""

import random

import pytest

from serving.engine.tiers.slots import Slots


def test_the_least_recently_used_goes_first() -> None:
    slots = Slots[str](2)
    for key in ("a", "b", "a", "c"):
        assert slots.acquire([key])
        slots.release([key])
    assert slots.loaded() == ("a", "c")
    assert (slots.hits, slots.loads, slots.evictions) == (1, 3, 1)


def test_a_slot_in_use_is_never_evicted() -> None:
    slots = Slots[str](2)
    first = slots.acquire(["a"])
    assert first and slots.acquire(["b"])
    assert slots.acquire(["c"]) is None
    assert slots.evictions == 0
    slots.release(["b"])
    third = slots.acquire(["c"])
    assert third and third.fresh == ((1, "c"),) and "a" in slots and "b" not in slots
    slots.check_integrity()


def test_all_or_nothing() -> None:
    slots = Slots[str](3)
    assert slots.acquire(["a", "b"])
    before = slots.loaded()
    assert slots.acquire(["c", "d"]) is None
    assert slots.loaded() == before and slots.pinned == 2
    assert slots.acquire(["a", "b", "c"])


def test_asking_for_what_is_loaded_does_not_evict_it() -> None:
    slots = Slots[str](2)
    assert slots.acquire(["old"])
    slots.release(["old"])
    assert slots.acquire(["x"])
    slots.release(["x"])
    placement = slots.acquire(["new", "old"])
    assert placement and "x" not in slots and placement.fresh == ((1, "new"),) and placement.slots == (1, 0)


def test_one_adapter_twice_in_a_request_is_one_slot_and_one_pin() -> None:
    slots = Slots[str](1)
    placement = slots.acquire(["a", "a"])
    assert placement and placement.slots == (0, 0)
    slots.release(["a", "a"])
    assert slots.pinned == 0


def test_names_that_are_prefixes_of_each_other_are_different() -> None:
    slots = Slots[str](3)
    placement = slots.acquire(["cat", "cat2", "ca"])
    assert placement and len(set(placement.slots)) == 3


def test_drop() -> None:
    slots = Slots[str](2)
    assert slots.acquire(["a"])
    assert not slots.drop("a") and not slots.drop("b")
    slots.release(["a"])
    assert slots.drop("a") and "a" not in slots
    slots.check_integrity()


def test_a_random_life_keeps_the_books() -> None:
    choose = random.Random(0)
    slots = Slots[int](4)
    running: list[list[int]] = []
    for _ in range(3000):
        if running and choose.random() < 0.5:
            slots.release(running.pop(choose.randrange(len(running))))
        keys = choose.sample(range(50), choose.randint(1, 3))
        if slots.acquire(keys):
            running.append(keys)
        assert all(key in slots for keys in running for key in keys)
        slots.check_integrity()
    assert slots.evictions > 100


def test_check_integrity_says_what_is_wrong() -> None:
    slots = Slots[str](2)
    slots._free.pop()
    with pytest.raises(AssertionError, match=r"free\(1\) \+ loaded\(0\) != slots\(2\)"):
        slots.check_integrity()

"""The policy: fairness between tenants and sizes, bounds, patience."""

from collections import Counter
from dataclasses import dataclass

import pytest

from serving.engine.scheduler import Scheduler
from serving.errors import QueueFull


@dataclass(eq=False, slots=True)
class Picture:
    tenant: str = "a"
    size: tuple[int, int] = (8, 8)
    rows: int = 2
    ready: bool = True
    left: int = 4


def drive(scheduler: Scheduler[Picture], steps: int) -> list[list[Picture]]:
    """Takes `steps` steps, admitting and finishing on the way."""
    batches = []
    for _ in range(steps):
        scheduler.admit(lambda item: True)
        batch = scheduler.batch()
        batches.append(batch)
        for item in batch:
            item.left -= 1
            if item.left == 0:
                assert scheduler.remove(item)
        scheduler.check_integrity()
    return batches


def test_rows_of_different_lengths_step_together_and_short_ones_leave() -> None:
    scheduler = Scheduler[Picture](max_rows=8, queue=8)
    short, long = Picture(left=2), Picture(left=5)
    scheduler.submit([short])
    scheduler.submit([long])
    assert [len(batch) for batch in drive(scheduler, 6)] == [2, 2, 1, 1, 1, 0]
    assert scheduler.idle


def test_a_forward_is_bounded() -> None:
    scheduler = Scheduler[Picture](max_rows=5, queue=100)
    scheduler.submit([Picture() for _ in range(20)])
    assert all(sum(item.rows for item in batch) <= 5 for batch in drive(scheduler, 30))


def test_an_image_larger_than_a_forward_still_runs() -> None:
    scheduler = Scheduler[Picture](max_rows=1, queue=4)
    scheduler.submit([Picture(), Picture()])
    assert [len(batch) for batch in drive(scheduler, 9)] == [1] * 8 + [0]


def test_sizes_take_turns() -> None:
    scheduler = Scheduler[Picture](max_rows=32, queue=32)
    scheduler.submit([Picture(size=(8, 8), left=10) for _ in range(6)])
    scheduler.submit([Picture(size=(16, 8), left=10)])
    sizes = [batch[0].size for batch in drive(scheduler, 20)]
    assert Counter(sizes) == {(8, 8): 10, (16, 8): 10}
    assert all(sizes[i] != sizes[i + 1] for i in range(18))


def test_a_flood_of_one_tenant_does_not_starve_another() -> None:
    scheduler = Scheduler[Picture](max_rows=8, queue=400)
    scheduler.submit([Picture(tenant="flood", left=50) for _ in range(300)])
    drive(scheduler, 5)
    late = Picture(tenant="late", left=4)
    scheduler.submit([late])
    drive(scheduler, 5)  # a step to get in, then every step
    assert late.left == 0


def test_busy_tenants_get_equal_steps_whatever_they_queue() -> None:
    scheduler = Scheduler[Picture](max_rows=8, queue=2000)
    scheduler.submit([Picture(tenant="flood", left=10) for _ in range(500)])
    scheduler.submit([Picture(tenant="few", left=10) for _ in range(100)])
    steps = Counter(item.tenant for batch in drive(scheduler, 200) for item in batch)
    assert abs(steps["flood"] - steps["few"]) <= 0.05 * steps["few"]


def test_an_idle_tenant_saves_nothing_up() -> None:
    scheduler = Scheduler[Picture](max_rows=4, queue=2000)
    scheduler.submit([Picture(tenant="b", left=1)])
    drive(scheduler, 2)
    scheduler.submit([Picture(tenant="a", left=10) for _ in range(50)])
    drive(scheduler, 100)
    scheduler.submit([Picture(tenant="b", left=10) for _ in range(50)])
    steps = Counter(item.tenant for batch in drive(scheduler, 100) for item in batch)
    assert steps["a"] >= 0.9 * steps["b"]


def test_a_full_queue_refuses_whole_requests() -> None:
    scheduler = Scheduler[Picture](max_rows=8, queue=4)
    scheduler.submit([Picture() for _ in range(3)])
    with pytest.raises(QueueFull, match="3 images are waiting and at most 4 may") as caught:
        scheduler.submit([Picture(), Picture()], retry_after_s=7)
    assert caught.value.retry_after_s == 7 and scheduler.waiting == 3


def test_a_flooded_queue_still_takes_another_tenants_share() -> None:
    scheduler = Scheduler[Picture](max_rows=8, queue=4)
    scheduler.submit([Picture(tenant="flood") for _ in range(4)])
    scheduler.submit([Picture(tenant="other") for _ in range(2)])
    with pytest.raises(QueueFull):
        scheduler.submit([Picture(tenant="other")])


def test_what_is_not_ready_is_overtaken_by_what_is() -> None:
    scheduler = Scheduler[Picture](max_rows=8, queue=8)
    cold, warm = Picture(ready=False), Picture()
    scheduler.submit([cold])
    scheduler.submit([warm])
    assert drive(scheduler, 1) == [[warm]]
    cold.ready = True
    assert cold in drive(scheduler, 1)[0]


def test_patience_ends_when_slots_stay_taken() -> None:
    """An image that needs slots nobody gives up is overtaken only so often."""
    scheduler = Scheduler[Picture](max_rows=8, queue=1000)
    scheduler.patience = 5
    greedy = Picture(tenant="greedy")
    scheduler.submit([greedy])
    scheduler.submit([Picture(tenant="crowd", left=1) for _ in range(100)])
    started: list[Picture] = []

    def start(item: Picture) -> bool:
        if item is greedy and scheduler.running:
            return False  # needs every slot
        started.append(item)
        return True

    scheduler.admit(lambda item: item is not greedy and start(item))
    for _ in range(40):
        for item in scheduler.batch():
            scheduler.remove(item)
        scheduler.admit(start)
    assert greedy in started


def test_cancelled_while_waiting() -> None:
    scheduler = Scheduler[Picture](max_rows=8, queue=8)
    item = Picture()
    scheduler.submit([item])
    assert scheduler.remove(item) is False and scheduler.idle

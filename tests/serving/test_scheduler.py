"""The policy: fairness between tenants and sizes, bounds, patience."""

from collections import Counter
from dataclasses import dataclass

import pytest

from serving.errors import QueueFull
from serving.scheduler import Scheduler


@dataclass(eq=False, slots=True)
class Picture:
    tenant: str = "a"
    size: tuple[int, int] = (8, 8)
    rows: int = 2
    ready: bool = True
    left: int = 4

    @property
    def kind(self) -> tuple[int, int]:
        return self.size

    @property
    def cells(self) -> int:
        return self.size[0] * self.size[1]


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


def served(batches: list[list[Picture]], by: str = "tenant") -> Counter[object]:
    """Rows x cells by tenant, or by another attribute."""
    total: Counter[object] = Counter()
    for item in (item for batch in batches for item in batch):
        total[getattr(item, by)] += item.rows * item.cells
    return total


def steps_until_done(scheduler: Scheduler[Picture], item: Picture, most: int = 1000) -> int:
    for step in range(most):
        if item.left == 0:
            return step
        drive(scheduler, 1)
    raise AssertionError(f"not done after {most} steps")


def test_a_step_is_bounded_in_cells() -> None:
    """Large images do not pile up in one step; one image goes whatever its size."""
    scheduler = Scheduler[Picture](max_rows=32, queue=100, max_cells=32 * 64)
    scheduler.submit([Picture(size=(16, 16)) for _ in range(20)])
    scheduler.submit([Picture(size=(64, 64)) for _ in range(2)])
    for batch in drive(scheduler, 100):
        assert len(batch) <= 1 or sum(item.rows * item.cells for item in batch) <= 32 * 64
    assert scheduler.idle


def test_images_of_one_tenant_share_by_cost() -> None:
    """A tenant's small image is not held up by its large one, nor the large one for ever by small ones."""
    scheduler = Scheduler[Picture](max_rows=32, queue=1000)
    scheduler.submit([Picture(size=(64, 64), left=1000)])
    small = Picture(size=(8, 8), left=25)
    drive(scheduler, 3)
    scheduler.submit([small])
    assert steps_until_done(scheduler, small) <= 26
    scheduler.submit([Picture(size=(8, 8), left=25) for _ in range(160)])
    share = served(drive(scheduler, 200), by="size")
    large_step = 2 * 64 * 64
    assert share[(64, 64)] + large_step >= share[(8, 8)] / 16  # beside the up to 16 small ones that run at once


@pytest.mark.parametrize("large", [[(64, 64)], [(16 + side, 64) for side in range(16)]], ids=["one", "sixteen sizes"])
def test_a_small_image_does_not_wait_for_the_large_ones_of_another(large: list[tuple[int, int]]) -> None:
    scheduler = Scheduler[Picture](max_rows=32, queue=100)
    scheduler.submit([Picture(tenant="large", size=size, left=100) for size in large])
    drive(scheduler, 5)
    small = Picture(tenant="small", left=25)
    scheduler.submit([small])
    assert steps_until_done(scheduler, small) <= 27


@pytest.mark.parametrize("phase", range(3))
def test_a_small_image_waits_for_one_step_however_many_large_tenants_there_are(phase: int) -> None:
    """Not for a step of each of them: that a step of theirs would come first is not decided before it begins."""
    scheduler = Scheduler[Picture](max_rows=32, queue=400, max_cells=32 * 64)
    for side in (16, 32, 64):
        scheduler.submit([Picture(tenant=str(side), size=(side, side), left=1000) for _ in range(8)])
    drive(scheduler, 30 + phase)
    light = Picture(tenant="light", left=4)
    scheduler.submit([light])
    assert steps_until_done(scheduler, light) == 4


def test_a_large_image_gets_its_share_beside_a_stream_of_small_ones() -> None:
    """Each small request comes from a tenant that was not there before, so none has been served before."""
    scheduler = Scheduler[Picture](max_rows=32, queue=100)
    large = Picture(tenant="large", size=(64, 64), left=10)
    scheduler.submit([large])
    small = Picture(tenant="0", left=0)
    for number in range(1000):
        if small.left == 0:
            small = Picture(tenant=str(number + 1), left=5)
            scheduler.submit([small])
        drive(scheduler, 1)
    assert large.left == 0  # 64 small steps cost what one large step costs


def test_sizes_share_by_rows_times_cells() -> None:
    scheduler = Scheduler[Picture](max_rows=16, queue=1000)
    sizes = {"a": (8, 8), "b": (16, 16), "c": (32, 32)}
    for tenant, size in sizes.items():
        scheduler.submit([Picture(tenant=tenant, size=size, left=1000) for _ in range(20)])
    total = served(drive(scheduler, 400))
    assert max(total.values()) - min(total.values()) <= 2 * 16 * 32 * 32  # a step of the largest, before and after


def test_a_flood_of_one_size_goes_no_further_in_anothers_step_than_the_other() -> None:
    """On a device where every row costs, the step of a light tenant is at most twice as long beside a flood."""
    scheduler = Scheduler[Picture](max_rows=32, queue=400)
    scheduler.submit([Picture(tenant="flood", left=500) for _ in range(100)])
    drive(scheduler, 5)
    light = Picture(tenant="light", left=25)
    scheduler.submit([light])
    batches = drive(scheduler, 26)
    assert light.left == 0
    assert all(len(batch) <= 2 for batch in batches if light in batch)
    assert len(drive(scheduler, 1)[0]) == 16  # alone again, the flood fills its steps


def test_rows_that_cost_nothing_are_filled() -> None:
    """On a device that is not full, the flood goes along with the light tenant's steps."""
    scheduler = Scheduler[Picture](max_rows=32, queue=400)
    for rows in (2, 32) * 5:
        scheduler.pace.saw((8, 8), rows, 1.0 + rows / 64)
    scheduler.submit([Picture(tenant="flood", left=500) for _ in range(100)])
    scheduler.submit([Picture(tenant="light", left=25)])
    assert [len(batch) for batch in drive(scheduler, 10)] == [16] * 10
    later = Picture(tenant="later", left=25)
    scheduler.submit([later])
    assert steps_until_done(scheduler, later) <= 26


def test_what_was_free_is_not_held_against_a_tenant_for_long() -> None:
    scheduler = Scheduler[Picture](max_rows=32, queue=400)
    for rows in (2, 32) * 5:
        scheduler.pace.saw((8, 8), rows, 1.0)
    scheduler.submit([Picture(tenant="flood", left=5000) for _ in range(100)])
    scheduler.submit([Picture(tenant="light", left=200)])
    drive(scheduler, 200)
    scheduler.submit([Picture(tenant="second", left=5000) for _ in range(100)])
    total = served(drive(scheduler, 20))
    assert total["flood"] >= 0.8 * total["second"]


def test_a_third_tenant_is_let_in_though_two_fill_all_places() -> None:
    scheduler = Scheduler[Picture](max_rows=8, queue=400)
    for name in ("a", "b"):
        scheduler.submit([Picture(tenant=name, left=1000) for _ in range(50)])
    drive(scheduler, 5)
    late = Picture(tenant="late", left=4)
    scheduler.submit([late])
    assert steps_until_done(scheduler, late) <= 5


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

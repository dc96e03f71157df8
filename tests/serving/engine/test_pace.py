"""What a step costs by its rows, learned from steps."""

import pytest

from serving.engine.pace import REMEMBERED, Pace


def test_before_any_step_rows_cost_alike() -> None:
    assert Pace().stretch("kind", 8, than=2) == 4


@pytest.mark.parametrize(("start", "slope"), [(1.0, 0.0), (1.0, 0.25), (0.0, 0.5)])
def test_a_line_is_found(start: float, slope: float) -> None:
    pace = Pace()
    for rows in (2, 8, 32, 4) * 3:
        pace.saw("kind", rows, start + slope * rows)
    assert pace.stretch("kind", 32, than=2) == pytest.approx((start + 32 * slope) / (start + 2 * slope))
    assert pace.stretch("other", 32, than=2) == 16


def test_steps_of_one_width_say_nothing_about_another() -> None:
    pace = Pace()
    for _ in range(10):
        pace.saw("kind", 4, 1.0)
    assert pace.stretch("kind", 8, than=4) == pytest.approx(2)


def test_more_rows_never_make_a_step_shorter() -> None:
    """Whatever the clock said: other work on the machine may have made a small step the slower one."""
    pace = Pace()
    for rows, seconds in ((2, 9.0), (32, 1.0)) * 5:
        pace.saw("kind", rows, seconds)
    assert pace.stretch("kind", 32, than=2) == 1


def test_a_device_that_has_become_slower_is_followed() -> None:
    pace = Pace()
    for rows in (2, 32) * 100:
        pace.saw("kind", rows, 1.0)
    for rows in (2, 32) * 100:
        pace.saw("kind", rows, float(rows))
    assert pace.stretch("kind", 32, than=2) > 10


def test_clients_sizes_do_not_fill_the_memory() -> None:
    pace = Pace()
    for side in range(2 * REMEMBERED):
        for rows in (2, 4):
            pace.saw(side, rows, 1.0)
    assert pace.stretch(0, 4, than=2) == 2 and pace.stretch(2 * REMEMBERED - 1, 4, than=2) == 1

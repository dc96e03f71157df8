"""A node goes away under a run: its subjects go on elsewhere, and it costs nobody an attempt."""

import pytest

from tests.ray_app.conftest import Desk
from tests.ray_app.nodes import run_program

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_node_is_lost_under_two_lanes(desk: Desk) -> None:
    ids = tuple(f"subject-{index:02d}" for index in range(8))
    result = run_program("tests.ray_app.faults.lost_node", desk.manifest(*ids, steps=300, every=20), desk).json
    assert result["lost"]
    assert {subject["state"] for subject in result["subjects"]} == {"published"}
    kinds = {attempt["kind"] for subject in result["subjects"] for attempt in subject["attempts"]}
    assert kinds == {"preempted"}, result

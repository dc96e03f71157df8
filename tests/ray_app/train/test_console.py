"""What a person sees of a run in a terminal."""

import io

import pytest
from rich.console import Console

from ray_app.train.console import RunConsole
from training.run.run import State, SubjectRecord
from training.run.subject_queue import View


@pytest.mark.parametrize(("state", "starts"), [("queued", True), ("published", False), ("failed", False)])
def test_only_a_run_with_work_left_is_starting(state: State, starts: bool) -> None:
    record = SubjectRecord(id="rusty", state=state, step=4, max_steps=4)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    watched = RunConsole(console, "pets-1")
    console.print(watched._picture(View.of_records([record]), {"rusty": record}))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "pets-1" in shown
    assert ("starting" in shown) == starts

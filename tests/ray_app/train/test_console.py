"""What a person sees of a run in a terminal."""

import io

import pytest
from rich.console import Console

from ray_app.train.console import RunConsole
from training.run.run import State, SubjectRecord
from training.run.source import Doing, Phase
from training.run.view import LaneView, RunView


@pytest.mark.parametrize(("state", "starts"), [("queued", True), ("published", False), ("failed", False)])
def test_only_a_run_with_work_left_is_starting(state: State, starts: bool) -> None:
    record = SubjectRecord(id="rusty", state=state, step=4, max_steps=4)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    watched = RunConsole(console, "pets-1")
    console.print(watched._picture(RunView.of_records([record]), {"rusty": record}))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "pets-1" in shown
    assert ("starting" in shown) == starts


def test_plain_lines_tell_the_step_of_those_that_train_and_what_is_done_with_the_others() -> None:
    records = {id: SubjectRecord(id=id, state="preparing", step=4, max_steps=9, pack=0) for id in ("a", "b", "c")}
    doing = {"a": Doing(Phase.TRAINING), "b": Doing(Phase.CLASS_IMAGES, 3, 200)}
    lane = LaneView(lane=0, profile=0, held=("a", "b", "c"), phases=doing, images_per_second=8.0)
    console = Console(file=io.StringIO(), width=100)
    RunConsole(console, "pets-1").see(
        RunView(seq=1, changed=(), lanes=(lane,), waiting={}, unfinished=3, notes=()), records
    )
    assert isinstance(console.file, io.StringIO)
    assert "pack 0: 8.0 images/s; a 4/9, b class images 3/200, c waiting" in console.file.getvalue()

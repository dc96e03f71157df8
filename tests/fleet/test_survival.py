"""The whole service is killed: what was accepted is trained and published once by the next one, and told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from fleet.board import Board
from fleet.config import FleetSpec
from fleet.http.bodies import JobBody
from fleet.submitting import SubmissionDesk
from tests.fleet.house import FAST, photos, wait_for
from tests.fleet.test_hooks import SECRET, Listener
from training.base.files.folder import hash_base
from training.base.files.outline import outline
from training.run import accepted
from training.run.cancel import cancel_run
from training.run.fleet import FleetDriver, fleet_lead
from training.run.run import RunStore
from training.run.source import Outcome
from training.storage.registry import Registry
from training.storage.storage import open_storage


class UpProcess:
    """`dreamfleet up` in a process of its own, that can be killed."""

    def __init__(self, base: Path, storage: Path) -> None:
        self._log = storage.parent / "up.log"
        command = [sys.executable, "-m", "ray_app.cli.main", "up", "--base", str(base), "--storage", str(storage)]
        command += ["--port", "0", "--private-hooks", "--device", "cpu", "--slots", "4", "--max-rows", "8"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._begun = len(self._read())
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def client(self) -> openai.OpenAI:
        """A client, once it listens."""
        until = time.monotonic() + 90
        while time.monotonic() < until:
            said = self._read()[self._begun :]
            if "running on http://" in said:
                url = said.split("running on ")[1].split()[0]
                return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            assert self.process.poll() is None, said
            time.sleep(0.1)
        raise AssertionError(self._read())

    def kill(self) -> None:
        """Without a word."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def _read(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_what_was_accepted_outlives_the_whole_service(tiny_folder: Path, tmp_path: Path, listener: Listener) -> None:
    storage = tmp_path / "storage"
    first = UpProcess(tiny_folder, storage)
    try:
        client = first.client()
        base = client.models.list().data[0].id
        settings = {**FAST, "train": {"max_steps": 3000, "checkpoint_every": 20, "learning_rate": 1e-3}}
        settings["evaluate"] = {"enabled": False}
        method: Any = {"type": "dreambooth_lora", "dreambooth_lora": settings}
        jobs = []
        for index in range(3):
            file = client.files.create(file=("d.zip", photos(5, index)), purpose="fine-tune").id
            more = {"webhook": {"url": listener.url, "secret": SECRET}}
            short: Any = {"max_steps": 60}
            jobs.append(
                client.fine_tuning.jobs.create(
                    model=base, training_file=file, suffix=f"dog{index}", method=method, hyperparameters=short,
                    extra_body=more,
                ).id
            )  # fmt: skip
        wait_for(client, jobs[0], "running")
    finally:
        first.kill()
    second = UpProcess(tiny_folder, storage)
    try:
        client = second.client()
        done = [wait_for(client, job, "succeeded", "failed") for job in jobs]
        listener.wait(3)
    finally:
        second.process.terminate()
        assert second.process.wait(60) == 0
    registry = Registry(open_storage(str(storage)))
    for index, job in enumerate(done):
        assert job.status == "succeeded" and job.model_dump()["progress"]["step"] == 60
        assert registry.versions("default", f"dog{index}") == [job.model_dump()["version"]]
    assert len({body for body, _ in listener.heard}) == 3
    assert not accepted.unfinished(open_storage(str(storage)))


def desk(folder: Path, storage: Path) -> SubmissionDesk:
    base, opened = outline(str(folder)), open_storage(str(storage))
    return SubmissionDesk(opened, base, hash_base(base.folder), FleetSpec(), Board(opened))


def driver(desk: SubmissionDesk, **more: Any) -> FleetDriver:
    lead = fleet_lead(desk.storage)
    assert lead.acquire() is None
    return FleetDriver(desk.storage, desk.base, desk.base_hash, lead, **more)


def submit(desk: SubmissionDesk, tenant: str, id: str, seed: int = 0, **settings: Any) -> str:
    file = desk.files.add(tenant, "d.zip", photos(5, seed))
    method = {"type": "dreambooth_lora", "dreambooth_lora": {**FAST, **settings}}
    body = JobBody.model_validate({"model": desk.name, "training_file": file.id, "suffix": id, "method": method})
    return desk.submit_job(tenant, body, None).order.run


def test_a_driver_takes_up_what_another_one_left(tiny_folder: Path, tmp_path: Path) -> None:
    """Also what was asked meanwhile; and only one drives at a time."""
    made = desk(tiny_folder, tmp_path)
    runs = [submit(made, "ann", f"a{index}", index) for index in range(3)]
    one = driver(made)
    one.tick()
    (wanted,) = one.wanted()
    one.enter(0, wanted.profile)
    assert [task.spec.id for task in one.lease(0, 2)] == ["a0", "a1"]
    one.ended(0, Outcome(f"{runs[0]}/a0", "done", version="f" * 64, step=6))
    one.tick()
    assert made.board.look("ann", runs[0], "job").subjects[0].state == "published"
    assert made.board.waiting("ann") == 2
    lead = fleet_lead(made.storage)
    assert lead.acquire() is not None
    accepted.ask(made.storage, accepted.Ask(run=runs[2], verb="cancel"))
    one.lead.release()  # it is gone; nothing else was said
    assert lead.acquire() is None
    second = FleetDriver(made.storage, made.base, made.base_hash, lead)
    second.tick()
    assert [one.waiting for one in second.wanted()] == [1]
    assert made.board.look("ann", runs[2], "job").subjects[0].state == "cancelled"
    second.enter(5, second.wanted()[0].profile)
    assert [task.spec.id for task in second.lease(5, 9)] == ["a1"]


def test_an_end_is_told_before_its_run_is_forgotten(tiny_folder: Path, tmp_path: Path) -> None:
    """If telling fails, the next driver tells it."""
    made = desk(tiny_folder, tmp_path)
    run = submit(made, "ann", "a")

    def broken(*about: object) -> None:
        raise ZeroDivisionError

    one = driver(made, ended=broken)
    one.tick()
    one.enter(0, one.wanted()[0].profile)
    one.lease(0, 1)
    one.ended(0, Outcome(f"{run}/a", "bad subject", reason="why"))
    with pytest.raises(ZeroDivisionError):
        one.tick()
    one.lead.release()
    told = []
    second = driver(made, ended=lambda order, record, subject: told.append(subject.state))
    second.tick()
    assert told == ["failed"] and accepted.unfinished(made.storage) == []


def test_a_retry_takes_up_what_has_failed(tiny_folder: Path, tmp_path: Path) -> None:
    made = desk(tiny_folder, tmp_path)
    run = submit(made, "ann", "a")
    one = driver(made)
    one.tick()
    one.enter(0, one.wanted()[0].profile)
    one.lease(0, 1)
    one.ended(0, Outcome(f"{run}/a", "bad subject", reason="why"))
    one.tick()
    assert RunStore(made.storage, run).record().state == "failed" and not one.wanted()
    accepted.ask(made.storage, accepted.Ask(run=run, verb="retry"))
    one.tick()
    assert [wanted.waiting for wanted in one.wanted()] == [1]
    assert made.board.look("ann", run, "job").subjects[0].state == "queued"


def test_a_run_of_another_base_fails_in_words(tiny_folder: Path, tmp_path: Path) -> None:
    made = desk(tiny_folder, tmp_path)
    run = submit(made, "ann", "a")
    lead = fleet_lead(made.storage)
    assert lead.acquire() is None
    FleetDriver(made.storage, made.base, "0" * 64, lead).tick()
    subject = made.board.look("ann", run, "job").subjects[0]
    assert subject.state == "failed" and "Submit it again" in str(subject.reason)


def test_the_command_line_asks_the_fleet(tiny_folder: Path, tmp_path: Path) -> None:
    """`dreamfleet cancel RUN` does not go behind its driver's back."""
    made = desk(tiny_folder, tmp_path)
    run = submit(made, "ann", "a")
    one = driver(made)
    one.tick()
    store = RunStore(made.storage, run)
    assert not cancel_run(store, store.record(), [], driven=False)
    assert made.board.look("ann", run, "job").subjects[0].state == "queued"
    one.tick()
    assert made.board.look("ann", run, "job").subjects[0].state == "cancelled"
    assert store.record().state == "cancelled" and not accepted.asks(made.storage)

"""A fleet on a cluster loses a lane, then its ingress: what was accepted is trained once, and told."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from fleet.config import FleetSpec
from ray_app.serve.deployments import APP, Deployment, Server, start_server
from ray_app.serve.fleet import FleetDeployment, build_fleet
from ray_app.train.fleet_actor import FleetLanes
from serving.config import ServeSpec
from tests.fleet.house import FAST, photos, wait_for
from tests.fleet.test_hooks import SECRET, Listener
from tests.serving.company import small
from training.run import accepted
from training.run.run import RunStore
from training.run.usage import read_usage
from training.storage.registry import Registry
from training.storage.storage import Storage, open_storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 600


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def served(tiny_folder: Path, tmp_path: Path) -> Iterator[Server]:
    spec = FleetSpec(warm_s=60, private_hooks=True)

    def build(deployment: Deployment) -> Any:
        return build_fleet(FleetDeployment(deployment=deployment, fleet=spec, lanes=FleetLanes(lanes=1)))

    server = start_server(
        storage=str(tmp_path / "storage"),
        port=0,
        base=str(tiny_folder),
        keys=None,
        deployment=Deployment(server=ServeSpec(engine=small(queue=64))),
        build=build,
    )
    yield server
    server.stop()


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=8)


def submit(client: openai.OpenAI, listener: Listener, id: str, seed: int) -> str:
    settings = {**FAST, "train": {"max_steps": STEPS, "checkpoint_every": 20, "learning_rate": 1e-3}}
    settings["evaluate"] = {"enabled": False}
    method: Any = {"type": "dreambooth_lora", "dreambooth_lora": settings}
    file = client.files.create(file=("d.zip", photos(5, seed)), purpose="fine-tune").id
    return client.fine_tuning.jobs.create(
        model=client.models.list().data[0].id,
        training_file=file,
        suffix=id,
        method=method,
        extra_body={"webhook": {"url": listener.url, "secret": SECRET}},
        extra_headers={"Idempotency-Key": id},
    ).id


def kill_one(name: str) -> None:
    """SIGKILL to the process of this test whose title begins with `name`."""
    found = [one for one in psutil.Process().children(recursive=True) if " ".join(one.cmdline()).startswith(name)]
    assert len(found) == 1, [one.cmdline()[:1] for one in psutil.Process().children(recursive=True)]
    found[0].kill()
    found[0].wait(30)


def until(what: Callable[[], bool], why: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, why
        time.sleep(0.2)


def test_a_lane_and_the_ingress_are_killed(served: Server, listener: Listener, tmp_path: Path) -> None:
    storage: Storage = open_storage(str(tmp_path / "storage"))
    client = client_of(served)
    jobs = {f"dog{index}": "" for index in range(2)}
    for seed, id in enumerate(jobs):
        jobs[id] = submit(client, listener, id, seed)
    until(lambda: min(_checkpoint(storage, jobs[id], id) for id in jobs) >= 20, "no checkpoint of both")

    kill_one("ray::RayTrainWorker")
    until(lambda: all(_attempts(storage, jobs[id], id) == ["lost"] for id in jobs), "the loss is not noted")
    until(lambda: any(_running(storage, jobs[id], id) for id in jobs), "no lane took them up again")

    kill_one(f"ray::ServeReplica:{APP}:ingress")
    late = submit_through(served, listener)  # the proxy has an ingress again before long
    jobs["late"] = late
    done = {id: wait_for(client_of(served), job, "succeeded", "failed", seconds=300) for id, job in jobs.items()}
    listener.wait(3)

    registry = Registry(storage)
    for id, job in done.items():
        assert job.status == "succeeded", job
        assert registry.versions("default", id) == [job.model_dump()["version"]]
    assert len({body for body, _ in listener.heard}) == 3
    until(lambda: not accepted.unfinished(storage), "the fleet still has something to do")
    used = read_usage(storage, "default", "0000", "9999")
    steps = {id: sum(day.get(id, {}).get("training_steps", 0) for day in used.values()) for id in jobs}
    assert all(steps[id] >= STEPS for id in jobs) and steps["late"] == STEPS  # steps made twice have been used twice


def submit_through(served: Server, listener: Listener) -> str:
    """Submits a job to an ingress that is being replaced, with one key however often it takes."""
    for _ in range(60):
        try:
            return submit(client_of(served), listener, "late", 7)
        except (openai.APIError, httpx.HTTPError):
            time.sleep(0.5)
    raise AssertionError("no ingress came back within 30 s")


def _checkpoint(storage: Storage, run: str, id: str) -> int:
    return max(RunStore(storage, run).checkpoints(id), default=0)


def _attempts(storage: Storage, run: str, id: str) -> list[str]:
    subject = RunStore(storage, run).subject(id)
    return [attempt.kind for attempt in subject.attempts] if subject is not None else []


def _running(storage: Storage, run: str, id: str) -> bool:
    subject = RunStore(storage, run).subject(id)
    return subject is not None and subject.state in ("preparing", "training")

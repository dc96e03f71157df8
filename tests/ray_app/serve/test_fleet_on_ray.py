"""A fleet on a cluster: subjects of two tenants train in one lane, which stays warm; a driver dies, another goes on."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from fleet.config import FleetSpec
from ray_app.serve.deployments import Deployment, Server, start_server
from ray_app.serve.fleet import DRIVER, FleetDeployment, build_fleet
from ray_app.train.fleet_actor import FleetLanes
from serving.config import ServeSpec
from serving.http.access.tenants import Keys
from tests.fleet.house import FAST, photos, wait_for
from tests.serving.company import small
from training.storage.registry import Registry
from training.storage.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def served(tiny_folder: Path, tmp_path: Path) -> Iterator[tuple[Server, dict[str, str]]]:
    keys = Keys(tmp_path / "keys.json")
    tokens = {name: keys.make(name)[1] for name in ("ann", "bob")}
    spec = FleetSpec(warm_s=60)
    lanes = FleetLanes(lanes=1)

    def build(deployment: Deployment) -> Any:
        return build_fleet(FleetDeployment(deployment=deployment, fleet=spec, lanes=lanes))

    server = start_server(
        storage=str(tmp_path / "storage"),
        port=0,
        base=str(tiny_folder),
        keys=str(tmp_path / "keys.json"),
        deployment=Deployment(server=ServeSpec(engine=small(queue=64))),
        build=build,
    )
    yield server, tokens
    server.stop()


def test_lanes_of_the_fleet_serve_whoever_asks(served: tuple[Server, dict[str, str]], tmp_path: Path) -> None:
    import ray

    server, tokens = served
    clients = {name: openai.OpenAI(base_url=f"{server.url}/v1", api_key=tokens[name]) for name in tokens}
    base = clients["ann"].models.list().data[0].id

    def submit(name: str, id: str, seed: int, steps: int) -> str:
        settings = {**FAST, "train": {**FAST["train"], "max_steps": steps}, "evaluate": {"enabled": False}}
        method: Any = {"type": "dreambooth_lora", "dreambooth_lora": settings}
        file = clients[name].files.create(file=("d.zip", photos(5, seed)), purpose="fine-tune").id
        job = clients[name].fine_tuning.jobs.create(model=base, training_file=file, suffix=id, method=method)
        return job.id

    first = {name: submit(name, "rusty", seed, 300) for seed, name in enumerate(clients)}
    together: set[int] = set()
    for name, job in first.items():
        wait_for(clients[name], job, "running", "succeeded", seconds=180)
    until = time.monotonic() + 120
    while 2 not in together and time.monotonic() < until:
        for name, job in first.items():
            together.add(clients[name].fine_tuning.jobs.retrieve(job).model_dump()["progress"]["together"])
        time.sleep(0.1)
    assert 2 in together
    for name, job in first.items():
        done = wait_for(clients[name], job, "succeeded", "failed", seconds=180)
        assert done.status == "succeeded", done
    image = clients["ann"].images.generate(
        model=f"{base}:ann/rusty", prompt="a photo of sks dog", extra_body={"steps": 2}
    )
    assert image.data

    began = time.monotonic()
    warm = submit("ann", "warm", 7, 5)
    assert wait_for(clients["ann"], warm, "succeeded", seconds=60).status == "succeeded"
    assert time.monotonic() - began < 30  # the lane was there

    last = submit("bob", "last", 8, 400)
    wait_for(clients["bob"], last, "running", seconds=60)
    (driver,) = [one for one in ray.util.list_named_actors(all_namespaces=True) if one["name"] == DRIVER]
    ray.kill(ray.get_actor(DRIVER, namespace=driver["namespace"]))
    done = wait_for(clients["bob"], last, "succeeded", "failed", seconds=240)
    assert done.status == "succeeded", done
    registry = Registry(open_storage(str(tmp_path / "storage")))
    assert registry.versions("bob", "last") == [done.model_dump()["version"]]

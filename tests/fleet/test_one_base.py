"""One base for both: what is trained while pictures are drawn from it, and what is drawn while it is trained on."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from fleet.device import DeviceTurns
from tests.fleet.house import FAST, House, photos, wait_for
from tests.fleet.test_fleet_http import METHOD, upload
from training.adapters.adapter import load_adapter
from training.base.base import Base


def draw(house: House, model: str, seed: int, steps: int = 4) -> bytes:
    """The picture's pixels: a file's signature tells when it was made."""
    body = {"model": model, "prompt": "a photo of sks dog", "seed": seed, "steps": steps, "guidance_scale": 3.0}
    answer = httpx.post(f"{house.url}/v1/images/generations", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    file = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


def train(house: House, id: str, file: str, steps: int = 30) -> Any:
    method: Any = {**METHOD, "dreambooth_lora": {**FAST, "train": {**FAST["train"], "max_steps": steps}}}
    return house.client().fine_tuning.jobs.create(
        model=house.base, training_file=file, suffix=id, method=method, seed=5
    )


def test_laws_2_and_4_hold_while_both_run(house: House) -> None:
    """The pictures are the same, bit by bit, and so is the adapter, as if the other had not been."""
    client = house.client()
    file = upload(client, seed=1)
    first = wait_for(client, train(house, "worn", upload(client, seed=2), 6).id, "succeeded")
    models = [first.fine_tuned_model, house.base]
    alone = {(model, seed): draw(house, model, seed) for model in models for seed in range(3)}
    quiet = wait_for(client, train(house, "quiet", file).id, "succeeded")

    busy = train(house, "busy", file)
    wait_for(client, busy.id, "running")
    stop, drawn = threading.Event(), []

    def keep_drawing(model: str) -> None:
        seed = 0
        while not stop.is_set():
            drawn.append(((model, seed % 3), draw(house, model, seed % 3)))
            seed += 1

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(keep_drawing, model) for model in models]
        busy = wait_for(client, busy.id, "succeeded")
        stop.set()
        for task in tasks:
            task.result()
    assert len(drawn) > 4
    assert all(picture == alone[key] for key, picture in drawn)
    one, two = (
        load_adapter(house.registry.fetch("default", id, version))
        for id, version in (("quiet", quiet.version), ("busy", busy.version))
    )
    assert one.modules.keys() == two.modules.keys()
    for key, low in one.modules.items():
        assert torch.equal(low.down, two.modules[key].down) and torch.equal(low.up, two.modules[key].up)


def test_the_base_is_as_it_was_when_the_fleet_has_ended(house: House, own_base: Base) -> None:
    before = {name: value.clone() for name, value in own_base.denoiser.state_dict().items()}
    wait_for(house.client(), train(house, "a", upload(house.client()), 4).id, "succeeded")
    draw(house, house.base, 0)
    house.service.close()
    assert all(torch.equal(value, before[name]) for name, value in own_base.denoiser.state_dict().items())
    assert not any(layer._forward_hooks for layer in own_base.denoiser.modules())


def test_subjects_of_two_tenants_train_in_one_pack(two: House) -> None:
    jobs = []
    for name, seed in (("ann", 1), ("bob", 2)):
        client = two.client(name)
        method: Any = {**METHOD, "dreambooth_lora": {**FAST, "train": {**FAST["train"], "max_steps": 60}}}
        file = client.files.create(file=("d.zip", photos(5, seed)), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model=two.base, training_file=file, suffix="rusty", method=method)
        jobs.append((client, job.id))
    together: set[int] = set()
    until = time.monotonic() + 60
    while time.monotonic() < until and 2 not in together:
        together |= {client.fine_tuning.jobs.retrieve(id).model_dump()["progress"]["together"] for client, id in jobs}
        time.sleep(0.02)
    assert 2 in together
    with httpx.Client(base_url=two.url, headers={"Authorization": f"Bearer {two.tokens['ann']}"}) as http:
        assert "dreamfleet_fleet_lanes 1.0" in http.get("/metrics").text
    for client, id in jobs:
        wait_for(client, id, "succeeded")
    assert two.registry.resolve("ann/rusty").version != two.registry.resolve("bob/rusty").version


def test_an_adapter_does_not_depend_on_who_shared_its_pack(two: House) -> None:
    """Law 2 across tenants: what each of four subjects became in one pack, it becomes alone. fp32, few steps."""
    method: Any = {**METHOD, "dreambooth_lora": {**FAST, "evaluate": {"enabled": False}}}
    few: Any = {"max_steps": 8, "learning_rate": 1e-4}
    files = {
        (name, seed): two.client(name).files.create(file=("d.zip", photos(5, seed)), purpose="fine-tune").id
        for name in ("ann", "bob")
        for seed in (1, 2)
    }

    def start(name: str, seed: int, tag: str) -> str:
        return two.client(name).fine_tuning.jobs.create(
            model=two.base, training_file=files[name, seed], suffix=f"{tag}{seed}", method=method, seed=seed,
            hyperparameters=few,
        ).id  # fmt: skip

    def weights(name: str, id: str) -> dict[str, torch.Tensor]:
        adapter = load_adapter(two.registry.weights(two.registry.resolve(f"{name}/{id}")))
        return {key: low.up @ low.down.flatten(1) for key, low in adapter.modules.items() if low.up.dim() == 2}

    jobs = [(name, start(name, seed, "together")) for name, seed in files]
    for name, job in jobs:
        wait_for(two.client(name), job, "succeeded")
    for name, seed in files:  # one after the other
        wait_for(two.client(name), start(name, seed, "alone"), "succeeded")
        one, other = weights(name, f"together{seed}"), weights(name, f"alone{seed}")
        assert one and all((one[key] - other[key]).abs().max() <= 1e-5 for key in one)


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0.0003)  # other threads come to their turn


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


@pytest.mark.parametrize("share, picture_s, step_s", [(0.25, 0.05, 0.2), (0.1, 0.02, 0.5), (0.5, 0.3, 0.05)])
def test_training_gets_its_share_while_pictures_are_wanted(
    clock: Clock, share: float, picture_s: float, step_s: float
) -> None:
    turns = DeviceTurns(share, clock)
    spent = {"pictures": 0.0, "training": 0.0}
    over, both = threading.Event(), threading.Barrier(2)

    def pictures() -> None:
        both.wait()
        while not over.is_set():
            with turns.turn():
                clock.work(picture_s)
                spent["pictures"] += picture_s
        turns.rest()

    def training() -> None:
        with turns.training():
            both.wait()
            while not over.is_set():
                clock.work(step_s)
                spent["training"] += step_s
                turns.border()

    threads = [threading.Thread(target=work) for work in (pictures, training)]
    for thread in threads:
        thread.start()
    while not spent["pictures"]:
        time.sleep(0.001)
    before, began = dict(spent), clock.now  # until then training had the device to itself
    while clock.now < began + 60:
        time.sleep(0.005)
    over.set()
    for thread in threads:
        thread.join(10)
    took = {name: spent[name] - before[name] for name in spent}
    assert took["training"] / sum(took.values()) == pytest.approx(share, abs=0.05)


def test_training_has_the_device_while_nobody_asks_for_pictures(clock: Clock) -> None:
    turns = DeviceTurns(0.1, clock)
    with turns.turn():
        pass
    turns.rest()
    with turns.training():
        for _ in range(1000):
            clock.now += 1
            turns.border()
        with turns.away():
            with turns.turn():
                pass
            turns.rest()

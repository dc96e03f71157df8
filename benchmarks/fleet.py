"""One process that trains and serves: what it costs in memory, latency and throughput, against each alone.

    python -m benchmarks.fleet [--steps 300] [--pictures 60] [--write]

Starts `dreamfleet up` on the embedded base with two tenants, on this machine's CPU, and uses its HTTP calls only:

- pictures alone: latency of one at a time, and images/s of eight at a time, the capacity;
- training alone: ten single-subject jobs of two tenants; images/s of the pack as the fleet tells them, against one
  manifest with the same ten subjects in `python -m training`;
- both: the same jobs while pictures come at random times, at 30 % of the capacity;
- memory: resident bytes of the process, against a server and a trainer in processes of their own;
- the time from the answer that accepts a subject to its first step, on a lane that is warm.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serving.http.access.tenants import Keys

PHOTOS = Path("manifests/demo/images")
RUNNING = "running on "
PORTION = 0.3


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        while RUNNING not in (said := log.read_text(errors="replace")):
            assert self.process.poll() is None, said
            time.sleep(0.1)
        self.url = said.split(RUNNING)[1].split()[0]

    def rss_mb(self) -> float:
        """Resident memory."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def stop(self) -> None:
        """Ends it in order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)


class Tenant:
    """A client."""

    def __init__(self, url: str, token: str) -> None:
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=600)

    def call(self, method: str, path: str, **rest: Any) -> Any:
        """The answer, which must be good."""
        answer = self._client.request(method, path, **rest)
        assert answer.is_success, answer.text
        return answer.json()

    def draw(self, seed: int) -> float:
        """Seconds that a picture takes."""
        began = time.perf_counter()
        self.call("POST", "/v1/images/generations", json={"prompt": "a photo of a dog", "seed": seed})
        return time.perf_counter() - began

    def train(self, id: str, photos: bytes, settings: dict[str, Any]) -> str:
        """Submits a subject; returns the job's id."""
        file = self.call("POST", "/v1/files", files={"file": (f"{id}.zip", photos)}, data={"purpose": "fine-tune"})
        method = {"type": "dreambooth_lora", "dreambooth_lora": settings}
        body = {"model": "pocket", "training_file": file["id"], "suffix": id, "method": method}
        job: str = self.call("POST", "/v1/fine_tuning/jobs", json=body)["id"]
        return job


def settings(steps: int) -> dict[str, Any]:
    """A subject's, without what is done before and after its training."""
    return {
        "class": "dog",
        "prior": {"enabled": False},
        "train": {"max_steps": steps, "checkpoint_every": 10_000, "learning_rate": 1e-4},
        "evaluate": {"enabled": False},
        "samples": {"images": 0},
    }


def archive(folder: Path) -> bytes:
    """A zip of photos."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for path in sorted(folder.iterdir()):
            made.write(path, path.name)
    return buffer.getvalue()


def submit_ten(tenants: list[Tenant], tag: str, steps: int) -> list[tuple[Tenant, str]]:
    """Ten jobs, of each tenant five."""
    folders = [folder for folder in sorted(PHOTOS.iterdir()) if folder.is_dir()]
    jobs = []
    for index in range(10):
        tenant = tenants[index % len(tenants)]
        jobs.append((tenant, tenant.train(f"{tag}-{index}", archive(folders[index % len(folders)]), settings(steps))))
    return jobs


def follow(jobs: list[tuple[Tenant, str]]) -> list[float]:
    """Waits for the jobs; images/s of the pack, looked at while it is full."""
    rates: list[float] = []
    while True:
        found = [tenant.call("GET", f"/v1/fine_tuning/jobs/{job}") for tenant, job in jobs]
        assert not [one for one in found if one["status"] in ("failed", "cancelled")], found
        if all(one["status"] == "succeeded" for one in found):
            return rates
        full = [one["progress"] for one in found if one["progress"]["together"] == len(jobs)]
        if len(full) == len(jobs) and (rate := full[0]["images_per_second"]):
            rates.append(rate)
        time.sleep(1.0)


@contextlib.contextmanager
def pictures(tenant: Tenant, per_second: float, latencies: list[float]) -> Iterator[None]:
    """Pictures at random times inside."""
    over, rng = threading.Event(), random.Random(0)

    def keep(seed: int) -> None:
        latencies.append(tenant.draw(seed))

    def ask() -> None:
        seed = 0
        while not over.wait(rng.expovariate(per_second)):
            pool.submit(keep, seed)
            seed += 1

    with ThreadPoolExecutor(32) as pool:
        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def manifest_alone(folder: Path, steps: int) -> tuple[list[float], float]:
    """Images/s and resident MB of `python -m training` with the same ten subjects in one manifest."""
    folders = [path for path in sorted(PHOTOS.iterdir()) if path.is_dir()]
    subjects = [{"id": f"one-{index}", "images": str(folders[index % len(folders)].absolute())} for index in range(10)]
    manifest = {"version": 1, "name": "ten", "base": "pocket", "defaults": settings(steps), "subjects": subjects}
    path = folder / "ten.yaml"
    path.write_text(yaml.safe_dump(manifest))
    command = [sys.executable, "-m", "training", str(path), "--storage", str(folder / "alone")]
    rates, rss = [], 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.count("=") == 10:
                rates.append(float(line.split()[0]))
                with contextlib.suppress(psutil.Error):
                    rss = max(rss, psutil.Process(process.pid).memory_info().rss / 1e6)
    return rates, rss


def quantiles(seconds: list[float]) -> str:
    """`p50 / p95` in ms."""
    ordered = sorted(seconds)
    return f"{1000 * statistics.median(ordered):.0f} / {1000 * ordered[int(0.95 * (len(ordered) - 1))]:.0f} ms"


def measure(folder: Path, steps: int, count: int) -> dict[str, str]:
    """All of it; what it is called, and its value."""
    keys = folder / "keys.json"
    tokens = [Keys(keys).make(name)[1] for name in ("ann", "bob")]
    found: dict[str, str] = {}
    serve = [sys.executable, "-m", "serving", "--port", "0", "--storage", str(folder / "serving")]
    alone = ServerProcess(serve, folder / "serving.log")
    plain = Tenant(alone.url, "none")
    for seed in range(4):
        plain.draw(seed)
    serving_mb = alone.rss_mb()
    alone.stop()
    rates, training_mb = manifest_alone(folder, steps)
    manifest_rate = statistics.median(rates[2:])
    up = [sys.executable, "-m", "ray_app.cli.main", "up", "--port", "0", "--storage", str(folder / "up")]
    server = ServerProcess([*up, "--keys", str(keys)], folder / "up.log")
    try:
        tenants = [Tenant(server.url, token) for token in tokens]
        for seed in range(4):
            tenants[0].draw(seed)
        quiet = [tenants[0].draw(seed) for seed in range(count)]
        began = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(tenants[0].draw, range(count)))
        capacity = count / (time.perf_counter() - began)
        train_alone = statistics.median(follow(submit_ten(tenants, "alone", steps))[2:])
        busy: list[float] = []
        jobs = submit_ten(tenants, "both", steps)
        with pictures(tenants[0], PORTION * capacity, busy):
            train_busy = statistics.median(follow(jobs)[2:])
            both_mb = server.rss_mb()
        warm = first_step(tenants[0])
    finally:
        server.stop()
    found["a picture alone, p50 / p95"] = quantiles(quiet)
    found["a picture while ten subjects train, pictures at 30 % of capacity, p50 / p95"] = quantiles(busy)
    found["pictures at once: capacity"] = f"{capacity:.2f} images/s"
    found["training: one manifest of ten subjects, `python -m training`"] = f"{manifest_rate:.1f} images/s"
    found["training: ten jobs of two tenants in one pack"] = f"{train_alone:.1f} images/s"
    found["... against the manifest"] = f"{train_alone / manifest_rate:.2f}"
    found["training: the same while pictures are drawn at 30 % of capacity"] = f"{train_busy:.1f} images/s"
    found["... against no pictures"] = f"{train_busy / train_alone:.2f}"
    found["memory: a server and a trainer in processes of their own"] = f"{serving_mb + training_mb:.0f} MB"
    found["memory: one process, while it trains ten and draws"] = f"{both_mb:.0f} MB"
    found["from accepting a subject to its first step, warm lane"] = f"{warm:.2f} s"
    return found


def first_step(tenant: Tenant) -> float:
    """Seconds from the answer to the first step, on a lane that has just trained the same kind."""
    folder = next(folder for folder in sorted(PHOTOS.iterdir()) if folder.is_dir())
    tenant.train("warm", archive(folder), settings(2000))
    began = time.perf_counter()
    job = tenant.call("GET", "/v1/fine_tuning/jobs?limit=1")["data"][0]["id"]
    while not tenant.call("GET", f"/v1/fine_tuning/jobs/{job}")["progress"]["step"]:
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    tenant.call("POST", f"/v1/fine_tuning/jobs/{job}/cancel")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/fleet.md")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), asked.steps, asked.pictures)
    table = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores, no GPU, load before {load:.1f}; the embedded base "
        f"at its own size and steps, fp32, training share 0.25, subjects of {asked.steps} steps without a prior.",
        "",
        "| what | measured |",
        "|---|---:|",
        *(f"| {name} | {value} |" for name, value in found.items()),
    ]
    print("\n".join(table))
    if asked.write:
        text = "# Training and serving in one process\n\nThe docstring of [`fleet.py`](fleet.py) says how.\n\n"
        Path(__file__).with_suffix(".md").write_text(text + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

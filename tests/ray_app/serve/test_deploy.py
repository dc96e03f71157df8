"""`serve deploy manifests/serve/serve.yaml` on a cluster that is there; engines come with the queue, and go."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.ray_app.head import free_port

MANIFEST = Path(__file__).parents[3] / "manifests/serve/serve.yaml"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def here(folder: Path, base: Path, port: int) -> Path:
    """The manifest with this machine's ports and paths, and with delays that a test can wait for."""
    config = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    (app,) = config["applications"]
    app["args"] |= {"min_replicas": 0, "max_replicas": 2, "target_requests": 2, "upscale_delay_s": 1}
    app["args"] |= {"downscale_delay_s": 5, "drain_s": 10}
    app["args"]["server"] |= {"base": str(base), "storage": str(folder / "storage")}
    app["args"]["server"]["engine"] |= {"max_rows": 4, "slots": 4, "threads": 1}
    app["args"]["server"]["limits"] |= {"steps": 1000}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def until(what: Callable[[], object], why: str, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, f"not within {timeout_s} s: {why}"
        time.sleep(0.3)


def test_from_nothing_to_two_engines_and_back(head: str, tmp_path: Path, tiny_folder: Path) -> None:
    port = free_port()
    command = [str(Path(sys.executable).parent / "serve"), "deploy", str(here(tmp_path, tiny_folder, port)), "-a", head]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=180, trust_env=False) as client:

        def is_up() -> bool:
            try:
                return client.get("/healthz").status_code == 200
            except httpx.HTTPError:
                return False

        def engines() -> int:
            lines = client.get("/metrics").text.splitlines()
            return sum(line.startswith("dreamfleet_slots{") for line in lines)

        def image(steps: int) -> Any:
            return client.post("/v1/images/generations", json={"prompt": "a dog", "seed": 1, "steps": steps})

        until(is_up, "the ingress answers, though there is no engine")
        assert engines() == 0
        first = image(3)
        assert first.status_code == 200, first.text
        assert engines() == 1
        over = threading.Event()

        def flood() -> set[tuple[int, str]]:
            """What a client gets that asks again and again."""
            answers = set()
            while not over.is_set():
                answer = image(50)
                answers.add((answer.status_code, answer.json()["data"][0]["b64_json"]))
            return answers

        with ThreadPoolExecutor(12) as pool:
            clients = [pool.submit(flood) for _ in range(12)]
            try:
                until(lambda: engines() == 2, "a second engine comes with the queue")
            finally:
                over.set()
            answers = set().union(*(client.result() for client in clients))
        assert len(answers) == 1 and answers.pop()[0] == 200  # the same image from both, in any company
        until(lambda: engines() == 0, "both engines go when nobody asks")

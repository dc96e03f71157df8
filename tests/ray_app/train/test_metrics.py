"""What a run tells Prometheus, read from Ray's own metrics port; and that the dashboard asks for nothing else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DASHBOARD = ROOT / "manifests" / "grafana" / "dreamfleet.json"

PROGRAM = """
import socket, time, urllib.request
import ray
from ray_app.train.metrics import RunMetrics
from training.run.lease import Entry
from training.run.subject_queue import SubjectQueue
from training.run.run import SubjectRecord
from training.run.source import Beat, Doing, Phase

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=port, log_to_driver=False,
         object_store_memory=100 * 2**20)
subjects = [SubjectRecord(id=id, max_steps=10) for id in ("rusty", "tabby", "bolt")]
queue = SubjectQueue(Entry(record=record, profile=0) for record in subjects)
metrics, records = RunMetrics("pets"), {record.id: record for record in subjects}

def see():
    view = queue.view()
    records.update({record.id: record for record in view.changed})
    metrics.see(view, records)

see()
queue.enter(0, 0)
queue.lease(0, 2)
doing = {"rusty": Doing(Phase.TRAINING)}
queue.beat(0, Beat(phase=doing, steps={"rusty": 4}, losses={"rusty": 0.5}, images_per_second=8.0))
see()
queue.enter(0, 0)  # its worker has died: both go back
see()
end = time.monotonic() + 60
text = ""
while "dreamfleet_retries" not in text and time.monotonic() < end:
    time.sleep(0.5)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
print(text)
ray.shutdown()
"""


@pytest.mark.ray
def test_prometheus_sees_a_run() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "dreamfleet" in line and not line.startswith("#")]

    def value(name: str, *labels: str) -> float:
        """The value of the one line of that name with these labels."""
        found = [
            line for line in lines if line.startswith(f"ray_dreamfleet_{name}{{") and all(x in line for x in labels)
        ]
        assert len(found) == 1, (name, labels, lines)
        return float(found[0].split()[-1])

    assert all('run="pets"' in line for line in lines)
    assert value("subjects", 'state="queued"') == 3
    assert value("subjects", 'state="training"') == 0
    assert value("packs") == 0
    assert value("steps_total") == 4
    assert value("retries_total", 'kind="lost"') == 2
    assert value("queue_wait_seconds_count") == 2


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    names = {name for expr in asked for name in re.findall(r"(?:ray_)?dreamfleet_\w+", expr)}
    training = set(
        re.findall(r'"(dreamfleet_\w+)"', (ROOT / "ray_app" / "train" / "metrics.py").read_text(encoding="utf-8"))
    )
    code = (ROOT / "serving" / "http" / "metrics.py").read_text(encoding="utf-8")
    counted = set(re.findall(r'count\("(\w+)"', code)) | {"adapter_events"}
    serving = {f"dreamfleet_{name}_total" for name in counted} | {
        f"{name}{end}" for name in re.findall(r'"(dreamfleet_http_\w+)"', code) for end in ("", "_total", "_bucket")
    }
    for name in names:
        if name.startswith("ray_"):
            assert name.removeprefix("ray_").removesuffix("_bucket") in training
        else:
            assert name in serving
    assert len(names) > 10


def test_no_two_panels_lie_on_each_other() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24

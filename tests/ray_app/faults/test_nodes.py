"""A node goes away under a run: its subjects go on elsewhere, and it costs nobody an attempt."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.ray_app.conftest import Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_node_is_lost_under_two_lanes(desk: Desk) -> None:
    ids = tuple(f"subject-{index:02d}" for index in range(8))
    manifest = desk.manifest(*ids, steps=300, every=20)
    with tempfile.TemporaryDirectory(prefix="dfn-") as folder:
        root = str(Path(__file__).resolve().parents[3])
        environment = {**os.environ, "PYTHONPATH": root, "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.ray_app.faults.lost_node", manifest, desk.storage],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["lost"]
    assert {subject["state"] for subject in result["subjects"]} == {"published"}
    kinds = {kind for subject in result["subjects"] for kind in subject["attempts"]}
    assert kinds == {"preempted"}, result

"""`detect`, `consent`, `subject` and `audit` as a user runs them."""

import json
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ray_app.cli.main import main
from tests.training.storage.test_consents import published, trained
from training.storage.consent import Consent
from training.storage.consents import keep_consent
from training.storage.storage import open_storage

AGREED = Consent.model_validate(
    {"kind": "person", "granted_by": "Ann", "evidence": "a" * 64, "granted_at": datetime.now(UTC)}
)
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, [*arguments, "--storage", str(tmp_path / "storage")])

    return invoke


@pytest.fixture
def id(tmp_path: Path) -> str:
    """A consent whose subject `ann` is published and has left files of a run."""
    storage = open_storage(str(tmp_path / "storage"))
    published(storage, "ann", b"1")
    trained(storage, "ann")
    return keep_consent(storage, "default", "ann", AGREED, ["b" * 64]).id


def test_what_is_no_file_is_told(run: Run) -> None:
    result = run("detect", "nowhere.png")
    assert result.exit_code == 2 and "'nowhere.png' cannot be read" in result.output


def test_a_consent_is_listed_shown_and_taken_back(run: Run, id: str) -> None:
    (listed,) = json.loads(run("consent", "list", "--json").stdout)["consents"]
    assert (listed["id"], listed["state"]) == (id, "valid")
    assert "Ann" in run("consent", "list").output and json.loads(run("consent", "show", id).stdout)["id"] == id
    receipt = json.loads(run("consent", "revoke", id, "--json").stdout)
    assert receipt["adapters"] == ["default/ann"] and len(receipt["keys"]) >= 6
    again = run("consent", "revoke", id)
    assert again.exit_code == 0 and "had been revoked before" in again.output
    assert json.loads(run("consent", "list", "--json").stdout)["consents"][0]["state"] == "revoked"
    wrong = run("consent", "revoke", "0" * 16)
    assert wrong.exit_code == 2 and "No consent" in wrong.output


def test_a_subject_is_given_out_and_erased(run: Run, id: str, tmp_path: Path) -> None:
    file = tmp_path / "ann.zip"
    assert run("subject", "export", "ann", "--out", str(file)).exit_code == 0
    with zipfile.ZipFile(file) as archive:
        assert any(name.endswith("images/0.png") for name in archive.namelist())
    asked = json.loads(run("subject", "erase", "ann", "--json").stdout)
    assert not asked["erased"] and asked["adapters"] == ["default/ann"]
    assert json.loads(run("subject", "erase", "ann", "--yes", "--json").stdout)["erased"]
    assert not open_storage(str(tmp_path / "storage")).exists("runs/r/subjects/ann/images/0.png")
    assert run("subject", "export", "nobody", "--out", str(file)).exit_code == 2


def test_the_log_is_checked(run: Run, id: str, tmp_path: Path) -> None:
    assert run("audit", "verify").exit_code == 0
    assert "granted default/ann" in run("audit", "show").output
    storage = open_storage(str(tmp_path / "storage"))
    storage.put("audit/000000000001.json", storage.get("audit/000000000001.json").replace(b"ann", b"eve"))
    keep_consent(storage, "default", "bob", AGREED, ["c" * 64])
    assert run("audit", "verify").exit_code == 0  # a single entry that nothing follows cannot be told from another
    storage.put("audit/000000000001.json", storage.get("audit/000000000001.json").replace(b"eve", b"ann"))
    broken = run("audit", "verify", "--json")
    assert broken.exit_code == 1 and json.loads(broken.stdout)["broken"]

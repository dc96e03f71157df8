"""`dreamfleet keys`: what is printed, what is kept, who is let in afterwards."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ray_app.cli.keys import parse_expiry
from ray_app.cli.main import main
from serving.http.access.tenants import Keys
from training.errors import UserError

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["keys", *arguments])


def test_make_list_revoke(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    made = run("make", "ann", "--keys", str(file))
    token = made.stdout.strip()
    assert made.exit_code == 0 and token.startswith("dfk_") and "shown only now" in made.stderr
    key = Keys(file).find(token)
    assert key is not None and (key.tenant, key.scopes, key.expires) == ("ann", ("images", "train"), None)
    listed = run("list", "--keys", str(file))
    assert key.name in listed.stdout and "active" in listed.stdout and token not in listed.stdout + file.read_text()
    assert run("revoke", key.name, "--keys", str(file)).exit_code == 0
    assert Keys(file).find(token) is None
    assert "revoked" in run("list", "--keys", str(file)).stdout
    unknown = run("revoke", "nobody", "--keys", str(file))
    assert unknown.exit_code == 2 and f"No key 'nobody' in '{file}'. Known: {key.name}" in unknown.stderr


def test_scopes_expiry_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMFLEET_KEYS", str(tmp_path / "keys.json"))
    made = json.loads(run("make", "ann", "--scope", "images", "--scope", "admin", "--expires", "12h", "--json").stdout)
    assert made["scopes"] == ["images", "admin"] and made["state"] == "active"
    (listed,) = json.loads(run("list", "--json").stdout)["keys"]
    assert listed == {name: value for name, value in made.items() if name != "key"}
    assert json.loads(run("revoke", made["id"], "--json").stdout)["state"] == "revoked"
    wrong = run("make", "ann", "--scope", "root")
    assert wrong.exit_code == 2 and "'images', 'train', 'admin'" in wrong.stderr
    assert run("make", "No Tenant").exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90d", "2027-02-22T12:00:00+00:00"),
        ("12h", "2026-11-25T00:00:00+00:00"),
        ("2027-01-31", "2027-02-01T00:00:00+00:00"),
        ("2027-01-31T08:00:00+02:00", "2027-01-31T08:00:00+02:00"),
    ],
)
def test_when_a_key_ends(text: str, expected: str) -> None:
    assert parse_expiry(text, NOW).isoformat() == expected


@pytest.mark.parametrize("text", ["soon", "", "0d", "2026-02-30", "2026-11-01", "99999999d"])
def test_what_is_no_end(text: str) -> None:
    with pytest.raises(UserError, match="for example 90d"):
        parse_expiry(text, NOW)


def test_keys_that_are_made_at_once_are_all_kept(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        tokens = [token for _, token in pool.map(lambda n: Keys(tmp_path / "keys.json").make(f"t{n}"), range(24))]
    assert all(Keys(tmp_path / "keys.json").find(token) for token in tokens)

"""A client of a dreamfleet server, of the standard library alone: pictures, adapters and their files."""

import base64
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

SETTINGS = Path(__file__).parent / "settings.json"  # {"url": ..., "key": ...}; the environment comes first
LOCAL = "http://127.0.0.1:8000"
WAIT_S = 900.0  # for a picture, and for a place in a full queue


class FleetError(Exception):
    """What the server refused, in its own words, or why it cannot be asked."""


@dataclass(frozen=True)
class FleetClient:
    """A server. The key is never part of a workflow: ComfyUI writes workflows into the pictures that it saves."""

    url: str
    key: str = ""

    def draw(self, body: dict[str, Any]) -> tuple[list[bytes], dict[str, Any]]:
        """The picture files of a request, and the rest of the answer. Waits while the server's queue is full."""
        answer: dict[str, Any] = json.loads(self._call("POST", "/v1/images/generations", body)[0])
        files = [base64.b64decode(one.pop("b64_json")) for one in answer["data"]]
        return files, answer

    def adapters(self) -> list[dict[str, Any]]:
        """All adapters that the key may draw with: `tenant`, `id`, `version`, `trigger` and more of each."""
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            page = json.loads(self._call("GET", f"/v1/adapters{after}")[0])
            found += page["data"]
            if not page["has_more"]:
                return found
            after = f"?after={quote(page['last_id'], safe='')}"

    def adapter(self, name: str) -> dict[str, Any]:
        """One adapter by `id`, `tenant/id`, either with `@version`."""
        found: dict[str, Any] = json.loads(self._call("GET", f"/v1/adapters/{quote(name)}")[0])
        return found

    def file(self, name: str, format: str) -> tuple[str, bytes]:
        """An adapter of the key's own tenant as a file of `format`: its name, which has the version, and its bytes."""
        one = self.adapter(name)
        path = f"/v1/adapters/{quote(one['id'])}/versions/{one['version']}/export?format={quote(format)}"
        data, headers = self._call("GET", path)
        given = headers.get("Content-Disposition", "").partition('filename="')[2].partition('"')[0]
        return f"{one['id']}-{one['version'][:12]}{Path(given).suffix or '.safetensors'}", data

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[bytes, Any]:
        head = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", data, head, method=method)
        until = time.monotonic() + WAIT_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=WAIT_S) as response:
                    return response.read(), response.headers
            except urllib.error.HTTPError as error:
                wait = error.headers.get("Retry-After", "")
                if error.code not in (429, 503) or not wait.isdigit() or time.monotonic() + int(wait) > until:
                    raise FleetError(_told(error)) from None
                time.sleep(int(wait))
            except (urllib.error.URLError, TimeoutError, ValueError) as error:
                raise FleetError(
                    f"'{self.url}' cannot be reached: {getattr(error, 'reason', error)}. Start the server, or name its "
                    f"address in the node, in DREAMFLEET_URL or in {SETTINGS.name}."
                ) from None


def fleet_of(url: str = "") -> FleetClient:
    """The server at `url`, else the one of the environment, of the settings, or of this machine; with their key.

    A key is sent only to the server that it was set for: one of `settings.json` not to another address.
    """
    settings = json.loads(SETTINGS.read_text(encoding="utf-8")) if SETTINGS.is_file() else {}
    named = os.environ.get("DREAMFLEET_URL") or settings.get("url") or LOCAL
    key = os.environ.get("DREAMFLEET_KEY") or settings.get("key") or ""
    wanted = (url.strip() or named).rstrip("/")
    return FleetClient(wanted, key if wanted == named.rstrip("/") else "")


def _told(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered {error.code} {error.reason}."

"""The service's key is made once, and a damaged one is told."""

from pathlib import Path

import pytest

from serving.marking.key import KEY, service_key
from training.errors import UserError
from training.storage.storage import open_storage


def test_one_key_for_all_processes(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    key = service_key(storage)
    assert len(key) == 32 and service_key(open_storage(str(tmp_path))) == key


def test_a_damaged_key_is_told(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.put(KEY, b"abc")
    with pytest.raises(UserError, match="no key of 64 hex digits"):
        service_key(storage)

"""The disk tier: what came over the network once is read from here, whole or not at all, within its budget."""

import os
from pathlib import Path

import pytest

from serving.engine.request import AdapterRef
from serving.engine.tiers.disk import DiskCache
from serving.engine.tiers.fetcher import Fetcher
from tests.serving.company import random_adapter
from training.adapters.adapter import save_adapter
from training.base.base import Base
from training.storage.registry import Registry
from training.storage.storage import content_id


def aged(cache: DiskCache, data: bytes, seconds: float) -> str:
    """Puts `data` as if it had been used that long ago."""
    cache.put(data)
    digest = content_id(data)
    path = cache._path(digest)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))
    return digest


def test_the_least_recently_used_go_when_it_is_full(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", budget_bytes=300)
    old, middle = aged(cache, b"a" * 100, 30), aged(cache, b"b" * 100, 20)
    new = aged(cache, b"c" * 100, 10)
    assert cache.get(old) == b"a" * 100  # and now it is the latest
    cache.put(b"d" * 150)
    assert cache.get(middle) is None and cache.get(new) is None
    assert cache.get(old) == b"a" * 100 and cache.get(content_id(b"d" * 150)) == b"d" * 150


def test_a_torn_file_is_thrown_away(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", budget_bytes=10**6)
    digest = aged(cache, b"whole" * 20, 0)
    cache._path(digest).write_bytes(b"whole" * 19)
    assert cache.get(digest) is None
    assert not cache._path(digest).exists()


class Far(Registry):
    """A registry behind a network: counts what is fetched, and can be away."""

    def __init__(self, data: bytes) -> None:
        self.data, self.fetched, self.away = data, 0, False

    def fetch(self, tenant: str, id: str, version: str) -> bytes:
        if self.away:
            raise ConnectionError("the store is away")
        self.fetched += 1
        return self.data


def test_an_adapter_that_has_been_here_needs_no_network(tiny: Base, tmp_path: Path) -> None:
    data = save_adapter(random_adapter(tiny, 1))
    far, ref = Far(data), AdapterRef(tenant="default", id="rusty", version=content_id(data))
    first = Fetcher(far, DiskCache(tmp_path / "cache", 10**8))(ref)
    far.away = True
    again = Fetcher(far, DiskCache(tmp_path / "cache", 10**8))(ref)  # another replica on the node, or after a restart
    assert far.fetched == 1
    assert first.modules.keys() == again.modules.keys()
    with pytest.raises(ConnectionError):
        Fetcher(far)(ref)

"""A version is published exactly once, whatever dies when; only committed versions are ever resolved (laws 6 and 7)."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from training.storage.card import Card, Score
from training.storage.registry import CorruptAdapter, CurrentVersion, Published, Registry
from training.storage.storage import LocalStorage, Storage, StorageUnavailable, content_id, open_storage
from training.storage.version import Resolved, UnknownAdapter

SPAWN = multiprocessing.get_context("fork")


def make_card(weights: bytes, fingerprint: str = "f" * 16, **fields: object) -> Card:
    return Card.model_validate(
        {
            "sha256": content_id(weights),
            "size": len(weights),
            "created": "2026-11-22T12:00:00+00:00",
            "fingerprint": fingerprint,
            "base": "pocket",
            "base_hash": "0" * 64,
            "rank": 4,
            "alpha": 4.0,
            "targets": ["to_q"],
            "instance_prompt": "a photo of sks dog",
            "class": "dog",
        }
        | fields
    )


def publish(
    registry: Registry,
    weights: bytes = b"weights",
    fingerprint: str = "f" * 16,
    id: str = "rusty",
    tenant: str = "default",
) -> Published:
    return registry.publish(tenant, id, weights, make_card(weights, fingerprint), {"samples/0.png": b"png"})


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URI of a moto bucket on loopback, with a place for a prefix."""
    import http.client

    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/fleet")
    assert connection.getresponse().status == 200
    connection.close()
    yield f"s3://fleet/%s?endpoint_override=http://{host}:{port}&access_key=id&secret_key=hush&region=us-east-1"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "folder":
        return Registry(open_storage(str(tmp_path / "storage")), takeover_s=0.2)
    uri: str = request.getfixturevalue("s3")
    return Registry(open_storage(uri % tmp_path.name), takeover_s=0.2)


def test_publish_then_resolve(registry: Registry) -> None:
    version, new = publish(registry)
    assert new and version == content_id(b"weights")
    resolved = registry.resolve("rusty")
    assert resolved == registry.resolve("default/rusty") == registry.resolve("rusty", version[:6])
    assert (resolved.tenant, resolved.id, resolved.version) == ("default", "rusty", version)
    assert resolved.card == make_card(b"weights")
    assert registry.weights(resolved) == b"weights"
    assert registry.files(resolved) == ["adapter.safetensors", "card.json", "samples/0.png"]
    assert registry.read(resolved, "samples/0.png") == b"png"
    assert [r.id for r in registry.list()] == ["rusty"] and registry.list("other") == []
    assert registry.find("default", "rusty", "f" * 16) == version
    assert registry.find("default", "rusty", "e" * 16) is None
    assert registry.find("default", "none", "f" * 16) is None
    assert registry.orphans(grace_s=0) == []


def test_the_same_fingerprint_is_published_once(registry: Registry) -> None:
    first = publish(registry, b"one")
    assert publish(registry, b"two") == Published(first.version, new=False)
    assert registry.versions("default", "rusty") == [first.version]
    assert registry.weights(registry.resolve("rusty")) == b"one"


def test_versions_and_current(registry: Registry) -> None:
    one = publish(registry, b"one", "1" * 16).version
    two = publish(registry, b"two", "2" * 16).version
    assert registry.resolve("rusty").version == two
    assert registry.versions("default", "rusty") == sorted([one, two])
    assert registry.set_current("default", "rusty", one[:8]).version == one
    assert registry.resolve("rusty").version == one
    assert publish(registry, b"two", "2" * 16) == Published(two, new=False)
    assert registry.resolve("rusty").version == one  # a choice made later than the commit stays
    assert registry.weights(registry.resolve("rusty", two[:10])) == b"two"


def test_a_version_published_aside_is_served_by_name_only(registry: Registry) -> None:
    publish(registry, b"one", "1" * 16)
    for _ in range(2):  # repeated after a failure
        found = registry.publish("default", "rusty", b"two", make_card(b"two", "2" * 16), aside=True)
        assert registry.resolve("rusty").version == content_id(b"one")
        assert registry.resolve("rusty", found.version).card.sha256 == content_id(b"two")
    assert registry.find("default", "rusty", "2" * 16) == content_id(b"two")
    assert registry.publish("default", "rusty", b"two", make_card(b"two", "2" * 16)).new is False
    assert registry.resolve("rusty").version == content_id(b"one")
    assert registry.set_current("default", "rusty", content_id(b"two")).version == registry.resolve("rusty").version


def test_who_may_see_an_adapter_is_said_once_for_all_its_versions(registry: Registry) -> None:
    one = publish(registry, b"one", "1" * 16).version
    assert not registry.resolve("rusty").public and registry.resolve("rusty").trigger == "a photo of sks dog"
    registry.describe("default", "rusty", public=True, trigger="a zwx dog")
    publish(registry, b"two", "2" * 16)
    for version in (None, one):
        resolved = registry.resolve("rusty", version)
        assert resolved.public and resolved.trigger == "a zwx dog"
    assert registry.public_names() == ["default/rusty"]
    registry.describe("default", "rusty", public=False)
    assert not registry.resolve("rusty", one).public and registry.public_names() == []
    registry.describe("default", "rusty", public=True)
    registry.delete("default", "rusty")
    assert registry.public_names() == []
    with pytest.raises(UnknownAdapter):
        registry.describe("default", "rusty", public=True)
    publish(registry, b"one", "1" * 16)
    assert not registry.resolve("rusty").public  # what was said of the deleted one is gone with it


def test_a_card_that_says_public_counts_only_while_its_version_is_current(registry: Registry) -> None:
    one, two = make_card(b"one", "1" * 16, public=True), make_card(b"two", "2" * 16)
    registry.publish("default", "rusty", b"one", one)
    assert registry.resolve("rusty").public
    registry.publish("default", "rusty", b"two", two)
    assert not registry.resolve("rusty").public and not registry.resolve("rusty", one.sha256).public


def test_one_version_is_removed_and_can_be_published_again(registry: Registry) -> None:
    one = publish(registry, b"one", "1" * 16).version
    two = publish(registry, b"two", "2" * 16).version
    before = registry.usage("default")
    with pytest.raises(CurrentVersion, match="the one that is served"):
        registry.remove_version("default", "rusty", two)
    with pytest.raises(UnknownAdapter):
        registry.remove_version("default", "rusty", "0" * 64)
    assert registry.remove_version("default", "rusty", one[:8]) == one
    assert registry.versions("default", "rusty") == [two] and registry.resolve("rusty").version == two
    assert not [key for key in registry.storage.list() if one in key]
    assert before.adapters == 1 and registry.usage("default").bytes < before.bytes
    with pytest.raises(UnknownAdapter):
        registry.set_current("default", "rusty", one)
    assert publish(registry, b"one", "1" * 16) == Published(one, new=True)
    assert registry.resolve("rusty").version == one


def test_a_version_that_is_chosen_while_it_is_removed_stays(registry: Registry) -> None:
    one = publish(registry, b"one", "1" * 16).version
    publish(registry, b"two", "2" * 16)
    ledger = registry._ledger("default", "rusty")
    current, tag = ledger.read()
    delete = registry.storage.delete

    def slow(key: str) -> None:
        delete(key)
        if key.endswith(".json"):  # another process had looked for the commit, and chooses the version now
            assert ledger.swap(tag, current.model_copy(update={"version": one}))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CurrentVersion):
        patch.setattr(registry.storage, "delete", slow)
        registry.remove_version("default", "rusty", one)
    assert registry.weights(registry.resolve("rusty")) == b"one"
    assert one in registry.versions("default", "rusty")


@pytest.mark.parametrize("file", ["current.json", "card.json", "commit"])
def test_a_damaged_adapter_costs_no_other_and_can_be_deleted(registry: Registry, file: str) -> None:
    version = publish(registry, id="hurt").version
    publish(registry, id="whole")
    names = {"card.json": f"{version}/card.json", "commit": f"commits/{'f' * 16}.json"}
    registry.storage.put(f"adapters/default/hurt/{names.get(file, file)}", b"{")
    told: list[str] = []
    found = registry.list("default", lambda name, error: told.append(name))
    assert [one.id for one in found] == (["hurt", "whole"] if file == "commit" else ["whole"])
    assert told == ([] if file == "commit" else ["default/hurt"])
    with pytest.raises(CorruptAdapter, match="default/hurt.*Delete the adapter"):
        registry.versions("default", "hurt")
        registry.resolve("hurt")
    with pytest.raises(UnknownAdapter, match="Near: whole"):
        registry.resolve("whale")
    registry.gc(dry_run=False, grace_s=0)
    assert registry.resolve("whole")
    registry.delete("default", "hurt")
    with pytest.raises(UnknownAdapter):
        registry.resolve("hurt")
    assert publish(registry, id="hurt") == Published(version, new=True) and registry.resolve("hurt")


def test_what_is_unknown_is_named_within_the_tenant(registry: Registry) -> None:
    version = publish(registry).version
    publish(registry, b"secret", id="rusti", tenant="other")
    with pytest.raises(UnknownAdapter, match="default/rustie.*Near: rusty[^i]*list"):
        registry.resolve("rustie")
    for bad in ("", "/", "a/b/c", "../rusty", "Rusty", "default/../other/rusti", "x" * 64):
        with pytest.raises(UnknownAdapter):
            registry.resolve(bad)
    for prefix in ("", version[:5], "../../x", "0" * 64):
        with pytest.raises(UnknownAdapter, match="version"):
            registry.resolve("rusty", prefix)
    with pytest.raises(UnknownAdapter):
        registry.set_current("default", "rusty", "0" * 8)
    with pytest.raises(UnknownAdapter):
        registry.delete("default", "none")
    with pytest.raises(UnknownAdapter):
        registry.versions("default", "none")


def test_deleted_is_gone_and_its_id_starts_afresh(registry: Registry) -> None:
    old = publish(registry, b"old", "1" * 16).version
    held = registry.resolve("rusty")
    registry.delete("default", "rusty")
    for call in (lambda: registry.resolve("rusty"), lambda: registry.weights(held)):
        with pytest.raises(UnknownAdapter):
            call()
    assert registry.list() == [] and registry.find("default", "rusty", "1" * 16) is None
    assert [key for key in registry.storage.list() if "current.json" not in key] == []
    new = publish(registry, b"new", "2" * 16).version
    assert registry.versions("default", "rusty") == [new]
    with pytest.raises(UnknownAdapter):
        registry.resolve("rusty", old)
    assert publish(registry, b"old", "1" * 16) == Published(old, new=True)
    assert registry.resolve("rusty").version == old


def test_damaged_weights_are_refused_by_name_and_mended_by_publishing_again(registry: Registry) -> None:
    version = publish(registry).version
    resolved = registry.resolve("rusty")
    key = f"adapters/default/rusty/{version}/adapter.safetensors"
    for damaged in (b"weights"[:3], b"weighty"):
        registry.storage.put(key, damaged)
        with pytest.raises(CorruptAdapter, match="default/rusty@"):
            registry.weights(resolved)
    registry.storage.delete(key)
    with pytest.raises(CorruptAdapter, match="lost its weights"):
        registry.weights(resolved)
    registry.storage.put(key, b"torn")
    publish(registry, fingerprint="e" * 16)
    assert registry.weights(resolved) == b"weights"
    registry.storage.put(f"adapters/default/rusty/{version}/card.json", b"{}")
    with pytest.raises(CorruptAdapter, match="card"):
        registry.resolve("rusty")


def test_many_publishers_at_once_commit_once(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: publish(registry, b"w%d" % i), range(8)))
    assert sum(result.new for result in results) == 1
    assert len({result.version for result in results}) == 1
    assert registry.versions("default", "rusty") == [registry.resolve("rusty").version]
    orphans = registry.gc(dry_run=True, grace_s=0)
    assert registry.gc(dry_run=False, grace_s=0) == orphans and registry.orphans(grace_s=0) == []
    registry.weights(registry.resolve("rusty"))


def test_different_fingerprints_at_once_are_all_committed(registry: Registry) -> None:
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda i: publish(registry, b"w%d" % i, f"{i:016x}"), range(6)))
    assert all(result.new for result in results)
    assert registry.versions("default", "rusty") == sorted(result.version for result in results)


def test_readers_beside_publishers_and_deleters_see_whole_adapters_or_none(tmp_path: Path) -> None:
    registry = Registry(open_storage(str(tmp_path)), takeover_s=5)
    publish(registry, b"w0", "0" * 16)

    def write(i: int) -> None:
        publish(registry, b"w%d" % i, f"{i:016x}")
        if i % 3 == 0:
            with contextlib.suppress(UnknownAdapter):
                registry.delete("default", "rusty")

    def read(_: int) -> bytes | None:
        try:
            return registry.weights(registry.resolve("rusty"))
        except UnknownAdapter:
            return None

    with ThreadPoolExecutor(2) as writers, ThreadPoolExecutor(2) as readers:
        writes = writers.map(write, range(1, 25))
        seen = list(readers.map(read, range(200)))
        list(writes)
    assert any(seen) and all(data is None or data.startswith(b"w") for data in seen)


class Dying(LocalStorage):
    """A folder whose process is killed right before its `fuse`-th change, or right after it if `after`."""

    fuse = 10**9
    after = False

    def _burn(self, change: Callable[[], bool | None]) -> bool:
        self.fuse -= 1
        if self.fuse == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = change()
        if self.fuse == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return bool(result)

    def put(self, key: str, data: bytes) -> None:
        self._burn(lambda: LocalStorage.put(self, key, data))

    def create(self, key: str, data: bytes) -> bool:
        return self._burn(lambda: LocalStorage.create(self, key, data))

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        return self._burn(lambda: LocalStorage.swap(self, key, data, tag))

    def delete_tree(self, prefix: str) -> None:
        self._burn(lambda: LocalStorage.delete_tree(self, prefix))


def die_in(action: Callable[[Registry], object], uri: str, fuse: int, after: bool) -> bool:
    """Runs `action` in a process of its own on a Dying storage; whether it was killed."""

    def child() -> None:
        storage = Dying(uri)
        storage.fuse, storage.after = fuse, after
        action(Registry(storage, takeover_s=0))

    process = SPAWN.Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("after", [False, True])
def test_a_publisher_killed_at_any_change_leaves_no_half_state(tmp_path: Path, after: bool) -> None:
    for fuse in range(1, 20):
        registry = Registry(open_storage(str(tmp_path / str(fuse))), takeover_s=0)
        killed = die_in(lambda dying: publish(dying, b"new"), registry.storage.uri, fuse, after)
        try:
            resolved: Resolved | None = registry.resolve("rusty")
        except UnknownAdapter:
            resolved = None
        if resolved:
            assert registry.weights(resolved) == b"new"
        committed = registry.find("default", "rusty", "f" * 16)
        assert committed in (None, content_id(b"new")) and (committed or not resolved)
        if committed:  # `find` has completed the publication
            assert registry.weights(registry.resolve("rusty")) == b"new"
        else:
            assert registry.orphans(grace_s=3600) == []
            registry.gc(dry_run=False, grace_s=0)
            assert registry.storage.list() == []
        assert publish(registry, b"new") == Published(content_id(b"new"), new=not committed)
        assert registry.versions("default", "rusty") == [content_id(b"new")]
        if not killed:
            return
    pytest.fail("the publication never came to its end")


def test_a_deleter_killed_at_any_change_never_lets_old_bytes_back(tmp_path: Path) -> None:
    for fuse in range(1, 20):
        registry = Registry(open_storage(str(tmp_path / str(fuse))), takeover_s=0)
        publish(registry, b"old", "1" * 16)
        publish(registry, b"older", "2" * 16)
        killed = die_in(lambda dying: dying.delete("default", "rusty"), registry.storage.uri, fuse, after=True)
        with pytest.raises(UnknownAdapter):
            registry.resolve("rusty")
        assert registry.find("default", "rusty", "1" * 16) is None
        assert publish(registry, b"new", "1" * 16).new
        assert registry.versions("default", "rusty") == [content_id(b"new")]
        assert registry.orphans(grace_s=0) == []
        if not killed:
            return
    pytest.fail("the deletion never came to its end")


class Interrupted(LocalStorage):
    """Runs `meanwhile` once, right before the first change of a key that ends with `at`."""

    at = ""
    meanwhile: Callable[[], object] | None = None

    def create(self, key: str, data: bytes) -> bool:
        if key.endswith(self.at) and self.meanwhile:
            action, self.meanwhile = self.meanwhile, None
            action()
        return super().create(key, data)


@pytest.mark.parametrize("at", ["adapter.safetensors", "card.json", f"{'f' * 16}.json", ".current"])
def test_a_deletion_in_the_middle_of_a_publication_leaves_it_whole_or_gone(tmp_path: Path, at: str) -> None:
    registry = Registry(open_storage(str(tmp_path)), takeover_s=0)
    publish(registry, b"old", "1" * 16)
    storage = Interrupted(str(tmp_path))
    storage.at, storage.meanwhile = at, lambda: registry.delete("default", "rusty")
    assert publish(Registry(storage, takeover_s=0), b"new").version == content_id(b"new")
    if at != ".current":  # there the publication came first
        assert registry.weights(registry.resolve("rusty")) == b"new"
        assert registry.versions("default", "rusty") == [content_id(b"new")]
    else:
        with pytest.raises(UnknownAdapter):
            registry.resolve("rusty")
        assert publish(registry, b"new").new
        assert registry.resolve("rusty").version == content_id(b"new")


def test_no_listing_to_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(open_storage(str(tmp_path)))
    publish(registry)

    def refuse(self: Storage, prefix: str = "") -> list[str]:
        raise AssertionError("listed")

    monkeypatch.setattr(LocalStorage, "list", refuse)
    monkeypatch.setattr(LocalStorage, "folders", refuse)
    assert registry.weights(registry.resolve("rusty")) == b"weights"


def test_a_store_that_fails_publishes_nothing(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(open_storage(s3 % tmp_path.name))
    storage = registry.storage
    create = storage.create

    def failing(key: str, data: bytes) -> bool:
        if key.endswith("card.json"):
            raise StorageUnavailable("503")
        return create(key, data)

    monkeypatch.setattr(storage, "create", failing)
    with pytest.raises(StorageUnavailable):
        publish(registry)
    with pytest.raises(UnknownAdapter):
        registry.resolve("rusty")
    monkeypatch.undo()
    assert publish(registry).new


def test_a_card_is_closed_and_belongs_to_its_weights(tmp_path: Path) -> None:
    registry = Registry(open_storage(str(tmp_path)))
    with pytest.raises(ValueError, match="the card is of"):
        registry.publish("default", "rusty", b"other", make_card(b"weights"))
    with pytest.raises(ValidationError):
        make_card(b"w", note="x")
    with pytest.raises(ValidationError):
        make_card(b"w", fingerprint="../x")
    with pytest.raises(ValidationError):
        make_card(b"w", loss=float("nan"))
    scored = make_card(b"w", scores=[Score(name="likeness", value=0.5, model="judge-1", step=3)])
    assert Card.model_validate_json(scored.model_dump_json(by_alias=True)) == scored
    assert not scored.public and scored.class_name == "dog"

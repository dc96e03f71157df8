"""A storage keeps its promises in a folder and in an object store, also while it fails (law 6)."""

import errno
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.storage.networks import NetworkFolders
from training.storage.storage import (
    NotFound,
    Storage,
    StorageError,
    StorageFull,
    StorageUnavailable,
    check_key,
    masked,
    open_storage,
)

Wsgi = Callable[[dict[str, str], Callable[..., object]], Iterable[bytes]]
BUCKET = "fleet"


class Faults:
    """A WSGI layer before moto: answers the next requests of a kind with a fault. `plan` lists (method, fault)."""

    def __init__(self, app: Wsgi) -> None:
        self.app = app
        self.plan: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, str], start_response: Callable[..., object]) -> Iterable[bytes]:
        fault = self._next(environ["REQUEST_METHOD"])
        if fault is None:
            return self.app(environ, start_response)
        if fault in ("500", "503"):
            start_response(f"{fault} Slow Down", [("Content-Length", "0")])
            return []
        if fault == "hang":
            time.sleep(3)
            start_response("503 Late", [("Content-Length", "0")])
            return []
        return self._after(fault, environ, start_response)

    def _next(self, method: str) -> str | None:
        with self.lock:
            for index, (wanted, fault) in enumerate(self.plan):
                if wanted == method:
                    if fault.endswith("*"):
                        return fault[:-1]
                    return self.plan.pop(index)[1]
        return None

    def _after(self, fault: str, environ: dict[str, str], start_response: Callable[..., object]) -> Iterable[bytes]:
        """`lost`: the store does it but answers 500. `truncate`: the body ends half-way."""
        seen: list[object] = []
        body = b"".join(self.app(environ, lambda status, headers, *rest: seen.extend([status, headers])))
        if fault == "lost":
            start_response("500 Lost", [("Content-Length", "0")])
            return []
        start_response(seen[0], seen[1])
        return [body[: len(body) // 2]]


@pytest.fixture(scope="module")
def s3() -> Iterator[SimpleNamespace]:
    """moto behind `Faults` on loopback: `.faults`, and `.uri` without a prefix."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    faults = Faults(DomainDispatcherApplication(create_backend_app))

    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    options = f"endpoint_override=http://127.0.0.1:{server.server_port}&access_key=id&secret_key=hush&region=us-east-1"
    _make_bucket(server.server_port)
    yield SimpleNamespace(faults=faults, uri=f"s3://{BUCKET}/%s?{options}&request_timeout=1")
    server.shutdown()
    thread.join()


def _make_bucket(port: int) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{BUCKET}", headers={"Host": f"127.0.0.1:{port}"})
    assert connection.getresponse().status == 200
    connection.close()


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "storage"))
    uri: str = request.getfixturevalue("s3").uri
    return open_storage(uri % tmp_path.name)


@pytest.fixture
def remote(s3: SimpleNamespace, tmp_path: Path) -> Iterator[tuple[Storage, Faults]]:
    yield open_storage(s3.uri % tmp_path.name), s3.faults
    s3.faults.plan.clear()


def test_put_get_list_delete(storage: Storage) -> None:
    storage.put("a/x.json", b"1")
    storage.put("a/b/y.json", b"2")
    storage.put("ab/z.json", b"3")
    storage.put("a/x.json", b"4")
    assert storage.get("a/x.json") == b"4"
    assert storage.list() == ["a/b/y.json", "a/x.json", "ab/z.json"]
    assert storage.list("a") == ["a/b/y.json", "a/x.json"]
    assert storage.folders() == ["a", "ab"]
    assert storage.folders("a") == ["b"]
    assert storage.exists("a/x.json") and not storage.exists("a") and not storage.exists("a/no")
    assert abs(storage.modified("a/x.json") - time.time()) < 60
    storage.delete("a/b/y.json")
    storage.delete("a/b/y.json")
    assert storage.folders("a") == []
    storage.delete_tree("a")
    storage.delete_tree("nothing")
    assert storage.list() == ["ab/z.json"]
    assert storage.list("nothing") == [] and storage.folders("nothing") == []
    storage.delete_tree("")
    assert storage.list() == []


def test_a_missing_key_is_named(storage: Storage) -> None:
    for call in (storage.get, storage.get_tagged, storage.modified):
        with pytest.raises(NotFound, match="no/such"):
            call("no/such")


def test_create_only_and_compare_and_swap(storage: Storage) -> None:
    assert storage.create("k", b"1")
    assert not storage.create("k", b"2")
    data, tag = storage.get_tagged("k")
    assert data == b"1"
    assert storage.swap("k", b"3", tag)
    assert not storage.swap("k", b"4", tag)
    assert not storage.swap("k", b"4", None)
    assert storage.swap("new", b"5", None)
    storage.delete("k")
    assert not storage.swap("k", b"6", tag)
    assert storage.list() == ["new"]


def test_one_winner_of_many_at_once(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda i: storage.create("one", b"%d" % i), range(16))) == 1
    storage.put("n", b"0")

    def add(_: int) -> None:
        while True:
            data, tag = storage.get_tagged("n")
            if storage.swap("n", b"%d" % (int(data) + 1), tag):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(12)))
    assert storage.get("n") == b"12"


def test_upload_and_download(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_bytes(os.urandom(6 << 20))
    storage.upload("big/file.bin", source)
    storage.download("big/file.bin", target)
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(NotFound):
        storage.download("big/no", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_crosses_a_process_as_its_uri_and_hides_its_credentials(storage: Storage) -> None:
    again = pickle.loads(pickle.dumps(storage))
    assert again == storage and open_storage(storage.uri) == storage
    again.put("k", b"1")
    assert storage.get("k") == b"1"
    assert "hush" not in repr(storage) + str(storage) + masked(storage.uri)
    with pytest.raises(NotFound) as caught:
        storage.get("none")
    assert "hush" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://fleet/x?access_key=hush&secret_key=hush&session_token=hush",
        "s3://fleet/x?secret_access_key=hush",  # misspelled: unknown, and a secret all the same
        "s3://fleet/x?secret_key=a%23b#hush",
        "s3://me:hush@fleet/x",
        "s3://fleet/x?endpoint_override=http://me:hush@127.0.0.1:9&attempts=1",
        "s3://fleet/x?endpoint_override=me:hush@127.0.0.1:9&attempts=1&scheme=http",
        "s3://[fleet/x?secret_key=hush",
        "s4://me:hush@fleet/x?secret_key=hush",
    ],
)
def test_no_error_tells_a_credential(uri: str) -> None:
    assert "hush" not in masked(uri)
    with pytest.raises(StorageError) as caught:
        open_storage(uri).get("k")
    assert "hush" not in str(caught.value)


def test_what_is_no_credential_is_shown() -> None:
    uri = "s3://fleet/x?endpoint_override=http://127.0.0.1:9&region=us-east-1&attempts=1"
    assert masked(uri) == uri
    assert masked("./storage") == "./storage"
    assert masked(f"{uri}&secret_key=hush") == f"{uri}&secret_key=***"


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a\\b", "a\0", ".tmp-x", ".locks/0", "é"]
)
def test_a_key_cannot_leave_the_storage(storage: Storage, key: str) -> None:
    with pytest.raises(StorageError, match="Bad storage key"):
        check_key(key)
    with pytest.raises(StorageError):
        storage.put(key, b"")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "empty"),
        ("ftp://x/y", "s3://bucket"),
        ("s3:///prefix", "bucket"),
        ("s3://bucket/p?endpoint=x", "endpoint_override"),
        ("s3://bucket/p?request_timeout=soon", "whole number"),
        ("s3://me:hush@bucket/p", "environment"),
    ],
)
def test_a_bad_uri_says_what_is_allowed(uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_storage(uri)
    assert "hush" not in str(caught.value)


def _write_for_ever(uri: str) -> None:
    storage = open_storage(uri)
    for i in range(1_000_000):
        storage.put("k", bytes([i % 256]) * 3_000_000)


def test_a_killed_writer_leaves_whole_files_only(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    storage.put("k", b"\0" * 3_000_000)
    for _ in range(3):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(storage.uri,))
        writer.start()
        time.sleep(0.1)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        data = storage.get("k")
        assert len(data) == 3_000_000 and len(set(data)) == 1
        assert storage.list() == ["k"]
    storage.put("k", b"unlocked")  # the dead hold no lock
    storage.clean(age_s=0)
    assert not [path for path in Path(storage.uri).iterdir() if path.name.startswith(".tmp-")]


def test_a_full_disk_is_named_and_leaves_nothing_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    storage.put("k", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    tag = storage.get_tagged("k")[1]
    for write in (
        lambda: storage.put("k", b"new"),
        lambda: storage.create("l", b"n"),
        lambda: storage.swap("k", b"", tag),
    ):
        with pytest.raises(StorageFull, match="no space left"):
            write()
    with pytest.raises(StorageFull):
        storage.download("k", tmp_path / "copy")
    assert storage.get("k") == b"old" and storage.list() == ["k"] and not (tmp_path / "copy").exists()


def test_a_file_size_limit_counts_as_full(tmp_path: Path) -> None:
    def limited(uri: str) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            open_storage(uri).put("k", b"x" * 5000)
        except StorageFull:
            os._exit(7)

    process = multiprocessing.get_context("fork").Process(target=limited, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert open_storage(str(tmp_path)).list() == []


def test_put_and_delete_tree_at_once_lose_no_put(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            storage.delete_tree("a")
            time.sleep(0.02)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(sweep)
        try:
            for i in range(100):
                storage.put(f"a/b/{i}", b"")
        finally:
            stop.set()
        future.result()


@pytest.mark.parametrize("fault", ["500", "503", "hang"])
def test_a_passing_fault_is_ridden_out(remote: tuple[Storage, Faults], fault: str) -> None:
    storage, faults = remote
    faults.plan = [("PUT", fault)]
    storage.put("k", b"1")
    faults.plan = [("GET", fault)]
    assert storage.get("k") == b"1"
    faults.plan = [("GET", fault)]
    assert storage.list() == ["k"]


def test_a_truncated_read_is_read_again(remote: tuple[Storage, Faults], tmp_path: Path) -> None:
    storage, faults = remote
    storage.put("k", b"0123456789" * 1000)
    faults.plan = [("GET", "truncate")]
    assert storage.get("k") == b"0123456789" * 1000
    faults.plan = [("GET", "truncate")]
    storage.download("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == b"0123456789" * 1000


def test_a_conditional_write_whose_answer_was_lost_has_won(remote: tuple[Storage, Faults]) -> None:
    storage, faults = remote
    faults.plan = [("PUT", "lost")]
    assert storage.create("k", b"mine")
    tag = storage.get_tagged("k")[1]
    faults.plan = [("PUT", "lost")]
    assert storage.swap("k", b"mine again", tag)
    faults.plan = [("PUT", "500")]
    assert not storage.create("k", b"theirs")


def test_a_lasting_fault_ends_in_a_named_error_and_publishes_nothing(s3: SimpleNamespace, tmp_path: Path) -> None:
    storage = open_storage(s3.uri % tmp_path.name + "&attempts=2")
    s3.faults.plan = [("PUT", "503*"), ("GET", "truncate*")]
    try:
        for write in (lambda: storage.put("k", b"1"), lambda: storage.create("k", b"1")):
            with pytest.raises(StorageUnavailable, match="2 attempts") as caught:
                write()
            assert "'k'" in str(caught.value) and "hush" not in str(caught.value)
        s3.faults.plan = []
        assert storage.list() == []
        storage.put("k", b"0123456789" * 1000)
        s3.faults.plan = [("GET", "truncate*")]
        with pytest.raises(StorageUnavailable):
            storage.download("k", tmp_path / "k")
        assert not (tmp_path / "k").exists()
    finally:
        s3.faults.plan = []


def test_a_server_that_is_down_is_named(tmp_path: Path) -> None:
    uri = "s3://fleet/x?endpoint_override=http://127.0.0.1:9&access_key=id&secret_key=hush&attempts=2&request_timeout=1"
    with pytest.raises(StorageUnavailable, match="Check that the store is up"):
        open_storage(uri).get("k")


def test_networks_are_found_and_brought_to_this_machine(storage: Storage, tmp_path: Path) -> None:
    """A ControlNet and an IP-Adapter; another file is another version; what is half there is not there."""
    config = {"control": "controls/edges/config.json", "ip-adapter": "ip-adapters/plus/image_encoder/config.json"}
    folders = NetworkFolders(storage, tmp_path / "embedded")
    for key in config.values():
        storage.put(key, b'{"width": 8}')
    storage.put("controls/edges/weights.safetensors", b"123")
    storage.put("ip-adapters/plus/ip.safetensors", b"12345")
    storage.put("controls/torn/config.json", b"{")
    assert folders.names("control") == ["edges", "torn"] and folders.names("ip-adapter") == ["plus"]
    found = folders.look("control", "edges")
    assert found is not None and found.bytes == 3 and found.config == {"width": 8}
    assert folders.look("control", "torn") is None and folders.look("control", "../edges") is None
    with folders.folder("ip-adapter", "plus") as folder:
        assert (folder / "image_encoder" / "config.json").read_bytes() == b'{"width": 8}'
        assert (folder / "ip.safetensors").read_bytes() == b"12345"
    storage.put("controls/edges/weights.safetensors", b"1234")
    after = folders.look("control", "edges")
    assert after is not None and after.version != found.version
    with pytest.raises(NotFound), folders.folder("control", "no"):
        pass

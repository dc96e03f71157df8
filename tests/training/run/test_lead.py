"""One driver leads a run; a dead one is followed at once on its machine, after a while from elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.run.lead import DEAD_SECONDS, RENEW_SECONDS, Lead, Lost
from training.run.run import RunStore
from training.storage.storage import open_storage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(open_storage(str(tmp_path)), "demo-1")


def rewrite(store: RunStore, **news: object) -> None:
    """Makes the leader somebody else, as if from another machine or process."""
    lead = Lead(store.storage, store.driver_key)
    leader, tag = lead._read()
    assert leader is not None
    data = leader.model_copy(update=news).model_dump_json().encode()
    assert store.storage.swap("runs/demo-1/driver.json", data, tag)


def test_what_could_not_be_released_may_be_taken_again(tmp_path: Path) -> None:
    """A store that failed while the lead was given up does not lock its own process out."""
    storage = open_storage(str(tmp_path))
    lead = Lead(storage, "lead.json")
    assert lead.acquire() is None
    lead._mine = None  # what a release leaves that the store did not take
    assert Lead(storage, "lead.json").acquire() is not None
    assert lead.acquire() is None
    lead.renew()


def test_the_first_leads_and_the_second_is_told_who_does(store: RunStore) -> None:
    first, second = Lead(store.storage, store.driver_key), Lead(store.storage, store.driver_key)
    assert first.acquire() is None
    leader = second.acquire()
    assert leader is not None and leader.pid == os.getpid()
    first.release()
    assert second.acquire() is None
    assert second.living() is not None and second.living().token == 2  # type: ignore[union-attr]


def test_a_process_that_died_here_is_followed_at_once(store: RunStore) -> None:
    code = (
        "import os, sys; from training.run.lead import Lead; "
        "from training.storage.storage import open_storage;"
        f"Lead(open_storage({store.storage.uri!r}), {store.driver_key!r}).acquire(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    lead = Lead(store.storage, store.driver_key)
    assert lead.living() is None
    assert lead.acquire() is None


def test_an_id_that_was_given_to_another_process_is_not_the_leader(store: RunStore) -> None:
    assert Lead(store.storage, store.driver_key).acquire() is None
    rewrite(store, process="12345")
    assert Lead(store.storage, store.driver_key).living() is None


def test_elsewhere_silence_is_death_and_a_sign_of_life_is_not(store: RunStore) -> None:
    assert Lead(store.storage, store.driver_key).acquire() is None
    rewrite(store, host="another")
    clock = Clock()
    second = Lead(store.storage, store.driver_key, clock)
    assert second.acquire() is not None
    clock.now += DEAD_SECONDS - 1
    assert second.acquire() is not None
    rewrite(store, beat=7)
    clock.now += 2
    assert second.acquire() is not None
    clock.now += DEAD_SECONDS
    assert second.acquire() is None


def test_who_was_taken_for_dead_finds_out_and_writes_no_more(store: RunStore) -> None:
    clock = Clock()
    first = Lead(store.storage, store.driver_key, clock)
    assert first.acquire() is None
    rewrite(store, process="gone")
    assert Lead(store.storage, store.driver_key).acquire() is None
    first.renew()  # not due yet
    clock.now += RENEW_SECONDS
    with pytest.raises(Lost):
        first.renew()
    first.release()  # changes nothing
    assert Lead(store.storage, store.driver_key).living() is not None


def test_renewing_is_seen(store: RunStore) -> None:
    clock = Clock()
    first = Lead(store.storage, store.driver_key, clock)
    assert first.acquire() is None
    clock.now += RENEW_SECONDS
    first.renew()
    leader = Lead(store.storage, store.driver_key).living()
    assert leader is not None and leader.beat == 1

"""Rendezvous hashing with bounded load, and what it hashes."""

from collections import Counter

from ray_app.serve.router import adapter_of, rank_replicas
from tests.serving.company import ask

IDLE = dict.fromkeys(("r0", "r1", "r2", "r3"), 0)


def test_an_adapter_has_one_home_and_adapters_spread() -> None:
    homes = {f"a{index}": rank_replicas(f"a{index}", IDLE)[0] for index in range(400)}
    assert homes == {name: rank_replicas(name, IDLE)[0] for name in homes}
    assert all(60 <= count <= 140 for count in Counter(homes.values()).values())


def test_a_replica_that_goes_moves_only_its_own() -> None:
    fewer = {name: 0 for name in IDLE if name != "r2"}
    for index in range(200):
        before, after = rank_replicas(f"a{index}", IDLE), rank_replicas(f"a{index}", fewer)
        assert after == [name for name in before if name != "r2"]


def test_a_busy_home_is_passed_over_and_comes_last() -> None:
    home = rank_replicas("hot", IDLE)[0]
    ranked = rank_replicas("hot", {**IDLE, home: 10})
    assert ranked[-1] == home and ranked[0] == rank_replicas("hot", IDLE)[1]
    assert rank_replicas("hot", {**dict.fromkeys(IDLE, 8), home: 9})[0] == home


def test_without_an_adapter_the_least_busy_comes_first() -> None:
    assert rank_replicas(None, {"r0": 3, "r1": 1, "r2": 2}) == ["r1", "r2", "r0"]
    assert rank_replicas("a", {}) == []


def test_the_request_is_read_not_a_header() -> None:
    assert adapter_of([ask("cat", "dog").model_dump()]) == "default/cat@1"
    assert adapter_of([ask().model_dump()]) is None
    assert adapter_of([]) is None and adapter_of(["stats"]) is None and adapter_of([{"id": "x"}]) is None

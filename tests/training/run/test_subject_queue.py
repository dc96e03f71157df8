"""The subject queue: leases, attempts, cancelling; all without Ray."""

import pytest

from training.run.lease import Entry
from training.run.run import State, SubjectRecord
from training.run.source import Beat, Doing, EndKind, Outcome, Phase
from training.run.subject_queue import CALMER, LEASE_SECONDS, SubjectQueue
from training.run.view import RunView


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


TRAINING = Doing(Phase.TRAINING)


def entry(id: str, profile: int = 0, priority: int = 0, **record: object) -> Entry:
    made = SubjectRecord(id=id, max_steps=10, fingerprint=f"{id}-print").model_copy(update=record)
    return Entry(record=made, profile=profile, priority=priority)


def queue(*entries: Entry, clock: Clock | None = None) -> SubjectQueue:
    made = SubjectQueue(entries, clock=clock or Clock())
    made.enter(0, 0)
    return made


def ids(queue: SubjectQueue, lane: int = 0, count: int = 10) -> list[str]:
    return [lease.id for lease in queue.lease(lane, count)]


def record(queue: SubjectQueue, id: str) -> SubjectRecord:
    return next(record for record in queue.view(-1).changed if record.id == id)


def test_leases_in_manifest_order_and_never_twice() -> None:
    made = queue(entry("a"), entry("b"), entry("c"))
    assert ids(made, count=2) == ["a", "b"]
    made.enter(1, 0)
    assert ids(made, 1) == ["c"]
    assert ids(made, 1) == []
    assert record(made, "c").pack == 1


def test_high_priority_goes_first() -> None:
    assert ids(queue(entry("a"), entry("b", priority=5), entry("c"))) == ["b", "a", "c"]


def test_a_lane_gets_its_profile_only() -> None:
    made = queue(entry("a", profile=1), entry("b"))
    assert ids(made) == ["b"]
    assert made.view().waiting == {1: 1}


def test_a_lease_carries_the_fingerprint() -> None:
    assert queue(entry("a")).lease(0, 1)[0].fingerprint == "a-print"


def test_what_has_ended_is_not_leased() -> None:
    made = queue(entry("a", state="published"), entry("b", state="failed"), entry("c", state="training", step=3))
    assert ids(made) == ["c"]
    assert record(made, "c").step == 3


def test_a_beat_renews_and_tells_step_and_loss() -> None:
    clock = Clock()
    made = queue(entry("a"), clock=clock)
    ids(made)
    for _ in range(3):
        clock.now += LEASE_SECONDS - 1
        orders = made.beat(0, Beat(phase={"a": TRAINING}, steps={"a": 4}, losses={"a": 0.5}, images_per_second=7))
        assert orders.cancel == frozenset() and not orders.stop
    seen = record(made, "a")
    assert (seen.state, seen.step, seen.loss) == ("training", 4, 0.5)
    assert made.view().lanes[0].images_per_second == 7


def test_a_silent_lane_loses_its_subjects_to_another_and_is_told_to_drop_them() -> None:
    clock = Clock()
    made = queue(entry("a"), clock=clock)
    ids(made)
    clock.now += LEASE_SECONDS + 1
    made.enter(1, 0)
    assert ids(made, 1) == ["a"]
    assert made.beat(0, Beat(phase={"a": TRAINING}, steps={"a": 2}, losses={"a": 1.0})).cancel == {"a"}
    made.ended(0, Outcome("a", "cancelled"))
    assert record(made, "a").state == "preparing"  # the new holder's word counts
    assert "no sign of life" in record(made, "a").attempts[0].reason


def test_every_step_is_counted_once_also_those_made_again() -> None:
    clock = Clock()
    made = queue(entry("a"), clock=clock)
    training = {"a": Doing(Phase.TRAINING)}
    made.lease(0, 1)
    made.beat(0, Beat(training, {"a": 37}, {"a": 1.0}, {"a": 37}))
    clock.now += 10_000  # silent for too long, but nobody has taken it
    made.expire()
    made.beat(0, Beat(training, {"a": 40}, {"a": 1.0}, {"a": 40}))
    assert {id: used.steps for id, used in made.spent().items()} == {"a": 40}
    made.release(0, "its node is taken", "preempted")
    made.enter(0, 0)
    made.lease(0, 1)  # from the checkpoint of step 20: its steps are made again
    made.beat(0, Beat(training, {"a": 45}, {"a": 1.0}, {"a": 25}))
    made.release(0, "its node is taken", "preempted")
    made.enter(0, 0)
    made.lease(0, 1)  # from the checkpoint of step 50, which was written after the last beat
    made.beat(0, Beat(training, {"a": 51}, {"a": 1.0}, {"a": 1}))
    made.ended(0, Outcome("a", "done", version="f" * 64, step=60, trained=10))
    assert sum(used.steps for used in made.spent().values()) == 25 + 5 + 10 and made.spent() == {}


def test_a_lane_that_was_only_slow_goes_on_if_nobody_took_over() -> None:
    clock = Clock()
    made = queue(entry("a"), clock=clock)
    ids(made)
    clock.now += LEASE_SECONDS + 1
    assert made.view().waiting == {0: 1}
    assert made.beat(0, Beat(phase={"a": TRAINING}, steps={"a": 2}, losses={"a": 1.0})).cancel == frozenset()
    assert made.view().waiting == {}
    assert made.view().lanes[0].held == ("a",)


def test_a_queue_made_again_takes_up_what_its_lanes_hold() -> None:
    made = SubjectQueue([entry("a", state="training", step=5), entry("b")])
    orders = made.beat(0, Beat(phase={"a": TRAINING}, steps={"a": 6}, losses={"a": 1.0}))
    assert orders.cancel == frozenset()
    assert ids(made) == ["b"]  # it also knows the lane's profile again


def test_publication_counts_whoever_did_it() -> None:
    clock = Clock()
    made = queue(entry("a"), clock=clock)
    ids(made)
    clock.now += LEASE_SECONDS + 1
    made.view()
    made.ended(0, Outcome("a", "done", version="f00", step=10, seconds=2.0))
    assert (record(made, "a").state, record(made, "a").version) == ("published", "f00")
    assert ids(made) == [] and made.view().unfinished == 0


@pytest.mark.parametrize("kind", ["bad subject", "out of memory"])
def test_what_trying_again_does_not_mend_fails_with_its_reason(kind: EndKind) -> None:
    made = queue(entry("a"), entry("b"))
    ids(made)
    made.ended(0, Outcome("a", kind, reason="why"))
    assert (record(made, "a").state, record(made, "a").reason) == ("failed", "why")
    assert record(made, "a").attempts[0].kind == kind
    assert record(made, "b").state == "preparing"


@pytest.mark.parametrize("kind", ["too large", "out of memory"])
def test_what_one_device_cannot_hold_goes_to_a_gang_once(kind: EndKind) -> None:
    made = queue(entry("a").model_copy(update={"reserve": 1}), entry("b"))
    assert [lease.may_spread for lease in made.lease(0, 2)] == [True, False]
    made.ended(0, Outcome("a", kind, reason="it takes 8 rows"))
    assert made.view().waiting == {1: 1}
    assert record(made, "a").attempts[0].reason == "it takes 8 rows; it goes on over several devices"
    made.enter(1, 1)
    (lease,) = made.lease(1, 1)
    assert (lease.id, lease.may_spread) == ("a", False)
    made.ended(1, Outcome("a", "out of memory", reason="not even so"))
    assert (record(made, "a").state, record(made, "a").reason) == ("failed", "not even so")


def test_what_diverged_goes_on_once_with_a_lower_rate() -> None:
    made = queue(entry("a"))
    assert made.lease(0, 1)[0].rate_factor == 1
    made.ended(0, Outcome("a", "diverged", reason="the loss is not finite"))
    assert record(made, "a").state == "queued"
    made = queue(Entry(record=record(made, "a"), profile=0))  # it holds in the next driver's life, too
    assert made.lease(0, 1)[0].rate_factor == CALMER
    made.ended(0, Outcome("a", "diverged", reason="the loss is not finite"))
    assert (record(made, "a").state, record(made, "a").reason) == ("failed", "the loss is not finite")
    assert [attempt.kind for attempt in record(made, "a").attempts] == ["diverged", "diverged"]


def test_what_waits_in_a_lane_that_beats_is_not_taken_away() -> None:
    clock = Clock()
    made = queue(entry("a"), entry("b"), clock=clock)
    ids(made)
    for _ in range(4):
        clock.now += LEASE_SECONDS - 1
        made.beat(0, Beat(phase={"a": Doing(Phase.CLASS_IMAGES, 3, 200)}))
    assert made.view().lanes[0].held == ("a", "b")


def test_a_dead_worker_gives_back_and_the_third_time_a_subject_fails() -> None:
    made = queue(entry("a"))
    for turn in range(3):
        assert ids(made) == ["a"]
        made.enter(0, 0, "its worker died")
        assert len(record(made, "a").attempts) == turn + 1
    assert record(made, "a").state == "failed"
    assert record(made, "a").reason == "its worker died (attempt 3 of 3)"


def test_preemption_is_free() -> None:
    made = queue(entry("a"))
    for _ in range(10):
        assert ids(made) == ["a"]
        made.release(0, "its node is gone", "preempted")
        made.enter(0, 0)
    assert record(made, "a").state == "queued" and len(record(made, "a").attempts) == 10


def test_the_one_that_kills_its_pack_is_found_and_costs_only_itself() -> None:
    made = queue(entry("good"), entry("bad"), entry("fine"))
    for _ in range(20):
        held = ids(made)
        if "bad" in held:
            made.enter(0, 0)
            continue
        for id in held:
            made.ended(0, Outcome(id, "done", version="v"))
    assert [record(made, id).state for id in ("good", "bad", "fine")] == ["published", "failed", "published"]


def test_a_lane_whose_workers_never_begin_is_given_up() -> None:
    made = queue(entry("a"))
    assert [made.enter(0, 0, "no base here") for _ in range(3)] == [True, True, False]
    assert made.trouble(0) == "no base here"
    made.give_up(0, "no lane can work")
    assert (record(made, "a").state, record(made, "a").reason) == ("failed", "no lane can work")


def test_a_lane_that_cannot_load_is_heard_in_its_own_words() -> None:
    """Its worker says what is wrong and dies of it; that it died is no news then."""
    made = queue(entry("a"))
    for goes_on in (True, True, False):
        made.release(0, "the base on this node is another one")
        made.release(0, "a second worker of its gang lost the connection")
        assert made.enter(0, 0) == goes_on
    assert made.trouble(0) == "the base on this node is another one"
    assert made.view().notes == ("pack 0: the base on this node is another one",) * 3


def test_cancelling_waits_for_the_lane_only_where_one_holds_the_subject() -> None:
    made = queue(entry("a"), entry("b"), entry("c"))
    ids(made, count=1)
    made.cancel(["a", "b"])
    assert (record(made, "a").state, record(made, "b").state) == ("preparing", "cancelled")
    assert made.beat(0, Beat(phase={"a": Doing(Phase.READING)})).cancel == {"a"}
    made.ended(0, Outcome("a", "cancelled"))
    assert record(made, "a").state == "cancelled"
    assert ids(made) == ["c"]


def test_a_cancelled_subject_is_not_tried_again_when_its_lane_dies() -> None:
    made = queue(entry("a"))
    ids(made)
    made.cancel()
    made.enter(0, 0)
    assert record(made, "a").state == "cancelled"


def test_stop_leases_nothing_and_costs_no_attempt() -> None:
    made = queue(entry("a"), entry("b"))
    ids(made, count=1)
    made.stop()
    assert made.beat(0, Beat(phase={"a": TRAINING})).stop
    assert ids(made) == []
    made.release(0, "the run was stopped", "stopped")
    assert (record(made, "a").state, record(made, "a").attempts) == ("queued", ())


def test_a_view_tells_only_what_is_new() -> None:
    made = queue(entry("a"), entry("b"))
    ids(made, count=1)
    first = made.view()
    assert [record.id for record in first.changed] == ["a"]
    assert made.view(first.seq).changed == ()
    made.beat(0, Beat(phase={"a": TRAINING}, notes=["a checkpoint is torn"]))
    assert made.view(first.seq).notes == ("a checkpoint is torn",)


def test_each_of_thousands_is_leased_once_in_the_manifests_order() -> None:
    names = [f"s{index}" for index in range(3000)]
    made = queue(*map(entry, names))
    leased: list[str] = []
    while leases := made.lease(0, 8):
        made.beat(0, Beat(phase={lease.id: TRAINING for lease in leases}))
        for lease in leases:
            made.ended(0, Outcome(lease.id, "done", version="v"))
        leased += [lease.id for lease in leases]
    assert leased == names
    assert (made.view().unfinished, made.view().waiting) == (0, {})


def test_a_dismissed_lane_ends_and_its_subjects_go_to_another() -> None:
    one = queue(entry("a"), entry("b"))
    assert one.enter(0, 0) and one.enter(1, 0)
    assert ids(one, 0, 1) == ["a"]
    one.dismiss(0)
    assert one.beat(0, Beat(phase={"a": TRAINING}, steps={"a": 5}, losses={"a": 0.1})).stop
    assert not one.beat(1, Beat()).stop
    assert not ids(one, 0)
    one.release(0, "the run was stopped", "stopped")
    assert ids(one, 1) == ["a", "b"]
    assert not record(one, "a").attempts and record(one, "a").step == 5
    assert not one.enter(0, 0)


@pytest.mark.parametrize(
    ("doing", "state", "words"),
    [
        (Doing(Phase.READING), "preparing", "reading photos"),
        (Doing(Phase.CLASS_IMAGES, 3, 200), "preparing", "class images 3/200"),
        (Doing(Phase.TRAINING), "training", "training"),
        (Doing(Phase.PUBLISHING), "evaluating", "publishing"),
    ],
)
def test_a_phase_decides_the_state_and_is_read_in_words(doing: Doing, state: State, words: str) -> None:
    made = queue(entry("a"))
    ids(made)
    made.beat(0, Beat(phase={"a": doing}))
    assert record(made, "a").state == state
    view = RunView.model_validate(made.view().model_dump())  # as it crosses Ray's border
    assert view.lanes[0].phases == {"a": doing} and str(doing) == words


def test_what_the_records_tell_is_a_phase_too() -> None:
    records = [SubjectRecord(id="a", state="training", pack=1), SubjectRecord(id="b", state="queued")]
    (lane,) = RunView.of_records(records).lanes
    assert (lane.lane, lane.held, lane.phases) == (1, ("a",), {"a": Doing(Phase.TRAINING)})


def test_every_phase_has_a_state() -> None:
    made = queue(entry("a"))
    ids(made)
    for phase in Phase:
        made.beat(0, Beat(phase={"a": Doing(phase)}))
        assert record(made, "a").state in ("preparing", "training", "evaluating")

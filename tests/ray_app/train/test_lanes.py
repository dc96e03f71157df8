"""How many lanes are open, and of how many devices; without Ray."""

import pytest
from ray.exceptions import RayTaskError

from ray_app.train.cluster import Cluster, ClusterLimits
from ray_app.train.lane import in_words
from ray_app.train.lanes import LaneOrder, Lanes, _cause, _Lane
from tests.training.subjects import spec
from training.errors import UserError
from training.manifest.plan import PackPlan, Profile
from training.manifest.subject import ZeroSpec
from training.run.lease import Lease
from training.run.subject_queue import CALMER
from training.run.view import RunView
from training.storage.closed import Closed


def pack(slots: int = 4, workers: int = 1) -> PackPlan:
    kinds = {"resolution": 64, "targets": ("to_q",), "text_encoder_targets": (), "mixed_precision": "no"}
    zero = ZeroSpec.model_validate({"workers": workers}) if workers > 1 else None
    profile = Profile.model_validate({**kinds, "gradient_checkpointing": "auto", "zero": zero})
    return PackPlan(profile=profile, subjects=(), slots=slots, rank=8, rows=1, state_bytes=8, memory_mb=1.0)


class Counted(Lanes):
    """Lanes that open nothing but themselves."""

    def __init__(self, *packs: PackPlan, gpus: int, limits: ClusterLimits | None = None) -> None:
        self.refused: list[int] = []
        told = LaneOrder("run", "storage", "queue")
        cluster = Cluster(local=True, gpus=gpus, cpus=8, nodes=1)
        super().__init__(told, packs, cluster, limits or ClusterLimits(), None, lambda _: None)

    def _open(self, profile: int, plan: PackPlan) -> None:
        self._lanes[len(self._lanes)] = _Lane(profile, plan, None)

    def _refuse(self, profile: int, pack: PackPlan) -> None:
        self.refused.append(profile)

    def see(self, **waiting: int) -> list[tuple[int, int]]:
        """Profile and slots of every lane, after so many subjects of each profile have been seen waiting."""
        found = {int(name.removeprefix("p")): count for name, count in waiting.items()}
        self.open(RunView(seq=0, changed=(), lanes=(), waiting=found, unfinished=1, notes=()))
        return [(lane.profile, lane.plan.slots) for lane in self._lanes.values()]


def test_subjects_are_spread_evenly_over_the_seats() -> None:
    assert Counted(pack(), gpus=3).see(p0=7) == [(0, 3), (0, 2), (0, 2)]
    assert Counted(pack(), pack(), gpus=2).see(p0=7, p1=1) == [(0, 4), (1, 1)]


def test_a_gang_takes_as_many_seats_as_it_has_workers() -> None:
    assert Counted(pack(slots=1, workers=2), gpus=4).see(p0=7) == [(0, 1), (0, 1)]
    assert Counted(pack(slots=1, workers=2), pack(), gpus=3).see(p0=1, p1=8) == [(0, 1), (1, 4)]


def test_a_gang_waits_for_its_seats() -> None:
    lanes = Counted(pack(), pack(slots=1, workers=2), gpus=2)
    assert lanes.see(p0=2) == [(0, 1), (0, 1)]
    del lanes._lanes[1]
    assert lanes.see(p1=1) == [(0, 1)]
    lanes._lanes.clear()
    assert lanes.see(p1=1) == [(1, 1)]


def test_a_gang_of_a_cpu_machine_shares_its_one_seat() -> None:
    assert Counted(pack(slots=1, workers=2), gpus=0).see(p0=5) == [(0, 1)]


def test_a_gang_that_can_never_be_had_is_refused() -> None:
    lanes = Counted(pack(slots=1, workers=4), pack(), gpus=2)
    assert lanes.see(p0=1, p1=1) == [(1, 1)] and lanes.refused == [0]
    assert Counted(pack(slots=1, workers=4), gpus=2, limits=ClusterLimits(gpus=4)).see(p0=1) == [(0, 1)]


def rates(settings: Closed, path: str = "") -> dict[str, float]:
    """Every learning rate that settings have, wherever it stands."""
    found: dict[str, float] = {}
    for name, value in settings:
        if isinstance(value, Closed):
            found |= rates(value, f"{path}{name}.")
        elif name.endswith("learning_rate"):
            found[path + name] = value
    return found


def test_after_a_divergence_every_learning_rate_is_lower() -> None:
    one = spec("a", words={"tokens": ["<s1>"]}, instance_prompt="a photo of <s1> dog")
    task = Lease(id="a", fingerprint="f", rate_factor=CALMER, may_spread=False).task(one)
    before, after = rates(task.spec), rates(task.trained)
    assert set(before) == {"train.learning_rate", "train.text_encoder_learning_rate", "words.learning_rate"}
    assert after == {name: pytest.approx(CALMER * rate) for name, rate in before.items()}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("Base 'x' is another one.\nPut the same files on every node."), None),
        (ValueError("no such layer"), "ValueError: no such layer"),
        (KeyError(), "KeyError: "),
    ],
)
def test_what_a_lane_raises_is_told_in_its_own_words(error: Exception, words: str | None) -> None:
    """However often Ray has wrapped it, and all of its lines."""
    wrapped = RayTaskError("run_lane", "Traceback ...\n  File ...", error)
    for one in (error, wrapped, wrapped.as_instanceof_cause(), RayTaskError("outer", "Traceback ...", wrapped)):
        assert in_words(_cause(one)) == (words or str(error))

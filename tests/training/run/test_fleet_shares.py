"""200 jobs of 20 tenants on two devices, by the real queue on a clock of its own: shares, quotas, priorities, waits.

The seconds of a fused step by the number of subjects are those of `benchmarks/training.md`.
"""

import heapq
import random
from dataclasses import dataclass, field

import pytest

from benchmarks.simulation import step_seconds
from training.run.lease import Entry
from training.run.run import SubjectRecord
from training.run.source import Beat, Doing, Outcome, Phase
from training.run.subject_queue import SubjectQueue
from training.run.turns import TenantQuota, Turns

TENANTS, JOBS, LANES, SLOTS, STEPS_A_BEAT = 20, 10, 2, 8, 25


@dataclass
class SimulatedFleet:
    """The simulation, and what it has seen. Times in simulated seconds."""

    seed: int
    quotas: dict[str, TenantQuota] = field(default_factory=dict)
    urgent: frozenset[str] = frozenset()
    now: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    contended: dict[str, float] = field(default_factory=dict)  # used by tenant, when all had something waiting last
    behind: float = 0.0  # the most that a tenant with something waiting was behind the mean
    ended: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.turns = Turns(self.quotas)
        self.queue = SubjectQueue(self._entries(), clock=lambda: self.now, turns=self.turns, lease_s=1e9)

    def run(self) -> "SimulatedFleet":
        """Until nothing can be done any more."""
        here: list[dict[str, int]] = [{} for _ in range(LANES)]
        due = [(0.0, lane) for lane in range(LANES)]
        for lane in range(LANES):
            self.queue.enter(lane, 0)
        while due:
            self.now, lane = heapq.heappop(due)
            self._end(lane, here[lane])
            here[lane] |= {lease.id: 0 for lease in self.queue.lease(lane, SLOTS - len(here[lane]))}
            doing = dict.fromkeys(here[lane], Doing(Phase.TRAINING))
            self.queue.beat(lane, Beat(doing, dict(here[lane]), dict.fromkeys(here[lane], 0.0)))
            self._look()
            if here[lane]:
                count = min(STEPS_A_BEAT, *(self.steps[key] - step for key, step in here[lane].items()))
                here[lane] = {key: step + count for key, step in here[lane].items()}
                heapq.heappush(due, (self.now + count * step_seconds(len(here[lane])), lane))
        return self

    def _entries(self) -> list[Entry]:
        rng = random.Random(self.seed)
        order = [(tenant, job) for tenant in range(TENANTS) for job in range(JOBS)]
        rng.shuffle(order)
        found = []
        for tenant, job in order:
            name = f"t{tenant:02d}"
            record = SubjectRecord(id=f"job-{job}", max_steps=rng.randint(200, 800), fingerprint=f"{tenant}-{job}")
            priority = int(name in self.urgent)
            found.append(Entry(record=record, profile=0, run=f"{name}-{job}", tenant=name, priority=priority))
            self.steps[found[-1].key] = record.max_steps
        return found

    def _end(self, lane: int, here: dict[str, int]) -> None:
        for key in [key for key, step in here.items() if step >= self.steps[key]]:
            del here[key]
            self.queue.ended(lane, Outcome(key, "done", version="v", step=self.steps[key]))
            self.ended[key] = self.now

    def _look(self) -> None:
        waiting = {key.partition("-")[0] for key in self.queue.order(0)}
        if len(waiting) == TENANTS:
            self.contended = dict(self.turns.used)
            mean = sum(self.contended.values()) / TENANTS
            self.behind = max(self.behind, *(mean - used for used in self.contended.values()))


@pytest.mark.parametrize("seed", range(3))
def test_tenants_get_even_shares_and_none_waits_longer_than_its_share_explains(seed: int) -> None:
    fleet = SimulatedFleet(seed).run()
    assert len(fleet.ended) == TENANTS * JOBS
    mean = sum(fleet.contended.values()) / TENANTS
    assert all(used == pytest.approx(mean, rel=0.05) for used in fleet.contended.values())
    # a job is not interrupted for another tenant's: so long, and no longer, one may be behind
    jobs = sorted(fleet.steps.values())
    assert fleet.behind <= jobs[-1] * step_seconds(SLOTS) / SLOTS * 1.1


def test_who_has_used_up_its_month_gets_nothing_more_and_the_others_share_it() -> None:
    fleet = SimulatedFleet(0, quotas={"t03": TenantQuota(device_seconds=20)}).run()
    assert fleet.turns.used["t03"] < 20 + 2 * 800 * step_seconds(1)
    assert sum(key.startswith("t03") for key in fleet.ended) < JOBS
    assert len(fleet.ended) > (TENANTS - 1) * JOBS


def test_who_has_priority_is_done_first() -> None:
    fleet = SimulatedFleet(0, urgent=frozenset({"t05", "t11"})).run()
    urgent = [end for key, end in fleet.ended.items() if key[:3] in ("t05", "t11")]
    others = sorted(end for key, end in fleet.ended.items() if key[:3] not in ("t05", "t11"))
    assert max(urgent) < others[len(others) // 10]

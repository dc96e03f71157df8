"""A thousand times the cluster there is: 10,000 subjects on 64 preemptible GPUs, by the real subject queue, in SimPy.

    python -m benchmarks.simulation [--subjects 10000] [--gpus 64] [--write]

What is real: `training.run.subject_queue.SubjectQueue` decides everything, on the simulation's clock. What is measured:
the seconds of a fused step by how many subjects share it (`benchmarks/training.md`), 15 s from a device to its first
lease (`benchmarks/orchestration.md`), 0.8 s to prepare and publish a subject (most of it draws its samples). What is
assumed: a node lives for an exponential time with a mean of 30 minutes and its successor comes after two minutes;
subjects take 200 to 800 steps. A second column has steps of 30 times the seconds, as a base takes whose runs last
hours. Seeded.

A device's time is useful if its step stays: steps after the last checkpoint of a preempted lane are not.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import simpy

from training.run.lease import Entry
from training.run.run import SubjectRecord
from training.run.source import Beat, Doing, Outcome, Phase
from training.run.subject_queue import SubjectQueue

# images a second of packs of so many, one row a subject: bf16, 2 CPU cores, benchmarks/training.md
RATES = {1: 24.5, 2: 43.2, 4: 69.1, 8: 97.0, 16: 133.3, 32: 154.3}
SLOTS = 8
LANE_SECONDS = 15.0  # from an idle device to the first lease: Ray Train's run, its worker, the base
PREPARE_SECONDS, PUBLISH_SECONDS = 0.05, 0.75  # of a subject, on its device
NODE_SECONDS = 120.0  # until a lost node is replaced
LIFE_SECONDS = 1800.0
CHECKPOINT_EVERY = 50
SLOWER = (1.0, 30.0)


def step_seconds(subjects: int) -> float:
    """Of one fused step; between what was measured, linear in the number of subjects."""
    known = sorted(RATES)
    below = max(size for size in known if size <= subjects)
    above = min((size for size in known if size >= subjects), default=known[-1])
    if below == above:
        return subjects / RATES[below]
    share = (subjects - below) / (above - below)
    return (1 - share) * below / RATES[below] + share * above / RATES[above]


@dataclass
class Tally:
    """Seconds of all devices: how long there were any, and what for. `lost`: of `training`, what did not stay."""

    there: float = 0.0
    starting: float = 0.0
    handling: float = 0.0
    training: float = 0.0
    lost: float = 0.0
    preemptions: int = 0
    ended: dict[str, int] = field(default_factory=dict)


@dataclass
class World:
    """The simulation: one process a device, one queue for all."""

    steps: dict[str, int]
    rng: random.Random
    env: simpy.Environment
    queue: SubjectQueue
    tally: Tally
    slower: float
    saved: dict[str, int] = field(default_factory=dict)

    def device(self, lane: int) -> simpy.events.ProcessGenerator:
        """A node after the other, until nothing is left to do."""
        while self.queue.view(since=sys.maxsize).unfinished:
            born, dies = self.env.now, self.env.now + self.rng.expovariate(1 / LIFE_SECONDS)
            finished = yield self.env.process(self.life(lane, dies))
            self.tally.there += self.env.now - born
            if finished:
                return
            self.tally.preemptions += 1
            yield self.env.timeout(NODE_SECONDS)

    def life(self, lane: int, dies: float) -> simpy.events.ProcessGenerator:
        """A lane on one node. Returns whether it ended before its node did."""
        if not (yield self.env.process(self.spend("starting", LANE_SECONDS, dies))):
            return False
        self.queue.enter(lane, 0, "its node was lost", "preempted")
        here: dict[str, int] = {}
        since: dict[str, float] = {}  # seconds spent on each since its checkpoint
        while True:
            leased = self.queue.lease(lane, SLOTS - len(here)) if len(here) < SLOTS else []
            for lease in leased:
                here[lease.id], since[lease.id] = self.saved.get(lease.id, 0), 0.0
            if leased and not (yield self.env.process(self.spend("handling", PREPARE_SECONDS * len(leased), dies))):
                return self.lose(since)
            if not here:
                return True
            each = self.slower * step_seconds(len(here))
            count = min(self.to_border(id, step) for id, step in here.items())
            fit = min(count, int((dies - self.env.now) / each))
            yield self.env.timeout(fit * each)
            self.tally.training += fit * each
            for id in here:
                here[id] += fit
                since[id] += fit * each / len(here)
                if here[id] % CHECKPOINT_EVERY == 0:
                    self.saved[id], since[id] = here[id], 0.0
            if fit < count:
                return self.lose(since)
            done = [id for id, step in here.items() if step == self.steps[id]]
            for id in done:
                self.saved[id] = here.pop(id)
                del since[id]
            if done and not (yield self.env.process(self.spend("handling", PUBLISH_SECONDS * len(done), dies))):
                return self.lose(since)
            for id in done:
                self.queue.ended(lane, Outcome(id=id, kind="done", version="v", step=self.steps[id]))
                self.tally.ended[id] = self.tally.ended.get(id, 0) + 1
            alive = dict.fromkeys(here, 0.0)
            self.queue.beat(
                lane, Beat(phase=dict.fromkeys(here, Doing(Phase.TRAINING)), steps=dict(here), losses=alive)
            )

    def to_border(self, id: str, step: int) -> int:
        """Steps to a subject's next checkpoint or end."""
        return min(CHECKPOINT_EVERY - step % CHECKPOINT_EVERY, self.steps[id] - step)

    def lose(self, since: dict[str, float]) -> bool:
        self.tally.lost += sum(since.values())
        return False

    def spend(self, what: str, seconds: float, dies: float) -> simpy.events.ProcessGenerator:
        """Passes time that trains nothing. Returns whether the node outlived it."""
        spent = max(0.0, min(seconds, dies - self.env.now))
        yield self.env.timeout(spent)
        setattr(self.tally, what, getattr(self.tally, what) + spent)
        return spent == seconds


def simulate(subjects: int, gpus: int, seed: int, slower: float) -> tuple[Tally, float, float]:
    """The tally, the makespan, and the makespan if every device trained full packs all the time. Seconds."""
    rng = random.Random(seed)
    steps = {f"subject-{index:05d}": rng.randint(200, 800) for index in range(subjects)}
    env = simpy.Environment()
    entries = (Entry(record=SubjectRecord(id=id, max_steps=most), profile=0) for id, most in steps.items())
    queue = SubjectQueue(entries, clock=lambda: env.now)
    world = World(steps, rng, env, queue, Tally(), slower)
    devices = [env.process(world.device(lane)) for lane in range(gpus)]
    env.run(simpy.AllOf(env, devices))
    assert set(world.tally.ended) == set(steps) and set(world.tally.ended.values()) == {1}
    full = slower * step_seconds(SLOTS) / SLOTS
    return world.tally, env.now, sum(steps.values()) * full / gpus


def _column(tally: Tally, makespan: float, bound: float) -> dict[str, str]:
    return {
        "preemptions": f"{tally.preemptions:,}",
        "makespan": f"{makespan / 60:,.1f} min",
        "lower bound: full packs all the time, no preemption": f"{bound / 60:,.1f} min",
        "makespan / lower bound": f"{makespan / bound:.2f}",
        "device time spent on steps that stayed": f"{(tally.training - tally.lost) / tally.there:.1%}",
        "... on steps that were lost": f"{tally.lost / tally.there:.1%}",
        "... on starting lanes": f"{tally.starting / tally.there:.1%}",
        "... on preparing and publishing": f"{tally.handling / tally.there:.1%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/simulation.md")
    asked = parser.parse_args()
    found = [_column(*simulate(asked.subjects, asked.gpus, asked.seed, slower)) for slower in SLOWER]
    table = [
        f"{time.strftime('%Y-%m-%d')}, seed {asked.seed}: {asked.subjects:,} subjects of 200 to 800 steps on "
        f"{asked.gpus} preemptible devices, packs of {SLOTS}. Every subject was published once.",
        "",
        "| seconds of a step, as measured times | " + " | ".join(f"{slower:g}" for slower in SLOWER) + " |",
        "|---|" + "---:|" * len(SLOWER),
        *(f"| {name} | " + " | ".join(column[name] for column in found) + " |" for name in found[0]),
    ]
    print("\n".join(table))
    if asked.write:
        about = (
            "The docstring of [`simulation.py`](simulation.py) lists what is real, measured and assumed. Target: 90 %\n"
            "utilisation. Where a subject trains for only seconds, its sample images take a large part of them."
        )
        text = "# Ten thousand subjects on preemptible GPUs\n\n" + about + "\n\n" + "\n".join(table) + "\n"
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

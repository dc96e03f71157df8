"""The choice of a step: from the scores of a subject's checkpoints to the one that is published, and why, in words.

Pure; knows no model, no picture and no torch. Sources: the early stop is DVAR (Voronov et al., "Is This Loss
Informative?", NeurIPS 2023); two axes joined by their harmonic mean, so that neither can buy the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import pvariance

# a difference smaller than the scatter between seeds decides nothing
TIE = 0.02


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint. `likeness` and `fidelity` run from 0 (the plain class, any prompt) to 1 (a photo, the base).

    `copying` and `drift` are alarms above their limits; a limit of None means that nothing measured it.
    """

    step: int
    likeness: float
    fidelity: float
    drift: float = 0.0
    drift_limit: float | None = None
    copying: float = 0.0
    copying_limit: float | None = None

    @property
    def balance(self) -> float:
        """The harmonic mean of likeness and fidelity; 0 if either is."""
        return harmonic_mean(self.likeness, self.fidelity)

    @property
    def alarms(self) -> list[str]:
        """What speaks against this step, in words; empty if nothing does."""
        found = []
        if self.copying_limit is not None and self.copying > self.copying_limit:
            found.append(f"copies training photos ({self.copying:.2f} > {self.copying_limit:.2f})")
        if self.drift_limit is not None and self.drift > self.drift_limit:
            found.append(f"the bare class turns into the subject ({self.drift:.2f} > {self.drift_limit:.2f})")
        return found

    @property
    def excess(self) -> float:
        """How far the worse alarm is above its limit."""
        over = [0.0]
        if self.copying_limit is not None:
            over.append(self.copying - self.copying_limit)
        if self.drift_limit is not None:
            over.append(self.drift - self.drift_limit)
        return max(over)


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen step and why. `rejected`: the alarms of the steps that were out of the question."""

    step: int
    reason: str
    rejected: Mapping[int, str] = field(default_factory=dict)


def harmonic_mean(a: float, b: float) -> float:
    """Of two numbers in 0..1; 0 if either is 0 or less."""
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


def choose(candidates: Sequence[Candidate], *, keep_last: bool = False, tie: float = TIE) -> Choice:
    """The best balance among the checkpoints without an alarm; within `tie` of the best, the earliest.

    If every checkpoint has an alarm, the one whose alarm is smallest, the earliest of equals. Raises ValueError for
    none.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.step)
    if not ordered:
        raise ValueError("there is no checkpoint to choose from")
    rejected = {candidate.step: "; ".join(candidate.alarms) for candidate in ordered if candidate.alarms}
    last = ordered[-1]
    if keep_last or len(ordered) == 1:
        why = "as asked" if keep_last else "the only checkpoint"
        alarm = f". Mind: {rejected[last.step]}" if last.step in rejected else ""
        return Choice(last.step, f"the last step, {why}{alarm}", rejected)
    sound = [candidate for candidate in ordered if candidate.step not in rejected]
    if not sound:
        best = min(ordered, key=lambda candidate: (candidate.excess, candidate.step))
        return Choice(best.step, f"every step has an alarm; here it is smallest: {rejected[best.step]}", rejected)
    top = max(sound, key=lambda candidate: candidate.balance)
    if top.balance == 0 and max(candidate.likeness for candidate in sound) <= 0:
        # nothing has been learned yet, so the most trained is the nearest to being of use
        return Choice(sound[-1].step, "no step is like the subject yet; the latest was taken. Train longer", rejected)
    best = next(candidate for candidate in sound if candidate.balance >= top.balance - tie)
    return Choice(best.step, _why(best, top, sound, rejected), rejected)


def _why(best: Candidate, top: Candidate, sound: Sequence[Candidate], rejected: Mapping[int, str]) -> str:
    words = f"likeness {best.likeness:.2f} and fidelity {best.fidelity:.2f}"
    steps = ", ".join(str(candidate.step) for candidate in sound)
    if len(sound) == 1:
        reason = f"the only step without an alarm: {words}"
    elif best is top:
        reason = f"best balance of {words} among steps {steps}"
    else:
        reason = f"{words}; step {top.step} is no better by more than chance, and the earlier one is kept"
    return reason + "".join(f". Step {step} rejected: {alarm}" for step, alarm in rejected.items())


def overfits_after(candidates: Sequence[Candidate]) -> int | None:
    """The step after which every later one is worse for having trained longer: fidelity has fallen, or an alarm has
    begun. None if there is none."""
    ordered = sorted(candidates, key=lambda candidate: candidate.step)
    for place, earlier in enumerate(ordered[:-1]):
        if not earlier.alarms and all(_is_harmed(earlier, later) for later in ordered[place + 1 :]):
            return earlier.step
    return None


def _is_harmed(earlier: Candidate, later: Candidate) -> bool:
    has_faded = later.fidelity < earlier.fidelity - 0.1 and later.balance < earlier.balance - TIE
    return has_faded or bool(later.alarms)


def has_settled(losses: Sequence[float], *, window: int, share: float) -> bool:
    """DVAR's stop: the variance of the last `window` losses on one fixed batch is below `share` of all losses'.

    `losses`: one value a look, the oldest first. False until there are two windows of them, and where the loss has
    never varied.
    """
    if len(losses) < 2 * window:
        return False
    whole = pvariance(losses)
    return whole > 0 and pvariance(losses[-window:]) < share * whole

"""What to try next: Optuna's ask-and-tell over a space. Nothing else here knows Optuna.

Source: TPE, Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011.
"""

from typing import Any

from training.errors import UserError
from training.tuning.space import Axis, Between, OneOf, Setting, Settings, Space

DIGITS = 3  # of rates and weights that are tried: they are trained and written down as they are read


class Asker:
    """Asks for settings and is told their scores. The first are the subject's own, the next `random` ones are drawn by
    chance, the others from what the scores so far say. The same seed and scores ask for the same. Raises UserError
    without Optuna.
    """

    def __init__(self, space: Space, *, random: int, seed: int) -> None:
        optuna = _optuna()
        self._space = space
        self._trials: dict[int, Any] = {}
        self._axes = {name: _distribution(optuna, axis) for name, axis in space.axes.items()}
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=random, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._study.enqueue_trial({name: _asked(space.axes[name], value) for name, value in space.own.items()})

    def ask(self) -> tuple[int, Settings]:
        """The number of a trial, from 0, and what to try."""
        trial = self._study.ask(self._axes)
        self._trials[trial.number] = trial
        if trial.number == 0:
            return 0, self._space.own
        return trial.number, {name: _meant(axis, trial.params[name]) for name, axis in self._space.axes.items()}

    def score(self, number: int, step: int, score: float) -> None:
        """Tells the score of a trial at a step."""
        self._trials[number].report(score, step)

    def drop(self, number: int) -> None:
        """Tells that a trial ends early, at its last score."""
        self._study.tell(self._trials[number], state=self._states.PRUNED)

    def finish(self, number: int, score: float) -> None:
        """Tells the last score of a trial that was trained to its end."""
        self._study.tell(self._trials[number], score)

    def fail(self, number: int) -> None:
        """Tells that a trial has no score."""
        self._study.tell(self._trials[number], state=self._states.FAIL)

    @property
    def _states(self) -> Any:
        return _optuna().trial.TrialState


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("The search needs Optuna. Install it: pip install 'dreamfleet[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _distribution(optuna: Any, axis: Axis) -> Any:
    if isinstance(axis, Between):
        return optuna.distributions.FloatDistribution(axis.low, axis.high, log=True)
    if axis.ordered:  # by place, so that neighbours are near each other
        return optuna.distributions.IntDistribution(0, len(axis.values) - 1)
    return optuna.distributions.CategoricalDistribution(axis.values)


def _asked(axis: Axis, value: Setting) -> Setting:
    """A value as Optuna counts it."""
    return axis.values.index(value) if isinstance(axis, OneOf) and axis.ordered else value


def _meant(axis: Axis, value: Any) -> Setting:
    """What a value of Optuna means."""
    if isinstance(axis, Between):
        return float(f"{value:.{DIGITS}g}")
    return axis.values[value] if axis.ordered else str(value)

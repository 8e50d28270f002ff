"""What a run logged, by metric, and what windows of it say."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from fused_rl.rollouts.overoptimisation import fit_reward_curve

# By how many of them two means are apart for more than chance, where nothing else is known.
STANDARD_ERRORS = 3.0

History = Sequence[Mapping[str, float]]


class Run:
    """A history by metric, and its means over windows."""

    def __init__(self, history: History, window: int, kl_peak: float | None) -> None:
        self._steps = history
        self._window = window
        self._kl_peak = kl_peak

    def __getitem__(self, name: str) -> list[float]:
        return [float(step[name]) for step in self._steps if name in step]

    def has(self, *names: str) -> bool:
        """Whether each metric was logged often enough to compare its ends."""
        return all(len(self[name]) >= 2 * self._window for name in names)

    def first(self, name: str) -> float:
        return mean(self[name][: self._window])

    def halfway(self, name: str) -> float:
        middle = len(self[name]) // 2
        return mean(self[name][middle - self._window // 2 :][: self._window])

    def last(self, name: str) -> float:
        return mean(self[name][-self._window :])

    def gain(self, name: str) -> float:
        return self.last(name) - self.first(name)

    @property
    def of_preferences(self) -> bool:
        """Whether metrics of a PreferenceLoss were logged."""
        return bool(self["reward_chosen"])

    @property
    def kl_peak(self) -> float:
        """As given, or as fitted to the gold rewards; inf where neither says."""
        if self._kl_peak is not None:
            return self._kl_peak
        both = [(float(s["kl"]), float(s["gold_reward"])) for s in self._steps if _judged(s)]
        if len({kl for kl, _ in both}) < 2 * self._window:
            return math.inf
        return fit_reward_curve(*zip(*both, strict=True)).kl_peak

    @property
    def knows_peak(self) -> bool:
        """Whether the peak was given: the gold rewards have not been asked for it."""
        return self._kl_peak is not None

    def fell(self, name: str, errors: float = STANDARD_ERRORS) -> bool:
        """Whether some window before the last was better than it, by more than noise explains.

        Of the best of many windows chance alone is better. A step's noise is told from its
        neighbour's; the means of two windows have to be so many standard errors apart.
        """
        values, size = self[name], self._window
        windows = [mean(values[i : i + size]) for i in range(len(values) - size + 1)]
        noise = math.sqrt(mean([(b - a) ** 2 / 2 for a, b in pairwise(values)]))
        return max(windows) - windows[-1] > errors * noise * math.sqrt(2 / size)


def _judged(step: Mapping[str, float]) -> bool:
    """A step of the curve of gold rewards; estimates of the KL may be negative, and say nothing."""
    return "gold_reward" in step and step.get("kl", 0.0) > 0


def mean(values: Sequence[float]) -> float:
    """Of what was never logged, NaN: it exceeds nothing."""
    return sum(values) / len(values) if values else math.nan


def falls(values: Sequence[float]) -> bool:
    """Never up, and down in all: five checkpoints in a row are no accident."""
    return values[-1] < values[0] and all(b <= a for a, b in pairwise(values))


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    size = min(len(x), len(y))
    try:
        return statistics.correlation(x[-size:], y[-size:])
    except statistics.StatisticsError:
        return 0.0

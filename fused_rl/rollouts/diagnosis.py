"""Diagnosis: what ails a run, from what it logged, with the numbers that say so.

    stuck               KL near 0 and no gain in reward: beta is too large, or steps too small
    collapse            the entropy has all but gone: one answer, whatever is sampled
    runaway             the KL, or the largest ratio, grows without bound: beta is too small
    over-optimisation   the proxy reward rises while the gold reward falls, or the KL is past its
                        peak
    length bias         answers grow, and reward follows their length
    dead gradient       hardly a token has a gradient
    clip saturation     the clip decides, not the advantages
    unknown log-probs   the engine or the reference reports NaN, and those tokens count as unchanged

Sources: J. Schulman et al., "Proximal policy optimization" (arXiv 1707.06347), for clip and KL; Gao
et al. (arXiv 2210.10760) for over-optimisation; Singhal et al., "A long way to go" (arXiv
2310.03716), for length; Cui et al., "The entropy mechanism" (arXiv 2505.22617), for collapse.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

from fused_rl import checks
from fused_rl.rollouts.overoptimisation import fit_reward_curve

__all__ = [
    "Finding",
    "Thresholds",
    "diagnose",
]

History = Sequence[Mapping[str, float]]


class Finding(NamedTuple):
    """What is wrong, the numbers that say so, and what to do about it."""

    name: str
    evidence: str
    advice: str


@dataclass(frozen=True)
class Thresholds:
    """From where on something counts as ailing. Beginning, halfway and end are means over `window`.

    Args:
        window: steps that are judged together.
        stuck_kl: nats per token; a KL that never leaves it has moved nothing.
        entropy_left: collapse below this share of the first entropy.
        kl_growth: runaway if the KL rises, is in the end so many times that of halfway,
        runaway_kl: and above so many nats per token.
        ratio_max: runaway above this ratio of current to old policy.
        length_growth: length bias from this growth on, if reward correlates with length by
            length_correlation.
        length_correlation: of rewards and lengths over the history.
        idle_tokens: dead gradient above this share of tokens without one.
        clipped_tokens: clip saturation above this share of clipped tokens.
        unknown_tokens: unknown log-probs above this share of tokens with one.
    """

    window: int = 5
    stuck_kl: float = 1e-4
    entropy_left: float = 0.1
    kl_growth: float = 3.0
    runaway_kl: float = 0.1
    ratio_max: float = 1e3
    length_growth: float = 1.5
    length_correlation: float = 0.8
    idle_tokens: float = 0.95
    clipped_tokens: float = 0.3
    unknown_tokens: float = 0.01

    def __post_init__(self) -> None:
        checks.is_integer("window", self.window)
        for field in fields(self):
            checks.is_bound(field.name, getattr(self, field.name))
            if field.name != "length_correlation":
                checks.at_least(field.name, getattr(self, field.name), 0)


class _Run:
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
        return _mean(self[name][: self._window])

    def halfway(self, name: str) -> float:
        middle = len(self[name]) // 2
        return _mean(self[name][middle - self._window // 2 :][: self._window])

    def last(self, name: str) -> float:
        return _mean(self[name][-self._window :])

    def gain(self, name: str) -> float:
        return self.last(name) - self.first(name)

    @property
    def kl_peak(self) -> float:
        """As given, or as fitted to the gold rewards; inf where neither says."""
        if self._kl_peak is not None:
            return self._kl_peak
        both = [(float(s["kl"]), float(s["gold_reward"])) for s in self._steps if _judged(s)]
        if len({kl for kl, _ in both}) < 2 * self._window:
            return math.inf
        return fit_reward_curve(*zip(*both, strict=True)).kl_peak

    def fell(self, name: str) -> bool:
        """Whether some window before the last was better than it."""
        values, size = self[name], self._window
        windows = [_mean(values[i : i + size]) for i in range(len(values) - size + 1)]
        return max(windows) > windows[-1]


def diagnose(
    history: History, *, kl_peak: float | None = None, thresholds: Thresholds | None = None
) -> list[Finding]:
    """What ails the run, gravest first; an empty list where nothing does.

    Args:
        history: one mapping per step, oldest first, of the metrics that a PolicyLoss returns (kl,
            entropy, ratio_max, clip_fraction_low, clip_fraction_high, zero_gradient_fraction,
            unknown_fraction), and where there are any, reward, length and gold_reward (of a judge
            that training does not see). What is not logged is not judged, nor is a metric that was
            logged for fewer than two windows.
        kl_peak: the KL at which gold rewards are known to be highest (fit_reward_curve), in the
            unit of kl; None: fitted, where there are gold rewards.
        thresholds: from where on something counts; None: Thresholds().

    Raises:
        ValueError: a window below 2.
    """
    limits = thresholds or Thresholds()
    checks.require(
        isinstance(limits, Thresholds),
        lambda: f"thresholds must be Thresholds(), got {checks.shown(limits)}",
    )
    if kl_peak is not None:
        checks.is_bound("kl_peak", kl_peak)
        checks.at_least("kl_peak", kl_peak, 0)
    checks.require(limits.window >= 2, lambda: f"window must be at least 2, got {limits.window}")
    broken = _not_finite(history)
    if broken is not None:
        return [broken]
    run = _Run(history, limits.window, kl_peak)
    findings = (judge(run, limits) for judge in _JUDGES)
    return [finding for finding in findings if finding is not None]


def _not_finite(history: History) -> Finding | None:
    for step, metrics in enumerate(history):
        for name, value in metrics.items():
            if not math.isfinite(value):
                return Finding(
                    "not finite",
                    f"{name} is {float(value)} at step {step}.",
                    "Return to a checkpoint before it; look for log-probs of -inf.",
                )
    return None


def _collapse(run: _Run, limits: Thresholds) -> Finding | None:
    if not run.has("entropy"):
        return None
    first, last = run.first("entropy"), run.last("entropy")
    if last >= limits.entropy_left * first:
        return None
    return Finding(
        "collapse",
        f"The entropy fell from {first:.3g} to {last:.3g} nats.",
        "Clip higher above than below, add an entropy bonus, or lower the learning rate.",
    )


def _runaway(run: _Run, limits: Thresholds) -> Finding | None:
    evidence = []
    if run.has("kl"):
        first, middle, last = run.first("kl"), run.halfway("kl"), run.last("kl")
        grown = first < middle and last > limits.kl_growth * middle
        if grown and last > limits.runaway_kl:
            evidence.append(f"The KL went from {first:.3g} to {middle:.3g} to {last:.3g} nats.")
    largest = max(run["ratio_max"][-limits.window :], default=0.0)
    if largest > limits.ratio_max:
        evidence.append(f"The largest ratio is {largest:.3g}.")
    if not evidence:
        return None
    return Finding(
        "runaway",
        " ".join(evidence),
        "Raise beta or let AdaptiveBeta hold the KL; lower the learning rate; make fewer updates "
        "per rollout.",
    )


def _over_optimisation(run: _Run, limits: Thresholds) -> Finding | None:
    if not run.has("kl") or run.gain("kl") <= 0:
        return None
    kl = run.last("kl")
    evidence = []
    gold = run["gold_reward"][-limits.window :]
    if run.has("gold_reward") and _falls(gold):
        evidence.append(
            f"Gold reward fell from {gold[0]:.3g} to {gold[-1]:.3g} over the last {len(gold)} "
            f"steps, while the KL rose to {kl:.3g}."
        )
    peak = run.kl_peak
    proxy_rises = not run.has("reward") or run.gain("reward") > 0
    gold_fell = not run.has("gold_reward") or run.fell("gold_reward")
    if kl > peak and proxy_rises and gold_fell:
        evidence.append(f"The KL is {kl:.3g}, past the peak of gold rewards at {peak:.3g}.")
    if not evidence:
        return None
    budget = "" if math.isinf(peak) else f", {peak / 2:.3g}"
    return Finding(
        "over-optimisation",
        " ".join(evidence),
        f"Stop at half the KL of the peak{budget}: take an earlier checkpoint, or raise beta.",
    )


def _length_bias(run: _Run, limits: Thresholds) -> Finding | None:
    if not run.has("length", "reward"):
        return None
    first, last = run.first("length"), run.last("length")
    earned = run.has("gold_reward") and run.gain("gold_reward") > 0
    together = _correlation(run["length"], run["reward"])
    if earned or last < limits.length_growth * first or together < limits.length_correlation:
        return None
    return Finding(
        "length bias",
        f"Length went from {first:.4g} to {last:.4g} tokens, and reward with it: their "
        f"correlation is {together:.2f}.",
        "Divide by a constant length (dr_grpo), add length_rewards or overlong_penalty, and judge "
        "answers of equal length.",
    )


def _dead_gradient(run: _Run, limits: Thresholds) -> Finding | None:
    idle = run.last("zero_gradient_fraction")
    if not idle > limits.idle_tokens:
        return None
    return Finding(
        "dead gradient",
        f"{idle:.1%} of the tokens have no gradient.",
        "Sample prompts that are neither always solved nor never, and look at clip fractions.",
    )


def _clip_saturation(run: _Run, limits: Thresholds) -> Finding | None:
    low, high = run.last("clip_fraction_low"), run.last("clip_fraction_high")
    if not low + high > limits.clipped_tokens:
        return None
    return Finding(
        "clip saturation",
        f"{low:.1%} of the tokens are clipped below and {high:.1%} above.",
        "Make fewer updates per rollout or smaller ones; check that old_logprobs are those of the "
        "trained policy.",
    )


def _unknown(run: _Run, limits: Thresholds) -> Finding | None:
    unknown = run.last("unknown_fraction")
    if not unknown > limits.unknown_tokens:
        return None
    return Finding(
        "unknown log-probs",
        f"{unknown:.1%} of the tokens have a NaN among their old, reference or rollout log-probs "
        "or weights.",
        "Look for NaN in what the inference engine and the reference model report; such tokens "
        "have ratio 1, KL 0 and weight 1.",
    )


def _stuck(run: _Run, limits: Thresholds) -> Finding | None:
    if not run.has("kl", "reward") or run.gain("reward") > 0:
        return None
    furthest = max(abs(value) for value in run["kl"])
    if furthest > limits.stuck_kl:
        return None
    return Finding(
        "stuck",
        f"The KL never exceeded {furthest:.2g} nats, and reward went from "
        f"{run.first('reward'):.3g} to {run.last('reward'):.3g}.",
        "Lower beta, or raise the learning rate.",
    )


_JUDGES: tuple[Callable[[_Run, Thresholds], Finding | None], ...] = (
    _collapse,
    _runaway,
    _over_optimisation,
    _length_bias,
    _dead_gradient,
    _clip_saturation,
    _unknown,
    _stuck,
)


def _judged(step: Mapping[str, float]) -> bool:
    """A step of the curve of gold rewards; estimates of the KL may be negative, and say nothing."""
    return "gold_reward" in step and step.get("kl", 0.0) > 0


def _mean(values: Sequence[float]) -> float:
    """Of what was never logged, NaN: it exceeds nothing."""
    return sum(values) / len(values) if values else math.nan


def _falls(values: Sequence[float]) -> bool:
    """Never up, and down in all: five checkpoints in a row are no accident."""
    return values[-1] < values[0] and all(b <= a for a, b in pairwise(values))


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    size = min(len(x), len(y))
    try:
        return statistics.correlation(x[-size:], y[-size:])
    except statistics.StatisticsError:
        return 0.0

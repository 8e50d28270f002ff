"""What ails a policy that is trained on rewards, and what its answers are like."""

import math

from fused_rl.rollouts.diagnosis.findings import Finding, Thresholds
from fused_rl.rollouts.diagnosis.history import Run, correlation, falls


def collapse(run: Run, limits: Thresholds) -> Finding | None:
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


def runaway(run: Run, limits: Thresholds) -> Finding | None:
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


def over_optimisation(run: Run, limits: Thresholds) -> Finding | None:
    if not run.has("kl") or run.gain("kl") <= 0:
        return None
    kl = run.last("kl")
    evidence = []
    gold = run["gold_reward"][-limits.window :]
    if run.has("gold_reward") and falls(gold):
        evidence.append(
            f"Gold reward fell from {gold[0]:.3g} to {gold[-1]:.3g} over the last {len(gold)} "
            f"steps, while the KL rose to {kl:.3g}."
        )
    peak = run.kl_peak
    proxy_rises = not run.has("reward") or run.gain("reward") > 0
    # A peak that was fitted to these rewards is no evidence of its own that they fall.
    errors = {"errors": 0.0} if run.knows_peak else {}
    gold_fell = not run.has("gold_reward") or run.fell("gold_reward", **errors)
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


def length_bias(run: Run, limits: Thresholds) -> Finding | None:
    if not run.has("length", "reward"):
        return None
    first, last = run.first("length"), run.last("length")
    earned = run.has("gold_reward") and run.gain("gold_reward") > 0
    together = correlation(run["length"], run["reward"])
    if earned or last < limits.length_growth * first or together < limits.length_correlation:
        return None
    return Finding(
        "length bias",
        f"Length went from {first:.4g} to {last:.4g} tokens, and reward with it: their "
        f"correlation is {together:.2f}.",
        "Divide by a constant length (dr_grpo), add length_rewards or overlong_penalty, and judge "
        "answers of equal length.",
    )


def dead_gradient(run: Run, limits: Thresholds) -> Finding | None:
    idle = run.last("zero_gradient_fraction")
    if not idle > limits.idle_tokens:
        return None
    return Finding(
        "dead gradient",
        f"{idle:.1%} of the tokens have no gradient.",
        "Sample prompts that are neither always solved nor never, and look at clip fractions.",
    )


def clip_saturation(run: Run, limits: Thresholds) -> Finding | None:
    low, high = run.last("clip_fraction_low"), run.last("clip_fraction_high")
    if not low + high > limits.clipped_tokens:
        return None
    return Finding(
        "clip saturation",
        f"{low:.1%} of the tokens are clipped below and {high:.1%} above.",
        "Make fewer updates per rollout or smaller ones; check that old_logprobs are those of the "
        "trained policy.",
    )


def unknown(run: Run, limits: Thresholds) -> Finding | None:
    unknown = run.last("unknown_fraction")
    if run.of_preferences or not unknown > limits.unknown_tokens:
        return None
    return Finding(
        "unknown log-probs",
        f"{unknown:.1%} of the tokens have a NaN among their old, reference or rollout log-probs "
        "or weights.",
        "Look for NaN in what the inference engine and the reference model report; such tokens "
        "have ratio 1, KL 0 and weight 1.",
    )


def stuck(run: Run, limits: Thresholds) -> Finding | None:
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

"""torch.set_default_device changes no result: tensors are made beside those that were given."""

import math

import pytest
import torch
from by_name import loss_of

import fused_rl
from fused_rl import KL, KLPenalty, Level, TokenBatch, TokenStats
from fused_rl.losses.named import NAMES

B, T, H, V, GROUP = 4, 5, 6, 11, 2
ELSEWHERE = "meta"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cpu")


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(1)
    labels = torch.randint(V, (B, T))
    mask = torch.arange(T) < torch.tensor([5, 3, 0, 4])[:, None]
    kept = torch.stack([labels.reshape(-1), (labels.reshape(-1) + 1) % V], 1)
    return {
        "hidden": random(B, T, H),
        "weight": random(V, H),
        "logits": random(B, T, V),
        "logprobs": -random(B, T).abs(),
        "old": -random(B, T).abs(),
        "ref": -random(B, T).abs(),
        "values": random(B, T),
        "rewards": random(B),
        "labels": labels,
        "mask": mask,
        "lengths": mask.sum(-1),
        "kept": kept.sort(-1).values.reshape(-1),
        "cu_kept": torch.arange(B * T + 1) * 2,
        "cu_seqlens": torch.cat([torch.zeros(1).long(), mask.sum(-1).cumsum(0)]),
    }


def padded(g, **more) -> TokenBatch:
    known = {"old_logprobs": g["old"], "ref_logprobs": g["ref"], **more}
    return TokenBatch.padded(g["labels"], g["mask"], g["rewards"], **known)


def packed(g) -> TokenBatch:
    m = g["mask"]
    known = {"old_logprobs": g["old"][m], "ref_logprobs": g["ref"][m]}
    per_token = g["values"][m]
    return TokenBatch.packed(g["labels"][m], g["cu_seqlens"], per_token, **known)


def rollout(g) -> TokenBatch:
    return padded(g, rollout_logprobs=g["ref"])


def stats(g, mask=None) -> TokenStats:
    logprobs = g["logprobs"] if mask is None else g["logprobs"][mask]
    return TokenStats(logprobs, logprobs.abs() + 1)


f = fused_rl
TERMS = {"beta": 0.1, "entropy_coef": 0.1}
CALLS = {
    "linear_logprobs": lambda g: f.linear_logprobs(g["hidden"], g["weight"], g["labels"]),
    "a temperature": lambda g: f.linear_logprobs(
        g["hidden"], g["weight"], g["labels"], temperature=0.5
    ),
    "linear_top_logprobs": lambda g: f.linear_top_logprobs(g["hidden"], g["weight"], g["labels"]),
    "linear_kept_logprobs": lambda g: f.linear_kept_logprobs(
        *(g[k] for k in ("hidden", "weight", "labels", "kept", "cu_kept"))
    ),
    "linear_statistics": lambda g: f.linear_statistics(
        g["hidden"], g["weight"], g["labels"], [*f.linear.Statistic], top=2
    )[:5],
    "linear_logprobs_at": lambda g: f.linear_logprobs_at(
        g["hidden"], g["weight"], g["labels"][..., None]
    ),
    "linear_logits_at": lambda g: f.linear.linear_logits_at(
        g["hidden"], g["weight"], g["labels"][..., None]
    ),
    "rounding_differences": lambda g: f.linear.rounding_differences(
        g["hidden"], g["weight"], g["labels"], hidden_roundings=1
    ),
    "logprobs_from_logits": lambda g: f.logprobs_from_logits(g["logits"], g["labels"]),
    "kl_penalty": lambda g: f.kl_penalty(g["logprobs"], g["ref"], value=KL.K3, grad=KL.K2),
    "group_mean": lambda g: f.advantages.group_mean_advantages(g["rewards"], GROUP),
    "group_zscore": lambda g: f.advantages.group_zscore_advantages(g["rewards"], GROUP),
    "leave_one_out": lambda g: f.advantages.leave_one_out_advantages(g["rewards"], GROUP),
    "length_weighted": lambda g: f.advantages.length_weighted_advantages(
        g["rewards"], g["lengths"], GROUP
    ),
    "length_rewards": lambda g: f.rewards.length_rewards(g["lengths"], g["rewards"] > 0, GROUP),
    "overlong": lambda g: f.rewards.overlong_penalty(g["lengths"], max_length=5, cache=2),
    "pass_at_k": lambda g: f.advantages.pass_at_k_advantages((g["rewards"] > 0).float(), GROUP, 2),
    "returns": lambda g: f.advantages.discounted_returns(g["values"], g["mask"], gamma=0.9),
    "packed returns": lambda g: f.advantages.discounted_returns(
        g["values"][g["mask"]],
        torch.ones_like(g["values"][g["mask"]]).bool(),
        cu_seqlens=g["cu_seqlens"],
    ),
    "gae": lambda g: f.advantages.gae(g["values"], g["old"], g["mask"]),
    "value loss": lambda g: f.advantages.clipped_value_loss(g["values"], g["old"], g["ref"]),
    "reinforce_plus_plus": lambda g: f.advantages.reinforce_plus_plus_advantages(
        g["values"], g["mask"]
    ),
    "baseline": lambda g: f.advantages.reinforce_plus_plus_baseline_advantages(
        g["rewards"], GROUP, g["mask"]
    ),
    "moments": lambda g: f.rewards.Moments.merged(
        [f.rewards.Moments.of(g["values"], g["mask"])] * 2
    ),
    "whiten": lambda g: f.rewards.whiten(g["values"], g["mask"]),
    "shape_rewards": lambda g: f.rewards.shape_rewards(
        g["rewards"], g["logprobs"], g["ref"], g["mask"], beta=0.1
    ),
    "truncated_weights": lambda g: f.mismatch.truncated_weights(rollout(g), level=Level.PRODUCT),
    "masked_weights": lambda g: f.mismatch.masked_weights(rollout(g)),
    "acceptance_mask": lambda g: f.mismatch.acceptance_mask(rollout(g)),
    "veto_mask": lambda g: f.mismatch.veto_mask(rollout(g)),
    "off_policy": lambda g: f.mismatch.off_policy_sequence_mask(
        g["logprobs"], padded(g), delta=0.1
    ),
    "mismatch_report": lambda g: (
        f.mismatch.mismatch_report(g["logprobs"], g["old"], g["mask"]).sequence_log_ratios
    ),
    "top_entropy": lambda g: f.mismatch.top_entropy_mask(
        g["values"].abs(), padded(g), fraction=0.5
    ),
    "fit_reward_curve": lambda g: f.overoptimisation.fit_reward_curve(
        [0.1, 1, 4], [1.0, 2.0, 1.0], baseline=0.0
    )[1:],
    **{
        f"{name} {kind.__name__}": lambda g, name=name, kind=kind: loss_of(
            name, beta=0.1, entropy_coef=0.1
        )(stats(g, None if kind is padded else g["mask"]), kind(g))
        for name in NAMES
        for kind in (padded, packed)
    },
    "KLPenalty": lambda g: f.PolicyLoss(kl=KLPenalty(0.1, level=Level.PRODUCT))(
        stats(g), padded(g)
    ),
    "linear_policy_loss": lambda g: f.linear_policy_loss(
        g["hidden"], g["weight"], padded(g), NAMES["grpo"](beta=0.1)
    ),
    "opd_advantages": lambda g: f.distillation.opd_advantages(g["logprobs"], g["ref"], g["mask"]),
    "minillm_advantages": lambda g: f.distillation.minillm_advantages(
        g["logprobs"], g["ref"], g["mask"]
    ),
    "distillation": lambda g: f.linear_policy_loss(
        *(g["hidden"], g["weight"], padded(g, ref_logprobs=None), f.distillation.kd(0.3)),
        reference=(g["hidden"], g["weight"].roll(1, 0)),
    ),
    "a reference": lambda g: f.linear_policy_loss(
        *(g["hidden"], g["weight"], padded(g, ref_logprobs=None)),
        NAMES["grpo"](beta=0.1, kl=f.Divergence.REVERSE),
        reference=(g["logits"], g["weight"].roll(1, 0) @ g["weight"].T),
    ),
}


def numbers(result) -> list[float]:
    """Every number in a result, in its order."""
    if isinstance(result, torch.Tensor):
        assert result.device.type == "cpu"
        return result.detach().double().reshape(-1).tolist()
    if isinstance(result, dict):
        result = result.values()
    if isinstance(result, (int, float)):
        return [float(result)]
    return [n for part in result if part is not None for n in numbers(part)]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_results_do_not_follow_the_default_device(call, given):
    expected = numbers(call(given))
    before = torch.get_default_device()
    torch.set_default_device(ELSEWHERE)
    try:
        got = numbers(call(given))
    finally:
        torch.set_default_device(before)
    assert expected and not any(map(math.isnan, expected))
    assert got == pytest.approx(expected, rel=1e-6)


def test_gradients_do_not_follow_it_either(given):
    def gradients() -> list[float]:
        hidden, weight = (given[k].clone().requires_grad_() for k in ("hidden", "weight"))
        output = fused_rl.linear_policy_loss(hidden, weight, padded(given), NAMES["gpg"]())
        beside = fused_rl.linear_policy_loss(
            *(hidden, weight, padded(given, ref_logprobs=None)),
            NAMES["gpg"](beta=0.1, kl=f.Divergence.FORWARD),
            reference=(given["hidden"], given["weight"].roll(1, 0)),
        )
        return numbers(torch.autograd.grad(output.loss + beside.loss, (hidden, weight)))

    expected = gradients()
    before = torch.get_default_device()
    torch.set_default_device(ELSEWHERE)
    try:
        got = gradients()
    finally:
        torch.set_default_device(before)
    assert any(expected) and got == pytest.approx(expected, rel=1e-5, abs=1e-7)

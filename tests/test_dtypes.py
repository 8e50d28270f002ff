"""The dtype of numbers is no mathematics: every public function of the cheap half, in half
precision against float64 on the same rounded numbers, and under every default dtype.
"""

import dataclasses
import math
from collections.abc import Callable
from enum import Enum

import pytest
import torch
from by_name import loss_of, preference_loss, public

import fused_rl
from fused_rl import KL, KLPenalty, Level, PolicyLoss, TokenBatch, TokenStats
from fused_rl.losses import named
from fused_rl.losses.preference.named import NAMES

B, T, GROUP = 12, 7, 4
HALVES = [torch.bfloat16, torch.float16]
# How a case makes a tensor of its numbers: rounded to a half type, and kept there or widened.
Make = Callable[[torch.Tensor], torch.Tensor]


class Numbers:
    """One step's numbers, of which `make` forms the tensors."""

    def __init__(self, make: Make) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.mask = torch.arange(T) < torch.tensor([7, 3, 0, 5, 1, 7, 2, 6, 4, 7, 7, 3])[:, None]
        old = -1.5 + 0.5 * normal(B, T)
        self.logprobs = make(old + 0.3 * normal(B, T))
        self.old = make(old)
        self.ref = make(old + 0.3 * normal(B, T))
        self.rollout = make(old + 0.1 * normal(B, T))
        self.weights = make(normal(B, T).exp())
        self.entropy = make(1 + normal(B, T).abs())
        self.values = make(3 * normal(B, T))
        # Near each other beside their size, and their squares beyond what float16 holds.
        self.rewards = make(300 + 5 * normal(B))
        self.lengths = make(2000 + 500 * normal(B))
        self.advantages = make(normal(B))
        self.per_token = make(normal(B, T))

    @property
    def batch(self) -> TokenBatch:
        return TokenBatch.padded(
            torch.zeros(B, T, dtype=torch.int64),
            self.mask,
            self.advantages,
            old_logprobs=self.old,
            ref_logprobs=self.ref,
            rollout_logprobs=self.rollout,
            weights=self.weights,
        )

    @property
    def packed(self) -> TokenBatch:
        return TokenBatch.packed(
            torch.zeros(int(self.mask.sum()), dtype=torch.int64),
            torch.cat([torch.zeros(1).long(), self.mask.sum(-1).cumsum(0)]),
            self.advantages,
            old_logprobs=self.old[self.mask],
            ref_logprobs=self.ref[self.mask],
        )

    @property
    def stats(self) -> TokenStats:
        return TokenStats(self.logprobs, self.entropy)


def of_surrogate(surrogate) -> Callable:
    def case(n: Numbers) -> list:
        # Not a difference of two, which would round: numbers of the given dtype.
        given = (n.per_token, n.logprobs, n.advantages[:, None].expand(B, T))
        log_ratio, logprobs, A = (t.detach().reshape(-1) for t in given)
        leaves = log_ratio.requires_grad_(), logprobs.requires_grad_()
        one_pass = surrogate(*leaves, A)
        bounds = *surrogate.clipped(*leaves, A), surrogate.dual_clipped(*leaves, A)
        grads = torch.autograd.grad(one_pass.sum(), leaves, materialize_grads=True)
        return [one_pass, *bounds, *(Rounded(g) for g in grads)]

    return case


class Rounded:
    """What keeps the dtype of its input: a gradient that of its leaf."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def of_ratio(ratio) -> Callable:
    def case(n: Numbers) -> list:
        log_ratio = n.per_token.reshape(-1)
        if ratio == fused_rl.ratios.TokenRatio():
            return [Rounded(ratio(log_ratio, n.batch))]
        bounds = ratio.clipped(log_ratio, n.batch) if hasattr(ratio, "clipped") else ()
        return [ratio(log_ratio, n.batch), *bounds]

    return case


def of_mean(mean) -> Callable:
    return lambda n: [mean(n.batch), mean(n.packed)]


def of_loss(name: str) -> Callable:
    def case(n: Numbers) -> list:
        loss = loss_of(name, beta=0.1, entropy_coef=0.1)
        out = loss(n.stats, n.batch)
        return [out.loss, *out.metrics.values()]

    return case


def of_report(n: Numbers) -> list:
    report = fused_rl.mismatch.mismatch_report(n.old, n.rollout, n.mask)
    numbers = (report.mean, report.std, report.k2, report.k3, report.token_share)
    return [report.sequence_log_ratios, torch.tensor(numbers, dtype=torch.float64)]


def of_penalties(n: Numbers) -> list:
    found = []
    for kind in KL:
        for level, importance in ((Level.TOKEN, Level.TOKEN), (Level.PRODUCT, Level.PRODUCT)):
            penalty = KLPenalty(0.3, kind, level=level, importance=importance)
            found += [penalty(n.logprobs.reshape(-1), n.batch)]
        found += [fused_rl.kl_penalty(n.logprobs, n.ref, value=kind, weight=n.weights)]
    exact = KLPenalty(0.3, importance=Level.TOKEN, exact=fused_rl.Divergence.REVERSE)
    return [*found, *of_divergences(PolicyLoss(kl=exact))(n)]


def of_divergences(loss) -> Callable:
    def case(n: Numbers) -> list:
        stats = fused_rl.DivergenceStats(n.weights, n.logprobs, n.entropy, n.ref, n.entropy)
        out = loss(stats, dataclasses.replace(n.batch, ref_logprobs=None))
        return [out.loss, *out.metrics.values()]

    return case


def of_preference(loss: fused_rl.preference.PreferenceLoss, *, paired: bool = True) -> Callable:
    def case(n: Numbers) -> list:
        logprobs = n.logprobs.detach().requires_grad_()
        single = {"desirable": torch.arange(B) % 3 > 0, "mismatched": torch.arange(B) % 4 == 1}
        answers = fused_rl.preference.PreferenceBatch.padded(
            torch.zeros(B, T, dtype=torch.int64),
            n.mask,
            ref_logprobs=n.ref,
            **({} if paired else single),
        )
        sharp = answers.with_reference(n.ref.reshape(-1))
        sharp = dataclasses.replace(sharp, sharp_logprobs=n.per_token.reshape(-1))
        out = loss(TokenStats(logprobs, n.entropy), sharp)
        (gradient,) = torch.autograd.grad(out.loss, logprobs)
        return [out.loss, *out.metrics.values(), Rounded(gradient)]

    return case


_UNPAIRED = ("kto", "apo_zero_unpaired", "bco")
_SCORES = (
    *(fused_rl.scores.LogRatio(), fused_rl.scores.MeanLogRatio(), fused_rl.scores.LogProb()),
    *(fused_rl.scores.MeanLogProb(), fused_rl.scores.LogOdds(), fused_rl.scores.Ranked()),
    *(fused_rl.scores.AlphaMeanLogProb(), fused_rl.scores.RankedMargins()),
)
_DERIVATIVES = (
    *(fused_rl.scores.ForwardKL(), fused_rl.scores.JensenShannon()),
    fused_rl.scores.Alpha(0.5),
)
_LINKS = (
    *(fused_rl.links.Logistic(0.1, 0.5), fused_rl.links.Robust(), fused_rl.links.Hinge()),
    *(fused_rl.links.Squared(), fused_rl.links.Exponential(), fused_rl.links.EXO()),
    *(fused_rl.links.DiscoPOP(), fused_rl.links.SigmoidDown(), fused_rl.links.CrossEntropy()),
    *(fused_rl.links.NCA(), fused_rl.links.Regression(), fused_rl.links.Sigmoid()),
)
_POINTS = (fused_rl.preference.BatchMean(), fused_rl.preference.MismatchedMean())


def preference_cases() -> dict[str, Callable]:
    Loss, links, scores = fused_rl.preference.PreferenceLoss, fused_rl.links, fused_rl.scores
    dpo = fused_rl.preference.dpo()
    named_ones = {n: preference_loss(n) for n in NAMES if n not in _UNPAIRED}
    losses = {
        **named_ones,
        **{type(score).__name__: Loss(score, links.Logistic()) for score in _SCORES},
        **{type(d).__name__: fused_rl.preference.f_dpo(d) for d in _DERIVATIVES},
        **{type(link).__name__: Loss(scores.LogRatio(), link) for link in _LINKS},
        "PreferenceLoss": dpo,
        "WeightedSum": fused_rl.preference.mixture([(0.3, dpo), (0.7, fused_rl.preference.cpo())]),
        "WPOWeight": fused_rl.preference.wpo(),
    }
    single = {n: preference_loss(n) for n in _UNPAIRED}
    points = {type(p).__name__: Loss(_SCORES[0], links.Sigmoid(), point=p) for p in _POINTS}
    return {name: of_preference(loss) for name, loss in losses.items()} | {
        name: of_preference(loss, paired=False) for name, loss in (single | points).items()
    }


CASES: dict[str, Callable[[Numbers], list]] = {
    **preference_cases(),
    "group_zscore_advantages": lambda n: [
        fused_rl.advantages.group_zscore_advantages(n.rewards, GROUP)
    ],
    "group_mean_advantages": lambda n: [
        fused_rl.advantages.group_mean_advantages(n.rewards, GROUP)
    ],
    "leave_one_out_advantages": lambda n: [
        fused_rl.advantages.leave_one_out_advantages(n.rewards, GROUP)
    ],
    "length_weighted_advantages": lambda n: [
        fused_rl.advantages.length_weighted_advantages(n.rewards, n.lengths, GROUP)
    ],
    "pass_at_k_advantages": lambda n: [
        fused_rl.advantages.pass_at_k_advantages(n.rewards, GROUP, 2)
    ],
    "discounted_returns": lambda n: [
        fused_rl.advantages.discounted_returns(n.per_token, n.mask, gamma=0.97)
    ],
    "gae": lambda n: [*fused_rl.advantages.gae(n.per_token, n.values, n.mask, gamma=0.97)],
    "reinforce_plus_plus_advantages": lambda n: [
        fused_rl.advantages.reinforce_plus_plus_advantages(n.per_token, n.mask, gamma=0.97)
    ],
    "reinforce_plus_plus_baseline_advantages": lambda n: [
        fused_rl.advantages.reinforce_plus_plus_baseline_advantages(n.rewards, GROUP, n.mask)
    ],
    "clipped_value_loss": lambda n: [
        fused_rl.advantages.clipped_value_loss(n.values, n.per_token, n.logprobs)
    ],
    "shape_rewards": lambda n: [
        fused_rl.rewards.shape_rewards(
            n.rewards, n.logprobs, n.ref, n.mask, beta=0.1, kind=kind, level=level
        )
        for kind in KL
        for level in (Level.TOKEN, Level.PRODUCT)
    ],
    "Moments.of": lambda n: [*fused_rl.rewards.Moments.of(n.rewards)],
    "Moments.merged": lambda n: [
        *fused_rl.rewards.Moments.merged(
            [fused_rl.rewards.Moments.of(n.rewards), fused_rl.rewards.Moments.of(n.values, n.mask)]
        )
    ],
    "whiten": lambda n: [
        fused_rl.rewards.whiten(n.values, n.mask),
        fused_rl.rewards.whiten(n.rewards, keep_mean=True),
    ],
    "length_rewards": lambda n: [
        fused_rl.rewards.length_rewards(n.lengths, n.rewards > 300, GROUP)
    ],
    "overlong_penalty": lambda n: [
        fused_rl.rewards.overlong_penalty(n.lengths, max_length=2500, cache=900)
    ],
    "truncated_weights": lambda n: [
        fused_rl.mismatch.truncated_weights(n.batch, level=level, logprobs=n.logprobs)
        for level in Level
    ],
    "masked_weights": lambda n: [
        fused_rl.mismatch.masked_weights(n.batch, level=level, logprobs=n.logprobs)
        for level in Level
    ],
    "acceptance_mask": lambda n: [
        fused_rl.mismatch.acceptance_mask(n.batch, level=level, low=0.9, high=1.2)
        for level in Level
    ],
    "veto_mask": lambda n: [fused_rl.mismatch.veto_mask(n.batch, floor=0.9)],
    "off_policy_sequence_mask": lambda n: [
        fused_rl.mismatch.off_policy_sequence_mask(n.logprobs, n.batch, delta=0.05)
    ],
    "mismatch_report": of_report,
    "LogitRounding": lambda n: [
        fused_rl.mismatch.LogitRounding().differences(n.logprobs.reshape(-1))
    ],
    "top_entropy_mask": lambda n: [
        fused_rl.mismatch.top_entropy_mask(n.entropy, n.batch, fraction=0.3)
    ],
    "kl_penalty": of_penalties,
    "KLPenalty": of_penalties,
    **{
        name: of_divergences(getattr(fused_rl.distillation, name)())
        for name in ("DistillationLoss", "forward_kl", "gkd", "kd", "minillm", "opd")
    },
    "topk_divergence": lambda n: [
        fused_rl.distillation.topk_divergence(
            torch.stack([n.logprobs, n.ref], -1), torch.stack([n.ref, n.logprobs], -1), tail=tail
        )
        for tail in fused_rl.distillation.Tail
    ],
    "opd_advantages": lambda n: [
        fused_rl.distillation.opd_advantages(n.logprobs, n.ref, n.mask, gamma=gamma)
        for gamma in (0.0, 1.0)
    ],
    "minillm_advantages": lambda n: [
        fused_rl.distillation.minillm_advantages(n.logprobs, n.ref, n.mask)
    ],
    "TokenBatch": lambda n: [
        *(getattr(n.batch, x) for x in ("advantages", "old_logprobs", "ref_logprobs", "weights")),
        n.batch.sequence_sum(n.per_token.reshape(-1)),
        *(n.batch.at_level(n.per_token.reshape(-1), x) for x in (Level.PRODUCT, Level.GEOMETRIC)),
        n.batch.with_weights(n.weights).weights,
    ],
    "PolicyLoss": lambda n: [PolicyLoss()(n.stats, n.batch).loss],
    "AdaptiveBeta": lambda n: [
        torch.tensor(
            fused_rl.schedules.AdaptiveBeta(0.1, 300.0).update(n.rewards[0]), dtype=torch.float64
        )
    ],
    **{name: of_loss(name) for name in named.NAMES},
    **{
        type(surrogate).__name__: of_surrogate(surrogate)
        for surrogate in (
            *(
                fused_rl.surrogates.ASPO(),
                fused_rl.surrogates.CISPO(0.8, 1.3),
                fused_rl.trust_regions.DPPOKL(),
                fused_rl.trust_regions.DPPOTV(),
            ),
            *(
                fused_rl.surrogates.DRO(),
                fused_rl.surrogates.SAPO(),
                fused_rl.surrogates.VESPO(),
                fused_rl.surrogates.Clip(dual=2.0),
            ),
            *(
                fused_rl.trust_regions.ClipCov(fraction=0.1, cov_low=0.0),
                fused_rl.trust_regions.KLCov(fraction=0.1),
            ),
            *(
                fused_rl.surrogates.Kimi(0.5),
                fused_rl.surrogates.Reinforce(),
                fused_rl.surrogates.Unclipped(),
            ),
        )
    },
    **{
        type(ratio).__name__: of_ratio(ratio)
        for ratio in (
            *(
                fused_rl.ratios.TokenRatio(),
                fused_rl.ratios.GeometricRatio(),
                fused_rl.ratios.GeometricTokenRatio(),
            ),
            *(fused_rl.ratios.ProductRatio(), fused_rl.ratios.ClippedGeometricRatio(0.3, 0.3)),
        )
    },
    **{
        type(mean).__name__: of_mean(mean)
        for mean in (
            *(fused_rl.means.TokenMean(), fused_rl.means.TokenMean(3.0), fused_rl.means.TokenSum()),
            *(
                fused_rl.means.SequenceMean(),
                fused_rl.means.SequenceSumMean(),
                fused_rl.means.FixedLengthMean(11),
            ),
            fused_rl.means.LengthWeightedMean(11),
            fused_rl.means.RolloutMean(torch.arange(B), 5),
        )
    },
}
# The other half, what only holds things, and what only takes Python's numbers.
ELSEWHERE = {
    *("Divergence", "LMHead", "backends", "linear_divergence", "linear_kept_logprobs"),
    *("linear_logprobs", "linear_policy_loss", "linear_logits_at", "linear_logprobs_at"),
    *("linear_top_logprobs", "linear_statistics", "logprobs_from_logits", "trust_kernels"),
    *("across", "model_policy_loss", "linear_preference_loss", "rounding_differences"),
    *("MismatchReport", "RoundingError", "TokenGap"),
    *("PreferenceBatch", "SequenceStats", "Sides"),
    *(
        "AtStats",
        "DivergenceStats",
        "GAEOutput",
        "KeptStats",
        "LogitStats",
        "Statistic",
        "LossOutput",
        "Moments",
        "TokenStats",
        "TopStats",
        "Surrogate",
        "TrustRegion",
    ),
    *("Finding", "Thresholds", "diagnose", "RewardCurve", "fit_reward_curve"),
    *("AnnealedBeta", "FixedBeta"),
    *("KeptSets", "SamplingMask", "kept_sets"),
}


def test_every_public_name_has_a_case():
    enums = {name for name, thing in public().items() if isinstance(thing, type(Enum))}
    methods = {"Moments.of", "Moments.merged"}
    assert (set(public()) | methods) - enums - ELSEWHERE == set(CASES)


def tensors(case: list) -> list[torch.Tensor]:
    return [x.tensor if isinstance(x, Rounded) else x for x in case]


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_with_in_float32(name, half):
    """No worse than float32's own rounding, where rewards differ in their last digit too."""
    found = CASES[name](Numbers(lambda x: x.to(half)))
    right = CASES[name](Numbers(lambda x: x.to(half).double()))
    assert len(found) == len(right) > 0
    for got, exact in zip(found, right, strict=True):
        if isinstance(got, Rounded):
            assert got.tensor.dtype == half
            torch.testing.assert_close(got.tensor, exact.tensor.to(half))
        elif exact.is_floating_point():
            assert got.dtype in (torch.float32, torch.float64)
            scale = max(exact.abs().max().item(), 1e-30)
            assert got.isfinite().all()
            assert (got - exact).abs().max().item() < 2e-5 * scale
        else:
            assert torch.equal(got, exact)


@pytest.mark.parametrize("default", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_default_dtype_changes_nothing(name, default):
    right = tensors(CASES[name](Numbers(torch.Tensor.float)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = tensors(CASES[name](Numbers(torch.Tensor.float)))
    finally:
        torch.set_default_dtype(before)
    for got, expected in zip(found, right, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_rewards_by_hand_that_half_precision_cannot_subtract(half):
    close = torch.tensor([1.0, 1.0, 1.0, 1.0078125]).to(half)
    z = fused_rl.advantages.group_zscore_advantages(close, 4, eps=0.0)
    assert z.tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], rel=1e-5)
    near = torch.tensor([1000.0, 1000.0, 1000.0, 1004.0]).to(half)
    assert fused_rl.advantages.group_mean_advantages(near, 4).tolist() == [-1, -1, -1, 3]
    assert fused_rl.advantages.leave_one_out_advantages(near, 4).tolist() == pytest.approx(
        [-4 / 3] * 3 + [4]
    )
    large = torch.tensor([300.0, 700.0, 0.0, 400.0]).to(half)
    deviation = math.sqrt((50**2 + 350**2 + 350**2 + 50**2) / 3)
    right = [x / deviation for x in (-50, 350, -350, 50)]
    found = fused_rl.advantages.group_zscore_advantages(large, 4, eps=0.0).tolist()
    assert found == pytest.approx(right, rel=1e-5 if half == torch.float16 else 2e-2)


def test_a_value_loss_of_float16_goes_beyond_its_own_range():
    values = torch.tensor([700.0], dtype=torch.float16, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float16)
    loss = fused_rl.advantages.clipped_value_loss(values, zero, zero)
    assert loss.tolist() == [245000.0]
    loss.sum().backward()
    assert values.grad.tolist() == [700.0] and values.grad.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("name", named.NAMES)
def test_advantages_of_another_dtype_than_log_probs(name, dtype):
    """Rewards of numpy are float64, those of a reward model bfloat16; log-probs are float32."""
    n = Numbers(torch.Tensor.float)
    loss = loss_of(name, beta=0.1)
    n.advantages = n.advantages.to(dtype)
    logprobs = n.logprobs.clone().requires_grad_()
    found = loss(n.stats._replace(logprobs=logprobs), n.batch).loss
    exact = Numbers(torch.Tensor.float)
    exact.advantages = n.advantages.double()
    for key in ("old", "ref", "weights", "logprobs", "entropy"):
        setattr(exact, key, getattr(exact, key).double())
    wide = exact.logprobs.clone().requires_grad_()
    right = loss(exact.stats._replace(logprobs=wide), exact.batch).loss
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
    (got,) = torch.autograd.grad(found, logprobs)
    (slope,) = torch.autograd.grad(right, wide)
    torch.testing.assert_close(got.double(), slope, rtol=1e-4, atol=1e-6)


def from_hidden_states(dtype: torch.dtype) -> list[torch.Tensor]:
    """Values and gradients of the other half."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n = Numbers(lambda x: x.to(dtype))
    hidden, weight, bias = (normal(*s).requires_grad_() for s in ((B, T, 8), (19, 8), (19,)))
    head = fused_rl.LMHead(weight, bias, scale=0.7, softcap=5.0)
    labels = torch.randint(0, 19, (B, T), generator=generator)
    kept, cu_kept = labels.reshape(-1), torch.arange(B * T + 1)
    stats = (
        *fused_rl.linear_logprobs(hidden, head, labels, temperature=0.8),
        *fused_rl.linear_top_logprobs(hidden, head, labels),
        *fused_rl.linear_kept_logprobs(hidden, head, labels, kept, cu_kept)[:2],
        *fused_rl.linear_divergence(hidden, head, hidden.detach() + 1, weight, labels),
        *fused_rl.linear_logprobs_at(hidden, head, labels[..., None], temperature=0.8),
        *fused_rl.linear_statistics(hidden, head, labels, temperature=0.8)[:3],
        fused_rl.linear.linear_logits_at(hidden, head, labels[..., None]),
        *fused_rl.logprobs_from_logits(hidden @ weight.T, labels, temperature=1.3),
        fused_rl.linear_policy_loss(hidden, head, n.batch, fused_rl.grpo(beta=0.1)).loss,
        fused_rl.linear_policy_loss(hidden, head, n.batch, fused_rl.gspo(beta=0.1)).loss,
        fused_rl.linear_preference_loss(
            *(hidden, head),
            fused_rl.preference.PreferenceBatch.padded(labels, n.mask, ref_logprobs=n.ref),
            fused_rl.preference.wpo(),
        ).loss,
    )
    gradients = torch.autograd.grad(sum(s.sum() for s in stats), (hidden, weight, bias))
    return [*stats, *gradients]


@pytest.mark.parametrize("default", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_default_dtype_changes_nothing_from_hidden_states_on(dtype, default):
    right = from_hidden_states(dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = from_hidden_states(dtype)
    finally:
        torch.set_default_dtype(before)
    for got, expected in zip(found, right, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)

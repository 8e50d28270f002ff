"""What the settings of trainers do: their formulas, summed over all sequences of a small policy.

The formulas are written after the trainers' sources, clamps included; docs/kl.md says which. Beside
the rows of its two tables of settings.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_rl import KL, kl_penalty
from fused_rl.study.enumeration import BIASED, EXACT, Target, World

PAGE = (Path(__file__).parents[1] / "docs" / "kl.md").read_text()


class Samples(NamedTuple):
    """Log-probs [B, T] of tokens, under the policy that is trained, the one that sampled, and the
    reference.
    """

    now: Tensor
    old: Tensor
    ref: Tensor
    mask: Tensor


Term = Callable[[Samples], Tensor]


def to_old(s: Samples) -> Tensor:
    return torch.exp(s.now - s.old)


def to_itself(s: Samples) -> Tensor:
    """1, with the gradient of a ratio."""
    return torch.exp(s.now - s.now.detach())


def detached(s: Samples) -> Tensor:
    return to_old(s).detach()


def held(s: Samples) -> Tensor:
    return detached(s).clamp(max=10)


def mean_ratio(s: Samples) -> Tensor:
    """The geometric mean of a sequence's ratios."""
    log_ratio = (s.now - s.old).where(s.mask, 0.0)
    return (log_ratio.sum(-1, keepdim=True) / s.mask.sum(-1, keepdim=True)).exp()


def in_loss(value: KL, ratio: Term | None = None, *, grad: KL | None = None, most=10.0) -> Term:
    """An estimate, times a ratio, held at a value; grad: whose derivative it has."""

    def term(s: Samples) -> Tensor:
        found = kl_penalty(s.now, s.ref, value=value, grad=grad)
        found = found if ratio is None else ratio(s) * found
        return found.clamp(-most, most)

    return term


def weighed(term: Term, ratio: Term) -> Term:
    """By a ratio that comes after what holds the estimate."""
    return lambda s: ratio(s) * term(s)


def to_go(kl: Tensor) -> Tensor:
    return kl.flip(-1).cumsum(-1).flip(-1)


def of_all(kl: Tensor) -> Tensor:
    return kl.sum(-1, keepdim=True).expand_as(kl)


def own(kl: Tensor) -> Tensor:
    return kl


def in_reward(kind: KL, credit: Callable[[Tensor], Tensor], *, product: bool = False) -> Term:
    """An estimate of the policy that sampled; the surrogate's loss where the reward is minus it."""

    def term(s: Samples) -> Tensor:
        kl = kl_penalty(s.old, s.ref, value=kind).clamp(-10, 10).where(s.mask, 0.0)
        if not product:
            return credit(kl) * to_old(s)
        # One ratio for a sequence, shared among its tokens.
        whole = (s.now - s.old).where(s.mask, 0.0).sum(-1, keepdim=True).exp()
        return credit(kl) * whole / s.mask.sum(-1, keepdim=True)

    return term


VERL = "`actor_rollout_ref.actor.use_kl_loss=True"
GAE = "`algorithm.use_kl_in_reward=True`"
NEMO = "`loss_fn.reference_policy_kl_penalty=0.01`; `reference_policy_kl_type` is k3 unless set"
NEMO_K2 = "`loss_fn.reference_policy_kl_type=k2`"
ON_POLICY = "`loss_fn.use_on_policy_kl_approximation=True`"
IN_REWARD = "`loss_fn.use_kl_in_reward=True`, with"
unclamped = partial(in_loss, most=torch.inf)
STALE_K1, STALE_K3 = in_reward(KL.K1, to_go), in_reward(KL.K3, to_go)
PPO = "`--kl-coef 0.01 --advantage-estimator ppo"
# Of a row's trainer and setting, in the order of the page.
FORMULAS = {
    "TRL 1.16, GRPOTrainer": {
        "`beta=0.04`; `use_bias_correction_kl` is True unless set": unclamped(KL.K3, to_old),
        "`beta=0.04, use_bias_correction_kl=False`": unclamped(KL.K3),
        '`beta=0.04, importance_sampling_level="sequence"`': unclamped(KL.K3, mean_ratio),
    },
    "TRL 1.16, RLOOTrainer": {"`beta=0.04`": in_reward(KL.K1, of_all, product=True)},
    "verl 0.9.1": {
        f"{VERL}`; `kl_loss_type` is `low_var_kl` unless set": in_loss(KL.K3),
        f"{VERL}`, `kl_loss_type=kl`": unclamped(KL.K1),
        f"{VERL}`, `kl_loss_type=k3+`, and `mse`": unclamped(KL.K3, grad=KL.K2),
        f"{GAE}, with GAE at its `gamma=1 lam=1`; `kl_penalty` is `kl` unless set": STALE_K1,
        f"{GAE}, `algorithm.kl_penalty=low_var_kl`": STALE_K3,
    },
    "OpenRLHF 0.11.2": {
        "no option: k1 in the reward, with GAE at its gamma and lambd of 1": STALE_K1,
        "`--algo.kl.estimator k3`, still in the reward": STALE_K3,
        "`--algo.kl.use_loss`; `--algo.kl.estimator` is k1 unless set": in_loss(KL.K1),
        "`--algo.kl.use_loss --algo.kl.estimator k3`": in_loss(KL.K3),
        "`--algo.kl.use_loss --algo.kl.estimator k2`": in_loss(KL.K2),
        "`--algo.kl.use_loss --algo.kl.unbiased_gradient`, whatever the estimator": unclamped(
            KL.K3, held, grad=KL.K2
        ),
    },
    "NeMo-RL 005a098": {
        NEMO: in_loss(KL.K3),
        NEMO_K2: in_loss(KL.K2),
        ON_POLICY: weighed(in_loss(KL.K3), detached),
        f"{ON_POLICY}, `reference_policy_kl_type=k2`": weighed(in_loss(KL.K2), detached),
    },
    "NeMo-RL 006907a": {
        ON_POLICY: in_loss(KL.K3, to_old),
        f"{ON_POLICY}, `reference_policy_kl_type=k2`": in_loss(KL.K2, to_old),
        NEMO: in_loss(KL.K3, to_itself),
        NEMO_K2: in_loss(KL.K2, to_itself),
        f"{IN_REWARD} `grpo.adv_estimator.name=reinforce_plus_plus`": in_reward(KL.K3, own),
        f"{IN_REWARD} `reinforce_plus_plus` and `reference_policy_kl_type=k1`": in_reward(
            KL.K1, own
        ),
    },
    "slime 00c2d6d": {
        "`--use-kl-loss --kl-loss-coef 0.01`; `--kl-loss-type` is k1 unless set": unclamped(KL.K1),
        "`--use-kl-loss --kl-loss-type k3`, and `low_var_kl`": in_loss(KL.K3),
        "`--use-kl-loss --kl-loss-type k2`": unclamped(KL.K2),
        "`--use-kl-loss --kl-loss-type k3 --use-unbiased-kl`, and `low_var_kl`": in_loss(
            KL.K3, to_old
        ),
        "`--use-kl-loss --kl-loss-type k2 --use-unbiased-kl`": unclamped(KL.K2, to_old),
        f"{PPO}`, at its gamma and lambd of 1": STALE_K1,
        f"{PPO} --kl-loss-type k3`": STALE_K3,
        "`--kl-coef 0.01 --advantage-estimator reinforce_plus_plus_baseline`": in_reward(
            KL.K1, own
        ),
    },
}


def rows(name: str) -> list[list[str]]:
    """The cells of the peers' rows of a table."""
    lines = PAGE.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]
    cells = [line[2:-2].split(" | ") for line in lines.splitlines()[2:]]
    return [row for row in cells if row[0] != "fused_rl"]


ROWS = [*rows("settings"), *rows("alone")]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def expected_gradient(world: World, term: Term, sampler: Tensor) -> Tensor:
    """[S, V]: of a sum over tokens, over all sequences that the policy may sample."""
    leaf = world.current.clone().requires_grad_()
    samples = Samples(*map(world.logprobs, (leaf, sampler, world.ref)), world.mask)
    each = term(samples).where(world.mask, 0.0).sum(-1)
    return torch.autograd.grad(world.probability(sampler).detach() @ each, leaf)[0]


def name_of(world: World, gradient: Tensor, targets: list[Target]) -> str:
    """Of the divergence whose gradient it is; an error about which nothing can be said fails."""
    errors = {target: (gradient - world.truth[target]).abs().max().item() for target in targets}
    assert all(error < EXACT or error > BIASED for error in errors.values()), errors
    found = [target.value for target, error in errors.items() if error < EXACT]
    return found[0] if found else "biased"


def test_every_setting_of_a_peer_has_a_formula():
    written = {(who, setting) for who, terms in FORMULAS.items() for setting in terms}
    assert written == {(row[0], row[1]) for row in ROWS}
    assert len(ROWS) == len(written)


@pytest.mark.parametrize(("row"), ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_a_setting_has_the_gradient_of_its_row(world, row):
    term, targets = FORMULAS[row[0]][row[1]], list(Target)
    current = [target for target in targets if "old" not in target.value]
    found = [
        name_of(world, expected_gradient(world, term, world.current), current),
        name_of(world, expected_gradient(world, term, world.old), targets),
    ]
    assert found == row[5:]


def test_one_policy_with_its_own_ratio_and_an_old_one_differ_off_policy_alone(world):
    """NeMo-RL with and without use_on_policy_kl_approximation."""
    itself, old = in_loss(KL.K3, to_itself), in_loss(KL.K3, to_old)
    gradients = [
        [expected_gradient(world, term, sampler) for term in (itself, old)]
        for sampler in (world.current, world.old)
    ]
    torch.testing.assert_close(*gradients[0], rtol=0, atol=1e-15)
    assert (gradients[1][0] - gradients[1][1]).abs().max() > BIASED


@pytest.mark.parametrize("far", [2.5, 2.7])
def test_a_held_k3_has_no_gradient_from_2_6_nats_on(far):
    """As verl, OpenRLHF, NeMo-RL and slime's low_var_kl hold it; ours has one."""
    now = torch.tensor([-far], dtype=torch.float64, requires_grad=True)
    s = Samples(now, now.detach(), torch.zeros_like(now), torch.ones(1, dtype=torch.bool))
    for ratio in (None, to_old):
        (slope,) = torch.autograd.grad(in_loss(KL.K3, ratio)(s).sum(), now)
        assert bool(slope.any()) == (far < 2.6)
    (slope,) = torch.autograd.grad(unclamped(KL.K3)(s).sum(), now)
    assert slope < -10

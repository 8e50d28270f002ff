"""The ways to use a KL whose gradients are measured: all of them, and those that have a name."""

from __future__ import annotations

from dataclasses import replace

from fused_rl import KL, Divergence, Level
from fused_rl.study.enumeration import KINDS, SETUPS, Credit, Setup, described
from fused_rl.study.exact_enumeration import DIVERGENCES, USES, Use
from fused_rl.study.moments import Way

TOKEN, PRODUCT, GEOMETRIC = Level.TOKEN, Level.PRODUCT, Level.GEOMETRIC
TO_GO = Credit.TO_GO

ON_PATH = {
    "k1 in reward": Way(Setup(reward=TO_GO), KL.K1),
    "k3 in reward": Way(Setup(reward=TO_GO), KL.K3),
    "k1 in loss": Way(Setup(TOKEN), KL.K1),
    "k2 in loss": Way(Setup(TOKEN), KL.K2),
    "k3 in loss": Way(Setup(TOKEN), KL.K3),
    "k3 in both": Way(Setup(TOKEN, reward=TO_GO), KL.K3),
    "exact in loss": Way(Use(True), Divergence.REVERSE),
    "exact in loss, later in reward": Way(
        Use(True, reward="exact", credit="later tokens"), Divergence.REVERSE
    ),
}
"""On-policy, per token; a KL in the reward is that of the token and of those after it."""

STALE = {
    "k1 in reward": ON_PATH["k1 in reward"],
    "k1 in reward, token ratio": Way(Setup(reward=TO_GO, ratio=TOKEN), KL.K1),
    "k1 in reward, product ratio": Way(Setup(reward=TO_GO, ratio=PRODUCT), KL.K1),
    "kept k1 in reward": Way(Setup(reward=TO_GO, stale=True), KL.K1),
    "kept k1 in reward, token ratio": Way(Setup(reward=TO_GO, ratio=TOKEN, stale=True), KL.K1),
    "kept k1 in reward, product ratio": Way(Setup(reward=TO_GO, ratio=PRODUCT, stale=True), KL.K1),
    "k3 in reward": ON_PATH["k3 in reward"],
    "k1 in loss": ON_PATH["k1 in loss"],
    "k3 in loss": ON_PATH["k3 in loss"],
    "k3 in loss, attached token ratio": Way(Setup(TOKEN, TOKEN, True), KL.K3),
    "k3 in loss, attached product ratio": Way(Setup(TOKEN, PRODUCT, True), KL.K3),
    "k2 in loss": ON_PATH["k2 in loss"],
    "k2 in loss, token ratio": Way(Setup(TOKEN, TOKEN), KL.K2),
    "k2 in loss, product ratio": Way(Setup(TOKEN, PRODUCT), KL.K2),
    "k2 of the sum in loss, product ratio": Way(Setup(PRODUCT, PRODUCT), KL.K2),
    "exact in loss": ON_PATH["exact in loss"],
    "exact in loss, later in reward, product ratio": Way(
        Use(True, PRODUCT, reward="exact", credit="later tokens"), Divergence.REVERSE
    ),
}
"""Off-policy. Kept: of the rollout's log-probs. Ratios are detached unless it says attached."""

RATIOS = {
    name: STALE[name]
    for name in (
        "k1 in reward",
        "k1 in reward, token ratio",
        "k1 in reward, product ratio",
        "k2 in loss, token ratio",
        "k2 of the sum in loss, product ratio",
        "exact in loss",
        "exact in loss, later in reward, product ratio",
    )
}
"""Those whose ratios are compared."""

USED = {
    "k3 in loss": "GRPO; verl, OpenRLHF",
    "k1 in loss": "OpenRLHF's and verl's k1",
    "k2 in loss": "verl's k3+, mse",
    "k2 in loss, token ratio": "OpenRLHF's unbiased_gradient",
    "k3 in loss, attached token ratio": "TRL's GRPO",
    "k3 in loss, attached geometric ratio": "TRL's GRPO with sequence ratios",
    "exact in loss": "fused_rl, kl=Divergence.REVERSE",
    "kept k1 in reward, token ratio": "PPO; verl, OpenRLHF",
    "kept k1 of the sum in reward, product ratio": "TRL's RLOO",
    "kept k3 in reward, token ratio": "verl's option",
    "k3 in both": "2512.21852's check",
    "k1 in reward, product ratio": "fused_rl, shape_rewards again",
    "k2 of the sum in loss, product ratio": "fused_rl, KLPenalty",
    "exact in loss, later in reward, product ratio": "fused_rl, both",
}
"""Name of what people use, and who."""

NAMED = {
    **ON_PATH,
    **STALE,
    "k3 in loss, attached geometric ratio": Way(Setup(TOKEN, GEOMETRIC, True), KL.K3),
    "kept k1 of the sum in reward, product ratio": Way(
        Setup(reward=Credit.TERMINAL, ratio=PRODUCT, stale=True), KL.K1
    ),
    "kept k3 in reward, token ratio": Way(Setup(reward=TO_GO, ratio=TOKEN, stale=True), KL.K3),
}

SAME = {
    "own token": (Way(Setup(reward=Credit.OWN), KL.K1), Way(Setup(TOKEN), KL.K2)),
    "sum": (Way(Setup(reward=Credit.TERMINAL), KL.K1), Way(Setup(PRODUCT), KL.K2)),
}
"""k1 in the reward beside k2 in the loss, at the same level."""


def every() -> list[Way]:
    """All of them. A grad of its own makes a difference where the value has a part in the gradient
    too: under an attached ratio, or in the reward.
    """
    estimated = []
    for setup in SETUPS:
        both = setup.loss is not None and (setup.attached or setup.reward is not None)
        for grad in KINDS if both else (None,):
            estimated += [Way(replace(setup, grad=grad), value) for value in KINDS]
    return estimated + [Way(use, d) for use in USES for d in DIVERGENCES.values()]


def columns(way: Way) -> tuple[str, str, str]:
    """Where it is, its ratio, and its estimator."""
    if isinstance(way.where, Use):
        where, ratio = str(way.where).split(" | ")
        return where, ratio, {d: name for name, d in DIVERGENCES.items()}[way.kind]
    where, ratio = described(way.where).split(" | ")
    grad = way.where.grad
    own = grad is None or grad is way.kind
    return where, ratio, way.kind.name.lower() + ("" if own else f", grad {grad.name.lower()}")

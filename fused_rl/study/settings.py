"""How a run of RL with a KL is set up: the demo's model and task, and what is recorded of it.

The reference has been taught the right answers of rows of 3, 4 and 5 digits, but not for long. RL
starts there and sees rows of 4 alone; rows of 3 and 5 say what becomes of what it does not see.
Every option pursues, with one beta,

    E[reward] - beta E[sum of the KL over the answer's tokens]

or means to: the loss divides by the same constant wherever the KL is, and a KL in the reward is
that of the whole answer, as trainers of groups add it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fused_rl import (
    KL,
    Divergence,
    KLPenalty,
    Level,
    LMHead,
    TokenBatch,
    dr_grpo,
    gpg,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
)
from fused_rl.demo.distill import batch_of, rate, states, update
from fused_rl.demo.rollout import Rollout, answer_logprobs, right_answers, sample
from fused_rl.demo.task import (
    Problem,
    build_model,
    build_tokenizer,
    ready,
    sample_problems,
)
from fused_rl.rollouts.advantages import leave_one_out_advantages
from fused_rl.rollouts.rewards import shape_rewards

LENGTHS = (3, 4, 5)
GROUP = 8


@dataclass(frozen=True)
class Option:
    """A way to use a KL.

    Args:
        name: of it in tables and pictures.
        reward: the estimator in the reward, of the current policy; None: none.
        loss: the estimator in the loss, or the divergence that is exact there; None: none.
        grad: the estimator whose gradient is taken in the loss; None: that of loss.
        weighted: the KL in the loss is that of whole answers, times their importance ratio.
    """

    name: str
    reward: KL | None = None
    loss: KL | Divergence | None = None
    grad: KL | None = None
    weighted: bool = False

    def penalty(self, beta: float) -> KLPenalty | None:
        """The KL in the loss."""
        if self.loss is None:
            return None
        if isinstance(self.loss, Divergence):
            return KLPenalty(beta, exact=self.loss)
        whole = {"level": Level.PRODUCT, "importance": Level.PRODUCT, "attached": False}
        return KLPenalty(beta, self.loss, self.grad, **(whole if self.weighted else {}))


OPTIONS = (
    Option("no KL"),
    Option("k1 in loss", loss=KL.K1),
    Option("k3 in loss", loss=KL.K3),
    Option("k3 in reward", reward=KL.K3),
    Option("k1 in reward", reward=KL.K1),
    Option("k2 in loss", loss=KL.K2),
    Option("k3, gradient of k2", loss=KL.K3, grad=KL.K2),
    Option("k3 in reward and loss", reward=KL.K3, loss=KL.K3),
    Option("exact in loss", loss=Divergence.REVERSE),
)
WEIGHTED = Option("k2 in loss, weighted", loss=KL.K2, weighted=True)


@dataclass(frozen=True)
class Run:
    """What a run depends on.

    Args:
        option: the KL.
        seed: of the reference, problems and samples.
        steps: updates, each on answers of their own.
        staleness: the answers of a step are those of the policy so many updates ago.
        beta: weight of the KL of an answer, for rewards from 0 to 1.
        problems: per step; GROUP answers each.
        every: a record is made every so many steps, and before the first.
        fresh: answers that a record is of; at the end four times as many of each length.
    """

    option: Option
    seed: int
    steps: int
    staleness: int = 0
    beta: float = 0.1
    problems: int = 8
    every: int = 15
    fresh: int = 256

    learning_rate = 1e-3
    warmup_steps = 10
    max_grad_norm = 1.0


class Teaching:
    """How a reference learns: until about three places of five are right."""

    steps = 45
    answers = 64

    learning_rate = 2e-3
    warmup_steps = 20
    max_grad_norm = 1.0


def blank() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new model, set to sample, and its tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    return ready(build_model(tokenizer, layers=1), tokenizer, 1.0, max(LENGTHS)), tokenizer


@lru_cache
def teach(seed: int) -> dict[str, Tensor]:
    """The weights of a reference; formed once per process."""
    torch.manual_seed(seed)
    model, tokenizer = blank()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(1, Teaching.steps + 1):
        digits = LENGTHS[step % len(LENGTHS)]
        rollout = right_answers(tokenizer, sample_problems(Teaching.answers, generator, digits))
        head = LMHead.from_model(model)
        output = linear_policy_loss(states(model, rollout), head, batch_of(rollout, 1.0), gpg())
        update(model, optimizer, output, rate(step, Teaching), Teaching)
    return model.state_dict()


def train(run: Run) -> dict:
    """A run: {"curve": a list of records, "held_out": number of digits -> a record}."""
    with torch.random.fork_rng(devices=[]):
        weights = teach(run.seed)
        torch.manual_seed(run.seed)
        model, tokenizer = blank()
        model.load_state_dict(weights)
        reference = copy.deepcopy(model).requires_grad_(False)
        unseen = torch.Generator().manual_seed(2**32 + run.seed)
        shown = sample_problems(run.fresh, unseen)
        curve = []
        for step in updates(run, model, reference, tokenizer):
            if step % run.every == 0:
                rollout = sample(model, tokenizer, shown)
                curve.append({"step": step} | record(model, reference, rollout))
        held_out = {}
        for digits in LENGTHS:
            rows = sample_problems(run.fresh // 2, unseen, digits)
            rollout = sample(model, tokenizer, in_groups(rows))
            held_out[str(digits)] = record(model, reference, rollout) | diversity(rollout)
    return {"curve": curve, "held_out": held_out}


def updates(
    run: Run,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[int]:
    """Trains model in place; 0, and the number of each update behind it."""
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    # Clips off-policy.
    loss = replace(dr_grpo(length=max(LENGTHS)), kl=run.option.penalty(run.beta))
    actor = copy.deepcopy(model) if run.staleness else model
    kept = deque([copy.deepcopy(model.state_dict())], maxlen=run.staleness + 1)
    yield 0
    for step in range(1, run.steps + 1):
        if run.staleness:
            actor.load_state_dict(kept[0])
        problems = in_groups(sample_problems(run.problems, generator))
        rollout = sample(actor, tokenizer, problems)
        old = answer_logprobs(actor, rollout, 1.0) if run.staleness else None
        hidden, head = states(model, rollout), LMHead.from_model(model)
        with torch.no_grad():
            ref = states(reference, rollout), LMHead.from_model(reference)
            values = advantages(run, rollout, (hidden.detach(), head), ref)
        batch = TokenBatch.padded(rollout.labels, rollout.loss_mask, values, old_logprobs=old)
        output = linear_policy_loss(hidden, head, batch, loss, reference=ref)
        update(model, optimizer, output, rate(step, run), run)
        if run.staleness:
            kept.append(copy.deepcopy(model.state_dict()))
        yield step


def advantages(
    run: Run, rollout: Rollout, policy: tuple[Tensor, LMHead], ref: tuple[Tensor, LMHead]
) -> Tensor:
    """[B]: against the others of the group, the KL in the reward taken off first."""
    if run.option.reward is None:
        return leave_one_out_advantages(rollout.rewards, GROUP)
    logprobs, ref_logprobs = (linear_logprobs(*x, rollout.labels).logprobs for x in (policy, ref))
    rewards = shape_rewards(
        *(rollout.rewards, logprobs, ref_logprobs, rollout.loss_mask),
        beta=run.beta,
        kind=run.option.reward,
    )
    return leave_one_out_advantages(rewards.sum(-1), GROUP)


@torch.no_grad()
def record(
    model: PreTrainedModel, reference: PreTrainedModel, rollout: Rollout
) -> dict[str, float]:
    """Mean reward; exact KL to the reference at the prefixes visited, per token and summed over an
    answer; entropy per token."""
    sides = [(states(m, rollout), LMHead.from_model(m)) for m in (model, reference)]
    stats = linear_divergence(*sides[0], *sides[1], divergence=Divergence.REVERSE)
    divergence = stats.divergence.where(rollout.loss_mask, 0.0).sum()
    return {
        "reward": rounded(rollout.rewards.mean()),
        "kl": rounded(divergence / rollout.loss_mask.sum()),
        "kl_answer": rounded(divergence / len(rollout.rewards)),
        "entropy": rounded(stats.entropy[rollout.loss_mask].mean()),
    }


def diversity(rollout: Rollout) -> dict[str, float]:
    """Of groups of GROUP answers: the share of groups with a right one, and how many differ."""
    right = (rollout.rewards == 1).float().reshape(-1, GROUP)
    answers = rollout.labels.where(rollout.loss_mask, -1).reshape(*right.shape, -1)
    different = [len(group.unique(dim=0)) for group in answers]
    return {
        "some_right": rounded(right.amax(-1).mean()),
        "different": rounded(sum(different) / len(different)),
    }


def in_groups(problems: list[Problem]) -> list[Problem]:
    """Each GROUP times, one after another."""
    return [p for p in problems for _ in range(GROUP)]


def rounded(value: float | Tensor) -> float:
    """To five decimals."""
    return round(float(value), 5)

"""The demo of preferences: a small model learns to sort digits from its own answers, in pairs.

First it learns a little from right answers. Then it answers each problem several times, and the
best of the answers is chosen over the worst: from here on no reward is seen, only which of two was
better. It learns from these pairs by DPO, towards a frozen copy of what it was, or by SimPO, which
needs no such copy. What it has learned is judged by the reward of fresh answers to other problems.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fused_rl import LMHead, LossOutput, linear_preference_loss, preference
from fused_rl.demo.distill import DistillConfig, rate, teach, update
from fused_rl.demo.report import Panel, Record
from fused_rl.demo.rollout import Rollout, answer_logprobs, answer_states, sample
from fused_rl.demo.task import sample_problems, start

LOSSES = {"dpo": preference.dpo, "simpo": preference.simpo}


@dataclass(frozen=True)
class PreferenceConfig:
    """What a run depends on.

    Args:
        steps: updates, each on pairs that were made before the first.
        seed: of weights, problems, samples and the order of pairs.
        out: directory for log.json and curves.png.
        loss: name of the preference loss: dpo or simpo.
        beta: what the loss multiplies log-ratios (simpo: mean log-probs) by, above 0; None: 0.1 of
            dpo, 2.0 of simpo.
        first_steps: updates on right answers, before there are pairs.
        problems: that pairs are made of.
        answers: to each of these problems.
        pairs: per step.
        fresh: answers per step that are judged, and that nothing is learned from.
        learning_rate: of AdamW, after the warm-up.
        warmup_steps: steps over which the learning rate rises to learning_rate.
        max_grad_norm: bound on the norm of the gradient.
    """

    steps: int = 200
    seed: int = 0
    out: str = "out/demo"
    loss: str = "dpo"
    beta: float | None = None
    first_steps: int = 25
    problems: int = 4096
    answers: int = 4
    pairs: int = 64
    fresh: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    max_grad_norm: float = 1.0

    model: ClassVar = None
    compares: ClassVar = False
    shown: ClassVar = {
        "reward": "reward {:.3f}",
        "margin": "margin {:.2f}",
        "accuracy": "accuracy {:.2f}",
        "log_ratio": "log-ratio {:.1f}",
    }
    panels: ClassVar = (
        Panel("reward", "Reward", "mean of fresh answers", "#2a6fbb"),
        Panel("loss", "Loss", "nats per pair", "#c8553d"),
        Panel("margin", "Margin of the implicit rewards", "nats", "#3a8f5c"),
        Panel("accuracy", "Accuracy", "share of pairs", "#7a5ba8"),
        Panel("reward_chosen", "Implicit rewards", "nats", "#3a8f5c", "reward_rejected"),
        Panel("logprobs_chosen", "Log-probs", "nats per answer", "#2a6fbb", "logprobs_rejected"),
        Panel("log_ratio", "Log-ratio to the initial model (not a KL)", "nats", "#c8553d"),
        Panel("length_bias", "Length bias", "correlation with the margin", "#7a5ba8"),
    )

    def prepared(self, console: Console) -> Iterator[Record]:
        """The steps of the training, once there are pairs."""
        model, tokenizer = start(None, 1.0)
        generator = torch.Generator().manual_seed(self.seed)
        with console.status("The model learns a little from right answers, and answers"):
            teach(model, tokenizer, generator, DistillConfig(teacher_steps=self.first_steps))
            problems = sample_problems(self.problems, generator)
            rollout = sample(model, tokenizer, [p for p in problems for _ in range(self.answers)])
        chosen, rejected = ranked_pairs(rollout.rewards, self.answers)
        better, worse = (float(rollout.rewards[rows].mean()) for rows in (chosen, rejected))
        console.print(
            f"{len(chosen)} pairs; mean reward of the chosen {better:.3f}, of the rejected "
            f"{worse:.3f}, of all answers {float(rollout.rewards.mean()):.3f}."
        )
        return learn(model, tokenizer, rollout, (chosen, rejected), generator, self)

    def preference_loss(self) -> preference.PreferenceLoss:
        """The loss that was asked for."""
        made = LOSSES[self.loss]
        return made() if self.beta is None else made(self.beta)


def ranked_pairs(rewards: Tensor, answers: int) -> tuple[Tensor, Tensor]:
    """The best and the worst answer to each problem, where they differ: rows [P] of each.

    Args:
        rewards: [problems * answers], problem by problem.
        answers: how many each has.
    """
    by_problem = rewards.view(-1, answers)
    best, worst = by_problem.max(1), by_problem.min(1)
    first = torch.arange(len(by_problem)) * answers
    differ = best.values > worst.values
    return (first + best.indices)[differ], (first + worst.indices)[differ]


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    pairs: tuple[Tensor, Tensor],
    generator: torch.Generator,
    config: PreferenceConfig,
) -> Iterator[Record]:
    """Trains model in place, on pairs (chosen, rejected) of the answers; one record per step."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    # simpo does not read them; log_ratio, which is logged, is measured from them.
    reference = answer_logprobs(model, rollout, 1.0)
    some = batches(len(pairs[0]), config.pairs, generator)
    for step in range(1, config.steps + 1):
        began = time.perf_counter()
        at = next(some)
        rows = torch.cat([side[at] for side in pairs])
        output = formed(model, rollout, rows, reference, config)
        update(model, optimizer, output, rate(step, config), config)
        fresh = sample(model, tokenizer, sample_problems(config.fresh, generator))
        tokens = int(rollout.loss_mask[rows].sum())
        yield record_of(step, fresh, output, tokens, time.perf_counter() - began)


def formed(
    model: PreTrainedModel,
    rollout: Rollout,
    rows: Tensor,
    reference: Tensor,
    config: PreferenceConfig,
) -> LossOutput:
    """The loss of the answers at rows, those of its first half chosen over those of the second."""
    batch = preference.PreferenceBatch.padded(
        rollout.labels[rows], rollout.loss_mask[rows], ref_logprobs=reference[rows]
    )
    hidden, head = answer_states(model, rollout, rows), LMHead.from_model(model)
    return linear_preference_loss(hidden, head, batch, config.preference_loss())


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices [min(size, count)] below count, without end: each pass in an order of its own, less
    what does not fill a batch.
    """
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].split(size)


def record_of(step: int, fresh: Rollout, output: LossOutput, tokens: int, seconds: float) -> Record:
    """What is logged of a step: metrics before its update, on its pairs; rewards after it."""
    return {
        "step": step,
        "reward": float(fresh.rewards.mean()),
        "solved": float((fresh.rewards == 1).float().mean()),
        **{name: float(metric) for name, metric in output.metrics.items()},
        "loss": float(output.loss.detach()),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }

"""The demo of distillation: a small student learns to sort digits from a larger teacher.

The teacher learns from right answers, by their likelihood. The student never sees one: at each step
it samples answers of its own, and learns by the exact reverse KL from what the teacher would have
said at each of their tokens, distillation.opd.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fused_rl import LMHead, LossOutput, TokenBatch, distillation, gpg, linear_policy_loss
from fused_rl.demo.report import Panel, Record
from fused_rl.demo.rollout import Rollout, answer_states, right_answers, sample
from fused_rl.demo.task import build_model, ready, sample_problems, start


class Rates(Protocol):
    """What updates depend on."""

    learning_rate: float
    warmup_steps: int
    max_grad_norm: float


@dataclass(frozen=True)
class DistillConfig:
    """What a run depends on.

    Args:
        steps: updates of the student, each on answers that it has just sampled.
        seed: of weights, problems and samples.
        out: directory for log.json and curves.png.
        teacher_steps: updates of the teacher.
        answers: sampled per step, one per problem.
        learning_rate: of AdamW, after the warm-up; the teacher's falls to a tenth.
        warmup_steps: steps over which the learning rate rises to learning_rate.
        temperature: of sampling, and therefore of both distributions.
        max_grad_norm: bound on the norm of the gradient.
    """

    steps: int = 250
    seed: int = 0
    out: str = "out/demo"
    teacher_steps: int = 150
    answers: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    temperature: float = 1.0
    max_grad_norm: float = 1.0

    model: ClassVar = None
    compares: ClassVar = False
    shown: ClassVar = {
        "reward": "reward {:.3f}",
        "divergence": "KL {:.3f}",
        "entropy": "entropy {:.2f}",
        "tokens_per_second": "{:.0f} tok/s",
    }
    panels: ClassVar = (
        Panel("reward", "Reward of the student", "mean of the step's answers", "#2a6fbb"),
        Panel("divergence", "KL(student, teacher), exact", "nats per token", "#c8553d"),
        Panel("entropy", "Entropy of the student", "nats per token", "#3a8f5c"),
        Panel("teacher_entropy", "Entropy of the teacher there", "nats per token", "#7a5ba8"),
    )

    def prepared(self, console: Console) -> Iterator[Record]:
        """The steps of the student, once the teacher has learned."""
        teacher, tokenizer = start(None, self.temperature)
        generator = torch.Generator().manual_seed(self.seed)
        with console.status("The teacher learns from right answers"):
            teach(teacher, tokenizer, generator, self)
            answers = sample(teacher, tokenizer, sample_problems(4 * self.answers, generator))
        console.print(f"Mean reward of the teacher: {float(answers.rewards.mean()):.3f}.")
        student = ready(build_model(tokenizer, width=32, layers=1), tokenizer, self.temperature)
        return learn(student, teacher, tokenizer, generator, self)


def teach(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator,
    config: DistillConfig,
) -> None:
    """Trains the teacher in place: gpg with advantages of 1 is the likelihood of the labels."""
    optimizer = torch.optim.AdamW(teacher.parameters(), weight_decay=0.0)
    for step in range(1, config.teacher_steps + 1):
        rollout = right_answers(tokenizer, sample_problems(config.answers, generator))
        head = LMHead.from_model(teacher)
        output = linear_policy_loss(states(teacher, rollout), head, batch_of(rollout, 1.0), gpg())
        falling = 1 - 0.9 * step / config.teacher_steps
        update(teacher, optimizer, output, falling * rate(step, config), config)


def learn(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator,
    config: DistillConfig,
) -> Iterator[Record]:
    """Trains the student in place; one record per step."""
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.0)
    for step in range(1, config.steps + 1):
        began = time.perf_counter()
        rollout = sample(student, tokenizer, sample_problems(config.answers, generator))
        with torch.no_grad():
            reference = states(teacher, rollout), LMHead.from_model(teacher)
        output = linear_policy_loss(
            *(states(student, rollout), LMHead.from_model(student)),
            *(batch_of(rollout, 0.0), distillation.opd()),
            reference=reference,
            temperature=config.temperature,
        )
        update(student, optimizer, output, rate(step, config), config)
        yield record_of(step, rollout, output, time.perf_counter() - began)


def states(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """[B, T, H] of every answer."""
    return answer_states(model, rollout, torch.arange(len(rollout.labels)))


def batch_of(rollout: Rollout, advantage: float) -> TokenBatch:
    """The tokens of the answers, all of one advantage."""
    advantages = torch.full((len(rollout.labels),), advantage)
    return TokenBatch.padded(rollout.labels, rollout.loss_mask, advantages)


def rate(step: int, config: Rates) -> float:
    """Linear warm-up, then constant; step counts from 1."""
    return config.learning_rate * min(1.0, step / config.warmup_steps)


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    output: LossOutput,
    learning_rate: float,
    config: Rates,
) -> None:
    """One step of the optimizer."""
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.zero_grad()
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()


def record_of(step: int, rollout: Rollout, output: LossOutput, seconds: float) -> Record:
    """What is logged of a step."""
    tokens = int(rollout.loss_mask.sum())
    return {
        "step": step,
        "reward": float(rollout.rewards.mean()),
        "solved": float((rollout.rewards == 1).float().mean()),
        **{name: float(metric) for name, metric in output.metrics.items()},
        "loss": float(output.loss.detach()),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }

"""The demo: GRPO on a small transformers model, from random weights to sorted digits.

One step: sample groups of answers with model.generate, score them, take their advantages within
each group, and make a few AdamW updates of linear_policy_loss on them. KL is measured towards a
frozen copy of the model as it was at the start.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fused_rl import (
    KL,
    LMHead,
    LossOutput,
    PolicyLoss,
    TokenBatch,
    group_zscore_advantages,
    grpo,
    linear_logprobs,
    linear_policy_loss,
)
from fused_rl.demo_report import (
    Record,
    compare_loss_steps,
    print_comparison,
    write_figure,
    write_log,
)
from fused_rl.demo_task import Problem, reward, sample_problems, start

INTERRUPTED = 130


@dataclass(frozen=True)
class DemoConfig:
    """What a run depends on (a model of the user's, on the number of threads too).

    Args:
        steps: rollouts, each followed by epochs * minibatches updates.
        seed: of weights, problems, samples and minibatches.
        beta: weight of the KL penalty.
        kl: name of the KL estimator that is logged: k1, k2, k3 or abs.
        kl_grad: name of the estimator whose derivative is used; None: that of kl.
        out: directory for log.json and curves.png.
        model: directory of a transformers model and its tokenizer; None: a new small one.
        learning_rate: of AdamW, after the warm-up; None: 4e-4, or 1e-5 for a model of the user's.
        warmup_steps: steps over which the learning rate rises to learning_rate.
        prompts: problems per step.
        group_size: answers sampled per problem.
        epochs: passes over a rollout; from the second update on, ratios can be clipped.
        minibatches: updates per pass.
        temperature: of sampling, and therefore of the loss.
        max_grad_norm: bound on the norm of the gradient.
    """

    steps: int = 400
    seed: int = 0
    beta: float = 0.02
    kl: str = "k3"
    kl_grad: str | None = None
    out: str = "out/demo"
    model: str | None = None
    learning_rate: float | None = None
    warmup_steps: int = 20
    prompts: int = 16
    group_size: int = 16
    epochs: int = 2
    minibatches: int = 2
    temperature: float = 1.0
    max_grad_norm: float = 1.0

    def policy_loss(self) -> PolicyLoss:
        """GRPO with the KL that was asked for."""
        kl_grad = KL[self.kl_grad.upper()] if self.kl_grad else None
        return grpo(beta=self.beta, kl=KL[self.kl.upper()], kl_grad=kl_grad)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant; step counts from 1."""
        peak = self.learning_rate or (1e-5 if self.model else 4e-4)
        return peak * min(1.0, step / self.warmup_steps)


@dataclass(frozen=True)
class Rollout:
    """B sampled answers, each behind its prompt of P columns, T columns long.

    Attributes:
        sequences: [B, P + T] int64; prompts are padded on the left.
        attention_mask: [B, P + T] int64; 0 at padding and after the end of the answer.
        labels: [B, T] int64; the answers.
        loss_mask: [B, T] bool; True up to the end-of-sequence token, and there.
        rewards: [B] float32.
    """

    sequences: Tensor
    attention_mask: Tensor
    labels: Tensor
    loss_mask: Tensor
    rewards: Tensor


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> Rollout:
    """One answer per problem, and its reward."""
    encoded = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    prompts, prompt_mask = encoded.input_ids, encoded.attention_mask
    sequences = model.generate(input_ids=prompts, attention_mask=prompt_mask)
    labels = sequences[:, prompts.shape[1] :]
    ended = (labels == tokenizer.eos_token_id).int()
    loss_mask = ended.cumsum(-1) - ended == 0
    text = [
        tokenizer.decode(row[keep])
        for row, keep in zip(labels, loss_mask & (ended == 0), strict=True)
    ]
    rewards = torch.tensor([reward(p, t) for p, t in zip(problems, text, strict=True)])
    attention_mask = torch.cat([prompt_mask, loss_mask.to(prompt_mask.dtype)], -1)
    return Rollout(sequences, attention_mask, labels, loss_mask, rewards)


def answer_states(model: PreTrainedModel, rollout: Rollout, rows: Tensor) -> Tensor:
    """Hidden states [b, T, H] that predict labels[rows]: each stands one place before its token."""
    attention_mask = rollout.attention_mask[rows]
    hidden = model.base_model(
        input_ids=rollout.sequences[rows],
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    return hidden[:, -rollout.labels.shape[1] - 1 : -1]


@torch.no_grad()
def answer_logprobs(model: PreTrainedModel, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probabilities [B, T] of the answers."""
    hidden = answer_states(model, rollout, torch.arange(len(rollout.labels)))
    head = LMHead.from_model(model)
    return linear_logprobs(hidden, head, rollout.labels, temperature=temperature).logprobs


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    rows: Tensor,
    batch: TokenBatch,
    config: DemoConfig,
) -> LossOutput:
    """One step of the optimizer on the answers at rows, whose tokens are batch."""
    output = linear_policy_loss(
        answer_states(model, rollout, rows),
        LMHead.from_model(model),
        batch,
        config.policy_loss(),
        temperature=config.temperature,
    )
    optimizer.zero_grad()
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    return output


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DemoConfig
) -> Iterator[Record]:
    """Trains model in place; one record per step."""
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(1, config.steps + 1):
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = config.learning_rate_at(step)
        problems = sample_problems(config.prompts, generator)
        rollout = sample(model, tokenizer, [p for p in problems for _ in range(config.group_size)])
        advantages = group_zscore_advantages(rollout.rewards, config.group_size)
        old, ref = (answer_logprobs(m, rollout, config.temperature) for m in (model, reference))
        outputs = []
        for _ in range(config.epochs):
            order = torch.randperm(len(advantages), generator=generator)
            for rows in order.chunk(config.minibatches):
                batch = TokenBatch.padded(
                    rollout.labels[rows],
                    rollout.loss_mask[rows],
                    advantages[rows],
                    old_logprobs=old[rows],
                    ref_logprobs=ref[rows],
                )
                outputs.append(update(model, optimizer, rollout, rows, batch, config))
        yield record_of(step, rollout, outputs, time.perf_counter() - began)


def record_of(step: int, rollout: Rollout, outputs: list[LossOutput], seconds: float) -> Record:
    """What is logged of a step; metrics are means over its updates."""

    def mean(*names: str) -> float:
        return sum(float(o.metrics[name]) for o in outputs for name in names) / len(outputs)

    tokens = int(rollout.loss_mask.sum())
    return {
        "step": step,
        "reward": float(rollout.rewards.mean()),
        "solved": float((rollout.rewards == 1).float().mean()),
        "kl": mean("kl"),
        "entropy": mean("entropy"),
        "clip_fraction": mean("clip_fraction_low", "clip_fraction_high"),
        "loss": sum(float(o.loss.detach()) for o in outputs) / len(outputs),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def progress_bar(console: Console) -> Progress:
    """A bar with the numbers of the last step."""
    numbers = (
        "reward {task.fields[reward]:.3f} KL {task.fields[kl]:.2f} "
        "entropy {task.fields[entropy]:.2f} clip {task.fields[clip_fraction]:.3f} "
        "{task.fields[tokens_per_second]:.0f} tok/s"
    )
    columns = (BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn(numbers))
    return Progress(*columns, console=console, expand=True)


def train_with_progress(config: DemoConfig, console: Console, records: list[Record]) -> None:
    """Appends to records as it goes, so that they outlive a KeyboardInterrupt."""
    torch.manual_seed(config.seed)
    model, tokenizer = start(config.model, config.temperature)
    fields = dict.fromkeys(("reward", "kl", "entropy", "clip_fraction", "tokens_per_second"), 0.0)
    with progress_bar(console) as progress:
        task = progress.add_task("", total=config.steps, **fields)
        for record in train(model, tokenizer, config):
            records.append(record)
            progress.update(task, advance=1, **{name: record[name] for name in fields})


def run(config: DemoConfig) -> int:
    """Trains; writes log.json and curves.png into config.out; compares the loss step, in a table.

    Ctrl-C ends what is going on; the steps done until then are written.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        UnusableModel: a ValueError; see demo_task.load.
    """
    with threads(torch.get_num_threads() if config.model else 1):
        return train_and_report(config, Console(highlight=False))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's threads within. The new model is so small that a second one would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_and_report(config: DemoConfig, console: Console) -> int:
    """What run does; returns the exit status."""
    out, records = Path(config.out), []
    try:
        train_with_progress(config, console, records)
    except KeyboardInterrupt:
        report(config, console, records, interrupted=True)
        return INTERRUPTED
    report(config, console, records, interrupted=False)
    try:
        with console.status("Measuring the loss step at a vocabulary of 150k words"):
            comparison = compare_loss_steps()
    except KeyboardInterrupt:
        console.print("Interrupted while measuring; the log and the curves are complete.")
        return INTERRUPTED
    write_log(out / "log.json", config, records, interrupted=False, loss_step=comparison)
    print_comparison(console, comparison)
    return 0


def report(
    config: DemoConfig, console: Console, records: list[Record], *, interrupted: bool
) -> None:
    """Writes the log and the curves, and says what they say."""
    out = Path(config.out)
    summary = write_log(out / "log.json", config, records, interrupted=interrupted)["summary"]
    write_figure(out / "curves.png", records, config.kl)
    if interrupted:
        console.print(f"Interrupted after {len(records)} of {config.steps} steps.")
    if records:
        first, last = summary["first_mean_reward"], summary["last_mean_reward"]
        console.print(f"Mean reward: {first:.3f} at the start, {last:.3f} at the end.")
    console.print(f"Wrote {out / 'log.json'} and {out / 'curves.png'}.", soft_wrap=True)

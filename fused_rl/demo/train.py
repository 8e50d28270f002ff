"""The demo: GRPO on a small transformers model, from random weights to sorted digits.

One step: sample groups of answers with model.generate, score them, take their advantages within
each group, and make a few AdamW updates of linear_policy_loss on them. KL is measured towards a
frozen copy of the model as it was at the start. Several processes share prompts and weights.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fused_rl import KL, LMHead, LossOutput, PolicyLoss, TokenBatch, grpo, linear_policy_loss
from fused_rl.demo import ranks
from fused_rl.demo.comparison import compare_loss_steps, print_comparison
from fused_rl.demo.report import Config, Panel, Record, summarise, write_figure, write_log
from fused_rl.demo.rollout import Rollout, answer_logprobs, answer_states, sample, try_out
from fused_rl.demo.task import sample_problems, start
from fused_rl.rollouts.advantages import group_zscore_advantages
from fused_rl.system.outputs import try_folder
from fused_rl.system.signals import status_of, stop_behind, stoppable, stops

LOG, CURVES = "log.json", "curves.png"


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

    compares: ClassVar = True
    shown: ClassVar = {
        "reward": "reward {:.3f}",
        "kl": "KL {:.2f}",
        "entropy": "entropy {:.2f}",
        "clip_fraction": "clip {:.3f}",
        "tokens_per_second": "{:.0f} tok/s",
    }

    @property
    def panels(self) -> tuple[Panel, ...]:
        """The curves."""
        return (
            Panel("reward", "Reward", "mean of the step's answers", "#2a6fbb"),
            Panel("kl", f"KL to the initial model ({self.kl})", "nats per token", "#c8553d"),
            Panel("entropy", "Entropy of the policy", "nats per token", "#3a8f5c"),
            Panel("clip_fraction", "Clip fraction", "share of tokens", "#7a5ba8"),
        )

    def prepared(self, console: Console) -> Iterator[Record]:
        """The steps of the training, once the model is there."""
        ranks.can_share(self.prompts, ranks.world())
        model, tokenizer = start(self.model, self.temperature)
        if self.model:
            try_out(model, tokenizer, self.model, self.temperature)
        return train(model, tokenizer, self)

    def policy_loss(self) -> PolicyLoss:
        """GRPO with the KL that was asked for."""
        kl_grad = KL[self.kl_grad.upper()] if self.kl_grad else None
        return grpo(beta=self.beta, kl=KL[self.kl.upper()], kl_grad=kl_grad)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant; step counts from 1."""
        peak = self.learning_rate or (1e-5 if self.model else 4e-4)
        return peak * min(1.0, step / self.warmup_steps)


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    rows: Tensor,
    batch: TokenBatch,
    config: DemoConfig,
) -> LossOutput:
    """One step of the optimizer on the answers at rows, whose tokens are batch."""
    outputs: list[LossOutput] = []

    def formed() -> Tensor:
        hidden, head = answer_states(model, rollout, rows), LMHead.from_model(model)
        loss, temperature = config.policy_loss(), config.temperature
        outputs.append(linear_policy_loss(hidden, head, batch, loss, temperature=temperature))
        return outputs[0].loss

    loss = ranks.inside(model, formed)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    return outputs[0]


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DemoConfig
) -> Iterator[Record]:
    """Trains model in place; one record per step."""
    reference = ranks.shard(copy.deepcopy(model).requires_grad_(False))
    model = ranks.shard(model)
    ranks.seeded(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(1, config.steps + 1):
        began = time.perf_counter()
        ranks.hold_signals()
        optimizer.param_groups[0]["lr"] = config.learning_rate_at(step)
        problems = ranks.part(sample_problems(config.prompts, generator))
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
                batch = ranks.counted(batch)
                outputs.append(update(model, optimizer, rollout, rows, batch, config))
        yield ranks.of_all(record_of(step, rollout, outputs, time.perf_counter() - began))
        ranks.stop_together()


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


def progress_bar(console: Console, shown: dict[str, str]) -> Progress:
    """A bar with numbers of the last step: fields of its record, and how they are written."""
    numbers = " ".join(text.replace("{", f"{{task.fields[{name}]") for name, text in shown.items())
    columns = (BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn(numbers))
    return Progress(*columns, console=console, expand=True)


def train_with_progress(
    steps: Iterator[Record], config: Config, console: Console, records: list
) -> None:
    """Appends to records as it goes, so that they outlive whatever ends it."""
    with progress_bar(console, config.shown) as progress:
        task = progress.add_task("", total=config.steps, **dict.fromkeys(config.shown, 0.0))
        for record in steps:
            records.append(record)
            progress.update(task, advance=1, **{name: record[name] for name in config.shown})


def run(config: Config) -> int:
    """Trains; writes log.json and curves.png into config.out; compares the loss step, in a table,
    where the config says so.

    Ctrl-C, SIGTERM and SIGHUP end what is going on; the steps done until then are written.

    Returns:
        The exit status: 0; or 130, 143 or 129 after one of these.

    Raises:
        UnusableModel: a ValueError; see task.load.
        UnusableFolder: a ValueError; config.out cannot be written to.
        UnusableProcesses: a ValueError; processes that cannot share the prompts.
        Unwritable: it could be, at the start.
    """
    if ranks.is_first():
        try_folder(Path(config.out), LOG, CURVES)
    console = Console(highlight=False, markup=False, quiet=not ranks.is_first())
    with threads(torch.get_num_threads() if config.model else 1), stoppable(), ranks.joined():
        return train_and_report(config, console)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's threads within. The new model is so small that a second one would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_and_report(config: Config, console: Console) -> int:
    """What run does; returns the exit status."""
    torch.manual_seed(config.seed)
    steps = config.prepared(console)
    records: list[Record] = []
    stop = None
    try:
        train_with_progress(steps, config, console, records)
        stops.held = True
    except BaseException as error:
        stops.held = True
        stop = stop_behind(error)
        if stop is None:
            save(config, records)
            raise
    save(config, records)
    if stop:
        console.print(f"Interrupted after {len(records)} of {config.steps} steps.")
    say(config, console, records)
    if stop:
        return status_of(stop)
    if not config.compares or ranks.world() > 1:
        return 0
    try:
        stops.release()
        with console.status("Measuring the loss step at a vocabulary of 150k tokens"):
            comparison = compare_loss_steps()
    except KeyboardInterrupt as stop:
        stops.held = True
        console.print("Interrupted while measuring; the log and the curves are complete.")
        return status_of(stop)
    stops.held = True
    save_log(config, records, comparison)
    print_comparison(console, comparison)
    return 0


def save(config: Config, records: list[Record]) -> None:
    """Writes the log and the curves."""
    if not ranks.is_first():
        return
    save_log(config, records)
    write_figure(Path(config.out) / CURVES, records, config.panels)


def save_log(config: Config, records: list[Record], comparison: Any = None) -> None:
    """Writes the log; the run is over if it has all its steps."""
    interrupted = len(records) < config.steps
    path = Path(config.out) / LOG
    write_log(path, config, records, interrupted=interrupted, loss_step=comparison)


def say(config: Config, console: Console, records: list[Record]) -> None:
    """How the rewards went, and where the files are."""
    if records:
        summary = summarise(records)
        first, last = summary["first_mean_reward"], summary["last_mean_reward"]
        console.print(f"Mean reward: {first:.3f} at the start, {last:.3f} at the end.")
    log, curves = (Path(config.out) / name for name in (LOG, CURVES))
    console.print(f"Wrote {log} and {curves}.", soft_wrap=True)

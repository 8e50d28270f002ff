"""The demo on ranks."""

import copy
import json
import os
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fused_rl import TokenBatch
from fused_rl.demo import ranks, train
from fused_rl.demo.rollout import Rollout, answer_logprobs, sample
from fused_rl.demo.task import sample_problems, start
from fused_rl.demo.train import DemoConfig
from fused_rl.rollouts.advantages import group_zscore_advantages


def whole(model: nn.Module) -> list[torch.Tensor]:
    parameters = (p.detach() for p in model.parameters())
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]


def updated(model: Any, rollout: Rollout, rows: torch.Tensor) -> list[torch.Tensor]:
    """The weights after a step on these answers, by plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    advantages = group_zscore_advantages(rollout.rewards + torch.arange(8.0) / 9, 4)
    old = answer_logprobs(model, rollout, 1.0)
    batch = TokenBatch.padded(
        rollout.labels[rows],
        rollout.loss_mask[rows],
        advantages[rows],
        old_logprobs=old[rows],
        ref_logprobs=old[rows] - 0.1,
    )
    train.update(model, optimizer, rollout, rows, ranks.counted(batch), DemoConfig())
    return whole(model)


def update_of_all(rank: int, world: int) -> tuple[bool, float, float]:
    """Whether weights are sharded; how far those after an update of all ranks are from those after
    an update on all answers in one process, and how far that moved them.
    """
    torch.manual_seed(0)
    model, tokenizer = start(None, 1.0)
    problems = sample_problems(2, torch.Generator().manual_seed(0))
    alone, spread = copy.deepcopy(model), ranks.shard(copy.deepcopy(model))
    rollout = sample_alone(alone, tokenizer, [p for p in problems for _ in range(4)])
    joined = ranks.world
    ranks.world = lambda: 1
    expected = updated(alone, rollout, torch.arange(8))
    ranks.world = joined
    before = whole(spread)
    # Rank 0 has 5 of the answers.
    rows = torch.arange(5) if rank == 0 else torch.arange(5, 8)
    found = updated(spread, rollout, rows)
    sharded = all(isinstance(p, DTensor) for p in spread.parameters())
    gap = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    moved = max((a - b).abs().max().item() for a, b in zip(before, expected, strict=True))
    return sharded, gap, moved


def sample_alone(model: Any, tokenizer: Any, problems: list) -> Rollout:
    """The same on every rank."""
    torch.manual_seed(3)
    return sample(model, tokenizer, problems)


def run(rank: int, world: int, *, out: str, stopped: int | None = None, **options: Any) -> dict:
    """A run of the demo; in the second step the last rank may be told to stop."""
    steps = []
    original = train.record_of

    def record_of(step: int, *rest: Any) -> dict:
        steps.append(step)
        if step == stopped and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(step, *rest)

    train.record_of = record_of
    config = {"steps": 3, "prompts": 4, "group_size": 4, "out": out} | options
    assert config.keys() <= {field.name for field in fields(DemoConfig)}
    try:
        status = train.run(DemoConfig(**config))
    finally:
        train.record_of = original
    log = json.loads((Path(out) / "log.json").read_text()) if rank == 0 else None
    return {"status": status, "steps": steps, "log": log}


def uneven(rank: int, world: int, *, out: str) -> str:
    """What is said of prompts that cannot be shared."""
    try:
        train.run(DemoConfig(prompts=3, out=out))
    except ranks.UnusableProcesses as error:
        return str(error)
    return "nothing"

"""The demo on several processes of one group: data parallel over prompts, weights sharded by FSDP2.

Every process draws the same problems and answers its part of them. What runs on the sharded model
runs inside a call of it, which is where FSDP2 has its weights together, and counts are those of
all processes; so the gradient is that of one process which has all answers.
"""

import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fused_rl import TokenBatch, across
from fused_rl.system.signals import Stopped, stops

# A collective that waits longer waits for a process that is no more.
PATIENCE = timedelta(minutes=10)

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnusableProcesses(ValueError):
    """A number of processes that the prompts of a step cannot be shared among."""


def announced() -> int:
    """How many processes a launcher such as torchrun has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def rank() -> int:
    """Which process of the group this is, or, before there is one, what the launcher says."""
    return dist.get_rank() if is_joined() else int(os.environ.get("RANK", "0"))


def world() -> int:
    """The number of processes in the group."""
    return dist.get_world_size() if is_joined() else 1


def is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """The group that a launcher announces, for the length of a run; nothing without a launcher.

    A run that fails leaves the group as it is: the others hear of it when this process ends.
    """
    if announced() == 1 or is_joined():
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()


def can_share(prompts: int, processes: int) -> None:
    """Whether the prompts of a step are as many for each process.

    Raises:
        UnusableProcesses: they are not.
    """
    if prompts % processes:
        raise UnusableProcesses(
            f"the {prompts} prompts of a step cannot be shared among {processes} processes: take a "
            f"divisor of {prompts}"
        )


def part(items: Sequence[Item]) -> Sequence[Item]:
    """Those of this process."""
    count = len(items) // world()
    first = count * rank()
    return items[first : first + count]


def seeded(seed: int) -> None:
    """Samples of this process's own; in one process the global generator goes on as it is."""
    if world() > 1:
        torch.manual_seed((seed * world() + rank()) % 2**63)


def shard(model: nn.Module) -> nn.Module:
    """The model itself, in place: a unit of FSDP2 of each layer, and one of all the rest."""
    if world() == 1:
        return model
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module)
    fully_shard(model)
    model.run_inside = types.MethodType(lambda _, run: run(), model)
    register_fsdp_forward_method(model, "run_inside")
    return model


def inside(model: nn.Module, run: Callable[[], Result]) -> Result:
    """run(), where the weights of the model are whole."""
    return model.run_inside(run) if hasattr(model, "run_inside") else run()


def counted(batch: TokenBatch) -> TokenBatch:
    """The batch with the counts of all processes."""
    return across(batch) if world() > 1 else batch


def of_all(record: dict[str, float]) -> dict[str, float]:
    """The record of a step of all processes: means, and the sum of their tokens."""
    if world() == 1:
        return record
    values = torch.tensor(list(record.values()), dtype=torch.float64)
    dist.all_reduce(values)
    mean = dict(zip(record, (values / world()).tolist(), strict=True))
    sums = {name: mean[name] * world() for name in ("tokens", "tokens_per_second")}
    return mean | sums | {"step": record["step"]}


def hold_signals() -> None:
    """A signal waits for the end of the step, `stop_together`: a process that left in between would
    leave the others waiting.
    """
    stops.held = stops.held or world() > 1


def stop_together() -> None:
    """Between two steps: Stopped in every process if a signal has come to one of them."""
    if world() == 1:
        return
    number = torch.tensor(stops.waiting or 0)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    if number:
        raise Stopped(int(number))

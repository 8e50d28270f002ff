"""What a CUDA graph demands of a loss, without a GPU: no copy from the host, no question to it.

Tensors of the meta device stand for those of a GPU: they have no value to ask for. A number that is
made a tensor would be copied there, and no dispatcher sees it: the calls that do so are watched.
"""

import dataclasses

import pytest
import torch
from by_name import loss_of
from torch.overrides import TorchFunctionMode

from fused_rl import TokenBatch, TokenStats
from fused_rl.losses.named import NAMES

SHAPE = (4, 5)
# They choose as many tokens as a share of those that count: a number that is asked for.
ASKING = {"clip_cov", "kl_cov"}
COPIES = {"tensor", "as_tensor", "new_tensor", "from_numpy", "asarray"}


class Calls(TorchFunctionMode):
    """Names of the functions of torch that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def on_the_device() -> tuple[TokenStats, TokenBatch]:
    torch.manual_seed(0)
    logprobs = {f"{name}_logprobs": -torch.rand(SHAPE) for name in ("old", "ref", "rollout")}
    labels, mask = torch.randint(0, 9, SHAPE), torch.rand(SHAPE) < 0.7
    batch = TokenBatch.padded(labels, mask, torch.randn(4), **logprobs)
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    moved = {k: v.to("meta") for k, v in fields.items() if isinstance(v, torch.Tensor)}
    numbers = [torch.empty(batch.labels.numel(), device="meta") for _ in range(2)]
    return TokenStats(numbers[0].requires_grad_(), numbers[1]), dataclasses.replace(batch, **moved)


@pytest.mark.parametrize("name", sorted(set(NAMES) - ASKING))
def test_a_loss_copies_nothing_from_the_host(name):
    stats, batch = on_the_device()
    loss = loss_of(name)
    with Calls() as calls:
        output = loss(stats, batch)
        torch.autograd.grad(output.loss, stats.logprobs)
    assert "sum" in calls.names
    assert calls.names & COPIES == set()

"""The memory of a rank's part of a head, as the planner's tests compare it."""

import torch
import torch.distributed as dist

from fused_rl import Hidden, LMHead, TokenBatch, grpo, linear_policy_loss
from fused_rl.bench.clock import peak_extra_bytes

N, H, V = 512, 256, 32768


def peak(rank, world, hidden="REPLICATED", chunk_bytes=None):
    """Bytes of a step above those that were there; None where nobody can say."""
    g = torch.Generator().manual_seed(0)
    rows, how = V // world, Hidden[hidden]
    weight = (torch.randn(rows, H, generator=g) / 16).bfloat16().requires_grad_()
    labels = torch.randint(0, V, (N, 1), generator=g)
    batch = TokenBatch.padded(labels, torch.ones_like(labels), torch.ones(N))
    tokens = N // world if how is Hidden.SEQUENCE_SHARDED else N
    states = torch.randn(tokens, 1, H, generator=g).bfloat16().requires_grad_()
    head = LMHead(weight, group=dist.group.WORLD, vocabulary=V, hidden=how)

    def step():
        loss = linear_policy_loss(states, head, batch, grpo(), chunk_bytes=chunk_bytes).loss
        return torch.autograd.grad(loss, [states, weight])

    step()
    return peak_extra_bytes(step, "cpu")

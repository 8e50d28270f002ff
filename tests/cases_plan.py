"""The memory of a rank's part of a head, as the planner's tests compare it."""

import ctypes
import platform

import torch
import torch.distributed as dist

from fused_rl import Hidden, LMHead, TokenBatch, grpo, linear_policy_loss
from fused_rl.bench.clock import peak_extra_bytes

N, H, V = 512, 256, 32768
M_MMAP_THRESHOLD = -3  # of malloc.h


def peak(rank, world, hidden="REPLICATED", chunk_bytes=None):
    """Bytes of a step above those that were there; None where nobody can say.

    Every tensor gets pages of its own, which go back when it does. A heap with other cases behind
    it keeps some of what was freed: 8 MiB more, in one run of ten.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
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

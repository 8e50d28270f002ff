"""A GRPO step from hidden states to the loss and the gradients of hidden states and head."""

from functools import partial

import torch

from fused_rl.bench.peers import PEERS, Case
from fused_rl.bench.tasks import KINDS, NO_GRAD, head_task

SHAPES = ((1024, 1024, 32768), (256, 896, 151936))  # N, H, V
QUICK = (16, 16, 104)
PROVIDERS = (
    "fused_rl linear_policy_loss",
    "fused_rl linear_logprobs",
    *(name for name, peer in PEERS.items() if peer.trains),
)


def step(kind, N, H, V, device):
    return head_task(Case.make(N, H, V, torch.bfloat16, device), kind)


TASKS = {kind.name: partial(step, kind) for kind in KINDS if kind != NO_GRAD}


def test_grpo_step(gate_and_time):
    gate_and_time()

"""Log-probs and entropies from hidden states and the head, without gradient."""

import torch

from fused_rl.bench.peers import PEERS, Case
from fused_rl.bench.tasks import NO_GRAD, head_task

SHAPES = ((1024, 1024, 32768), (256, 896, 151936))  # N, H, V
QUICK = (16, 16, 104)
PROVIDERS = ("fused_rl", *(name for name, peer in PEERS.items() if peer.stats))


def no_gradient(N, H, V, device):
    return head_task(Case.make(N, H, V, torch.bfloat16, device), NO_GRAD)


TASKS = {"no_gradient": no_gradient}


def test_linear_logprobs(gate_and_time):
    gate_and_time()

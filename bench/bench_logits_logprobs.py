"""Log-probs and entropies from logits that are there, without and with their gradient."""

from functools import partial

import torch

from fused_rl.bench.ops import LOGITS_PEERS, logits_task

SHAPES = ((1024, 32768), (256, 151936))  # N, V
QUICK = (16, 104)
PEERS = LOGITS_PEERS
PROVIDERS = ("fused_rl", *PEERS)


def of_logits(trained, N, V, device):
    return logits_task(N, V, torch.bfloat16, device, trained)


TASKS = {"no_gradient": partial(of_logits, False), "with_gradient": partial(of_logits, True)}


def test_logits_logprobs(gate_and_time):
    gate_and_time()

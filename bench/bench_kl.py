"""k3 per token from log-probs, and its gradient."""

from fused_rl.bench.ops import KL_PEERS, kl_task

SHAPES = ((16384,), (1048576,))  # N
QUICK = (64,)
PEERS = KL_PEERS
PROVIDERS = ("fused_rl", *PEERS)
TASKS = {"k3": kl_task}


def test_kl(gate_and_time):
    gate_and_time()

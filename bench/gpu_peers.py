"""A peer that only a GPU has a use for, beside those of fused_rl.bench.peers."""

from __future__ import annotations

from torch import Tensor

from fused_rl.bench.peers import PEERS, Peer, Stats


def liger_scaled() -> Stats:
    """Liger's log-probs and entropies: CuTe kernels on Hopper, or else torch in chunks."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = Function.apply(hidden, weight, labels, 1.0, -100, 1, True)[:2]
        return -nll, entropy

    return run


EXTRA = {
    "liger scaled": Peer("Liger scaled CE", needs=("liger_kernel", "triton"), stats=liger_scaled)
}
PEERS |= EXTRA

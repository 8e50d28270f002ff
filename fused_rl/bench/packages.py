"""Functions of other packages under one signature, for the benchmark to run beside ours.

Each loader imports its package and returns (hidden [N, H], weight [V, H], labels [N]) ->
(logprobs [N], entropy [N] or None). ImportError or AttributeError where the package is not there or
has no such function.
"""

from collections.abc import Callable

from torch import Tensor

TRL_WORDS = 32768  # of the vocabulary at a time, as TRL's trainers ask for

Stats = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def trl_chunked(outputs: tuple[str, ...] = ("entropy",)) -> Stats:
    """The autograd function under TRL's trainers, from 1.16 on; outputs: beside log-probs."""
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        options = (None, labels, 1.0, TRL_WORDS, None, 1.0, outputs)
        return ChunkedLogProbFunction.apply(hidden, weight, *options)[:2]

    return run


def cut_cross_entropy() -> Stats:
    """Apple's cut-cross-entropy with its defaults: gradients below a threshold are left out."""
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none"), None

    return run


def quack() -> Stats:
    """QuACK's product and cross entropy; its chunked way has no result per token."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        return -linear_cross_entropy_func(hidden, weight, None, labels, reduction="none"), None

    return run


def liger_selective() -> Callable[[Tensor, Tensor], tuple[Tensor, None]]:
    """Liger's log-probs from logits, without gradient: (logits [1, N + 1, V], labels [N])."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    def run(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        return fused_selective_log_softmax(logits, labels[None], 1.0)[0], None

    return run

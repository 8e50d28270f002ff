"""What is known of each token: the numbers that pass from the expensive half to the cheap one."""

from typing import NamedTuple

from torch import Tensor

# The label of a token that does not count.
IGNORE_INDEX = -100


class TokenStats(NamedTuple):
    """Two numbers per token, in the shape of labels; float32, or float64 for float64 inputs."""

    logprobs: Tensor
    entropy: Tensor


class TopStats(NamedTuple):
    """Three numbers per token, in the shape of labels; float32, or float64 for float64 inputs."""

    logprobs: Tensor
    entropy: Tensor
    top_logprobs: Tensor


class DivergenceStats(NamedTuple):
    """Five numbers per token, in nats; float32, or float64 for float64 inputs.

    The cross-entropies are sums of these: of the student under the teacher, -sum_v s log t, the
    reverse KL and entropy; of the teacher under the student, the forward KL and teacher_entropy.
    """

    divergence: Tensor
    logprobs: Tensor | None  # of labels, under the student; None without labels
    entropy: Tensor
    teacher_logprobs: Tensor | None  # of labels, under the teacher
    teacher_entropy: Tensor

"""Layers for Hugging Face's `kernelize`, which binds their forward to a module of the user's own.

Such a layer has no state and no methods besides forward: it reads the weight and the bias of the
module whose forward it replaces.
"""

from torch import Tensor, nn

from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import linear_logprobs
from fused_rl.stats import TokenStats


class LinearLogProbs(nn.Module):
    """The forward of a linear head (weight [V, H], bias [V] or None) that scores given tokens.

    It stands in for any forward(self, hidden, labels, temperature) that returns log-probs and
    entropies. A head that scales or caps its logits is not one of them.
    """

    can_torch_compile = True
    has_backward = True

    weight: Tensor
    bias: Tensor | None

    def forward(
        self, hidden: Tensor, labels: Tensor, temperature: float | Tensor = 1.0
    ) -> TokenStats:
        """Log-probabilities of labels and entropies, without the logits; both differentiable.

        Args:
            hidden: [..., H], float16, bfloat16, float32 or float64.
            labels: [...], int64 or int32, in [0, V), or -100 for 0 and 0.
            temperature: a number, or a tensor that broadcasts to labels; positive. No gradient.

        Returns:
            TokenStats(logprobs, entropy), each in the shape of labels, float32 (float64 for float64
            inputs), in nats.

        Raises:
            ValueError: as linear_logprobs.
        """
        head = LMHead(self.weight, self.bias)
        return linear_logprobs(hidden, head, labels, temperature=temperature)

"""Liger's cross-entropy of scaled logits: what its users of log-probabilities call."""

from torch import Tensor

from fused_rl import linear_logprobs
from fused_rl.checks import require


class LigerFusedLinearScaledCrossEntropyFunction:
    """Negative log-probabilities and entropies, as apply() of positional arguments.

    It is no torch.autograd.Function itself; what apply returns is differentiable.
    """

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """linear_logprobs by Liger's options.

        Args:
            _input: [N, H]; weight: [V, H].
            target: [N] int64; ignore_index counts nowhere.
            temperature: what logits are divided by.
            m_tiles_per_cluster: accepted; it changes nothing here.
            return_entropy: whether the entropies are returned too.
            selected_token_ids: None.

        Returns:
            nll [N], or (nll [N], entropy [N]): float32, 0 where target is ignore_index.

        Raises:
            ValueError: selected_token_ids; as linear_logprobs raises.
        """
        require(
            selected_token_ids is None,
            lambda: (
                "selected_token_ids is not there yet: call linear_logprobs with each id as the "
                "label, or Liger's own function"
            ),
        )
        options = {"temperature": temperature, "ignore_index": ignore_index}
        logprobs, entropy = linear_logprobs(_input, weight, target, **options)
        return (-logprobs, entropy) if return_entropy else -logprobs

"""Liger's cross-entropy of scaled logits: what its users of log-probabilities call."""

from typing import Any

import torch
from torch import Tensor

from fused_rl import LMHead, linear_logprobs
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


class LigerFusedLinearScaledCrossEntropyTPFunction:
    """The same of a vocabulary that is split over the ranks of a group."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        tp_group: Any,
        temperature: float = 1.0,
        ignore_index: int = -100,
        tiles_per_reduce: int = 1,
        return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """linear_logprobs of a head with a group, by Liger's options; every rank calls it.

        Args:
            _input: [N, H], the same on every rank; its gradient is the whole one.
            weight: [V_r, H], this rank's rows, as many on every rank.
            target: [N] int64, of the whole vocabulary; ignore_index counts nowhere.
            tp_group: a torch.distributed.ProcessGroup; None: all ranks.
            temperature: what logits are divided by.
            tiles_per_reduce: accepted; it changes nothing here.
            return_entropy: whether the entropies are returned too.

        Returns:
            nll [N], or (nll [N], entropy [N]): float32, 0 where target is ignore_index.

        Raises:
            ValueError: as linear_logprobs raises.
        """
        group = torch.distributed.group.WORLD if tp_group is None else tp_group
        head = LMHead(weight, group=group)
        options = {"temperature": temperature, "ignore_index": ignore_index}
        logprobs, entropy = linear_logprobs(_input, head, target, **options)
        return (-logprobs, entropy) if return_entropy else -logprobs


def liger_fused_linear_scaled_cross_entropy_tp(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: Any,
    temperature: float = 1.0,
    ignore_index: int = -100,
    tiles_per_reduce: int = 1,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LigerFusedLinearScaledCrossEntropyTPFunction.apply, which says what these are."""
    return LigerFusedLinearScaledCrossEntropyTPFunction.apply(
        *(input, weight, target, tp_group, temperature),
        *(ignore_index, tiles_per_reduce, return_entropy),
    )

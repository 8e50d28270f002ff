"""Liger's cross-entropy of scaled logits: what its users of log-probabilities call."""

from typing import Any

import torch
from torch import Tensor

from fused_rl import LMHead, checks, linear_logprobs, linear_logprobs_at

# What counts nowhere beside selected ids: a number that cannot be meant as one of them.
_NOWHERE = torch.iinfo(torch.int64).min


class LigerFusedLinearScaledCrossEntropyFunction:
    """Negative log-probabilities, entropies, and the log-probabilities of further entries of the
    vocabulary, as apply() of positional arguments: one pass for all.

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
    ) -> Tensor | tuple[Tensor, ...]:
        """linear_logprobs by Liger's options; linear_logprobs_at where ids are selected.

        Args:
            _input: [N, H]; weight: [V, H].
            target: [N] int64; ignore_index counts nowhere.
            temperature: what logits are divided by.
            m_tiles_per_cluster: accepted; it changes nothing here.
            return_entropy: whether the entropies are returned too.
            selected_token_ids: [K] int64 or int32 in [0, V), the same for every token, in any order
                and more than once; None: none. That they are, and targets, is looked at, which on
                CUDA waits for the device.

        Returns:
            nll [N], with entropy [N], with log-probabilities [N, K] of selected_token_ids, by what
            is asked for: float32, or float64 for float64 inputs; 0 where target is ignore_index.

        Raises:
            ValueError: selected_token_ids that are not [K], or outside [0, V); as linear_logprobs
                raises.
        """
        if selected_token_ids is None:
            options = {"temperature": temperature, "ignore_index": ignore_index}
            logprobs, entropy = linear_logprobs(_input, weight, target, **options)
            return (-logprobs, entropy) if return_entropy else -logprobs
        checks.is_labels(target)
        checks.leading_shape("_input", _input, target)
        _check_selected(selected_token_ids, weight)
        counted = target != ignore_index
        _is_inside("target", target.where(counted, 0), weight)
        selected = selected_token_ids.expand(*target.shape, -1)
        ids = torch.cat([target[..., None], selected], -1).long()
        ids = ids.where(counted[..., None], _NOWHERE)
        logprobs, _, entropy = linear_logprobs_at(
            _input, weight, ids, temperature=temperature, ignore_index=_NOWHERE
        )
        nll, selected = -logprobs[..., 0], logprobs[..., 1:]
        return (nll, entropy, selected) if return_entropy else (nll, selected)


def _check_selected(selected_token_ids: Tensor, weight: Tensor) -> None:
    checks.is_indices("selected_token_ids", selected_token_ids)
    checks.require(
        selected_token_ids.dim() == 1,
        lambda: f"selected_token_ids must have shape [K], got {list(selected_token_ids.shape)}",
    )
    checks.same_device(selected_token_ids=selected_token_ids, weight=weight)
    _is_inside("selected_token_ids", selected_token_ids, weight)


def _is_inside(name: str, ids: Tensor, weight: Tensor) -> None:
    """ValueError at the first id outside the vocabulary of weight [V, H]."""
    if torch.compiler.is_compiling() or not checks.has_values(ids):
        return
    wrong = ((ids < 0) | (ids >= len(weight))).nonzero()
    checks.require(
        len(wrong) == 0,
        lambda: (
            f"{name} must be in [0, {len(weight)}), got {int(ids[tuple(wrong[0])])} "
            f"at index {wrong[0].tolist()}"
        ),
    )


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

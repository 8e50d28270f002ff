"""Liger's KTO: sequences that are judged one by one."""

import torch
from torch import Tensor

from fused_rl import links, preference
from fused_rl.checks import is_tensor, require
from fused_rl.integrations.liger.preference import Output, Tokens, reference_of, score_of
from fused_rl.stats import IGNORE_INDEX


class LigerFusedLinearKTOFunction:
    """The function behind LigerFusedLinearKTOLoss, as apply() of positional arguments.

    It is no torch.autograd.Function itself; what apply returns is differentiable.
    """

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        preference_labels: Tensor | None,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> Output:
        """mean of sigmoid(beta (kl - r)) of the chosen, sigmoid(beta (r - kl)) of the rejected.

        r = S - R, the log-probs of a sequence by the policy and by the reference. The mean is over
        all B sequences, be they chosen or rejected, with or without tokens.

        Args:
            _input: [B, T, H]; weight: [V, H]; bias: [V] or None.
            target: [B, T] int64; ignore_index counts nowhere.
            preference_labels: [B] bool or 0/1: True is chosen.
            ref_input, ref_weight, ref_bias: as the policy's, of the reference; no gradient.
            kl: [], [1] or, one per sequence, [B], without gradient; None: 0.
            use_ref_model: False: R = 0. Mind that the module's default is False.
            average_log_prob: whether S and R are means over tokens.
            compiled, chunk_size: accepted; they change nothing here.

        Returns:
            (loss [], aux): sums over the chosen, and over the rejected, of their log-probs, of
            their logits (at all places, padding too) and of their rewards beta r, [] each, without
            gradient.

        Raises:
            ValueError: no preference_labels; no reference where use_ref_model asks for one; tensors
                that do not fit; as linear_logprobs raises.
        """
        tokens = Tokens.of(_input, weight, target, bias, ignore_index)
        chosen = _flags(preference_labels, len(target))
        reference = reference_of(use_ref_model, ref_input, ref_weight, ref_bias)
        batch = preference.PreferenceBatch.padded(
            *(tokens.labels, tokens.scored),
            desirable=chosen,
            ref_logprobs=tokens.ref_logprobs(reference),
        )
        link = links.Sigmoid()
        loss = preference.PreferenceLoss(score_of(beta, average_log_prob, reference), link)
        stats = tokens.stats()
        _, sequences, rewards, _ = loss.judged(stats, batch)
        beyond = rewards - beta * _per_sequence(kl, rewards)
        losses = torch.where(chosen, link.chosen(beyond), link.rejected(beyond))
        value = losses.sum() / max(len(losses), 1)
        logps = sequences.mean if average_log_prob else sequences.sum
        logits = tokens.logits() * target.shape[1] * len(weight)
        sums = (
            t.detach()[rows].sum() for t in (logps, logits, rewards) for rows in (chosen, ~chosen)
        )
        dtype = stats.logprobs.dtype
        return value.to(dtype), tuple(t.to(dtype) for t in sums)


liger_fused_linear_kto = LigerFusedLinearKTOFunction.apply
"""Liger's name for it among its functions."""


class LigerFusedLinearKTOLoss(torch.nn.Module):
    """KTO straight from hidden states, from a KL that the caller has estimated.

    Args:
        ignore_index: tokens with this label count nowhere.
        beta: of the log-ratios.
        compiled, chunk_size: accepted; they change nothing here.
        use_ref_model: False: the reference's log-probs are 0.
        average_log_prob: whether log-probs of sequences are means over their tokens.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> Output:
        """(loss [], aux); arguments as LigerFusedLinearKTOFunction.apply has them."""
        return LigerFusedLinearKTOFunction.apply(
            *(_input, lin_weight, target, preference_labels, bias),
            *(ref_input, ref_weight, ref_bias, kl, self.ignore_index, self.beta),
            *(self.compiled, self.use_ref_model, self.average_log_prob, self.chunk_size),
        )


def _flags(preference_labels: Tensor | None, B: int) -> Tensor:
    """[B] bool."""
    is_tensor("preference_labels", preference_labels)
    require(
        preference_labels.shape == (B,) and not preference_labels.is_floating_point(),
        lambda: (
            f"preference_labels must be [{B}] bool or 0/1, got {list(preference_labels.shape)} of "
            f"{preference_labels.dtype}"
        ),
    )
    return preference_labels != 0


def _per_sequence(kl: Tensor | None, like: Tensor) -> Tensor | float:
    """[], [1] or [B] in the dtype of like [B]."""
    if kl is None:
        return 0.0
    kl = torch.as_tensor(kl, dtype=like.dtype, device=like.device).detach()
    B = len(like)
    require(
        kl.shape in ((), (1,), (B,)),
        lambda: f"kl must be [], [1] or, one per sequence, [{B}], got {list(kl.shape)}",
    )
    return kl

"""Liger's ORPO: the odds ratio of pairs, without a reference.

preference.py says what goes in and what is returned.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_rl import links, preference, scores
from fused_rl.checks import is_not_negative
from fused_rl.integrations.liger.preference import Output, Tokens, of_pairs
from fused_rl.stats import IGNORE_INDEX


class LigerFusedLinearORPOFunction:
    """The function behind LigerFusedLinearORPOLoss, as apply() of positional arguments.

    It is no torch.autograd.Function itself; what apply returns is differentiable.
    """

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        nll_target: Tensor | None = None,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> Output:
        """NLL - beta mean log sigmoid(log odds_w - log odds_l), odds = P / (1 - P).

        P = exp(s), s the mean log-prob of a sequence's tokens.

        Args:
            _input: [2 P, T, H]; weight: [V, H]; bias: [V] or None.
            target: [2 P, T] int64; ignore_index counts nowhere.
            beta: weight of the odds ratio's term.
            compute_nll_loss: whether the NLL is added.
            nll_target: [2 P, T] int64: what the NLL counts of the chosen, the prompts too; None:
                target. Tokens whose label is not target's cost a pass of their own.
            compiled, chunk_size: accepted; they change nothing here.

        Returns:
            (loss [], aux), see preference.py, and two more: the means over pairs of
            log sigmoid(log odds_w - log odds_l), and of what the sigmoid is of.

        Raises:
            ValueError: an odd number of sequences; nll_target of another shape; options out of
                their range; as linear_logprobs raises.
        """
        is_not_negative("beta", beta)
        loss = preference.PreferenceLoss(scores.LogOdds(), links.Logistic(), beta)
        tokens = Tokens.of(_input, weight, target, bias, ignore_index)
        if nll_target is not None:
            tokens = tokens.with_nll(nll_target, ignore_index)
        likelihood = 1.0 if compute_nll_loss else None
        pairs = of_pairs(tokens, loss, averaged=True, likelihood=likelihood)
        chosen, rejected = pairs.scores
        count = max(len(chosen), 1)
        means = (t.sum() / count for t in (logsigmoid(chosen - rejected), chosen - rejected))
        rewards = (beta * logps for logps in pairs.reported[:2])
        reported = (*pairs.reported, *rewards, *means)
        return pairs.loss, tuple(t.to(pairs.loss.dtype) for t in reported)


liger_fused_linear_orpo = LigerFusedLinearORPOFunction.apply
"""Liger's name for it among its functions."""


class LigerFusedLinearORPOLoss(torch.nn.Module):
    """ORPO straight from hidden states: the NLL of the chosen, and the odds ratio's term.

    Args:
        ignore_index: tokens with this label count nowhere.
        beta: weight of the odds ratio's term.
        compute_nll_loss: whether the NLL, its mean over the chosen ones' tokens, is added.
        compiled, chunk_size: accepted; they change nothing here.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Output:
        """(loss [], aux); arguments as LigerFusedLinearORPOFunction.apply has them."""
        return LigerFusedLinearORPOFunction.apply(
            *(_input, lin_weight, target, bias, self.ignore_index, self.beta),
            *(self.compute_nll_loss, nll_target, self.compiled, self.chunk_size),
        )

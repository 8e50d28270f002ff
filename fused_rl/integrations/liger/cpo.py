"""Liger's losses of pairs without a reference, by log-probs: CPO and SimPO.

preference.py says what goes in and what is returned.
"""

import torch
from torch import Tensor

from fused_rl import links, preference
from fused_rl.checks import is_number
from fused_rl.integrations.liger.preference import (
    Output,
    Tokens,
    likelihood_of,
    of_pairs,
    score_of,
    smoothing_of,
)
from fused_rl.stats import IGNORE_INDEX


class LigerFusedLinearCPOFunction:
    """The function behind LigerFusedLinearCPOLoss, as apply() of positional arguments.

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
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> Output:
        """mean -log sigmoid(beta (S_w - S_l)) + alpha NLL, S the log-probs of sequences.

        Args:
            _input: [2 P, T, H]; weight: [V, H]; bias: [V] or None.
            target: [2 P, T] int64; ignore_index counts nowhere.
            label_smoothing: the share of pairs that are taken to be labelled wrongly, in [0, 1).
            compute_nll_loss: False: no NLL, whatever alpha.
            average_log_prob: whether S is the mean over tokens.
            compiled, chunk_size: accepted; they change nothing here.

        Returns:
            (loss [], aux), see preference.py.

        Raises:
            ValueError: an odd number of sequences; options out of their range; as linear_logprobs
                raises.
        """
        link = links.Logistic(smoothing_of(label_smoothing))
        score = score_of(beta, average_log_prob, None)
        loss = preference.PreferenceLoss(score, link)
        options = {"likelihood": likelihood_of(alpha, compute_nll_loss)}
        tokens = Tokens.of(_input, weight, target, bias, ignore_index)
        return of_pairs(tokens, loss, averaged=average_log_prob, **options).output


liger_fused_linear_cpo = LigerFusedLinearCPOFunction.apply
"""Liger's name for it among its functions."""


class LigerFusedLinearCPOLoss(torch.nn.Module):
    """CPO straight from hidden states: a preference term and the NLL of the chosen.

    Args:
        ignore_index: tokens with this label count nowhere.
        beta: of the log-probs; alpha: weight of the NLL, its mean over the chosen ones' tokens.
        label_smoothing: the share of pairs that are taken to be labelled wrongly.
        compute_nll_loss: False: no NLL, whatever alpha.
        compiled, chunk_size: accepted; they change nothing here.
        average_log_prob: whether log-probs of sequences are means over their tokens.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Output:
        """(loss [], aux); arguments as LigerFusedLinearCPOFunction.apply has them."""
        return LigerFusedLinearCPOFunction.apply(
            *(_input, lin_weight, target, bias, self.ignore_index, self.beta, self.alpha),
            *(self.label_smoothing, self.compute_nll_loss, self.compiled),
            *(self.average_log_prob, self.chunk_size),
        )


class LigerFusedLinearSimPOFunction:
    """The function behind LigerFusedLinearSimPOLoss, as apply() of positional arguments.

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
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> Output:
        """mean -log sigmoid(beta (s_w - s_l) - gamma) + alpha NLL, s the mean log-prob of tokens.

        The NLL is off unless compute_nll_loss asks for it: mind that the module's default does.

        Args:
            gamma: the margin by which the chosen are to score higher.
            All others: as of LigerFusedLinearCPOFunction.

        Returns:
            (loss [], aux), see preference.py.

        Raises:
            ValueError: an odd number of sequences; options out of their range; as linear_logprobs
                raises.
        """
        is_number("gamma", gamma)
        link = links.Logistic(smoothing_of(label_smoothing), gamma)
        score = score_of(beta, True, None)
        loss = preference.PreferenceLoss(score, link)
        options = {"likelihood": likelihood_of(alpha, compute_nll_loss)}
        tokens = Tokens.of(_input, weight, target, bias, ignore_index)
        return of_pairs(tokens, loss, averaged=True, **options).output


liger_fused_linear_simpo = LigerFusedLinearSimPOFunction.apply
"""Liger's name for it among its functions."""


class LigerFusedLinearSimPOLoss(torch.nn.Module):
    """SimPO straight from hidden states, and by default the NLL of the chosen beside it.

    SimPO has no such term (arXiv 2405.14734, eq. 6). Liger's module adds it unless it is told not
    to, with a weight of 1 beside a beta of 0.1, and its default is kept: give
    compute_nll_loss=False for SimPO.

    Args:
        ignore_index: tokens with this label count nowhere.
        beta: of the mean log-probs; mind the default, which is Liger's: SimPO's is 2 and more.
        alpha: weight of the NLL, its mean over the chosen ones' tokens.
        label_smoothing: the share of pairs that are taken to be labelled wrongly.
        compute_nll_loss: False: no NLL, whatever alpha.
        compiled, chunk_size: accepted; they change nothing here.
        gamma: the margin by which the chosen are to score higher.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.gamma = gamma
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Output:
        """(loss [], aux); arguments as LigerFusedLinearSimPOFunction.apply has them."""
        return LigerFusedLinearSimPOFunction.apply(
            *(_input, lin_weight, target, bias, self.ignore_index, self.beta, self.alpha),
            *(self.label_smoothing, self.compute_nll_loss, self.compiled),
            *(self.gamma, self.chunk_size),
        )

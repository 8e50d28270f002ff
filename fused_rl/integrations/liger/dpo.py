"""Liger's DPO and what it calls its loss types: pairs, with a reference or without.

preference.py says what goes in and what is returned.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_rl import links, preference
from fused_rl.checks import is_number, require
from fused_rl.integrations.liger.preference import (
    Output,
    Tokens,
    likelihood_of,
    of_pairs,
    reference_of,
    score_of,
)
from fused_rl.stats import IGNORE_INDEX

# The links that have no option, and the power of beta that they are multiplied by: IPO and SPPO
# regress log-ratios, not beta times log-ratios.
_LINKS = {
    "sigmoid": (links.Logistic(), 0),
    "hinge": (links.Hinge(), 0),
    "ipo": (links.Squared(0.5), -2),
    "nca_pair": (links.NCA(), 0),
    "bco_pair": (links.CrossEntropy(), 0),
    "sppo_hard": (links.Regression(0.5), -2),
    "apo_zero": (links.Sigmoid(), 0),
    "apo_down": (links.SigmoidDown(), 0),
}
_SMOOTHED = ("robust", "exo_pair")
_LOSS_TYPES = (*_LINKS, *_SMOOTHED, "discopop")


def _link(loss_type: str, label_smoothing: float, discopop_tau: float) -> tuple[Callable, int]:
    """The link by its name, and the power of beta that it is multiplied by."""
    # In Liger's words, which its users may look for.
    require(
        loss_type in _LOSS_TYPES,
        lambda: f"Unsupported loss_type: {loss_type!r}, not one of {', '.join(_LOSS_TYPES)}",
    )
    is_number("label_smoothing", label_smoothing)
    smoothing = label_smoothing
    if loss_type == "robust":
        require(
            0 <= smoothing < 0.5,
            lambda: (
                f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust', got {smoothing}"
            ),
        )
        return links.Robust(smoothing), 0
    if loss_type == "exo_pair":
        require(
            0 < smoothing < 1,
            lambda: (
                "label_smoothing must be > 0 for loss_type='exo_pair', 1e-3 say, and below 1, got "
                f"{smoothing}"
            ),
        )
        return links.EXO(smoothing), 0
    require(
        smoothing == 0,
        lambda: (
            f"label_smoothing is of loss_type 'robust' and 'exo_pair', got {smoothing} for "
            f"{loss_type!r}; cDPO is fused_rl.preference.dpo(beta, smoothing={smoothing})"
        ),
    )
    if loss_type == "discopop":
        require(discopop_tau > 0, lambda: f"discopop_tau must be positive, got {discopop_tau}")
        return links.DiscoPOP(discopop_tau), 0
    return _LINKS[loss_type]


class LigerFusedLinearDPOFunction:
    """The function behind LigerFusedLinearDPOLoss, as apply() of positional arguments.

    It is no torch.autograd.Function itself; what apply returns is differentiable.
    """

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        alpha: float = 1.0,
    ) -> Output:
        """mean -log sigmoid(beta (r_w - r_l)) + alpha NLL, or another loss_type's.

        r = S - R, the log-probs of a sequence by the policy and by the reference.

        Args:
            _input: [2 P, T, H]; weight: [V, H]; bias: [V] or None.
            target: [2 P, T] int64; ignore_index counts nowhere.
            ref_input, ref_weight, ref_bias: as the policy's, of the reference; no gradient.
            compute_nll_loss: False: no NLL, whatever alpha.
            use_ref_model: False: R = 0.
            average_log_prob: whether S and R are means over tokens.
            compiled, chunk_size: accepted; they change nothing here.
            loss_type: what LigerFusedLinearDPOLoss names.
            label_smoothing: of "robust" and "exo_pair"; discopop_tau: of "discopop".

        Returns:
            (loss [], aux), see preference.py.

        Raises:
            ValueError: no reference where use_ref_model asks for one; an odd number of sequences;
                options that do not go together or are out of their range; as linear_logprobs
                raises.
        """
        link, power = _link(loss_type, label_smoothing, discopop_tau)
        reference = reference_of(use_ref_model, ref_input, ref_weight, ref_bias)
        # IPO is of log-ratios per token.
        score = score_of(beta, average_log_prob or loss_type == "ipo", reference)
        loss = preference.PreferenceLoss(score, link, beta**power)
        options = {"averaged": average_log_prob, "reference": reference}
        options["likelihood"] = likelihood_of(alpha, compute_nll_loss)
        tokens = Tokens.of(_input, weight, target, bias, ignore_index)
        return of_pairs(tokens, loss, **options).output


liger_fused_linear_dpo = LigerFusedLinearDPOFunction.apply
"""Liger's name for it among its functions."""


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """DPO and its kin straight from hidden states, with the reference's as well.

    Args:
        ignore_index: tokens with this label count nowhere.
        beta: of the log-ratios; alpha: weight of the NLL, its mean over the chosen ones' tokens.
        compute_nll_loss: False: no NLL, whatever alpha.
        compiled, chunk_size: accepted; they change nothing here.
        use_ref_model: False: the reference's log-probs are 0.
        average_log_prob: whether log-probs of sequences are means over their tokens.
        loss_type: "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
            "apo_zero", "apo_down", "discopop", and "ipo", of log-ratios per token, which Liger has
            not.
        label_smoothing: of "robust" the share of labels that are flipped, of "exo_pair" what the
            rejected one is given.
        discopop_tau: the temperature of "discopop".

    Raises:
        ValueError: a loss_type that is none of these; label_smoothing out of its range, or for
            another loss_type.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        _link(loss_type, label_smoothing, discopop_tau)
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Output:
        """(loss [], aux); arguments as LigerFusedLinearDPOFunction.apply has them."""
        return LigerFusedLinearDPOFunction.apply(
            *(_input, lin_weight, target, bias, ref_input, ref_weight, ref_bias),
            *(self.ignore_index, self.beta, self.compute_nll_loss, self.compiled),
            *(self.use_ref_model, self.average_log_prob, self.chunk_size, self.loss_type),
            *(self.label_smoothing, self.discopop_tau, self.alpha),
        )

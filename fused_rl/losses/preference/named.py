"""Preference losses that have a name: DPO and its kin, and those without a reference.

Each is a PreferenceLoss of parts in scores.py and links.py, called as loss(stats, batch) or given
to linear_preference_loss. A docstring is the formula, the name and its paper, and what TRL 1.16
calls it; docs/preference.md is made of them.

For each pair of chosen w and rejected l: S the log-prob of a sequence, n its tokens, R the
reference's log-prob, r = S - R, D = r_w - r_l, s sigmoid; means are over pairs. num_pairs is the
number of pairs of the whole step, num_tokens that of the likelihood term's tokens; None: of the
batch.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from fused_rl import checks
from fused_rl.losses.means import Count
from fused_rl.losses.preference.links import (
    EXO,
    NCA,
    CrossEntropy,
    DiscoPOP,
    Hinge,
    Logistic,
    Regression,
    Robust,
    Sigmoid,
    SigmoidDown,
    Squared,
)
from fused_rl.losses.preference.loss import Loss, Point, PreferenceLoss, WeightedSum
from fused_rl.losses.preference.points import BatchMean, MismatchedMean
from fused_rl.losses.preference.scores import (
    AlphaMeanLogProb,
    LogOdds,
    LogProb,
    LogRatio,
    MeanLogProb,
    MeanLogRatio,
    Ranked,
    RankedMargins,
)
from fused_rl.losses.preference.weights import WPOWeight


def dpo(
    beta: float = 0.1, *, smoothing: float = 0.0, num_pairs: Count | None = None
) -> PreferenceLoss:
    """mean -log s(beta D): DPO (arXiv 2305.18290, eq. 7).

    smoothing e: mean -(1 - e) log s(beta D) - e log s(-beta D), cDPO.
    Elsewhere: TRL DPO "sigmoid", which leaves label_smoothing out.
    """
    return PreferenceLoss(LogRatio(beta), Logistic(smoothing), num_pairs=num_pairs)


def robust(
    beta: float = 0.1, *, smoothing: float = 0.1, num_pairs: Count | None = None
) -> PreferenceLoss:
    """mean (-(1 - e) log s(beta D) + e log s(-beta D)) / (1 - 2 e): robust DPO (arXiv 2403.00409).

    smoothing: e, the share of labels that are flipped. Elsewhere: TRL DPO "robust".
    """
    return PreferenceLoss(LogRatio(beta), Robust(smoothing), num_pairs=num_pairs)


def hinge(beta: float = 0.1, *, num_pairs: Count | None = None) -> PreferenceLoss:
    """mean max(1 - beta D, 0): SLiC's link on DPO's scores, RSO (arXiv 2309.06657).

    Elsewhere: TRL DPO "hinge".
    """
    return PreferenceLoss(LogRatio(beta), Hinge(), num_pairs=num_pairs)


def ipo(beta: float = 0.1, *, num_pairs: Count | None = None) -> PreferenceLoss:
    """mean (r_w / n_w - r_l / n_l - 1 / (2 beta))^2: IPO (arXiv 2310.12036, eq. 17), per token.

    Elsewhere: TRL DPO "ipo".
    """
    return PreferenceLoss(MeanLogRatio(beta), Squared(0.5), beta**-2, num_pairs=num_pairs)


def exo(
    beta: float = 0.1, *, smoothing: float = 1e-3, num_pairs: Count | None = None
) -> PreferenceLoss:
    """mean KL of (s(beta D), s(-beta D)) from (1 - e, e): EXO-pref (arXiv 2402.00856, eq. 16).

    smoothing: e, above 0. Elsewhere: TRL DPO "exo_pair".
    """
    return PreferenceLoss(LogRatio(beta), EXO(smoothing), num_pairs=num_pairs)


def nca(beta: float = 0.1, *, num_pairs: Count | None = None) -> PreferenceLoss:
    """mean -log s(b r_w) - (log s(-b r_w) + log s(-b r_l)) / 2, b = beta: NCA (arXiv 2402.05369).

    Elsewhere: TRL DPO "nca_pair".
    """
    return PreferenceLoss(LogRatio(beta), NCA(), num_pairs=num_pairs)


def bco_pair(
    beta: float = 0.1, *, shift: Point = 0.0, num_pairs: Count | None = None
) -> PreferenceLoss:
    """mean -log s(beta r_w - shift) - log s(shift - beta r_l): BCO of pairs (arXiv 2404.04656).

    shift: a number, a tensor that the caller updates, or preference.BatchMean().
    Elsewhere: TRL DPO "bco_pair", whose shift is 0.
    """
    return PreferenceLoss(LogRatio(beta), CrossEntropy(), point=shift, num_pairs=num_pairs)


def sppo(beta: float = 0.1, *, num_pairs: Count | None = None) -> PreferenceLoss:
    """mean (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: SPPO (arXiv 2405.00675, eq. 4.7).

    With wins that are certain. Elsewhere: TRL DPO "sppo_hard".
    """
    return PreferenceLoss(LogRatio(beta), Regression(0.5), beta**-2, num_pairs=num_pairs)


def aot(
    beta: float = 0.1, *, smoothing: float = 0.0, num_pairs: Count | None = None
) -> PreferenceLoss:
    """mean -(1 - e) log s(beta d) - e log s(-beta d), d = sort(S_w - S_l) - sort(R_w - R_l): AOT.

    Paired (arXiv 2406.05882). The batch is ranked as a whole: micro-batches are another loss.
    Elsewhere: TRL DPO "aot".
    """
    return PreferenceLoss(RankedMargins(beta), Logistic(smoothing), num_pairs=num_pairs)


def aot_unpaired(
    beta: float = 0.1, *, smoothing: float = 0.0, num_pairs: Count | None = None
) -> PreferenceLoss:
    """mean -(1 - e) log s(beta d) - e log s(-beta d), d = sort(r_w) - sort(r_l): AOT.

    Unpaired (arXiv 2406.05882), of as many chosen as rejected ones; the batch is ranked as a whole.
    Elsewhere: TRL DPO "aot_unpaired".
    """
    return PreferenceLoss(Ranked(beta), Logistic(smoothing), num_pairs=num_pairs)


def apo_zero(beta: float = 0.1, *, num_pairs: Count | None = None) -> PreferenceLoss:
    """mean s(-beta r_w) + s(beta r_l): APO-zero (arXiv 2408.06266, eq. 7).

    For chosen answers that are better than the model's. Elsewhere: TRL DPO "apo_zero".
    """
    return PreferenceLoss(LogRatio(beta), Sigmoid(), num_pairs=num_pairs)


def apo_down(beta: float = 0.1, *, num_pairs: Count | None = None) -> PreferenceLoss:
    """mean s(beta r_w) + s(-beta D): APO-down (arXiv 2408.06266, eq. 8).

    For chosen answers that are worse than the model's. Elsewhere: TRL DPO "apo_down".
    """
    return PreferenceLoss(LogRatio(beta), SigmoidDown(), num_pairs=num_pairs)


def discopop(
    beta: float = 0.1, *, temperature: float = 0.05, num_pairs: Count | None = None
) -> PreferenceLoss:
    """mean -s(-m / t) log s(m) + s(m / t) e^-m, m = beta D: DiscoPOP (arXiv 2406.08414, eq. 5).

    temperature: t. Elsewhere: TRL DPO "discopop", discopop_tau.
    """
    return PreferenceLoss(LogRatio(beta), DiscoPOP(temperature), num_pairs=num_pairs)


def dpo_norm(beta: float = 0.1, *, num_pairs: Count | None = None) -> PreferenceLoss:
    """mean -log s(beta (r_w / n_w - r_l / n_l)): DPO of log-ratios per token (arXiv 2411.15124).

    Elsewhere: TRL DPO "sigmoid_norm".
    """
    return PreferenceLoss(MeanLogRatio(beta), Logistic(), num_pairs=num_pairs)


def f_dpo(
    derivative: Callable[[Tensor], Tensor],
    beta: float = 0.1,
    *,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """mean -log s(beta (f'(e^r_w) - f'(e^r_l))): DPO under another divergence (arXiv 2309.16240).

    derivative: f' as a function of r: scores.ForwardKL(), JensenShannon(), Alpha(alpha).
    Elsewhere: TRL DPO f_divergence_type.
    """
    checks.is_callable("derivative", derivative, "fused_rl.scores.ForwardKL()")
    return PreferenceLoss(LogRatio(beta, derivative), Logistic(), num_pairs=num_pairs)


def ld_dpo(alpha: float, beta: float = 0.1, *, num_pairs: Count | None = None) -> PreferenceLoss:
    """mean -log s(beta D), tokens beyond the shorter answer's length weighing alpha: LD-DPO.

    arXiv 2409.06411: alpha below 1 takes from the longer answer what its length alone gives it.
    Elsewhere: TRL DPO ld_alpha.
    """
    return PreferenceLoss(LogRatio(beta), Logistic(), tail=alpha, num_pairs=num_pairs)


def wpo(beta: float = 0.1, *, num_pairs: Count | None = None) -> PreferenceLoss:
    """mean -q_w q_l log s(beta D), q without gradient: WPO (arXiv 2406.11827, eq. 2).

    q = exp(mean_t log(p / sum_v p^2)), so that pairs count as the policy would sample them. Costs a
    pass more, without gradients. Elsewhere: TRL DPO use_weighting.
    """
    return PreferenceLoss(LogRatio(beta), Logistic(), weight=WPOWeight(), num_pairs=num_pairs)


def rpo(
    beta: float = 0.1,
    *,
    likelihood: float = 1.0,
    num_pairs: Count | None = None,
    num_tokens: Count | None = None,
) -> PreferenceLoss:
    """mean -log s(beta D) + likelihood NLL: DPO that holds the chosen up (arXiv 2404.19733).

    NLL: the mean over the chosen ones' tokens. Elsewhere: TRL DPO "sigmoid" and "sft".
    """
    counts = {"num_pairs": num_pairs, "num_tokens": num_tokens}
    return PreferenceLoss(LogRatio(beta), Logistic(), likelihood=likelihood, **counts)


def sft(*, num_tokens: Count | None = None) -> PreferenceLoss:
    """NLL, the mean over the chosen ones' tokens of -log p: a part of mixtures.

    Elsewhere: TRL DPO "sft".
    """
    return PreferenceLoss(LogProb(1.0), Logistic(), coef=0.0, likelihood=1.0, num_tokens=num_tokens)


def mixture(parts: Sequence[tuple[float, Loss]]) -> WeightedSum:
    """sum_i weight_i loss_i, of (weight, loss) each: MPO (arXiv 2411.10442) is one.

    mixture([(0.8, dpo()), (0.2, bco_pair()), (1.0, sft())]). Elsewhere: TRL DPO loss_weights.
    """
    checks.require(
        isinstance(parts, Sequence) and not isinstance(parts, str),
        lambda: f"parts must be a list of (weight, loss), got {checks.shown(parts)}",
    )
    return WeightedSum(tuple(parts))


def simpo(
    beta: float = 2.0, *, gamma: float = 1.0, smoothing: float = 0.0, num_pairs: Count | None = None
) -> PreferenceLoss:
    """mean -log s(beta S_w / n_w - beta S_l / n_l - gamma): SimPO (arXiv 2405.14734, eq. 6).

    Without a reference, and so without a KL of any kind. Elsewhere: TRL CPO "simpo", cpo_alpha=0.
    """
    return PreferenceLoss(MeanLogProb(beta), Logistic(smoothing, gamma), num_pairs=num_pairs)


def cpo(
    beta: float = 0.1,
    *,
    likelihood: float = 1.0,
    smoothing: float = 0.0,
    num_pairs: Count | None = None,
    num_tokens: Count | None = None,
) -> PreferenceLoss:
    """mean -log s(beta (S_w - S_l)) + likelihood NLL: CPO (arXiv 2401.08417).

    Without a reference. Elsewhere: TRL CPO "sigmoid", cpo_alpha.
    """
    counts = {"num_pairs": num_pairs, "num_tokens": num_tokens}
    return PreferenceLoss(LogProb(beta), Logistic(smoothing), likelihood=likelihood, **counts)


def alphapo(
    beta: float = 2.0,
    *,
    alpha: float = 0.25,
    gamma: float = 1.0,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """mean -log s(a_w - a_l - gamma), a = beta (1 - e^(-alpha S / n)) / alpha: AlphaPO.

    arXiv 2501.03884; alpha of 0 is SimPO. Elsewhere: TRL CPO "simpo" with alpha.
    """
    score = AlphaMeanLogProb(beta, alpha)
    return PreferenceLoss(score, Logistic(margin=gamma), num_pairs=num_pairs)


def orpo(
    beta: float = 0.1, *, num_pairs: Count | None = None, num_tokens: Count | None = None
) -> PreferenceLoss:
    """NLL - beta mean log s(log odds_w - log odds_l): ORPO (arXiv 2403.07691, eq. 6).

    odds = P / (1 - P), P = e^(S / n). The NLL is the mean over the chosen ones' tokens, by
    likelihood_mask over prompts too, as TRL has it. Elsewhere: TRL ORPO.
    """
    counts = {"num_pairs": num_pairs, "num_tokens": num_tokens}
    return PreferenceLoss(LogOdds(), Logistic(), beta, likelihood=1.0, **counts)


def kto(
    beta: float = 0.1,
    *,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    point: Point | None = None,
    num_sequences: Count | None = None,
) -> PreferenceLoss:
    """mean of desirable s(z0 - beta r), undesirable s(beta r - z0): KTO (arXiv 2402.01306).

    Of single answers, without pairs; the mean is over all that are judged. z0 = beta max(mean r, 0)
    over the batch's mismatched sequences of all ranks, without gradient; `point`, a number or a
    tensor, takes its place. Elsewhere: TRL KTO "kto".
    """
    z0 = MismatchedMean() if point is None else point
    link = Sigmoid(desirable, undesirable)
    return PreferenceLoss(LogRatio(beta), link, point=z0, num_pairs=num_sequences)


def apo_zero_unpaired(
    beta: float = 0.1,
    *,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    num_sequences: Count | None = None,
) -> PreferenceLoss:
    """mean of desirable s(-beta r), undesirable s(beta r): APO-zero of single answers.

    arXiv 2408.06266, eq. 7. Elsewhere: TRL KTO "apo_zero_unpaired".
    """
    link = Sigmoid(desirable, undesirable)
    return PreferenceLoss(LogRatio(beta), link, num_pairs=num_sequences)


def bco(
    beta: float = 0.1, *, shift: Point | None = None, num_sequences: Count | None = None
) -> PreferenceLoss:
    """mean of -log s(beta r - shift), -log s(shift - beta r): BCO of single answers.

    arXiv 2404.04656. shift: a number, or a tensor in which the caller keeps a running mean; None:
    the batch's mean score, over all ranks, without gradient.
    """
    point = BatchMean() if shift is None else shift
    return PreferenceLoss(LogRatio(beta), CrossEntropy(), point=point, num_pairs=num_sequences)


NAMES = {
    loss.__name__: loss
    for loss in (
        *(dpo, robust, hinge, ipo, exo, nca, bco_pair, sppo, aot, aot_unpaired, apo_zero),
        *(apo_down, discopop, dpo_norm, f_dpo, ld_dpo, wpo, rpo, sft, mixture),
        *(simpo, cpo, alphapo, orpo, kto, apo_zero_unpaired, bco),
    )
}
"""Every loss that has a name, by it."""

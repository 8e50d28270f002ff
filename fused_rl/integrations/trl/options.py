"""What TRL's trainers are configured to optimise, as a loss of ours and what is added to it.

With loss_type and importance_sampling_level of GRPOConfig:

    loss_type    surrogate     mean
    grpo         Clip          SequenceMean
    sapo         SAPO          SequenceMean
    luspo        Clip          SequenceSumMean
    dr_grpo      Clip          FixedLengthMean(max_completion_length)
    bnpo         Clip          MicroBatchMean
    dapo         Clip          TokenMean, of the step
    cispo        CISPO         TokenMean, of the step
    vespo        VESPO         TokenMean, of the step; its ratio is RolloutRatio at either level

    level        ratio             of the KL, with use_bias_correction_kl
    token        TokenRatio        Level.TOKEN
    sequence     GeometricRatio    Level.GEOMETRIC

RLOOTrainer has one loss, fused_rl.rloo, and its KL in the reward.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.means import FixedLengthMean, SequenceMean, SequenceSumMean, TokenMean
from fused_rl.losses.named import rloo
from fused_rl.losses.penalties import KLPenalty
from fused_rl.losses.policy import Loss, PolicyLoss
from fused_rl.losses.ratios import GeometricRatio, ProductRatio, TokenRatio
from fused_rl.losses.sequences import Level
from fused_rl.losses.surrogates import CISPO, SAPO, VESPO, Clip, Reinforce, Surrogate

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*_CLIPPED, "cispo", "sapo", "vespo")
_RATIOS = {
    "token": (TokenRatio(), Level.TOKEN),
    "sequence": (GeometricRatio(), Level.GEOMETRIC),
}
# Within which TRL holds the log-ratios of VESPO's tokens, and the logs of vLLM's ratios.
_LEAST, _MOST = math.log(1e-8), 20.0


@dataclass(frozen=True)
class MicroBatchMean(TokenMean):
    """TokenMean of each micro-batch by itself, as TRL's bnpo has it: FusedLoss takes TokenMean()
    for that of the step.
    """


@dataclass(frozen=True, eq=False)
class RolloutRatio:
    """The log-ratio of whole sequences as TRL forms VESPO's: every token's held within +-20, and
    added to it what vLLM's importance ratios say of the sequence.

    offset: [B] or None: the sums of the logs of those ratios.
    """

    offset: Tensor | None = None

    token_separable = False

    @classmethod
    def of(cls, ratios: Tensor | None) -> "RolloutRatio":
        """From vLLM's importance ratios, [B, T]."""
        if ratios is None:
            return cls()
        return cls(ratios.log().clamp(_LEAST, _MOST).sum(-1))

    def __call__(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        total = batch.at_level(log_ratio.clamp(-_MOST, _MOST), Level.PRODUCT)
        return total if self.offset is None else total + self.offset[batch.sequence]


@dataclass(frozen=True)
class Kind:
    """What FusedLoss has to know of a trainer of TRL.

    config: the name of its config, for errors.
    loss: trainer -> the loss that it is configured to optimise.
    accumulates: whether its _compute_loss divides by the number of micro-batches; else the Trainer
        of transformers does.
    by_token: whether a batch has log-probs of the old policy and of the reference at each token,
        not the sums of the old policy alone.
    """

    config: str
    loss: Callable[[Any], PolicyLoss]
    accumulates: bool
    by_token: bool


def _of_grpo(trainer: Any) -> PolicyLoss:
    kind, level = read(trainer, "loss_type"), read(trainer, "importance_sampling_level")
    for option, value, known in (
        ("loss_type", kind, LOSS_TYPES),
        ("importance_sampling_level", level, tuple(_RATIOS)),
    ):
        if value not in known:
            raise ValueError(
                f"GRPOConfig.{option}={value!r} is none that FusedGRPOTrainer knows "
                f"({', '.join(known)}): give policy_loss, or train TRL's own loss within patched()"
            )
    ratio, of_level = _RATIOS[level]
    args = read(trainer, "args")
    corrected = read(args, "use_bias_correction_kl")
    return PolicyLoss(
        surrogate=_surrogate(kind, trainer, args),
        ratio=RolloutRatio() if kind == "vespo" else ratio,
        kl=KLPenalty(read(trainer, "beta"), importance=of_level if corrected else None),
        mean=_mean(kind, trainer),
    )


def _surrogate(kind: str, trainer: Any, args: Any) -> Surrogate:
    if kind == "sapo":
        return SAPO(read(args, "sapo_temperature_pos"), read(args, "sapo_temperature_neg"))
    if kind == "vespo":
        k, rate = (
            [read(args, f"vespo_{name}_{sign}") for sign in ("pos", "neg")]
            for name in ("k", "lambda")
        )
        # TRL's least lambda.
        return VESPO(k[0], max(rate[0], 1e-4), k[1], max(rate[1], 1e-4))
    high = read(trainer, "epsilon_high")
    if kind == "cispo":
        return CISPO(0.0, high)
    return Clip(read(trainer, "epsilon_low"), high, delta=read(args, "delta"))


def _mean(kind: str, trainer: Any) -> Callable[[TokenBatch], Tensor]:
    if kind in ("grpo", "sapo"):
        return SequenceMean()
    if kind == "luspo":
        return SequenceSumMean()
    if kind == "dr_grpo":
        return FixedLengthMean(read(trainer, "max_completion_length"))
    return MicroBatchMean() if kind == "bnpo" else TokenMean()


def _of_rloo(trainer: Any) -> PolicyLoss:
    bounds = {f"clip_{side}": read(trainer, f"epsilon_{side}") for side in ("low", "high")}
    return rloo(**bounds)


_KINDS = {
    "GRPOTrainer": Kind("GRPOConfig", _of_grpo, accumulates=True, by_token=True),
    "RLOOTrainer": Kind("RLOOConfig", _of_rloo, accumulates=False, by_token=False),
}


def kind_of(trainer: Any, owner: type) -> tuple[Kind, bool]:
    """The kind of a trainer, and whether its loss is TRL's own.

    owner: the class of ours, behind which TRL's are in the order of resolution.

    Raises:
        RuntimeError: no such trainer, or one that does not form its loss where TRL 1.15 and 1.16
            do.
    """
    behind = type(trainer).__mro__[type(trainer).__mro__.index(owner) + 1 :]
    known = next((c for c in behind if c.__name__ in _KINDS), None)
    forms = next((c for c in behind if "_compute_loss" in vars(c)), None)
    asks = any("_get_per_token_logps_and_entropies" in vars(c) for c in behind)
    if known is None or forms is None or not asks:
        lacks = "_get_per_token_logps_and_entropies" if known and forms else "_compute_loss"
        lacks = lacks if known else "trl.GRPOTrainer or trl.RLOOTrainer among its bases"
        raise moved(f"{behind[0].__name__} has no {lacks}")
    return _KINDS[known.__name__], forms is known


def read(owner: Any, name: str) -> Any:
    """An attribute of TRL's.

    Raises:
        RuntimeError: it is not there.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise moved(f"{type(owner).__name__} has no attribute {name}") from None


def moved(what: str) -> RuntimeError:
    """What is said of a TRL that is not as we know it."""
    import trl

    return RuntimeError(
        f"TRL {trl.__version__} is not one whose loss fused_rl can form: its {what}. Versions 1.15 "
        "and 1.16 are known to work; use one of them, or TRL's trainer within patched()"
    )


def is_possible(loss: Loss, trainer: Any, kind: Kind) -> None:
    """A policy_loss that a trainer's batches have all of the numbers for.

    Raises:
        ValueError: they have not.
    """
    weight = getattr(getattr(loss, "kl", None), "beta", 0)
    pulls = isinstance(weight, Tensor) or weight != 0
    if pulls and not kind.by_token:
        raise ValueError(
            f"policy_loss has a KL penalty, but the KL of {kind.config}.beta is in the reward, and "
            "batches have no log-probs of the reference: set beta there, and none in policy_loss"
        )
    if pulls and trainer.beta == 0:
        raise ValueError(
            f"policy_loss has a KL penalty, but {kind.config}.beta is 0 and there is no reference "
            "model: set it to anything else, the weight is that of policy_loss"
        )
    if kind.by_token or without_ratio(loss):
        return
    ratio = getattr(loss, "ratio", None)
    if not isinstance(ratio, (ProductRatio, GeometricRatio)):
        raise ValueError(
            f"batches of {kind.config} have log-probs of the old policy for whole completions, not "
            "for their tokens: policy_loss must be a PolicyLoss with ratio=ProductRatio() or "
            f"GeometricRatio(), or surrogate=Reinforce(), got {ratio!r}"
        )


def without_ratio(loss: Loss) -> bool:
    """Whether a loss looks at no old log-probs."""
    return isinstance(getattr(loss, "surrogate", None), Reinforce)


def entropy_coef(trainer: Any) -> float:
    """The weight of the entropy bonus at this step, as TRL's controller has left it."""
    coef = getattr(trainer, "entropy_coef", 0.0)
    if not getattr(trainer, "use_adaptive_entropy", False):
        return coef
    low = read(trainer, "_last_world_entropy") <= read(read(trainer, "args"), "entropy_target")
    return coef if low else 0.0


class Masks:
    """TRL's masks of what the policy is taught by: they need the numbers of all tokens first.

    Both are formed by the trainer's own methods, over the tokens of all processes where they do so.
    """

    def __init__(self, trainer: Any, inputs: dict[str, Any], mask: Tensor) -> None:
        self.trainer, self.inputs, self.mask = trainer, inputs, mask
        self.quantile = getattr(trainer, "top_entropy_quantile", 1.0)
        self.threshold = getattr(trainer, "off_policy_mask_threshold", None)

    def __bool__(self) -> bool:
        return self.quantile < 1.0 or self.threshold is not None

    @torch.no_grad()
    def __call__(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] bool each, of log-probs and entropies [B, T]: which surrogates count, and which
        entropies in the bonus.
        """
        of_entropy = self.mask.bool()
        if self.quantile < 1.0:
            of_entropy = self.trainer.get_high_entropy_mask(entropy, self.mask, 1 - self.quantile)
        if self.threshold is None:
            return of_entropy, of_entropy
        advantages, old = self.inputs["advantages"], self.inputs.get("old_per_token_logps")
        sampling = self.inputs.get("sampling_per_token_logps", logprobs if old is None else old)
        keep = self.trainer.get_off_policy_mask(
            advantages=advantages[:, None] if advantages.dim() == 1 else advantages,
            per_token_logps=logprobs,
            sampling_per_token_logps=sampling,
            mask=self.mask,
            off_policy_threshold=self.threshold,
        )
        return of_entropy & keep.bool(), of_entropy

"""verl's names on our functions; and those of OpenRLHF and prime-rl, which have a seam like it.

```python
from fused_rl.integrations import verl

logprobs, entropy = verl.linear_cross_entropy(hidden, weight, labels, 0.7)
kl = verl.kl_penalty(logprobs, ref_logprobs, "k3+")
pg_loss, metrics = verl.policy_losses["vanilla"](
    old_logprobs, logprobs, advantages, response_mask, "token-mean", config
)
```

With verl installed, `patch()` puts our head in the place of both of its fused ones and adds our
losses to its registry as "fused_vanilla", "fused_gspo" and so on; `unpatch()` takes all of it back.
Nothing of verl is imported before.

What differs from verl, on purpose: logits and entropies are float32 throughout; k3 keeps its value
and its gradient where log(ref / policy) exceeds 2.6, where verl's clamp at 10 has neither, up to
a log-ratio of 20; fully masked sequences count nowhere; a masked token may be anything.

Signatures: verl/utils/kernel/linear_cross_entropy.py, verl/utils/experimental/torch_functional.py
and verl/trainer/ppo/core_algos.py of verl 0.8; openrlhf/models/utils.py; prime_rl/trainer/models/
layers/lm_head.py. None of the three was run with this module: the tests hold it to their formulas.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_rl import kl, named
from fused_rl.batch import TokenBatch
from fused_rl.kl import KL
from fused_rl.logprobs import TokenStats, linear_logprobs, logprobs_from_logits
from fused_rl.means import FixedLengthMean, SequenceMean, SequenceSumMean, TokenMean
from fused_rl.policy import PolicyLoss

_ESTIMATORS = {
    "kl": KL.K1,
    "k1": KL.K1,
    "abs": KL.ABS,
    "mse": KL.K2,
    "k2": KL.K2,
    "low_var_kl": KL.K3,
    "k3": KL.K3,
}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (not their negatives, despite the name) and entropies, as verl has them.

    Args:
        hidden: [..., H].
        weight: [V, H].
        labels: [...] int64 or int32.
        temperature: a number, or a tensor that broadcasts to labels.
        reduction: of the log-probabilities: "none", "sum" or "mean"; entropies are per token.
        dist_process_group: None.

    Returns:
        (logprobs [...] or [], entropy [...]), float32.

    Raises:
        NotImplementedError: a dist_process_group.
        ValueError: another reduction; as linear_logprobs raises.
    """
    if dist_process_group is not None:
        raise NotImplementedError(
            "dist_process_group: the head over a vocabulary that is split between ranks "
            "(LMHead with a group) is not there yet; gather the weight and pass None"
        )
    reductions = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}
    if reduction not in reductions:
        raise ValueError(f"reduction must be one of {list(reductions)}, got {reduction!r}")
    logprobs, entropy = linear_logprobs(hidden, weight, labels, temperature=temperature)
    return reductions[reduction](logprobs), entropy


class FusedLinearForPPO(torch.nn.Module):
    """verl's module of the same name; it has no parameters.

    Args:
        chunk_size: how many tokens' logits are held at once where a way needs them.
    """

    def __init__(self, chunk_size: int = 512) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,  # [T, H] or [B, T, H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [T] or [B, T]: the labels
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy), float32 in the shape of input_ids."""
        return _by_tokens(hidden_states, vocab_weights, input_ids, temperature, self.chunk_size)


def _by_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor, tokens: int
) -> TokenStats:
    """linear_logprobs with its buffer given in tokens."""
    return linear_logprobs(
        hidden, weight, labels, temperature=temperature, chunk_bytes=tokens * weight.shape[0] * 4
    )


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """The KL of the policy to the reference by verl's names, per token.

    Args:
        logprob: [...]: of the policy.
        ref_logprob: [...]: of the reference.
        kl_penalty: "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3"; with a "+" after it,
            the same value with the gradient of k2.

    Returns:
        [...], float32, or float64 for float64 inputs.

    Raises:
        NotImplementedError: "full", which needs the whole distributions.
        ValueError: another name.
    """
    if kl_penalty == "full":
        raise NotImplementedError('kl_penalty "full" needs logits of both models, not log-probs')
    name = kl_penalty.removesuffix("+")
    if name not in _ESTIMATORS or kl_penalty.count("+") > 1:
        raise ValueError(
            f'kl_penalty must be one of {list(_ESTIMATORS)}, or that with "+", got {kl_penalty!r}'
        )
    grad = KL.K2 if kl_penalty.endswith("+") else None
    return kl.kl_penalty(logprob, ref_logprob, value=_ESTIMATORS[name], grad=grad)


PolicyLossFn = Callable[..., tuple[Tensor, dict[str, float]]]


def policy_loss_fn(compose: Callable[[Any], PolicyLoss]) -> PolicyLossFn:
    """A function for verl's registry of policy losses.

    The mean of the PolicyLoss is replaced by the one that loss_agg_mode names. Counts of the whole
    step come from config.global_batch_info, where verl puts them.

    Args:
        compose: verl's actor config -> PolicyLoss.
    """

    def compute(
        old_log_prob: Tensor,  # [B, T]
        log_prob: Tensor,  # [B, T]
        advantages: Tensor,  # [B, T]
        response_mask: Tensor,  # [B, T] bool or 0/1
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # [B, T]
    ) -> tuple[Tensor, dict[str, float]]:
        """(the loss, what to log under verl's names)."""
        mask = response_mask.bool()
        info = getattr(config, "global_batch_info", None) or {}
        loss = replace(compose(config), mean=_mean(loss_agg_mode, mask, **info))
        batch = TokenBatch.padded(
            torch.zeros_like(mask, dtype=torch.int64),
            mask,
            advantages,
            old_logprobs=old_log_prob,
            weights=rollout_is_weights,
        )
        output = loss(TokenStats(log_prob, torch.zeros_like(log_prob)), batch)
        moved = (old_log_prob - log_prob.detach()).where(mask, 0)
        metrics = {
            "actor/ppo_kl": moved.sum() / batch.num_tokens.clamp(min=1),
            "actor/pg_clipfrac": output.metrics["clip_fraction_high"]
            + output.metrics["clip_fraction_low"],
        }
        return output.loss, {name: value.item() for name, value in metrics.items()}

    return compute


def _mean(
    loss_agg_mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Callable[[TokenBatch], Tensor]:
    """The mean that loss_agg_mode names; parameters as of verl's agg_loss.

    Sequences are those with a counted token. "seq-mean-token-sum-norm" is a mean over them too.
    """
    tokens = None if batch_num_tokens is None else batch_num_tokens / dp_size
    local = mask.any(dim=-1).sum()
    sequences = local if global_batch_size is None else global_batch_size / dp_size
    means = {
        "token-mean": lambda: TokenMean(tokens),
        "seq-mean-token-mean": lambda: SequenceMean(sequences),
        "seq-mean-token-sum": lambda: SequenceSumMean(sequences),
        "seq-mean-token-sum-norm": lambda: FixedLengthMean(
            loss_scale_factor or mask.shape[-1], sequences
        ),
    }
    if loss_agg_mode not in means:
        raise ValueError(f"loss_agg_mode must be one of {list(means)}, got {loss_agg_mode!r}")
    return means[loss_agg_mode]()


def _bounds(config: Any) -> dict[str, float]:
    """The clip's bounds: each side's own, else clip_ratio."""
    sides = {"clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high"}
    own = {side: getattr(config, name, None) for side, name in sides.items()}
    return {side: config.clip_ratio if bound is None else bound for side, bound in own.items()}


def _vanilla(config: Any) -> PolicyLoss:
    return named.ppo(**_bounds(config), dual=getattr(config, "clip_ratio_c", 3.0))


def _cispo(config: Any) -> PolicyLoss:
    bounds = _bounds(config)
    return named.cispo(ratio_min=1 - bounds["clip_low"], ratio_max=1 + bounds["clip_high"])


def _sapo(config: Any) -> PolicyLoss:
    return named.sapo(tau_positive=config.tau_pos, tau_negative=config.tau_neg)


policy_losses = MappingProxyType(
    {
        "vanilla": policy_loss_fn(_vanilla),
        "gspo": policy_loss_fn(lambda config: named.gspo_token(**_bounds(config))),
        "geo_mean": policy_loss_fn(lambda config: named.gmpo(**_bounds(config))),
        "cispo": policy_loss_fn(_cispo),
        "sapo": policy_loss_fn(_sapo),
        "gpg": policy_loss_fn(lambda config: named.gpg()),
    }
)
"""By verl's names. Where verl ignores loss_agg_mode (gspo: seq-mean-token-mean, geo_mean: the mean
over sequences) these heed it: pass "seq-mean-token-mean"."""


# Where verl has what, and what stands there while it is patched.
_HEADS = {
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"): linear_cross_entropy,
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"): FusedLinearForPPO,
}
_REGISTRY = ("verl.trainer.ppo.core_algos", "POLICY_LOSS_REGISTRY")

_replaced: list[tuple[ModuleType, str, object]] = []


def patch() -> None:
    """Our head in verl's place, and our losses in its registry as "fused_<name>", until `unpatch`.

    Models whose forward has been patched by verl look the head up when they are called, and change
    over. A second call does nothing.

    Raises:
        RuntimeError: verl is not installed, or has not these names in these places.
    """
    if _replaced:
        return
    found = [(_found(*place), ours) for place, ours in _HEADS.items()]
    registry = _found(*_REGISTRY)
    for theirs, ours in found:
        for module, name in _holders(theirs):
            _replaced.append((module, name, theirs))
            setattr(module, name, ours)
    registry.update({f"fused_{name}": loss for name, loss in policy_losses.items()})


def unpatch() -> None:
    """Everything as it was before `patch`: the very objects."""
    if not _replaced:
        return
    for module, name, theirs in _replaced:
        setattr(module, name, theirs)
    _replaced.clear()
    registry = _found(*_REGISTRY)
    for name in policy_losses:
        registry.pop(f"fused_{name}", None)


def _found(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise RuntimeError(f"{module} cannot be imported: is verl installed? {error}") from error
    except AttributeError as error:
        version = getattr(sys.modules.get("verl"), "__version__", "of unknown version")
        raise RuntimeError(f"verl {version} has no {name} in {module}: it has moved") from error


def _holders(thing: object) -> list[tuple[ModuleType, str]]:
    """Every name in verl's modules that is bound to it."""
    modules = [m for n, m in sys.modules.items() if n.partition(".")[0] == "verl"]
    return [
        (module, name)
        for module in modules
        if isinstance(module, ModuleType)
        for name, value in vars(module).items()
        if value is thing
    ]


# OpenRLHF and prime-rl.


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """OpenRLHF's function of this name: [...] from logits [..., V], which are left as they are.

    Returns:
        [...], float32, or float64 for float64 logits; OpenRLHF's of bfloat16 logits is bfloat16.
    """
    return logprobs_from_logits(logits, labels, temperature=temperature).logprobs


class FusedOutputLinear(torch.nn.Linear):
    """prime-rl's head, which takes the place of a model's lm_head and returns log-probabilities.

    Entropies have a gradient, which prime-rl's refuse.

    Args:
        in_features: H.
        out_features: V.
        chunk_size: how many tokens' logits are held at once where a way needs them.
    """

    def __init__(self, in_features: int, out_features: int, chunk_size: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, H]
        labels: Tensor | None = None,  # [B, T]
        temperature: Tensor | None = None,  # [B, T]
    ) -> dict[str, Tensor]:
        """{"logprobs": [B, T], "entropy": [B, T]}, float32.

        Raises:
            ValueError: no labels or no temperature, which the signature alone allows.
        """
        if labels is None or temperature is None:
            raise ValueError("FusedOutputLinear needs labels and a temperature per token, got None")
        stats = _by_tokens(hidden_states, self.weight, labels, temperature, self.chunk_size)
        return stats._asdict()

"""verl's KL of the policy to the reference, by verl's names.

From hidden states, without logits, the exact KL is fused_rl.linear_divergence.
"""

from torch import Tensor, cat, log_softmax
from torch.utils.checkpoint import checkpoint

from fused_rl import reference
from fused_rl.checks import require
from fused_rl.kl import estimators
from fused_rl.kl.estimators import KL

# Logits that are in float32 at once: 64 MiB of each model's.
_LOGITS = 2**24
_ESTIMATORS = {
    "kl": KL.K1,
    "k1": KL.K1,
    "abs": KL.ABS,
    "mse": KL.K2,
    "k2": KL.K2,
    "low_var_kl": KL.K3,
    "k3": KL.K3,
}


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """The KL of the policy to the reference by verl's names, per token.

    Args:
        logprob: [...]: of the policy. For "full" its logits, [B, T, V].
        ref_logprob: [...]: of the reference. For "full" its logits, [B, T, V].
        kl_penalty: "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3"; with a "+" after it,
            the same value with the gradient of k2. "full" is the exact KL of the distributions,
            which verl has the name and no formula for; it has its own gradient.

    Returns:
        [...], of "full" [B, T]: float32, or float64 for float64 inputs.

    Raises:
        ValueError: another name; "full" of anything but logits [B, T, V] of both models.
    """
    if kl_penalty == "full":
        return _full(logprob, ref_logprob)
    name = kl_penalty.removesuffix("+")
    if name not in _ESTIMATORS or kl_penalty.count("+") > 1:
        raise ValueError(
            f'kl_penalty must be one of {list(_ESTIMATORS)}, or that with "+", got {kl_penalty!r}'
        )
    grad = KL.K2 if kl_penalty.endswith("+") else None
    return estimators.kl_penalty(logprob, ref_logprob, value=_ESTIMATORS[name], grad=grad)


def _full(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy, reference), [B, T], from logits [B, T, V]; formed again for gradients."""
    require(
        logits.dim() == 3 and logits.shape == ref_logits.shape,
        lambda: (
            'kl_penalty "full" needs logits [B, T, V] of both models, not log-probs [B, T], got '
            f"{list(logits.shape)} and {list(ref_logits.shape)}"
        ),
    )
    V = logits.shape[-1]
    rows = max(_LOGITS // max(V, 1), 1)
    pairs = zip(*(z.reshape(-1, V).split(rows) for z in (logits, ref_logits)), strict=True)
    parts = [checkpoint(_of_rows, *pair, use_reentrant=False) for pair in pairs]
    return cat(parts).reshape(logits.shape[:2])


def _of_rows(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """[n], by terms whose sum does not cancel where the two are near."""
    pair = reference.Pair.of(*(log_softmax(z, -1) for z in reference.promoted(logits, ref_logits)))
    g, of_reference = reference.slopes(pair, reference.REVERSE, 0.0)
    infinite = reference.is_infinite(pair.d, reference.REVERSE, 0.0).any(-1)
    return (g + of_reference).sum(-1).masked_fill(infinite, float("inf"))

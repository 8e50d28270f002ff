"""TRL's function of log-probs, by our head."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fused_rl.integrations.trl.gathered import averaged
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import linear_top_logprobs
from fused_rl.linear.mean_logits import mean_logits
from fused_rl.ops import in_full
from fused_rl.reference import logits

_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Logits that are held at once for what needs all of them: 64 MiB of float32.
_LOGITS = 2**24

# What a trainer of ours does in place of log-probs: (hidden [N, H], head, temperature) -> [N].
InHead = Callable[[Tensor, LMHead, float], Tensor]
in_head: ContextVar[InHead | None] = ContextVar("fused_rl_in_head", default=None)
# Whether calls go to TRL's function meanwhile.
with_theirs: ContextVar[bool] = ContextVar("fused_rl_with_theirs", default=False)


class FusedHead:
    """Stands where TRL's autograd function stood, and is called as that was, by `apply`."""

    def __init__(self, original: Any, names: tuple[str, ...]) -> None:
        self.original = original
        self.names = names

    def apply(self, *args: Any) -> tuple[Tensor | None, ...]:
        """What the original returns: (logprobs [N], entropy [N]), and more where it says more."""
        given = dict(zip(self.names, args, strict=False))
        hidden, targets, temperature = given["hidden"], given["targets"], given["temperature"]
        softcap = given.get("final_logit_softcapping")
        scale = given.get("logit_scale", 1.0)
        outputs = given.get("outputs", _OUTPUTS if "outputs" in self.names else _OUTPUTS[:2])
        if with_theirs.get():
            return self.original.apply(*args)
        weight, bias = averaged(given["weight"]), averaged(given.get("bias"))
        head = LMHead(weight, bias, scale, softcap)
        if form := in_head.get():
            logprobs = form(hidden, head, temperature)
            entropy = top = torch.zeros_like(logprobs)
        else:
            logprobs, entropy, top = linear_top_logprobs(
                hidden, head, targets, temperature=temperature
            )
        if "outputs" not in self.names:
            return logprobs, entropy
        entropy = entropy if "entropy" in outputs else None
        is_top1 = logprobs == top if "is_top1" in outputs else None
        squares = mean = None
        if "log_sum_sq_probs" in outputs or ("mean_logits" in outputs and softcap is not None):
            squares, mean = _of_all_logits(hidden, head, temperature)
        elif "mean_logits" in outputs:
            mean = mean_logits(hidden, head) / temperature
        squares = squares if "log_sum_sq_probs" in outputs else None
        mean = mean if "mean_logits" in outputs else None
        return logprobs, entropy, squares, mean, is_top1


def mean_of_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """[...] of hidden [..., H]: the mean of the logits over the vocabulary, without gradient."""
    if head.softcap is None:
        return mean_logits(hidden, head)
    return _of_all_logits(hidden.flatten(0, -2), head, 1.0)[1].view(hidden.shape[:-1])


@torch.no_grad()
def _of_all_logits(hidden: Tensor, head: LMHead, temperature: float) -> tuple[Tensor, Tensor]:
    """log sum_v p_v^2 and the mean of the logits at temperature, [N] each.

    log sum p^2 = logsumexp(2 z) - 2 logsumexp(z); both, and the sum of z, are of parts of the
    vocabulary first.
    """
    V = len(head.weight)
    step = max(_LOGITS // max(len(hidden), 1), 1)
    at = torch.full(hidden.shape[:1], temperature, dtype=torch.float64, device=hidden.device)
    once, twice, total = [], [], 0.0
    formed = in_full(logits)
    for start in range(0, V, step):
        rows = slice(start, start + step)
        bias = None if head.bias is None else head.bias[rows]
        z = formed(hidden, head.weight[rows], bias, at, head.scale, head.softcap or 0.0)
        once.append(z.logsumexp(-1))
        twice.append((2 * z).logsumexp(-1))
        total = total + z.sum(-1)
    squares = torch.stack(twice).logsumexp(0) - 2 * torch.stack(once).logsumexp(0)
    return squares, total / V

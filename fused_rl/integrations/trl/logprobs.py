"""TRL's function of log-probs, by our head."""

from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl.integrations.trl.gathered import averaged
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import linear_top_logprobs
from fused_rl.linear.mean_logits import mean_logits
from fused_rl.linear.statistics import Statistic, linear_statistics

_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_STATISTICS = {"log_sum_sq_probs": Statistic.COLLISION, "mean_logits": Statistic.MEAN_LOGIT}

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
            found = Found(logprobs, torch.zeros_like(logprobs), None, None, logprobs == 0)
        else:
            found = statistics(hidden, head, targets, temperature, outputs)
        if "outputs" not in self.names:
            return found[:2]
        entropy = found.entropy if "entropy" in outputs else None
        is_top1 = found.is_top1 if "is_top1" in outputs else None
        return found._replace(entropy=entropy, is_top1=is_top1)


class Found(NamedTuple):
    """What TRL's function returns, [N] each; None for what was not asked for."""

    logprobs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


def statistics(
    hidden: Tensor, head: LMHead, targets: Tensor, temperature: float, outputs: Collection[str]
) -> Found:
    """All of one pass over the weight."""
    given, options = (hidden, head, targets), {"temperature": temperature}
    asked = tuple(statistic for name, statistic in _STATISTICS.items() if name in outputs)
    top = "is_top1" in outputs
    if not asked and (hidden.is_cuda or not top):
        # There the pass that finds ids has no exponentials to keep for the gradient.
        logprobs, entropy, largest = linear_top_logprobs(*given, **options)
        return Found(logprobs, entropy, None, None, logprobs == largest)
    of = linear_statistics(*given, asked, top=int(top), **options)
    squares = None if of.collision is None else of.collision.log()
    is_top1 = of.top_ids[..., 0] == targets if top else None
    return Found(of.logprobs, of.entropy, squares, of.mean_logit, is_top1)


@torch.no_grad()
def mean_of_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """[...] of hidden [..., H]: the mean of the logits over the vocabulary, without gradient."""
    if head.softcap is None:
        return mean_logits(hidden, head)
    any_entry = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    return linear_statistics(hidden, head, any_entry, Statistic.MEAN_LOGIT).mean_logit

"""KLPenalty: the KL term of a policy loss, one number per token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rl.batch import TokenBatch
from fused_rl.kl import KL, kl_penalty


@dataclass(frozen=True)
class KLPenalty:
    """beta * kl_penalty(logprobs, batch.ref_logprobs, value=value, grad=grad)."""

    beta: float
    value: KL = KL.K3
    grad: KL | None = None

    @property
    def token_separable(self) -> bool:
        """Whether a token's penalty depends on no other token."""
        return True

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        ref = self._reference(batch)
        return self.beta * kl_penalty(logprobs, ref, value=self.value, grad=self.grad)

    @torch.no_grad()
    def estimate(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """The value per token without beta, for monitoring."""
        return kl_penalty(logprobs, self._reference(batch), value=self.value)

    def _reference(self, batch: TokenBatch) -> Tensor:
        if batch.ref_logprobs is None:
            raise ValueError("this loss has a KL penalty, but the batch has no ref_logprobs")
        return batch.ref_logprobs

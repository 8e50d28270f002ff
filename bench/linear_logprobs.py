"""Log-probabilities and entropies from hidden states: without gradient, and through autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_rl
from fused_rl import reference


@dataclass
class Case:
    """Inputs of one shape; logits have a standard deviation of about 4."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]

    @classmethod
    def make(cls, N: int, H: int, V: int, dtype: torch.dtype) -> Case:
        torch.manual_seed(0)
        hidden = (torch.randn(N, H) * 4 / H**0.5).to(dtype)
        return cls(hidden, torch.randn(V, H).to(dtype), torch.randint(0, V, (N,)))

    def leaves(self, frozen: bool = False) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(
            not frozen
        )


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What most trainers do: logits in the dtype of the model, softmax in float32."""
    logp = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def products(case: Case, count: int) -> Callable[[], object]:
    """The bare matrix products: 2 NHV for the logits, 2 for dhidden, 2 for dweight."""
    dlogits = torch.randn(case.hidden.shape[0], case.weight.shape[0]).to(case.hidden.dtype)

    def run() -> None:
        case.hidden @ case.weight.T
        if count >= 4:
            dlogits @ case.weight
        if count >= 6:
            dlogits.T @ case.hidden

    return run


def no_grad(case: Case) -> dict[str, Callable[[], object]]:
    args = (case.hidden, case.weight, case.labels)
    return {
        "fused_rl": lambda: fused_rl.linear_logprobs(*args),
        "eager torch": torch.no_grad()(lambda: eager(*args)),
    }


def logprob_error(case: Case, logprobs: Tensor, rows: int = 64) -> float:
    """The largest error of the first rows' log-probs against float64."""
    hidden, weight = case.hidden[:rows].double(), case.weight.double()
    ones = torch.ones(rows, dtype=torch.float64)
    exact, _, _ = reference.linear_logprobs(
        hidden, weight, None, case.labels[:rows], ones, 1.0, 0.0
    )
    return (logprobs[:rows].double() - exact).abs().max().item()

"""Heads: log-probabilities and entropies from hidden states, by the names of three frameworks."""

from typing import Any

import torch
from torch import Tensor

from fused_rl.checks import require
from fused_rl.integrations.verl import kept
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import logprobs_from_logits
from fused_rl.parallel.states import Hidden
from fused_rl.stats import TokenStats

_BACKENDS = ("torch", "liger")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (not their negatives, despite the name) and entropies, as verl has them.

    Leading dimensions are flattened, those of hidden and of labels each by itself: Megatron's
    hidden states are [T, 1, H] where its labels are [1, T].

    Args:
        hidden: [..., H], N states in all.
        weight: [V, H]; with a dist_process_group this rank's rows, as many on every rank.
        labels: [...] int64 or int32, N in all, of the whole vocabulary.
        temperature: a number, or a tensor that broadcasts to labels.
        reduction: of the log-probabilities: "none", "sum" or "mean"; entropies are per token.
        dist_process_group: the ranks that share the vocabulary, each with all hidden states; None,
            or a group of one rank, which is the same. The gradient of hidden is then this rank's
            summand, as verl leaves it: what Megatron gathered hidden states with sums it.

    Returns:
        (logprobs [N] or [], entropy [N]), float32; in a block of kept_sets renormalised ones.

    Raises:
        ValueError: another reduction; numbers of states and labels that differ; several sequences
            of which one is batch-first, the other not; as linear_logprobs raises.
    """
    reductions = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}
    require(
        reduction in reductions,
        lambda: f"reduction must be one of {list(reductions)}, got {reduction!r}",
    )
    states, leading = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[:-1]
    require(
        len(states) == labels.numel(),
        lambda: (
            f"hidden must have one state per label, got hidden {list(hidden.shape)} "
            f"and labels {list(labels.shape)}"
        ),
    )
    swapped = len(leading) == 2 and leading != labels.shape and leading[::-1] == labels.shape
    require(
        not swapped or 1 in leading,
        lambda: (
            f"hidden {list(hidden.shape)} and labels {list(labels.shape)} would pair states with "
            "labels of other tokens: transpose one of them"
        ),
    )
    if isinstance(temperature, Tensor):
        temperature = temperature.broadcast_to(labels.shape).reshape(-1)
    head = _head(weight, dist_process_group)
    logprobs, entropy = kept.statistics(states, head, labels.reshape(-1), temperature=temperature)
    return reductions[reduction](logprobs), entropy


def _head(weight: Tensor, group: Any) -> LMHead:
    """The whole head, or this rank's part of it."""
    if group is None or torch.distributed.get_world_size(group) == 1:
        return LMHead(weight)
    return LMHead(weight, group=group, hidden=Hidden.PARTIAL)


class FusedLinearForPPO(torch.nn.Module):
    """verl's module of the same name; it has no parameters.

    Args:
        chunk_size: how many tokens' logits are held at once where a way needs them.
        impl_backend: "torch" or "liger", which verl chooses between; the same here.

    Raises:
        ValueError: another impl_backend.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        require(
            impl_backend in _BACKENDS,
            lambda: f"impl_backend must be one of {list(_BACKENDS)}, got {impl_backend!r}",
        )
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,  # [T, H] or [B, T, H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [T] or [B, T]: the labels
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy), float32 in the shape of input_ids; see kept_sets."""
        return _by_tokens(hidden_states, vocab_weights, input_ids, temperature, self.chunk_size)


def _by_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor, tokens: int
) -> TokenStats:
    """linear_logprobs with its buffer given in tokens; in a block of kept_sets, renormalised."""
    return kept.statistics(
        hidden, weight, labels, temperature=temperature, chunk_bytes=tokens * weight.shape[0] * 4
    )


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

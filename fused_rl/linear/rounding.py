"""What rounding alone does to the log-probs of a head: computed, rounded and not, at some tokens.

    error[n] = logprobs[n] - rounded[n]

The trainer's logits are float32. The engine's are rounded where its head gives them, as those of
LMHead(logits_dtype=...) are; its log-softmax is float32. Its hidden states may be rounded
differently, too: two programs that compute the same states in bfloat16 add in another order, and
their last bits have nothing to do with each other. `mismatch.mismatch_report` takes the errors.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fused_rl import checks
from fused_rl.linear.arguments import flat_arguments
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import linear_logprobs
from fused_rl.reference import acc_dtype
from fused_rl.stats import IGNORE_INDEX


@torch.no_grad()
def rounding_differences(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logits_dtype: torch.dtype = torch.bfloat16,
    hidden_roundings: int = 0,
    tokens: int = 512,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Errors of log-probs by rounding alone, at some of the tokens.

    4 n H V of n tokens.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64: the states that predict labels.
        head: LMHead, a weight [V, H], or a torch.nn.Linear.
        labels: [...], int64 or int32, in [0, V) or ignore_index.
        temperature: a number, or a tensor that broadcasts to labels; positive.
        logits_dtype: of the engine's logits: bfloat16 or float16; float32 does not round.
        hidden_roundings: how many roundings apart the engine's hidden states are, in the dtype of
            hidden: each adds an error that is uniform within half of its last bit. 0: the same.
        tokens: at most so many, evenly spaced among those that are not ignored.
        ignore_index: labels that are left out.

    Returns:
        [n], n <= tokens: logprobs - rounded, float32 (float64 for float64 inputs), in nats. The
        same every time.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a label outside [0, V); a head
            whose vocabulary is spread over ranks; another logits_dtype.
    """
    head = LMHead.of(head)
    flat = flat_arguments(hidden, head, labels, temperature)
    checks.require(
        isinstance(logits_dtype, torch.dtype),
        lambda: f"logits_dtype must be a torch.dtype, got {checks.shown(logits_dtype)}",
    )
    for name, count, least in (("hidden_roundings", hidden_roundings, 0), ("tokens", tokens, 1)):
        checks.is_integer(name, count)
        checks.at_least(name, count, least)
    checks.is_integer("ignore_index", ignore_index)
    counted = (labels.reshape(-1) != ignore_index).nonzero().squeeze(-1)
    at = counted[_spaced(len(counted), tokens, counted.device)]
    labels, options = labels.reshape(-1)[at], {"temperature": flat.temperature[at]}
    _are_entries(labels, len(head.weight))
    states = hidden.reshape(-1, hidden.shape[-1])[at]
    exact, engine = (replace(head, logits_dtype=dtype) for dtype in (None, logits_dtype))
    nearby = _nearby(states, hidden_roundings) if hidden_roundings else states
    ours = linear_logprobs(states, exact, labels, **options).logprobs
    return ours - linear_logprobs(nearby, engine, labels, **options).logprobs


def _nearby(hidden: Tensor, roundings: int) -> Tensor:
    """Hidden states that many roundings away; not rounded again, which would undo the first."""
    last_bit = torch.finfo(hidden.dtype).eps * 2.0 ** hidden.double().abs().log2().floor()
    generator = torch.Generator(device="cpu").manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    steps = sum(torch.rand(hidden.shape, **options) - 0.5 for _ in range(roundings))
    return (hidden.double() + last_bit * steps.to(hidden.device)).to(acc_dtype(hidden))


def _spaced(count: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of range(count), evenly spaced."""
    chosen = min(count, most)
    return torch.arange(chosen, device=device) * count // max(chosen, 1)


def _are_entries(labels: Tensor, vocabulary: int) -> None:
    outside = labels[(labels < 0) | (labels >= vocabulary)]
    checks.require(
        not len(outside),
        lambda: f"labels must be in [0, {vocabulary}) or ignore_index, got {outside[0].item()}",
    )

"""The operators on CUDA and ROCm: which tokens take part, and the Triton kernels they go to.

float64 has no kernel and takes plain torch. Operands of different dtypes meet in float32, or, where
products by parts are trusted, float32 and bfloat16 as they are. Each function is what the operator
of its name does, plus the `device` it runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fused_rl.ops import (
    chunk,
    divergence_chunk,
    first_use,
    linear,
    logits,
    statistics,
    stored,
    trust,
)
from fused_rl.ops.chunks import HAS_TRITON
from fused_rl.ops.formulas import at, live, log_probabilities
from fused_rl.ops.kl import Deviation, Estimate
from fused_rl.ops.kl import kl as kl_operator
from fused_rl.ops.logits import Rows, RowStatistics
from fused_rl.ops.record import (
    Gradients,
    Head,
    Known,
    Limits,
    Needs,
    Operator,
    Statistics,
    Upstream,
)
from fused_rl.ops.two_heads import Measure, TwoHeads

# The operators that have a kernel, and the kernel: a function of the same records and the device.
OPERATORS: dict[Operator, Callable] = {}
# What goes on from logits, and what left them there in a layout of its own.
CONTINUES = {
    chunk.linear_logprobs_chunk_backward: chunk.linear_logprobs_chunk,
    chunk.linear_logprobs_chunk_unit: chunk.linear_logprobs_chunk,
    stored.linear_logprobs_stored_backward: stored.linear_logprobs_stored,
    divergence_chunk.linear_divergence_chunk_backward: divergence_chunk.linear_divergence_chunk,
}


# The records that all of those that share a layout are given.
SHARED = (Head, TwoHeads, Measure)


def on_cuda(operator: Operator) -> Callable[[Callable], Callable]:
    """The function below is the kernel of an operator on cuda, under a guard of the device.

    Plain torch for float64, and where triton is not installed: `backends()` says so.
    """

    def register(kernel: Callable) -> Callable:
        def run(*records: tuple) -> Tensor | tuple:
            if not HAS_TRITON or in_float64(records):
                return operator.plain(*records)
            device = next(a for a in records[0] if isinstance(a, Tensor)).device
            with torch.cuda.device(device):
                return served(operator, records, device, place_of(device))

        OPERATORS[operator] = kernel
        operator.kernel("cuda", run)
        return kernel

    return register


@lru_cache
def place_of(device: torch.device) -> Any:
    """kernels.configs.Device of a torch device: a configuration may run there once it was right."""
    from fused_rl.kernels.configs import Device

    place = Device.of(device)
    return place._replace(trusts=lambda config, call: trusts(device, place, config, call))


def trusts(device: torch.device, place: Any, config: Any, call: tuple) -> bool:
    """Whether a configuration of the fused forward may run on such a call, which may be its first.

    place: the device as the kernels' drivers take it.
    """
    return trust.allowed(device, config, call) and trust.passes(
        device,
        trust.title_of(config),
        trust.kind_of_call(call),
        lambda: first_use.config_difference(config, call, place),
    )


def served(operator: Operator, records: tuple, device: torch.device, place: Any) -> Any:
    """The operator's kernel at work, or plain torch where it was wrong at its first use."""
    if is_right(operator, records, device, place):
        return launch(OPERATORS[operator], records, place)
    return operator.plain(*records)


def is_right(operator: Operator, like: Sequence[tuple], device: torch.device, place: Any) -> bool:
    """Whether its kernel was right at its first use on such records, which this may be."""

    def run(operator: Operator, *records: tuple) -> Any:
        return launch(OPERATORS[operator], records, place)

    # Those that share a layout all run, or none does.
    judged = CONTINUES.get(operator, operator)
    shared = judged in CONTINUES.values()
    kind = trust.kind_of([r for r in like if isinstance(r, SHARED)] if shared else like)
    name = judged.__name__
    return trust.passes(device, name, kind, lambda: first_use.difference(judged, like, run))


def check_every_kernel(
    device: torch.device | None = None, place: Any = None
) -> list[trust.Verdict]:
    """Compares each operator's kernels with plain torch, on bfloat16, as their first uses would.

    Args:
        device: the current CUDA device unless given.
        place: the device as the kernels' drivers take it; place_of(device) unless given.
    """
    device = device or torch.device("cuda", torch.cuda.current_device())
    place = place or place_of(device)
    for operator in (o for o in OPERATORS if o not in CONTINUES):
        is_right(operator, first_use.example(operator, device), device, place)
    return trust.verdicts()


def in_float64(records: Sequence[tuple]) -> bool:
    """Whether both heads say so, or the first two tensors: an lse is in float64 always."""
    if any(isinstance(r, TwoHeads) and r.dtype == torch.float64 for r in records):
        return True
    tensors = [a for a in chain.from_iterable(records) if isinstance(a, Tensor)]
    return any(t.dtype == torch.float64 for t in tensors[:2])


def launch(kernel: Callable, records: Sequence[tuple], device: Any) -> Any:
    """kernel(*records, device), with vectors as the kernels read them: one number after another.

    The upstream gradient of a sum is one number, expanded; labels may be every second of a row.
    """
    return kernel(*(record._make(map(_dense, record)) for record in records), device)


def _dense(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.dim() == 1 else value


def by_parts(hidden: Tensor, weight: Tensor) -> bool:
    """Whether their products may be formed by parts: one in float32, the other in bfloat16."""
    if {hidden.dtype, weight.dtype} != {torch.float32, torch.bfloat16}:
        return False
    from fused_rl.kernels import split

    if split.PROOF is None and not trust.options().unproven:
        return False
    title, device = "products of float32 and bfloat16 by parts", hidden.device
    return trust.passes(device, title, None, lambda: first_use.parts_difference(device))


def operands(head: Head) -> Head:
    """hidden and weight in dtypes that can be multiplied, with contiguous columns."""
    hidden, weight = head.hidden, head.weight
    if hidden.dtype != weight.dtype and not by_parts(hidden, weight):
        hidden, weight = hidden.float(), weight.float()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    return head._replace(hidden=hidden.contiguous(), weight=weight)


def taking_part(tokens: Tensor) -> Tensor | None:
    """Indices of the tokens that take part, at the price of one synchronisation; None: all.

    While a graph is captured all take part: kernels leave zeros where they should not.
    """
    if trust.capturing(tokens.device):
        return None
    rows = tokens.nonzero()[:, 0]
    return None if len(rows) == len(tokens) else rows


def put_back(
    rows: Tensor | None, part: Tensor, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    part = part.to(dtype or like.dtype)
    if rows is None:
        return part
    return part.new_zeros(like.shape).index_copy_(0, rows, part)


def picked(
    rows: Tensor | None, upstream: Upstream, head: Head, known: Known
) -> tuple[Upstream, Head, Known]:
    """Those of the tokens that take part."""
    if rows is not None:
        upstream, head, known = at(rows, upstream), head.at(rows), at(rows, known)
    return upstream, operands(head), known


@on_cuda(linear.linear_logprobs)
def linear_logprobs(head: Head, limits: Limits, device: Any) -> Statistics:
    from fused_rl.kernels import linear_logprobs as kernel

    rows = taking_part(head.labels != limits.ignore_index)
    taken = operands(head if rows is None else head.at(rows))
    stats = kernel.fwd(*taken, limits.ignore_index, device)
    return Statistics(*(put_back(rows, part, part.new_empty(len(head.labels))) for part in stats))


@on_cuda(statistics.linear_statistics)
def linear_statistics(head: Head, asked: statistics.Asked, limits: Limits, device: Any) -> tuple:
    from fused_rl.kernels import asked as kernel

    out = statistics.AskedStatistics(*(t.zero_() for t in statistics.asked_like(head, asked)))
    rows = taking_part(head.labels != limits.ignore_index)
    taken = operands(head if rows is None else head.at(rows))
    if len(taken.labels) == 0:
        return out
    found = kernel.fwd(*taken, *asked, limits.ignore_index)
    logprobs, entropy, lse, _ = found.statistics
    of_top = None
    if asked.top:
        of_top = log_probabilities(found.logits, Known(lse, entropy))
    part = (logprobs, entropy, lse, found.collision, found.mean_logit, found.ids, of_top)
    ignored = taken.labels == limits.ignore_index
    for to, x in zip(out, part, strict=True):
        if x is not None:
            x = x.masked_fill(ignored if x.dim() == 1 else ignored[:, None], 0)
            to.copy_(put_back(rows, x, to))
    return out


# The power of two that the largest gradient of a log-prob is scaled to in float16, whose numbers
# end at 65504 and lose digits below 6e-5. It leaves room for the gradient of an entropy:
# p |log p + entropy| is under 4 in a vocabulary of a million.
FLOAT16_POWER = 11


def power_of_two(head: Head, upstream: tuple[Tensor, ...]) -> Tensor | None:
    """For float16, what brings the largest of gradients [N] to 2^FLOAT16_POWER."""
    if head.hidden.dtype != torch.float16 or not head.labels.numel():
        return None
    # What the chain rule makes of the upstream gradients.
    slope = head.scale / head.temperature
    largest = (torch.stack(upstream).abs().amax(0) * slope.abs()).max()
    power = torch.exp2((FLOAT16_POWER - largest.log2()).floor().clamp(max=126.0))
    return power.where(largest.isfinite(), 1.0)


@on_cuda(linear.linear_logprobs_backward)
def linear_logprobs_backward(
    upstream: Upstream, head: Head, limits: Limits, known: Known, needs: Needs, device: Any
) -> Gradients:
    from fused_rl.kernels import linear_gradients as kernel

    rows = taking_part(live(upstream, head.labels, limits.ignore_index))
    upstream, taken, known = picked(rows, upstream, head, known)
    power = power_of_two(taken, upstream)
    if power is not None:
        upstream = Upstream(*(g * power for g in upstream))
    found = kernel.bwd(*upstream, *taken, *limits, *known, tuple(needs))
    return gradients_of(rows, found, power, head, needs)


def gradients_of(
    rows: Tensor | None,
    found: tuple[Tensor | None, ...],
    power: Tensor | None,
    head: Head,
    needs: Needs,
) -> Gradients:
    """What a kernel found of some tokens, as the operator gives it; power: what it is times."""
    hidden, weight, bias, *_ = head
    dhidden, dweight, dbias = found
    if power is not None:
        for sum_ in (dhidden, dweight, dbias):
            if sum_ is not None:
                sum_.div_(power)
    return Gradients(
        put_back(rows, dhidden, hidden) if needs.need_dhidden else hidden.new_empty(0),
        dweight.to(weight.dtype) if needs.need_dweight else weight.new_empty(0),
        dbias.to(bias.dtype) if needs.need_dbias else weight.new_empty(0),
    )


def _of_rows(given: Rows) -> tuple:
    """What the kernels take of logits that are there: no bias, scale, softcap or rounding."""
    rows = given.logits if given.logits.stride(1) == 1 else given.logits.contiguous()
    return (rows, None, given.labels, given.temperature, 1.0, 0.0, 0, given.ignore_index)


@on_cuda(logits.logits_logprobs)
def logits_logprobs(given: Rows, device: Any) -> RowStatistics:
    from fused_rl.kernels import logprobs as kernel

    return RowStatistics(*kernel.fwd(*_of_rows(given), device.multiprocessors)[:3])


@on_cuda(logits.logits_logprobs_backward)
def logits_logprobs_backward(upstream: Upstream, given: Rows, known: Known, device: Any) -> Tensor:
    from fused_rl.kernels import logprobs as kernel

    dlogits = given.logits.new_empty(given.logits.shape)
    dense = (g.contiguous() for g in upstream)
    kernel.bwd(*dense, *_of_rows(given), *known, dlogits)
    return dlogits


@on_cuda(kl_operator)
def kl(at: Deviation, device: Any) -> Estimate:
    from fused_rl.kernels import kl as kernel

    return Estimate(*kernel.fwd(*at))

"""The small cases that kernels are compared with plain torch on, at their first use on a device.

Each is made like the call at hand: its dtypes, its options, its H, and sizes that the compiler
treats as it treats those of the call (divisible by 16 or not), so that what is compiled for it
serves the call, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rl import reference
from fused_rl.ops import chunk, divergence, divergence_chunk, linear, logits, statistics, stored
from fused_rl.ops.chunk import ChunkLogits, Sums
from fused_rl.ops.divergence import TwoNeeds
from fused_rl.ops.divergence_chunk import StudentUpstream, known_of
from fused_rl.ops.kl import Deviation
from fused_rl.ops.logits import Rows
from fused_rl.ops.record import Given, Head, Known, Limits, Needs, Operator, Upstream
from fused_rl.ops.stored import Stored
from fused_rl.ops.two_heads import Measure, TwoHeads, TwoKnown, TwoStatistics, TwoUpstream

# Of a norm, between a kernel and float64. Loose: a wrong kernel is wrong by more, and products in
# float32 may be TF32 by the caller's own setting.
BOUND = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
LIMITS = Limits(-100, 2**24)
# What may be asked of logits.
EVERYTHING = statistics.Asked(True, True, 3)
# Where there is no call: a divergence whose slopes take all that others' do.
MEASURE = Measure(reference.JSD, 0.3, 1.0)


def wrong(
    ours: Iterable[Tensor], exact: Iterable[Tensor], dtype: torch.dtype, bound: float | None = None
) -> str | None:
    """What differs by more than the bound, that of the dtype if none is given; a NaN does."""
    bound = BOUND[dtype] if bound is None else bound
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        a, b = a.double(), b.double()
        error = ((a - b).norm() / b.norm().clamp_min(1e-6)).item()
        if not error <= bound:
            return f"result {i} is {error:.1e} from plain torch in float64"
    return None


def _size(like: int, divisible: int) -> int:
    return divisible if like % 16 == 0 else divisible - 1


def small_head(head: Head, seed: int = 0) -> Head:
    """A head of the same kind, with 48 tokens and a vocabulary of 640, or one less each."""
    hidden, weight, bias, labels, _, scale, *transform = head
    N, V, H = _size(len(labels), 48), _size(len(weight), 640), hidden.shape[1]
    noise = torch.Generator(hidden.device).manual_seed(seed)
    where = {"generator": noise, "device": hidden.device}
    return Head(
        (2 * torch.randn(N, H, **where) / max(1, H) ** 0.5 / (abs(scale) or 1.0)).to(hidden.dtype),
        torch.randn(V, H, **where).to(weight.dtype),
        None if bias is None else torch.randn(V, **where).to(bias.dtype),
        torch.randint(0, V, (N,), **where),
        1.0 + torch.rand(N, **where),
        scale,
        *transform,
    )


def example(operator: Operator, device: torch.device) -> tuple[tuple, ...]:
    """What small cases of an operator are made like, where there is no call: bfloat16, plain."""
    bf16 = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
    labels, ones = torch.zeros(64, dtype=torch.int64, device=device), torch.ones(64, device=device)
    head = Head(bf16, bf16, None, labels, ones, 1.0, 0.0)
    if operator.records[0] is Deviation:
        return (Deviation(ones, 3, 2),)
    if TwoHeads in operator.records:
        return TwoHeads.of(head, head), MEASURE
    return (Rows(bf16, labels, ones, -100),) if Rows in operator.records else (head,)


def small_heads(heads: TwoHeads) -> TwoHeads:
    """Two of the same kind, with as many tokens and entries, and other numbers."""
    return TwoHeads.of(small_head(heads.student()), small_head(heads.teacher(), 1))


def exactly(record: tuple) -> tuple:
    """Its tensors in float64."""
    return record._make(
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in record
    )


def config_difference(config: Any, call: tuple, place: Any) -> str | None:
    """Of one configuration of a fused forward, on a small case of the call."""
    head = small_head(Head(*call))
    exact = linear.linear_logprobs.plain(exactly(head), LIMITS)
    return wrong(formed(head, config, place), exact, call[0].dtype)


def formed(head: Head, config: Any, place: Any) -> tuple[Tensor, ...]:
    """logprobs, entropy, lse and top of a head, by one configuration of a fused forward."""
    from fused_rl.kernels import linear_exponentials, linear_gradients, linear_logprobs, logprobs

    N, V = len(head.labels), len(head.weight)
    if config.stores:
        e = linear_gradients.logits_room(N, V, head.hidden.dtype, head.hidden.device)
        return linear_exponentials.fwd(*head, place, config, e)[0]
    partial = linear_logprobs.fused_statistics(*head, place, config)
    return logprobs.merge(partial, head.labels, V, -100, linear_logprobs.unit(head.bias))


def parts_difference(device: torch.device) -> str | None:
    """Of products by parts. Without the second parts they would be wrong by 2e-3."""
    from fused_rl.kernels import split

    noise = torch.Generator(device).manual_seed(0)
    where = {"generator": noise, "device": device}
    hidden, weight = torch.randn(47, 72, **where).bfloat16(), torch.randn(600, 72, **where)
    draw = torch.randn(47, 600, **where)
    pairs = ((hidden, weight.T), (draw.T, hidden), (draw, weight))
    ours = [torch.ones(len(a), b.shape[1], device=device) for a, b in pairs]
    for (a, b), to in zip(pairs, ours, strict=True):
        split.product(a, b, to, True)
    exact = (1 + a.double() @ b.double() for a, b in pairs)
    return wrong(ours, exact, torch.float32, 2e-5)


def difference(operator: Operator, records: tuple, run: Callable[..., Any]) -> str | None:
    """Of an operator's kernel on a small case of such records; run(operator, *records) runs it."""
    if isinstance(records[0], Deviation):
        return _of_kl(operator, records[0], run)
    given = next(r for r in records if isinstance(r, (Head, Rows, TwoHeads)))
    if isinstance(given, Rows):
        return _of_rows(operator, given, run)
    if isinstance(given, TwoHeads):
        measure = next(r for r in records if isinstance(r, Measure))
        return _of_two_heads(operator, small_heads(given), measure, run)
    return _of_head(operator, small_head(given), run)


def _upstream(like: Tensor, count: int = 2) -> Tensor:  # [count, N]
    noise = torch.Generator(like.device).manual_seed(1)
    return torch.randn(count, len(like), generator=noise, device=like.device)


def _of_head(operator: Operator, head: Head, run: Callable[..., Any]) -> str | None:
    dtype = head.hidden.dtype if head.hidden.dtype == head.weight.dtype else torch.float32
    if operator is linear.linear_logprobs:
        stats = linear.linear_logprobs.plain(exactly(head), LIMITS)
        return wrong(run(operator, head, LIMITS), stats, dtype)
    if operator is statistics.linear_statistics:
        return wrong(*_of_statistics(head, run), dtype)
    upstream, needs = Upstream(*_upstream(head.labels)), Needs(True, True, head.bias is not None)
    stats = linear.linear_logprobs.plain(exactly(head), LIMITS)
    known = Known(stats.lse, stats.entropy.float())
    given = (exactly(upstream), exactly(head), LIMITS, exactly(known), needs)
    exact = linear.linear_logprobs_backward.plain(*given)
    if operator is linear.linear_logprobs_backward:
        return wrong(run(operator, upstream, head, LIMITS, known, needs), exact, dtype)
    if operator is stored.linear_logprobs_stored:
        return wrong(*_of_stored(head, upstream, needs, run, (stats, exact)), dtype)
    # All that goes on from the logits of a chunk.
    *found, z = run(operator, head, Given(True))
    dweight = torch.empty(head.weight.shape, device=head.weight.device)
    sums = Sums(dweight, dweight.new_empty(exact.dbias.shape), False)
    given = (ChunkLogits(z), upstream, head, known, sums)
    unit = run(chunk.linear_logprobs_chunk_unit, ChunkLogits(z.clone()), head, known)
    dhidden = run(chunk.linear_logprobs_chunk_backward, *given)
    ones = Upstream(torch.ones_like(known.entropy), torch.zeros_like(known.entropy))
    given = (exactly(ones), exactly(head), LIMITS, exactly(known), Needs(True, False, False))
    of_ones = linear.linear_logprobs_backward.plain(*given).dhidden
    return wrong((*found, dhidden, *sums[:2], unit), (*stats, *exact, of_ones), dtype)


def _of_statistics(head: Head, run: Callable[..., Any]) -> tuple[tuple, tuple]:
    """All that may be asked for: what was found, what is right. The ids as what is at them."""
    *found, ids, of_top = run(statistics.linear_statistics, head, EVERYTHING, LIMITS)
    exact = statistics.linear_statistics.plain(exactly(head), EVERYTHING, LIMITS)
    at_ids = torch.log_softmax(exactly(head).logits(), -1).gather(-1, ids)
    return (*found, at_ids, of_top), (*exact[:-2], exact.top_logprobs, exact.top_logprobs)


def _of_stored(
    head: Head, upstream: Upstream, needs: Needs, run: Callable[..., Any], exact: tuple
) -> tuple[tuple, tuple]:
    """Both halves, without a gradient of the entropy and with: what was found, what is right."""
    stats, gradients = exact
    *found, rows, z = run(stored.linear_logprobs_stored, head, LIMITS)
    known = Known(found[2], found[1])
    of_logprobs = Upstream(upstream.dlogprobs, torch.zeros_like(upstream.dentropy))
    backward, halves = stored.linear_logprobs_stored_backward, []
    for up, entropy in ((of_logprobs, False), (upstream, True)):
        given = (up, head, LIMITS, known, Stored(rows, z), Given(entropy), needs)
        halves.append(run(backward, *given))
    given = (exactly(of_logprobs), exactly(head), LIMITS, exactly(known), needs)
    first = linear.linear_logprobs_backward.plain(*given)
    return (*found, *halves[0], *halves[1]), (*stats, *first, *gradients)


def _of_rows(operator: Operator, like: Rows, run: Callable[..., Any]) -> str | None:
    device, V = like.logits.device, _size(like.logits.shape[1], 640)
    noise = torch.Generator(device).manual_seed(0)
    where = {"generator": noise, "device": device}
    rows = (4 * torch.randn(48, V, **where)).to(like.logits.dtype)
    given = Rows(rows, torch.randint(0, V, (48,), **where), 1.0 + torch.rand(48, **where), -100)
    stats = logits.logits_logprobs.plain(exactly(given))
    if operator is logits.logits_logprobs:
        return wrong(run(operator, given), stats, rows.dtype)
    upstream, known = Upstream(*_upstream(given.labels)), Known(stats.lse, stats.entropy.float())
    exact = operator.plain(exactly(upstream), exactly(given), exactly(known))
    return wrong([run(operator, upstream, given, known)], [exact], rows.dtype)


def _of_kl(operator: Operator, like: Deviation, run: Callable[..., Any]) -> str | None:
    d = torch.linspace(-3.0, 3.0, 300, dtype=like[0].dtype, device=like[0].device)
    given = like._replace(**{like._fields[0]: d})
    return wrong(run(operator, given), operator.plain(exactly(given)), torch.float32)


def _of_two_heads(
    operator: Operator, heads: TwoHeads, measure: Measure, run: Callable[..., Any]
) -> str | None:
    dtypes = {heads.hidden.dtype, heads.weight.dtype}
    dtypes |= {heads.teacher_hidden.dtype, heads.teacher_weight.dtype}
    dtype = max(dtypes, key=BOUND.__getitem__)
    stats = divergence.linear_divergence.plain(exactly(heads), measure, LIMITS)
    if operator is divergence.linear_divergence:
        found = run(operator, heads, measure, LIMITS)
        return wrong(_with_both_slopes(found), _with_both_slopes(stats), dtype)
    upstream = TwoUpstream(*_upstream(heads.labels, 5))
    known = known_of(stats)
    lse = {name: getattr(known, name) for name in ("lse", "teacher_lse")}
    known = TwoKnown(*(t.float() for t in known))._replace(**lse)
    biases = (heads.bias is not None, heads.teacher_bias is not None)
    needs = TwoNeeds(True, True, biases[0], True, True, biases[1])
    if operator is divergence.linear_divergence_backward:
        exact = operator.plain(
            *map(exactly, (upstream, heads)), measure, LIMITS, exactly(known), needs
        )
        return wrong(run(operator, upstream, heads, measure, LIMITS, known, needs), exact, dtype)
    return wrong(*_of_two_halves(heads, measure, upstream, (stats, known), run), dtype)


def _of_two_halves(
    heads: TwoHeads,
    measure: Measure,
    upstream: TwoUpstream,
    forward: tuple[TwoStatistics, TwoKnown],
    run: Callable[..., Any],
) -> tuple[tuple, tuple]:
    """Of a chunk: what was found, what is right."""
    stats, known = forward
    *found, z = run(divergence_chunk.linear_divergence_chunk, heads, measure)
    given = StudentUpstream(*upstream[:3])
    needs = TwoNeeds(True, True, heads.bias is not None, False, False, False)
    args = (exactly(given.among()), exactly(heads), measure, LIMITS, exactly(known), needs)
    exact = divergence.linear_divergence_backward.plain(*args)
    dweight = torch.empty(heads.weight.shape, device=heads.weight.device)
    sums = Sums(dweight, dweight.new_empty(exact.dbias.shape), False)
    backward = divergence_chunk.linear_divergence_chunk_backward
    dhidden = run(backward, ChunkLogits(z), given, heads, measure, known, sums)
    ours, right = _with_both_slopes(found), _with_both_slopes(stats)
    return (*ours, dhidden, *sums[:2]), (*right, *exact[:3])


def _with_both_slopes(stats: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As one result: the sum of one side's slopes may be 0 but for rounding, never both."""
    return (*stats[:-2], torch.stack([*stats[-2:]]))

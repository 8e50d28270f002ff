"""Whatever the library may be called with, drawn by hypothesis: no further from float64 than a few
times eager torch in the same dtype, the same by every way, and exactly 0 where it must be.

The short run is part of `make test`; the long one draws other examples, and many.
"""

from collections.abc import Callable
from dataclasses import replace

import drawn
import hypothesis.strategies as st
import pytest
import torch
from by_name import loss_of
from drawn_heads import (
    Drawn,
    assert_gradients,
    assert_values,
    eager_logits,
    exact_logits,
    heads,
    strided,
    transposed,
)
from hypothesis import given
from oracle import IGNORED, assert_same_bits
from test_kept import differentiated, from_logits, packed, random_sets
from torch import Tensor

from fused_rl import (
    KL,
    KLPenalty,
    Level,
    LMHead,
    PolicyLoss,
    TokenBatch,
    TokenStats,
    linear_kept_logprobs,
    linear_logprobs,
    linear_logprobs_at,
    linear_policy_loss,
    linear_top_logprobs,
    logprobs_from_logits,
)
from fused_rl.losses.named import NAMES
from fused_rl.trust_regions import ClipCov, KLCov

pytestmark = pytest.mark.usefixtures("poisoned")

LONGER = 40

Statistics = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]


def short_and_long(count: int, **strategies: st.SearchStrategy) -> Callable:
    """A test of so many examples, the same ones in every run; and a slow one of LONGER as many."""

    def decorate(check: Callable) -> Callable:
        def test(times: int) -> None:
            drawn.examples(times * count)(given(**strategies)(check))()

        test.__doc__ = check.__doc__
        long = pytest.param(LONGER, id="long", marks=pytest.mark.slow)
        return pytest.mark.parametrize("times", [pytest.param(1, id="short"), long])(test)

    return decorate


def judged(d: Drawn, ours: Statistics, outputs: int, up: list[Tensor], kept=None) -> list:
    """Holds our statistics and gradients against float64 and eager torch; returns them."""
    case = d.case
    sets = kept or packed([label[None] for label in case.labels.clamp(min=0)])

    def first(logits) -> Statistics:
        of_logits = from_logits(logits, case, *sets)
        return lambda *leaves: tuple(of_logits(*leaves))[:outputs]

    mine = differentiated(ours, case, up, trained=d.trained)
    compact = d.compact
    exact = differentiated(first(exact_logits(case)), compact, up, torch.float64, d.trained)
    # Ours never round the logits to the dtype of the model, nor does this one.
    wide = differentiated(first(eager_logits(case)), compact, up, mine[0].dtype, d.trained)
    same = differentiated(first(eager_logits(case)), compact, up, trained=d.trained)
    for got, theirs, right in zip(mine[:outputs], wide, exact, strict=False):
        assert_values(got, theirs, right, case)
    assert_gradients(mine[outputs:], same[outputs:], exact[outputs:], case, up)
    ignored = case.labels == IGNORED
    assert not any(t[ignored].any() for t in mine[:outputs])
    for gradient in mine[outputs + 1 :]:
        assert gradient is None or not gradient[d.excluded].any()
    if mine[outputs] is not None:
        assert not mine[outputs][ignored].any()
    return mine


def upstream(N: int, count: int, which: str) -> list[Tensor]:
    """Gradients of the statistics: of all, of some tokens, or one number for all."""
    up = [torch.randn(N, dtype=torch.float64) for _ in range(count)]
    if which == "the first":
        up[1:] = [torch.zeros(N, dtype=torch.float64) for _ in up[1:]]
    if which == "some tokens":
        counted = torch.rand(N) < 0.5
        up = [g * counted for g in up]
    if which == "one number":
        up = [torch.full((1,), 0.5, dtype=torch.float64).expand(N) for _ in up]
    return up


UPSTREAM = st.sampled_from(("all", "the first", "some tokens", "one number"))


def head_of(d: Drawn, weight: Tensor, bias: Tensor | None) -> LMHead:
    return LMHead(weight, bias, d.case.scale, d.case.softcap)


@short_and_long(60, d=heads(), which=UPSTREAM)
def test_linear_logprobs(d: Drawn, which: str) -> None:
    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return linear_logprobs(hidden, head_of(d, weight, bias), d.labels, **d.options)

    mine = judged(d, ours, 2, upstream(len(d.labels), 2, which))
    with torch.no_grad():
        alone = ours(d.case.hidden, d.case.weight, d.case.bias)
    for got, right in zip(alone, mine, strict=False):
        assert_same_bits(got, right)


WIDE = (torch.float32, torch.float64, torch.bfloat16)
HUGE = st.sampled_from((1e4, -1e6, 1e20, -1e20)).flatmap(lambda level: heads(WIDE, level))


@short_and_long(40, d=HUGE, which=UPSTREAM)
def test_linear_logprobs_of_huge_logits(d: Drawn, which: str) -> None:
    """All of about the same size: a sum of exponentials that is lost beside them counts."""

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return linear_logprobs(hidden, head_of(d, weight, bias), d.labels, **d.options)

    judged(d, ours, 2, upstream(len(d.labels), 2, which))


@short_and_long(40, d=heads(), which=UPSTREAM)
def test_linear_top_logprobs(d: Drawn, which: str) -> None:
    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return linear_top_logprobs(hidden, head_of(d, weight, bias), d.labels, **d.options)[:2]

    judged(d, ours, 2, upstream(len(d.labels), 2, which))
    case = d.case
    stats = linear_top_logprobs(
        case.hidden, head_of(d, case.weight, case.bias), d.labels, **d.options
    )
    wide = [None if t is None else t.double() for t in (case.hidden, case.weight, case.bias)]
    z = exact_logits(case)(*wide) / case.temperature.double()[:, None]
    right = torch.log_softmax(z, -1).amax(-1).where(case.labels != IGNORED, 0.0)
    assert_values(stats.top_logprobs, right, right, case)
    assert (stats.logprobs <= stats.top_logprobs).all()


@short_and_long(60, d=heads(), which=UPSTREAM, K=st.integers(1, 30), place=st.integers(0, 29))
def test_linear_logprobs_at(d: Drawn, which: str, K: int, place: int) -> None:
    """The label stands among other ids."""
    ids = torch.randint(len(d.case.weight), (*d.labels.shape, K))
    ids[..., place % K] = d.labels
    ids[d.labels == d.options.get("ignore_index", IGNORED)] = d.options.get("ignore_index", IGNORED)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        stats = linear_logprobs_at(hidden, head_of(d, weight, bias), ids, **d.options)
        return stats.logprobs[..., place % K], stats.entropy

    judged(d, ours, 2, upstream(len(d.labels), 2, which))


@short_and_long(60, d=heads(), which=UPSTREAM, most=st.integers(1, 30))
def test_linear_kept_logprobs(d: Drawn, which: str, most: int) -> None:
    sets = random_sets(d.case, min(most, len(d.case.weight)))

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return linear_kept_logprobs(hidden, head_of(d, weight, bias), d.labels, *sets, **d.options)

    judged(d, ours, 3, upstream(len(d.labels), 3, which), sets)


@short_and_long(
    60,
    d=heads(),
    which=UPSTREAM,
    layout=st.sampled_from((Tensor.clone, strided, transposed)),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
)
def test_logprobs_from_logits(d: Drawn, which: str, layout: Callable, dtype: torch.dtype) -> None:
    """The logits are the weight of a head whose hidden states are unit vectors, one per token."""
    case = d.case
    wide = [None if t is None else t.double() for t in (case.hidden, case.weight, case.bias)]
    logits = layout(exact_logits(case)(*wide).to(dtype))
    N = len(logits)

    def ours(z: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return logprobs_from_logits(
            z, d.labels, temperature=d.temperature, ignore_index=d.ignore_index
        )

    same = packed([label[None] for label in case.labels.clamp(min=0)])
    plain = from_logits(lambda z, *_: z, case, *same)
    up = upstream(N, 2, which)
    of_logits = replace(case, hidden=logits, weight=logits[:1], bias=None, scale=1.0, softcap=None)
    trained = (True, False, False)
    runs = [
        differentiated(way, of_logits, up, wider, trained)
        for way, wider in (
            (ours, None),
            (lambda *leaves: plain(*leaves)[:2], None),
            (lambda *leaves: plain(*leaves)[:2], torch.float64),
        )
    ]
    size = replace(case, softcap=None)
    for got, theirs, right in zip(*(run[:2] for run in runs), strict=True):
        assert_values(got, theirs, right, size)
    mine, theirs, right = (run[2].double() for run in runs)
    error, of_eager = (mine - right).norm(), (theirs - right).norm()
    assert error <= 4 * of_eager + 4 * torch.finfo(dtype).eps * right.norm() + 1e-5 * sum(
        g.norm() for g in up
    )
    assert not mine[case.labels == IGNORED].any()


# Well away from the kinks of the losses, where a rounding would choose another slope.
STEPS = (0.125, -0.125, 0.5, -0.5, 1.0, -1.0)


@st.composite
def penalties(draw: st.DrawFn) -> KLPenalty | None:
    if draw(st.booleans()):
        return None
    level = draw(st.sampled_from((Level.TOKEN, Level.PRODUCT)))
    importance = draw(st.sampled_from((None, *Level)))
    if level is Level.PRODUCT and importance is Level.TOKEN:
        importance = None
    value = draw(st.sampled_from(KL))
    grad = draw(st.sampled_from((None, *KL)))
    return KLPenalty(0.1, value, grad, level, importance, draw(st.booleans()))


@st.composite
def policies(draw: st.DrawFn) -> PolicyLoss:
    """Every named loss, with a KL at any level, with and without entropy."""
    name = draw(st.sampled_from(sorted(NAMES)))
    loss = loss_of(name)
    return replace(loss, kl=draw(penalties()), entropy_coef=draw(st.sampled_from((0.0, 0.01))))


@short_and_long(
    100,
    d=heads(WIDE),
    loss=policies(),
    columns=st.integers(1, 6),
    is_packed=st.booleans(),
    per_token=st.booleans(),
)
def test_linear_policy_loss(
    d: Drawn, loss: PolicyLoss, columns: int, is_packed: bool, per_token: bool
) -> None:
    """One pass, two passes, and float64."""
    case, T = d.case, min(columns, len(d.labels))
    B = len(d.labels) // T
    rows = B * T
    case = replace(case.rows(torch.arange(rows)), labels=d.case.labels[:rows])
    mask = case.labels != IGNORED
    labels = case.labels.clamp(min=0)
    all_counted = replace(case, labels=labels)

    def exact_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStats:
        sets = packed([label[None] for label in labels])
        stats = from_logits(exact_logits(case), all_counted, *sets)(hidden, weight, bias)
        return TokenStats(*stats[:2])

    def eager_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStats:
        sets = packed([label[None] for label in labels])
        stats = from_logits(eager_logits(case), all_counted, *sets)(hidden, weight, bias)
        return TokenStats(*stats[:2])

    wide = [None if t is None else t.double() for t in (case.hidden, case.weight, case.bias)]
    now = exact_stats(*wide).logprobs.detach()
    choose = torch.tensor(STEPS, dtype=torch.float64)

    def near() -> Tensor:
        noise = 0.01 * torch.randn(rows, dtype=torch.float64)
        return (now - choose[torch.randint(len(STEPS), (rows,))] + noise).where(mask, torch.nan)

    known = {"old_logprobs": near(), "ref_logprobs": near()}
    advantages = torch.randn(rows, dtype=torch.float64)
    if not per_token:
        advantages = advantages.reshape(B, T)[:, :1].expand(B, T).reshape(-1)
    if is_packed:
        lengths = mask.reshape(B, T).sum(-1)
        starts = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
        batch = TokenBatch.packed(
            labels[mask], starts, advantages[mask], **{k: v[mask] for k, v in known.items()}
        )
        chosen = mask.nonzero()[:, 0]
    else:
        shaped = {k: v.reshape(B, T) for k, v in known.items()}
        batch = TokenBatch.padded(
            labels.reshape(B, T), mask.reshape(B, T), advantages.reshape(B, T), **shaped
        )
        chosen = torch.arange(rows)
    temperature = case.temperature[chosen].reshape(batch.shape)

    def one_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None):
        states = hidden[chosen].reshape(*batch.shape, hidden.shape[-1])
        return linear_policy_loss(
            states,
            head_of(d, weight, bias),
            batch,
            loss,
            temperature=temperature,
            chunk_bytes=d.chunk_bytes,
        )

    def two_passes(hidden: Tensor, weight: Tensor, bias: Tensor | None):
        states = hidden[chosen].reshape(*batch.shape, hidden.shape[-1])
        stats = linear_logprobs(
            states,
            head_of(d, weight, bias),
            batch.labels.reshape(batch.shape),
            temperature=temperature,
        )
        return loss(TokenStats(*(t.reshape(-1) for t in stats)), batch)

    def by(stats: Callable):
        def run(hidden: Tensor, weight: Tensor, bias: Tensor | None):
            found = stats(hidden, weight, bias)
            return loss(TokenStats(*(t[chosen] for t in found)), batch)

        return run

    def run(way: Callable, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        up = [torch.ones((), dtype=torch.float64)]
        return differentiated(lambda *leaves: (way(*leaves).loss,), case, up, dtype, d.trained)

    once, twice = run(one_pass), run(two_passes)
    exact, eager = run(by(exact_stats), torch.float64), run(by(eager_stats))
    for a, b in zip(once, twice, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close = 8 * torch.finfo(a.dtype).eps * b.double().norm()
            assert (a.double() - b.double()).norm() <= close + 1e-5 * scale_of(exact)
    if isinstance(loss.surrogate, ClipCov | KLCov) and len(advantages[mask].unique()) < 3:
        # Covariances that are equal: a rounding chooses among their tokens.
        return
    for mine, theirs, right in zip(once, eager, exact, strict=True):
        if mine is not None:
            error, of_eager = ((t.double() - right).norm() for t in (mine, theirs))
            rounded = 4 * torch.finfo(mine.dtype).eps * right.norm()
            assert error <= 4 * of_eager + rounded + 1e-4 * scale_of(exact)
            assert mine.isfinite().all()


def scale_of(results: list[Tensor | None]) -> float:
    """The largest norm among a loss and its gradients; where they are all 0, that of a rounding."""
    return max(0.1, *(float(t.norm()) for t in results if t is not None))

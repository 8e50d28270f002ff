"""Log-probs and logits at several entries per token: against float64, by property, as operators."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import EVERYTHING, FLOATS, IGNORED, Case
from test_kept import packed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_rl import (
    LMHead,
    linear_kept_logprobs,
    linear_logprobs_at,
    ops,
    reference,
)
from fused_rl.linear import AtStats, linear_logits_at
from fused_rl.ops import at
from fused_rl.ops.kept import Slope
from fused_rl.ops.record import Known, Limits, Needs

pytestmark = pytest.mark.usefixtures("poisoned")

PLAIN_CHUNK = 2**14


def random_ids(N: int, K: int, V: int, *, ignored: int = 0) -> Tensor:
    """Entries in any order, some of them twice, some ignored; the first tokens have no others."""
    ids = torch.randint(V, (N, K))
    ids[torch.rand(N, K) < 0.2] = IGNORED
    ids[:, -1] = ids[:, 0].where(torch.rand(N) < 0.5, ids[:, -1])
    ids[:ignored] = IGNORED
    return ids


class Plain(torch.autograd.Function):
    """What serves devices without a kernel, or CUDA."""

    @staticmethod
    def forward(ctx, way, hidden, weight, bias, *rest):
        *of_head, ignore_index, chunk_bytes = (hidden, weight, bias, *rest)
        ctx.args = (ops.AtHead(*of_head), Limits(ignore_index, chunk_bytes))
        forward, ctx.pull = way
        stats = forward(*ctx.args)
        ctx.known = (Known(stats.lse, stats.entropy), at.AtLogits(stats.logits))
        return stats.logprobs, stats.lse, stats.entropy

    @staticmethod
    def backward(ctx, *upstream):
        needs = ctx.needs_input_grad[1:4]
        args = (at.AtUpstream(*upstream), *ctx.args, *ctx.known, Needs(*needs))
        return None, *_wanted(ctx.pull(*args), needs)


class PlainLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, *rest):
        *of_head, ignore_index, chunk_bytes = (hidden, weight, bias, *rest)
        ctx.args = (ops.AtHead(*of_head), Limits(ignore_index, chunk_bytes))
        stats = at.linear_logits_at.plain(*ctx.args)
        ctx.slope = Slope(stats.slope)
        return stats.logits

    @staticmethod
    def backward(ctx, upstream):
        needs = ctx.needs_input_grad[:3]
        args = (at.PickedUpstream(upstream), *ctx.args, ctx.slope, Needs(*needs))
        return _wanted(at.linear_logits_at_backward.plain(*args), needs)


def _wanted(grads, needs):
    return (*[g if n else None for g, n in zip(grads, needs, strict=True)], *(None,) * 7)


def _flat(case: Case, ids: Tensor, weight: Tensor, chunk_bytes: int) -> tuple:
    t = case.temperature.to(reference.acc_dtype(case.hidden.to(weight.dtype), weight))
    return (ids, t, case.scale, case.softcap or 0.0, 0, IGNORED, chunk_bytes)


PLAIN = at.linear_logprobs_at.plain, at.linear_logprobs_at_backward.plain


def fused(case: Case, ids: Tensor):
    def stats(hidden, weight, bias):
        head = LMHead(weight, bias, case.scale, case.softcap)
        return linear_logprobs_at(hidden, head, ids, temperature=case.temperature)

    return stats


def plain(case: Case, ids: Tensor, chunk_bytes: int = PLAIN_CHUNK, way=PLAIN):
    def stats(hidden, weight, bias):
        out = Plain.apply(way, hidden, weight, bias, *_flat(case, ids, weight, chunk_bytes))
        return AtStats(out[0], out[1].to(out[0].dtype), out[2])

    return stats


def by_pairs(case: Case, ids: Tensor, chunk_bytes: int = PLAIN_CHUNK):
    """What serves CUDA, over the kernels of this CPU."""
    return plain(case, ids, chunk_bytes, (at.by_pairs, at.by_pairs_backward))


def fused_logits(case: Case, ids: Tensor):
    def logits(hidden, weight, bias):
        head = LMHead(weight, bias, case.scale, case.softcap)
        return (linear_logits_at(hidden, head, ids, temperature=case.temperature),)

    return logits


def plain_logits(case: Case, ids: Tensor):
    def logits(hidden, weight, bias):
        return (PlainLogits.apply(hidden, weight, bias, *_flat(case, ids, weight, PLAIN_CHUNK)),)

    return logits


WAYS = {"fused": fused, "plain": plain, "by_pairs": by_pairs}
LOGITS = {"fused": fused_logits, "plain": plain_logits}
LOGITS_OF = {**LOGITS, "by_pairs": plain_logits}


def naive(case: Case, ids: Tensor, logits, of_logits: bool = False):
    """What the whole matrix of logits at temperature 1 says."""
    counted = ids != IGNORED
    entries, any_counted = ids.where(counted, 0), counted.any(-1)

    def stats(hidden, weight, bias):
        z = logits(hidden, weight, bias)
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        z = z.to(wide) / case.temperature.to(wide)[:, None]
        if of_logits:
            return (z.gather(-1, entries).where(counted, 0.0),)
        logp = z.log_softmax(-1)
        entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
        of_tokens = (x.where(any_counted, 0.0) for x in (z.logsumexp(-1), entropy))
        return AtStats(logp.gather(-1, entries).where(counted, 0.0), *of_tokens)

    return stats


def exact(case: Case, ids: Tensor, of_logits: bool = False):
    def logits(hidden, weight, bias):
        ones = torch.ones(len(hidden), dtype=torch.float64)
        return reference.logits(hidden, weight, bias, ones, case.scale, case.softcap or 0.0)

    return naive(case, ids, logits, of_logits)


def eager(case: Case, ids: Tensor, of_logits: bool = False):
    def logits(hidden, weight, bias):
        z = F.linear(hidden, weight, bias) * case.scale
        return torch.tanh(z / case.softcap) * case.softcap if case.softcap else z

    return naive(case, ids, logits, of_logits)


def differentiated(stats, case: Case, up, dtype=None, trained=(True, True, True)) -> list:
    """The statistics, then dhidden, dweight, dbias; None for what is not trained."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(train)
        for t, train in zip((case.hidden, case.weight, case.bias), trained, strict=True)
    ]
    out = stats(*leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = iter(
        torch.autograd.grad(out, wanted, [g.to(x.dtype) for g, x in zip(up, out, strict=True)])
    )
    return [x.detach() for x in out] + [
        next(grads) if t is not None and t.requires_grad else None for t in leaves
    ]


def upstream(ids: Tensor, which: str = "all") -> list[Tensor]:
    """Gradients of logprobs, lse and entropy; "pairs": those of each token's logprobs cancel."""
    N, K = ids.shape
    up = [torch.randn(s, dtype=torch.float64) for s in ((N, K), (N,), (N,))]
    if which == "pairs":
        # Of the first two that count, exactly: numbers of few digits.
        up = [torch.zeros_like(g) for g in up]
        for n, row in enumerate(ids.tolist()):
            first = [k for k, v in enumerate(row) if v != IGNORED][:2]
            if len(first) == 2:
                g = float(torch.randint(1, 9, ())) / 4
                up[0][n, first[0]], up[0][n, first[1]] = g, -g
    return up


def assert_no_worse(got, torch_same, right, values: int, roundings: int = 2) -> None:
    for i, (mine, theirs, truth) in enumerate(zip(got, torch_same, right, strict=True)):
        if mine is not None:
            granted = roundings if i >= values else 0
            oracle.assert_no_worse(mine, theirs, truth, summed_in=got[0].dtype, roundings=granted)


# Numbers


@pytest.mark.parametrize("which", ["all", "pairs"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (17, 33, 65, 3), (70, 24, 1100, 9)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients_are_no_worse_than_those_of_torch(dtype, shape, features, way, which):
    N, H, V, K = shape
    case = oracle.random_case(N, H, V, dtype, **(EVERYTHING if features == "everything" else {}))
    ids = random_ids(N, K, V, ignored=N // 6)
    up = upstream(ids, which)
    assert_no_worse(
        differentiated(WAYS[way](case, ids), case, up),
        differentiated(eager(case, ids), case, up),
        differentiated(exact(case, ids), case, up, torch.float64),
        3,
        # The whole and the pairs, rounded each, and their sum.
        roundings=3 if way == "by_pairs" else 2,
    )


@pytest.mark.parametrize("way", LOGITS)
@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (17, 33, 65, 3), (70, 200, 300, 9)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_logits_alone_are_no_worse_than_those_of_torch(dtype, shape, features, way):
    N, H, V, K = shape
    case = oracle.random_case(N, H, V, dtype, **(EVERYTHING if features == "everything" else {}))
    ids = random_ids(N, K, V, ignored=N // 6)
    up = upstream(ids)[:1]
    assert_no_worse(
        differentiated(LOGITS[way](case, ids), case, up),
        differentiated(eager(case, ids, of_logits=True), case, up),
        differentiated(exact(case, ids, of_logits=True), case, up, torch.float64),
        1,
    )


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, 1)])
@pytest.mark.parametrize("which", ["all", "pairs", "logits"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_some_of_the_inputs_are_those_of_all(way, which, trained):
    trained = tuple(bool(t) for t in trained)
    case, ids = oracle.random_case(20, 12, 300, **EVERYTHING), random_ids(20, 4, 300)
    stats = LOGITS_OF[way](case, ids) if which == "logits" else WAYS[way](case, ids)
    up = upstream(ids, which)[: 1 if which == "logits" else 3]
    whole = differentiated(stats, case, up)
    for mine, other in zip(differentiated(stats, case, up, trained=trained), whole, strict=True):
        assert mine is None or torch.equal(mine, other)


@pytest.mark.parametrize("of_weight", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_hidden", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["all", "pairs", "logits"])
@pytest.mark.parametrize("way", WAYS)
def test_mixed_dtypes_and_operands_that_are_not_contiguous(way, which, of_hidden, of_weight):
    case = oracle.random_case(19, 24, 300, of_hidden, weight_dtype=of_weight, bias=True)
    case = replace(
        case,
        weight=case.weight.T.contiguous().T,
        hidden=case.hidden.repeat_interleave(2, -1)[:, ::2],
    )
    ids = random_ids(19, 6, 300).T.contiguous().T
    up = upstream(ids, which)[: 1 if which == "logits" else 3]
    of_logits = which == "logits"
    got = differentiated((LOGITS_OF if of_logits else WAYS)[way](case, ids), case, up)
    right = differentiated(exact(case, ids, of_logits), case, up, torch.float64)
    assert [t.dtype for t in got[-3:]] == [of_hidden, of_weight, of_weight]
    for mine, truth in zip(got, right, strict=True):
        slack = 2 * torch.finfo(mine.dtype).eps
        assert oracle.relative_error(mine, truth) <= max(slack, 2e-6)


def test_by_hand():
    # Logits 0, log 2, log 5 of a vocabulary that adds up to 8.
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log()
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    got = linear_logprobs_at(hidden, weight, torch.tensor([[2, 0, 2, IGNORED]]))
    p = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64) / 8
    right = [float(p[2].log()), float(p[0].log()), float(p[2].log()), 0.0]
    assert got.logprobs[0].tolist() == pytest.approx(right, rel=1e-14)
    assert got.lse.item() == pytest.approx(float(torch.tensor(8.0).double().log()), rel=1e-14)
    assert got.entropy.item() == pytest.approx(-float((p * p.log()).sum()), rel=1e-14)
    mean = float((p * weight[:, 0]).sum())
    for loss, slope in ((got.logprobs.sum(), 2 * float(weight[2]) - 3 * mean), (got.lse, mean)):
        (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        assert grad.item() == pytest.approx(slope, rel=1e-14)


@pytest.mark.parametrize("output", [0, 1, 2, "all", "logits"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", ["plain", "everything"])
def test_gradcheck(features, way, output):
    case = oracle.random_case(
        6, 5, 300, torch.float64, **(EVERYTHING if features == "everything" else {})
    )
    ids = random_ids(6, 4, 300, ignored=1)
    stats = (LOGITS_OF if output == "logits" else WAYS)[way](case, ids)

    def function(*leaves):
        out = tuple(stats(*leaves))
        return out[output] if isinstance(output, int) else out

    leaves = (case.hidden, case.weight, case.bias)
    inputs = [None if t is None else t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


# Properties


@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_id_is_linear_logprobs_to_the_bit(dtype, features):
    case = oracle.random_case(
        70, 24, 700, dtype, ignored=3, **(EVERYTHING if features == "everything" else {})
    )
    ids = case.labels[:, None]
    up = upstream(ids)
    up[1] = torch.zeros(70)
    got = differentiated(fused(case, ids), case, up)
    # With logits that are formed again, not from exponentials.
    right = oracle.ours(case, up[0][:, 0], up[2], chunk_bytes=1)
    mine = (got[0][:, 0], got[2], *got[3:])
    for a, b in zip(mine, right, strict=True):
        oracle.assert_same_bits(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_the_whole_vocabulary_in_any_order(way):
    case = oracle.random_case(20, 24, 90, torch.float64, **EVERYTHING)
    ids = torch.stack([torch.randperm(90) for _ in range(20)])
    logprobs, lse, entropy = WAYS[way](case, ids)(case.hidden, case.weight, case.bias)
    assert oracle.relative_error(logprobs.logsumexp(-1).exp(), torch.ones(20)) < 1e-14
    assert oracle.relative_error(entropy, -(logprobs.exp() * logprobs).sum(-1)) < 1e-14
    z = LOGITS_OF[way](case, ids)(case.hidden, case.weight, case.bias)[0]
    assert oracle.relative_error(z - lse[:, None], logprobs) < 1e-14


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_renormalised_over_the_ids_they_are_those_of_kept_sets(way, dtype):
    case = oracle.random_case(30, 24, 300, dtype, **EVERYTHING)
    ids = torch.stack([torch.randperm(300)[:8] for _ in range(30)])
    g = torch.randn(30, dtype=torch.float64)

    def of_kept(hidden, weight, bias):
        head = LMHead(weight, bias, case.scale, case.softcap)
        sets = packed(list(ids))
        stats = linear_kept_logprobs(hidden, head, ids[:, 3], *sets, temperature=case.temperature)
        return (stats.kept_logprobs,)

    right = differentiated(of_kept, case, [g])
    for stats in (WAYS[way](case, ids), LOGITS_OF[way](case, ids)):
        mine = differentiated(
            lambda *t, stats=stats: (stats(*t)[0].log_softmax(-1)[:, 3],), case, [g]
        )
        for a, b in zip(mine, right, strict=True):
            slack = 2 * torch.finfo(a.dtype).eps
            assert oracle.relative_error(a, b) <= max(slack, 2e-6)


def test_duplicates_share_the_gradient_of_one():
    case, ids = oracle.random_case(9, 8, 300, torch.float64), torch.randint(300, (9, 1))
    one = torch.randn(9, 1, dtype=torch.float64)
    zeros = [torch.zeros(9), torch.zeros(9)]
    for ways, count in ((WAYS, 3), (LOGITS, 1)):
        for way in ways.values():
            right = differentiated(way(case, ids), case, [one, *zeros][:count])
            parts = torch.cat([one * 0.25, one * 0.75], 1)
            got = differentiated(way(case, ids.expand(9, 2)), case, [parts, *zeros][:count])
            for a, b in zip(got[-3:], right[-3:], strict=True):
                assert a is None or oracle.relative_error(a, b) < 1e-14


@pytest.mark.parametrize("which", ["all", "pairs"])
@pytest.mark.parametrize("way", WAYS)
def test_nan_at_ignored_tokens_reaches_nothing(way, which):
    case, ids = oracle.random_case(40, 8, 300, bias=True), random_ids(40, 4, 300, ignored=7)
    up = upstream(ids, which)
    right = differentiated(WAYS[way](case, ids), case, up)
    case.hidden[:7] = torch.nan
    case.temperature[:7] = torch.nan
    for g in up:
        g[:7] = torch.nan
    up[0][ids == IGNORED] = torch.nan
    got = differentiated(WAYS[way](case, ids), case, up)
    for mine, clean in zip(got, right, strict=True):
        oracle.assert_same_bits(mine, clean)
    assert not any(x[:7].any() for x in got[:4]) and not got[0][ids == IGNORED].any()


@pytest.mark.parametrize("which", ["all", "pairs", "logits"])
@pytest.mark.parametrize("way", WAYS)
def test_nan_in_one_hidden_row_poisons_that_row_only(way, which):
    case, ids = oracle.random_case(40, 8, 300, bias=True), torch.randint(300, (40, 4))
    ways, up = (LOGITS_OF if which == "logits" else WAYS), upstream(ids, which)
    up = up[: 1 if which == "logits" else 3]
    right = differentiated(ways[way](case, ids), case, up)
    case.hidden[5, 3] = torch.nan
    got = differentiated(ways[way](case, ids), case, up)
    others = torch.arange(40) != 5
    for mine, clean in zip(got[:-2], right[:-2], strict=True):
        oracle.assert_same_bits(mine[others], clean[others])
    assert got[0][5].isnan().all()
    for g in up:
        g[5] = 0.0
    for t in differentiated(ways[way](case, ids), case, up)[-3:]:
        assert t.isfinite().all()


@pytest.mark.parametrize("size", [1e4, 1e20, 1e30])
@pytest.mark.parametrize("way", WAYS)
def test_huge_logits_that_tie_keep_their_sum(way, size):
    """Two entries of equal logits: a log-prob of -log 2, whatever their size."""
    weight = torch.tensor([[1.0], [1.0], [-1.0]])
    case = Case(torch.full((2, 1), size), weight, None, torch.zeros(2).long(), torch.ones(2))
    got = differentiated(
        WAYS[way](case, torch.tensor([[0, 1], [1, 2]])),
        case,
        [torch.ones(2, 2), *torch.zeros(2, 2)],
    )
    half = float(torch.tensor(0.5).log())
    assert got[0][0].tolist() == pytest.approx([half, half], rel=1e-6)
    assert got[0][1].tolist() == pytest.approx([half, half - 2 * size], rel=1e-6)
    assert got[-3].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_an_entry_that_cannot_be_sampled_has_minus_infinity_and_leaves_the_others_alone(way):
    case = oracle.random_case(9, 8, 300, bias=True)
    case.bias[7] = -torch.inf
    ids = torch.tensor([[7, 3, 299]]).expand(9, 3)
    up = upstream(ids)
    up[0][:, 0] = 0.0
    got = differentiated(WAYS[way](case, ids), case, up)
    assert (got[0][:, 0] == -torch.inf).all() and got[0][:, 1:].isfinite().all()
    assert all(t.isfinite().all() for t in got[1:]) and got[5][7] == 0


@pytest.mark.parametrize("N", [0, 4], ids=["no tokens", "all ignored"])
@pytest.mark.parametrize("way", WAYS)
def test_without_counted_tokens_gradients_are_zeros(way, N):
    case = oracle.random_case(N, 8, 30, bias=True)
    ids = torch.full((N, 3), IGNORED)
    for ways, count in ((WAYS, 3), (LOGITS_OF, 1)):
        got = differentiated(ways[way](case, ids), case, upstream(ids)[:count])
        assert got[0].shape == (N, 3) and not any(t.any() for t in got)
        assert [t.shape for t in got[-3:]] == [(N, 8), (30, 8), (30,)]


@pytest.mark.parametrize("which", ["all", "pairs", "logits"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_run_to_run_and_on_any_number_of_threads(dtype, which, threads):
    case, ids = oracle.random_case(150, 72, 1500, dtype, **EVERYTHING), random_ids(150, 9, 1500)
    # torch's own products, of the plain way, have other bits on other numbers of threads.
    ways = LOGITS.values() if which == "logits" else (fused, by_pairs)
    up = upstream(ids, which)[: 1 if which == "logits" else 3]
    for way in ways:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(differentiated(way(case, ids), case, up))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                oracle.assert_same_bits(a, b)


@pytest.mark.parametrize("way", [plain, by_pairs])
@pytest.mark.parametrize("chunk_bytes", [1, 700, 2**20])
def test_results_do_not_depend_on_chunk_bytes(chunk_bytes, way):
    case, ids = oracle.random_case(20, 12, 300, torch.float64, **EVERYTHING), random_ids(20, 5, 300)
    up = upstream(ids)
    whole = differentiated(way(case, ids), case, up)
    got = differentiated(way(case, ids, chunk_bytes), case, up)
    for mine, other in zip(got, whole, strict=True):
        assert oracle.relative_error(mine, other) < 1e-14


def test_more_tokens_than_one_pass_of_the_backward_takes():
    case, ids = oracle.random_case(4200, 3, 700, bias=True), random_ids(4200, 3, 700)
    up = upstream(ids)
    assert_no_worse(
        differentiated(fused(case, ids), case, up),
        differentiated(eager(case, ids), case, up),
        differentiated(exact(case, ids), case, up, torch.float64),
        3,
    )


@pytest.mark.parametrize("call", [linear_logprobs_at, linear_logits_at])
def test_leading_shapes_and_int32_and_chunk_bytes(call):
    case, ids = oracle.random_case(24, 8, 300), random_ids(24, 5, 300)
    flat = call(case.hidden, case.weight, ids, temperature=0.5 + torch.arange(24.0) / 24)
    shaped = call(
        case.hidden.reshape(2, 3, 4, 8),
        case.weight,
        ids.reshape(2, 3, 4, 5).int(),
        temperature=(0.5 + torch.arange(24.0) / 24).reshape(2, 3, 4),
        chunk_bytes=1000,
    )
    flat, shaped = ((x,) if isinstance(x, Tensor) else x for x in (flat, shaped))
    for a, b in zip(flat, shaped, strict=True):
        assert b.shape[:3] == (2, 3, 4) and torch.equal(a, b.reshape(a.shape))
    one = call(case.hidden[3], case.weight, ids[3])
    assert (one if isinstance(one, Tensor) else one.logprobs).shape == (5,)


@pytest.mark.parametrize("ignore_index", [IGNORED, -1, 7, 2**40])
def test_any_number_marks_what_is_ignored(ignore_index):
    case, ids = oracle.random_case(20, 8, 30), random_ids(20, 4, 30)
    ids = ids.where(ids != 7, 8)
    right = linear_logprobs_at(case.hidden, case.weight, ids)
    got = linear_logprobs_at(
        case.hidden,
        case.weight,
        ids.where(ids != IGNORED, ignore_index),
        ignore_index=ignore_index,
    )
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("call", [linear_logprobs_at, linear_logits_at])
def test_autocast_multiplies_in_its_dtype(call):
    case, ids = oracle.random_case(9, 8, 30), random_ids(9, 4, 30)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(case.hidden, case.weight, ids)
    right = call(case.hidden.bfloat16(), case.weight.bfloat16(), ids)
    cast, right = ((x,) if isinstance(x, Tensor) else x for x in (cast, right))
    for a, b in zip(cast, right, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


# Errors


@pytest.mark.parametrize("call", [linear_logprobs_at, linear_logits_at])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [[1, 10], [2, 3]],
            r"ids\[0, 1\] is 10, outside the vocabulary \[0, 10\) and not ignore_i",
        ),
        ([[1, 2], [IGNORED, -1]], r"ids\[1, 1\] is -1, outside the vocabulary"),
    ],
)
def test_an_id_outside_the_vocabulary_raises_and_names_its_place(call, ids, message):
    case, ids = oracle.random_case(2, 4, 10), torch.tensor(ids)
    with pytest.raises(ValueError, match=message):
        call(case.hidden, case.weight, ids)
    with pytest.raises(ValueError, match=message):
        of = at.linear_logprobs_at if call is linear_logprobs_at else at.linear_logits_at
        _named_plain(of, case, ids)


def _named_plain(operator, case: Case, ids: Tensor) -> None:
    from fused_rl import checks

    try:
        head = ops.AtHead(case.hidden, case.weight, None, ids, torch.ones(2), 1.0, 0.0)
        operator.plain(head, Limits(IGNORED, 2**20))
    except ValueError as error:
        raise ValueError(checks.placed(str(error), ids.shape, "ids")) from error


@pytest.mark.parametrize("call", [linear_logprobs_at, linear_logits_at])
@pytest.mark.parametrize(
    ("ids", "temperature", "message"),
    [
        (torch.zeros(2, 3), 1.0, "ids must be an int64 or int32 tensor, got torch.float32"),
        ([[1]], 1.0, "ids must be an int64 or int32 tensor, got list"),
        (torch.zeros(3, 3).long(), 1.0, r"K >= 1, got ids \[3, 3\] and hidden \[2, 4\]"),
        (torch.zeros(2, 0).long(), 1.0, r"K >= 1, got ids \[2, 0\] and hidden \[2, 4\]"),
        (torch.zeros(2).long(), 1.0, r"K >= 1, got ids \[2\] and hidden \[2, 4\]"),
        (torch.zeros(2, 1).long(), torch.tensor([1.0, 0.0]), r"^temperature\[1\] is 0"),
        (torch.zeros(2, 1).long(), torch.ones(3), r"temperature must broadcast to .* \[3\]"),
    ],
)
def test_arguments_of_another_form_raise(call, ids, temperature, message):
    case = oracle.random_case(2, 4, 10)
    with pytest.raises(ValueError, match=message):
        call(case.hidden, case.weight, ids, temperature=temperature)


def test_where_nobody_may_look_a_wrong_id_gives_nan_and_no_gradient_elsewhere(monkeypatch):
    """As on CUDA, where looking would wait for the device."""
    unchecked = at.Chosen.of
    monkeypatch.setattr(
        at,
        "_checked",
        lambda head, limits: unchecked(head.ids, len(head.weight), limits.ignore_index),
    )
    case, ids = oracle.random_case(3, 4, 10), torch.tensor([[1, 2], [3, 10], [4, 5]])
    ones = [torch.ones(3, 2), torch.ones(3), torch.ones(3)]
    got = differentiated(by_pairs(case, ids), case, ones)
    assert got[0].isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert got[3].isnan().any(-1).tolist() == [False, True, False]


# As torch sees it


def _samples(dtype, bias=True):
    case = oracle.random_case(7, 6, 300, dtype, **{**EVERYTHING, "bias": bias})
    t = case.temperature.to(reference.acc_dtype(case.hidden))
    ids = random_ids(7, 3, 300, ignored=2)
    return (case.hidden, case.weight, case.bias, ids, t, 0.7, 3.0, 1, IGNORED, 2**20)


STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("operator", [at.linear_logprobs_at, at.linear_logits_at])
def test_opcheck(operator, dtype):
    for bias in (True, False):
        args = _samples(dtype, bias)
        torch.library.opcheck(operator.op, args, test_utils=STATIC)
        leaves = [None if t is None else t.clone().requires_grad_() for t in args[:3]]
        torch.library.opcheck(operator.op, (*leaves, *args[3:]), test_utils=STATIC)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck_of_the_backward_passes(dtype):
    for bias in (True, False):
        args = _samples(dtype, bias)
        logprobs, lse, entropy, logits = at.linear_logprobs_at.op(*args)
        slope = at.linear_logits_at.op(*args)[1]
        for need in (True, False):
            needs = (need, not need, bias and need)
            for dense in (torch.randn_like(lse), torch.zeros_like(lse)):
                up = (logprobs * 0 if dense.any() else torch.randn_like(logprobs), dense)
                torch.library.opcheck(
                    at.linear_logprobs_at_backward.op,
                    (*up, dense.to(entropy), *args, lse, entropy, logits, *needs),
                    test_utils=STATIC,
                )
            torch.library.opcheck(
                at.linear_logits_at_backward.op,
                (torch.randn_like(slope), *args, slope, *needs),
                test_utils=STATIC,
            )


@pytest.mark.parametrize("operator", [at.linear_logprobs_at, at.linear_logits_at])
def test_opcheck_of_gradients_under_aot_dispatch(operator):
    args = _samples(torch.float32)
    leaves = [t.clone().requires_grad_() for t in args[:3]]
    torch.library.opcheck(operator.op, (*leaves, *args[3:]), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("call", [linear_logprobs_at, linear_logits_at])
def test_compiled_equals_eager(call):
    torch._dynamo.reset()

    def loss(hidden, weight, bias, ids, g):
        out = call(hidden, LMHead(weight, bias, 0.7, 3.0), ids, temperature=0.9)
        out = (out,) if isinstance(out, Tensor) else out
        return (out[0] * g).sum() + sum((x * g[:, 0]).sum() for x in out[1:])

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (5, 12, 40):
        case = oracle.random_case(N, 6, 300, bias=True)
        rest = (random_ids(N, 3, 300), torch.randn(N, 3))
        results = []
        for function in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
            value = function(*leaves, *rest)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for a, b in zip(*results, strict=True):
            assert oracle.relative_error(a, b) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("call", [linear_logprobs_at, linear_logits_at])
def test_without_values_there_are_shapes(call, device):
    shapes = {"hidden": (2, 5, 8), "weight": (30, 8)}
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        hidden, weight = (torch.empty(s, requires_grad=True) for s in shapes.values())
        out = call(hidden, weight, torch.empty(2, 5, 3, dtype=torch.int64))
        out = (out,) if isinstance(out, Tensor) else tuple(out)
        assert [x.shape for x in out] == [(2, 5, 3), (2, 5), (2, 5)][: len(out)]
        grads = torch.autograd.grad(sum(x.sum() for x in out), (hidden, weight))
        assert [g.shape for g in grads] == list(shapes.values())


MEMORY = """
import sys
sys.path.insert(0, {tests!r})
import torch, test_at, oracle
from fused_rl.bench.clock import process_bytes

def run(N, V):
    case, ids = oracle.random_case(N, 8, V), torch.randint(V, (N, 4))
    for which in ("all", "pairs"):
        for way in test_at.WAYS.values():
            test_at.differentiated(way(case, ids), case, test_at.upstream(ids, which))

run(64, 1000)
before = process_bytes("VmHWM")
run(1500, 50000)
print(process_bytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_not_that_of_the_logits():
    code = MEMORY.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1500 * 50000 * 4 / 4

"""linear_statistics: against float64, by property, as operators."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import EVERYTHING, FLOATS, IGNORED
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_rl import LMHead, linear_logprobs, linear_statistics, linear_top_logprobs, ops
from fused_rl.linear import LogitStats, Statistic
from fused_rl.ops import statistics
from fused_rl.ops.frozen import Unit
from fused_rl.ops.record import Limits, Needs

pytestmark = pytest.mark.usefixtures("poisoned")

ALL = (Statistic.COLLISION, Statistic.MEAN_LOGIT)
PLAIN_CHUNK = 2**14


def of_plain(case, frozen, top=4):
    """What serves devices without a kernel: LogitStats, and gradients of an upstream."""
    head = ops.Head(
        *(case.hidden, case.weight, case.bias, case.labels, case.temperature.to(_wide(case))),
        *(case.scale, case.softcap or 0.0),
    )
    limits, asked = Limits(IGNORED, PLAIN_CHUNK), ops.Asked(True, True, top)
    op = statistics.linear_statistics_frozen if frozen else statistics.linear_statistics
    out = op.plain(head, asked, limits)

    def pull(up):
        known = statistics.KnownLabels(out.logprobs, out.lse, out.entropy)
        has = [bool(g.any()) for g in up]
        given = statistics.AskedGiven(has[1], has[2])
        up = statistics.AskedUpstream(up[0].to(out.entropy), up[1].to(out.entropy), up[2])
        if frozen:
            of_head = statistics.linear_statistics_frozen_backward.plain
            return of_head(up, head, limits, known, Unit(out.unit), given), None, None
        needs = Needs(True, True, case.bias is not None)
        found = statistics.linear_statistics_backward.plain(up, head, limits, known, given, needs)
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))

    return LogitStats(*out[:7]), pull


def of_kernel(case, frozen, top=4):
    leaves = [case.hidden.clone().requires_grad_()]
    weight, bias = (
        None if t is None else t.clone().requires_grad_(not frozen)
        for t in (case.weight, case.bias)
    )
    leaves += [t for t in (weight, bias) if t is not None and not frozen]
    head = LMHead(weight, bias, case.scale, case.softcap)
    options = {"top": top, "temperature": case.temperature}
    stats = linear_statistics(leaves[0], head, case.labels, ALL, **options)

    def pull(up):
        # One that is 0 everywhere is none at all.
        pairs = [(x, g.to(x)) for x, g in zip(stats, up, strict=False) if len(g) == 0 or g.any()]
        found = torch.autograd.grad(
            [x for x, _ in pairs], leaves, [g for _, g in pairs], retain_graph=True
        )
        return (*found, *(None,) * (3 - len(found)))

    return stats, pull


WAYS = {"kernel": of_kernel, "plain": of_plain}


def _wide(case):
    return torch.float64 if case.hidden.dtype == torch.float64 else torch.float32


def by_logits(case, up, dtype, top=4):
    """From all logits, formed in a dtype: LogitStats, and gradients by autograd."""
    leaves = [
        None if t is None else t.detach().to(dtype, copy=True).requires_grad_()
        for t in (case.hidden, case.weight, case.bias)
    ]
    z = F.linear(*leaves) * case.scale
    z = torch.tanh(z / case.softcap) * case.softcap if case.softcap else z
    z = z.to(torch.promote_types(dtype, torch.float32)) / case.temperature.to(dtype)[:, None]
    counted = case.labels != IGNORED
    logp = z.log_softmax(-1)
    of_label = logp.gather(-1, case.labels.where(counted, 0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    lse = z.logsumexp(-1)
    pairs = zip(up, (of_label, entropy, lse), strict=True)
    sum((g.to(x) * x * counted).sum() for g, x in pairs).backward()
    ids = z.sort(dim=-1, descending=True, stable=True).indices[:, :top]
    found = (of_label, entropy, lse, (2 * logp).exp().sum(-1), z.mean(-1))
    found = [x.detach().masked_fill(~counted, 0) for x in found]
    many = [x.detach().masked_fill(~counted[:, None], 0) for x in (ids, logp.gather(-1, ids))]
    return LogitStats(*found, *many), [None if t is None else t.grad for t in leaves]


UPSTREAM = {"logprobs": (1, 0, 0), "lse": (0, 0, 1), "entropy": (0, 1, 0), "all": (1, 1, 1)}


def upstream(N, which="all"):
    return [on * torch.randn(N, dtype=torch.float64) for on in UPSTREAM[which]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["bare", "everything"])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_no_worse_than_torch_on_logits(way, options, frozen, dtype):
    torch.manual_seed(0)
    case = oracle.random_case(90, 40, 2300, dtype, logit_std=2.0, ignored=3, **options)
    up = upstream(90)
    right, of_right = by_logits(case, up, torch.float64)
    eager, of_eager = by_logits(case, up, dtype)
    stats, pull = WAYS[way](case, frozen)
    for ours, theirs, exact in zip(stats[:5], eager[:5], right[:5], strict=True):
        oracle.assert_no_worse(ours, theirs, exact)
    # Neighbours may change places where they differ by a rounding.
    there = right.top_logprobs
    at_ours = by_logits(case, up, torch.float64, top=2300)[0]
    place = (at_ours.top_ids[:, None] == stats.top_ids[:, :, None]).float().argmax(-1)
    torch.testing.assert_close(at_ours.top_logprobs.gather(-1, place), there, atol=2e-5, rtol=0)
    assert (stats.top_ids == right.top_ids).float().mean() > 0.99
    torch.testing.assert_close(stats.top_logprobs.double(), there, atol=2e-5, rtol=0)
    for ours, theirs, exact in zip(pull(up), of_eager, of_right, strict=True):
        if ours is not None:
            # Where pairs are added to a sum it is rounded once more.
            oracle.assert_no_worse(ours, theirs, exact, roundings=2)


@pytest.mark.parametrize("which", UPSTREAM)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_each_in_float64(way, frozen, which):
    torch.manual_seed(1)
    case = oracle.random_case(20, 9, 500, torch.float64, ignored=2, **EVERYTHING)
    up = upstream(20, which)
    up[2][5:9] = 0
    up[1][7:12] = 0
    found, (_, right) = WAYS[way](case, frozen)[1](up), by_logits(case, up, torch.float64)
    for ours, exact in zip(found, right, strict=True):
        if ours is not None:
            assert oracle.relative_error(ours, exact) < 1e-12


def test_gradcheck():
    torch.manual_seed(0)
    case = oracle.random_case(5, 4, 11, torch.float64, ignored=1, **EVERYTHING)

    def function(hidden, weight, bias):
        head = LMHead(weight, bias, case.scale, case.softcap)
        return tuple(linear_statistics(hidden, head, case.labels)[:3])

    leaves = [t.requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    torch.autograd.gradcheck(function, leaves)
    for t in leaves[1:]:
        t.requires_grad_(False)
    torch.autograd.gradcheck(lambda hidden: function(hidden, *leaves[1:]), leaves[:1])


def test_the_gradient_of_the_z_loss_is_twice_lse_times_p():
    h, w = torch.randn(6, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    w.requires_grad_()
    (linear_statistics(h, w, torch.zeros(6, dtype=torch.long)).lse ** 2).sum().backward()
    z = (h @ w.detach().T).requires_grad_()
    p = z.softmax(-1).detach()
    dz = 2 * z.detach().logsumexp(-1)[:, None] * p
    assert oracle.relative_error(w.grad, dz.T @ h) < 1e-13


UNCAPPED = {**EVERYTHING, "softcap": None}
with_and_without_softcap = pytest.mark.parametrize(
    "options", [EVERYTHING, UNCAPPED], ids=["softcap", "no softcap"]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@with_and_without_softcap
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_first_two_are_those_of_linear_logprobs_bit_by_bit(frozen, options, dtype):
    case = oracle.random_case(70, 48, 3000, dtype, ignored=4, **options)
    stats, _ = of_kernel(case, frozen)
    given = (case.hidden.clone().requires_grad_(), case.head, case.labels)
    temperature = {"temperature": case.temperature}
    top = linear_top_logprobs(*given, **temperature)
    for ours, theirs in zip(stats[:2], linear_logprobs(*given, **temperature), strict=True):
        oracle.assert_same_bits(ours.detach(), theirs.detach())
    oracle.assert_same_bits(stats.top_logprobs[:, 0], top.top_logprobs)


@with_and_without_softcap
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_same_bits_on_any_number_of_threads(frozen, options):
    case = oracle.random_case(200, 24, 5000, torch.bfloat16, **options)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(of_kernel(case, frozen, top=32)[0])
    torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


# Exponentials that are kept for the backward pass

keeps_exponentials = pytest.mark.skipif(
    "bfloat16" not in ops.native.cpu_features(), reason="this CPU has no bfloat16 products"
)


@keeps_exponentials
@pytest.mark.parametrize("chunk_bytes", [None, 2**16])
@pytest.mark.parametrize("which", UPSTREAM)
def test_the_backward_pass_of_a_logprob_forms_no_logits_again(which, chunk_bytes):
    """A bias that is none any more is seen where they are formed, and nowhere else."""
    case = oracle.random_case(90, 40, 2300, torch.bfloat16, ignored=3, **UNCAPPED)
    leaves = [t.requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    options = {"temperature": case.temperature, "chunk_bytes": chunk_bytes, "top": 1}
    stats = linear_statistics(leaves[0], case.head, case.labels, ALL, **options)
    value = sum((on * x).sum() for on, x in zip(UPSTREAM[which], stats, strict=False) if on)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    case.bias.data.fill_(torch.nan)
    again = torch.autograd.grad(value, leaves)
    assert all(g.isfinite().all() for g in first)
    same = [torch.equal(a, b) for a, b in zip(first, again, strict=True)]
    assert same == [which == "logprobs" and chunk_bytes is None] * 3


@keeps_exponentials
@pytest.mark.parametrize("options", [{}, UNCAPPED], ids=["bare", "no softcap"])
@pytest.mark.parametrize("which", UPSTREAM)
def test_gradients_of_exponentials_are_no_worse_than_torch_on_logits(which, options):
    case = oracle.random_case(90, 40, 2300, torch.bfloat16, logit_std=2.0, ignored=3, **options)
    up = upstream(90, which)
    up[0][10:15] = up[1][10:15] = up[2][10:15] = 0
    found, of_eager, of_right = (
        of_kernel(case, False)[1](up),
        *(by_logits(case, up, dtype)[1] for dtype in (torch.bfloat16, torch.float64)),
    )
    for ours, theirs, exact in zip(found, of_eager, of_right, strict=True):
        if ours is not None:
            oracle.assert_no_worse(ours, theirs, exact, roundings=2)


@keeps_exponentials
def test_gradients_of_exponentials_are_those_of_linear_logprobs_bit_by_bit():
    case = oracle.random_case(70, 48, 3000, torch.bfloat16, ignored=4, **UNCAPPED)
    up = upstream(70, "logprobs")
    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    options = {"temperature": case.temperature}
    theirs = linear_logprobs(leaves[0], LMHead(*leaves[1:], case.scale), case.labels, **options)
    of_theirs = torch.autograd.grad(theirs.logprobs, leaves, up[0].float())
    for a, b in zip(of_kernel(case, False)[1](up), of_theirs, strict=True):
        oracle.assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@with_and_without_softcap
def test_what_is_stored_changes_no_value(options, dtype):
    """In C++ and in plain torch."""
    case = oracle.random_case(20, 9, 500, dtype, ignored=2, **options)
    of_head = (case.hidden, case.weight, case.bias, case.labels, case.temperature.to(_wide(case)))
    head = ops.Head(*of_head, case.scale, case.softcap or 0.0)
    rest = (ops.Asked(True, True, 3), Limits(IGNORED, 2**20))
    right = statistics.linear_statistics(head, *rest)
    for way in (statistics.linear_statistics_stored, statistics.linear_statistics_stored.plain):
        found = way(head, *rest)
        assert found.rows.tolist() == list(range(2, 20))
        for a, b in zip(found, right, strict=False):
            oracle.assert_same_bits(a, b)


def test_collision_is_that_of_half_the_temperature():
    case = oracle.random_case(30, 16, 700, torch.float64)
    once, half = (
        linear_statistics(case.hidden, case.head, case.labels, ALL, temperature=t)
        for t in (1.0, 0.5)
    )
    assert oracle.relative_error(once.collision, (half.lse - 2 * once.lse).exp()) < 1e-13
    assert oracle.relative_error(half.mean_logit, 2 * once.mean_logit) < 1e-13


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", WAYS)
def test_of_entries_that_tie_the_first_comes_first(way, frozen):
    # Products are exact, so that ties are ties whatever the order of sums.
    case = oracle.random_case(50, 8, 1500)
    case = replace(case, hidden=torch.randint(-2, 3, (50, 8)) / 4.0)
    case = replace(case, weight=torch.randint(-1, 2, (1500, 8)) / 4.0)
    stats, _ = WAYS[way](case, frozen, 32)
    z = case.hidden @ case.weight.T
    right = z.sort(dim=-1, descending=True, stable=True).indices[:, :32]
    assert torch.equal(stats.top_ids, right)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", WAYS)
def test_entries_that_cannot_be_sampled(way, frozen):
    case = oracle.random_case(6, 8, 300, bias=True)
    case.bias[3:] = -torch.inf
    case.labels[:] = torch.tensor([0, 1, 2, 0, 1, 2])
    stats, pull = WAYS[way](case, frozen, 5)
    right, _ = by_logits(case, upstream(6), torch.float64, 5)
    assert torch.equal(stats.top_ids, right.top_ids)
    assert (stats.top_ids[:, 3:] == torch.tensor([3, 4])).all()
    assert (stats.top_logprobs[:, 3:] == -torch.inf).all()
    assert (stats.mean_logit == -torch.inf).all()
    assert oracle.relative_error(stats.collision, right.collision) < 1e-6
    assert all(g.isfinite().all() for g in pull(upstream(6)) if g is not None)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", WAYS)
def test_a_nan_is_of_its_token_alone(way, frozen):
    case = oracle.random_case(6, 8, 3000)
    case.hidden[2] = torch.nan
    case.hidden[4], case.labels[4] = torch.nan, IGNORED
    stats, pull = WAYS[way](case, frozen)
    for x in stats:
        if x.is_floating_point():
            assert x.isnan().view(6, -1).any(-1).tolist() == [False, False, True, *[False] * 3]
            assert (x[4] == 0).all()
    assert ((stats.top_ids >= 0) & (stats.top_ids < 3000)).all()
    up = upstream(6)
    assert pull(up)[0].isnan().any(-1).tolist() == [False, False, True, *[False] * 3]
    for g in up:
        g[2] = 0
    assert all(g.isfinite().all() for g in pull(up) if g is not None)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1e30, 1e4, 1e-30])
def test_logits_of_any_size(size, way, frozen):
    case = oracle.random_case(8, 4, 200)
    case = replace(case, hidden=torch.ones(8, 4), weight=torch.zeros(200, 4))
    case.weight[5:7] = size / 4
    stats, _ = WAYS[way](case, frozen, 3)
    alone = 2 if size > 1 else 200
    torch.testing.assert_close(stats.collision, torch.full((8,), 1 / alone))
    torch.testing.assert_close(stats.mean_logit, torch.full((8,), size / 100))
    log2 = torch.full((8, 2), float(alone)).log().neg()
    torch.testing.assert_close(stats.top_logprobs[:, :2], log2)
    assert stats.top_ids[:, :2].tolist() == [[5, 6]] * 8


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("N", [0, 5])
def test_without_tokens_that_count(N, way, frozen):
    case = oracle.random_case(N, 8, 300, ignored=N)
    stats, pull = WAYS[way](case, frozen)
    assert [tuple(x.shape) for x in stats] == [(N,)] * 5 + [(N, 4)] * 2
    assert not any(x.any() for x in stats)
    grads = pull([torch.ones(N, dtype=torch.float64)] * 3)
    assert not any(g.any() for g in grads if g is not None)


def test_shapes_and_what_was_not_asked_for():
    hidden, weight = torch.randn(2, 3, 8), torch.randn(20, 8)
    labels = torch.randint(20, (2, 3), dtype=torch.int32)
    stats = linear_statistics(hidden, weight, labels)
    assert [None if x is None else x.shape for x in stats] == [(2, 3)] * 3 + [None] * 4
    stats = linear_statistics(hidden, weight, labels, Statistic.COLLISION, top=1)
    assert stats.collision.shape == (2, 3)
    assert stats.mean_logit is None
    assert stats.top_ids.shape == stats.top_logprobs.shape == (2, 3, 1)
    assert torch.equal(stats.top_ids[..., 0], (hidden @ weight.T).argmax(-1))
    everything = linear_statistics(hidden, weight, labels, [*ALL], top=20)
    assert torch.allclose(everything.top_logprobs.exp().sum(-1), torch.ones(2, 3))
    assert [x.requires_grad for x in stats[:4]] == [False] * 4


def test_only_the_first_three_have_gradients():
    weight = torch.randn(20, 8, requires_grad=True)
    stats = linear_statistics(torch.randn(3, 8), weight, torch.zeros(3, dtype=int), ALL, top=2)
    assert [x.requires_grad for x in stats] == [True] * 3 + [False] * 4


@pytest.mark.parametrize(
    ("of", "top", "said"),
    [
        ("collision", 0, "of must be a Statistic or several of them, got 'collision'"),
        (("collision",), 0, "of must be a Statistic or several of them"),
        ((), 33, "top must be from 0 to 32 for 40 entries, got 33"),
        ((), -1, "top must be from 0 to 32 for 40 entries, got -1"),
        ((), 1.0, "top must be a 64-bit integer, got 1.0"),
    ],
)
def test_what_cannot_be_asked_for(of, top, said):
    with pytest.raises(ValueError, match=said):
        linear_statistics(
            torch.randn(2, 8), torch.randn(40, 8), torch.zeros(2, dtype=int), of, top=top
        )


def test_a_top_beyond_a_small_vocabulary():
    with pytest.raises(ValueError, match="top must be from 0 to 5 for 5 entries, got 6"):
        linear_statistics(torch.randn(2, 8), torch.randn(5, 8), torch.zeros(2, dtype=int), top=6)


# As torch sees it


def _samples(dtype, bias=True):
    case = oracle.random_case(7, 6, 300, dtype, ignored=1, **{**EVERYTHING, "bias": bias})
    t = case.temperature.to(_wide(case))
    of_head = (case.hidden, case.weight, case.bias, case.labels, t, 0.7, 3.0, 1)
    for asked in ((True, True, 3), (False, True, 0), (True, False, 1), (False, False, 0)):
        yield (*of_head, *asked, IGNORED, 2**20)


STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["linear_statistics", "linear_statistics_frozen"])
def test_opcheck(name, bias, dtype):
    operator, count = getattr(statistics, name), 1 if name.endswith("frozen") else 3
    for args in _samples(dtype, bias):
        torch.library.opcheck(operator.op, args, test_utils=STATIC)
        leaves = [None if t is None else t.clone().requires_grad_() for t in args[:count]]
        torch.library.opcheck(operator.op, (*leaves, *args[count:]), test_utils=STATIC)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck_of_the_backward_passes(dtype):
    args = next(_samples(dtype))
    logprobs, entropy, lse, *_, unit = statistics.linear_statistics_frozen.op(*args)
    up = (torch.randn_like(logprobs), torch.randn_like(entropy), torch.randn_like(lse))
    rest = (*up, *args[:8], *args[-2:], logprobs, lse, entropy)
    for given in ((True, True), (True, False), (False, True), (False, False)):
        backward = statistics.linear_statistics_frozen_backward.op
        torch.library.opcheck(backward, (*rest, unit, *given), test_utils=STATIC)
        backward = statistics.linear_statistics_backward.op
        torch.library.opcheck(backward, (*rest, *given, True, False, True), test_utils=STATIC)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_opcheck_of_what_is_stored(softcap, dtype):
    operator = statistics.linear_statistics_stored
    for args in _samples(dtype):
        # All of them count: how many do is no shape that is known before.
        args = (*args[:3], args[3].clamp_min(0), *args[4:6], softcap, *args[7:])
        torch.library.opcheck(operator.op, args, test_utils=STATIC)
        leaves = [t.clone().requires_grad_() for t in args[:3]]
        torch.library.opcheck(operator.op, (*leaves, *args[3:]), test_utils=STATIC)
    logprobs, entropy, lse, *_, rows, z = operator.op(*args)
    up = (torch.randn_like(logprobs), torch.randn_like(entropy), torch.randn_like(lse))
    rest = (*up, *args[:8], *args[-2:], logprobs, lse, entropy, rows, z)
    backward = statistics.linear_statistics_stored_backward.op
    for given in itertools.product([False, True], repeat=2):
        torch.library.opcheck(backward, (*rest, *given, True, False, True), test_utils=STATIC)


@pytest.mark.parametrize("name", ["linear_statistics", "linear_statistics_frozen"])
def test_opcheck_of_gradients_under_aot_dispatch(name):
    operator, count = getattr(statistics, name), 1 if name.endswith("frozen") else 3
    args = next(_samples(torch.float32))
    leaves = [t.clone().requires_grad_() for t in args[:count]]
    torch.library.opcheck(
        operator.op, (*leaves, *args[count:]), test_utils="test_aot_dispatch_dynamic"
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_compiled_equals_eager(frozen):
    torch._dynamo.reset()

    def loss(hidden, weight, bias, labels, g):
        head = LMHead(weight, bias, 0.7, 3.0)
        out = linear_statistics(hidden, head, labels, ALL, top=2, temperature=0.9)
        return sum((x * g).sum() for x in out[:5]) + (out.top_logprobs * out.top_ids).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (5, 12, 40):
        case = oracle.random_case(N, 6, 300, bias=True)
        results = []
        for function in (loss, compiled):
            leaves = [case.hidden.clone().requires_grad_()]
            of_head = [t.clone().requires_grad_(not frozen) for t in (case.weight, case.bias)]
            leaves += [] if frozen else of_head
            value = function(leaves[0], *of_head, case.labels, case.temperature)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for a, b in zip(*results, strict=True):
            assert oracle.relative_error(a, b) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_without_values_there_are_shapes(device):
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        hidden, weight = (torch.empty(s, requires_grad=True) for s in ((2, 5, 8), (30, 8)))
        labels = torch.empty(2, 5, dtype=torch.int64)
        out = linear_statistics(hidden, weight, labels, ALL, top=3)
        assert [x.shape for x in out] == [(2, 5)] * 5 + [(2, 5, 3)] * 2
        grads = torch.autograd.grad(sum(x.sum() for x in out[:3]), (hidden, weight))
        assert [g.shape for g in grads] == [hidden.shape, weight.shape]


MEMORY = """
import sys
sys.path.insert(0, {tests!r})
import torch, test_statistics, oracle
from fused_rl.bench.clock import process_bytes

def run(N, V):
    case = oracle.random_case(N, 8, V)
    for frozen in (False, True):
        for way in test_statistics.WAYS.values():
            way(case, frozen, 1)[1](test_statistics.upstream(N))

run(64, 1000)
before = process_bytes("VmHWM")
run(200, 50000)
print(process_bytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_not_that_of_the_logits():
    code = MEMORY.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 50000 * 4 / 2

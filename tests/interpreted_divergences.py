"""The kernels of two heads in the interpreter, against plain torch in float64.

test_kernels.py runs this file. Products of the vendor's library become float32 products of torch.
"""

import os

import pytest
import torch
import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from interpreted_kernels import (
    DEVICE,
    GRADIENT_BUDGET,
    LIMITS,
    close,
    small_and_on_cpu,  # noqa: F401 - a fixture
)

from fused_rl import Divergence, reference
from fused_rl.kernels import divergences, linear_divergences, linear_gradients, logprobs
from fused_rl.ops import Head, Limits, Measure, TwoHeads, TwoStatistics, divergence_chunk, trust
from fused_rl.ops import two_heads_triton as on_cuda
from fused_rl.ops.chunk import ChunkLogits, Sums
from fused_rl.ops.divergence import (
    TwoNeeds,
    linear_divergence,
    linear_divergence_backward,
)
from fused_rl.ops.divergence_chunk import StudentUpstream, known_of
from fused_rl.ops.first_use import exactly
from fused_rl.ops.two_heads import TwoUpstream

KINDS = {
    "reverse": Divergence.REVERSE,
    "forward": Divergence.FORWARD,
    "jsd": Divergence.JSD(0.3),
    "chi-square": Divergence.CHI_SQUARE,
    "hellinger": Divergence.HELLINGER,
    "alpha -0.5": Divergence.ALPHA(-0.5),
    "total variation": Divergence.TOTAL_VARIATION,
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def several_blocks(small_and_on_cpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(divergences, "BLOCK_V", 64)


@pytest.fixture(params=KINDS)
def measure(request):
    of = KINDS[request.param]
    return Measure(of.kind, of.parameter, of.factor)


JSD = Measure(reference.JSD, 0.3, 1.0)


def side(N, H, V, labels, dtypes=(FP32, FP32), transform=True):
    return Head(
        (torch.randn(N, H) / H**0.5).to(dtypes[0]),
        torch.randn(V, H).to(dtypes[1]),
        torch.randn(V) if transform else None,
        labels,
        torch.rand(N) + 0.5 if transform else torch.ones(N),
        0.7 if transform else 1.0,
        5.0 if transform else 0.0,
    )


def case(N=9, V=70, H=(19, 24), ignored=True, dtypes=(FP32,) * 4, transform=True):
    """dtypes: of the student's hidden states and weight, and of the teacher's."""
    labels = torch.randint(0, V, (N,))
    if ignored:
        labels[1::4] = -100
    student = side(N, H[0], V, labels, dtypes[:2], transform)
    return TwoHeads.of(student, side(N, H[1], V, labels, dtypes[2:], transform))


def upstream_of(heads):
    """Some tokens have none, or none but that of the divergence, or all but that."""
    given = torch.randn(5, len(heads.labels))
    given[:, 2::5] = 0
    given[1:, 3::5] = 0
    given[0, 4::5] = 0
    return TwoUpstream(*given)


def needs_of(heads):
    return TwoNeeds(True, True, heads.bias is not None, True, True, heads.teacher_bias is not None)


def exact_statistics(heads, measure):
    return linear_divergence.plain(exactly(heads), measure, LIMITS)


def exact_gradients(heads, measure, upstream):
    known = known_of(exact_statistics(heads, measure))
    args = (exactly(upstream), exactly(heads), measure, LIMITS, known, needs_of(heads))
    return linear_divergence_backward.plain(*args)


def statistics(heads, measure, limits=LIMITS):
    return on_cuda.linear_divergence(heads, measure, limits, DEVICE)


def gradients(heads, measure, upstream, limits=LIMITS):
    known = known_of(statistics(heads, measure))
    args = (upstream, heads, measure, limits, known, needs_of(heads))
    return on_cuda.linear_divergence_backward(*args, DEVICE)


def near(found, exact, atol=2e-5, rtol=2e-5):
    for name, a, b in zip(exact._fields, found, exact, strict=False):
        torch.testing.assert_close(
            a.double(), b, atol=atol, rtol=rtol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients_near(found, exact, budget):
    assert any(b.numel() for b in exact)
    for a, b in zip(found, exact, strict=False):
        assert a.shape == b.shape
        close(a, b, budget)


@triton.jit
def _slopes_kernel(logs_ptr, logt_ptr, out_ptr, parameter, KIND: tl.constexpr, N: tl.constexpr):
    """c, g, g' of N entries, whose distributions are normalised."""
    at = tl.arange(0, N)
    zero = tl.full((), 0.0, tl.float64)
    z, teacher_z = tl.load(logs_ptr + at), tl.load(logt_ptr + at)
    s, t, d, delta = divergences.pair(z, teacher_z, zero, 0.0, zero, 0.0)
    g, of_teacher = divergences.slopes(s, t, divergences.bounded(d), delta, KIND, parameter)
    tl.store(out_ptr + at, divergences.term(g, of_teacher, d, KIND, parameter))
    tl.store(out_ptr + N + at, g)
    tl.store(out_ptr + 2 * N + at, of_teacher)


def test_slopes_by_the_reference(measure):
    """Of probabilities down to 1e-34, near each other and apart."""
    logs = -torch.rand(1024).square() * 60
    apart = torch.logspace(-6, 1.3, 512).repeat(2) * torch.randn(1024).sign()
    logt = logs - apart
    logs[:3] = torch.tensor([-torch.inf, -torch.inf, -2.0])
    logt[:3] = torch.tensor([-torch.inf, -2.0, -torch.inf])
    found = torch.full((3, 1024), torch.nan)
    _slopes_kernel[(1,)](logs, logt, found, measure.parameter, KIND=measure.kind, N=1024)
    pair = reference.Pair.of(logs.double(), logt.double(), logs.double() - logt.double())
    exact = reference.slopes(pair, measure.kind, measure.parameter)
    infinite = reference.is_infinite(pair.d, measure.kind, measure.parameter)
    # In fp32 the exponents of a difference have a relative error of d's size.
    for ours, true in zip(found[1:], exact, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=1e-30, rtol=2e-5)
    assert torch.equal(found[0] == torch.inf, infinite)
    assert (found[:, 0] == 0).all()


@pytest.mark.parametrize("transform", [False, True])
def test_every_divergence(measure, transform):
    heads = case(transform=transform)
    upstream = upstream_of(heads)
    near(statistics(heads, measure), exact_statistics(heads, measure))
    exact = exact_gradients(heads, measure, upstream)
    gradients_near(gradients(heads, measure, upstream), exact, GRADIENT_BUDGET[FP32])


DTYPES = [(BF16,) * 4, (FP16,) * 4, (BF16, BF16, FP32, FP32), (BF16, FP32, FP16, FP16)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_dtype(dtypes):
    heads = case(dtypes=dtypes)
    upstream = upstream_of(heads)
    near(statistics(heads, JSD), exact_statistics(heads, JSD))
    found = gradients(heads, JSD, upstream)
    for a, b in zip(found, heads[:6], strict=True):
        assert a.dtype == b.dtype
    exact = exact_gradients(heads, JSD, upstream)
    for i, dtype in enumerate((dtypes[0], dtypes[1], FP32, dtypes[2], dtypes[3], FP32)):
        # A draw is in the dtype of its side's products.
        of_draw = torch.promote_types(*dtypes[i // 3 * 2 : i // 3 * 2 + 2])
        close(found[i], exact[i], max(GRADIENT_BUDGET[t] for t in (dtype, of_draw)))


def test_chunks_of_tokens_and_blocks_of_the_vocabulary():
    heads = case(5, 300, ignored=False)
    upstream, limits = upstream_of(heads), Limits(-100, 1)
    for a, b in zip(statistics(heads, JSD, limits), statistics(heads, JSD), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    exact = exact_gradients(heads, JSD, upstream)
    gradients_near(gradients(heads, JSD, upstream, limits), exact, GRADIENT_BUDGET[FP32])


@pytest.mark.parametrize("N", [0, 1])
def test_few_tokens(N):
    heads = case(N, ignored=False)
    upstream = TwoUpstream(*torch.ones(5, N))
    near(statistics(heads, JSD), exact_statistics(heads, JSD))
    exact = exact_gradients(heads, JSD, upstream)
    gradients_near(gradients(heads, JSD, upstream), exact, GRADIENT_BUDGET[FP32])


def test_a_chunk_without_tokens_leaves_sums_of_zero():
    heads = case(0)
    *stats, z = on_cuda.linear_divergence_chunk(heads, JSD, DEVICE)
    assert {len(t) for t in stats} == {0}
    sums = Sums(torch.full((70, 19), torch.nan), torch.full((70,), torch.nan), False)
    upstream, known = StudentUpstream(*torch.ones(3, 0)), known_of(TwoStatistics(*stats))
    args = (ChunkLogits(z), upstream, heads, JSD, known, sums)
    assert on_cuda.linear_divergence_chunk_backward(*args, DEVICE).shape == (0, 19)
    assert (sums.dweight == 0).all() and (sums.dbias == 0).all()


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_entries_that_cannot_be_sampled(measure, where):
    heads = case(5, ignored=False)
    bias, teacher_bias = heads.bias.clone(), heads.teacher_bias.clone()
    if where != "teacher":
        bias[::3] = -torch.inf
    if where != "student":
        teacher_bias[::3] = -torch.inf
    # A softcap would make finite logits of them.
    heads = heads._replace(bias=bias, teacher_bias=teacher_bias, softcap=0.0, teacher_softcap=0.0)
    heads = heads._replace(labels=heads.labels // 3 * 3 % 69 + 1)
    upstream, exact = upstream_of(heads), exact_statistics(heads, measure)
    near(statistics(heads, measure), exact)
    found = gradients(heads, measure, upstream)
    assert all(g.isfinite().all() for g in found)
    gradients_near(found, exact_gradients(heads, measure, upstream), GRADIENT_BUDGET[FP32])
    side_of = {"student": found[:3], "teacher": found[3:], "both": found}[where]
    for g in side_of:
        assert (g.dim() == 2 and len(g) == 5) or (g[::3] == 0).all()


def test_a_nan_row_poisons_itself_alone():
    heads = case(ignored=False)
    upstream = TwoUpstream(*torch.ones(5, 9))
    hidden = heads.hidden.clone()
    hidden[5] = torch.nan
    dirty, clean = statistics(heads._replace(hidden=hidden), JSD), statistics(heads, JSD)
    others = torch.arange(9) != 5
    for name, a, b in zip(clean._fields, clean, dirty, strict=True):
        assert torch.equal(a[others], b[others])
        of_teacher = name in ("teacher_logprobs", "teacher_entropy", "teacher_lse")
        assert b[5].isnan() != of_teacher
    found = gradients(heads._replace(hidden=hidden), JSD, upstream)
    right = gradients(heads, JSD, upstream)
    for a, b in ((found.dhidden, right.dhidden), (found.dteacher_hidden, right.dteacher_hidden)):
        assert torch.equal(a[others], b[others]) and a[5].isnan().all()


def test_a_nan_at_an_ignored_token_reaches_nothing():
    heads = case()
    assert heads.labels[1] == -100
    hidden = heads.hidden.clone()
    hidden[1] = torch.nan
    heads = heads._replace(hidden=hidden)
    assert all(t[1] == 0 for t in statistics(heads, JSD))
    found = gradients(heads, JSD, TwoUpstream(*torch.ones(5, 9)))
    assert all(g.isfinite().all() for g in found)
    assert (found.dhidden[1] == 0).all() and (found.dteacher_hidden[1] == 0).all()


def test_while_a_graph_is_captured_ignored_tokens_are_there_and_zero(monkeypatch):
    """To know which they are would be to wait."""
    heads = case()
    upstream = upstream_of(heads)
    expected = (*statistics(heads, JSD), *gradients(heads, JSD, upstream))
    monkeypatch.setattr(trust, "capturing", lambda device: True)
    found = (*statistics(heads, JSD), *gradients(heads, JSD, upstream))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_near_distributions_keep_their_digits(measure, dtype, monkeypatch):
    """A KL of 1e-6, which differences of log-probs or of terms would not have."""
    monkeypatch.setattr(divergences, "BLOCK_V", 1024)
    monkeypatch.setattr(logprobs, "BLOCK_V", 1024)
    heads = case(4, 900, (32, 32), ignored=False, dtypes=(dtype,) * 2 + (FP32,) * 2)
    other = heads.hidden.float() + 2e-3 * torch.randn(4, 32) / 32**0.5
    same = dict(zip(("scale", "softcap"), (heads.scale, heads.softcap), strict=True))
    heads = heads._replace(
        teacher_hidden=other,
        teacher_weight=heads.weight.float(),
        teacher_bias=heads.bias,
        teacher_temperature=heads.temperature,
        **{f"teacher_{name}": value for name, value in same.items()},
    )
    exact = exact_statistics(heads, measure)
    if measure.kind == reference.REVERSE:
        assert 1e-7 < exact.divergence.mean() < 3e-6
    found = statistics(heads, measure)
    torch.testing.assert_close(found.divergence.double(), exact.divergence, atol=0, rtol=3e-4)
    zeros = torch.zeros(4)
    upstream = TwoUpstream(torch.ones(4), zeros, zeros, zeros, zeros)
    exact = exact_gradients(heads, measure, upstream)
    # Log-ratios under the rounding of their logits, 1e-6, have either sign.
    budget = 2e-2 if measure.kind == reference.TOTAL_VARIATION else 1e-3
    ours = gradients(heads, measure, upstream)
    gradients_near(ours[:3], exact[:3], max(budget, GRADIENT_BUDGET[dtype]))
    gradients_near(ours[3:], exact[3:], budget)


def chunk_case(dtype):
    heads = case(ignored=False, dtypes=(dtype,) * 2 + (FP32,) * 2)
    upstream = upstream_of(heads)._replace(dteacher_logprobs=torch.zeros(9))
    return heads, upstream._replace(dteacher_entropy=torch.zeros(9))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("accumulate", "partial"), [(False, False), (True, False), (True, True)])
def test_gradients_of_a_chunk_in_one_pass(dtype, accumulate, partial):
    heads, upstream = chunk_case(dtype)
    *stats, z = on_cuda.linear_divergence_chunk(heads, JSD, DEVICE)
    near(stats, exact_statistics(heads, JSD))
    before = 2.0 if accumulate else torch.nan
    of_sum = torch.float32 if accumulate else dtype
    dweight = torch.full(heads.weight.shape, before, dtype=of_sum)
    dbias = torch.full(heads.bias.shape, before)
    dhidden = on_cuda.linear_divergence_chunk_backward(
        *(
            ChunkLogits(z),
            StudentUpstream(*upstream[:3]),
            heads,
            JSD,
            known_of(TwoStatistics(*stats)),
        ),
        *(Sums(dweight, dbias, accumulate, partial), DEVICE),
    )
    exact = exact_gradients(heads, JSD, upstream)
    added = 2.0 if accumulate else 0.0
    assert dhidden.dtype == (BF16 if dtype == BF16 and not partial else FP32)
    for ours, true in zip((dhidden, dweight - added, dbias - added), exact[:3], strict=True):
        close(ours, true, GRADIENT_BUDGET[dtype])


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_a_frozen_head_takes_the_kernels_of_a_chunk(dtype, monkeypatch):
    """As the dispatcher calls them on a GPU; two chunks."""

    def kernel_of(name):
        return lambda *records: getattr(on_cuda, name)(*records, DEVICE)

    for name in ("linear_divergence_chunk", "linear_divergence_chunk_backward"):
        monkeypatch.setattr(divergence_chunk, name, kernel_of(name))
    heads = case(dtypes=(dtype,) * 2 + (FP32,) * 2)
    limits = Limits(-100, 70 * 8 * 4)
    *stats, unit = divergence_chunk.linear_divergence_frozen.plain(heads, JSD, limits)
    near(stats, exact_statistics(heads, JSD))
    zeros = torch.zeros(9)
    upstream = TwoUpstream(torch.ones(9), zeros, zeros, zeros, zeros)
    close(unit, exact_gradients(heads, JSD, upstream).dhidden, GRADIENT_BUDGET[dtype])
    assert unit.dtype == dtype


@pytest.mark.parametrize("measure", ["reverse", "chi-square"], indirect=True)
def test_float16_has_room_for_divergences_that_are_large(measure):
    """Log-ratios of up to 20 nats, a temperature that multiplies by 50."""
    heads = case(4, 70, ignored=False, dtypes=(FP16,) * 4, transform=False)
    cold = torch.full((4,), 0.02)
    heads = heads._replace(hidden=heads.hidden / 10, teacher_hidden=heads.teacher_hidden / 10)
    heads = heads._replace(temperature=cold, teacher_temperature=cold)
    upstream = TwoUpstream(*torch.ones(5, 4))
    exact = exact_statistics(heads, measure)
    near(statistics(heads, measure), exact, atol=1e-4, rtol=1e-3)
    assert exact.divergence.max() > 5
    ours, true = (of(heads, measure, upstream) for of in (gradients, exact_gradients))
    for a, b in ((ours.dhidden, true.dhidden), (ours.dteacher_hidden, true.dteacher_hidden)):
        # What float16 itself has room for.
        there = b.abs() < 6e4
        close(a.where(there, 0), b.where(there, 0), 2 * GRADIENT_BUDGET[FP16])


@pytest.mark.parametrize("kind", ["finfo.min", 1e20, -1e30])
def test_logits_that_leave_no_room_for_their_sum(kind):
    """As large in every entry: both are uniform, and nothing is left of a difference."""
    heads = case(3, ignored=False, transform=False)
    size = torch.finfo(torch.float32).min if kind == "finfo.min" else kind
    biases = {"bias": torch.full((70,), size), "teacher_bias": torch.zeros(70)}
    zero = {"hidden": 0 * heads.hidden, "teacher_hidden": 0 * heads.teacher_hidden}
    heads = heads._replace(**biases, **zero)
    found = statistics(heads, Measure(reference.REVERSE, 0.0, 1.0))
    assert (found.divergence.abs() < 1e-5).all()
    torch.testing.assert_close(found.entropy, torch.full((3,), 70.0).log())


@pytest.mark.parametrize("width", [2, 4])
def test_chunks_stay_within_their_bytes(width):
    """Both sides' logits in fp32, and the gradient of one, over them or in half precision."""
    per_logit = linear_divergences.bytes_per_logit(width)
    assert per_logit == {2: 10, 4: 8}[width]
    V, bound = 151936, 2**30
    count = linear_gradients.chunk_tokens(V, 4096, per_logit, bound, 132)
    assert 0.7 * bound < count * V * per_logit <= bound

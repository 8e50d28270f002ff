"""linear_divergence: values and gradients of every divergence, near, far and infinite."""

import math
from statistics import median
from typing import NamedTuple

import oracle
import pytest
import torch
from torch import Tensor

from fused_rl import Divergence, DivergenceStats, LMHead, linear_divergence, linear_logprobs, ops
from fused_rl.ops import divergence as two_pass
from fused_rl.ops import divergence_chunk as chunk
from fused_rl.ops.two_heads import TwoStatistics, TwoUpstream

IGNORED = -100
KINDS = {
    "reverse": Divergence.REVERSE,
    "forward": Divergence.FORWARD,
    "jsd": Divergence.JSD(0.3),
    "alpha 1.7": Divergence.ALPHA(1.7),
    "alpha -0.5": Divergence.ALPHA(-0.5),
    "chi square": Divergence.CHI_SQUARE,
    "hellinger": Divergence.HELLINGER,
    "total variation": Divergence.TOTAL_VARIATION,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def by_definition(kind: str, logs: Tensor, logt: Tensor) -> Tensor:
    """The sums of divergences.py's table, [...]."""
    s, t = logs.exp(), logt.exp()
    m = 0.7 * s + 0.3 * t
    alpha = float(kind.split()[1]) if kind.startswith("alpha") else 2.0
    terms = {
        "reverse": s * (logs - logt),
        "forward": t * (logt - logs),
        "jsd": 0.3 * t * (logt - m.log()) + 0.7 * s * (logs - m.log()),
        "chi square": (s - t) ** 2 / t,
        "hellinger": 0.5 * (s.sqrt() - t.sqrt()) ** 2,
        "total variation": 0.5 * (s - t).abs(),
    }
    if kind in terms:
        return terms[kind].sum(-1)
    power = (alpha * logs + (1 - alpha) * logt).exp().sum(-1)
    return (power - 1) / (alpha * (alpha - 1))


class Case(NamedTuple):
    """Two heads with a bias, a scale and a softcap each, and temperatures per token."""

    tensors: list[Tensor]  # hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
    labels: Tensor
    temperature: Tensor
    teacher_temperature: Tensor

    def heads(self, tensors: list[Tensor]) -> tuple:
        h, w, b, th, tw, tb = tensors
        return h, LMHead(w, b, scale=0.9, softcap=6.0), th, LMHead(tw, tb, scale=1.1)

    def stats(self, kind: str, tensors: list[Tensor] | None = None, **options) -> DivergenceStats:
        return linear_divergence(
            *self.heads(tensors or self.tensors),
            self.labels,
            divergence=KINDS[kind],
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            **options,
        )

    def naive(self, kind: str, tensors: list[Tensor]) -> DivergenceStats:
        hidden, head, teacher_hidden, teacher_head = self.heads(tensors)
        logs, logt = (
            (of.logits(h) / t[..., None]).log_softmax(-1)
            for of, h, t in (
                (head, hidden, self.temperature),
                (teacher_head, teacher_hidden, self.teacher_temperature),
            )
        )
        counted = self.labels != IGNORED
        at = self.labels.clamp(min=0)[..., None]
        found = (
            by_definition(kind, logs, logt),
            logs.gather(-1, at)[..., 0],
            -(logs.exp() * logs).sum(-1),
            logt.gather(-1, at)[..., 0],
            -(logt.exp() * logt).sum(-1),
        )
        return DivergenceStats(*(x.where(counted, 0.0) for x in found))


def drawn(
    *shape: int,
    dtype: torch.dtype = torch.float64,
    teacher_dtype: torch.dtype | None = None,
    H: int = 10,
    of_teacher: int = 14,
    V: int = 51,
    spread: float = 1.0,
) -> Case:
    teacher_dtype = teacher_dtype or dtype
    sizes = ((*shape, H), (V, H), (V,), (*shape, of_teacher), (V, of_teacher), (V,))
    tensors = [torch.randn(s, dtype=torch.float64) for s in sizes]
    for i, width in ((1, H), (4, of_teacher)):
        tensors[i] *= spread * width**-0.5
    dtypes = [dtype] * 3 + [teacher_dtype] * 3
    labels = torch.randint(V, shape)
    labels.view(-1)[1::5] = IGNORED
    temperatures = (0.6 + torch.rand(shape, dtype=torch.float64) for _ in range(2))
    return Case([t.to(d) for t, d in zip(tensors, dtypes, strict=True)], labels, *temperatures)


def widened(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


def weighed(stats: DivergenceStats, seed: int = 0) -> Tensor:
    """A loss of all of the results."""
    noise = torch.Generator().manual_seed(seed)
    return sum((x.double() * torch.randn(x.shape, generator=noise)).sum() for x in stats)


@every_kind
def test_values_and_gradients_of_both_sides_by_the_definition(kind):
    case = drawn(3, 7)
    leaves, exact = widened(case.tensors), widened(case.tensors)
    ours, right = case.stats(kind, leaves), case.naive(kind, exact)
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(weighed(ours), leaves)
    for a, b in zip(grads, torch.autograd.grad(weighed(right), exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_kind
def test_gradcheck(kind):
    case = drawn(4, H=3, of_teacher=2, V=7)
    leaves = widened(case.tensors)
    torch.autograd.gradcheck(lambda *t: tuple(case.stats(kind, list(t))), leaves)


@every_kind
def test_gradcheck_of_a_frozen_head(kind):
    case = drawn(4, H=3, of_teacher=2, V=7)
    hidden, *others = (t.double() for t in case.tensors)
    hidden.requires_grad_()
    torch.autograd.gradcheck(lambda h: tuple(case.stats(kind, [h, *others])), hidden)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_dtype", FLOATS, ids=str)
def test_any_dtypes_on_either_side(dtype, teacher_dtype):
    case = drawn(33, dtype=dtype, teacher_dtype=teacher_dtype, H=24, of_teacher=36, V=530)
    leaves, exact = [t.clone().requires_grad_() for t in case.tensors], widened(case.tensors)
    ours, right = case.stats("reverse", leaves), case.naive("reverse", exact)
    wide = torch.float64 in (dtype, teacher_dtype)
    for a, b in zip(ours, right, strict=True):
        assert a.dtype == (torch.float64 if wide else torch.float32)
        assert oracle.relative_error(a, b) < (1e-12 if wide else 2e-6)
    grads = torch.autograd.grad(weighed(ours), leaves)
    rights = torch.autograd.grad(weighed(right), exact)
    for leaf, a, b in zip(leaves, grads, rights, strict=True):
        assert a.dtype == leaf.dtype
        assert oracle.relative_error(a, b) < 4 * torch.finfo(leaf.dtype).eps + 3e-6


# Where the two are near


def near(distance: float, V: int = 2000, H: int = 64) -> tuple[Tensor, ...]:
    """Student and teacher in bfloat16, the teacher's hidden states moved a little."""
    hidden = torch.randn(64, H).bfloat16()
    weight = (2.5 * torch.randn(V, H) * H**-0.5).bfloat16()
    teacher = (weight.float() * (1 + distance * torch.randn(V, H))).bfloat16()
    return hidden, weight, hidden, teacher


@every_kind
def test_near_distributions_keep_their_digits(kind):
    """KL of about 1e-6 from bfloat16: one weight in each row is one step larger."""
    hidden, weight, _, _ = near(0.0)
    teacher = weight.clone()
    V, H = weight.shape
    teacher.view(torch.int16)[torch.arange(V), torch.randint(H, (V,))] += 1
    case = (hidden.float().requires_grad_(), weight.float().requires_grad_(), hidden, teacher)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in case]
    ours = linear_divergence(*case, divergence=KINDS[kind]).divergence
    logs, logt = ((h @ w.T).log_softmax(-1) for h, w in (exact[:2], exact[2:]))
    right = by_definition(kind, logs, logt)
    kl = by_definition("reverse", logs, logt)
    assert 1e-7 < kl.min() < kl.mean() < 2e-6
    assert ((ours - right) / right).abs().max() < 1e-3
    weights = torch.rand(64)
    grads = torch.autograd.grad((ours * weights).sum(), case[:2])
    rights = torch.autograd.grad((right * weights).sum(), exact[:2])
    for a, b in zip(grads, rights, strict=True):
        assert oracle.relative_error(a, b) < 1e-3
    assert (ours > 0).all()


def relative(found: Tensor, right: Tensor) -> float:
    """Of each token's, the mean square."""
    return ((found - right) / right).square().mean().item()


@every_kind
@pytest.mark.parametrize("distance", [1e-2, 1e-1, 1.0])
def test_no_worse_than_eager_with_float32_logits(kind, distance):
    """The median of some draws: tokens of the smallest divergences are most of a mean."""
    ratios = []
    for _ in range(24):
        case = near(distance)
        exact, wide = ([t.to(d) for t in case] for d in (torch.float64, torch.float32))
        right, eager = (
            by_definition(kind, *((h @ w.T).log_softmax(-1) for h, w in (t[:2], t[2:])))
            for t in (exact, wide)
        )
        found = linear_divergence(*case, divergence=KINDS[kind]).divergence
        ratios.append(relative(found, right) / relative(eager, right))
    assert median(ratios) <= 1


@every_kind
@pytest.mark.parametrize("distance", [1e-2, 1.0])
def test_gradients_from_bfloat16_are_those_of_float32_logits(kind, distance):
    """As eager's, where its products take the gradient of the logits in bfloat16, as ours do.

    The median of some draws: the sign of total variation may fall on either side of a rounding.
    """
    ours, theirs = [], []
    for _ in range(5):
        hidden, weight, *teacher = near(distance)
        grads = []
        for dtype in (torch.float64, torch.float32):
            z = (hidden.to(dtype) @ weight.to(dtype).T).requires_grad_()
            logt = (teacher[0].to(dtype) @ teacher[1].to(dtype).T).log_softmax(-1)
            of = by_definition(kind, z.log_softmax(-1), logt)
            (dz,) = torch.autograd.grad(of.mean(), z)
            dz = dz if dtype == torch.float64 else dz.bfloat16().float()
            grads.append((dz @ weight.to(dtype), dz.T @ hidden.to(dtype)))
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        of = linear_divergence(*leaves, *teacher, divergence=KINDS[kind]).divergence
        grads.append(torch.autograd.grad(of.mean(), leaves))
        for exact, eager, found in zip(*grads, strict=True):
            ours.append(oracle.relative_error(found, exact))
            theirs.append(oracle.relative_error(eager.bfloat16(), exact))
    assert median(ours) <= 1.1 * median(theirs)


@every_kind
def test_equal_distributions_have_no_divergence_and_no_gradient(kind):
    hidden, weight, *_ = near(0.0)
    hidden.requires_grad_()
    stats = linear_divergence(hidden, weight, hidden.detach(), weight, divergence=KINDS[kind])
    assert torch.equal(stats.divergence, torch.zeros(64))
    assert not torch.autograd.grad(stats.divergence.sum(), hidden)[0].any()


# Entries without a probability


def with_out(student: list[int], teacher: list[int], V: int = 40) -> tuple:
    hidden, weights = torch.randn(6, 8).double(), torch.randn(2, V, 8).double()
    biases = torch.zeros(2, V).double()
    biases[0, student], biases[1, teacher] = -torch.inf, -torch.inf
    leaves = [hidden.requires_grad_(), weights[0].clone().requires_grad_()]
    return leaves, biases[0], hidden.detach(), LMHead(weights[1], biases[1])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_entries_that_neither_side_can_sample_add_nothing(kind, dtype):
    (hidden, weight), bias, of_teacher, teacher = with_out([3, 17], [3, 17])
    kept = [v for v in range(40) if v not in (3, 17)]
    cast = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    teachers = LMHead(teacher.weight.to(dtype), teacher.bias)
    args = (LMHead(cast[1], bias), of_teacher.to(dtype), teachers)
    ours = linear_divergence(cast[0], *args, divergence=KINDS[kind]).divergence
    fewer = [cast[0].detach().clone().requires_grad_(), cast[1].detach()[kept].requires_grad_()]
    rest = (of_teacher.to(dtype), teachers.weight[kept])
    right = linear_divergence(*fewer, *rest, divergence=KINDS[kind]).divergence
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-7)
    a, b = (torch.autograd.grad(x.sum(), t) for x, t in ((ours, cast), (right, fewer)))
    bound = 8e-3 if dtype == torch.bfloat16 else 1e-5
    assert oracle.relative_error(a[0], b[0].double()) < bound
    assert not a[1][[3, 17]].any()


INFINITE = {
    "student alone": {"reverse", "alpha 1.7", "chi square"},
    "teacher alone": {"forward", "alpha -0.5"},
}


@every_kind
@pytest.mark.parametrize("who", INFINITE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_entries_that_one_side_alone_can_sample(kind, who, dtype):
    """The value is what the definition says; the gradient is finite, and that of 100 nats."""
    out = ([], [5]) if who == "student alone" else ([5], [])
    (hidden, weight), bias, of_teacher, teacher = with_out(*out)
    cast = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    args = (
        LMHead(cast[1], bias),
        of_teacher.to(dtype),
        LMHead(teacher.weight.to(dtype), teacher.bias),
    )
    ours = linear_divergence(cast[0], *args, divergence=KINDS[kind]).divergence
    assert (ours == torch.inf).all() if kind in INFINITE[who] else ours.isfinite().all()
    grads = torch.autograd.grad(ours.sum(), cast)
    assert all(g.isfinite().all() for g in grads)
    if who == "teacher alone":
        assert not grads[1][5].any()
    elif kind == "reverse":
        # dz = s (d - sum s d), with d = 100 at the entry.
        logs, logt = (cast[0].double() @ cast[1].double().T).log_softmax(-1), None
        logt = of_teacher.to(dtype).double() @ args[2].weight.double().T + teacher.bias.double()
        d = (logs - logt.log_softmax(-1)).nan_to_num(posinf=100.0)
        dz = logs.exp() * (d - (logs.exp() * d).sum(-1, keepdim=True))
        bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
        assert oracle.relative_error(grads[0], dz @ cast[1].double()) < bound


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_nan_poisons_its_own_token_and_an_ignored_one_reaches_nothing(dtype):
    case = drawn(9, dtype=dtype, V=70)
    clean = [t.clone().requires_grad_() for t in case.tensors]
    dirty = [t.clone() for t in case.tensors]
    dirty[0][1], dirty[3][6] = torch.nan, torch.nan
    assert case.labels[1] == IGNORED and case.labels[6] == IGNORED
    dirty = [t.requires_grad_() for t in dirty]
    ours, right = case.stats("jsd", dirty), case.stats("jsd", clean)
    for a, b in zip(ours, right, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        torch.autograd.grad(weighed(ours), dirty),
        torch.autograd.grad(weighed(right), clean),
        strict=True,
    ):
        assert torch.equal(a, b)
    poisoned = [t.clone() for t in case.tensors]
    poisoned[3][4] = torch.nan
    found = case.stats("jsd", poisoned)
    assert found.divergence[4].isnan() and found.teacher_entropy[4].isnan()
    assert torch.equal(found.logprobs, right.logprobs)
    others = torch.arange(9) != 4
    assert torch.equal(found.divergence[others], right.divergence[others])


# Ways


@every_kind
def test_a_frozen_head_has_the_gradient_of_a_trained_one(kind):
    case = drawn(33, dtype=torch.float32, H=24, of_teacher=36, V=530)
    grads = []
    for trained in (True, False):
        hidden = case.tensors[0].clone().requires_grad_()
        weight = case.tensors[1].clone().requires_grad_(trained)
        stats = case.stats(kind, [hidden, weight, *case.tensors[2:]])
        only = torch.autograd.grad(stats.divergence.sum(), hidden, retain_graph=True)[0]
        grads.append((only, torch.autograd.grad(weighed(stats), hidden)[0]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_kind
def test_one_pass_is_two_passes(kind, dtype):
    case = drawn(40, dtype=dtype, H=24, of_teacher=36, V=530, spread=0.3)
    _heads, divergence = case.heads(case.tensors), KINDS[kind]
    labels = case.labels.clamp(min=0)
    args = (case.temperature, case.teacher_temperature)
    heads = _flat(_heads, labels, *args)
    measure = ops.Measure(divergence.kind, divergence.parameter, divergence.factor)
    limits = ops.Limits(IGNORED, 2**20)
    stats = ops.linear_divergence(heads, measure, limits)
    *ours, z = chunk.linear_divergence_chunk(heads, measure)
    for a, b in zip(ours, stats, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    up = torch.randn(3, 40, dtype=stats.divergence.dtype)
    up[:, 3] = 0
    dweight, dbias = torch.empty_like(heads.weight), torch.empty_like(heads.bias)
    dhidden = chunk.linear_divergence_chunk_backward(
        *(ops.ChunkLogits(z), chunk.StudentUpstream(*up), heads, measure),
        *(chunk.known_of(TwoStatistics(*ours)), ops.Sums(dweight, dbias, False)),
    )
    needs = two_pass.TwoNeeds(True, True, True, False, False, False)
    zeros = torch.zeros_like(up[0])
    formed = two_pass.linear_divergence_backward(
        *(TwoUpstream(*up, zeros, zeros), heads, measure, limits, chunk.known_of(stats), needs)
    )
    bound = 4 * torch.finfo(dtype).eps
    for a, b in zip((dhidden, dweight, dbias), formed[:3], strict=True):
        assert oracle.relative_error(a, b.double()) < bound
    assert not dhidden[3].any()
    total = dweight.clone()
    again = (
        ops.ChunkLogits(chunk.linear_divergence_chunk(heads, measure).z),
        chunk.StudentUpstream(*up),
    )
    sums = ops.Sums(total, dbias, True, partial=True)
    rest = (heads, measure, chunk.known_of(TwoStatistics(*ours)), sums)
    summand = chunk.linear_divergence_chunk_backward(*again, *rest)
    assert oracle.relative_error(total, 2 * dweight.double()) < bound
    # One of several: what would be rounded, in the dtype of the logits.
    assert summand.dtype == heads.dtype
    oracle.assert_same_bits(summand.to(dhidden.dtype), dhidden)


def _flat(heads: tuple, labels: Tensor, temperature: Tensor, of_teacher: Tensor) -> ops.TwoHeads:
    hidden, head, teacher_hidden, teacher_head = heads
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return ops.TwoHeads.of(
        ops.Head(hidden, head.weight, head.bias, labels, temperature.to(wide), 0.9, 6.0),
        ops.Head(
            *(teacher_hidden, teacher_head.weight, teacher_head.bias, labels),
            *(of_teacher.to(wide), 1.1, 0.0),
        ),
    )


@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 10**6])
@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_chunk_bytes_changes_nothing_but_memory(kind, chunk_bytes):
    case = drawn(70, dtype=torch.float32, V=530)
    found = []
    for options in ({}, {"chunk_bytes": chunk_bytes}):
        for trained in (True, False):
            leaves = [t.clone() for t in case.tensors]
            for leaf in leaves if trained else leaves[:1]:
                leaf.requires_grad_()
            stats = case.stats(kind, leaves, **options)
            found.append((*stats, *torch.autograd.grad(weighed(stats), leaves[0])))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    case, found = drawn(150, dtype=dtype, H=48, V=1100), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in case.tensors]
            stats = case.stats("jsd", leaves)
            found.append((*stats, *torch.autograd.grad(weighed(stats), leaves)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_each_token_is_its_own():
    """Padded as packed, and a token's numbers do not depend on what is beside it."""
    case = drawn(5, 13, dtype=torch.float32)
    whole = case.stats("reverse")
    counted = case.labels != IGNORED
    hidden, head, of_teacher, teacher = case.heads(case.tensors)
    packed = linear_divergence(
        *(hidden[counted], head, of_teacher[counted], teacher, case.labels[counted]),
        temperature=case.temperature[counted],
        teacher_temperature=case.teacher_temperature[counted],
    )
    for a, b in zip(whole, packed, strict=True):
        torch.testing.assert_close(a[counted], b, rtol=2e-6, atol=2e-6)
        assert not a[~counted].any()


def test_the_student_is_that_of_linear_logprobs():
    case = drawn(20, dtype=torch.float32, V=300)
    hidden, head, *_ = case.heads(case.tensors)
    stats = case.stats("forward")
    own = linear_logprobs(hidden, head, case.labels, temperature=case.temperature)
    assert torch.equal(stats.logprobs, own.logprobs) and torch.equal(stats.entropy, own.entropy)


@every_kind
def test_sides_change_places(kind):
    """D(s||t) is the divergence of the swapped kind of (t, s)."""
    case, divergence = drawn(8), KINDS[kind]
    hidden, head, of_teacher, teacher = case.heads(case.tensors)
    turned = ops.Measure(divergence.kind, divergence.parameter, divergence.factor).swapped()
    ours = linear_divergence(hidden, head, of_teacher, teacher, divergence=divergence)
    other = linear_divergence(of_teacher, teacher, hidden, head, divergence=Divergence(*turned))
    torch.testing.assert_close(ours.divergence, other.divergence, rtol=1e-9, atol=1e-12)
    assert torch.equal(ours.entropy, other.teacher_entropy)


def test_partial_vocabularies_merge():
    """Of parts with masses w of the student's and u of the teacher's probability:

    reverse KL  = sum w (D + log(w / u))        forward KL = sum u (D + log(u / w))
    alpha       = (sum w^a u^(1 - a) S - 1) / (a (a - 1)),  S = 1 + a (a - 1) D of the part
    """
    case = drawn(8, V=60)
    tensors = [t.double() for t in case.tensors]
    tensors[2][:] = 0
    labels = torch.full((8,), 3)
    cut, a = 23, 1.7
    heads = _flat(case.heads(tensors), labels, case.temperature, case.teacher_temperature)

    def formed(divergence: Divergence, entries: slice) -> TwoStatistics:
        part = heads._replace(
            weight=heads.weight[entries],
            bias=heads.bias[entries],
            teacher_weight=heads.teacher_weight[entries],
            teacher_bias=heads.teacher_bias[entries],
        )
        measure = ops.Measure(divergence.kind, divergence.parameter, divergence.factor)
        return ops.linear_divergence(part, measure, ops.Limits(IGNORED, 2**20))

    for kind in ("reverse", "forward", "alpha 1.7"):
        whole = formed(KINDS[kind], slice(None))
        parts = [formed(KINDS[kind], entries) for entries in (slice(cut), slice(cut, None))]
        w = [(p.lse - whole.lse).exp() for p in parts]
        u = [(p.teacher_lse - whole.teacher_lse).exp() for p in parts]
        merged = {
            "reverse": lambda x, y, d: x * (d + (x / y).log()),
            "forward": lambda x, y, d: y * (d + (y / x).log()),
            "alpha 1.7": lambda x, y, d: x**a * y ** (1 - a) * (1 + a * (a - 1) * d),
        }[kind]
        found = sum(merged(x, y, p.divergence) for x, y, p in zip(w, u, parts, strict=True))
        if kind.startswith("alpha"):
            found = (found - 1) / (a * (a - 1))
        torch.testing.assert_close(found, whole.divergence, rtol=1e-10, atol=1e-12)


# Arguments


def test_the_ends_are_the_two_kls():
    assert Divergence.JSD(0) == Divergence.ALPHA(0.0) == Divergence.FORWARD
    assert Divergence.JSD(1.0) == Divergence.ALPHA(1) == Divergence.REVERSE
    case = drawn(6)
    for divergence, end in (
        (Divergence.ALPHA(1e-6), "forward"),
        (Divergence.ALPHA(1 - 1e-6), "reverse"),
    ):
        args = case.heads(case.tensors)
        found = linear_divergence(*args, divergence=divergence).divergence
        assert (
            oracle.relative_error(found, linear_divergence(*args, divergence=KINDS[end]).divergence)
            < 1e-4
        )
    for beta in (0.01, 0.99):
        found = linear_divergence(*args, divergence=Divergence.JSD(beta)).divergence
        assert (found > 0).all() and (found < math.log(2)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Divergence.JSD(1.5), r"beta must be in \[0, 1\], got 1.5"),
        (lambda: Divergence.JSD(math.nan), "beta"),
        (lambda: Divergence.ALPHA(math.inf), "a must be"),
        (lambda: Divergence(9), "kind must be one of"),
    ],
)
def test_a_divergence_that_is_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_vocabularies_of_different_sizes():
    hidden, weight, larger = torch.randn(3, 4), torch.randn(9, 4), torch.randn(11, 4)
    with pytest.raises(
        ValueError, match=r"9 vocabulary entries and teacher_weight 11: give vocabulary=range\(9\)"
    ):
        linear_divergence(hidden, weight, hidden, larger)
    leaves = [weight.clone().requires_grad_(), larger.clone().requires_grad_()]
    labels = torch.tensor([1, 7, IGNORED])
    stats = linear_divergence(hidden, leaves[0], hidden, leaves[1], labels, vocabulary=range(1, 8))
    alone = linear_divergence(
        hidden, weight[1:8], hidden, larger[1:8], torch.tensor([0, 6, IGNORED])
    )
    for a, b in zip(stats, alone, strict=True):
        assert torch.equal(a, b)
    stats.divergence.sum().backward()
    assert leaves[0].grad.shape == (9, 4) and not leaves[0].grad[[0, 8]].any()
    assert leaves[1].grad[1:8].any() and not leaves[1].grad[8:].any()


@pytest.mark.parametrize(
    ("vocabulary", "labels", "message"),
    [
        (range(10), [0, 1, 2], r"inside both vocabularies, got range\(0, 10\), and weight has 9"),
        (range(0, 8, 2), [0, 1, 2], "vocabulary must be range"),
        (7, [0, 1, 2], "vocabulary must be range"),
        (range(1, 8), [1, 0, 2], r"labels\[1\] is 0, outside vocabulary range\(1, 8\)"),
        (range(1, 8), [1, 2, 8], r"labels\[2\] is 8, outside vocabulary range\(1, 8\)"),
    ],
)
def test_a_wrong_range(vocabulary, labels, message):
    hidden, weight, larger = torch.randn(3, 4), torch.randn(9, 4), torch.randn(11, 4)
    with pytest.raises(ValueError, match=message):
        linear_divergence(
            hidden, weight, hidden, larger, torch.tensor(labels), vocabulary=vocabulary
        )


def test_an_ignore_index_that_is_an_entry():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    labels = torch.tensor([0, 4, 5])
    for vocabulary in (None, range(9), range(2, 9)):
        stats = linear_divergence(
            hidden, weight, 2 * hidden, weight, labels, ignore_index=0, vocabulary=vocabulary
        )
        assert stats.divergence[0] == 0 and (stats.divergence[1:] > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_hidden": torch.ones(2, 6)}, "teacher_hidden"),
        ({"teacher_hidden": torch.ones(3, 5)}, "teacher_hidden and teacher_weight must agree in H"),
        ({"labels": torch.tensor([0, 40, 0])}, r"labels\[1\] is 40"),
        ({"temperature": 0.0}, "temperature"),
        (
            {"teacher_temperature": torch.tensor([1.0, -2.0, 1.0])},
            r"teacher_temperature\[1\] is -2",
        ),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, r"temperature\[1\] is 0"),
        ({"divergence": "reverse"}, "divergence must be a Divergence, got 'reverse'"),
    ],
)
def test_mistakes_are_value_errors_that_name_them(change, message):
    right = {
        "hidden": torch.ones(3, 4),
        "head": torch.ones(7, 4),
        "teacher_hidden": torch.ones(3, 6),
        "teacher_head": torch.ones(7, 6),
    }
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**right, **change})


@pytest.mark.parametrize("labels", [None, torch.full((2, 3), IGNORED)])
@pytest.mark.parametrize("N", [0, 2])
def test_nothing_that_counts(labels, N):
    hidden, weight = torch.randn(N, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    given = None if labels is None else labels[:N]
    if labels is None and N:
        return
    stats = linear_divergence(hidden, weight, hidden.detach(), torch.randn(9, 4), given)
    assert stats.divergence.shape == (N, 3) and not stats.divergence.any()
    assert (stats.logprobs is None) == (labels is None)
    grads = torch.autograd.grad(stats.divergence.sum(), (hidden, weight))
    assert not any(g.any() for g in grads)


def test_strides_do_not_matter():
    case = drawn(16, dtype=torch.bfloat16, H=24, of_teacher=36, V=530)
    other = [t.mT.contiguous().mT if t.dim() == 2 else t for t in case.tensors]
    for a, b in zip(case.stats("jsd"), case.stats("jsd", other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_autocast_multiplies_in_the_autocast_dtype():
    case = drawn(8, dtype=torch.float32, V=60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.stats("reverse")
    halves = [t.bfloat16() if t.dim() > 1 else t for t in case.tensors]
    for a, b in zip(found, case.stats("reverse", halves), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("trained", [True, False])
def test_one_graph_for_torch_compile(trained):
    torch._dynamo.reset()
    case = drawn(8, dtype=torch.float32, V=60)
    leaves = [t.clone().requires_grad_(trained or i == 0) for i, t in enumerate(case.tensors)]

    noise = torch.randn(5, 8)

    def loss(*tensors: Tensor) -> Tensor:
        stats = case.stats("jsd", list(tensors))
        return sum((x * y).sum() for x, y in zip(stats, noise, strict=True))

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = run(*leaves)
        found.append((value, *torch.autograd.grad(value, leaves if trained else leaves[:1])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)

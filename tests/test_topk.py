"""Divergences from a teacher's top k: by hand, by enumeration of what each teaches, by extremes."""

import math
from functools import cache
from pathlib import Path

import oracle
import pytest
import test_at
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

from fused_rl import Divergence, LMHead, linear_logprobs_at
from fused_rl.linear import linear_logits_at
from fused_rl.losses.topk import LEAST_TAIL, Tail, topk_divergence

DIVERGENCES = {
    "REVERSE": Divergence.REVERSE,
    "FORWARD": Divergence.FORWARD,
    "JSD(0.3)": Divergence.JSD(0.3),
    "ALPHA(-0.5)": Divergence.ALPHA(-0.5),
    "CHI_SQUARE": Divergence.CHI_SQUARE,
    "HELLINGER": Divergence.HELLINGER,
    "TOTAL_VARIATION": Divergence.TOTAL_VARIATION,
}
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
every_tail = pytest.mark.parametrize("tail", Tail)
HALVES = (torch.bfloat16, torch.float16)


def definition(name: str, s: Tensor, t: Tensor) -> Tensor:
    """As textbooks have it, for sums of 1."""
    if name == "JSD(0.3)":
        m = 0.7 * s + 0.3 * t
        return (0.3 * t * (t / m).log() + 0.7 * s * (s / m).log()).sum(-1)
    return {
        "REVERSE": lambda: (s * (s / t).log()).sum(-1),
        "FORWARD": lambda: (t * (t / s).log()).sum(-1),
        "ALPHA(-0.5)": lambda: ((s**-0.5 * t**1.5).sum(-1) - 1) / 0.75,
        "CHI_SQUARE": lambda: ((s - t) ** 2 / t).sum(-1),
        "HELLINGER": lambda: ((s.sqrt() - t.sqrt()) ** 2).sum(-1) / 2,
        "TOTAL_VARIATION": lambda: (s - t).abs().sum(-1) / 2,
    }[name]()


def drawn(*shape: int, V: int = 9) -> tuple[Tensor, Tensor]:
    """Log-probabilities [..., V] of two distributions."""
    return tuple(torch.randn(*shape, V).double().log_softmax(-1) for _ in range(2))


def joined(logprobs: Tensor, K: int) -> Tensor:
    """Probabilities of the first K, and of the rest."""
    p = logprobs.exp()
    return torch.cat([p[..., :K], p[..., K:].sum(-1, keepdim=True)], -1)


# Numbers


@every_divergence
def test_values_are_those_of_the_definitions(name):
    s, t = drawn(4, 3)
    options = {"divergence": DIVERGENCES[name]}
    for K in (1, 5):
        got = topk_divergence(s[..., :K], t[..., :K], **options)
        torch.testing.assert_close(got, definition(name, joined(s, K), joined(t, K)))
        got = topk_divergence(s[..., :K], t[..., :K], tail=Tail.RENORMALISED, **options)
        ours, theirs = (x[..., :K].softmax(-1) for x in (s, t))
        torch.testing.assert_close(got, definition(name, ours, theirs))
    # Of all entries nothing is left over, but for the rounding of 1.
    for tail in Tail:
        got = topk_divergence(s, t, tail=tail, **options)
        torch.testing.assert_close(got, definition(name, s.exp(), t.exp()), rtol=1e-6, atol=1e-7)


@every_tail
@every_divergence
def test_gradcheck(name, tail):
    s, t = drawn(3, 2)
    leaves = [x[..., :4].clone().requires_grad_() for x in (s, t)]
    options = {"divergence": DIVERGENCES[name], "tail": tail}
    assert torch.autograd.gradcheck(lambda *x: topk_divergence(*x, **options), leaves)


def test_by_hand():
    # One id with 1/4 and 1/2; what is left: 3/4 and 1/2.
    s, t = (torch.tensor([x], dtype=torch.float64).log() for x in (0.25, 0.5))
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert topk_divergence(s, t).item() == pytest.approx(kl, rel=1e-14)
    truncated = 0.5 * math.log(2) + 0.25 - 0.5
    assert topk_divergence(s, t, tail=Tail.TRUNCATED).item() == pytest.approx(truncated, rel=1e-14)
    assert topk_divergence(s, t, tail=Tail.RENORMALISED).item() == 0.0


@every_divergence
def test_a_bucket_is_never_more_than_the_whole_and_no_tail_is_negative(name):
    s, t = drawn(200)
    whole = definition(name, s.exp(), t.exp())
    for K in (1, 3, 8):
        for tail in Tail:
            got = topk_divergence(s[..., :K], t[..., :K], divergence=DIVERGENCES[name], tail=tail)
            assert (got >= -1e-15).all()
            assert tail is not Tail.BUCKET or (got <= whole * (1 + 1e-12) + 1e-14).all()


# What each teaches


TEACHER = torch.tensor([0.45, 0.25, 0.12, 0.08, 0.06, 0.04], dtype=torch.float64)
START = torch.tensor([0.0, -0.5, 1.0, 0.3, -0.2, 0.1], dtype=torch.float64)
TOP = 2


@cache
def taught(loss, steps: int = 1500) -> tuple[float, float, Tensor, float]:
    """loss(log-probs [V]) at its minimum, the full KL(teacher||student) there, the student's
    probabilities, the largest gradient of a logit."""
    z = START.clone().requires_grad_()
    adam = torch.optim.Adam([z], 0.02)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.02 * min(1.0, 2 * (1 - step / steps))
        adam.zero_grad()
        value = loss(z.log_softmax(-1))
        value.backward()
        adam.step()
    student = z.detach().softmax(-1)
    full = float((TEACHER * (TEACHER / student).log()).sum())
    return float(value.detach()), full, student, float(z.grad.abs().max())


@cache
def of_tail(divergence: Divergence, tail: Tail):
    def loss(logprobs: Tensor) -> Tensor:
        teacher = TEACHER.log()[:TOP]
        return topk_divergence(logprobs[:TOP], teacher, divergence=divergence, tail=tail)

    return loss


def bare_forward(logprobs: Tensor) -> Tensor:
    """Truncated without the masses, held at 0."""
    t = TEACHER[:TOP]
    return (t * (t.log() - logprobs[:TOP])).sum().clamp(min=0.0)


def bare_reverse(logprobs: Tensor) -> Tensor:
    s = logprobs[:TOP].exp()
    return (s * (logprobs[:TOP] - TEACHER[:TOP].log())).sum()


def full_kl(logprobs: Tensor) -> Tensor:
    return Divergence.FORWARD.terms(logprobs, TEACHER.log()).sum()


KLS = (Divergence.FORWARD, Divergence.REVERSE)


def test_the_whole_teaches_all():
    loss, full, student, _ = taught(full_kl)
    assert loss < 1e-12 and full < 1e-12
    torch.testing.assert_close(student, TEACHER)


@pytest.mark.parametrize("tail", [Tail.BUCKET, Tail.TRUNCATED])
@pytest.mark.parametrize("divergence", [*KLS, Divergence.JSD(0.5), Divergence.HELLINGER])
def test_bucket_and_truncated_teach_the_top_k_and_the_mass_of_the_rest(divergence, tail):
    """What is left, 0.0083 of a KL of 0.54 at the start, is how the rest lies among the rest."""
    loss, full, student, slope = taught(of_tail(divergence, tail))
    assert loss < 1e-10 and slope < 1e-6
    torch.testing.assert_close(student[:TOP], TEACHER[:TOP], rtol=1e-5, atol=0)
    rest = START[TOP:].softmax(-1) * TEACHER[TOP:].sum()
    torch.testing.assert_close(student[TOP:], rest, rtol=1e-4, atol=0)
    assert full == pytest.approx(0.0083, abs=5e-5)


@pytest.mark.parametrize("divergence", KLS)
def test_renormalised_does_not_teach_the_mass_of_the_top_k(divergence):
    loss, full, student, slope = taught(of_tail(divergence, Tail.RENORMALISED))
    assert loss < 1e-10 and slope < 1e-6
    assert float(student[0] / student[1]) == pytest.approx(0.45 / 0.25, rel=1e-4)
    # As at the start, where 0.211 was on the two; the teacher has 0.7.
    assert float(student[:TOP].sum()) == pytest.approx(0.213, abs=2e-3)
    assert full == pytest.approx(0.551, abs=1e-3)


def test_truncated_without_the_masses_stops_early_or_pushes_out():
    loss, full, student, slope = taught(bare_forward)
    # Held at 0 there is no gradient where more mass is on the ids than the teacher's 0.7.
    assert loss == slope == 0.0 and float(student[:TOP].sum()) == pytest.approx(0.754, abs=2e-3)
    assert full == pytest.approx(0.0163, abs=2e-4)
    loss, full, student, _ = taught(bare_reverse)
    assert loss == pytest.approx(-0.2575, abs=1e-3) and full == pytest.approx(0.436, abs=1e-3)
    assert float(student[:TOP].sum()) == pytest.approx(0.258, abs=1e-3)


def test_the_table_of_the_page():
    page = (Path(__file__).parents[1] / "docs" / "distillation.md").read_text()
    lines = page.split("<!-- tails:begin -->\n")[1].split("\n<!-- tails:end -->")[0].splitlines()
    rows = [[float(x) for x in line[2:-2].split(" | ")[1:]] for line in lines[2:]]
    tails = (Tail.BUCKET, Tail.TRUNCATED, Tail.RENORMALISED)
    losses = [full_kl, *(of_tail(Divergence.FORWARD, tail) for tail in tails)]
    for row, loss in zip(rows, [*losses, bare_forward, bare_reverse], strict=True):
        value, full, student, _ = taught(loss)
        assert row == pytest.approx([value, float(student[:TOP].sum()), full], abs=6e-4)


# Extremes


def one_tail(mass: float, K: int = 4) -> Tensor:
    """K log-probabilities in float64 that leave `mass`, one of them nearly everything."""
    p = torch.full((K,), mass / 7, dtype=torch.float64)
    p[0] = 1 - mass - p[1:].sum()
    return p.log()


@pytest.mark.parametrize("mass", [0.9, 0.5, 0.1, 1e-3, 1e-5, 1e-6])
def test_the_mass_of_a_tail_keeps_three_digits_from_float32(mass):
    """FORWARD against a teacher with twice the tail: half of the value is the bucket's term."""
    student, teacher = one_tail(mass / 2), one_tail(mass)
    got = topk_divergence(student.float(), teacher.float())
    right = topk_divergence(student, teacher)
    assert abs(float(got) - float(right)) < 1e-3 * float(right)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masses_that_round_to_one_or_more_are_finite_with_a_finite_gradient(dtype, name):
    near = torch.tensor([[0.6, 0.4], [0.6, 0.4000001], [0.7, 0.5], [1.0, 1e-30]])
    for of_student in near.log().to(dtype):
        for of_teacher in (near[0].log().to(dtype), torch.tensor([0.3, 0.3], dtype=dtype).log()):
            leaves = [x.clone().requires_grad_() for x in (of_student, of_teacher)]
            value = topk_divergence(*leaves, divergence=DIVERGENCES[name])
            assert value.isfinite()
            for gradient in torch.autograd.grad(value, leaves):
                assert gradient.isfinite().all()


def test_a_student_without_a_tail_is_pulled_back():
    """All of its mass is on the ids, the teacher's 0.6: the gradient is that of the least tail."""
    student = torch.tensor([0.5, 0.5]).log().requires_grad_()
    value = topk_divergence(student, torch.tensor([0.3, 0.3]).log())
    assert value.item() == pytest.approx(0.4 * math.log(0.4 / LEAST_TAIL) + 0.6 * math.log(0.6))
    (gradient,) = torch.autograd.grad(value, student)
    assert (gradient > 0.1 / LEAST_TAIL).all()


@every_tail
@every_divergence
def test_padding_is_none_of_the_k(name, tail):
    """Whatever the student has there, -inf or NaN of the teacher; both are 0 without entries."""
    s, t = drawn(3)
    options = {"divergence": DIVERGENCES[name], "tail": tail}
    leaves = [x[..., :3].clone().requires_grad_() for x in (s, t)]
    right = topk_divergence(*leaves, **options)
    expected = torch.autograd.grad(right.sum(), leaves)
    for padding in (-torch.inf, torch.nan):
        for garbage in (0.0, -torch.inf, torch.nan, 5.0):
            ends = (garbage, padding)
            wide = [
                torch.cat([x.detach(), torch.full((3, 2), end).double()], -1).requires_grad_()
                for x, end in zip(leaves, ends, strict=True)
            ]
            got = topk_divergence(*wide, **options)
            torch.testing.assert_close(got, right)
            for a, b in zip(torch.autograd.grad(got.sum(), wide), expected, strict=True):
                torch.testing.assert_close(a[..., :3], b)
                assert not a[..., 3:].any()
            nothing = [x.detach()[..., 3:].requires_grad_() for x in wide]
            got = topk_divergence(*nothing, **options)
            assert not got.any()
            assert not any(g.any() for g in torch.autograd.grad(got.sum(), nothing))


@every_tail
def test_nan_of_the_student_stays_and_reaches_no_other_token(tail):
    s, t = (x[..., :3].clone() for x in drawn(3))
    s[1, 2] = torch.nan
    s.requires_grad_()
    got = topk_divergence(s, t, tail=tail)
    assert got.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(got[0] + got[2], s)
    assert gradient[[0, 2]].isfinite().all()


@every_tail
def test_a_student_that_excludes_an_entry_of_the_teacher(tail):
    s, t = (x[..., :3].clone() for x in drawn(1))
    s[0, 1] = -torch.inf
    for name, divergence in DIVERGENCES.items():
        leaf = s.clone().requires_grad_()
        value = topk_divergence(leaf, t, divergence=divergence, tail=tail)
        assert bool(value.isinf()) == (name in ("FORWARD", "ALPHA(-0.5)"))
        assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("half", HALVES, ids=str)
@every_tail
def test_half_precision_is_computed_with_in_float32(tail, half):
    s, t = (x[..., :3].to(half) for x in drawn(5))
    got = topk_divergence(s, t, tail=tail)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, topk_divergence(s.float(), t.float(), tail=tail))


# With the other half


def test_from_hidden_states():
    """Value and gradient of a whole step against float64 over the whole vocabulary."""
    N, H, V, K = 12, 8, 60, 5
    hidden, weight = torch.randn(2, N, H), torch.randn(V, H)
    teacher = (torch.randn(2, N, V) * 2).log_softmax(-1)
    values, ids = teacher.topk(K, -1)
    ids[0, 3, 2:], values[0, 3, 2:] = -100, -torch.inf
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    stats = linear_logprobs_at(*leaves, ids)
    loss = topk_divergence(stats.logprobs, values).mean()
    got = torch.autograd.grad(loss, leaves)
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    logp = (wide[0] @ wide[1].T).log_softmax(-1)
    counted = ids >= 0
    s = logp.gather(-1, ids.clamp(min=0)).exp().where(counted, 0.0)
    t = values.double().exp().where(counted, 0.0)
    terms = t * (t / s).log().where(counted, 0.0)
    left, right = 1 - s.sum(-1), 1 - t.sum(-1)
    value = (terms.where(counted, 0.0).sum(-1) + right * (right / left).log()).mean()
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0)
    safe = torch.autograd.grad(value, wide)
    for a, b in zip(got, safe, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("tail", [Tail.BUCKET, Tail.TRUNCATED])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_near_the_teacher_bfloat16_keeps_value_and_gradient(noise, tail):
    """Both slopes vanish there, and what is rounded with them; eager logits are rounded whole."""
    case = oracle.random_case(64, 64, 500, torch.bfloat16, logit_std=2.0)
    z = case.hidden.double() @ case.weight.double().T
    teacher, ids = (z + noise * torch.randn_like(z)).log_softmax(-1).topk(64, -1)

    def step(stats, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.weight)]
        loss = topk_divergence(stats(case, ids)(*leaves, None).logprobs, teacher, tail=tail)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    right = step(test_at.exact, torch.float64)
    theirs = step(test_at.eager, torch.bfloat16)
    for way in test_at.WAYS.values():
        got = step(way, torch.bfloat16)
        for mine, other, exact in zip(got, theirs, right, strict=True):
            error = oracle.relative_error(mine, exact)
            assert error < (1e-4 if mine is got[0] else 4e-3)
            assert error < 0.3 * oracle.relative_error(other, exact)


def test_renormalised_needs_no_pass_over_the_vocabulary():
    hidden, weight = torch.randn(7, 8).requires_grad_(), torch.randn(60, 8).requires_grad_()
    values, ids = (torch.randn(7, 60)).log_softmax(-1).topk(4, -1)
    results = []
    for s in (
        linear_logprobs_at(hidden, weight, ids).logprobs,
        linear_logits_at(hidden, weight, ids),
    ):
        loss = topk_divergence(s, values, tail=Tail.RENORMALISED).sum()
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # The others' entries have no gradient at all.
    others = torch.ones(60, dtype=torch.bool).index_fill(0, ids.flatten(), 0)
    assert others.any() and not results[1][2][others].any()


def gradient_error(tail_mass: float) -> float:
    """Of a logit, through float32 log-probabilities of a student that has this tail."""
    p = torch.tensor([0.6, 0.4 - tail_mass, tail_mass / 2, tail_mass / 2], dtype=torch.float64)
    z = p.log()
    teacher = torch.tensor([0.5, 0.3]).double().log()
    found = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight = torch.ones(1, 1, dtype=dtype, requires_grad=True), z[:, None].to(dtype)
        bias = torch.zeros(4, dtype=dtype, requires_grad=True)
        stats = linear_logprobs_at(hidden, LMHead(weight, bias), torch.tensor([[0, 1]]))
        loss = topk_divergence(stats.logprobs, teacher.to(dtype)[None])
        found.append(torch.autograd.grad(loss.sum(), bias)[0].double())
    return float((found[0] - found[1]).norm() / found[1].norm())


def test_the_gradient_of_a_small_tail_is_a_difference():
    errors = [gradient_error(mass) for mass in (0.3, 1e-2, 1e-4, 1e-6)]
    assert errors[0] < 1e-6 and errors[1] < 1e-4 and errors[2] < 5e-3 and errors[3] < 0.5


# As torch sees it


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_tail
def test_torch_func_is_right_and_second_derivatives_raise(tail):
    s, t = (x[..., :3].clone() for x in drawn(4))

    def one(a: Tensor, b: Tensor) -> Tensor:
        return topk_divergence(a, b, divergence=Divergence.JSD(0.5), tail=tail).sum()

    leaf = s.clone().requires_grad_()
    expected = torch.autograd.grad(one(leaf, t), leaf)[0]
    torch.testing.assert_close(grad(one)(s, t), expected)
    torch.testing.assert_close(jacrev(one)(s, t), expected)
    torch.testing.assert_close(vmap(grad(one))(s, t), expected)
    with pytest.raises(NotImplementedError, match="topk_divergence has no"):
        hessian(one)(s, t)
    (first,) = torch.autograd.grad(one(leaf, t), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="topk_divergence has no second"):
        torch.autograd.grad(first.sum(), leaf)


@every_tail
def test_compiled_equals_eager(tail):
    torch._dynamo.reset()

    def value(s: Tensor, t: Tensor) -> Tensor:
        return topk_divergence(s, t, tail=tail).sum()

    compiled = torch.compile(value, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (4, 7):
        s, t = (x[..., :3].float() for x in drawn(N))
        t[0, 2] = -torch.inf
        leaf = s.clone().requires_grad_()
        results = [(v := f(leaf, t)).detach() for f in (value, compiled)]
        grads = [torch.autograd.grad(f(leaf, t), leaf)[0] for f in (value, compiled)]
        assert v is not None
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*grads)
    torch._dynamo.reset()


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logprobs_at": torch.zeros(2, 3).long()},
            "logprobs_at must be float16, .* got torch.int64",
        ),
        ({"teacher_logprobs": [0.1]}, "teacher_logprobs must be a torch.Tensor, got list"),
        ({"teacher_logprobs": torch.zeros(2, 4)}, r"teacher_logprobs \[2, 4\] and logprobs_at"),
        (
            {"logprobs_at": torch.zeros(2, 0), "teacher_logprobs": torch.zeros(2, 0)},
            r"K >= 1, got \[2, 0\]",
        ),
        ({"divergence": "forward"}, "divergence must be a Divergence, got 'forward'"),
        ({"tail": "bucket"}, "tail must be a Tail, got 'bucket'"),
    ],
)
def test_mistakes_raise(change, message):
    given = {"logprobs_at": torch.zeros(2, 3), "teacher_logprobs": torch.zeros(2, 3), **change}
    with pytest.raises(ValueError, match=message):
        topk_divergence(given.pop("logprobs_at"), given.pop("teacher_logprobs"), **given)

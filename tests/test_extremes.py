"""Logits so large that a sum of them keeps no digit of what counts, and excluded entries."""

from dataclasses import replace

import oracle
import pytest
import torch
from oracle import IGNORED, Case, Result

from fused_rl import LMHead, linear_logprobs, logprobs_from_logits, ops, reference
from fused_rl.linear.arguments import flat_arguments
from fused_rl.ops.linear import linear_logprobs_backward
from fused_rl.ops.logits import logits_logprobs_backward
from fused_rl.ops.record import Known, Needs, Upstream

pytestmark = pytest.mark.usefixtures("poisoned")

V = 300
WIDE = (torch.float32, torch.float64)


def plain(case: Case, dlogprobs, dentropy) -> Result:
    """What serves devices without a kernel."""
    head = flat_arguments(case.hidden, case.head, case.labels, case.temperature)
    limits = ops.Limits(IGNORED, 20 * V * 8)
    logprobs, entropy, lse, _ = ops.linear_logprobs.plain(head, limits)
    up = Upstream(dlogprobs.to(entropy.dtype), dentropy.to(entropy.dtype))
    known, needs = Known(lse, entropy), Needs(True, True, True)
    grads = linear_logprobs_backward.plain(up, head, limits, known, needs)
    return Result(logprobs, entropy, *grads)


WAYS = {
    "trained": oracle.ours,
    "frozen": lambda *args: oracle.ours(*args, frozen=True),
    # Every entry has a probability that the filter lets pass.
    "filtered": lambda *args: oracle.ours(*args, grad_filter=1e-9),
    "plain": plain,
}


def _row(kind: str, dtype: torch.dtype) -> torch.Tensor:
    if kind == "two tie":
        return torch.zeros(V, dtype=dtype).index_fill(0, torch.tensor([3, 7]), 1e20)
    if kind == "one above all":
        return torch.zeros(V, dtype=dtype).index_fill(0, torch.tensor([3]), 1e20)
    if kind == "all are the least there is":
        return torch.full((V,), torch.finfo(dtype).min, dtype=dtype)
    return torch.full((V,), float(kind), dtype=dtype)


KINDS = ("two tie", "one above all", "all are the least there is", "-1e15", "-1e30", "3e12", "-1e9")


def _close(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(ours.double(), exact.double(), atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["kernel", "plain"])
def test_gradients_of_huge_logits(kind, dtype, way):
    """-1e9 and finfo.min are what masks add; a row may be masked from end to end."""
    logits = _row(kind, dtype).repeat(4, 1)
    labels = torch.tensor([3, 7, 0, V - 1])
    g, h = torch.randn(2, 4, dtype=dtype)

    def gradient(z, way):
        stats = way(z)
        return torch.autograd.grad(stats[:2], z, (g.to(z.dtype), h.to(z.dtype)))[0]

    if way == "kernel":
        got = gradient(logits.requires_grad_(), lambda z: tuple(logprobs_from_logits(z, labels)))
    else:
        rows = ops.Rows(logits, labels, torch.ones(4, dtype=dtype), IGNORED)
        _, entropy, lse = ops.logits_logprobs.plain(rows)
        got = logits_logprobs_backward.plain(Upstream(g, h), rows, Known(lse, entropy))
    exact = logits.detach().double().requires_grad_()
    _close(got, gradient(exact, lambda z: reference.statistics(z, labels)), dtype)
    _close(got.sum(-1), torch.zeros(4), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_a_head_with_a_huge_bias(way, kind, dtype):
    """What of hidden . weight rounds away beside such a bias is part of the case. Eighths, which
    float64 has beside 1e15: it does not matter whether a product begins with the bias.
    """
    if (way, dtype) == ("filtered", torch.float64):
        return  # an approximation, which has no digits of log_sum but those in lse
    N, H = 20, 8
    case = Case(
        torch.randint(-3, 4, (N, H)).to(dtype) / 2,
        torch.randint(-3, 4, (V, H)).to(dtype) / 4,
        _row(kind, dtype),
        torch.tensor([3, 7, 0, V - 1] * 5),
        torch.ones(N),
    )
    up = oracle.random_upstream(N)
    got = WAYS[way](case, *up)
    wide = dtype if dtype in WIDE else torch.float32
    names = ("hidden", "weight", "bias")
    rounded = replace(case, **{name: getattr(case, name).to(wide) for name in names})
    right = oracle.eager(rounded, *up)
    for name, mine, true in zip(Result._fields, got, right, strict=True):
        if mine is not None:
            kept = torch.finfo(dtype).eps if name.startswith("d") else 0
            kept = max(kept, 1e-11 if wide == torch.float64 else 1e-5)
            assert oracle.relative_error(mine, true) < kept, name


@pytest.mark.parametrize("power", range(24, 64, 3))
@pytest.mark.parametrize("sign", [1, -1])
def test_where_the_digits_end(power, sign):
    """Three entries tie; a fourth is as near to them as float32 allows."""
    top = torch.tensor(sign * 2.0**power)
    logits = torch.full((2, V), -torch.inf)
    logits[:, [2, 5, 9]] = top
    logits[:, 11] = torch.nextafter(top, torch.tensor(-torch.inf))
    labels = torch.tensor([5, 11])
    z = logits.requires_grad_()
    stats = logprobs_from_logits(z, labels)
    got = torch.autograd.grad((stats.logprobs[0], stats.entropy[0]), z, (torch.tensor(1.0),) * 2)[0]
    exact = logits.detach().double().requires_grad_()
    true = reference.statistics(exact, labels)
    want = torch.autograd.grad((true[0][0] + true[1][0]), exact)[0]
    torch.testing.assert_close(got.double(), want, atol=5e-7, rtol=0)


# Excluded entries


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("upstream", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("dtype", oracle.FLOATS, ids=str)
def test_words_at_minus_infinity_have_a_gradient_of_exactly_zero(way, upstream, dtype):
    """An optimiser that takes the sign of a gradient would move them otherwise."""
    case = oracle.random_case(20, 16, 200, dtype, bias=True)
    case.bias[::3] = -torch.inf
    case = replace(case, labels=torch.randint(66, (20,)) * 3 + 1)
    g, zeros = torch.randn(20), torch.zeros(20)
    up = {"logprobs": (g, zeros), "entropy": (zeros, g), "both": (g, g.flip(0))}[upstream]
    got = WAYS[way](case, *up)
    if way != "frozen":
        assert not got.dweight[::3].any() and got.dweight[1::3].any()
        assert not got.dbias[::3].any() and got.dbias[1::3].any()
    logits = torch.randn(4, 200).to(dtype)
    logits[:, ::3] = -torch.inf
    z = logits.requires_grad_()
    stats = logprobs_from_logits(z, torch.tensor([1, 2, 4, 5]))
    torch.autograd.grad(tuple(stats), z, (torch.randn(4).to(stats[0].dtype),) * 2)
    (dlogits,) = torch.autograd.grad(
        logprobs_from_logits(z, torch.tensor([1, 2, 4, 5]))[0].sum(), z
    )
    assert not dlogits[:, ::3].any() and dlogits[:, 1::3].any()


@pytest.mark.parametrize("N", [1, 20, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_entry_whose_weights_are_infinite_leaves_the_others_alone(N, dtype):
    """Its logit is -inf for every token; what pads the tokens, 0 times infinity, takes no part."""
    case = oracle.random_case(N, 16, 200, dtype, bias=True)
    case = replace(case, hidden=case.hidden.abs() + 0.1, labels=torch.randint(6, 200, (N,)))
    up = oracle.random_upstream(N)
    case.weight[5] = -torch.inf
    got = oracle.ours(case, *up)
    others = torch.arange(200) != 5
    kept = replace(case, weight=case.weight[others], bias=case.bias[others], labels=case.labels - 1)
    right, torch_same = oracle.exact(kept, *up), oracle.eager(kept, *up)
    assert not got.dweight[5].any() and not got.dbias[5].any()
    oracle.assert_no_worse(got.dweight[others], torch_same.dweight, right.dweight, roundings=2)
    oracle.assert_no_worse(got.dbias[others], torch_same.dbias, right.dbias, roundings=2)
    # As in torch: 0 times an infinite weight.
    assert got.dhidden.isnan().all()


def test_a_frozen_head_keeps_a_row_of_ties_apart_from_its_neighbours():
    hidden = torch.randn(5, 8)
    head = LMHead(torch.randn(V, 8), torch.full((V,), -1e30))
    leaf = hidden.requires_grad_()
    logprobs, _ = linear_logprobs(leaf, head, torch.arange(5))
    assert torch.allclose(logprobs, torch.full((5,), -torch.tensor(float(V)).log()))
    (got,) = torch.autograd.grad(logprobs.sum(), leaf)
    torch.testing.assert_close(got, head.weight[:5] - head.weight.mean(0))

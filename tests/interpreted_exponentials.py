"""Exponentials in the place of logits, in the interpreter; test_exponentials.py runs this file."""

import pytest
import torch
from interpreted_kernels import DEVICE, FUSED, Case, close, small_and_on_cpu  # noqa: F401 fixture

from fused_rl import reference
from fused_rl.kernels import exponentials_gradients, linear_gradients
from fused_rl.kernels import linear_exponentials as kernel

CONFIGS = [FUSED["pointers"], FUSED["TMA"]]
# The interpreter cuts off what does not fit into bfloat16, where a GPU rounds: twice the error, and
# all of it to one side. The error of the scheme itself is below.
BUDGET = 1.2e-2


@pytest.fixture(autouse=True)
def products_on_cpu(small_and_on_cpu, monkeypatch):  # noqa: F811
    for name in ("product", "add_product_"):
        monkeypatch.setattr(exponentials_gradients, name, getattr(linear_gradients, name))


def case_of(N=37, H=24, V=130, transform=True, **options):
    return Case(N, H, V, torch.bfloat16, transform, ignored=False, **options)


def forward(case, config=CONFIGS[0]):
    N, V = len(case.labels), len(case.weight)
    room = torch.full((N, linear_gradients.row_stride(V)), torch.nan, dtype=torch.bfloat16)
    stats, s = kernel.fwd(*case.head, DEVICE, config, room[:, :V])
    return stats, (room[:, :V], s)


def backward(case, config=CONFIGS[0], accumulate=False, apart=False):
    (values, entropy, lse, _), stored = forward(case, config)
    hidden, weight, *transform = case.head
    offset = 2.0 if accumulate else float("nan")
    dtype = torch.float32 if accumulate else torch.bfloat16
    dweight = torch.full(weight.shape, offset, dtype=dtype)
    dbias = None if case.bias is None else torch.full(case.bias.shape, offset)
    e, s = stored
    known = exponentials_gradients.Known(s, values, lse, entropy)
    up = (case.dlogprobs, case.dentropy)
    args = (up, e, hidden, weight, transform, known, dweight, dbias)
    if apart:
        before = e.clone()
        dhidden = exponentials_gradients.bwd_by_blocks(*args, 64)
        assert torch.equal(e, before)
    else:
        dhidden = exponentials_gradients.bwd(*args, accumulate)
    return dhidden, dweight, dbias


@pytest.mark.parametrize("config", CONFIGS, ids=["pointers", "TMA"])
@pytest.mark.parametrize("transform", [False, True])
def test_statistics_and_exponentials(config, transform):
    case = case_of(transform=transform)
    exact, _ = case.exact()
    stats, (e, s) = forward(case, config)
    for ours, true in zip(stats, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=2e-5, rtol=2e-6)
    head = (t if t is None else t.double() for t in case.head[:3])
    z = reference.logits(*head, case.temperature.double(), case.scale, case.softcap)
    p = z.softmax(-1)
    torch.testing.assert_close(e.double() / s.double()[:, None], p, atol=0.0, rtol=2**-7)
    assert e.stride(0) == 192 and (s >= 1 - 1e-6).all()


@pytest.mark.parametrize(("N", "H", "V"), [(1, 1, 1), (1, 16, 33), (17, 7, 65), (16, 33, 31)])
def test_ragged_sizes(N, H, V):
    case = case_of(N, H, V)
    case.labels %= V
    exact, gradients = case.exact()
    for ours, true in zip(forward(case)[0], exact, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=2e-5, rtol=2e-6)
    for ours, true in zip(backward(case), gradients, strict=True):
        # Where a vocabulary of one leaves nothing, what is left of the terms is small.
        assert (ours.double() - true).norm() <= 1.2e-2 * true.norm() + 1e-6


@pytest.mark.parametrize("entropy", ["in all", "in none", "in some"])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("way", ["written", "added", "by blocks"])
def test_gradients(entropy, transform, way):
    case = case_of(transform=transform)
    if entropy != "in all":
        case.dentropy[:: 2 if entropy == "in some" else 1] = 0
    _, exact = case.exact()
    offset = 2.0 if way == "added" else 0.0
    dhidden, *sums = backward(case, CONFIGS[0], way == "added", way == "by blocks")
    close(dhidden, exact[0], BUDGET)
    for ours, true in zip(sums, exact[1:], strict=False):
        close(ours - offset, true, BUDGET)


@pytest.mark.parametrize("transform", [False, True])
def test_rows_far_from_their_reference_are_formed_again(transform):
    """The largest logit is neither the label's nor in the first block, and 2^60 above both."""
    case = case_of(40, 24, 200, transform=False)
    if transform:
        case.temperature, case.scale = torch.rand(40) + 0.5, 0.7
    far = torch.arange(40) % 20 == 3
    case.hidden[far, 0] = 50.0
    case.weight[:, 0] = 0
    case.weight[150, 0] = 1.0
    case.labels[far] = 7
    exact, gradients = case.exact()
    assert (exact[0][far] < -20).all()
    stats, (e, s) = forward(case)
    for ours, true in zip(stats, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=5e-5, rtol=2e-6)
    assert s.isfinite().all() and (s < 2.0**40).all() and e.isfinite().all()
    for ours, true in zip(backward(case), gradients, strict=False):
        close(ours, true, BUDGET)


def test_tiles_that_are_near_are_left_as_they_are():
    case = case_of(40, 24, 200, transform=False)
    before = forward(case)
    case.hidden[20, 0], case.weight[:, 0] = 90.0, 0
    clean = forward(case)
    case.weight[150, 0] = 1.0
    case.labels[20] = 7
    stats, (e, s) = forward(case)
    assert stats[0][20] < -40 and clean[0][0][20] > -40
    # The first tile of sixteen tokens and the last; their label may have moved nothing.
    for rows in (slice(0, 16), slice(32, 40)):
        others = torch.arange(200) != 150
        assert torch.equal(e[rows][:, others], clean[1][0][rows][:, others])
    assert before[1][0].shape == e.shape and s[20] < 4


@pytest.mark.parametrize("kind", ["-inf", "a tile of -inf", "finfo.min", -1e30, 1e20])
def test_extreme_biases(kind):
    case = case_of(33, 24, 130, transform=False)
    case.bias = torch.zeros(130)
    if kind == "-inf":
        case.bias[::3] = -torch.inf
        case.labels = case.labels // 3 * 3 + 1
    elif kind == "a tile of -inf":
        case.bias[:70] = case.bias[96:] = -torch.inf
        case.labels = 70 + case.labels % 26
    else:
        case.bias += torch.finfo(torch.float32).min if kind == "finfo.min" else kind
    stats, (e, s) = forward(case)
    if type(kind) is str and "-inf" in kind:
        exact, gradients = case.exact()
        for ours, true in zip(stats, exact, strict=True):
            torch.testing.assert_close(ours.double(), true, atol=2e-5, rtol=2e-6)
        grads = backward(case)
        for ours, true in zip(grads[:2], gradients[:2], strict=True):
            close(ours, true, BUDGET)
        gone = case.bias == -torch.inf
        assert (
            (e[:, gone] == 0).all() and (grads[1][gone] == 0).all() and (grads[2][gone] == 0).all()
        )
    else:
        # In fp32 the logits of a row are one and the same number.
        log_v = torch.tensor(130.0).double().log()
        for ours, true in zip(stats[:2], (-log_v, log_v), strict=True):
            torch.testing.assert_close(ours.double(), true.expand(33), atol=2e-5, rtol=2e-6)
        assert (e == 1).all() and (s == 130).all()


def test_a_nan_row_poisons_itself_alone_and_nothing_without_a_gradient():
    case = case_of()
    clean = backward(case)
    case.hidden[5] = float("nan")
    (stats, (_, s)), grads = forward(case), backward(case)
    assert all(t[5].isnan() for t in stats) and s[5].isnan()
    others = torch.arange(37) != 5
    assert torch.equal(grads[0][others], clean[0][others]) and grads[0][5].isnan().all()
    assert grads[1].isnan().all()
    case.dlogprobs[5] = case.dentropy[5] = 0
    for transformed in (True, False):
        case.softcap = 5.0 if transformed else 0.0
        grads = backward(case)
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][5] == 0).all()


def test_a_label_outside_the_vocabulary_is_nan_for_that_token():
    case = case_of()
    case.labels[3], case.labels[8] = 130, -1
    values, entropy, _, top = forward(case)[0]
    wrong = torch.zeros(37, dtype=torch.bool)
    wrong[[3, 8]] = True
    assert values[wrong].isnan().all() and values[~wrong].isfinite().all()
    assert entropy.isfinite().all() and top.isfinite().all()


def test_tiny_and_unequal_upstream_gradients_survive():
    case = case_of(transform=False)
    case.dentropy[:] = 0
    case.dlogprobs *= torch.logspace(-30, 0, 37)
    _, exact = case.exact()
    dhidden, dweight, _ = backward(case)
    for ours, true in zip(dhidden, exact[0], strict=True):
        close(ours * 1e25, true * 1e25, 2 * BUDGET) if true.norm() < 1e-6 else close(
            ours, true, 2 * BUDGET
        )
    close(dweight, exact[1], BUDGET)


def test_a_second_backward_finds_the_same_without_entropy_and_softcap():
    case = case_of(transform=False)
    case.dentropy[:] = 0
    (values, entropy, lse, _), (e, s) = forward(case)
    hidden, weight, *transform = case.head
    known = exponentials_gradients.Known(s, values, lse, entropy)
    args = ((case.dlogprobs, case.dentropy), e, hidden, weight, transform, known)
    runs = []
    for _ in range(2):
        dweight = torch.empty_like(weight)
        runs.append((exponentials_gradients.bwd(*args, dweight, None, False), dweight))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_tokens():
    case = case_of(0)
    stats, (e, s) = forward(case)
    assert [len(t) for t in (*stats, e, s)] == [0] * 6
    dhidden, dweight, dbias = backward(case)
    assert dhidden.shape == (0, 24) and (dweight == 0).all() and (dbias == 0).all()

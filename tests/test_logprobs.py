"""logprobs_from_logits in numbers, and TokenStats: values and gradients against float64."""

import math

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import FLOATS, IGNORED

from fused_rl import linear_logprobs, logprobs_from_logits, reference

pytestmark = pytest.mark.usefixtures("poisoned")

ROWS = [(1, 2), (3, 15), (5, 16), (7, 17), (64, 257), (33, 4096), (2, 4097), (4, 20011)]


def _differentiate(stats, logits, up):
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = stats(leaf)
    upstream = (up[0].to(logprobs.dtype), up[1].to(logprobs.dtype))
    (grad,) = torch.autograd.grad((logprobs, entropy), leaf, upstream)
    return logprobs.detach(), entropy.detach(), grad


def _ours(logits, labels, temperature, up, **options):
    return _differentiate(
        lambda z: logprobs_from_logits(z, labels, temperature=temperature, **options), logits, up
    )


def _eager(logits, labels, temperature, up):
    return _differentiate(lambda z: oracle.eager_statistics(z, labels, temperature), logits, up)


def _exact(logits, labels, temperature, up):
    return _differentiate(
        lambda z: reference.logits_logprobs(z, labels, temperature.double())[:2],
        logits.double(),
        up,
    )


def _assert_no_worse(logits, labels, temperature, up):
    got = _ours(logits, labels, temperature, up)
    torch_same, right = (
        _eager(logits, labels, temperature, up),
        _exact(logits, labels, temperature, up),
    )
    for mine, theirs, exact, roundings in zip(got, torch_same, right, (0, 0, 1), strict=True):
        summed_in = torch.float64 if logits.dtype == torch.float64 else torch.float32
        oracle.assert_no_worse(mine, theirs, exact, summed_in=summed_in, roundings=roundings)


@pytest.mark.parametrize("std", [0.3, 4.0])
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients_are_no_worse_than_those_of_torch(dtype, shape, std):
    N, V = shape
    logits = (torch.randn(N, V) * std).to(dtype)
    _assert_no_worse(logits, torch.randint(V, (N,)), torch.rand(N) + 0.5, oracle.random_upstream(N))


@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_one_output_alone(dtype, upstream):
    logits, g, zeros = torch.randn(9, 130).to(dtype), torch.randn(9), torch.zeros(9)
    up = (g, zeros) if upstream == "logprobs" else (zeros, g)
    _assert_no_worse(logits, torch.randint(130, (9,)), torch.rand(9) + 0.5, up)


@pytest.mark.parametrize("output", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("tempered", [False, True])
def test_gradcheck(output, tempered):
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 10, IGNORED], [5, 5, 1]])
    temperature = torch.rand(2, 3) + 0.5 if tempered else 1.0

    def stats(z):
        both = logprobs_from_logits(z, labels, temperature=temperature)
        return tuple(both) if output == "both" else getattr(both, output)

    assert torch.autograd.gradcheck(stats, logits)


def test_by_hand():
    # Logits 0, log 2, log 5: probabilities 1/8, 2/8, 5/8.
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)
    logits.requires_grad_()
    logprobs, entropy = logprobs_from_logits(logits, torch.tensor([2]))
    assert float(logprobs.detach()) == pytest.approx(math.log(5 / 8), rel=1e-14)
    right = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert float(entropy.detach()) == pytest.approx(right, rel=1e-14)
    logprobs.sum().backward()
    expected = torch.tensor([[-1 / 8, -2 / 8, 3 / 8]], dtype=torch.float64)
    assert oracle.relative_error(logits.grad, expected) < 1e-15


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_huge_logits_are_finite_and_right(dtype):
    logits = (torch.randn(20, 300) * 1e4).clamp(-6e4, 6e4).to(dtype)
    up = oracle.random_upstream(20)
    _assert_no_worse(logits, logits.argmax(1), torch.ones(20), up)
    _assert_no_worse(logits, torch.randint(300, (20,)), torch.ones(20), up)


def test_temperature_of_a_tenth_is_finite_and_right():
    logits = torch.randn(300, 200) * 4
    labels, up = torch.randint(200, (300,)), oracle.random_upstream(300)
    _assert_no_worse(logits, labels, torch.full((300,), 0.1), up)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_words_at_minus_infinity_take_no_part(dtype):
    logits, up = torch.randn(20, 200).to(dtype), oracle.random_upstream(20)
    excluded = torch.arange(200) % 3 == 0
    logits[:, excluded] = -torch.inf
    # A whole vector of them at the beginning, so that the running maximum starts at -inf.
    logits[:, :70] = -torch.inf
    excluded[:70] = True
    labels, ones = torch.randint(40, (20,)) * 3 + 76, torch.ones(20)
    got = _ours(logits, labels, ones, up)
    few, at = logits[:, ~excluded], (~excluded).cumsum(0)[labels] - 1
    torch_same, right = _eager(few, at, ones, up), _exact(few, at, ones, up)
    assert got[2][:, excluded].double().abs().max() < 1e-30
    kept = (got[0], got[1], got[2][:, ~excluded])
    for mine, theirs, exact in zip(kept, torch_same, right, strict=True):
        oracle.assert_no_worse(mine, theirs, exact, roundings=1)


def test_a_label_at_minus_infinity_has_logprob_minus_infinity_and_a_finite_entropy():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    logprobs, entropy = logprobs_from_logits(logits, torch.tensor([1]))
    assert float(logprobs) == -math.inf
    assert float(entropy) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("poison", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_of_nothing_but_one_of_these_is_nan_for_itself_alone(dtype, poison):
    logits, up = torch.randn(20, 200).to(dtype), oracle.random_upstream(20)
    labels, ones = torch.randint(200, (20,)), torch.ones(20)
    clean = _ours(logits, labels, ones, up)
    logits[5] = poison
    others = torch.arange(20) != 5
    for mine, right in zip(_ours(logits, labels, ones, up), clean, strict=True):
        assert mine[5].isnan().all()
        oracle.assert_same_bits(mine[others], right[others])


@pytest.mark.parametrize("place", [0, 17, 199])
def test_one_nan_in_a_row_makes_that_row_nan_alone(place):
    logits, up = torch.randn(20, 200), oracle.random_upstream(20)
    labels, ones = torch.randint(200, (20,)), torch.ones(20)
    clean = _ours(logits, labels, ones, up)
    logits[5, place] = torch.nan
    others = torch.arange(20) != 5
    for mine, right in zip(_ours(logits, labels, ones, up), clean, strict=True):
        assert mine[5].isnan().all()
        oracle.assert_same_bits(mine[others], right[others])


def test_nan_at_an_ignored_row_or_one_without_upstream_gradient_reaches_nothing():
    logits, up = torch.randn(20, 200), oracle.random_upstream(20)
    labels, ones = torch.randint(200, (20,)), torch.ones(20)
    labels[4] = IGNORED
    up[0][7] = up[1][7] = 0.0
    clean = _ours(logits, labels, ones, up)
    logits[4] = torch.nan
    temperature = ones.clone()
    temperature[4] = torch.nan
    for mine, right in zip(_ours(logits, labels, temperature, up), clean, strict=True):
        oracle.assert_same_bits(mine, right)
    logits[7] = torch.nan
    oracle.assert_same_bits(_ours(logits, labels, temperature, up)[2], clean[2])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_only_word_has_probability_1_and_nothing_to_learn(dtype):
    logits, labels = torch.randn(50, 1).to(dtype), torch.zeros(50, dtype=torch.int64)
    up = oracle.random_upstream(50)
    logprobs, entropy, grad = _ours(logits, labels, torch.rand(50) + 0.5, up)
    assert logprobs.abs().max() < 1e-6 and entropy.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("V", [1, 2, 7, 15, 16, 17, 4095, 4096, 4097])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_vocabularies_that_fill_no_vector_count_no_padding(dtype, V):
    logits = torch.full((3, V), 2.0, dtype=dtype)
    logprobs, entropy = logprobs_from_logits(logits, torch.tensor([0, V // 2, V - 1]))
    assert (logprobs + math.log(V)).abs().max() <= 2e-6
    assert (entropy - math.log(V)).abs().max() <= 2e-6


@pytest.mark.parametrize("layout", ["transposed", "every second column", "offset", "expanded"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_logits_of_any_strides(dtype, layout):
    base = torch.randn(41, 83).to(dtype)
    logits = {
        "transposed": base.T.contiguous().T,
        "every second column": base.repeat_interleave(2, 1)[:, ::2],
        "offset": torch.cat([base.new_zeros(3), base.flatten()])[3:].reshape(41, 83),
        "expanded": base[:1].expand(41, 83),
    }[layout]
    labels, up = torch.randint(83, (41,)), oracle.random_upstream(41)
    ones = torch.ones(41)
    plain = _ours(logits.contiguous(), labels, ones, up)
    for mine, right in zip(_ours(logits, labels, ones, up), plain, strict=True):
        oracle.assert_same_bits(mine, right)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (1, 3, 2), (0,), (2, 0)], ids=str)
def test_any_leading_shape(shape):
    logits = torch.randn(*shape, 30, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(30, shape)
    logprobs, entropy = logprobs_from_logits(logits, labels)
    assert logprobs.shape == entropy.shape == shape
    logp = torch.log_softmax(logits, -1)
    right = logp.gather(-1, labels[..., None])[..., 0]
    assert oracle.relative_error(logprobs, right) < 1e-14
    assert oracle.relative_error(entropy, -(logp.exp() * logp).sum(-1)) < 1e-14
    got, exact = (torch.autograd.grad(x.sum(), logits)[0] for x in (logprobs, right))
    assert oracle.relative_error(got, exact) < 1e-14


def test_ignored_tokens_give_0_and_0_and_no_gradient():
    logits, labels = torch.randn(10, 30), torch.randint(30, (10,))
    labels[::2] = 7
    up = oracle.random_upstream(10)
    logprobs, entropy, grad = _ours(logits, labels, torch.ones(10), up, ignore_index=7)
    ignored = labels == 7
    assert not logprobs[ignored].any() and not entropy[ignored].any() and not grad[ignored].any()
    rest = _ours(logits[~ignored], labels[~ignored], torch.ones(5), [g[~ignored] for g in up])
    for mine, right in zip((logprobs, entropy, grad), rest, strict=True):
        oracle.assert_same_bits(mine[~ignored], right)


def test_everything_ignored_gives_zeros_attached_to_the_graph():
    logits = torch.randn(4, 30, requires_grad=True)
    logprobs, entropy = logprobs_from_logits(logits, torch.full((4,), IGNORED))
    assert not logprobs.any() and not entropy.any()
    (logprobs + entropy).sum().backward()
    assert logits.grad.shape == logits.shape and not logits.grad.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_on_any_number_of_threads_and_in_any_batch(dtype, threads):
    logits, labels = torch.randn(100, 3000).to(dtype), torch.randint(3000, (100,))
    up, ones = oracle.random_upstream(100), torch.ones(100)
    torch.set_num_threads(1)
    single = _ours(logits, labels, ones, up)
    torch.set_num_threads(2)
    for mine, right in zip(_ours(logits, labels, ones, up), single, strict=True):
        oracle.assert_same_bits(mine, right)
    rows = torch.tensor([3, 50, 99])
    part = _ours(logits[rows], labels[rows], ones[rows], [g[rows] for g in up])
    for mine, right in zip(part, single, strict=True):
        oracle.assert_same_bits(mine, right[rows])


def test_agrees_with_linear_logprobs_on_the_logits_of_the_head():
    case = oracle.random_case(40, 24, 300, torch.float64, **oracle.EVERYTHING)
    fused = linear_logprobs(case.hidden, case.head, case.labels, temperature=case.temperature)
    logits = case.head.logits(case.hidden)
    direct = logprobs_from_logits(logits, case.labels, temperature=case.temperature)
    for mine, right in zip(fused, direct, strict=True):
        assert oracle.relative_error(mine, right) < 1e-13


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    N=st.integers(0, 20),
    V=st.integers(1, 300),
    dtype=st.sampled_from(FLOATS),
    std=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1000.0]),
    masked=st.floats(0.0, 0.9),
    seed=st.integers(0, 2**16),
)
def test_properties_of_any_logits(N, V, dtype, std, masked, seed):
    torch.manual_seed(seed)
    logits, labels = torch.randn(N, V) * std, torch.randint(V, (N,))
    out = torch.rand(N, V) < masked
    out[torch.arange(N), labels] = False
    logits = logits.masked_fill(out, -torch.inf).to(dtype)
    logprobs, entropy = logprobs_from_logits(logits, labels)
    assert (logprobs <= 0).all() and (entropy >= 0).all()
    entries = (~out).sum(1)
    assert (entropy <= entries.log() + 1e-5).all()
    right = reference.logits_logprobs(logits.double(), labels, torch.ones(N))
    size = 1 + logits.masked_fill(out, 0.0).double().abs().amax(1)
    assert ((logprobs - right[0]).abs() <= 16 * torch.finfo(logprobs.dtype).eps * size).all()
    # The judge's own entropy is a difference, lse - E[z], of numbers that are large together.
    slack = 16 * (torch.finfo(logprobs.dtype).eps * size + torch.finfo(torch.float64).eps * size**2)
    assert ((entropy - right[1]).abs() <= slack).all()

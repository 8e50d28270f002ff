"""linear_logprobs in numbers: values and gradients against float64, and what they may cost."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import EVERYTHING, FLOATS, IGNORED

from fused_rl import (
    LMHead,
    TokenStats,
    grpo,
    linear_logprobs,
    linear_policy_loss,
    linear_top_logprobs,
    ops,
    reference,
)
from fused_rl.linear.arguments import flat_arguments

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    (1, 1, 1),
    (1, 8, 1),
    (1, 1, 7),
    (3, 5, 11),
    (16, 64, 64),
    (17, 33, 65),
    (64, 64, 256),
    (65, 127, 513),
    (130, 24, 1100),
]
FEATURES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "temperature": {"temperature": True},
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients_are_no_worse_than_those_of_torch(dtype, shape, features, frozen):
    case = oracle.random_case(*shape, dtype, **FEATURES[features])
    up = oracle.random_upstream(shape[0])
    oracle.assert_result_no_worse(
        oracle.ours(case, *up, frozen=frozen),
        oracle.eager(case, *up),
        oracle.exact(case, *up),
        roundings=2,
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_one_output_alone_are_no_worse_than_those_of_torch(dtype, upstream, frozen):
    case = oracle.random_case(33, 48, 300, dtype, **EVERYTHING)
    g, zeros = torch.randn(33), torch.zeros(33)
    up = (g, zeros) if upstream == "logprobs" else (zeros, g)
    oracle.assert_result_no_worse(
        oracle.ours(case, *up, frozen=frozen),
        oracle.eager(case, *up),
        oracle.exact(case, *up),
        roundings=2,
    )


@pytest.mark.parametrize("of_weight", FLOATS, ids=str)
@pytest.mark.parametrize("of_hidden", FLOATS, ids=str)
def test_mixed_dtypes_of_hidden_and_weight(of_hidden, of_weight):
    case = oracle.random_case(21, 24, 131, of_hidden, weight_dtype=of_weight, **EVERYTHING)
    up = oracle.random_upstream(21)
    got = oracle.ours(case, *up)
    wide = torch.float64 if torch.float64 in (of_hidden, of_weight) else torch.float32
    assert (got.logprobs.dtype, got.entropy.dtype) == (wide, wide)
    assert (got.dhidden.dtype, got.dweight.dtype, got.dbias.dtype) == (
        of_hidden,
        of_weight,
        of_weight,
    )
    oracle.assert_result_no_worse(
        got, oracle.eager(case, *up), oracle.exact(case, *up), roundings=2
    )


@pytest.mark.parametrize("of_bias", FLOATS, ids=str)
def test_a_bias_of_another_dtype_than_the_weight(of_bias):
    case = oracle.random_case(9, 16, 70, torch.float32, bias=True)
    case = replace(case, bias=case.bias.to(of_bias))
    up = oracle.random_upstream(9)
    got = oracle.ours(case, *up)
    assert got.dbias.dtype == of_bias
    oracle.assert_result_no_worse(
        got, oracle.eager(case, *up), oracle.exact(case, *up), roundings=2
    )


# What must hold


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_bf16_at_logit_std_4_and_32768_words_keeps_the_error_budget(frozen):
    case = oracle.random_case(128, 256, 32768, torch.bfloat16, logit_std=4.0)
    up = oracle.random_upstream(128)
    got, torch_bf16 = oracle.ours(case, *up, frozen=frozen), oracle.eager(case, *up)
    right = oracle.exact(case, *up)
    assert (got.logprobs - right.logprobs).abs().max() <= 1e-5
    assert (got.entropy - right.entropy).abs().max() <= 1e-4
    oracle.assert_result_no_worse(got, torch_bf16, right)


def test_logits_are_never_rounded_to_bf16():
    case = oracle.random_case(64, 128, 4096, torch.bfloat16, logit_std=4.0)
    up = oracle.random_upstream(64)
    right = oracle.exact(case, *up).logprobs
    rounded = (oracle.eager(case, *up).logprobs - right).abs().max()
    assert (oracle.ours(case, *up).logprobs - right).abs().max() < 1e-3 * rounded


def test_dweight_is_summed_over_the_tokens_in_float32():
    case = oracle.random_case(700, 16, 50, torch.bfloat16, logit_std=0.1)
    case = replace(case, labels=case.labels % 2)
    up = torch.rand(700) + 0.5, torch.zeros(700)
    got, right = oracle.ours(case, *up).dweight, oracle.exact(case, *up).dweight
    assert oracle.relative_error(got, right) <= 3e-3


@pytest.mark.parametrize("chunks", [1, 2, 7, 64])
def test_one_pass_dweight_over_chunks_is_summed_in_float32(chunks, monkeypatch):
    monkeypatch.setitem(ops.ONE_PASS_TOKENS, "cpu", 1)
    N, V = 1024, 64
    case = oracle.random_case(N, 32, V, torch.bfloat16)
    batch, rows = oracle.policy_batch(case, (4, N // 4)), -(-N // chunks)
    leaves = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss = grpo(beta=0.1, entropy_coef=0.01)
    output = linear_policy_loss(
        leaves[0].reshape(4, N // 4, -1), leaves[1], batch, loss, chunk_bytes=rows * V * 4
    )
    assert type(output.loss.grad_fn).__name__ == "_OnePassBackward"
    dhidden, dweight = torch.autograd.grad(output.loss, leaves)
    hidden, exact_weight = case.hidden.double().requires_grad_(), case.weight.double()
    exact_weight.requires_grad_()
    stats = reference.linear_logprobs(
        hidden, exact_weight, None, case.labels, case.temperature, 1.0, 0.0
    )[:2]
    loss.objective(TokenStats(*stats), batch).backward()
    assert oracle.relative_error(dweight, exact_weight.grad) <= 3e-3
    assert oracle.relative_error(dhidden, hidden.grad) <= 6e-3


# gradcheck


def _gradcheck(function, case, trained):
    inputs = [case.hidden.requires_grad_()]
    for tensor in (case.weight, case.bias):
        inputs.append(None if tensor is None else tensor.requires_grad_(trained))
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("output", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("features", FEATURES)
def test_gradcheck(features, output, trained):
    case = oracle.random_case(6, 5, 9, torch.float64, ignored=1, **FEATURES[features])

    def stats(hidden, weight, bias):
        head = LMHead(weight, bias, case.scale, case.softcap)
        both = linear_logprobs(hidden, head, case.labels, temperature=case.temperature)
        return tuple(both) if output == "both" else getattr(both, output)

    _gradcheck(stats, case, trained)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("features", ["plain", "everything"])
def test_gradcheck_of_the_one_pass_loss(features, trained):
    case = oracle.random_case(8, 5, 9, torch.float64, **FEATURES[features])
    batch = oracle.policy_batch(case, (2, 4), masked=1)
    loss = grpo(beta=0.3, entropy_coef=0.1)
    assert loss.token_separable
    temperature = case.temperature.reshape(2, 4)

    def value(hidden, weight, bias):
        head = LMHead(weight, bias, case.scale, case.softcap)
        hidden = hidden.reshape(2, 4, 5)
        return linear_policy_loss(hidden, head, batch, loss, temperature=temperature).loss

    _gradcheck(value, case, trained)


# Numerics of ecosystem practice, case by case


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_huge_logits_are_finite_and_right(dtype, frozen):
    case = oracle.random_case(20, 16, 200, dtype, logit_std=1e4)
    up = oracle.random_upstream(20)
    got, right = oracle.ours(case, *up, frozen=frozen), oracle.exact(case, *up)
    assert all(t is None or t.isfinite().all() for t in got)
    oracle.assert_result_no_worse(got, oracle.eager(case, *up), right)


def test_temperature_of_a_tenth_is_finite_and_right():
    case = oracle.random_case(300, 16, 200, logit_std=4.0)
    case = replace(case, temperature=torch.full((300,), 0.1))
    up = oracle.random_upstream(300)
    oracle.assert_result_no_worse(
        oracle.ours(case, *up), oracle.eager(case, *up), oracle.exact(case, *up)
    )


def _with_excluded_words(dtype=torch.float32):
    case = oracle.random_case(20, 16, 200, dtype, bias=True)
    case.bias[::3] = -torch.inf
    return replace(case, labels=torch.randint(66, (20,)) * 3 + 1), case.bias == -torch.inf


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_word_whose_bias_is_minus_infinity_takes_no_part(dtype, frozen):
    case, excluded = _with_excluded_words(dtype)
    up = oracle.random_upstream(20)
    got = oracle.ours(case, *up, frozen=frozen)
    kept = replace(case, weight=case.weight[~excluded], bias=case.bias[~excluded])
    kept = replace(kept, labels=(~excluded).cumsum(0)[case.labels] - 1)
    right, torch_same = oracle.exact(kept, *up), oracle.eager(kept, *up)
    for name in ("logprobs", "entropy", "dhidden"):
        oracle.assert_no_worse(*(getattr(r, name) for r in (got, torch_same, right)))
    if not frozen:
        oracle.assert_no_worse(got.dweight[~excluded], torch_same.dweight, right.dweight)
        oracle.assert_no_worse(got.dbias[~excluded], torch_same.dbias, right.dbias)
        assert got.dweight[excluded].double().abs().max() < 1e-30
        assert got.dbias[excluded].double().abs().max() < 1e-30


def test_a_label_whose_bias_is_minus_infinity_has_logprob_minus_infinity():
    case, _ = _with_excluded_words()
    labels = case.labels.clone()
    labels[4] = 3
    logprobs, entropy = linear_logprobs(case.hidden, case.head, labels)
    assert logprobs[4] == -torch.inf
    assert entropy.isfinite().all() and logprobs[:4].isfinite().all()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_row_of_nothing_but_minus_infinity_is_nan_for_itself_alone(frozen):
    case = oracle.random_case(70, 8, 130)
    case = replace(case, weight=case.weight.abs() + 0.1)
    up = oracle.random_upstream(70)
    right = oracle.ours(case, *up, frozen=frozen)
    case.hidden[5, 0] = -torch.inf
    got = oracle.ours(case, *up, frozen=frozen)
    others = torch.arange(70) != 5
    for name in ("logprobs", "entropy", "dhidden"):
        mine, clean = getattr(got, name), getattr(right, name)
        assert mine[5].isnan().all() or name == "dhidden"
        oracle.assert_same_bits(mine[others], clean[others])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_or_infinity_in_one_hidden_row_poisons_that_row_only(dtype, poison, frozen):
    case = oracle.random_case(70, 8, 130, dtype)
    up = oracle.random_upstream(70)
    right = oracle.ours(case, *up, frozen=frozen)
    case.hidden[5, 3] = poison
    got = oracle.ours(case, *up, frozen=frozen)
    others = torch.arange(70) != 5
    for name in ("logprobs", "entropy", "dhidden"):
        mine, clean = getattr(got, name), getattr(right, name)
        assert mine[5].isnan().any()
        oracle.assert_same_bits(mine[others], clean[others])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_at_an_ignored_row_reaches_nothing(dtype, frozen):
    case = oracle.random_case(40, 8, 130, dtype, bias=True, ignored=7)
    up = oracle.random_upstream(40)
    right = oracle.ours(case, *up, frozen=frozen)
    case.hidden[:7] = torch.nan
    case.temperature[:7] = torch.nan
    got = oracle.ours(case, *up, frozen=frozen)
    for mine, clean in zip(got, right, strict=True):
        oracle.assert_same_bits(mine, clean)
    assert not any(got.dhidden[:7].flatten().tolist())


def test_nan_at_an_ignored_row_reaches_nothing_even_with_nan_upstream():
    case = oracle.random_case(40, 8, 130, bias=True, ignored=7)
    up = oracle.random_upstream(40)
    for frozen in (False, True):
        right = oracle.ours(case, *up, frozen=frozen)
        bad = [g.clone() for g in up]
        for g in bad:
            g[:7] = torch.nan
        for mine, clean in zip(oracle.ours(case, *bad, frozen=frozen), right, strict=True):
            oracle.assert_same_bits(mine, clean)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_nan_at_a_row_without_upstream_gradient_reaches_no_gradient(frozen):
    case = oracle.random_case(40, 8, 130, bias=True)
    up = oracle.random_upstream(40)
    for g in up:
        g[3:9] = 0.0
    right = oracle.ours(case, *up, frozen=frozen)
    case.hidden[3:9] = torch.nan
    got = oracle.ours(case, *up, frozen=frozen)
    for mine, clean in zip(got[2:], right[2:], strict=True):
        oracle.assert_same_bits(mine, clean)


def test_nan_at_a_masked_row_reaches_neither_loss_nor_gradient_of_the_one_pass_loss():
    case = oracle.random_case(40, 8, 130)
    batch, loss = oracle.policy_batch(case, (2, 20), masked=3), grpo(beta=0.1, entropy_coef=0.01)

    def run(hidden):
        leaves = hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        out = linear_policy_loss(leaves[0].reshape(2, 20, 8), leaves[1], batch, loss)
        out.loss.backward()
        return out.loss, *(t.grad for t in leaves)

    clean = run(case.hidden)
    case.hidden[~batch.loss_mask] = torch.nan
    for mine, right in zip(run(case.hidden), clean, strict=True):
        oracle.assert_same_bits(mine, right)


@pytest.mark.parametrize("V", [1, 2, 31, 63, 65, 127, 255, 257, 1023, 1025])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_vocabularies_that_fill_no_block_count_no_padding(dtype, V):
    # Equal logits: log-prob -log V and entropy log V, and one padded entry more would be seen.
    hidden, weight = torch.ones(5, 3, dtype=dtype), torch.ones(V, 3, dtype=dtype)
    labels = torch.tensor([0, V // 2, V - 1, 0, V - 1])
    logprobs, entropy = linear_logprobs(hidden, weight, labels)
    assert (logprobs + math.log(V)).abs().max() <= 2e-6
    assert (entropy - math.log(V)).abs().max() <= 2e-6


@pytest.mark.parametrize("feature", ["bias", "scale", "softcap"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bias_scale_and_softcap_each_alone_with_gradients(dtype, feature):
    case = oracle.random_case(19, 24, 150, dtype, logit_std=3.0, **FEATURES[feature])
    up = oracle.random_upstream(19)
    oracle.assert_result_no_worse(
        oracle.ours(case, *up), oracle.eager(case, *up), oracle.exact(case, *up), roundings=2
    )


@pytest.mark.parametrize("shape", [(), (3, 1), (1, 7), (3, 7)], ids=str)
def test_temperature_per_token_divides_the_logits_of_that_token(shape):
    case = oracle.random_case(21, 24, 150, torch.float64)
    temperature = torch.rand(shape) + 0.5
    labels = case.labels.reshape(3, 7)
    got = linear_logprobs(
        case.hidden.reshape(3, 7, 24), case.weight, labels, temperature=temperature
    )
    z = case.hidden @ case.weight.T / temperature.expand(3, 7).reshape(21, 1).double()
    logprobs, entropy, *_ = reference.statistics(z, case.labels)
    assert oracle.relative_error(got.logprobs.flatten(), logprobs) < 1e-13
    assert oracle.relative_error(got.entropy.flatten(), entropy) < 1e-13


def test_by_hand():
    # Logits 0, log 2, log 5: probabilities 1/8, 2/8, 5/8.
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([2]))
    assert float(logprobs.detach()) == pytest.approx(math.log(5 / 8), rel=1e-14)
    right = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert float(entropy.detach()) == pytest.approx(right, rel=1e-14)
    logprobs.sum().backward()
    slope = math.log(5) - (2 / 8 * math.log(2) + 5 / 8 * math.log(5))
    assert float(hidden.grad) == pytest.approx(slope, rel=1e-14)


# The most likely entry

TOPS = {
    "trained": lambda head: ops.linear_logprobs(head, ops.Limits(IGNORED, 2**20)).top,
    "frozen": lambda head: ops.linear_logprobs_frozen(head, ops.Limits(IGNORED, 2**16)).top,
    "chunk": lambda head: ops.linear_logprobs_chunk(head, ops.Given(True)).top,
    "plain": lambda head: ops.linear_logprobs.plain(head, ops.Limits(IGNORED, 2**16)).top,
    "plain chunk": lambda head: ops.linear_logprobs_chunk.plain(head, ops.Given(True)).top,
}


def _exact_logprobs(case):
    """[N, V] in float64."""
    t = case.temperature.double()
    bias = None if case.bias is None else case.bias.double()
    options = (bias, t, case.scale, case.softcap or 0.0)
    z = reference.logits(case.hidden.double(), case.weight.double(), *options)
    return torch.log_softmax(z, -1)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_logprobs_equal_top_logprobs_at_the_most_likely_word_alone(dtype, features, frozen):
    """Every entry in turn as the label of tokens whose two best entries are apart."""
    N, V = 12, 150
    case = oracle.random_case(4 * N, 24, V, dtype, **FEATURES[features])
    best, second = _exact_logprobs(case).topk(2, -1).values.unbind(-1)
    apart = (best - second > 1e-3).nonzero()[:N, 0]
    assert len(apart) == N
    every = replace(case.rows(apart.repeat_interleave(V)), labels=torch.arange(V).repeat(N))
    hidden = every.hidden.requires_grad_(frozen)
    stats = linear_top_logprobs(hidden, every.head, every.labels, temperature=every.temperature)
    is_top = (stats.logprobs == stats.top_logprobs).reshape(N, V)
    assert torch.equal(is_top.nonzero()[:, 1], _exact_logprobs(case)[apart].argmax(-1))
    assert (stats.logprobs <= stats.top_logprobs).all()


@pytest.mark.parametrize("way", TOPS)
@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_top_logprobs_are_no_worse_than_those_of_torch(dtype, features, way):
    case = oracle.random_case(65, 48, 1100, dtype, **FEATURES[features])
    head = flat_arguments(case.hidden, case.head, case.labels, case.temperature)
    top, eager = TOPS[way](head), _eager_top(case)
    assert top.dtype == eager.dtype
    oracle.assert_no_worse(top, eager, _exact_logprobs(case).amax(-1))


def _eager_top(case):
    wide = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    z = torch.nn.functional.linear(case.hidden, case.weight, case.bias).to(wide) * case.scale
    z = case.softcap * torch.tanh(z / case.softcap) if case.softcap else z
    return torch.log_softmax(z / case.temperature[:, None].to(wide), -1).amax(-1)


@pytest.mark.parametrize("way", TOPS)
def test_words_that_tie_are_all_the_most_likely_one(way):
    """Entries 3 and 257, in two blocks of the vocabulary, above 300 entries of logit 0."""
    weight = torch.zeros(300, 1)
    weight[[3, 257]] = 1.0
    tokens = (torch.tensor([3, 257, 3, 0, 299]), torch.ones(5))
    hidden = torch.tensor([[2.0], [2.0], [-2.0], [-2.0], [2.0]])
    head = ops.Head(hidden, weight, None, *tokens, 1.0, 0.0)
    logits, norms = (2, 2, 0, 0, 2), (298 + 2 * math.exp(h) for h in (2, 2, -2, -2, 2))
    right = [z - math.log(norm) for z, norm in zip(logits, norms, strict=True)]
    assert TOPS[way](head).tolist() == pytest.approx(right, rel=1e-6)
    stats = linear_top_logprobs(hidden, weight, tokens[0])
    assert (stats.logprobs == stats.top_logprobs).tolist() == [True, True, False, True, False]


def test_logits_of_zero_tie_in_every_word():
    labels = torch.arange(40)
    logprobs, entropy, top = linear_top_logprobs(torch.zeros(40, 3), torch.randn(40, 3), labels)
    assert (logprobs == top).all()
    assert top.tolist() == pytest.approx([-math.log(40)] * 40, rel=1e-6)
    assert entropy.tolist() == pytest.approx([math.log(40)] * 40, rel=1e-6)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_top_logprobs_change_neither_the_other_statistics_nor_the_gradient(dtype, frozen):
    """And have none; ignored tokens give 0, and those with a NaN give NaN."""
    case = oracle.random_case(40, 8, 130, dtype, ignored=7, **EVERYTHING)
    case.hidden[9] = torch.nan
    head = replace(case.head, weight=case.weight.requires_grad_(not frozen))
    results = []
    for function in (linear_logprobs, linear_top_logprobs):
        hidden = case.hidden.clone().requires_grad_()
        stats = function(hidden, head, case.labels, temperature=case.temperature)
        leaves = [hidden] if frozen else [hidden, case.weight]
        grads = torch.autograd.grad(stats.logprobs.sum() + (stats.entropy**2).sum(), leaves)
        results.append((stats.logprobs.detach(), stats.entropy.detach(), *grads))
    for a, b in zip(*results, strict=True):
        oracle.assert_same_bits(a, b)
    top = stats.top_logprobs
    assert not top.requires_grad and not top[:7].any()
    assert top.isnan().nonzero().tolist() == [[9]]
    assert not (stats.logprobs == top)[9]


def test_a_row_of_nothing_but_minus_infinity_has_no_most_likely_word():
    head = LMHead(torch.ones(5, 1), torch.full((5,), -torch.inf))
    logprobs, _, top = linear_top_logprobs(torch.ones(2, 1), head, torch.tensor([0, 4]))
    assert logprobs.isnan().all() and top.isnan().all()


# Properties


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    N=st.integers(1, 90),
    H=st.integers(1, 70),
    V=st.integers(1, 400),
    dtype=st.sampled_from(FLOATS),
    std=st.sampled_from([0.0, 0.1, 1.0, 10.0, 300.0]),
    features=st.sampled_from(sorted(FEATURES)),
    frozen=st.booleans(),
    data=st.data(),
)
def test_properties_of_any_case(N, H, V, dtype, std, features, frozen, data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    ignored = data.draw(st.integers(0, N))
    case = oracle.random_case(N, H, V, dtype, logit_std=std, ignored=ignored, **FEATURES[features])
    up = oracle.random_upstream(N)
    got = oracle.ours(case, *up, frozen=frozen)
    assert (got.logprobs <= 0).all()
    assert (got.entropy >= 0).all()
    assert (got.entropy <= math.log(V) + 1e-5).all()
    assert not got.logprobs[:ignored].any() and not got.dhidden[:ignored].any()
    right = oracle.exact(case, *up)
    z = case.head.logits(case.hidden.double()) / case.temperature[:, None]
    slack = 32 * torch.finfo(got.logprobs.dtype).eps * (1 + float(z.abs().max()))
    assert (got.logprobs - right.logprobs).abs().max() <= slack
    assert (got.entropy - right.entropy).abs().max() <= slack


def test_probabilities_of_all_words_add_up_to_one():
    case = oracle.random_case(3, 16, 300, torch.bfloat16, logit_std=3.0)
    entries = torch.arange(300)
    for n in range(3):
        logprobs, entropy = linear_logprobs(case.hidden[n].expand(300, 16), case.weight, entries)
        p = logprobs.double().exp()
        assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
        assert float(-(p * logprobs).sum()) == pytest.approx(float(entropy[0]), abs=1e-5)


# Chunks, threads, repetition


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 40_000, 2**20])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_frozen_results_do_not_depend_on_chunk_bytes(dtype, chunk_bytes):
    case = oracle.random_case(100, 24, 150, dtype, ignored=3, **EVERYTHING)
    up = oracle.random_upstream(100)
    whole = oracle.ours(case, *up, frozen=True)
    got = oracle.ours(case, *up, frozen=True, chunk_bytes=chunk_bytes)
    for mine, other in zip(got[:3], whole[:3], strict=True):
        assert oracle.relative_error(mine, other) <= 4 * torch.finfo(mine.dtype).eps


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("chunk_bytes", [12_000, 40_000, 512 * 150 * 4, 600 * 150 * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_pass_results_do_not_depend_on_chunk_bytes(dtype, chunk_bytes, trained):
    case = oracle.random_case(1100, 24, 150, dtype, **EVERYTHING)
    batch = oracle.policy_batch(case, (11, 100), masked=2)
    loss = grpo(beta=0.1, entropy_coef=0.01)

    def run(chunk_bytes):
        hidden = case.hidden.clone().requires_grad_()
        weight, bias = (t.clone().requires_grad_(trained) for t in (case.weight, case.bias))
        out = linear_policy_loss(
            hidden.reshape(11, 100, 24),
            LMHead(weight, bias, case.scale, case.softcap),
            batch,
            loss,
            temperature=case.temperature.reshape(11, 100),
            chunk_bytes=chunk_bytes,
        )
        out.loss.backward()
        return out.loss.detach(), hidden.grad, weight.grad, bias.grad

    for mine, other in zip(run(chunk_bytes), run(None), strict=True):
        if other is None:
            assert mine is None
            continue
        assert oracle.relative_error(mine, other) <= 8 * torch.finfo(mine.dtype).eps


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_run_to_run_and_on_any_number_of_threads(dtype, frozen, threads):
    case = oracle.random_case(150, 72, 1500, dtype, **EVERYTHING)
    up = oracle.random_upstream(150)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(oracle.ours(case, *up, frozen=frozen))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            oracle.assert_same_bits(a, b)


def test_the_one_pass_loss_has_the_same_bits_on_any_number_of_threads(threads):
    case = oracle.random_case(600, 72, 700, torch.bfloat16)
    batch, loss = oracle.policy_batch(case), grpo(beta=0.1, entropy_coef=0.01)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        out = linear_policy_loss(hidden[None], weight, batch, loss, chunk_bytes=300 * 700 * 4).loss
        out.backward()
        results.append((out.detach(), hidden.grad, weight.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            oracle.assert_same_bits(a, b)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(dtype, frozen):
    case = oracle.random_case(200, 72, 1500, dtype, **EVERYTHING)
    up = oracle.random_upstream(200)
    whole = oracle.ours(case, *up, frozen=frozen)
    for rows in ([0], [63], [137], [199], list(range(100, 117))):
        rows = torch.tensor(rows)
        part = oracle.ours(case.rows(rows), *(g[rows] for g in up), frozen=frozen)
        for mine, other in zip(part[:3], whole[:3], strict=True):
            oracle.assert_equal_rows(mine, other[rows], dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_grad_trained_frozen_and_one_pass_logprobs_have_the_same_bits(dtype):
    # What makes the ratio of an on-policy step exactly 1.
    case = oracle.random_case(90, 40, 700, dtype, **EVERYTHING)
    up = oracle.random_upstream(90)
    with torch.no_grad():
        old = linear_logprobs(case.hidden, case.head, case.labels, temperature=case.temperature)
    seen = []

    def loss(stats, batch):
        seen.append(stats)
        return grpo()(stats, batch)

    loss.token_separable = True
    linear_policy_loss(
        case.hidden.clone().requires_grad_()[None],
        case.head,
        oracle.policy_batch(case),
        loss,
        temperature=case.temperature[None],
    )
    for other in (
        oracle.ours(case, *up),
        oracle.ours(case, *up, frozen=True),
        TokenStats(*(t.detach() for t in seen[-1])),
    ):
        oracle.assert_same_bits(other.logprobs, old.logprobs)
        oracle.assert_same_bits(other.entropy, old.entropy)
    chunked = oracle.ours(case, *up, frozen=True, chunk_bytes=64 * 700 * 4)
    oracle.assert_equal_rows(chunked.logprobs, old.logprobs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("V", [5, 1100])
def test_more_tokens_than_one_pass_of_the_backward_takes(dtype, V):
    case = oracle.random_case(4200, 3, V, dtype, bias=True)
    up = oracle.random_upstream(4200)
    oracle.assert_result_no_worse(
        oracle.ours(case, *up), oracle.eager(case, *up), oracle.exact(case, *up), roundings=2
    )


def test_ignored_tokens_anywhere_leave_the_others_as_they_are():
    case = oracle.random_case(150, 24, 300, torch.bfloat16, **EVERYTHING)
    up = oracle.random_upstream(150)
    kept = (torch.rand(150) < 0.4).nonzero()[:, 0]
    labels = torch.full((150,), IGNORED)
    labels[kept] = case.labels[kept]
    got = oracle.ours(replace(case, labels=labels), *up)
    alone = oracle.ours(case.rows(kept), *(g[kept] for g in up))
    gone = labels == IGNORED
    for name in ("logprobs", "entropy", "dhidden"):
        oracle.assert_same_bits(getattr(got, name)[kept], getattr(alone, name))
        assert not getattr(got, name)[gone].any()
    oracle.assert_same_bits(got.dweight, alone.dweight)
    oracle.assert_same_bits(got.dbias, alone.dbias)


def test_float32_sums_over_a_wide_hidden_state_are_no_worse_than_eager():
    """One long float32 sum over H = 1024 had twice the error of torch's product."""
    hidden, weight = torch.randn(128, 1024) / 8, torch.randn(8192, 1024)
    labels = torch.randint(0, 8192, (128,))

    def eager(h, w):
        logp = torch.log_softmax(h @ w.T, dim=-1)
        return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def results(way, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        stats = way(*leaves)
        grads = torch.autograd.grad(stats[0].sum() + stats[1].sum(), leaves)
        return [t.detach().double() for t in (*stats, *grads)]

    exact, theirs = results(eager, torch.float64), results(eager, torch.float32)
    ours = results(lambda h, w: linear_logprobs(h, w, labels), torch.float32)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        assert (a - true).norm() <= (b - true).norm()

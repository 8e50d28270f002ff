"""What rounding alone does to log-probs: at a head against float64 by hand, and the model of it
against what heads do.
"""

import math

import pytest
import torch
from torch import nn

import fused_rl
from fused_rl.linear import rounding_differences
from fused_rl.mismatch import LogitRounding, RoundingError, mismatch_report

N, H, V = 600, 64, 1500


def head_of(scale: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden [N, H], weight [V, H] and tokens that were sampled; likely logits grow with scale."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(V, H, **options).bfloat16()
    spread = 0.5 + torch.rand(N, 1, **options)
    hidden = (torch.randn(N, H, **options) * scale * spread / math.sqrt(H)).bfloat16()
    logits = hidden.double() @ weight.double().T
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return hidden, weight, labels, logits


def by_hand(logits, labels, dtype=torch.bfloat16, temperature=1.0) -> torch.Tensor:
    def at(z):
        return (z.double() / temperature).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    return at(logits) - at(logits.to(dtype))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_errors_are_those_of_rounded_logits(dtype, temperature):
    hidden, weight, labels, logits = head_of(4.0)
    options = {"temperature": temperature, "logits_dtype": dtype, "tokens": N}
    got = rounding_differences(hidden, weight, labels, **options)
    expected = by_hand(logits, labels, dtype, temperature)
    assert got.dtype == torch.float32 and expected.abs().mean() > 1e-3 * (dtype != torch.float16)
    # A logit between two numbers of the dtype is rounded either way, as its last bits in float32.
    apart = (got - expected).abs()
    assert (apart < 1e-5).double().mean() > 0.98 and apart.max() < 2 * expected.abs().max()


def test_scale_and_softcap_come_after_the_rounding():
    """As in LMHead."""
    hidden, weight, labels, logits = head_of(4.0)
    head = fused_rl.LMHead(weight, scale=0.5, softcap=6.0)
    exact, rounded = (
        (6 * torch.tanh(0.5 * z.double() / 6)).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        for z in (logits, logits.bfloat16())
    )
    got = rounding_differences(hidden, head, labels, tokens=N)
    expected = (exact - rounded).abs().mean()
    torch.testing.assert_close(got.double().abs().mean(), expected, rtol=1e-3, atol=0)


def test_logits_that_are_not_rounded_have_no_error():
    hidden, weight, labels, _ = head_of(4.0)
    assert not rounding_differences(hidden, weight, labels, logits_dtype=torch.float32).any()


def test_float64_is_kept():
    hidden, weight, labels, logits = head_of(4.0)
    got = rounding_differences(hidden.double(), weight.double(), labels, tokens=N)
    torch.testing.assert_close(got, by_hand(logits, labels), rtol=0, atol=1e-12)


def test_some_tokens_stand_for_all_and_ignored_ones_for_none():
    hidden, weight, labels, _ = head_of(4.0)
    every = rounding_differences(hidden, weight, labels, tokens=N)
    labels[1::2] = -100
    assert torch.equal(rounding_differences(hidden, weight, labels, tokens=N), every[::2])
    some = rounding_differences(hidden, weight, labels, tokens=100)
    assert torch.equal(some, every[::2][torch.arange(100) * 3])
    assert rounding_differences(hidden, weight, torch.full_like(labels, -100)).shape == (0,)
    shaped = (hidden.reshape(2, -1, H), weight, labels.reshape(2, -1))
    assert torch.equal(rounding_differences(*shaped, tokens=100), some)


def test_it_is_a_head_with_logits_of_that_dtype_beside_one_without():
    hidden, weight, labels, _ = head_of(4.0)
    temperature = torch.linspace(0.5, 2, N)
    options = {"scale": 0.5, "softcap": 6.0}
    plain, rounded = (
        fused_rl.LMHead(weight, **options, logits_dtype=dtype) for dtype in (None, torch.bfloat16)
    )
    exact, engine = (
        fused_rl.linear_logprobs(hidden, head, labels, temperature=temperature).logprobs
        for head in (plain, rounded)
    )
    for head in (plain, rounded):
        got = rounding_differences(hidden, head, labels, temperature=temperature, tokens=N)
        assert torch.equal(got, exact - engine) and got.any()


def test_hidden_states_some_roundings_away():
    """An error of k roundings has sqrt(k) times the size, and by linearity a known one."""
    hidden, weight, labels, logits = head_of(4.0)
    given, fp32 = (hidden.double(), weight.double(), labels), {"logits_dtype": torch.float32}
    rounded = [
        rounding_differences(hidden, weight, labels, hidden_roundings=k, tokens=N, **fp32).std()
        for k in (1, 4)
    ]
    assert rounded[1] / rounded[0] == pytest.approx(2, rel=0.15)
    steps = torch.finfo(torch.bfloat16).eps * 2.0 ** given[0].abs().log2().floor() / math.sqrt(12)
    mean = logits.softmax(-1) @ given[1]
    expected = ((given[1][labels] - mean) ** 2 * steps**2).sum(-1).mean().sqrt()
    assert rounded[0].item() == pytest.approx(expected.item(), rel=0.1)


def test_the_same_every_time_and_no_gradient():
    hidden, weight, labels, _ = head_of(4.0)
    layer = nn.Linear(H, V, bias=False)
    layer.weight.data = weight.float()
    before = torch.get_rng_state()
    options = {"hidden_roundings": 2}
    first = rounding_differences(hidden.float().requires_grad_(), layer, labels, **options)
    again = rounding_differences(hidden.float(), layer, labels, **options)
    assert torch.equal(first, again) and not first.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scale", [1, 2, 3, 5, 8, 12])
def test_the_model_is_near_what_heads_do(scale):
    """Likely logits from 1 to 40: the mean error and its tail, by their magnitude alone."""
    hidden, weight, labels, logits = head_of(float(scale))
    real = RoundingError.of(rounding_differences(hidden, weight, labels, tokens=N), "a head")
    logprobs = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    magnitude = logits.gather(-1, labels[:, None]).abs().median().item()
    model = RoundingError.of(LogitRounding(magnitude).differences(logprobs), "a model")
    assert 1 / 1.6 < model.mean / real.mean < 1.6
    assert 1 / 2.5 < model.p99 / real.p99 < 2.5


def test_the_variance_of_the_model_by_hand():
    """(1 - p)^2 (1 + 1/2) ulp^2 / 12, with an ulp that is 1/8 above 16 and 1/16 below."""
    logprobs = torch.tensor([0.25], dtype=torch.float64).log().expand(200_000)
    errors = LogitRounding(16.0).differences(logprobs)
    expected = 0.75**2 * 1.5 / 12 * (0.125**2 + 0.0625**2) / 2
    assert errors.var().item() == pytest.approx(expected, rel=0.01)
    assert errors.mean().abs() < 3e-4
    # (1/2 + sqrt(1/2) / 2) ulp at most.
    assert errors.abs().max() < 0.75 * 0.125 * (0.5 + math.sqrt(0.125))
    finer = LogitRounding(16.0, torch.float16).differences(logprobs)
    torch.testing.assert_close(finer, errors / 8)


def test_certain_tokens_have_no_error_and_none_have_none():
    assert not LogitRounding().differences(torch.zeros(3)).any()
    assert LogitRounding().differences(torch.zeros(0)).shape == (0,)
    assert len(LogitRounding().differences(torch.full((3,), -1.0))) >= 4096
    nothing = RoundingError.of(torch.tensor([math.nan]), "x")
    assert math.isnan(nothing.mean) and math.isnan(nothing.max)


def test_quantiles_by_hand():
    errors = torch.arange(-100, 0.0)
    assert RoundingError.of(errors, "x") == (50.5, 99.0, 100.0, "x")


def test_a_bf16_head_is_explained_by_its_own_rounding():
    """Both roads to the report: by the head, and by the magnitude of its logits."""
    hidden, weight, labels, logits = head_of(5.0)
    theirs = by_hand(logits, labels)
    ours = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    errors = rounding_differences(hidden, weight, labels)
    report = mismatch_report(ours, ours - theirs, rounding=errors)
    assert report.times_rounding == pytest.approx(1, rel=0.15)
    assert report.verdict == "explained by rounding"
    assert "simulated at 512 tokens" in str(report)


MISTAKES = {
    "a label": ({"labels": torch.tensor([V])}, r"labels must be in \[0, 1500\)"),
    "tokens": ({"tokens": 0}, "tokens must be at least 1"),
    "roundings": ({"hidden_roundings": -1}, "hidden_roundings must be at least 0"),
    "a dtype": (
        {"logits_dtype": torch.int64},
        "logits_dtype must be torch.bfloat16, torch.float16",
    ),
    "shapes": ({"labels": torch.tensor([0, 1])}, "hidden"),
    "temperature": ({"temperature": 0.0}, "temperature"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    options, message = MISTAKES[mistake]
    given = {"hidden": torch.ones(1, H), "head": torch.ones(V, H), "labels": torch.tensor([0])}
    with pytest.raises(ValueError, match=message):
        rounding_differences(**{**given, **options})

"""What the C++ kernels keep of a chunk in the place of fp32 logits: exponentials in 16 bits."""

import chunk_cases as cases
import pytest
import torch

import fused_rl
from fused_rl import ops
from fused_rl.ops import Given, Upstream

pytestmark = pytest.mark.skipif(
    "bfloat16" not in ops.native.cpu_features(), reason="this CPU has no bfloat16 products"
)
KEPT, LOGITS = cases.CPP_EXPONENTIALS, cases.CPP


def formed(head, dlogprobs, way=KEPT):
    return cases.formed(way, head, Upstream(dlogprobs, torch.zeros_like(dlogprobs)), partial=True)


def right(head, dlogprobs):
    up = Upstream(dlogprobs, torch.zeros_like(dlogprobs))
    return cases.exact(head, cases.draw_of(head, up))


def with_all_but_softcap(N, H, V):
    return cases.random_head(N, H, V, transform=True)._replace(softcap=0.0)


def test_they_stand_for_logits_where_the_logprob_is_all_that_is_asked():
    head = cases.random_head(40, 16, 70)

    def dtype(head, given):
        return ops.linear_logprobs_chunk(head, Given(given)).z.dtype

    assert dtype(head, False) == torch.int16
    assert dtype(head, True) == torch.float32
    assert dtype(head._replace(softcap=5.0), False) == torch.float32
    assert dtype(cases.random_head(40, 16, 70, torch.float32), False) == torch.float32


@pytest.mark.parametrize(
    ("loss", "entropy"),
    [
        (fused_rl.grpo(), False),
        (fused_rl.grpo(entropy_coef=0.1), True),
        # A function that does not say what it depends on.
        (lambda stats, batch: fused_rl.grpo()(stats, batch), True),
    ],
)
def test_the_loss_says_whether_it_depends_on_the_entropy(loss, entropy, monkeypatch):
    found = []
    chunk = ops.linear_logprobs_chunk
    monkeypatch.setattr(
        ops, "linear_logprobs_chunk", lambda head, given: found.append(given) or chunk(head, given)
    )
    if not hasattr(loss, "token_separable"):
        loss.token_separable = True
    hidden = torch.randn(2, 5, 8).bfloat16().requires_grad_()
    weight = torch.randn(30, 8).bfloat16().requires_grad_()
    labels = torch.randint(0, 30, (2, 5))
    batch = fused_rl.TokenBatch.padded(labels, torch.ones(2, 5).bool(), torch.randn(2))
    fused_rl.linear_policy_loss(hidden, weight, batch, loss).loss.backward()
    assert found == [Given(entropy)]


@pytest.mark.parametrize(
    ("N", "H", "V"), [(3, 2, 40), (33, 33, 1025), (200, 96, 5001), (31, 3000, 700)]
)
@pytest.mark.parametrize("transform", [False, True])
def test_gradients_are_as_near_as_those_of_logits(N, H, V, transform):
    """One rounding more, of at most 2**-10 of an entry: a quarter of an operand's."""
    head = with_all_but_softcap(N, H, V) if transform else cases.random_head(N, H, V)
    dlogprobs = torch.randn(N)
    exact = right(head, dlogprobs)
    for kept, logits, of in zip(
        formed(head, dlogprobs), formed(head, dlogprobs, LOGITS), exact, strict=True
    ):
        assert cases.relative(kept, of) < max(2**-11, 1.1 * cases.relative(logits, of))


def test_the_statistics_are_those_beside_logits_bit_by_bit():
    head = with_all_but_softcap(130, 40, 3001)
    kept, logits = (way.forward(head, way.given) for way in (KEPT, LOGITS))
    for name in ("logprobs", "entropy", "lse", "top"):
        assert torch.equal(getattr(kept, name), getattr(logits, name)), name


def test_a_gradient_of_the_entropy_forms_the_logits_again():
    head = with_all_but_softcap(70, 24, 900)
    up = cases.random_upstream(head)
    kept, again = cases.formed(KEPT, head, up), cases.formed(LOGITS, head, up)
    for a, b in zip(kept, again, strict=True):
        assert cases.relative(a, b.double()) < 4e-3


@pytest.mark.parametrize("silent", [1, 20, 60, 99])
def test_tokens_without_a_gradient_are_left_out(silent):
    """Few of them where they are, many by a way around them: even one that is not a number."""
    head, dlogprobs = cases.random_head(100, 32, 1500), torch.randn(100)
    quiet = torch.randperm(100)[:silent]
    dlogprobs[quiet] = 0
    whole = formed(head, dlogprobs)
    for a, b in zip(whole, right(head, dlogprobs), strict=True):
        assert cases.relative(a, b) < 4e-3
    assert (whole.dhidden[quiet] == 0).all()
    head.hidden[quiet[0]] = torch.nan
    for a, b in zip(formed(head, dlogprobs), whole, strict=True):
        assert torch.equal(a, b)


def test_a_token_that_is_not_a_number_keeps_to_itself():
    head, dlogprobs = cases.random_head(70, 32, 1500), torch.randn(70)
    whole = formed(head, dlogprobs)
    head.hidden[5, 3] = torch.inf
    found = formed(head, dlogprobs)
    others = torch.arange(70) != 5
    assert found.dhidden[5].isnan().all()
    assert torch.equal(found.dhidden[others], whole.dhidden[others])


@pytest.mark.parametrize("downwards", [False, True])
@pytest.mark.parametrize("size", [60.0, 1e4, 1e6])
def test_blocks_of_very_different_logits(downwards, size):
    """Each counts from its own largest logit."""
    bias = torch.linspace(-size, size, 4000)
    head = cases.random_head(40, 64, 4000)._replace(bias=bias.flip(0) if downwards else bias)
    head.labels[:] = torch.arange(40) if downwards else 3999 - torch.arange(40)
    dlogprobs = torch.randn(40)
    kept, logits = formed(head, dlogprobs), formed(head, dlogprobs, LOGITS)
    exact = right(head, dlogprobs)
    for a, b, c in zip(kept, logits, exact, strict=True):
        assert cases.relative(a, c) < max(2**-10, 1.2 * cases.relative(b, c))


def test_entries_that_cannot_be_have_no_gradient():
    bias = torch.zeros(1500)
    bias[200:900] = -torch.inf
    head = cases.random_head(40, 64, 1500)._replace(bias=bias)
    head.labels[:] = torch.arange(40)
    found = formed(head, torch.randn(40))
    assert all(t.isfinite().all() for t in found)
    assert (found.dweight[200:900] == 0).all() and (found.dbias[200:900] == 0).all()


def test_a_label_of_great_certainty_keeps_its_small_gradient():
    """1 - p is 1e-2 to 1e-5; the rounding of p to bfloat16 is 4e-3."""
    head = cases.random_head(40, 64, 3000)
    bias = torch.zeros(3000)
    bias[7] = 14.0
    head = head._replace(bias=bias, labels=torch.full((40,), 7))
    dlogprobs = torch.ones(40)
    found, exact = formed(head, dlogprobs).dhidden, right(head, dlogprobs).dhidden
    assert ((found - exact).norm(dim=-1) < 1e-2 * exact.norm(dim=-1)).all()


def test_the_same_bits_on_any_number_of_threads():
    head, dlogprobs = cases.random_head(300, 96, 5000), torch.randn(300)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 8):
            torch.set_num_threads(threads)
            found.append(formed(head, dlogprobs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_token_alone_is_as_in_the_batch():
    head, dlogprobs = cases.random_head(200, 96, 3000), torch.randn(200)
    whole = formed(head, dlogprobs).dhidden
    for n in (0, 63, 64, 199):
        assert torch.equal(
            formed(head.at(slice(n, n + 1)), dlogprobs[n : n + 1]).dhidden[0], whole[n]
        )

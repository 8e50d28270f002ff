"""Heads and hidden states of float32 and bfloat16 on a CUDA device: products by parts."""

import pytest
import torch

from fused_rl import TokenBatch, grpo, linear_logprobs, linear_policy_loss, trust_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, FP32 = torch.bfloat16, torch.float32
MIXED = pytest.mark.parametrize(
    ("of_hidden", "of_weight"), [(BF16, FP32), (FP32, BF16)], ids=["fp32 head", "bf16 head"]
)
SIZES = pytest.mark.parametrize(
    ("N", "H", "V"), [(1, 65, 1003), (129, 65, 1003), (770, 511, 5003), (4111, 64, 4099)]
)


@pytest.fixture(autouse=True, params=["highest", "high"])
def precision(request):
    """What torch may do to products of float32 is nothing to those by parts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    trust_kernels(unproven=True)
    yield request.param
    trust_kernels()
    torch.set_float32_matmul_precision(before)


def in_full(function):
    """function(), its products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return function()
    finally:
        torch.set_float32_matmul_precision(before)


def build(of_hidden, of_weight, N, H, V):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H).to(of_hidden), (2 * torch.randn(V, H) / H**0.5).to(of_weight)
    labels = torch.randint(0, V, (N,)).where(torch.arange(N) % 5 != 1, -100)
    return hidden.cuda(), weight.cuda(), labels.cuda()


def error(found, exact) -> float:
    return (found.double() - exact).norm().item()


def results(hidden, weight, labels, trained=True):
    """Log-probs, entropies, and the gradients of both together; of a frozen head, of the first."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)]
    stats = linear_logprobs(*leaves, labels)
    slopes = torch.linspace(-1, 1, len(labels), device="cuda")
    objective = ((stats.logprobs + trained * stats.entropy / 2) * slopes).sum()
    return *stats, *torch.autograd.grad(objective, [t for t in leaves if t.requires_grad])


@SIZES
@pytest.mark.parametrize("add", [False, True])
def test_a_product_errs_no_more_than_that_of_float32(N, H, V, add):
    """Or than the tensor cores' own accumulators do, on one bfloat16 product of that size."""
    from fused_rl.kernels import split

    hidden, weight, _ = build(BF16, FP32, N, H, V)
    draw = torch.randn(N, V, device="cuda")
    for a, b in ((hidden, weight.T), (draw.T, hidden)):
        total = torch.randn(len(a), b.shape[1], device="cuda")
        before = total.double() if add else 0.0
        exact = before + a.double() @ b.double()
        usual = in_full(lambda a=a, b=b, c=total: torch.addmm(c, a.float(), b.float(), beta=add))
        # Where rows are aligned other kernels serve, whose accumulators err more.
        halves = split.parts(a.float(), 1)[0], split.parts(b.float(), 1)[0]
        alone = torch.mm(*halves, out_dtype=FP32)
        of_cores = error(alone, halves[0].double() @ halves[1].double())
        split.product(a, b, total, add)
        # A product of one term has nothing to round but the sum, three times in place of once.
        times = 3**0.5 if add and len(b) == 1 else 1.1
        assert error(total, exact) <= times * max(error(usual, exact), of_cores)


@SIZES
def test_a_product_that_is_rounded_errs_no_more_than_that_of_float32(N, H, V):
    from fused_rl.kernels import split

    draw = torch.randn(N, V, device="cuda")
    weight = torch.randn(V, H, device="cuda")
    exact = draw.double() @ weight.double()
    usual = in_full(lambda: draw @ weight)
    total = torch.full((N, H), torch.nan, device="cuda")
    split.product(draw, weight, total, False)
    assert error(total.to(BF16), exact) <= 1.1 * error(usual.to(BF16), exact)


@MIXED
@SIZES
@pytest.mark.parametrize("trained", [True, False])
def test_values_and_gradients(of_hidden, of_weight, N, H, V, trained):
    """Those of the narrow operand are rounded to bfloat16, those of the wide one are float32.

    With a frozen head dhidden waits in bfloat16 for the gradient of the loss: two roundings.
    """
    hidden, weight, labels = build(of_hidden, of_weight, N, H, V)
    exact = results(hidden.double(), weight.double(), labels, trained)
    ours = results(hidden, weight, labels, trained)
    usual = in_full(lambda: results(hidden.float(), weight.float(), labels, trained))
    for a, true in zip(ours[:2], exact[:2], strict=True):
        torch.testing.assert_close(a.double(), true, atol=2e-5, rtol=2e-6)
    for a, b, true in zip(ours[2:], usual[2:], exact[2:], strict=True):
        if a.dtype == BF16:
            roundings = 1 if trained else 2
            assert error(a, true) <= 1.1 * roundings * error(b.to(BF16), true)
        else:
            assert error(a, true) <= 1e-5 * true.norm()


@MIXED
@pytest.mark.parametrize("chunk_bytes", [None, 64 * 1003 * 4])
def test_the_one_pass_loss(of_hidden, of_weight, chunk_bytes):
    hidden, weight, labels = build(of_hidden, of_weight, 256, 65, 1003)

    def run(hidden, weight):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        shape = (16, 16)
        mask = (labels != -100).reshape(shape)
        advantages = torch.linspace(-1, 1, 16, device="cuda")
        batch = TokenBatch.padded(labels.reshape(shape), mask, advantages)
        shaped = leaves[0].reshape(*shape, -1)
        options = {"chunk_bytes": chunk_bytes}
        loss = linear_policy_loss(shaped, leaves[1], batch, grpo(entropy_coef=0.01), **options).loss
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    exact = run(hidden.double(), weight.double())
    ours = run(hidden, weight)
    usual = in_full(lambda: run(hidden.float(), weight.float()))
    torch.testing.assert_close(ours[0].double(), exact[0], atol=2e-5, rtol=2e-6)
    for a, b, true in zip(ours[1:], usual[1:], exact[1:], strict=True):
        if a.dtype == BF16:
            assert error(a, true) <= 1.1 * error(b.to(BF16), true)
        else:
            assert error(a, true) <= 1e-5 * true.norm()


@MIXED
def test_tf32_has_no_part_in_it(of_hidden, of_weight):
    case = build(of_hidden, of_weight, 129, 65, 1003)
    for a, b in zip(results(*case), in_full(lambda: results(*case)), strict=True):
        assert torch.equal(a, b)


def test_no_second_head_is_made():
    hidden, weight, labels = build(BF16, FP32, 512, 1024, 100003)
    with torch.no_grad():
        linear_logprobs(hidden[:64], weight, labels[:64])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_logprobs(hidden, weight, labels)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < weight.numel() * weight.element_size() / 2

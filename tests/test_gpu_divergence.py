"""Divergences of two heads on a CUDA device; skipped where there is none."""

import pytest
import torch

import fused_rl
from fused_rl import Divergence, LMHead, linear_divergence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = pytest.mark.parametrize("dtype", BUDGET, ids=str)
DIVERGENCES = {
    "reverse": Divergence.REVERSE,
    "forward": Divergence.FORWARD,
    "jsd": Divergence.JSD(0.3),
    "chi-square": Divergence.CHI_SQUARE,
    "hellinger": Divergence.HELLINGER,
    "total variation": Divergence.TOTAL_VARIATION,
}


@pytest.fixture(autouse=True)
def in_full():
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    fused_rl.trust_kernels()
    yield
    assert [v for v in fused_rl.ops.trust.verdicts() if v.error] == []
    torch.set_float32_matmul_precision(before)


def build(dtype, N=150, V=5003, teacher_dtype=None, transform=True):
    """Both sides' leaves, in order, and labels; hidden sizes of 72 and 96."""
    torch.manual_seed(0)
    leaves = []
    for H, of in ((72, dtype), (96, teacher_dtype or dtype)):
        leaves += [(torch.randn(N, H) / H**0.5).to(of), torch.randn(V, H).to(of)]
        leaves += [torch.randn(V) if transform else None]
    labels = torch.randint(0, V, (N,)).where(torch.rand(N) < 0.8, -100)
    return [None if t is None else t.cuda() for t in leaves], labels.cuda()


def run(leaves, labels, divergence, only=None, chunk_bytes=None):
    """All statistics, and gradients of a sum of them with respect to the leaves `only`."""
    leaves = [None if t is None else t.detach() for t in leaves]
    wanted = [i for i, t in enumerate(leaves) if t is not None and (only is None or i in only)]
    for i in wanted:
        leaves[i].requires_grad_()
    heads = [LMHead(leaves[i], leaves[i + 1], scale=0.7, softcap=8.0) for i in (1, 4)]
    ones = torch.linspace(0.7, 1.3, len(labels), device=labels.device, dtype=torch.float64)
    temperature = ones.to(torch.promote_types(leaves[0].dtype, torch.float32))
    stats = linear_divergence(
        *(leaves[0], heads[0], leaves[3], heads[1], labels),
        divergence=divergence,
        temperature=temperature,
        chunk_bytes=chunk_bytes,
    )
    slopes = torch.linspace(-1, 1, len(labels), device=labels.device).to(stats.divergence.dtype)
    objective = sum((x * slopes).sum() / (i + 1) for i, x in enumerate(stats))
    grads = torch.autograd.grad(objective, [leaves[i] for i in wanted])
    return [t.detach() for t in stats], grads


def exact_of(leaves, *args, **options):
    """The same in float64, in plain torch."""
    return run([None if t is None else t.double() for t in leaves], *args, **options)


def agree(found, exact, budgets):
    for a, b in zip(found[0], exact[0], strict=True):
        torch.testing.assert_close(a.double(), b, atol=3e-5, rtol=2e-5)
    for a, b, budget in zip(found[1], exact[1], budgets, strict=True):
        assert (a.double() - b).norm() <= budget * b.norm()


@DTYPES
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_of_both_sides(name, dtype):
    given, divergence = build(dtype), DIVERGENCES[name]
    agree(run(*given, divergence), exact_of(*given, divergence), [BUDGET[dtype]] * 6)


def test_sides_of_two_dtypes_and_no_bias():
    given = build(torch.bfloat16, teacher_dtype=torch.float32, transform=False)
    divergence = Divergence.JSD(0.3)
    budgets = [BUDGET[torch.bfloat16]] * 2 + [BUDGET[torch.float32]] * 2
    agree(run(*given, divergence), exact_of(*given, divergence), budgets)


@DTYPES
def test_a_frozen_head_and_small_chunks(dtype):
    """The gradient is formed with the values; those of log-probs and entropies once more."""
    given, options = build(dtype), {"only": (0,), "chunk_bytes": 128 * 5056 * 10}
    exact = exact_of(*given, Divergence.REVERSE, only=(0,))
    agree(run(*given, Divergence.REVERSE, **options), exact, [2 * BUDGET[dtype]])


def test_near_distributions_keep_their_digits():
    """A KL of about 1e-6, from bfloat16."""
    leaves, labels = build(torch.bfloat16)
    hidden = leaves[0].float()
    near = hidden + 2e-3 * torch.randn_like(hidden) / 72**0.5
    teacher = [near, leaves[1].float(), leaves[2]]
    for divergence in (Divergence.REVERSE, Divergence.FORWARD, Divergence.JSD(0.5)):
        given = ([*leaves[:3], *teacher], labels, divergence)
        found, exact = run(*given)[0][0], exact_of(*given)[0][0]
        assert 0 < exact.mean() < 1e-5
        torch.testing.assert_close(found.double(), exact, atol=0.0, rtol=1e-3)


def test_neither_sides_logits_are_all_there():
    """Without gradients: both sides' logits of a chunk, and vectors."""
    N, V, H = 4096, 32768, 64
    hidden = torch.randn(2, N, H, device="cuda").bfloat16()
    weight = torch.randn(2, V, H, device="cuda").bfloat16()
    bound = 2**27
    linear_divergence(hidden[0], weight[0], hidden[1], weight[1], chunk_bytes=bound)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_divergence(hidden[0], weight[0], hidden[1], weight[1], chunk_bytes=bound)
    assert torch.cuda.max_memory_allocated() - before < bound + 2**24


def test_the_same_bits_every_time():
    given = build(torch.bfloat16)
    first, again = (run(*given, Divergence.JSD(0.3)) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        assert torch.equal(a, b)


def test_a_step_in_a_cuda_graph():
    leaves, labels = build(torch.bfloat16)
    run(leaves, labels, Divergence.REVERSE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run(leaves, labels, Divergence.REVERSE)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(leaves, labels, Divergence.REVERSE)
    graph.replay()
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-2)

"""Products of float32 and bfloat16 operands by parts, in the interpreter, against float64.

test_kernels.py runs this file in a process of its own, as it does interpreted_kernels.py. The
vendor's products of bfloat16 become products of the same numbers in float32.
"""

import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from fused_rl.kernels import configs, linear_gradients, linear_logprobs, logprobs, split
from fused_rl.ops import ChunkLogits, Given, Head, Known, Limits, Sums, Upstream, linear, trust
from fused_rl.ops import triton as on_cuda
from fused_rl.ops import triton_chunk as on_cuda_chunk
from fused_rl.ops.record import Needs

DEVICE = configs.Device(multiprocessors=2, major=0, interpreted=True)
BF16, FP32 = torch.bfloat16, torch.float32
MIXED = [(BF16, FP32), (FP32, BF16)]


def in_float32(to, a, b, add):
    """What split.multiply is on a device."""
    assert a.dtype == b.dtype == BF16 and to.dtype == FP32
    result = a.float() @ b.float()
    to.copy_(to + result if add else result)


@pytest.fixture(autouse=True)
def small_and_on_cpu(monkeypatch):
    """Several blocks at small sizes; products that a CPU has."""
    monkeypatch.setattr(split, "multiply", in_float32)
    monkeypatch.setattr(split, "TILE", (128, 128))
    monkeypatch.setattr(linear_logprobs, "TILE_LOGITS", 24 * 270)
    monkeypatch.setattr(linear_logprobs, "TILE_ROWS", 24)
    monkeypatch.setattr(logprobs, "BLOCK_V", 64)
    torch.manual_seed(0)
    trust.trust_kernels(unproven=True)
    yield
    trust.trust_kernels()


# Splitting


def of_all_sizes(*shape):
    return torch.randn(shape) * torch.exp2(torch.randint(-100, 120, shape).float())


@pytest.mark.parametrize("layout", ["rows", "columns", "a slice"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 265), (1, 200), (265, 1), (7, 8)])
def test_three_parts_add_up_to_the_number(shape, layout):
    x = of_all_sizes(*shape)
    if layout == "columns":
        x = x.T.contiguous().T
    elif layout == "a slice":
        x = torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : shape[1]]
    found = split.parts(x, 3)
    assert found.shape == (3, *shape) and found.dtype == BF16
    assert torch.equal(found.double().sum(0), x.double())
    assert torch.equal(found[0], x.to(BF16))


def test_what_two_parts_leave_out_is_a_part_in_2_to_the_17():
    x = torch.cat([of_all_sizes(2048), 1 + torch.rand(2048)])
    first, second = split.parts(x[None], 2)[:, 0].double()
    assert ((x - first).abs() <= 2**-8 * x.abs()).all()
    left = (x - first - second).abs() / x.abs().double()
    assert 2**-18 < left.max() <= 2**-17


def test_the_ends_of_float32():
    """The largest would round to infinity; what is infinite has no other parts; NaN stays one."""
    largest = torch.finfo(FP32).max
    between = torch.tensor(0x7F7F8000, dtype=torch.int32).view(FP32).item()
    x = torch.tensor([[largest, -largest, between, 0.0, -0.0, 2.0**-110, -(2.0**-126)]])
    assert torch.equal(split.parts(x, 3).double().sum(0), x.double())
    found = split.parts(torch.tensor([[torch.inf, -torch.inf, torch.nan]]), 3)
    assert found[0, 0, :2].tolist() == [torch.inf, -torch.inf]
    assert (found[1:, 0, :2] == 0).all()
    assert found[:, 0, 2].isnan().all()
    # A NaN whose upper half is that of infinity.
    signalling = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(FP32)
    assert split.parts(signalling[None], 3).sum(0).isnan().all()


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("bound", [{"PARTS_BYTES": 1}, {"RESULTS": 300 * 5}, {}])
def test_blocks_cover_everything_once_and_keep_to_their_bounds(length, bound, monkeypatch):
    for name, value in bound.items():
        monkeypatch.setattr(split, name, value)
    found = list(split._blocks(length, 6, 5))
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(length))
    size = {"PARTS_BYTES": 64, "RESULTS": 256}.get(next(iter(bound), None), length)
    assert len(found) == -(-length // size)


# Products


def errors(ours, usual, exact):
    """Largest and root mean square error of ours as multiples of those of the usual way."""
    both = [(x.double() - exact).abs() for x in (ours, usual)]
    return [(a / b).item() for a, b in zip(*([e.max(), e.norm()] for e in both), strict=True)]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("wide", ["left", "right"])
@pytest.mark.parametrize("size", [(70, 33, 301), (301, 32, 70), (1, 1, 1)])
def test_a_float32_and_a_bfloat16_operand(size, wide, add, monkeypatch):
    monkeypatch.setattr(split, "RESULTS", 1)
    M, K, N = size
    a, b = torch.randn(M, K), torch.randn(N, K).T
    a, b = (a, b.to(BF16)) if wide == "left" else (a.to(BF16), b)
    total = torch.randn(M, N) if add else torch.full((M, N), torch.nan)
    before = total.double() if add else 0.0
    exact = before + a.double() @ b.double()
    usual = (total if add else 0.0) + a.float() @ b.float()
    split.product(a, b, total, add)
    # A rounding of three additions in place of one.
    torch.testing.assert_close(total.double(), exact, atol=2e-6, rtol=5e-7)
    if K > 1:
        assert max(errors(total, usual, exact)) < 1.5


@pytest.mark.parametrize("alike", [0.0, 0.99])
def test_two_float32_operands_of_a_bfloat16_result(alike, monkeypatch):
    """No worse once rounded, also where the rows of the head are alike and their sum cancels."""
    monkeypatch.setattr(split, "PARTS_BYTES", 1)
    N, V, H = 33, 531, 40
    p = torch.softmax(torch.randn(N, V) * 3, -1)
    draw = torch.nn.functional.one_hot(torch.randint(0, V, (N,)), V) - p
    weight = alike * torch.randn(H) + (1 - alike) * torch.randn(V, H)
    exact = draw.double() @ weight.double()
    total = torch.zeros(N, H)
    split.product(draw, weight, total, True)
    assert (total - exact).abs().max() <= 2**-15 * (draw.abs() @ weight.abs()).max()
    ours, usual = total.to(BF16), (draw @ weight).to(BF16)
    assert max(errors(ours, usual, exact)) < 1.1
    ours = torch.full((N, H), torch.nan)
    split.product(draw, weight, ours, False)
    torch.testing.assert_close(ours, total)


def test_what_is_formed_of_parts():
    def takes(a, b, final=FP32):
        return split.takes(torch.empty(0, dtype=a), torch.empty(0, dtype=b), final)

    assert takes(BF16, FP32) and takes(FP32, BF16) and takes(FP32, FP32, BF16)
    assert not takes(FP32, FP32) and not takes(BF16, BF16) and not takes(BF16, BF16, BF16)
    half = torch.float16
    assert not takes(half, half, half) and not takes(FP32, FP32, half)


# The operators


def case(of_hidden, of_weight, N=37, H=19, V=303):
    """A head, and its upstream gradients; some tokens ignored, some without a gradient."""
    labels = torch.randint(0, V, (N,))
    labels[1::4] = -100
    up = Upstream(torch.randn(N), torch.randn(N))
    for g in up:
        g[2::5] = 0
    operands = (torch.randn(N, H).to(of_hidden), torch.randn(V, H).to(of_weight), torch.randn(V))
    return Head(*operands, labels, torch.rand(N) + 0.5, 0.7, 5.0), up


def in_two_passes(head, up, chunk_bytes):
    limits = Limits(-100, chunk_bytes)
    stats = on_cuda.linear_logprobs(head, limits, DEVICE)
    known = Known(stats.lse, stats.entropy)
    needs = Needs(True, True, True)
    return *stats, *on_cuda.linear_logprobs_backward(up, head, limits, known, needs, DEVICE)


def in_one_pass(head, up, accumulate, partial=False):
    """Of tokens that all count; dweight waits in float32 where it is added to."""
    *stats, z = on_cuda_chunk.linear_logprobs_chunk(head, Given(True), DEVICE)
    of_sum = FP32 if accumulate else head.weight.dtype
    dweight = torch.full(head.weight.shape, 0.0 if accumulate else torch.nan, dtype=of_sum)
    dbias = torch.full(head.bias.shape, 0.0 if accumulate else torch.nan)
    dhidden = on_cuda_chunk.linear_logprobs_chunk_backward(
        *(ChunkLogits(z), up, head, Known(stats[2], stats[1])),
        *(Sums(dweight, dbias, accumulate, partial), DEVICE),
    )
    return *stats, dhidden, dweight.to(head.weight.dtype), dbias


def in_dtype(dtype, head, up):
    """The same by the plain operators: products in float32 or float64 as torch has them."""
    hidden, weight, bias, labels, temperature, *rest = head
    wide = Head(hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels, temperature, *rest)
    limits = Limits(-100, 2**20)
    stats = linear.linear_logprobs.plain(wide, limits)
    known, needs = Known(stats.lse, stats.entropy), Needs(True, True, True)
    up = Upstream(*(g.to(dtype) for g in up))
    grads = linear.linear_logprobs_backward.plain(up, wide, limits, known, needs)
    return *stats, *grads


NAMES = ("logprobs", "entropy", "lse", "top", "dhidden", "dweight", "dbias")
ROUNDED = {"dhidden": 0, "dweight": 1}


@pytest.mark.parametrize(("of_hidden", "of_weight"), MIXED, ids=["fp32 head", "bf16 head"])
@pytest.mark.parametrize(
    "way",
    [
        lambda head, up: in_two_passes(head, up, 2**20),
        lambda head, up: in_two_passes(head, up, 1),
        lambda head, up: in_one_pass(head, up, False),
        lambda head, up: in_one_pass(head, up, True),
    ],
    ids=["two passes", "two passes in chunks", "one pass", "one pass, added"],
)
def test_an_operator_is_no_worse_than_by_float32_products(way, of_hidden, of_weight, monkeypatch):
    """Each value and gradient against float64, beside the same operator of float32 operands."""
    head, up = case(of_hidden, of_weight)
    head = head._replace(labels=head.labels.clamp(min=0))
    exact = in_dtype(torch.float64, head, up)
    ours = way(head, up)
    wide = head._replace(hidden=head.hidden.float(), weight=head.weight.float())

    def plain(a, b, out=None, final=None):
        result = a @ b
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(linear_gradients, "product", plain)
    monkeypatch.setattr(linear_logprobs, "product", plain)
    usual = way(wide, up)
    dtypes = {"dhidden": of_hidden, "dweight": of_weight}
    for name, a, b, true in zip(NAMES, ours, usual, exact, strict=True):
        assert a.dtype == (torch.float64 if name == "lse" else dtypes.get(name, FP32))
        worst = errors(a, b.to(a.dtype), true)
        assert worst[1] <= 1.1, f"{name}: {worst[1]:.2f} x the error of float32 products"


@pytest.mark.parametrize(("of_hidden", "of_weight"), MIXED, ids=["fp32 head", "bf16 head"])
def test_a_summand_is_rounded_nowhere(of_hidden, of_weight):
    """Of a dhidden in bfloat16 the smallest parts may be left out, of its float32 summands not."""
    head, up = case(of_hidden, of_weight)
    head = head._replace(labels=head.labels.clamp(min=0))
    found = in_one_pass(head, up, True, partial=True)[4]
    right = in_dtype(torch.float64, head, up)[4]
    assert found.dtype == FP32
    assert (found.double() - right).norm() < 6e-7 * right.norm()


def test_no_operand_is_converted_whole(monkeypatch):
    """The head is split by blocks: nothing of its size is made."""
    monkeypatch.setattr(split, "PARTS_BYTES", 6 * 19 * 256)
    trust.trust_kernels(unproven=True, first_use_check=False)
    seen = SimpleNamespace(largest=0)
    made = split.parts

    def parts(x, count):
        seen.largest = max(seen.largest, *x.shape)
        return made(x, count)

    monkeypatch.setattr(split, "parts", parts)
    head, up = case(BF16, FP32)
    head = head._replace(labels=head.labels.clamp(min=0))
    in_one_pass(head, up, True)
    assert seen.largest == 256 < len(head.weight)


@pytest.mark.parametrize(("of_hidden", "of_weight"), MIXED, ids=["fp32 head", "bf16 head"])
def test_ignored_tokens_and_those_without_a_gradient(of_hidden, of_weight):
    head, up = case(of_hidden, of_weight)
    live = (head.labels != -100) & (up.dlogprobs != 0)
    head.hidden[1] = torch.nan
    found = in_two_passes(head, up, 2**20)
    assert all(t[1] == 0 for t in found[:4])
    assert (found[4][~live] == 0).all() and all(g.isfinite().all() for g in found[4:])
    kept = in_two_passes(head.at(live), Upstream(*(g[live] for g in up)), 2**20)
    for a, b in zip(found, kept, strict=True):
        torch.testing.assert_close(a[live] if len(a) == 37 else a, b)


def test_float16_beside_another_dtype_meets_it_in_float32(monkeypatch):
    def parts(*_):
        raise AssertionError("split")

    monkeypatch.setattr(split, "parts", parts)
    for of_hidden, of_weight in ((torch.float16, FP32), (BF16, torch.float16)):
        head, up = case(of_hidden, of_weight)
        exact = in_dtype(torch.float64, head, up)
        for a, true in zip(in_two_passes(head, up, 2**20), exact, strict=True):
            budget = {FP32: 2e-6, torch.float64: 2e-6, torch.float16: 1e-3, BF16: 8e-3}[a.dtype]
            assert (a.double() - true).norm() <= budget * true.norm()


def test_they_stay_off_until_they_are_asked_for_or_proven(monkeypatch):
    head, _ = case(BF16, FP32)
    trust.trust_kernels()
    assert not on_cuda.by_parts(head.hidden, head.weight)
    assert on_cuda.operands(head).hidden.dtype == FP32
    monkeypatch.setattr(split, "PROOF", "a result")
    assert on_cuda.by_parts(head.hidden, head.weight)
    assert on_cuda.operands(head).hidden.dtype == BF16


@pytest.mark.parametrize("way", ["in two passes", "in one pass"])
def test_a_device_where_they_are_wrong_multiplies_in_float32(way, monkeypatch):
    """The second parts are left out there."""

    def wrong(to, a, b, add):
        in_float32(to, torch.zeros_like(a) if add else a, b, add)

    monkeypatch.setattr(split, "multiply", wrong)
    head, up = case(BF16, FP32)
    head = head._replace(labels=head.labels.clamp(min=0))
    exact = in_dtype(torch.float64, head, up)
    with pytest.warns(RuntimeWarning, match="by parts is not used"):
        found = in_two_passes(head, up, 2**20) if "two" in way else in_one_pass(head, up, False)
    for a, true in zip(found[:4], exact[:4], strict=True):
        torch.testing.assert_close(a.double(), true, atol=2e-5, rtol=2e-6)
    assert [v.error for v in trust.verdicts()] != [None]


@pytest.mark.parametrize("N", [0, 1])
def test_no_token_and_one(N):
    head, up = case(BF16, FP32, N=N)
    exact = in_dtype(torch.float64, head, up)
    for a, true in zip(in_two_passes(head, up, 2**20), exact, strict=True):
        torch.testing.assert_close(
            a.double(), true, atol=3e-6, rtol=8e-3 if a.dtype == BF16 else 2e-6
        )


def test_an_infinite_weight_poisons_as_it_does_in_float32():
    head, up = case(BF16, FP32)
    head.weight[7] = -torch.inf
    head.hidden[0] = head.hidden[0].abs()
    stats = on_cuda.linear_logprobs(head._replace(softcap=0.0), Limits(-100, 2**20), DEVICE)
    exact = in_dtype(FP32, head._replace(softcap=0.0), up)
    assert stats.logprobs[0].isfinite()
    torch.testing.assert_close(stats.logprobs, exact[0], equal_nan=True, atol=2e-5, rtol=2e-6)

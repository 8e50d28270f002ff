"""The Triton kernels and their drivers in the interpreter, against the reference in float64.

test_kernels.py runs this file in a process of its own: TRITON_INTERPRET must be set before anyone
imports triton. Products of the vendor's library become float32 products of torch on the CPU.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from fused_rl import ops, reference
from fused_rl.kernels import configs, linear_gradients, linear_logprobs, logprobs
from fused_rl.kernels import kl as kl_kernel
from fused_rl.ops import ChunkLogits, Given, Head, Known, Limits, Rows, Sums, Upstream
from fused_rl.ops import triton as on_cuda
from fused_rl.ops import triton_chunk as on_cuda_chunk
from fused_rl.ops.record import Needs


def everything(config, call):
    return True


DEVICE = configs.Device(2, 0, interpreted=True, trusts=everything)
LIMITS = Limits(-100, 2**20)
SMALL = configs.Config(16, 32, 16, 4, 2, False)
# Operands of the fused forward through pointers or descriptors.
FUSED = {"pointers": SMALL, "TMA": SMALL._replace(tma=True)}
FORWARDS = [*FUSED, "tiled"]


@pytest.fixture(autouse=True)
def small_and_on_cpu(monkeypatch):
    """Tiles that give several blocks at small sizes; products that a CPU has."""

    def product(a, b, out=None, final=None):
        result = a.float() @ b.float()
        return result if out is None else out.copy_(result)

    def add_product_(total, a, b, final=None):
        total += a.float() @ b.float()

    monkeypatch.setattr(linear_gradients, "product", product)
    monkeypatch.setattr(linear_logprobs, "product", product)
    monkeypatch.setattr(linear_gradients, "add_product_", add_product_)
    monkeypatch.setattr(linear_logprobs, "TILE_ROWS", 24)
    monkeypatch.setattr(linear_logprobs, "TILE_LOGITS", 24 * 64)
    monkeypatch.setattr(logprobs, "BLOCK_V", 64)
    monkeypatch.setitem(configs.CONFIGS, 0, [SMALL])
    torch.manual_seed(0)


@pytest.fixture
def take(monkeypatch):
    """Makes the forward take a way of FORWARDS, whatever it would choose."""
    return lambda way: monkeypatch.setattr(linear_logprobs, "chosen", lambda *_: FUSED.get(way))


class Case:
    def __init__(self, N=37, H=19, V=130, dtype=torch.float32, transform=True, ignored=True):
        self.hidden = torch.randn(N, H).to(dtype)
        self.weight = torch.randn(V, H).to(dtype)
        self.bias = torch.randn(V) if transform else None
        self.labels = torch.randint(0, V, (N,))
        if ignored and N > 3:
            self.labels[1::4] = -100
        self.temperature = torch.rand(N) + 0.5 if transform else torch.ones(N)
        self.scale, self.softcap = (0.7, 5.0) if transform else (1.0, 0.0)
        self.dlogprobs, self.dentropy = torch.randn(N), torch.randn(N)
        self.dlogprobs[2::5] = 0
        self.dentropy[2::5] = 0

    @property
    def head(self):
        tokens = (self.hidden, self.weight, self.bias, self.labels, self.temperature)
        return Head(*tokens, self.scale, self.softcap)

    @property
    def upstream(self):
        return Upstream(self.dlogprobs, self.dentropy)

    def exact(self):
        """Statistics and gradients in float64, zeros for ignored tokens."""
        leaves = [t.double().requires_grad_() for t in (self.hidden, self.weight)]
        bias = None if self.bias is None else self.bias.double().requires_grad_()
        live = self.labels != -100
        tokens = (self.labels[live], self.temperature[live].double())
        stats = reference.linear_logprobs(
            leaves[0][live], leaves[1], bias, *tokens, self.scale, self.softcap
        )
        objective = (stats[0] * self.dlogprobs[live]).sum() + (stats[1] * self.dentropy[live]).sum()
        wanted = [*leaves, *([] if bias is None else [bias])]
        grads = torch.autograd.grad(objective, wanted)
        full = [torch.zeros(len(self.labels), dtype=torch.float64) for _ in stats]
        for to, part in zip(full, stats, strict=True):
            to[live] = part.detach()
        return full, grads


def close(ours, exact, budget):
    assert (ours.double() - exact).norm() <= budget * exact.norm().clamp_min(1e-6)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRADIENT_BUDGET = {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("way", FORWARDS)
def test_statistics_from_hidden_states(dtype, transform, way, take):
    take(way)
    case = Case(H=24, dtype=dtype, transform=transform)
    exact, _ = case.exact()
    stats = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    for ours, true in zip(stats, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("asked", [(True, True, 7), (False, True, 0), (True, False, 1)])
def test_what_else_is_asked_of_the_logits(asked, transform, dtype):
    """Of several tiles of tokens and of entries."""
    case = Case(60, 24, 200, dtype, transform)
    if transform:
        # A tile that has nothing to give, and a token that is not there.
        case.bias[64:130] = -torch.inf
    wide = [t.double() for t in (case.hidden, case.weight)]
    bias = None if case.bias is None else case.bias.double()
    head = case.head._replace(hidden=wide[0], weight=wide[1], bias=bias)
    exact = ops.linear_statistics.plain(head, ops.Asked(*asked), LIMITS)
    found = on_cuda.linear_statistics(case.head, ops.Asked(*asked), LIMITS, DEVICE)
    assert [x.shape for x in found] == [x.shape for x in exact]
    at_ids = torch.log_softmax(head.logits(), -1).gather(-1, found.top_ids)
    at_ids = at_ids.masked_fill((case.labels == -100)[:, None], 0)
    given = (*found[:5], found.top_logprobs, at_ids)
    right = (*exact[:5], exact.top_logprobs, exact.top_logprobs)
    for ours, true in zip(given, right, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=2e-5, rtol=2e-6)


def test_a_nan_reaches_what_is_asked_of_its_token_alone():
    case = Case(30, 8, 200, transform=False, ignored=False)
    case.hidden[3] = torch.nan
    found = on_cuda.linear_statistics(case.head, ops.Asked(True, True, 2), LIMITS, DEVICE)
    for x in (*found[:5], found.top_logprobs):
        assert x.isnan().view(30, -1).any(-1).nonzero().flatten().tolist() == [3]
    assert ((found.top_ids >= 0) & (found.top_ids < 200)).all()


@pytest.mark.parametrize(("N", "H", "V"), [(1, 1, 1), (1, 16, 33), (17, 7, 65), (16, 33, 31)])
@pytest.mark.parametrize("way", ["pointers", "tiled"])
def test_ragged_sizes(N, H, V, way, take):
    take(way)
    case = Case(N, H, V)
    exact, _ = case.exact()
    stats = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    for ours, true in zip(stats, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("way", [*FORWARDS, "chunk"])
def test_logprobs_equal_top_at_the_most_likely_token_alone(transform, way, take):
    """Every second label is that entry; 5 and 101 tie for ten tokens, and both are the one."""
    take(way)
    case = Case(40, 16, 130, transform=transform, ignored=False)
    # Products of these are exact, in whatever order they are summed.
    case.hidden, case.weight = (torch.randint(-2, 3, (n, 16)) / 4 for n in (40, 130))
    case.weight[101] = case.weight[5]
    if transform:
        case.bias[[5, 101]] = 2.0
    case.hidden[30:] = 2 * case.weight[5]
    tokens = (case.bias, case.temperature.double(), case.scale, case.softcap)
    z = reference.logits(case.hidden.double(), case.weight.double(), *tokens)
    case.labels[::2] = z.argmax(-1)[::2]
    case.labels[30:35], case.labels[35:] = 5, 101
    if way == "chunk":
        logprobs_, _, _, top, _ = on_cuda_chunk.linear_logprobs_chunk(
            case.head, Given(True), DEVICE
        )
    else:
        logprobs_, _, _, top = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    largest = z.amax(-1)
    is_top = z.gather(-1, case.labels[:, None])[:, 0] > largest - 1e-9
    assert is_top[30:].all() and 15 <= is_top[:30].sum() < 20
    assert torch.equal(logprobs_ == top, is_top)
    assert (logprobs_ <= top).all()
    torch.testing.assert_close(top.double(), largest - z.logsumexp(-1), atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_gradients_in_two_passes(dtype, transform, chunk_bytes):
    case = Case(dtype=dtype, transform=transform)
    _, exact = case.exact()
    limits = Limits(-100, chunk_bytes)
    _, entropy, lse, _ = on_cuda.linear_logprobs(case.head, limits, DEVICE)
    grads = on_cuda.linear_logprobs_backward(
        *(case.upstream, case.head, limits, Known(lse, entropy)),
        *(Needs(True, True, transform), DEVICE),
    )
    for ours, true in zip(grads, exact, strict=False):
        close(ours, true, GRADIENT_BUDGET[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_of_a_chunk_in_one_pass(dtype, accumulate):
    case = Case(dtype=dtype, ignored=False)
    _, exact = case.exact()
    _, entropy, lse, _, z = on_cuda_chunk.linear_logprobs_chunk(case.head, Given(True), DEVICE)
    of_sum = torch.float32 if accumulate else dtype
    dweight = torch.full(case.weight.shape, 2.0 if accumulate else float("nan"), dtype=of_sum)
    dbias = torch.full(case.bias.shape, 2.0 if accumulate else float("nan"))
    dhidden = on_cuda_chunk.linear_logprobs_chunk_backward(
        *(ChunkLogits(z), case.upstream, case.head, Known(lse, entropy)),
        *(Sums(dweight, dbias, accumulate), DEVICE),
    )
    offset = 2.0 if accumulate else 0.0
    for ours, true in zip((dhidden, dweight - offset, dbias - offset), exact, strict=True):
        close(ours, true, GRADIENT_BUDGET[dtype])


def test_tiny_upstream_gradients_survive_float16():
    case = Case(dtype=torch.float16, transform=False)
    case.dlogprobs, case.dentropy = case.dlogprobs * 1e-7, case.dentropy * 1e-7
    _, exact = case.exact()
    _, entropy, lse, _ = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    case.hidden = case.hidden.float()  # only the results would underflow in float16
    grads = on_cuda.linear_logprobs_backward(
        *(case.upstream, case.head, LIMITS, Known(lse, entropy)),
        *(Needs(True, False, False), DEVICE),
    )
    close(grads[0], exact[0], GRADIENT_BUDGET[torch.float16])


@pytest.mark.parametrize("way", ["two passes", "one pass"])
def test_one_large_upstream_gradient_leaves_the_others_theirs_in_float16(way, monkeypatch):
    """Probabilities of 1 / V times a five hundredth of the largest are 5e-7 of it."""
    monkeypatch.setattr(logprobs, "BLOCK_V", 1024)
    case = Case(6, 16, 4096, torch.float16, transform=False, ignored=False)
    case.weight = case.weight / 16
    # Without the labels' own entries, whose gradient is large in any case.
    case.weight[case.labels[1:]] = 0
    case.dlogprobs, case.dentropy = torch.ones(6), torch.zeros(6)
    case.dlogprobs[0] = 500
    _, exact = case.exact()
    if way == "two passes":
        _, entropy, lse, _ = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
        dhidden, dweight, _ = on_cuda.linear_logprobs_backward(
            *(case.upstream, case.head, LIMITS, Known(lse, entropy)),
            *(Needs(True, True, False), DEVICE),
        )
    else:
        _, entropy, lse, _, z = on_cuda_chunk.linear_logprobs_chunk(case.head, Given(True), DEVICE)
        dweight = torch.full(case.weight.shape, float("nan"), dtype=torch.float16)
        dhidden = on_cuda_chunk.linear_logprobs_chunk_backward(
            *(ChunkLogits(z), case.upstream, case.head, Known(lse, entropy)),
            *(Sums(dweight, torch.empty(0), False), DEVICE),
        )
    close(dhidden[1:], exact[0][1:], GRADIENT_BUDGET[torch.float16])
    close(dhidden[0], exact[0][0], GRADIENT_BUDGET[torch.float16])
    close(dweight, exact[1], GRADIENT_BUDGET[torch.float16])


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_float16_has_room_for_the_largest_gradients(temperature):
    """An entropy's, at half the probability on one entry; a temperature that multiplies by 50."""
    case = Case(4, 8, 130, torch.float16, transform=False, ignored=False)
    case.temperature = torch.full((4,), temperature)
    case.hidden = case.hidden * temperature
    case.weight *= 20
    case.dlogprobs, case.dentropy = torch.ones(4), torch.ones(4)
    _, exact = case.exact()
    _, entropy, lse, _, z = on_cuda_chunk.linear_logprobs_chunk(case.head, Given(True), DEVICE)
    dweight = torch.zeros(case.weight.shape)
    dhidden = on_cuda_chunk.linear_logprobs_chunk_backward(
        *(ChunkLogits(z), case.upstream, case.head, Known(lse, entropy)),
        *(Sums(dweight, torch.empty(0), True), DEVICE),
    )
    close(dhidden, exact[0], GRADIENT_BUDGET[torch.float16])
    close(dweight, exact[1], GRADIENT_BUDGET[torch.float16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_rows_of_logits(dtype, multiprocessors):
    logits = (torch.randn(9, 150) * 4).to(dtype)
    labels = torch.randint(0, 150, (9,))
    labels[4] = -100
    temperature = torch.rand(9) + 0.5
    device = DEVICE._replace(multiprocessors=multiprocessors)
    logprobs_, entropy, lse = on_cuda.logits_logprobs(
        Rows(logits, labels, temperature, -100), device
    )
    live = labels != -100
    leaf = logits.double().requires_grad_()
    exact = reference.logits_logprobs(leaf[live], labels[live], temperature[live].double())
    for ours, true in zip((logprobs_, entropy, lse), exact, strict=True):
        torch.testing.assert_close(ours[live].double(), true.detach(), atol=1e-5, rtol=2e-6)
        assert ours[4] == 0
    g, h = torch.randn(9), torch.randn(9)
    got = on_cuda.logits_logprobs_backward(
        *(Upstream(g, h), Rows(logits, labels, temperature, -100), Known(lse, entropy), device)
    )
    (true,) = torch.autograd.grad((exact[0] * g[live]).sum() + (exact[1] * h[live]).sum(), leaf)
    close(got, true, GRADIENT_BUDGET[dtype])
    assert got.dtype == dtype
    assert (got[4] == 0).all()


def test_minus_infinity_columns_and_rows():
    logits = torch.randn(3, 100)
    logits[0, 7:60] = -torch.inf
    logits[1] = -torch.inf
    labels = torch.tensor([0, 0, 0])
    rows = Rows(logits, labels, torch.ones(3), -100)
    out = on_cuda.logits_logprobs(rows, DEVICE)
    exact = reference.logits_logprobs(logits.double(), labels, torch.ones(3).double())
    for ours, true in zip(out, exact, strict=True):
        torch.testing.assert_close(ours[[0, 2]].double(), true[[0, 2]], atol=1e-6, rtol=1e-6)
    assert out[0][1].isnan() and out[1][1].isnan()
    got = on_cuda.logits_logprobs_backward(
        Upstream(torch.ones(3), torch.ones(3)), rows, Known(out.lse, out.entropy), DEVICE
    )
    assert got[[0, 2]].isfinite().all()
    assert (got[0, 7:60] == 0).all()


@pytest.mark.parametrize("kind", ["finfo.min", -1e15, -1e30, "two tie", "one above all"])
def test_gradients_of_huge_logits(kind):
    """lse = max + log_sum has no room for log_sum there."""
    logits = torch.zeros(4, 130)
    if kind in ("two tie", "one above all"):
        logits[:, [3, 7] if kind == "two tie" else [3]] = 1e20
    else:
        logits += torch.finfo(torch.float32).min if kind == "finfo.min" else kind
    labels = torch.tensor([3, 7, 0, 129])
    tokens = (labels, torch.ones(4), -100)
    _, entropy, lse = on_cuda.logits_logprobs(Rows(logits, *tokens), DEVICE)
    g, h = torch.randn(2, 4)
    got = on_cuda.logits_logprobs_backward(
        Upstream(g, h), Rows(logits, *tokens), Known(lse, entropy), DEVICE
    )
    leaf = logits.double().requires_grad_()
    exact = reference.logits_logprobs(leaf, labels, torch.ones(4).double())
    (true,) = torch.autograd.grad(exact[:2], leaf, (g.double(), h.double()))
    torch.testing.assert_close(got.double(), true, atol=1e-6, rtol=1e-6)
    # The same as a bias, through the products.
    case = Case(4, 8, 130, transform=False, ignored=False)
    case.bias, case.labels = logits[0], labels
    _, exact = case.exact()
    _, entropy, lse, _ = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    grads = on_cuda.linear_logprobs_backward(
        *(case.upstream, case.head, LIMITS, Known(lse, entropy)),
        *(Needs(True, True, True), DEVICE),
    )
    if kind != -1e15:  # in float64 the products still count beside it
        for ours, true in zip(grads, exact, strict=True):
            close(ours, true, 5e-6)
    assert abs(grads[2].sum()) < 1e-5


@pytest.mark.parametrize("way", FORWARDS)
@pytest.mark.parametrize("kind", ["-inf", "a tile of -inf", "finfo.min", "finfo.max", -1e30, 1e20])
def test_the_forward_of_extreme_biases(way, kind, take):
    take(way)
    case = Case(33, 24, 130, transform=False, ignored=False)
    case.bias = torch.zeros(130)
    if kind == "-inf":
        case.bias[::3] = -torch.inf
        case.labels = case.labels // 3 * 3 + 1
    elif kind == "a tile of -inf":
        case.bias[:70] = case.bias[96:] = -torch.inf
        case.labels = 70 + case.labels % 26
    else:
        case.bias += getattr(torch.finfo(torch.float32), kind[6:]) if type(kind) is str else kind
    exact, _ = case.exact()
    stats = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    for name, ours, true in zip(stats._fields, stats, exact, strict=True):
        if type(kind) is float or name != "lse":
            # As large as these biases, the logits of a row are one and the same number in fp32.
            in_fp32 = -torch.tensor(130.0).double().log()
            known = {"logprobs": in_fp32, "top": in_fp32, "entropy": -in_fp32}
            if kind not in ("-inf", "a tile of -inf"):
                true = known.get(name, torch.tensor(0.0).double() + kind if name == "lse" else None)
                true = true.expand(33)
        elif kind.startswith("finfo"):
            true = case.bias[:33].double()
        torch.testing.assert_close(ours.double(), true, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("splits", [1, 31, 33, 100])
def test_parts_merge_whatever_their_number(splits):
    torch.manual_seed(splits)
    z = torch.randn(splits, 40, 5) * 8
    z[0, 3] = -torch.inf
    m = z.amax(-1)
    d = (z - m.where(m > -torch.inf, 0.0)[..., None]).double()
    p = d.exp()
    parts = torch.stack([m, p.sum(-1), (p * d).nan_to_num(0.0).sum(-1), torch.zeros_like(m)], 1)
    labels = torch.randint(0, 5, (40,))
    parts[0, 3] = z[0].gather(-1, labels[:, None])[:, 0]
    found = logprobs.merge(parts.float().contiguous(), labels, 5 * splits, -100)
    rows = z.transpose(0, 1).reshape(40, -1)
    exact = reference.statistics(rows.double(), labels)
    in_log2 = parts * torch.tensor([1, logprobs.LN2, 1, 1])[:, None] / logprobs.LN2
    scaled = logprobs.merge(in_log2.float().contiguous(), labels, 5 * splits, -100, logprobs.LN2)
    for ours, other, true in zip(found, scaled, exact, strict=True):
        finite = true.isfinite()
        torch.testing.assert_close(ours[finite].double(), true[finite], atol=2e-5, rtol=2e-6)
        torch.testing.assert_close(other[finite], ours[finite], atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("way", FORWARDS)
def test_a_nan_row_poisons_itself_alone(way, take):
    take(way)
    case = Case(H=24, ignored=False)
    clean = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    case.hidden[5] = float("nan")
    dirty = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    others = torch.arange(37) != 5
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[others], b[others])
        assert b[5].isnan()


def test_a_nan_at_an_ignored_row_reaches_nothing():
    case = Case()
    case.hidden[1] = float("nan")
    assert case.labels[1] == -100
    _, entropy, lse, _ = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    grads = on_cuda.linear_logprobs_backward(
        *(case.upstream, case.head, LIMITS, Known(lse, entropy)),
        *(Needs(True, True, True), DEVICE),
    )
    assert all(g.isfinite().all() for g in grads)


def test_a_label_outside_the_vocabulary_is_nan_for_that_token():
    case = Case(ignored=False)
    case.labels[3], case.labels[8] = 130, -1
    logprobs_, entropy, _, top = on_cuda.linear_logprobs(case.head, LIMITS, DEVICE)
    wrong = torch.zeros(37, dtype=torch.bool)
    wrong[[3, 8]] = True
    assert logprobs_[wrong].isnan().all()
    assert logprobs_[~wrong].isfinite().all()
    assert entropy.isfinite().all() and top.isfinite().all()


def every_second(tensor):
    """The same numbers, with others between them that must not be read."""
    wrong = -7 if tensor.dtype == torch.int64 else torch.nan
    return torch.stack([tensor, torch.full_like(tensor, wrong)], -1).flatten()[::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["expanded", "every second"])
def test_vectors_are_read_as_they_are_stored(how, dtype):
    """Every token counts, so that none of them is picked out: the vectors arrive as given.

    Upstream of a sum is one number, expanded; so is a temperature for all.
    """
    # Two blocks of rows and three of columns.
    case = Case(17, 8, 70, dtype, ignored=False)
    one, half = torch.ones(17), torch.full((17,), 0.5)
    if how == "expanded":
        views = (torch.ones(()).expand(17), torch.tensor(0.5).expand(17))
        labels, bias = case.labels, case.bias
    else:
        views = (every_second(one), every_second(half))
        labels, bias = every_second(case.labels), every_second(case.bias)
    assert not views[0].is_contiguous()

    def run(up, temperature, labels, bias):
        head = Head(case.hidden, case.weight, bias, labels, temperature, 0.7, 5.0)
        of_loss = Upstream(up, up)
        known = on_cuda.launch(on_cuda.linear_logprobs, (head, LIMITS), DEVICE)
        needs = (Known(known.lse, known.entropy), Needs(True, True, True))
        args = (of_loss, head, LIMITS, *needs)
        grads = on_cuda.launch(on_cuda.linear_logprobs_backward, args, DEVICE)
        part = on_cuda.launch(on_cuda_chunk.linear_logprobs_chunk, (head, Given(True)), DEVICE)
        sums = torch.empty(70, 8, dtype=dtype), torch.empty(70, dtype=torch.float32)
        args = (ChunkLogits(part.z.clone()), of_loss, head, Known(part.lse, part.entropy))
        args = (*args, Sums(*sums, False))
        chunk = on_cuda.launch(on_cuda_chunk.linear_logprobs_chunk_backward, args, DEVICE)
        rows = Rows(case.hidden, labels.clamp(max=7), temperature, -100)
        stats = on_cuda.launch(on_cuda.logits_logprobs, (rows,), DEVICE)
        args = (of_loss, rows, Known(stats.lse, stats.entropy))
        dlogits = on_cuda.launch(on_cuda.logits_logprobs_backward, args, DEVICE)
        return (*known, *grads, *part[:4], chunk, *sums, *stats, dlogits)

    found = run(*views, labels, bias)
    expected = run(one, half, case.labels, case.bias)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_two_to_the_31():
    """A row stride so large that a 32-bit product with the row would wrap; the rows overlap not."""
    stride = 2**30 + 64
    # Only the pages that are touched take memory.
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 64), (stride, 1))
    values = torch.randn(3, 64).to(torch.bfloat16)
    logits.copy_(values)
    labels = torch.tensor([3, 5, 7])
    out = on_cuda.logits_logprobs(Rows(logits, labels, torch.ones(3), -100), DEVICE)
    exact = reference.logits_logprobs(values.double(), labels, torch.ones(3).double())
    torch.testing.assert_close(out[0].double(), exact[0], atol=1e-5, rtol=1e-5)


def test_chunks_fill_the_device_and_stay_within_their_bytes():
    def tokens(V, H, gigabytes=1.0, multiprocessors=132):
        bound = int(gigabytes * 2**30)
        count = linear_gradients.chunk_tokens(V, H, 6, bound, multiprocessors)
        assert count * V * 6 <= bound or count == 1
        return count

    # 8 x 16 tiles on 132 multiprocessors; 9 x 16 would need a second wave for a few.
    assert tokens(151936, 4096) == 1024
    assert tokens(256000, 2304, 3.0) == 1792
    assert tokens(128256, 2048, 2.0) == 2048
    assert tokens(151936, 4096, 0.0001) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_kl_values_and_slopes(dtype, kind):
    small = torch.logspace(-6, 0, 60)
    d = torch.cat([torch.linspace(-30, 30, 301), small, -small, torch.tensor([0.0, 200.0, -200.0])])
    d = d.to(dtype)
    budget = 5e-6 if dtype == torch.float32 else 1e-9
    value, slope = kl_kernel.fwd(d, kind, kind)
    # Exact enough to judge by: expm1(-d) + d cancels below 1e-4 even in float64.
    exact = reference.kl(d.double(), kind)
    if kind == 3:
        x = -d.double()
        tail = x**2 / 2 + x**3 / 6 + x**4 / 24 + x**5 / 120
        exact = torch.where(x.abs() < 1e-3, tail, exact)
        assert (value >= 0).all()
    torch.testing.assert_close(value.double(), exact, atol=0.0, rtol=budget)
    exact_slope = reference.kl_slope(d.double(), kind)
    torch.testing.assert_close(slope.double(), exact_slope, atol=0.0, rtol=budget)
    other, slope_of_k2 = kl_kernel.fwd(d, kind, 2)
    assert torch.equal(other, value)
    assert torch.equal(slope_of_k2, d)
    assert kl_kernel.fwd(torch.tensor([float("nan")]), kind, 2)[0].isnan().all()
    assert kl_kernel.fwd(torch.empty(0), kind, kind)[0].shape == (0,)

"""Logits rounded as an engine's are, LMHead(logits_dtype=...), by every way to a logit."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import assert_passes
from rounded_cases import (
    IGNORED,
    ROUNDINGS,
    assert_near,
    exact,
    gradients,
    leaves_of,
    lm_head,
    random_head,
)
from tiny_models import build

import fused_rl
from fused_rl import (
    Divergence,
    LMHead,
    TokenBatch,
    grpo,
    linear_divergence,
    linear_kept_logprobs,
    linear_logprobs,
    linear_logprobs_at,
    linear_policy_loss,
    linear_preference_loss,
    linear_top_logprobs,
    ops,
)
from fused_rl.linear.at import linear_logits_at
from fused_rl.models.recipes import Recipe

LIMITS = ops.Limits(IGNORED, 2**24)
ASKED = ops.Asked(True, True, 3)
# Of values, and of gradients: one that does not round is further away by far, below.
NEAR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENTS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FLOATS = pytest.mark.parametrize("dtype", NEAR, ids=str)
LOGITS = pytest.mark.parametrize("logits_dtype", ROUNDINGS, ids=str)
TRANSFORM = pytest.mark.parametrize("transform", [False, True], ids=["plain", "transformed"])


def without_ignored(head):
    return head._replace(labels=head.labels.where(head.labels != IGNORED, 0))


# What any head and labels inside the vocabulary give: log-probs, entropies, lse.
WAYS = {
    "two passes": lambda head: ops.linear_logprobs(head, LIMITS)[:3],
    "frozen": lambda head: ops.linear_logprobs_frozen(head, LIMITS)[:3],
    "filtered": lambda head: ops.linear_filtered_logprobs(head, LIMITS, ops.Filter(1e-9))[:3],
    "chunk": lambda head: ops.linear_logprobs_chunk(head, ops.Given(True))[:3],
    "chunk of exponentials": lambda head: ops.linear_logprobs_chunk(head, ops.Given(False))[:3],
    "stored": lambda head: ops.linear_logprobs_stored(head, LIMITS)[:3],
    "statistics": lambda head: ops.linear_statistics(head, ASKED, LIMITS)[:3],
    "stored statistics": lambda head: ops.linear_statistics_stored(head, ASKED, LIMITS)[:3],
    "frozen statistics": lambda head: ops.linear_statistics_frozen(head, ASKED, LIMITS)[:3],
    "plain": lambda head: ops.linear_logprobs.plain(head, LIMITS)[:3],
    "plain chunk": lambda head: ops.linear_logprobs_chunk.plain(head, ops.Given(True))[:3],
}


@FLOATS
@LOGITS
@TRANSFORM
@pytest.mark.parametrize("way", WAYS)
def test_every_way_rounds_alike(way, transform, logits_dtype, dtype):
    head = without_ignored(random_head(70, 24, 700, dtype, logits_dtype, transform=transform))
    right = exact(head)
    logprobs = right.logp().gather(-1, head.labels[:, None])[:, 0]
    found = (logprobs, right.entropy(), torch.logsumexp(right.logits, -1))
    for ours, true in zip(WAYS[way](head), found, strict=True):
        assert_near(ours, true.detach(), NEAR[dtype])
    straight = exact(head, rounds=False).logp().gather(-1, head.labels[:, None])[:, 0]
    assert (straight - logprobs).abs().max() > 50 * NEAR[torch.float32] * logprobs.abs().max()


@LOGITS
def test_a_rounded_number_is_that_of_torch_bit_by_bit(logits_dtype):
    """Of any number of float32: ties, subnormal ones, infinities, NaN, what has no room."""
    bits = torch.randint(-(2**31), 2**31, (20000,)).int()
    ties = torch.arange(0, 2**31 - 1, 2**12).int()
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), -ties.view(torch.float32)])
    inside = torch.randn(20000).exp2() * torch.randn(20000)
    x = torch.cat([x, inside, 1e-5 * inside, 3e4 * inside])[:, None]
    right = x[:, 0].to(logits_dtype).float()
    head = LMHead(torch.ones(1, 1), logits_dtype=logits_dtype)
    ids = torch.zeros(len(x), 1).long()
    single = linear_logits_at(x, head, ids)[:, 0]
    of_tile = ops.linear_logprobs_at(
        ops.AtHead(x, head.weight, None, ids, torch.ones(len(x)), *head.transform), LIMITS
    ).logits[:, 0]
    for ours in (single, of_tile, head.logits(x)[:, 0]):
        assert torch.equal(ours.isnan(), right.isnan())
        assert torch.equal(ours.nan_to_num(nan=0.0), right.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@LOGITS
@TRANSFORM
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("grad_filter", [None, 1e-12])
def test_the_gradient_is_that_of_what_is_not_rounded(
    grad_filter, trained, transform, logits_dtype, dtype
):
    head = random_head(40, 24, 600, dtype, logits_dtype, transform=transform)
    counted = head.labels != IGNORED
    a, b = torch.randn(2, 40, dtype=torch.float64)
    if not trained and not transform:
        b = 0 * b
    leaves = leaves_of(head, trained=trained)
    stats = linear_logprobs(
        *(leaves[0], lm_head(head, *leaves[1:]), head.labels),
        temperature=head.temperature,
        grad_filter=grad_filter,
    )
    ours = gradients((stats.logprobs * a + stats.entropy * b).sum(), leaves)
    right = exact(head)
    logprobs = right.logp().gather(-1, head.labels.clamp(min=0)[:, None])[:, 0]
    value = ((logprobs * a + right.entropy() * b) * counted).sum()
    for mine, true in zip(ours, gradients(value, right.leaves), strict=False):
        assert_near(mine, true, GRADIENTS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@LOGITS
@TRANSFORM
@pytest.mark.parametrize("chunk_bytes", [None, 40 * 600], ids=["one pass", "more"])
def test_policy_losses(chunk_bytes, transform, logits_dtype, dtype):
    head = random_head(40, 24, 600, dtype, logits_dtype, transform=transform)
    head = head._replace(temperature=torch.full_like(head.temperature, 0.8))
    right = exact(head)
    logprobs = right.logp().gather(-1, head.labels.clamp(min=0)[:, None])[:, 0]
    steps = torch.tensor([-0.5, -0.1, 0.1, 0.5], dtype=torch.float64)[torch.randint(4, (40,))]
    batch = TokenBatch.padded(
        head.labels.clamp(min=0)[None],
        (head.labels != IGNORED)[None],
        torch.randn(1, 40, dtype=torch.float64),
        old_logprobs=(logprobs.detach() - steps)[None],
        ref_logprobs=logprobs.detach()[None] + 0.1,
    )
    leaves, loss = leaves_of(head), grpo(beta=0.1)
    output = linear_policy_loss(
        *(leaves[0][None], lm_head(head, *leaves[1:]), batch, loss),
        temperature=0.8,
        chunk_bytes=chunk_bytes,
    )
    stats = fused_rl.TokenStats(logprobs, right.entropy())
    value = loss.objective(stats, batch)
    assert_near(output.loss.detach(), value.detach(), 1e-5)
    pairs = zip(gradients(output.loss, leaves), gradients(value, right.leaves), strict=True)
    for mine, true in pairs:
        assert_near(mine, true, GRADIENTS[dtype])


@FLOATS
@LOGITS
@TRANSFORM
def test_kept_sets_ids_and_single_logits(transform, logits_dtype, dtype):
    head = random_head(30, 24, 400, dtype, logits_dtype, transform=transform)
    counted = head.labels != IGNORED
    labels = head.labels.clamp(min=0)
    others = torch.stack([torch.randperm(399)[:5] for _ in range(30)])
    ids = torch.cat([labels[:, None], others + (others >= labels[:, None])], -1)
    kept, cu_kept = ids.flatten(), torch.arange(31) * 6
    a = torch.randn(30, 6, dtype=torch.float64)
    right = exact(head)
    at, there = right.logits.gather(-1, ids), counted[:, None].expand(30, 6)
    logp, of_kept = right.logp().gather(-1, ids), at[:, 0] - at.logsumexp(-1)
    ids, options = ids.where(there, IGNORED), {"temperature": head.temperature}

    def compare(run, true, weights, where):
        leaves = leaves_of(head)
        ours = run(leaves[0], lm_head(head, *leaves[1:]))
        assert_near(ours[where].detach(), true[where].detach(), NEAR[dtype])
        mine = gradients((ours * weights)[where].sum(), leaves)
        value = (true * weights)[where].sum()
        theirs = gradients(value, right.leaves, keep=True)
        for g, exact_g in zip(mine, theirs, strict=True):
            assert_near(g, exact_g, GRADIENTS[dtype])

    compare(lambda h, w: linear_logits_at(h, w, ids, **options), at, a, there)
    compare(lambda h, w: linear_logprobs_at(h, w, ids, **options).logprobs, logp, a, there)
    compare(
        lambda h, w: linear_kept_logprobs(h, w, head.labels, kept, cu_kept, **options)[2],
        of_kept,
        a[:, 0],
        counted,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_each_head_of_a_divergence_rounds_on_its_own(trained, whose, dtype):
    student = random_head(20, 24, 300, dtype, torch.bfloat16)
    teacher = random_head(20, 16, 300, dtype, torch.float16, transform=False)
    teacher = teacher._replace(labels=student.labels)
    leaves = leaves_of(student, trained=trained)
    off = torch.float32
    heads = (
        lm_head(student, *leaves[1:], logits_dtype=off if whose == "teacher" else None),
        lm_head(teacher, logits_dtype=off if whose == "student" else None),
    )
    stats = linear_divergence(
        *(leaves[0], heads[0], teacher.hidden, heads[1], student.labels),
        divergence=Divergence.REVERSE,
        temperature=student.temperature,
        teacher_temperature=1.0,
    )
    right = exact(student, rounds=whose != "teacher")
    of_teacher = exact(teacher, rounds=whose != "student").logp().detach()
    logp, counted = right.logp(), student.labels != IGNORED
    divergence = (logp.exp() * (logp - of_teacher)).sum(-1) * counted
    assert_near(stats.divergence.detach(), divergence.detach(), 1e-5)
    a = torch.randn(20, dtype=torch.float64)
    ours = gradients((stats.divergence * a).sum(), leaves)
    for mine, true in zip(ours, gradients((divergence * a).sum(), right.leaves), strict=False):
        assert_near(mine, true, max(GRADIENTS[dtype], 2e-5 if dtype != torch.float64 else 0))


def test_preference_losses_and_top_logprobs():
    head = random_head(24, 24, 300)
    labels = head.labels.clamp(min=0)
    leaves = leaves_of(head)
    top = linear_top_logprobs(leaves[0], lm_head(head, *leaves[1:]), labels)
    right = exact(head._replace(temperature=torch.ones(24)))
    assert_near(top.top_logprobs.detach(), right.logp().amax(-1).detach(), 2e-6)
    batch = fused_rl.preference.PreferenceBatch.padded(
        *(labels.view(4, 6), torch.ones(4, 6, dtype=torch.bool)),
        ref_logprobs=torch.zeros(4),
    )
    loss = fused_rl.preference.dpo()
    output = linear_preference_loss(
        leaves[0].view(4, 6, -1), lm_head(head, *leaves[1:]), batch, loss
    )
    logprobs = right.logp().gather(-1, labels[:, None])[:, 0]
    value = loss(fused_rl.TokenStats(logprobs.view(4, 6), right.entropy().view(4, 6)), batch).loss
    assert_near(output.loss.detach(), value.detach(), 1e-5)
    pairs = zip(gradients(output.loss, leaves), gradients(value, right.leaves), strict=True)
    for mine, true in pairs:
        assert_near(mine, true, 1e-5)


def test_nearer_to_an_engine_that_rounds():
    """Of a head of ordinary numbers, whose sums have an order, and so ties that fall either way."""
    hidden = (torch.randn(64, 256) / 2).bfloat16()
    weight = (torch.randn(4000, 256) / 2).bfloat16()
    labels = torch.randint(0, 4000, (64,))
    engine = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    rounded, plain = (
        linear_logprobs(hidden, LMHead(weight, logits_dtype=dtype), labels).logprobs
        for dtype in (torch.bfloat16, None)
    )
    away = [(ours - engine).abs().mean().item() for ours in (rounded, plain)]
    assert 2e-3 < away[1] < 5e-2 and away[0] < away[1] / 10, away


def test_float32_is_no_rounding():
    head = random_head(dtype=torch.bfloat16)._replace(rounding=0)
    given = (head.hidden, head.labels)
    plain, wide = (
        linear_logprobs(given[0], lm_head(head, logits_dtype=dtype), given[1])
        for dtype in (None, torch.float32)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, wide, strict=True))


@LOGITS
def test_logits_of_a_head(logits_dtype):
    head = random_head(logits_dtype=logits_dtype)
    of_head = lm_head(head)
    z = of_head.logits(head.hidden)
    raw = F.linear(head.hidden, head.weight, head.bias).to(logits_dtype).float()
    right = torch.tanh(raw * head.scale / head.softcap) * head.softcap
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, right, atol=1e-6, rtol=1e-6)
    hidden = head.hidden.clone().requires_grad_()
    of_head.logits(hidden)[:, 0].sum().backward()
    slope = (1 - (right[:, :1] / head.softcap) ** 2) * head.scale
    torch.testing.assert_close(hidden.grad, slope * head.weight[:1], atol=1e-6, rtol=1e-5)


def test_entries_at_minus_infinity_stay_there_and_inf_is_nan():
    head = random_head(dtype=torch.float32, transform=False)
    bias = torch.zeros(130).index_fill(0, torch.arange(0, 130, 3), -torch.inf)
    labels = torch.full((37,), 1)
    for dtype in ROUNDINGS:
        leaves = [head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()]
        of_head = LMHead(leaves[1], bias, head.scale, logits_dtype=dtype)
        logprobs = linear_logprobs(leaves[0], of_head, labels).logprobs
        raw = (head.hidden @ head.weight.T).to(dtype).double() * head.scale
        right = (raw + bias.double()).log_softmax(-1)[:, 1]
        torch.testing.assert_close(logprobs.double(), right, atol=1e-5, rtol=1e-6)
        grads = torch.autograd.grad(logprobs.sum(), leaves)
        assert all(g.isfinite().all() for g in grads) and (grads[1][::3] == 0).all()
    large = LMHead(torch.tensor([[60000.0], [1.0]]), logits_dtype=torch.float16)
    hidden, labels = torch.tensor([[1.0], [1.2]]), torch.tensor([0, 0])
    assert linear_logprobs(hidden, large, labels).logprobs.isnan().tolist() == [False, True]
    assert large.logits(hidden)[1, 0] == torch.inf


@LOGITS
def test_under_torch_compile(logits_dtype):
    head = random_head(logits_dtype=logits_dtype)

    def run(hidden, weight):
        stats = linear_logprobs(hidden, lm_head(head, weight, head.bias), head.labels)
        return stats.logprobs.sum() + stats.entropy.sum()

    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        hidden, weight, _ = leaves_of(head)
        value = call(hidden, weight)
        found.append([value.detach(), *torch.autograd.grad(value, (hidden, weight))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wrong", [torch.float64, torch.int32, torch.float8_e4m3fn, "bfloat16", 16])
def test_what_is_no_dtype_of_logits(wrong):
    with pytest.raises(ValueError, match=r"logits_dtype must be torch\.bfloat16, torch\.float16"):
        LMHead(torch.ones(2, 2), logits_dtype=wrong)


def test_the_head_of_a_model():
    model = build("gemma2")
    head = LMHead.from_model(model, logits_dtype=torch.bfloat16)
    assert head.logits_dtype == torch.bfloat16 and head.softcap is not None
    assert LMHead.from_model(model).logits_dtype is None
    torch.manual_seed(0)
    hidden = torch.randn(1, 6, head.weight.shape[1])
    batch = TokenBatch.padded(
        *(torch.randint(0, len(head.weight), (1, 6)), torch.ones(1, 6, dtype=torch.bool)),
        torch.randn(1, 6),
    )
    loss = grpo()
    with torch.no_grad():
        rounded = fused_rl.model_policy_loss(
            model, hidden, batch, loss, logits_dtype=torch.bfloat16
        )
        alike = linear_policy_loss(hidden, head, batch, loss)
    assert torch.equal(rounded.loss, alike.loss)


def test_a_model_that_scales_its_hidden_states_first():
    layer = torch.nn.Linear(4, 6, bias=False)
    for before, fits in ((1 / 4, True), (1.0, True), (1 / 3, False)):
        recipe = Recipe(before, 1.0, None, None, ())
        assert LMHead.of_layer(recipe, layer).logits_dtype is None
        if fits:
            head = LMHead.of_layer(recipe, layer, torch.bfloat16)
            hidden = torch.randn(3, 4)
            right = F.linear(hidden * before, layer.weight).bfloat16().float()
            torch.testing.assert_close(head.logits(hidden), right, atol=0, rtol=2**-7)
        else:
            with pytest.raises(ValueError, match=r"multiplies its hidden states by 0\.33"):
                LMHead.of_layer(recipe, layer, torch.bfloat16)


@pytest.mark.parametrize("hidden", ["REPLICATED", "OWN_TOKENS"])
def test_a_vocabulary_over_ranks(ranks, hidden):
    found = ranks(2).run("cases_rounded", "over_ranks", hidden=hidden)
    assert max(max(row) for row in found) <= 1e-12


def test_kernels_in_the_interpreter(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    assert_passes("interpreted_rounded.py", tmp_path)

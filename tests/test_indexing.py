"""Labels, masks, strides, shapes and sizes of the linear head; every ValueError by its words."""

import re
from dataclasses import replace

import oracle
import pytest
import torch
from oracle import FLOATS, IGNORED

import fused_rl
from fused_rl import (
    LMHead,
    TokenBatch,
    grpo,
    linear_logprobs,
    linear_policy_loss,
    logprobs_from_logits,
    reference,
)

WAYS = ["no_grad", "trained", "frozen", "one_pass", "from_logits"]


def _call(way, labels, hidden=None, V=10, **options):
    """The labels [N] through one way of the library."""
    N, H = len(labels), 6
    hidden = torch.randn(N, H) if hidden is None else hidden
    weight = torch.randn(V, H, requires_grad=way in ("trained", "one_pass"))
    if way == "from_logits":
        return logprobs_from_logits(torch.randn(N, V), labels, **options)
    hidden.requires_grad_(way != "no_grad")
    if way == "one_pass":
        batch = TokenBatch.packed(labels, torch.tensor([0, N]), torch.ones(1))
        return linear_policy_loss(hidden, weight, batch, grpo(), **options)
    return linear_logprobs(hidden, weight, labels, **options)


# Labels


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", [10, 11, -1, -99, -101, 2**40])
def test_a_label_outside_the_vocabulary_raises(way, wrong):
    labels = torch.tensor([1, 2, wrong, 3])
    said = f"is {wrong}"
    if way == "one_pass" and wrong < 0:
        said = "counts by loss_mask and is negative"
    with pytest.raises(ValueError, match=rf"labels\[.*2\] {said}, outside the .*\[0, 10\)"):
        _call(way, labels)


@pytest.mark.parametrize("way", ["no_grad", "trained", "frozen", "from_logits"])
def test_minus_100_is_an_error_where_ignore_index_is_something_else(way):
    with pytest.raises(ValueError, match=r"labels\[0\] is -100.*not ignore_index \(-1\)"):
        _call(way, torch.tensor([-100, 2]), ignore_index=-1)


def test_minus_100_counted_by_the_loss_mask_raises():
    said = r"labels\[1\] counts by loss_mask and is negative, outside the vocabulary \[0, 10\)$"
    with pytest.raises(ValueError, match=said):
        _call("one_pass", torch.tensor([3, -100, 2]))


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 1)])
def test_errors_name_the_place_of_a_token_in_the_shape_it_was_given_in(place):
    hidden, head, labels = torch.randn(2, 3, 4), torch.randn(10, 4), torch.ones(2, 3).long()
    kept, offsets = torch.arange(10).repeat(6), torch.arange(0, 61, 10)
    b, t = place
    wrong, temperature = labels.clone(), torch.ones(2, 3)
    wrong[place], temperature[place] = 10, -2.0
    mask, advantages = torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    batch = fused_rl.TokenBatch.padded(wrong, mask, advantages)
    trained = hidden.clone().requires_grad_()
    for call in (
        lambda: fused_rl.linear_logprobs(hidden, head, wrong),
        lambda: fused_rl.linear_logprobs(trained, head, wrong),
        lambda: fused_rl.linear_top_logprobs(hidden, head, wrong),
        lambda: fused_rl.linear_statistics(hidden, head, wrong, top=1),
        lambda: fused_rl.linear_statistics(trained, head, wrong, top=1),
        lambda: fused_rl.linear_kept_logprobs(hidden, head, wrong, kept, offsets),
        lambda: logprobs_from_logits(hidden @ head.T, wrong),
        lambda: fused_rl.linear_policy_loss(trained, head, batch, fused_rl.grpo()),
        lambda: fused_rl.linear_policy_loss(trained, head, batch, fused_rl.gspo()),
    ):
        with pytest.raises(ValueError, match=rf"^labels\[{b}, {t}\] is 10, outside"):
            call()
    with pytest.raises(ValueError, match=rf"^temperature\[{b}, {t}\] is -2(\.0)?, and"):
        fused_rl.linear_logprobs(hidden, head, labels, temperature=temperature)
    with pytest.raises(ValueError, match=r"^labels is 10, outside"):
        fused_rl.linear_logprobs(hidden[0, 0], head, torch.tensor(10))
    for call in (fused_rl.linear_logprobs_at, fused_rl.linear.linear_logits_at):
        with pytest.raises(ValueError, match=rf"^ids\[{b}, {t}, 1\] is 10, outside"):
            call(hidden, head, torch.stack([labels, wrong], -1))
        with pytest.raises(ValueError, match=rf"^temperature\[{b}, {t}\] is -2(\.0)?, and"):
            call(hidden, head, labels[..., None], temperature=temperature)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
def test_ignored_rows_give_0_and_0_and_no_gradient(ignore_index, frozen, poisoned):
    case = oracle.random_case(30, 12, 40, bias=True)
    up = oracle.random_upstream(30)
    labels = case.labels.where(case.labels != 7, 8)
    ignored = torch.arange(30) % 4 == 0
    marked = replace(case, labels=labels.where(~ignored, ignore_index))
    got = oracle.ours(marked, *up, frozen=frozen, ignore_index=ignore_index)
    for rows in (got.logprobs, got.entropy, got.dhidden):
        assert not rows[ignored].any() and rows[~ignored].reshape(22, -1).any(1).all()
    kept = (~ignored).nonzero()[:, 0]
    alone = oracle.ours(replace(case, labels=labels).rows(kept), *(g[kept] for g in up), frozen)
    for name in ("logprobs", "entropy", "dhidden"):
        oracle.assert_same_bits(getattr(got, name)[kept], getattr(alone, name))
    oracle.assert_same_bits(got.dweight, alone.dweight)
    oracle.assert_same_bits(got.dbias, alone.dbias)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_labels_of_int32_and_of_any_strides(frozen):
    case = oracle.random_case(30, 12, 40)
    up = oracle.random_upstream(30)
    right = oracle.ours(case, *up, frozen=frozen)
    strided = torch.stack([case.labels, torch.full((30,), 10**6)], 1)[:, 0]
    for labels in (case.labels.int(), strided, strided.int(), case.labels.flip(0).flip(0)):
        got = oracle.ours(replace(case, labels=labels), *up, frozen=frozen)
        for mine, other in zip(got, right, strict=True):
            oracle.assert_same_bits(mine, other)
    logits = torch.randn(30, 40)
    for labels in (case.labels.int(), strided):
        got, other = logprobs_from_logits(logits, labels), logprobs_from_logits(logits, case.labels)
        oracle.assert_same_bits(got.logprobs, other.logprobs)


# Strides


def _layouts(tensor):
    rows, columns = tensor.shape
    padded = torch.full((rows, columns + 5), torch.nan, dtype=tensor.dtype)
    padded[:, 2 : columns + 2] = tensor
    apart = torch.full((rows * 3, columns), torch.nan, dtype=tensor.dtype)
    apart[1::3] = tensor
    flat = torch.full((rows * columns + 3,), torch.nan, dtype=tensor.dtype)
    flat[3:] = tensor.flatten()
    columns_apart = torch.full((rows, columns * 2), torch.nan, dtype=tensor.dtype)
    columns_apart[:, ::2] = tensor
    return {
        "transposed": tensor.T.contiguous().T,
        "columns of a wider one": padded[:, 2 : columns + 2],
        "every third row": apart[1::3],
        "off by three elements": flat[3:].reshape(rows, columns),
        "every second column": columns_apart[:, ::2],
    }


LAYOUTS = sorted(_layouts(torch.zeros(2, 2)))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hidden_and_weight_of_any_strides(dtype, which, layout, frozen, poisoned):
    case = oracle.random_case(70, 33, 300, dtype, bias=True)
    up = oracle.random_upstream(70)
    right = oracle.ours(case, *up, frozen=frozen)
    strided = replace(case, **{which: _layouts(getattr(case, which))[layout]})
    for mine, other in zip(oracle.ours(strided, *up, frozen=frozen), right, strict=True):
        oracle.assert_same_bits(mine, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_hidden_and_weight_of_any_strides_in_one_pass(which, layout, poisoned):
    case = oracle.random_case(70, 34, 300, torch.bfloat16)
    batch, loss = oracle.policy_batch(case), grpo(beta=0.1, entropy_coef=0.01)

    def run(case):
        hidden = case.hidden.detach().requires_grad_()
        weight = case.weight.detach().requires_grad_()
        out = linear_policy_loss(hidden[None], weight, batch, loss).loss
        return out.detach(), *torch.autograd.grad(out, (hidden, weight))

    strided = replace(case, **{which: _layouts(getattr(case, which))[layout]})
    for mine, other in zip(run(strided), run(case), strict=True):
        oracle.assert_same_bits(mine, other)


def test_an_expanded_weight_and_an_expanded_hidden():
    case = oracle.random_case(6, 5, 9, torch.float64)
    up = oracle.random_upstream(6)
    case = replace(case, hidden=case.hidden[:1].expand(6, 5), weight=case.weight[:1].expand(9, 5))
    # Entries that are all alike: nothing moves hidden, and the truth there is 0.
    for mine, other in zip(oracle.ours(case, *up)[:4], oracle.exact(case, *up), strict=False):
        assert (mine - other).abs().max() < 1e-13


def test_a_bias_of_any_strides():
    case = oracle.random_case(6, 5, 9, bias=True)
    up = oracle.random_upstream(6)
    strided = replace(case, bias=torch.stack([case.bias, case.bias * torch.nan], 1)[:, 0])
    for mine, other in zip(oracle.ours(strided, *up), oracle.ours(case, *up), strict=True):
        oracle.assert_same_bits(mine, other)


@pytest.mark.parametrize("kind", ["expanded", "strided", "transposed"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_upstream_gradients_of_any_strides(frozen, kind):
    case = oracle.random_case(12, 5, 9)
    up = {
        "expanded": torch.tensor(0.7).expand(3, 4),
        "strided": torch.randn(3, 8)[:, ::2],
        "transposed": torch.randn(4, 3).T,
    }[kind]

    def run(dlogprobs, dentropy):
        hidden = case.hidden.reshape(3, 4, 5).requires_grad_()
        weight = case.weight.detach().requires_grad_(not frozen)
        stats = linear_logprobs(hidden, weight, case.labels.reshape(3, 4))
        leaves = (hidden,) if frozen else (hidden, weight)
        return torch.autograd.grad(tuple(stats), leaves, (dlogprobs, dentropy))

    plain = up.contiguous().clone()
    for mine, other in zip(run(up, up), run(plain, plain), strict=True):
        oracle.assert_same_bits(mine, other)


@pytest.mark.parametrize("unused", ["logprobs", "entropy"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_an_output_that_is_not_used_counts_as_a_gradient_of_zeros(frozen, unused):
    case = oracle.random_case(12, 5, 9)
    g, zeros = torch.randn(12), torch.zeros(12)
    right = oracle.ours(case, *((zeros, g) if unused == "logprobs" else (g, zeros)), frozen)
    hidden = case.hidden.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_(not frozen)
    logprobs, entropy = linear_logprobs(hidden, weight, case.labels)
    (entropy if unused == "logprobs" else logprobs).backward(g)
    oracle.assert_same_bits(hidden.grad, right.dhidden)
    oracle.assert_same_bits(weight.grad, right.dweight)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_per_token_weights_of_which_the_first_is_0(frozen):
    case = oracle.random_case(12, 5, 9, torch.float64)
    for up in (
        (torch.arange(12.0), torch.zeros(12)),
        (torch.zeros(12), torch.arange(12.0)),
        (torch.arange(12.0), torch.arange(12.0).flip(0)),
    ):
        got, right = oracle.ours(case, *up, frozen=frozen), oracle.exact(case, *up)
        for mine, other in zip(got, right, strict=True):
            assert mine is None or oracle.relative_error(mine, other) < 1e-13


# Shapes and sizes


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (1, 3, 2)], ids=str)
def test_any_leading_shape(shape, frozen):
    hidden = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=not frozen)
    labels = torch.randint(9, shape)
    logprobs, entropy = linear_logprobs(hidden, weight, labels)
    assert logprobs.shape == entropy.shape == shape
    logp = torch.log_softmax(hidden @ weight.T, -1)
    right = logp.gather(-1, labels[..., None])[..., 0]
    assert oracle.relative_error(logprobs, right) < 1e-13
    assert oracle.relative_error(entropy, -(logp.exp() * logp).sum(-1)) < 1e-13
    leaves = (hidden,) if frozen else (hidden, weight)
    got, exact = (torch.autograd.grad(x.sum(), leaves) for x in (logprobs, right))
    for mine, other in zip(got, exact, strict=True):
        assert oracle.relative_error(mine, other) < 1e-13


def _loss_and_gradients(way, labels, mask=None):
    hidden = torch.randn(*labels.shape, 6, requires_grad=True)
    weight = torch.randn(10, 6, requires_grad=way != "frozen")
    bias = torch.randn(10, requires_grad=way != "frozen")
    head = LMHead(weight, bias)
    if way == "one_pass":
        batch = TokenBatch.padded(
            labels,
            torch.zeros_like(labels) if mask is None else mask,
            torch.ones(labels.shape[0]),
            ref_logprobs=torch.full(labels.shape, torch.nan),
            old_logprobs=torch.full(labels.shape, -torch.inf),
        )
        loss, metrics = linear_policy_loss(hidden, head, batch, grpo(beta=0.1, entropy_coef=0.1))
        assert all(m.isfinite() for m in metrics.values())
    else:
        stats = linear_logprobs(hidden, head, labels)
        assert not stats.logprobs.any() and not stats.entropy.any()
        loss = (stats.logprobs + stats.entropy).sum()
    loss.backward()
    return loss, hidden, weight, bias


@pytest.mark.parametrize("way", ["trained", "frozen", "one_pass"])
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (2, 3)], ids=str)
def test_no_tokens_or_all_of_them_ignored_give_zeros_attached_to_the_graph(shape, way, poisoned):
    loss, hidden, weight, bias = _loss_and_gradients(way, torch.full(shape, IGNORED))
    assert float(loss.detach()) == 0.0
    assert hidden.grad.shape == (*shape, 6) and not hidden.grad.any()
    if way == "frozen":
        assert weight.grad is None and bias.grad is None
    else:
        assert weight.grad.shape == (10, 6) and not weight.grad.any()
        assert bias.grad.shape == (10,) and not bias.grad.any()


@pytest.mark.parametrize("way", ["no_grad", "from_logits"])
def test_no_tokens_without_gradients(way):
    stats = _call(way, torch.zeros(0, dtype=torch.int64))
    assert stats.logprobs.shape == stats.entropy.shape == (0,)


@pytest.mark.parametrize("H", [1, 2, 3, 63, 64, 65, 129])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_width(dtype, H, poisoned):
    case = oracle.random_case(19, H, 131, dtype, logit_std=2.0)
    up = oracle.random_upstream(19)
    oracle.assert_result_no_worse(
        oracle.ours(case, *up), oracle.eager(case, *up), oracle.exact(case, *up), roundings=2
    )


@pytest.mark.parametrize("N", [1, 15, 16, 17, 63, 64, 65, 129])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_number_of_tokens(dtype, N, poisoned):
    case = oracle.random_case(N, 24, 131, dtype, logit_std=2.0)
    up = oracle.random_upstream(N)
    oracle.assert_result_no_worse(
        oracle.ours(case, *up), oracle.eager(case, *up), oracle.exact(case, *up), roundings=2
    )


@pytest.mark.parametrize("way", ["trained", "frozen"])
def test_one_token_and_one_entry(way):
    # One entry has probability 1: log-prob 0, entropy 0, and nothing to learn.
    hidden = torch.randn(1, 1, requires_grad=True)
    weight = torch.randn(1, 1, requires_grad=way == "trained")
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0]))
    assert float(logprobs.detach()) == 0.0 and float(entropy.detach()) == 0.0
    (logprobs + entropy).sum().backward()
    assert float(hidden.grad) == 0.0
    assert way == "frozen" or float(weight.grad) == 0.0


# Sizes beyond 2^31 elements


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_more_than_2_to_31_logits(frozen):
    N, H, V = 16400, 2, 131_072
    assert N * V > 2**31
    case = oracle.random_case(N, H, V, logit_std=3.0)
    case.labels[-1] = V - 1
    with torch.no_grad():
        stats = linear_logprobs(case.hidden, case.weight, case.labels)
    up = oracle.random_upstream(N)
    got = oracle.ours(case, *up, frozen=frozen)
    rows = torch.tensor([0, 1, 4095, 4096, 8191, 8192, 16383, 16384, 16398, 16399])
    right = oracle.exact(case.rows(rows), *(g[rows] for g in up))
    for name in ("logprobs", "entropy", "dhidden"):
        mine, other = getattr(got, name)[rows], getattr(right, name)
        assert oracle.relative_error(mine, other) < 2e-6
    oracle.assert_same_bits(stats.logprobs[rows], got.logprobs[rows])
    if frozen:
        return
    entries = torch.tensor([0, 1, 65_535, 65_536, V - 2, V - 1])
    hidden, g, h = case.hidden.double(), *(t[:, None] for t in up)
    z = hidden @ case.weight.double().T[:, entries]
    own = hidden.mul(case.weight.double()[case.labels]).sum(1) - got.logprobs
    logp = z - own[:, None]
    dz = g * ((case.labels[:, None] == entries).double() - logp.exp())
    dz -= h * logp.exp() * (logp + got.entropy[:, None])
    assert oracle.relative_error(got.dweight[entries], dz.T @ hidden) < 2e-6


@pytest.mark.slow
def test_a_chunk_of_more_than_2_to_31_logits():
    N, V = 16400, 131_072
    case = oracle.random_case(N, 2, V, logit_std=3.0)
    case.labels[-1] = V - 1
    up = torch.randn(N), torch.zeros(N)
    whole = oracle.ours(case, *up, frozen=True, chunk_bytes=2**34)
    parts = oracle.ours(case, *up, frozen=True)
    oracle.assert_equal_rows(whole.logprobs, parts.logprobs, torch.float32)
    assert oracle.relative_error(whole.dhidden, parts.dhidden.double()) < 1e-6


@pytest.mark.slow
def test_logits_that_lie_more_than_2_to_31_elements_apart():
    # Memory that is reserved and, but for three rows, never touched.
    V, stride = 1000, 2**30 + 12_345
    rows = torch.empty(2 * stride + V + 1000, dtype=torch.bfloat16).as_strided((3, V), (stride, 1))
    values = torch.randn(3, V).bfloat16()
    rows.copy_(values)
    labels = torch.tensor([0, 500, 999])
    got, right = logprobs_from_logits(rows, labels), logprobs_from_logits(values, labels)
    oracle.assert_same_bits(got.logprobs, right.logprobs)
    oracle.assert_same_bits(got.entropy, right.entropy)


@pytest.mark.slow
def test_more_than_2_to_31_given_logits_and_their_gradients():
    N, V = 16400, 131_072
    logits = torch.empty(N, V, dtype=torch.bfloat16)
    labels, live = torch.full((N,), IGNORED), torch.tensor([0, 16383, 16384, N - 1])
    values = torch.randn(4, V).bfloat16()
    logits[live], labels[live] = values, torch.tensor([0, 5, 6, V - 1])
    logits.requires_grad_()
    stats = logprobs_from_logits(logits, labels)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    leaf = values.clone().requires_grad_()
    right = logprobs_from_logits(leaf, labels[live])
    (right.logprobs.sum() + right.entropy.sum()).backward()
    oracle.assert_same_bits(stats.logprobs[live].detach(), right.logprobs.detach())
    oracle.assert_same_bits(logits.grad[live], leaf.grad)
    assert not logits.grad[[1, 16382, 16385, N - 2]].any()


# Errors


H6, W10, Y4 = torch.zeros(4, 6), torch.zeros(10, 6), torch.zeros(4, dtype=torch.int64)
BATCH = TokenBatch.packed(Y4, torch.tensor([0, 4]), torch.ones(1))
ERRORS = {
    "hidden is no tensor": (
        lambda: linear_logprobs([[1.0]], W10, Y4),
        "hidden must be a torch.Tensor, got list",
    ),
    "hidden is of integers": (
        lambda: linear_logprobs(H6.long(), W10, Y4),
        "hidden must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "hidden and labels disagree": (
        lambda: linear_logprobs(H6, W10, Y4[:3]),
        "hidden must be [*labels.shape, D], got hidden [4, 6] and labels [3]",
    ),
    "hidden has no width": (
        lambda: linear_logprobs(torch.tensor(1.0), W10, Y4[0]),
        "hidden must be [*labels.shape, D], got hidden [] and labels []",
    ),
    "hidden and weight disagree": (
        lambda: linear_logprobs(H6, W10[:, :5], Y4),
        "hidden and weight must agree in H, got hidden [4, 6] and weight [10, 5]",
    ),
    "hidden is elsewhere": (
        lambda: linear_logprobs(H6.to("meta"), W10, Y4),
        "all tensors must be on one device, got hidden on meta, weight on cpu, labels on cpu",
    ),
    "weight is elsewhere": (
        lambda: linear_logprobs(H6, W10.to("meta"), Y4),
        "all tensors must be on one device, got hidden on cpu, weight on meta",
    ),
    "temperature is elsewhere": (
        lambda: linear_logprobs(H6, W10, Y4, temperature=torch.ones(4, device="meta")),
        "all tensors must be on one device, got temperature on meta, labels on cpu",
    ),
    "labels are floats": (
        lambda: linear_logprobs(H6, W10, Y4.float()),
        "labels must be an int64 or int32 tensor, got torch.float32",
    ),
    "labels are a list": (
        lambda: linear_logprobs(H6, W10, [0, 1, 2, 3]),
        "labels must be an int64 or int32 tensor, got list",
    ),
    "weight is of one dimension": (
        lambda: linear_logprobs(H6, W10[0], Y4),
        "weight must be [V, H] with elements, got [6]",
    ),
    "weight was not gathered": (
        lambda: linear_logprobs(H6, torch.zeros(0), Y4),
        "weight must be [V, H] with elements, got [0]; a sharded parameter must be gathered first",
    ),
    "weight has no rows": (
        lambda: linear_logprobs(H6, torch.zeros(0, 6), Y4),
        "weight must be [V, H] with elements, got [0, 6]",
    ),
    "weight is of integers": (
        lambda: linear_logprobs(H6, W10.to(torch.int8), Y4),
        "weight must be float16, bfloat16, float32 or float64, got torch.int8",
    ),
    "bias is of another size": (
        lambda: linear_logprobs(H6, LMHead(W10, torch.zeros(9)), Y4),
        "bias must be [V] = [10], got [9]",
    ),
    "bias is of integers": (
        lambda: linear_logprobs(H6, LMHead(W10, torch.zeros(10).long()), Y4),
        "bias must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "scale is infinite": (
        lambda: LMHead(W10, scale=float("inf")),
        "scale must be finite, got inf",
    ),
    "softcap is 0": (
        lambda: LMHead(W10, softcap=0.0),
        "softcap must be positive or None, got 0.0",
    ),
    "temperature is 0": (
        lambda: linear_logprobs(H6, W10, Y4, temperature=0.0),
        "temperature must be positive, got 0.0",
    ),
    "temperature is nan": (
        lambda: linear_logprobs(H6, W10, Y4, temperature=float("nan")),
        "temperature must be positive, got nan",
    ),
    "temperature of one token is negative": (
        lambda: linear_logprobs(H6, W10, Y4, temperature=torch.tensor([1.0, 1.0, -2.0, 1.0])),
        "temperature[2] is -2, and a temperature must be positive",
    ),
    "temperature does not broadcast": (
        lambda: linear_logprobs(H6, W10, Y4, temperature=torch.ones(3)),
        "temperature must broadcast to labels, got temperature [3] and labels [4]",
    ),
    "temperature wants a gradient": (
        lambda: linear_logprobs(H6, W10, Y4, temperature=torch.ones(4, requires_grad=True)),
        "temperature gets no gradient here, but the tensor requires one: detach it",
    ),
    "chunk_bytes is 0": (
        lambda: linear_logprobs(H6, W10, Y4, chunk_bytes=0),
        "chunk_bytes must be positive, got 0",
    ),
    "chunk_bytes of the loss is negative": (
        lambda: linear_policy_loss(H6, W10, BATCH, grpo(), chunk_bytes=-1),
        "chunk_bytes must be positive, got -1",
    ),
    "hidden of the loss is of another shape": (
        lambda: linear_policy_loss(H6[None], W10, BATCH, grpo()),
        "hidden must be [*labels.shape, D], got hidden [1, 4, 6] and labels [4]",
    ),
    "logits are of integers": (
        lambda: logprobs_from_logits(W10.long(), Y4),
        "logits must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "logits and labels disagree": (
        lambda: logprobs_from_logits(W10, Y4),
        "logits must be [*labels.shape, D], got logits [10, 6] and labels [4]",
    ),
    "logits have no vocabulary": (
        lambda: logprobs_from_logits(torch.zeros(4, 0), Y4),
        "logits have no vocabulary, got [4, 0]",
    ),
    "labels of logits are floats": (
        lambda: logprobs_from_logits(H6, Y4.double()),
        "labels must be an int64 or int32 tensor, got torch.float64",
    ),
    "temperature of logits is negative": (
        lambda: logprobs_from_logits(H6, Y4, temperature=-0.5),
        "temperature must be positive, got -0.5",
    ),
    "temperature of one token of logits is 0": (
        lambda: logprobs_from_logits(H6, Y4, temperature=torch.tensor([1.0, 0.0, 1.0, 1.0])),
        "temperature[1] is 0, and a temperature must be positive",
    ),
}


@pytest.mark.parametrize("mistake", ERRORS)
def test_a_mistake_is_a_value_error_that_names_it(mistake):
    call, message = ERRORS[mistake]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("way", ["trained", "frozen", "one_pass", "from_logits"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_a_temperature_of_one_token_that_is_not_positive_raises(way, wrong):
    temperature = torch.tensor([1.0, 1.0, wrong, 1.0])
    with pytest.raises(ValueError, match=r"temperature\[2\] is .*must be positive"):
        _call(way, torch.tensor([1, 2, 3, 4]), temperature=temperature)


def test_the_reference_agrees_that_the_index_is_of_the_token_among_all(poisoned):
    hidden, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([5, IGNORED, 2])
    got = linear_logprobs(hidden, weight, labels)
    right = reference.linear_logprobs(
        hidden[[0, 2]], weight, None, labels[[0, 2]], torch.ones(2), 1.0, 0.0
    )
    assert oracle.relative_error(got.logprobs[[0, 2]], right[0]) < 1e-14
    assert float(got.logprobs[1]) == 0.0

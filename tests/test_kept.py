"""Log-probs renormalised over the kept entries: against float64, by property, as operators."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import EVERYTHING, FLOATS, IGNORED, Case
from torch import Tensor

from fused_rl import LMHead, linear_kept_logprobs, linear_logprobs, ops, reference
from fused_rl.linear import KeptStats
from fused_rl.ops import kept as kept_ops
from fused_rl.ops import kept_sets
from fused_rl.ops.record import Known, Limits, Needs

pytestmark = pytest.mark.usefixtures("poisoned")

PLAIN_CHUNK = 2**14
NAMES = ("logprobs", "entropy", "kept_logprobs", "dhidden", "dweight", "dbias")


def packed(sets: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0] + [len(s) for s in sets])
    return torch.cat([*sets, torch.zeros(0)]).long(), lengths.cumsum(0)


def random_sets(case: Case, most: int) -> tuple[Tensor, Tensor]:
    """The label and up to most - 1 other entries, in any order; ignored tokens have garbage."""
    V, sets = case.weight.shape[0], []
    for label in case.labels:
        entries = torch.randperm(V)[: int(torch.randint(most, ()))]
        if label == IGNORED:
            sets.append(entries * 1000 - 5)
            continue
        entries = torch.cat([entries[entries != label], label[None]])
        sets.append(entries[torch.randperm(len(entries))])
    return packed(sets)


class Plain(torch.autograd.Function):
    """What serves devices without a kernel."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *rest):
        *of_head, ignore_index, chunk_bytes = (hidden, weight, bias, *rest)
        ctx.args = (ops.KeptHead(*of_head), Limits(ignore_index, chunk_bytes))
        stats = kept_ops.linear_kept_logprobs.plain(*ctx.args)
        ctx.known = (Known(stats.lse, stats.entropy), kept_ops.Slope(stats.slope))
        return stats.logprobs, stats.entropy, stats.kept_logprobs

    @staticmethod
    def backward(ctx, *upstream):
        needs = ctx.needs_input_grad[:3]
        args = (kept_ops.KeptUpstream(*upstream), *ctx.args, *ctx.known, Needs(*needs))
        grads = kept_ops.linear_kept_logprobs_backward.plain(*args)
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*wanted, *(None,) * 9)


def fused(case: Case, kept: Tensor, cu_kept: Tensor):
    def stats(hidden, weight, bias):
        head = LMHead(weight, bias, case.scale, case.softcap)
        return linear_kept_logprobs(
            hidden, head, case.labels, kept, cu_kept, temperature=case.temperature
        )

    return stats


def plain(case: Case, kept: Tensor, cu_kept: Tensor, chunk_bytes: int = PLAIN_CHUNK):
    def stats(hidden, weight, bias):
        t = case.temperature.to(reference.acc_dtype(hidden, weight))
        head = (case.labels, kept, cu_kept, t, case.scale, case.softcap or 0.0, 0)
        return KeptStats(*Plain.apply(hidden, weight, bias, *head, IGNORED, chunk_bytes))

    return stats


WAYS = {"fused": fused, "plain": plain}


def from_logits(logits, case: Case, kept: Tensor, cu_kept: Tensor):
    """The statistics by reference.py from logits at temperature 1; ignored tokens left out."""
    rows = (case.labels != IGNORED).nonzero()[:, 0]
    sets = [kept[cu_kept[n] : cu_kept[n + 1]] for n in rows]

    def stats(hidden, weight, bias):
        z = logits(hidden, weight, bias)[rows]
        z = (z if z.dtype == torch.float64 else z.float()) / case.temperature[rows, None].to(
            torch.float64 if z.dtype == torch.float64 else torch.float32
        )
        logprobs, entropy, *_ = reference.statistics(z, case.labels[rows])
        three = (logprobs, entropy, reference.kept_logprobs(z, case.labels[rows], *packed(sets)))
        return KeptStats(*(z.new_zeros(len(case.labels)).index_put((rows,), x) for x in three))

    return stats


def exact(case: Case, kept: Tensor, cu_kept: Tensor):
    def logits(hidden, weight, bias):
        ones = torch.ones(len(hidden), dtype=torch.float64)
        return reference.logits(hidden, weight, bias, ones, case.scale, case.softcap or 0.0)

    return from_logits(logits, case, kept, cu_kept)


def eager(case: Case, kept: Tensor, cu_kept: Tensor):
    def logits(hidden, weight, bias):
        z = F.linear(hidden, weight, bias) * case.scale
        return torch.tanh(z / case.softcap) * case.softcap if case.softcap else z

    return from_logits(logits, case, kept, cu_kept)


def differentiated(stats, case: Case, up, dtype=None, trained=(True, True, True)) -> list:
    """The three statistics, then dhidden, dweight, dbias; None for what is not trained."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(train)
        for t, train in zip((case.hidden, case.weight, case.bias), trained, strict=True)
    ]
    out = stats(*leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, [g.to(out[0].dtype) for g in up]))
    return [x.detach() for x in out] + [
        next(grads) if t is not None and t.requires_grad else None for t in leaves
    ]


def upstream(N: int, which: str = "all") -> list[Tensor]:
    up = [torch.randn(N, dtype=torch.float64) for _ in range(3)]
    if which == "kept":
        up[0], up[1] = torch.zeros(N), torch.zeros(N)
    return up


def assert_no_worse(got, torch_same, right, roundings: int = 2) -> None:
    for name, mine, theirs, truth in zip(NAMES, got, torch_same, right, strict=True):
        if mine is None:
            continue
        granted = roundings if name.startswith("d") else 0
        try:
            oracle.assert_no_worse(mine, theirs, truth, summed_in=got[0].dtype, roundings=granted)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# Numbers


@pytest.mark.parametrize("which", ["all", "kept"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 65), (70, 24, 1100)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients_are_no_worse_than_those_of_torch(dtype, shape, features, way, which):
    N, _, V = shape
    case = oracle.random_case(
        *shape, dtype, ignored=N // 6, **(EVERYTHING if features == "everything" else {})
    )
    sets, up = random_sets(case, min(V, 40)), upstream(N, which)
    assert_no_worse(
        differentiated(WAYS[way](case, *sets), case, up),
        differentiated(eager(case, *sets), case, up),
        differentiated(exact(case, *sets), case, up, torch.float64),
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_tokens_with_a_gradient_over_the_whole_vocabulary(dtype, features, way):
    """Beside others that look at their kept entries, and some without any gradient."""
    case = oracle.random_case(
        *(70, 24, 1100), dtype, ignored=5, **(EVERYTHING if features == "everything" else {})
    )
    sets, up = random_sets(case, 9), upstream(70)
    up[0][torch.arange(70) % 9 > 0] = up[1][torch.arange(70) % 9 > 0] = 0
    up[2][::3] = 0
    assert_no_worse(
        differentiated(WAYS[way](case, *sets), case, up),
        differentiated(eager(case, *sets), case, up),
        differentiated(exact(case, *sets), case, up, torch.float64),
    )


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, 1)])
@pytest.mark.parametrize("which", ["all", "kept"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_some_of_the_inputs_are_those_of_all(way, which, trained):
    trained = tuple(bool(t) for t in trained)
    case = oracle.random_case(20, 12, 300, **EVERYTHING)
    sets, up = random_sets(case, 20), upstream(20, which)
    whole = differentiated(WAYS[way](case, *sets), case, up)
    for mine, other in zip(
        differentiated(WAYS[way](case, *sets), case, up, trained=trained), whole, strict=True
    ):
        assert mine is None or torch.equal(mine, other)


@pytest.mark.parametrize("of_weight", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_hidden", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["all", "kept"])
@pytest.mark.parametrize("way", WAYS)
def test_mixed_dtypes_and_weights_that_are_not_contiguous(way, which, of_hidden, of_weight):
    case = oracle.random_case(19, 24, 300, of_hidden, weight_dtype=of_weight, bias=True)
    case = replace(case, weight=case.weight.T.contiguous().T)
    sets, up = random_sets(case, 20), upstream(19, which)
    got = differentiated(WAYS[way](case, *sets), case, up)
    right = differentiated(exact(case, *sets), case, up, torch.float64)
    assert [t.dtype for t in got[3:]] == [of_hidden, of_weight, of_weight]
    for mine, truth in zip(got, right, strict=True):
        slack = 2 * torch.finfo(mine.dtype).eps
        assert oracle.relative_error(mine, truth) <= max(slack, 2e-6)


def test_by_hand():
    # Logits 0, log 2, log 5, log 9 of which the first three are kept: the label has 5 / 8.
    weight = torch.tensor([[1.0], [2.0], [5.0], [9.0]], dtype=torch.float64).log()
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    got = linear_kept_logprobs(
        hidden, weight, torch.tensor([2]), torch.tensor([1, 2, 0]), torch.tensor([0, 3])
    )
    assert got.kept_logprobs.item() == pytest.approx(math.log(5 / 8), rel=1e-14)
    assert got.logprobs.item() == pytest.approx(math.log(5 / 17), rel=1e-14)
    got.kept_logprobs.sum().backward()
    slope = math.log(5) - (2 / 8 * math.log(2) + 5 / 8 * math.log(5))
    assert hidden.grad.item() == pytest.approx(slope, rel=1e-14)


@pytest.mark.parametrize("output", ["kept_logprobs", "all"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", ["plain", "everything"])
def test_gradcheck(features, way, output):
    case = oracle.random_case(
        6, 5, 300, torch.float64, ignored=1, **(EVERYTHING if features == "everything" else {})
    )
    stats = WAYS[way](case, *random_sets(case, 5))

    def function(*leaves):
        three = stats(*leaves)
        return tuple(three) if output == "all" else three.kept_logprobs

    leaves = (case.hidden, case.weight, case.bias)
    inputs = [None if t is None else t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


# Properties


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_logprobs_and_entropy_are_those_of_linear_logprobs_to_the_bit(dtype, way):
    case = oracle.random_case(70, 24, 700, dtype, ignored=3, **EVERYTHING)
    up = upstream(70)
    up[2] = torch.zeros(70)
    got = differentiated(WAYS[way](case, *random_sets(case, 20)), case, up)
    options = {"chunk_bytes": PLAIN_CHUNK} if way == "plain" else {}
    right = oracle.ours(case, *up[:2], **options)
    for mine, other in zip(got[:2] + got[3:], right, strict=True):
        oracle.assert_same_bits(mine, other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_whole_vocabulary_as_kept_set_gives_logprobs(dtype, way):
    case = oracle.random_case(20, 24, 300, dtype, **EVERYTHING)
    sets, zeros = packed([torch.randperm(300) for _ in range(20)]), torch.zeros(20)
    g = torch.randn(20)
    as_kept = differentiated(WAYS[way](case, *sets), case, (zeros, zeros, g))
    as_logprobs = differentiated(WAYS[way](case, *sets), case, (g, zeros, zeros))
    assert oracle.relative_error(as_kept[2], as_logprobs[0]) <= (
        1e-14 if dtype == torch.float64 else 1e-6
    )
    for mine, other in zip(as_kept[3:], as_logprobs[3:], strict=True):
        assert oracle.relative_error(mine, other) <= max(2 * torch.finfo(mine.dtype).eps, 2e-6)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_minus_one_alone_is_the_whole_vocabulary(output):
    """Values to the bit, gradients by gradcheck; beside it, a set of one entry is one."""
    case = oracle.random_case(4, 3, 70, torch.float64, ignored=1, **EVERYTHING)
    y = case.labels
    sets = packed([torch.tensor([-1, -1]), torch.tensor([-1]), y[2:3], torch.tensor([y[3], 0, 5])])

    def stats(hidden, weight, bias):
        return fused(case, *sets)(hidden, weight, bias)

    leaves = [t.detach().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    found = stats(*leaves)
    assert found.kept_logprobs[1] == found.logprobs[1] < 0
    assert found.kept_logprobs[2] == 0
    assert torch.autograd.gradcheck(lambda *args: stats(*args)[output], leaves)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_label_alone_as_kept_set_gives_zero_and_no_gradient(dtype, way):
    case = oracle.random_case(70, 24, 300, dtype, **EVERYTHING)
    got = differentiated(WAYS[way](case, case.labels, torch.arange(71)), case, upstream(70, "kept"))
    for exact_zero in got[2:]:
        assert not exact_zero.any()


@pytest.mark.parametrize("way", WAYS)
def test_smaller_sets_give_greater_logprobs_and_probabilities_of_a_set_add_up_to_one(way):
    entries = torch.randperm(300)[:40]
    case = oracle.random_case(40, 16, 300, torch.bfloat16, logit_std=3.0)
    case = replace(case, hidden=case.hidden[:1].expand(40, 16), labels=entries)
    leaves = (case.hidden, case.weight, case.bias)
    large = WAYS[way](case, *packed([entries] * 40))(*leaves)
    assert float(large.kept_logprobs.double().exp().sum()) == pytest.approx(1.0, abs=1e-6)
    nested = packed([entries[: n + 1] for n in range(40)])
    small = WAYS[way](case, *nested)(*leaves)
    assert (large.logprobs < large.kept_logprobs).all() and (small.kept_logprobs <= 0).all()
    assert (large.kept_logprobs <= small.kept_logprobs + 1e-6).all()
    # The mass of the kept set is one number for all its entries.
    mass = (large.logprobs - large.kept_logprobs).exp()
    assert float(mass.std()) < 1e-6


@pytest.mark.parametrize("which", ["all", "kept"])
@pytest.mark.parametrize("way", WAYS)
def test_nan_at_ignored_tokens_and_whatever_they_keep_reach_nothing(way, which):
    case = oracle.random_case(40, 8, 300, bias=True, ignored=7)
    kept, cu_kept = random_sets(case, 20)
    up = upstream(40, which)
    right = differentiated(WAYS[way](case, kept, cu_kept), case, up)
    case.hidden[:7] = torch.nan
    case.temperature[:7] = torch.nan
    kept[: cu_kept[7]] = -(2**62)
    for g in up:
        g[:7] = torch.nan
    got = differentiated(WAYS[way](case, kept, cu_kept), case, up)
    for mine, clean in zip(got, right, strict=True):
        oracle.assert_same_bits(mine, clean)
    assert not any(x[:7].any() for x in got[:4])


@pytest.mark.parametrize("which", ["all", "kept"])
@pytest.mark.parametrize("way", WAYS)
def test_nan_in_one_hidden_row_poisons_that_row_only(way, which):
    case = oracle.random_case(40, 8, 300, bias=True)
    sets, up = random_sets(case, 20), upstream(40, which)
    right = differentiated(WAYS[way](case, *sets), case, up)
    case.hidden[5, 3] = torch.nan
    got = differentiated(WAYS[way](case, *sets), case, up)
    others = torch.arange(40) != 5
    for mine, clean in zip(got[:4], right[:4], strict=True):
        assert mine[5].isnan().any()
        oracle.assert_same_bits(mine[others], clean[others])
    for g in up:
        g[5] = 0.0
    for t in differentiated(WAYS[way](case, *sets), case, up)[3:]:
        assert t.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_a_kept_word_whose_bias_is_minus_infinity_takes_no_part(way):
    case = oracle.random_case(9, 8, 300, bias=True)
    case.bias[::3] = -torch.inf
    case = replace(case, labels=torch.randint(99, (9,)) * 3 + 1)
    sets = random_sets(case, 30)
    got = differentiated(WAYS[way](case, *sets), case, upstream(9, "kept"))
    allowed = [s[s % 3 != 0] for s in sets[0].split(sets[1].diff().tolist())]
    torch.manual_seed(7)
    right = WAYS[way](case, *packed(allowed))(case.hidden, case.weight, case.bias)
    assert oracle.relative_error(got[2], right.kept_logprobs) < 1e-6
    assert all(t.isfinite().all() for t in got) and not got[5][::3].any()


@pytest.mark.parametrize("way", WAYS)
def test_huge_logits_are_finite_and_right(way):
    case = oracle.random_case(20, 16, 300, logit_std=1e4)
    sets, up = random_sets(case, 30), upstream(20)
    assert_no_worse(
        differentiated(WAYS[way](case, *sets), case, up),
        differentiated(eager(case, *sets), case, up),
        differentiated(exact(case, *sets), case, up, torch.float64),
    )


@pytest.mark.parametrize("ignored", [0, 4], ids=["no tokens", "all ignored"])
@pytest.mark.parametrize("way", WAYS)
def test_without_counted_tokens_gradients_are_zeros(way, ignored):
    case = oracle.random_case(ignored, 8, 30, bias=True, ignored=ignored)
    sets = packed([torch.zeros(0)] * ignored)
    got = differentiated(WAYS[way](case, *sets), case, upstream(ignored))
    assert got[0].shape == (ignored,) and not any(t.any() for t in got)
    assert [t.shape for t in got[3:]] == [(ignored, 8), (30, 8), (30,)]


@pytest.mark.parametrize("which", ["all", "kept"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_run_to_run_and_on_any_number_of_threads(dtype, way, which, threads):
    case = oracle.random_case(150, 72, 1500, dtype, **EVERYTHING)
    sets, up = random_sets(case, 40), upstream(150, which)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(differentiated(WAYS[way](case, *sets), case, up))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            oracle.assert_same_bits(a, b)


@pytest.mark.parametrize("which", ["all", "kept"])
@pytest.mark.parametrize("chunk_bytes", [1, 700, 2**20])
def test_plain_results_do_not_depend_on_chunk_bytes(chunk_bytes, which):
    case = oracle.random_case(20, 12, 300, torch.float64, **EVERYTHING)
    sets, up = random_sets(case, 30), upstream(20, which)
    whole = differentiated(plain(case, *sets), case, up)
    got = differentiated(plain(case, *sets, chunk_bytes), case, up)
    for mine, other in zip(got, whole, strict=True):
        assert oracle.relative_error(mine, other) < 1e-14


def test_more_tokens_than_one_pass_of_the_backward_takes():
    case = oracle.random_case(4200, 3, 700, bias=True)
    sets, up = random_sets(case, 8), upstream(4200)
    assert_no_worse(
        differentiated(fused(case, *sets), case, up),
        differentiated(eager(case, *sets), case, up),
        differentiated(exact(case, *sets), case, up, torch.float64),
    )


@pytest.mark.parametrize("of_sets", [torch.int64, torch.int32], ids=str)
def test_leading_shapes_and_int32(of_sets):
    case = oracle.random_case(21, 8, 300, ignored=2)
    kept, cu_kept = random_sets(case, 9)
    flat = linear_kept_logprobs(case.hidden, case.weight, case.labels, kept, cu_kept)
    shaped = linear_kept_logprobs(
        case.hidden.reshape(3, 7, 8),
        case.weight,
        case.labels.reshape(3, 7).to(of_sets),
        kept.to(of_sets),
        cu_kept.to(of_sets),
    )
    for a, b in zip(flat, shaped, strict=True):
        assert b.shape == (3, 7) and torch.equal(a, b.flatten())


def test_losses_take_kept_logprobs_and_inputs_stay_as_they_are():
    case = oracle.random_case(30, 8, 300)
    kept, cu_kept = random_sets(case, 9)
    before = [t.clone() for t in (case.hidden, case.weight, kept, cu_kept)]
    hidden = case.hidden.requires_grad_()
    stats = linear_kept_logprobs(hidden, case.weight, case.labels, kept, cu_kept)
    ratio = (stats.kept_logprobs - stats.kept_logprobs.detach()).exp()
    (grad,) = torch.autograd.grad(ratio.sum(), hidden, create_graph=True)
    with torch.no_grad():
        same = linear_logprobs(hidden, case.weight, case.labels)
    assert torch.equal(same.logprobs, stats.logprobs) and grad.abs().sum() > 0
    for t, old in zip((hidden, case.weight, kept, cu_kept), before, strict=True):
        assert torch.equal(t, old)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), hidden)


# Errors

# Three tokens, of which the second is ignored; entries 0 .. 9.
LABELS, KEPT, OFFSETS = [4, IGNORED, 7], [4, 5, -3, 7, 7000, 7, 8, 9], [0, 2, 5, 8]
MISTAKES = {
    "an entry too large": (
        LABELS,
        [4, 10, *KEPT[2:]],
        OFFSETS,
        r"kept\[1\] is 10, outside .*\[0, 10",
    ),
    "a negative entry": (LABELS, [*KEPT[:7], -1], OFFSETS, r"kept\[7\] is -1, outside"),
    "an entry twice": (LABELS, [*KEPT[:7], 7], OFFSETS, r"kept\[7\] is 7, twice .* of token 2"),
    "a label that is not kept": ([4, IGNORED, 6], KEPT, OFFSETS, r"labels\[2\] is 6, which is not"),
    "an empty set": (LABELS, KEPT, [0, 0, 5, 8], r"set of token 0 is empty, and labels\[0\] is 4"),
    "a label outside": ([10, IGNORED, 7], KEPT, OFFSETS, r"labels\[0\] is 10, outside"),
    "falling offsets": (LABELS, KEPT, [0, 6, 5, 8], r"cu_kept\[2\] is 5, below cu_kept\[1\].* 6"),
    "offsets from 1": (LABELS, KEPT, [1, 2, 5, 8], r"cu_kept\[0\] is 1, and must be 0"),
    "offsets too short": (LABELS, KEPT, [0, 2, 5, 7], r"cu_kept\[3\] is 7, .* length of kept, 8"),
}


def _mistaken(name: str) -> tuple[Case, Tensor, Tensor]:
    labels, kept, offsets, _ = MISTAKES[name]
    case = replace(oracle.random_case(3, 4, 10, bias=True), labels=torch.tensor(labels))
    return case, torch.tensor(kept), torch.tensor(offsets)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_sets_raise_and_name_index_and_value(name, way):
    case, *sets = _mistaken(name)
    with pytest.raises(ValueError, match=MISTAKES[name][-1]):
        WAYS[way](case, *sets)(case.hidden, case.weight, case.bias)


@pytest.mark.parametrize("name", sorted(set(MISTAKES) - {"a label outside"}))
def test_where_nobody_may_look_mistakes_give_nan_for_their_token(name, monkeypatch):
    """As on CUDA, where looking would wait for the device."""
    monkeypatch.setattr(kept_sets, "check_sets", lambda *_: None)
    monkeypatch.setattr(kept_ops, "check_offsets", lambda *_: None)
    case, *sets = _mistaken(name)
    _, _, kept_logprobs, dhidden, *_ = differentiated(plain(case, *sets), case, [torch.ones(3)] * 3)
    wrong = {"an empty set": [0], "an entry too large": [0]}.get(name, [2])
    if "offsets" in name:
        wrong = [0, 2]
        assert dhidden.isnan().any()
    elif name != "an empty set":
        assert dhidden[wrong].isnan().all()
    assert kept_logprobs.isnan().nonzero()[:, 0].tolist() == wrong
    assert kept_logprobs[1] == 0 and dhidden[1].isfinite().all()


@pytest.mark.parametrize(
    ("kept", "cu_kept", "message"),
    [
        (torch.zeros(8), torch.tensor(OFFSETS), "kept must be an int64 or int32 tensor, got torch"),
        (KEPT, torch.tensor(OFFSETS), "kept must be an int64 or int32 tensor, got list"),
        (torch.tensor([KEPT]), torch.tensor(OFFSETS), r"kept must be \[M\], got \[1, 8\]"),
        (torch.tensor(KEPT), torch.ones(4), "cu_kept must be an int64 or int32 tensor"),
        (torch.tensor(KEPT), torch.tensor(3), r"cu_kept must be \[N \+ 1\], got \[\]"),
        (torch.tensor(KEPT), torch.tensor([0, 8]), r"\[N \+ 1\] = \[4\], got cu_kept \[2\]"),
    ],
)
def test_sets_of_another_form_raise(kept, cu_kept, message):
    case = oracle.random_case(3, 4, 10)
    with pytest.raises(ValueError, match=message):
        linear_kept_logprobs(case.hidden, case.weight, torch.tensor(LABELS), kept, cu_kept)


# As torch sees it


def _samples(dtype, bias=True):
    case = oracle.random_case(7, 6, 300, dtype, **{**EVERYTHING, "bias": bias}, ignored=2)
    t = case.temperature.to(reference.acc_dtype(case.hidden))
    rest = (case.labels, *random_sets(case, 5), t, 0.7, 3.0, 1, IGNORED, 2**20)
    return (case.hidden, case.weight, case.bias, *rest)


STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(dtype):
    for bias in (True, False):
        args = _samples(dtype, bias)
        torch.library.opcheck(kept_ops.linear_kept_logprobs.op, args, test_utils=STATIC)
        leaves = [None if t is None else t.clone().requires_grad_() for t in args[:3]]
        torch.library.opcheck(
            kept_ops.linear_kept_logprobs.op, (*leaves, *args[3:]), test_utils=STATIC
        )
        _, entropy, lse, _, slope = kept_ops.linear_kept_logprobs.op(*args)
        for dense in (torch.randn(7).to(entropy), torch.zeros_like(entropy)):
            for need in (True, False):
                torch.library.opcheck(
                    kept_ops.linear_kept_logprobs_backward.op,
                    (
                        *(dense, dense.clone(), torch.randn(7).to(entropy), *args),
                        *(lse, entropy, slope, need, not need, bias and need),
                    ),
                    test_utils=STATIC,
                )


def test_opcheck_of_gradients_under_aot_dispatch():
    args = _samples(torch.float32)
    leaves = [t.clone().requires_grad_() for t in args[:3]]
    torch.library.opcheck(
        kept_ops.linear_kept_logprobs.op,
        (*leaves, *args[3:]),
        test_utils="test_aot_dispatch_dynamic",
    )


@pytest.mark.parametrize("which", ["all", "kept"])
def test_compiled_equals_eager(which):
    torch._dynamo.reset()

    def loss(hidden, weight, bias, labels, kept, cu_kept, g):
        head = LMHead(weight, bias, 0.7, 3.0)
        stats = linear_kept_logprobs(hidden, head, labels, kept, cu_kept, temperature=0.9)
        value = (stats.kept_logprobs * g).sum()
        return value + (stats.logprobs - stats.entropy).sum() if which == "all" else value

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (5, 12, 40):
        case = oracle.random_case(N, 6, 300, bias=True)
        rest = (case.labels, *random_sets(case, 9), torch.randn(N))
        results = []
        for call in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
            value = call(*leaves, *rest)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for a, b in zip(*results, strict=True):
            assert oracle.relative_error(a, b) < 1e-6
    torch._dynamo.reset()


MEMORY = """
import sys
sys.path.insert(0, {tests!r})
import torch, test_kept, oracle
from fused_rl.bench.clock import process_bytes

def run(N, V):
    case = oracle.random_case(N, 8, V)
    sets = (torch.stack([case.labels, (case.labels + 1) % V], 1).flatten(), torch.arange(N + 1) * 2)
    for way in test_kept.WAYS.values():
        for which in ("all", "kept"):
            test_kept.differentiated(way(case, *sets), case, test_kept.upstream(N, which))

run(64, 1000)
before = process_bytes("VmHWM")
run(3000, 50000)
print(process_bytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_not_that_of_the_logits():
    code = MEMORY.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3000 * 50000 * 4 / 4

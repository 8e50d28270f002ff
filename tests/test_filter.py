"""grad_filter: exactly what it says is left out, and nothing else."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from oracle import EVERYTHING, FLOATS, IGNORED

from fused_rl import LMHead, grpo, linear_logprobs, linear_policy_loss
from fused_rl.checks import grad_filter_is_possible
from fused_rl.ops.filtered import (
    FILTER_ROWS,
    Filter,
    Peaks,
    linear_filtered_logprobs,
    linear_filtered_logprobs_backward,
)
from fused_rl.ops.record import Head, Known, Limits, Needs, Upstream

N, H, V = 70, 34, 3 * FILTER_ROWS + 41
FILTER = 1e-3
NAMES = ("dhidden", "dweight", "dbias")
# A softcap that leaves peaks.
FEATURES = {**EVERYTHING, "softcap": 60.0}


def peaked_case(dtype, **features):
    """Logits of standard deviation 14: most groups of most tokens have no entry of weight."""
    case = oracle.random_case(N, H, V, dtype, logit_std=14.0, **features)
    case.labels[::9] = IGNORED
    return case


def leaves_of(case):
    leaves = (case.hidden, case.weight, case.bias)
    return [None if t is None else t.detach().clone().requires_grad_() for t in leaves]


def filtered_gradients(case, dlogprobs, dentropy, grad_filter):
    hidden, weight, bias = leaves_of(case)
    head = LMHead(weight, bias, case.scale, case.softcap)
    stats = linear_logprobs(
        hidden, head, case.labels, temperature=case.temperature, grad_filter=grad_filter
    )
    up = (dlogprobs.to(stats.logprobs.dtype), dentropy.to(stats.logprobs.dtype))
    wanted = [t for t in (hidden, weight, bias) if t is not None]
    return stats, torch.autograd.grad(stats, wanted, up)


def by_definition(case, dlogprobs, dentropy, grad_filter):
    """In float64, with the whole [N, V] at hand; and the share of pairs that is left out."""
    wide = [None if t is None else t.double() for t in (case.hidden, case.weight, case.bias)]
    raw = wide[0] @ wide[1].T
    raw = raw if wide[2] is None else raw + wide[2]
    raw.requires_grad_()
    z = raw * case.scale
    if case.softcap:
        z = case.softcap * torch.tanh(z / case.softcap)
    logp = torch.log_softmax(z / case.temperature.double()[:, None], -1)
    counted = case.labels != IGNORED
    labels = case.labels.where(counted, 0)
    picked = logp.gather(1, labels[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    value = (dlogprobs * picked + dentropy * entropy)[counted].sum()
    (draw,) = torch.autograd.grad(value, raw)
    likely = torch.stack([part.amax(1) for part in logp.detach().split(FILTER_ROWS, 1)], 1)
    kept = likely >= math.log(grad_filter)
    kept[torch.arange(N), labels // FILTER_ROWS] = True
    draw = draw * kept.repeat_interleave(FILTER_ROWS, 1)[:, :V]
    found = [draw @ wide[1], draw.T @ wide[0]] + ([] if wide[2] is None else [draw.sum(0)])
    return found, 1 - kept.double().mean().item()


@pytest.mark.parametrize("features", [{}, FEATURES], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_are_those_of_the_pairs_that_take_part(dtype, features):
    torch.manual_seed(0)
    case = peaked_case(dtype, **features)
    up = oracle.random_upstream(N)
    _, got = filtered_gradients(case, *up, FILTER)
    want, left_out = by_definition(case, *up, FILTER)
    assert left_out > 0.1
    allowed = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    for name, mine, right in zip(NAMES, got, want, strict=False):
        assert oracle.relative_error(mine, right) < allowed, name
    exact = oracle.exact(case, *up)
    assert oracle.relative_error(got[0], exact.dhidden) > 1e-6  # it is an approximation


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_filter_that_nothing_falls_under_changes_nothing(dtype):
    torch.manual_seed(1)
    case = peaked_case(dtype, **FEATURES)
    up = oracle.random_upstream(N)
    stats, got = filtered_gradients(case, *up, 1e-300)
    plain, want = filtered_gradients(case, *up, None)
    few = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for mine, right in zip(stats, plain, strict=True):
        torch.testing.assert_close(mine, right, rtol=few, atol=few * 8)
    for name, mine, right in zip(NAMES, got, want, strict=True):
        assert oracle.relative_error(mine, right) < max(2e-6, torch.finfo(dtype).eps / 2), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_native_kernel_does_what_the_plain_one_does(dtype):
    torch.manual_seed(2)
    case = peaked_case(dtype, **FEATURES)
    wide = torch.promote_types(dtype, torch.float32)
    tokens = (case.labels, case.temperature.to(wide))
    head = Head(case.hidden, case.weight, case.bias, *tokens, case.scale, case.softcap)
    args = (head, Limits(IGNORED, 2**20), Filter(FILTER))
    plain = linear_filtered_logprobs.plain(*args)
    native = linear_filtered_logprobs(*args)
    for mine, right in zip(native, plain, strict=True):
        double = dtype == torch.float64
        torch.testing.assert_close(
            mine, right, rtol=1e-12 if double else 1e-5, atol=1e-11 if double else 1e-4
        )
    # A logit of 60 is known to 60 roundings; what is rounded to a half type loses more by that.
    roundings = 64 if dtype in (torch.float32, torch.float64) else 2
    upstream = Upstream(*(g.to(wide) for g in oracle.random_upstream(N)))
    known = (Known(plain.lse, plain.entropy), Peaks(plain.peaks))
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        call = (upstream, *args, *known, Needs(*needs))
        both = zip(
            linear_filtered_logprobs_backward(*call),
            linear_filtered_logprobs_backward.plain(*call),
            needs,
            strict=True,
        )
        for mine, right, need in both:
            assert mine.shape == right.shape and mine.dtype == right.dtype
            error = oracle.relative_error(mine, right) if need else 0.0
            assert error < roundings * torch.finfo(dtype).eps


def test_nan_reaches_the_gradient():
    torch.manual_seed(3)
    case = peaked_case(torch.float32)
    case.hidden[5, 3] = torch.nan
    assert case.labels[5] != IGNORED
    _, (dhidden, dweight) = filtered_gradients(case, *oracle.random_upstream(N), FILTER)
    assert dhidden[5].isnan().all() and not dhidden[6].isnan().any()
    assert dweight.isnan().all()


def test_groups_that_no_token_reaches_have_a_gradient_of_zero():
    torch.manual_seed(4)
    case = peaked_case(torch.bfloat16, bias=True)
    case.bias[FILTER_ROWS : 2 * FILTER_ROWS] = -200.0
    case.labels.remainder_(FILTER_ROWS)
    _, (_, dweight, dbias) = filtered_gradients(case, *oracle.random_upstream(N), FILTER)
    group = slice(FILTER_ROWS, 2 * FILTER_ROWS)
    assert (dweight[group] == 0).all() and (dbias[group] == 0).all()
    assert (dweight[:FILTER_ROWS] != 0).any()


def test_only_ignored_tokens():
    case = peaked_case(torch.float32, bias=True)
    case.labels[:] = IGNORED
    stats, grads = filtered_gradients(case, *oracle.random_upstream(N), FILTER)
    assert all((t == 0).all() for t in (*stats, *grads))


def test_same_bits_on_one_thread_and_on_two():
    torch.manual_seed(5)
    case = peaked_case(torch.bfloat16, **FEATURES)
    up = oracle.random_upstream(N)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stats, grads = filtered_gradients(case, *up, FILTER)
            found.append((*stats, *grads))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(dtype):
    torch.manual_seed(9)
    case = peaked_case(dtype, **FEATURES)
    up = oracle.random_upstream(N)
    stats, (dhidden, *_) = filtered_gradients(case, *up, FILTER)
    for rows in ([1], [64], list(range(20, 37))):
        rows = torch.tensor(rows)
        part, (mine, *_) = filtered_gradients(case.rows(rows), *(g[rows] for g in up), FILTER)
        for a, b in zip((*part, mine), (*stats, dhidden), strict=True):
            oracle.assert_equal_rows(a, b[rows], dtype)


def test_a_weight_that_is_not_contiguous():
    """Its gradient is, as from the operator without a filter, with a kernel and without."""
    torch.manual_seed(10)
    case = peaked_case(torch.float32)
    weight = case.weight.T.contiguous().T
    up = Upstream(*(g.float() for g in oracle.random_upstream(N)))
    head = Head(case.hidden, weight, None, case.labels, case.temperature, 1.0, 0.0)
    args = (head, Limits(IGNORED, 2**20), Filter(FILTER))
    stats = linear_filtered_logprobs(*args)
    known = (Known(stats.lse, stats.entropy), Peaks(stats.peaks))
    op, call = linear_filtered_logprobs_backward, (up, *args, *known, Needs(True, True, False))
    found = (op(*call), op.plain(*call))
    for mine, plain in zip(*found, strict=True):
        assert mine.is_contiguous() and plain.is_contiguous()
        assert oracle.relative_error(mine, plain) < 1e-5


@pytest.mark.parametrize("trained", [True, False])
def test_a_policy_loss_takes_it(trained):
    torch.manual_seed(6)
    case = peaked_case(torch.float32)
    rows = (case.labels != IGNORED).nonzero()[:, 0]
    case = case.rows(rows)
    batch = oracle.policy_batch(case)
    case = replace(case, hidden=case.hidden[None])
    found = []
    for way in ("loss", "by hand"):
        hidden, weight, _ = leaves_of(case)
        weight.requires_grad_(trained)
        if way == "loss":
            output = linear_policy_loss(hidden, weight, batch, grpo(beta=0.1), grad_filter=FILTER)
        else:
            stats = linear_logprobs(hidden[0], weight, batch.labels, grad_filter=FILTER)
            output = grpo(beta=0.1)(stats, batch)
        output.loss.backward()
        found.append((hidden.grad, weight.grad) if trained else (hidden.grad,))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_gradient_no_filter():
    case = peaked_case(torch.float32)
    with torch.no_grad():
        plain = linear_logprobs(case.hidden, case.weight, case.labels)
        stats = linear_logprobs(case.hidden, case.weight, case.labels, grad_filter=FILTER)
    assert all(torch.equal(a, b) for a, b in zip(stats, plain, strict=True))


@pytest.mark.parametrize("value", [-1e-3, 0.0, 1.0, math.nan])
def test_a_filter_is_a_probability(value):
    case = peaked_case(torch.float32)
    with pytest.raises(ValueError, match=r"grad_filter must be within \(0, 1\), got"):
        linear_logprobs(case.hidden, case.weight, case.labels, grad_filter=value)


def test_cuda_is_refused():
    with pytest.raises(ValueError, match="grad_filter has kernels for CPUs only"):
        grad_filter_is_possible(FILTER, torch.device("cuda"))
    grad_filter_is_possible(None, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    torch.manual_seed(7)
    case = oracle.random_case(7, 6, FILTER_ROWS + 5, dtype, **FEATURES)
    leaves = leaves_of(case)
    transform = (case.temperature.float(), case.scale, case.softcap, 0)
    args = (case.labels, *transform, IGNORED, 2**20, FILTER)
    torch.library.opcheck(linear_filtered_logprobs.op, (*leaves, *args))
    plain = [t.detach() for t in leaves]
    logprobs, entropy, lse, _, peaks = linear_filtered_logprobs.op(*plain, *args)
    call = (torch.ones_like(logprobs), entropy, *plain, *args, lse, entropy, peaks)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(linear_filtered_logprobs_backward.op, (*call, *needs))


def test_compiles_in_one_graph():
    torch.manual_seed(8)
    case = peaked_case(torch.float32)

    def step(hidden, weight):
        stats = linear_logprobs(hidden, weight, case.labels, grad_filter=FILTER)
        return stats.logprobs.sum() + stats.entropy.sum()

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight, _ = leaves_of(case)
        found.append(torch.autograd.grad(run(hidden, weight), (hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_the_comparison_runs(tmp_path):
    """bench/grad_filter.py on a model that is hardly trained: nothing is peaked, all are kept."""
    script = Path(__file__).parents[1] / "bench" / "grad_filter.py"
    options = ["--steps", "2", "--text", "2000", "--tokens", "64", "--rounds", "1"]
    paths = ["--checkpoint", str(tmp_path / "model.pt"), "--out", str(tmp_path / "filter.json")]
    options += ["--temperatures", "1.0,0.01", *paths]
    subprocess.run([sys.executable, str(script), *options], check=True)
    _, exact, *_, fine = json.loads((tmp_path / "filter.json").read_text())["records"][:6]
    assert exact["way"] == "exact" and exact["dhidden_error"] < 1e-2
    assert fine["way"] == "1.0e-05" and fine["probability_left_out"] < 1e-2

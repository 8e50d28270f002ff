"""The slower paths: each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_rl import ops

TESTS = Path(__file__).parent

# Values and gradients of everything there is, against float64.
CHECK = """
import sys
sys.path.insert(0, {tests!r})
import oracle, torch
import fused_rl
from fused_rl import KL, LMHead, grpo, kl_penalty, linear_policy_loss, logprobs_from_logits

torch.manual_seed(0)
loss = grpo(beta=0.1, entropy_coef=0.01)

def policy(case, batch, hidden, weight, bias):
    head = LMHead(weight, bias, case.scale, case.softcap)
    args = (hidden.reshape(2, -1, hidden.shape[1]), head, batch, loss)
    temperature = case.temperature.reshape(2, -1)
    return linear_policy_loss(*args, temperature=temperature, chunk_bytes=20 * 300 * 8).loss

def policy_by_reference(case, batch, *leaves):
    temperature = case.temperature.double()
    stats = fused_rl.reference.linear_logprobs(
        *leaves, case.labels, temperature, case.scale, case.softcap or 0.0
    )[:2]
    return loss.objective(fused_rl.TokenStats(*stats), batch)

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for features in ({{}}, oracle.EVERYTHING):
        case = oracle.random_case(70, 33, 300, dtype, logit_std=3.0, ignored=4, **features)
        up = oracle.random_upstream(70)
        eager, exact = oracle.eager(case, *up), oracle.exact(case, *up)
        for frozen in (False, True):
            got = oracle.ours(case, *up, frozen=frozen, chunk_bytes=20 * 300 * 8)
            oracle.assert_result_no_worse(got, eager, exact, roundings=2)

        case = case.rows(torch.arange(10, 70))
        batch = oracle.policy_batch(case)
        batch = fused_rl.losses.batch.replace(batch, shape=torch.Size((2, 30)))
        leaves = (case.hidden, case.weight, case.bias)
        wide = [None if t is None else t.double().requires_grad_() for t in leaves]
        leaves = [None if t is None else t.requires_grad_() for t in leaves]
        value, right = policy(case, batch, *leaves), policy_by_reference(case, batch, *wide)
        assert oracle.relative_error(value, right) < 1e-5
        value.backward()
        right.backward()
        for mine, other in zip(leaves, wide):
            if mine is not None:
                error = oracle.relative_error(mine.grad, other.grad)
                allowed = {{torch.float64: 1e-13, torch.float32: 1e-5}}
                assert error <= allowed.get(dtype, 2 * torch.finfo(dtype).eps), error

    logits, labels = torch.randn(9, 300).to(dtype).requires_grad_(), torch.randint(300, (9,))
    wide = logits.detach().double().requires_grad_()
    stats = logprobs_from_logits(logits, labels, temperature=0.7)
    right = fused_rl.reference.logits_logprobs(wide, labels, torch.full((9,), 0.7).double())
    for mine, other in zip(stats, right):
        assert oracle.relative_error(mine.detach(), other.detach()) < 2e-6
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    (right[0].sum() + right[1].sum()).backward()
    assert oracle.relative_error(logits.grad, wide.grad) <= torch.finfo(dtype).eps + 2e-6

# Under autocast the operands are bfloat16, as F.linear's are, and the logits are not.
for frozen in (False, True):
    leaves = [torch.randn(*shape).requires_grad_() for shape in ((40, 16), (90, 16))]
    leaves[1].requires_grad_(not frozen)
    labels = torch.randint(90, (40,))
    rounded = [t.detach().bfloat16().double().requires_grad_(t.requires_grad) for t in leaves]
    exact = fused_rl.linear_logprobs(*rounded, labels).logprobs
    wanted = [t for t in leaves if t.requires_grad]
    true = torch.autograd.grad(exact.sum(), [t for t in rounded if t.requires_grad])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = fused_rl.linear_logprobs(*leaves, labels)
        assert (stats.logprobs.double() - exact).abs().max() < 1e-5
        for mine, other in zip(torch.autograd.grad(stats.logprobs.sum(), wanted), true):
            assert oracle.relative_error(mine, other) < 6e-3

d = torch.linspace(-3, 3, 101).requires_grad_()
kl = kl_penalty(d, torch.zeros(101), value=KL.K3, grad=KL.K2)
assert oracle.relative_error(kl.detach(), torch.expm1(-d.detach().double()) + d.detach()) < 1e-6
kl.sum().backward()
assert torch.equal(d.grad, d.detach())

hidden, weight = torch.randn(2, 6), torch.randn(11, 6)
for label in (11, -1):
    for trained in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        try:
            fused_rl.linear_logprobs(*leaves, torch.tensor([0, label]))
        except ValueError as error:
            assert f"labels[1] is {{label}}, outside the vocabulary [0, 11)" in str(error)
        else:
            raise AssertionError("no error")
print("cpu:", *fused_rl.backends()[0])
"""
CHECK = CHECK.format(tests=str(TESTS))

WITHOUT_LIBRARY = """
import importlib.resources, pathlib
importlib.resources.files = lambda package: pathlib.Path("/nonexistent")
"""


def _run(script, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


needs_native = pytest.mark.skipif(
    ops.native_missing is not None, reason="the C++ library is not installed"
)


@needs_native
def test_a_cpu_without_bf16_products():
    out = _run(CHECK, ONEDNN_MAX_CPU_ISA="AVX512_CORE")
    assert "cpu: cpu C++" in out
    assert "bfloat16 runs as float32" in out


@needs_native
def test_a_cpu_without_avx512_products():
    out = _run(CHECK, ONEDNN_MAX_CPU_ISA="AVX2")
    assert "bfloat16 runs as float32" in out


def test_an_installation_without_the_library_runs_through_the_reference_and_says_so():
    out = _run(WITHOUT_LIBRARY + CHECK)
    assert "cpu: cpu reference (plain torch) the C++ library was not built" in out
    assert "compiler" in out and "pip install" in out


# Memory


PEAK = """
import sys
import torch
import fused_rl
from fused_rl import TokenBatch, grpo, linear_logprobs, linear_policy_loss
from fused_rl.bench.clock import peak_extra_bytes

def batch_of(N):
    labels = torch.arange(N)[None]
    return TokenBatch.padded(labels, torch.ones_like(labels), torch.ones(1))

def step(hidden, weight):
    if sys.argv[1] == "no_grad":
        with torch.no_grad():
            linear_logprobs(hidden[0], weight, torch.arange(hidden.shape[1]))
    else:
        batch = batch_of(hidden.shape[1])
        linear_policy_loss(hidden, weight, batch, grpo(entropy_coef=0.01)).loss.backward()

N, H, V = 2048, 896, 151_936
train = sys.argv[1] == "train"
warm = [torch.randn(s, dtype=torch.bfloat16).requires_grad_(train) for s in ((1, 64, H), (2048, H))]
step(*warm)
hidden = torch.randn(1, N, H, dtype=torch.bfloat16).requires_grad_(train)
weight = (torch.rand(V, H, dtype=torch.bfloat16) / 8).requires_grad_(train)
del warm
print("peak", peak_extra_bytes(lambda: step(hidden, weight), "cpu"))
"""


def _peak(way):
    return int(_run(PEAK, way).split("peak")[1])


on_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs"
)


@needs_native
@on_linux
def test_peak_memory_of_a_call_without_gradients_is_under_64_mib():
    assert _peak("no_grad") < 64 * 2**20


@needs_native
@on_linux
@pytest.mark.slow
def test_peak_memory_of_a_training_step_is_one_float32_dweight_its_copy_and_64_mib():
    elements = 151_936 * 896
    accumulator, copy = elements * 4, elements * torch.bfloat16.itemsize
    assert _peak("train") < accumulator + copy + 64 * 2**20

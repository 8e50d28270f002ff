"""The memory planner: sizes by hand, the ways that the library takes, and what is measured."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fused_rl import TokenBatch, grpo, linear_policy_loss, ops
from fused_rl.ops.record import Statistics
from fused_rl.plan.memory import head_shape, plan
from fused_rl.plan.report import readable

HEAD = {"hidden_size": 256, "vocab_size": 65536}
TOKENS = 512

# Prints bytes: of eager torch without and with gradient, of linear_logprobs without and with
# gradient, and of the one pass.
MEASURE = """
import json, sys
import torch
from fused_rl.bench.clock import peak_extra_bytes
from fused_rl.bench.peers import Case, batch_of, no_grad
from fused_rl.demo.comparison import plain_policy_loss
from fused_rl import TokenStats, grpo, linear_logprobs, linear_policy_loss

N, H, V, frozen = map(int, sys.argv[1:])
case = Case.make(N, H, V, torch.bfloat16)
batch, loss = batch_of(case), grpo()
hidden, weight = case.leaves(bool(frozen))

def through_autograd(hidden, weight, batch, loss):
    return loss(linear_logprobs(hidden, weight, batch.labels), batch)

def step(way, *shape):
    def run():
        value = way(hidden.reshape(*shape, -1), weight, batch, loss).loss
        return torch.autograd.grad(value, [t for t in (hidden, weight) if t.requires_grad])
    return run

ways = no_grad(case, ("eager",))
runs = {
    "eager torch, no gradient": ways["eager torch"],
    "linear_logprobs, no gradient": ways["fused_rl"],
    "eager torch": step(plain_policy_loss, N),
    "linear_logprobs": step(through_autograd, N),
    "linear_policy_loss": step(linear_policy_loss, *batch.shape),
}
for run in runs.values():
    run()
print(json.dumps({name: peak_extra_bytes(run, "cpu") for name, run in runs.items()}))
"""


def by_name(planned) -> dict:
    return {way.name: way for way in planned.ways}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_plan_is_what_is_measured(frozen):
    """Within a quarter, and 2 MiB for what the allocator and the threads keep."""
    head = {"hidden_size": 256, "vocab_size": 32768}
    sizes = [str(n) for n in (TOKENS, *head.values(), int(frozen))]
    # Pages of its own for every tensor, as in cases_plan.peak.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *sizes],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout)
    if None in measured.values():
        pytest.skip("this system does not tell the peak of a process")
    ways = by_name(plan(head, TOKENS, frozen=frozen))
    assert set(ways) == set(measured)
    for name, way in ways.items():
        assert abs(measured[name] - way.peak) <= way.peak / 4 + 2 * 2**20, (name, way, measured)


def test_sizes_by_hand():
    ways = by_name(plan(HEAD, TOKENS))
    N, H, V = TOKENS, 256, 65536
    assert ways["eager torch"].peak == 3 * N * V * 4
    in_half = "bfloat16" in ops.native.cpu_features()
    # Exponentials, and the largest logit of each block; or logits.
    per_token = 2 * V + 4 * V // 256 if in_half else 4 * V
    assert ways["linear_policy_loss"].phases["chunk"]["logits"] == N * per_token
    assert ways["linear_policy_loss"].phases["chunk"]["dweight"] == V * H * 2
    assert [way.nhv for way in ways.values()] == [2, 2, 6, 6 if in_half else 8, 6]
    assert ways["linear_policy_loss"].flop == 6 * N * H * V


def test_several_chunks_add_to_dweight_in_float32(monkeypatch):
    monkeypatch.setitem(ops.ONE_PASS_TOKENS, "cpu", 256)
    in_half = "bfloat16" in ops.native.cpu_features()
    planned = plan(HEAD, TOKENS, chunk_bytes=2**25 if in_half else 2**26)
    assert planned.chunks == [256, 256]
    one_pass = by_name(planned)["linear_policy_loss"]
    assert one_pass.phases["chunk"]["dweight"] == 65536 * 256 * 4
    assert one_pass.phases["narrow"]["dweight"] == 65536 * 256 * 6


def test_float16_gradients_wait_in_float32():
    one_pass = by_name(plan(HEAD, TOKENS, dtype=torch.float16))["linear_policy_loss"]
    assert one_pass.phases["chunk"]["dweight"] == 65536 * 256 * 4
    assert one_pass.phases["hand over"]["dweight"] == 65536 * 256 * 6


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_bytes", [None, 2**20, 2**23, 2**26])
def test_the_way_and_the_chunks_are_those_of_the_library(chunk_bytes, frozen, monkeypatch):
    """The operators are called, and form nothing."""
    planned = plan(HEAD, TOKENS, chunk_bytes=chunk_bytes, frozen=frozen)
    hidden = torch.zeros(1, TOKENS, 256).bfloat16().requires_grad_()
    weight = torch.zeros(()).bfloat16().expand(65536, 256)
    weight = weight if frozen else weight.requires_grad_()
    labels = torch.zeros(1, TOKENS, dtype=torch.int64)
    batch = TokenBatch.padded(labels, torch.ones_like(labels), torch.ones(1))
    sizes, whole = [], []

    def chunk(head, given):
        sizes.append(len(head.hidden))
        return *torch.zeros(4, len(head.hidden)), None

    def chunk_backward(logits, upstream, head, *rest):
        return head.hidden.detach() * 0

    def two_passes(head, limits):
        return Statistics(*torch.zeros(4, TOKENS))

    def walk(head, limits):
        whole.append(len(head.hidden))
        return Statistics(*torch.zeros(4, TOKENS))

    monkeypatch.setattr(ops, "linear_logprobs_chunk", chunk)
    monkeypatch.setattr(ops, "linear_logprobs_chunk_backward", chunk_backward)
    monkeypatch.setattr(ops, "linear_logprobs", two_passes)
    monkeypatch.setattr(ops, "linear_logprobs_frozen", walk)
    linear_policy_loss(hidden, weight, batch, grpo(), chunk_bytes=chunk_bytes)
    assert whole == [TOKENS] * frozen
    assert by_name(planned)["linear_policy_loss"].nhv == (4 if frozen else 6 if sizes else 8)
    assert sizes in ([], planned.chunks)
    assert sum(planned.chunks) == TOKENS
    assert planned.chunk_bytes == ops.scratch_bytes(hidden.device, chunk_bytes)


def test_cuda_is_planned_without_a_device():
    planned = plan(HEAD, 16384, device="cuda")
    assert planned.chunk_bytes == 2**30
    assert by_name(planned)["linear_logprobs"].phases["backward"]["logits"] == 2**30


def test_half_the_work_without_a_trained_head():
    ways = by_name(plan(HEAD, TOKENS, frozen=True))
    assert [way.nhv for way in ways.values()] == [2, 2, 4, 4, 4]
    assert all(
        "dweight" not in p or not p["dweight"] for w in ways.values() for p in w.phases.values()
    )


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 64, "vocab_size": 99},
        {"n_embd": 64, "vocab_size": 99},
        {"vocab_size": 99, "text_config": {"hidden_size": 64}},
        {"text_config": {"hidden_size": 64, "vocab_size": 99}, "vision_config": {"hidden_size": 1}},
    ],
)
def test_head_shape(config):
    assert head_shape(config) == (64, 99)


def test_mistakes():
    with pytest.raises(ValueError, match="hidden_size, got vocab_size"):
        head_shape({"vocab_size": 99})
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        plan(HEAD, 0)


def test_readable():
    assert [readable(n) for n in (2048, 3 * 2**20, 5 * 2**29)] == ["2 KiB", "3 MiB", "2.5 GiB"]

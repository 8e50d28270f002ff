"""Never worse than eager torch: every result, in every dtype, for any number of tokens, on every
instruction set that this CPU can be made to use.

A setting that asks for more than the CPU has changes nothing, and the results must hold as well.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import accuracy
import oracle
import pytest
import torch
from test_kept import Plain

from fused_rl import LMHead, linear_kept_logprobs, logprobs_from_logits, reference

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16", "float16")
# What rounding one float32 costs at most. Eager torch's own error moves by less between libraries.
ROUNDING = torch.finfo(torch.float32).eps / 2
# Gradients in half precision: both errors are mostly those of the same roundings, and which of the
# two is smaller by a few percent is luck.
LUCK = 1.1
INSTRUCTION_SETS = [
    {},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
]


def assert_never_worse(row: dict) -> None:
    for name in oracle.Result._fields:
        if name in row:
            ours, eager = row[name]
            title = f"{name} of {row['N']} tokens, {row['kind']}, {row['dtype']}"
            luck = LUCK if row["dtype"] != "float32" and name.startswith("d") else 1.0
            budget = luck * eager + ROUNDING
            assert ours <= budget, f"{title}: error {ours:.2e}, eager torch {eager:.2e}"


def in_a_child(dtypes, sizes, environment, H=32, V=96) -> list[dict]:
    known = {k: v for k, v in os.environ.items() if k not in set().union(*INSTRUCTION_SETS)}
    names = (",".join(dtypes), ",".join(map(str, sizes)), str(H), str(V))
    done = subprocess.run(
        [sys.executable, str(HERE / "accuracy.py"), *names],
        env={**known, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# Fewer than one step, a few, and more tokens than one pass of the backward takes.
@pytest.mark.parametrize("N", [64, 1000, 4200])
@pytest.mark.parametrize("kind", accuracy.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_never_worse_than_eager(dtype, kind, N):
    found = accuracy.errors(kind, N, 32, 96, getattr(torch, dtype))
    assert_never_worse({"dtype": dtype, "kind": kind, "N": N, **found})


def test_never_worse_than_eager_without_avx512():
    for row in in_a_child(("float32", "bfloat16"), (64, 4200), INSTRUCTION_SETS[-1]):
        assert_never_worse(row)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("environment", INSTRUCTION_SETS, ids=str)
def test_never_worse_than_eager_on_any_instruction_set(environment, dtype, capsys):
    sizes = (16, 64, 512, 2048, 16384, 65536)
    found = in_a_child((dtype,), sizes, environment, H=64, V=128)
    with capsys.disabled():
        for row in found:
            print(f"\n{row['dtype']:9}{row['kind']:12}{row['N']:6} {environment}", end="")
            for name in set(oracle.Result._fields) & set(row):
                print(f"  {name} {row[name][0]:.1e}/{row[name][1]:.1e}", end="")
    for row in found:
        assert_never_worse(row)


@pytest.mark.slow
def test_a_large_vocabulary_whose_weights_have_a_mean():
    found = accuracy.errors("weight mean", 70, 48, 131_072, torch.float32)
    assert_never_worse({"dtype": "float32", "kind": "weight mean", "N": 70, **found})


@pytest.mark.parametrize("std", [1.0, 4.0])
@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0])
def test_gradients_of_logits_where_one_entry_has_most_of_the_probability(shift, std):
    """A float32 sum that holds p = 1 loses the last digits of the entries that come after."""
    logits, labels = torch.randn(64, 3000) * std + shift, torch.randint(3000, (64,))
    up = torch.randn(2, 64)

    def gradient(way, dtype):
        z = logits.to(dtype).requires_grad_()
        stats = way(z)
        return torch.autograd.grad(stats[:2], z, list(up.to(dtype)))[0]

    def ours(z):
        return tuple(logprobs_from_logits(z, labels))

    def eager(z):
        return oracle.eager_statistics(z, labels, torch.ones(64))

    exact = gradient(lambda z: reference.statistics(z, labels), torch.float64)
    mine, theirs = (gradient(way, torch.float32) for way in (ours, eager))
    assert oracle.relative_error(mine, exact) <= oracle.relative_error(theirs, exact)


@pytest.mark.parametrize("way", ["kernel", "plain"])
def test_an_entry_in_every_kept_set(way):
    N, H, V = 20_000, 8, 200
    hidden, weight = 1 + 0.1 * torch.randn(N, H), torch.randn(V, H) / 3
    labels = torch.randint(1, V, (N,))
    kept = torch.stack([torch.zeros_like(labels), labels], 1).flatten()
    cu_kept = torch.arange(0, 2 * N + 1, 2)

    def gradients(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        bias = torch.zeros(V, dtype=dtype, requires_grad=True)
        if dtype == torch.float64:
            z = leaves[0] @ leaves[1].T + bias
            value = reference.kept_logprobs(z, labels, kept, cu_kept)
        else:
            value = of_kept(leaves, bias)
        return torch.autograd.grad(value.sum(), (*leaves, bias))

    def of_kept(leaves, bias):
        if way == "plain":
            head = (labels, kept, cu_kept, torch.ones(N), 1.0, 0.0, 0, -100, 2**20)
            return Plain.apply(*leaves, bias, *head)[2]
        return linear_kept_logprobs(leaves[0], LMHead(leaves[1], bias), labels, kept, cu_kept)[2]

    for mine, right in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert oracle.relative_error(mine, right) < 2 * ROUNDING

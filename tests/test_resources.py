"""What the C++ kernels take of the system: code compiled at run time."""

import os
import subprocess
import sys

import pytest

from fused_rl import ops

pytestmark = [
    pytest.mark.skipif(ops.native_missing is not None, reason="the C++ library is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

STEP = """
import torch
import fused_rl

def step(N, dtype, H=24, V=160):
    leaves = [torch.randn(n, H).to(dtype).requires_grad_() for n in (N, V)]
    labels = torch.arange(N) % V
    stats = fused_rl.linear_logprobs(*leaves, labels)
    return torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), leaves)
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STEP + script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode} {done.stdout} {done.stderr}"
    return done.stdout


COMPILED = """
import sys

def executable_bytes():
    # Mappings of no file that hold code.
    with open("/proc/self/maps") as maps:
        fields = [line.split() for line in maps]
    bounds = [f[0].split("-") for f in fields if "x" in f[1] and len(f) < 6]
    return sum(int(end, 16) - int(begin, 16) for begin, end in bounds)

dtype = getattr(torch, sys.argv[1])
for N in range(1, 513, 16):
    step(N, dtype)
before = executable_bytes()
for N in (*range(520, 4200, 240), 4200, 9000):
    step(N, dtype)
print("grown", executable_bytes() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_code_compiled_at_run_time_does_not_follow_the_number_of_tokens(dtype):
    assert int(run(COMPILED, dtype).split("grown")[1]) == 0

"""What the C++ kernels take of the system: code compiled at run time, and memory, if granted."""

import os
import shutil
import subprocess
import sys

import pytest

from fused_rl import ops

pytestmark = [
    pytest.mark.skipif(ops.native_missing is not None, reason="the C++ library is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, preloads a library"),
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


# From the moment that it is told to, refuses the n-th allocation with an alignment.
REFUSE = """
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

void *memalign(size_t alignment, size_t size);
static atomic_long left = -1;
void refuse(long n) { atomic_store(&left, n); }
long remaining(void) { return atomic_load(&left); }
static int refused(void) { return atomic_load(&left) >= 0 && atomic_fetch_sub(&left, 1) == 0; }

void *aligned_alloc(size_t alignment, size_t size) {
  return refused() ? NULL : memalign(alignment, size);
}
int posix_memalign(void **out, size_t alignment, size_t size) {
  *out = refused() ? NULL : memalign(alignment, size);
  return *out ? 0 : ENOMEM;
}
"""

REFUSED = """
import ctypes, sys
shim = ctypes.CDLL(sys.argv[1])
shim.refuse.argtypes, shim.remaining.restype = [ctypes.c_long], ctypes.c_long

def seeded(dtype):
    torch.manual_seed(0)
    return step(70, dtype)

for dtype in (torch.float32, torch.bfloat16):
    expected = seeded(dtype)
    for n in range(1000):
        shim.refuse(n)
        try:
            seeded(dtype)
        except (MemoryError, RuntimeError):
            shim.refuse(-1)
            continue
        finished = shim.remaining() >= 0
        shim.refuse(-1)
        if finished:
            break
    else:
        raise AssertionError("no end")
    assert all(torch.equal(a, b) for a, b in zip(seeded(dtype), expected))
    print("refused", n)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_memory_that_is_refused_is_an_error_and_no_crash(tmp_path):
    (tmp_path / "refuse.c").write_text(REFUSE)
    shim = str(tmp_path / "refuse.so")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", shim, str(tmp_path / "refuse.c")]
    subprocess.run(command, check=True)
    out = run(REFUSED, shim, LD_PRELOAD=shim)
    counts = [int(line.split()[1]) for line in out.splitlines() if line.startswith("refused")]
    # There was something to refuse, among it the buffers of the kernels' threads.
    assert len(counts) == 2 and min(counts) > 10

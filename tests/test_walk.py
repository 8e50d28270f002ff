"""The one walk of the C++ kernels for a frozen head, and how their threads share a pass."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_rl import LMHead, linear_logprobs, ops
from fused_rl.bench.clock import peak_extra_bytes

pytestmark = pytest.mark.skipif(
    ops.native_missing is not None, reason="the C++ library is not installed"
)

IGNORED = -100
# What one rounding of every product's operand, and of the result, may cost.
BOUNDS = {torch.bfloat16: 2**-7, torch.float32: 2e-6, torch.float64: 1e-13}


def walked(hidden, weight, labels, *, bias=None, temperature=None, scale=1.0, softcap=0.0):
    if temperature is None:
        temperature = torch.ones(len(labels))
    head = ops.Head(hidden, weight, bias, labels, temperature, scale, softcap)
    return ops.linear_logprobs_frozen(head, ops.Limits(IGNORED, 2**28))


def exactly(hidden, weight, labels, *, bias=None, temperature=None, scale=1.0, softcap=0.0):
    """d logprobs / d hidden in float64."""
    x = hidden.double().requires_grad_()
    z = x @ weight.double().T
    z = (z if bias is None else z + bias.double()) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z if temperature is None else z / temperature.double()[:, None]
    logprobs = z.log_softmax(-1).gather(1, labels[:, None]).sum()
    return torch.autograd.grad(logprobs, x)[0]


def drawn(N, H, V, dtype, *, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator) * size
    weight = torch.randn(V, H, generator=generator) / H**0.5
    labels = torch.randint(0, V, (N,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels


def assert_near(unit, exact, dtype, uncertainty=1.0):
    """Each token against its own size: a token of great certainty has a small gradient, of which
    1 - p, its uncertainty, is known to some roundings of the accumulators.
    """
    error = (unit.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    known = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / uncertainty
    assert (error < BOUNDS[dtype] + known).all(), (error / (BOUNDS[dtype] + known)).max()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("N", "H", "V"), [(1, 1, 3), (33, 33, 1025), (70, 96, 5001), (2085, 40, 1300), (31, 300, 2048)]
)
def test_the_unit_is_the_gradient_of_the_logprob(N, H, V, dtype):
    hidden, weight, labels = drawn(N, H, V, dtype)
    given = {"temperature": torch.linspace(0.5, 2, N), "scale": 0.7, "softcap": 3.0}
    assert_near(walked(hidden, weight, labels).unit, exactly(hidden, weight, labels), dtype)
    capped = walked(hidden, weight, labels, **given).unit
    assert_near(capped, exactly(hidden, weight, labels, **given), dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("downwards", [False, True])
def test_super_blocks_of_very_different_logits_add_up(dtype, downwards):
    """References change from block to block and from super-block to super-block."""
    hidden, weight, labels = drawn(40, 64, 4000, dtype)
    bias = torch.linspace(-60, 60, 4000).flip(0) if downwards else torch.linspace(-60, 60, 4000)
    assert_near(
        walked(hidden, weight, labels, bias=bias).unit,
        exactly(hidden, weight, labels, bias=bias),
        dtype,
    )


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_label_of_great_certainty_keeps_its_small_gradient(dtype):
    """1 - p of the label is 1e-2 to 1e-5; the rounding of p to bfloat16 is 4e-3."""
    hidden, weight, _ = drawn(40, 64, 3000, dtype)
    weight[:40] = torch.nn.functional.normalize(hidden.float(), dim=-1).to(dtype) * 2
    labels = torch.arange(40)
    exact = exactly(hidden, weight, labels)
    far = walked(hidden, weight, labels)
    uncertainty = -torch.expm1(far.logprobs.double())
    assert (uncertainty < 1e-3).any() and (uncertainty > 0).all()
    assert_near(far.unit, exact, dtype, uncertainty)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e12, 1e30])
def test_logits_as_large_as_they_come(size):
    """One of them has all the probability, or those that tie share it."""
    hidden, weight, _ = drawn(20, 16, 2500, torch.float32)
    weight[2100] = weight[7]
    z = (hidden.double() * size) @ weight.double().T
    labels = z.argmin(-1)
    unit = walked(hidden * size, weight, labels).unit
    expected = weight.double()[labels] - z.softmax(-1) @ weight.double()
    torch.testing.assert_close(unit.double(), expected, rtol=1e-4, atol=1e-5)


def test_excluded_entries_and_a_row_without_any():
    hidden, weight, labels = drawn(20, 16, 1500, torch.float32)
    bias = torch.zeros(1500)
    bias[200:1400] = -torch.inf
    labels = labels % 200
    weight[200:1400] = 1e6
    kept = torch.cat([torch.arange(200), torch.arange(1400, 1500)])
    found = walked(hidden, weight, labels, bias=bias).unit
    torch.testing.assert_close(found, walked(hidden, weight[kept], labels).unit)
    assert walked(hidden, weight, labels, bias=torch.full((1500,), -torch.inf)).unit.isnan().all()


def test_nan_stays_with_its_token():
    hidden, weight, labels = drawn(40, 16, 1500, torch.bfloat16)
    clean = walked(hidden, weight, labels).unit
    hidden[3, 5] = torch.nan
    unit = walked(hidden, weight, labels).unit
    assert unit[3].isnan().all()
    others = torch.arange(40) != 3
    assert torch.equal(unit[others], clean[others])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_bits_follow_neither_threads_nor_neighbours_nor_the_gradient(dtype):
    hidden, weight, labels = drawn(2100, 40, 3000, dtype)
    bias = torch.linspace(-40, 40, 3000)
    all_threads = torch.get_num_threads()
    whole = walked(hidden, weight, labels, bias=bias)
    try:
        for threads in (1, 2, 4, 8):
            torch.set_num_threads(threads)
            for a, b in zip(whole, walked(hidden, weight, labels, bias=bias), strict=True):
                assert torch.equal(a, b), threads
    finally:
        torch.set_num_threads(all_threads)
    some = torch.tensor([2, 700, 701, 2099])
    alone = walked(hidden[some], weight, labels[some], bias=bias)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[some], b)
    with torch.no_grad():
        stats = linear_logprobs(hidden, LMHead(weight, bias=bias), labels)
    assert torch.equal(stats.logprobs, whole.logprobs)
    assert torch.equal(stats.entropy, whole.entropy)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_frozen_step_holds_no_logits():
    """[N, V] would be 128 MiB in bfloat16."""
    hidden, weight, labels = drawn(1024, 64, 65536, torch.bfloat16)
    hidden.requires_grad_()

    def step():
        return torch.autograd.grad(linear_logprobs(hidden, weight, labels).logprobs.sum(), hidden)

    step()
    assert peak_extra_bytes(step, "cpu") < 32 * 2**20


def test_what_is_kept_between_calls_is_bounded_and_can_be_released():
    hidden, weight, labels = drawn(2048, 512, 3000, torch.bfloat16)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    torch.autograd.grad(linear_logprobs(*leaves, labels).logprobs.sum(), leaves)
    assert 0 < torch.ops.fused_rl.cpu_kept_memory() <= 256 * 2**20
    # Four chunks' exponentials are more than that.
    weight, ones = drawn(8, 32, 32768, torch.bfloat16)[1], torch.ones(1024)
    hidden, labels = torch.zeros(1024, 32).bfloat16(), torch.zeros(1024, dtype=torch.int64)
    head = ops.Head(hidden, weight, None, labels, ones, 1.0, 0.0)
    of_chunks = [ops.linear_logprobs_chunk(head, ops.Given(False)).z for _ in range(4)]
    del of_chunks
    kept = torch.ops.fused_rl.cpu_kept_memory()
    assert (2**27 if "bfloat16" in ops.native.cpu_features() else 0) < kept <= 256 * 2**20
    ops.release_memory()
    assert torch.ops.fused_rl.cpu_kept_memory() == 0


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_threads_wait_for_what_they_need_and_for_nothing_else(sanitizer, tmp_path):
    """tests/team.cpp: sums that are the same on any number of threads, under a sanitizer."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = Path(__file__).parent / "team.cpp", tmp_path / "team"
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread"]
    built = subprocess.run(
        [compiler, *flags, str(source), "-o", str(program)], capture_output=True, text=True
    )
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip(f"no runtime of -fsanitize={sanitizer}")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr

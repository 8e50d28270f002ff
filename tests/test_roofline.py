"""Rates of this CPU, and where the time of each way goes. How fast it is, no test says."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_accuracy import INSTRUCTION_SETS
from test_fallbacks import WITHOUT_LIBRARY

from fused_rl import cli, linear_logprobs, ops
from fused_rl.bench import rates, roofline
from fused_rl.bench.peers import Case
from fused_rl.bench.rates import Group, Rate
from fused_rl.bench.roofline import Parts, Speeds, Way

needs_native = pytest.mark.skipif(
    ops.native_missing is not None, reason="the C++ library is not installed"
)
UNITS = ("amx", "avx512_bf16", "float32")
PRODUCTS = ("bfloat16 product", "float32 product")
WHAT = (*UNITS, *PRODUCTS, "exponentials")
RATES = f"""
import json, torch, fused_rl
torch.set_num_threads(2)
rates = {{what: torch.ops.fused_rl.cpu_rate(what, 0.01) for what in {WHAT}}}
print(json.dumps([rates, torch.ops.fused_rl.cpu_features().split()]))
"""
BRIEF = "from fused_rl.bench import roofline\nfor line in roofline.lines(0.0, 64): print(line)"


def in_a_child(script: str, environment: dict[str, str]) -> str:
    known = {k: v for k, v in os.environ.items() if k not in set().union(*INSTRUCTION_SETS)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**known, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_native
@pytest.mark.parametrize("environment", INSTRUCTION_SETS, ids=str)
def test_every_instruction_set_has_its_rates(environment):
    found, (_, *microkernels) = json.loads(in_a_child(RATES, environment))
    assert all(math.isfinite(rate) for rate in found.values())
    there = {what for what, rate in found.items() if rate > 0}
    # Which units the CPU has is its own affair, and no setting of a library's.
    expected = {"float32", "float32 product", "exponentials"} | there & {"amx", "avx512_bf16"}
    expected |= {"bfloat16 product"} if "bfloat16" in microkernels else set()
    assert there == expected


@needs_native
def test_units_are_found_where_the_kernel_says_that_they_are(flags):
    found = {what for what in UNITS if torch.ops.fused_rl.cpu_rate(what, 0.0) > 0}
    expected = {"float32"} | ({"avx512_bf16"} if "avx512_bf16" in flags else set())
    assert found - {"amx"} == expected
    assert "amx" not in found or {"amx_tile", "amx_bf16"} <= flags


@pytest.fixture
def flags() -> set[str]:
    """What Linux says of an x86."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = [set(line.split()) for line in lines if line.startswith("flags")]
    return found[0] if found else pytest.skip("no flags of an x86 in /proc/cpuinfo")


@needs_native
def test_measuring_leaves_products_as_they_were():
    """oneDNN remembers which tiles it has configured on a thread."""
    case = Case.make(64, 64, 512, torch.bfloat16)
    before = linear_logprobs(case.hidden, case.weight, case.labels).logprobs
    product = case.hidden @ case.weight.T
    for what in WHAT:
        torch.ops.fused_rl.cpu_rate(what, 0.0)
        after = linear_logprobs(case.hidden, case.weight, case.labels).logprobs
        assert torch.equal(before, after)
        assert torch.equal(product, case.hidden @ case.weight.T)


@needs_native
@pytest.mark.parametrize(
    ("what", "seconds", "complaint"),
    [
        ("amx tiles", 0.0, "no rate is called amx tiles"),
        ("amx", -1.0, "from 0 to 60, got -1"),
        ("amx", float("nan"), "from 0 to 60, got nan"),
        ("amx", 1e9, "from 0 to 60"),
    ],
)
def test_what_cannot_be_measured(what, seconds, complaint):
    with pytest.raises(ValueError, match=complaint):
        torch.ops.fused_rl.cpu_rate(what, seconds)


def test_threads_are_as_they_were():
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        seen = []
        rate = rates.on_threads("x", lambda: float(seen.append(torch.get_num_threads()) or 7))
        assert seen == [1, 3] and rate == Rate("x", 7.0, 7.0)
        with pytest.raises(KeyError), rates.threads(2):
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(count)


def test_a_rate_of_one_thread_is_that_of_all_where_there_is_one():
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        calls = []
        assert rates.on_threads("x", lambda: calls.append(1) or 5.0) == Rate("x", 5.0, 5.0)
        assert len(calls) == 1
    finally:
        torch.set_num_threads(count)


def test_the_best_of_some_calls_after_one():
    slow = iter([0.0, 5.0, 3.0, 4.0])
    calls = []

    def clock(run):
        run()
        return next(slow)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rates, "wall", clock)
        assert rates.best_seconds(lambda: calls.append(1), 7.5) == 0.0
    # The warm-up is not timed: 0 + 5 + 3 seconds are enough.
    assert len(calls) == 1 + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rates_of_torch_are_positive_and_finite(dtype):
    for rate in (rates.product_rate(dtype, 0.0), rates.copy_rate(0.0)):
        assert 0 < rate < math.inf


def case_of(N: int, H: int, V: int) -> Case:
    return Case(torch.zeros(N, H), torch.zeros(V, H), torch.zeros(N, dtype=torch.int64))


KNOWN = Speeds(peak=480.0, products=24.0, exponentials=4.0)


def test_parts_add_up_by_hand():
    # N H V = 24, N V = 8
    way = Way("x", "fused_rl", nhv=6, products=8, exponentials=2)
    assert roofline.parts(way, case_of(2, 3, 4), 15.0, KNOWN) == Parts(8.0, 4.0, 3.0)
    assert roofline.share_of_peak(way, case_of(2, 3, 4), 15.0, KNOWN) == 6 * 24 / 15 / 480


@pytest.mark.parametrize("way", roofline.WAYS, ids=lambda way: way.title)
def test_parts_of_each_way_are_its_time(way):
    case, seconds = case_of(5, 7, 11), 1.25
    found = roofline.parts(way, case, seconds, KNOWN)
    assert sum(found) == pytest.approx(seconds, rel=1e-12)
    assert way.of(case).products >= way.nhv and way.of(case).exponentials >= 1


@pytest.mark.parametrize("title", ["step by autograd", "step in one pass"])
def test_kept_exponentials_spare_products_and_exponentials(title):
    (way,) = (way for way in roofline.WAYS if way.title == title)
    assert way.of(case_of(5, 7, 11)) == way  # in float32
    in_half = "bfloat16" in ops.native.cpu_features()
    of_logits = {"step by autograd": (8, 2), "step in one pass": (6, 2)}[title]
    for V in (11, 2**21):
        case = Case(torch.zeros(99, 1).bfloat16(), torch.zeros(V, 1).bfloat16(), torch.zeros(99))
        kept = in_half and V == 11  # 99 tokens x 4 MiB are more than 256 MiB
        doing = way.of(case)
        assert (doing.products, doing.exponentials) == ((6, 1) if kept else of_logits)


def test_nothing_is_said_of_parts_without_rates():
    way = roofline.WAYS[0]
    unknown = Speeds(0.0, 0.0, 0.0)
    assert roofline.parts(way, case_of(2, 3, 4), 15.0, unknown) is None
    assert roofline.share_of_peak(way, case_of(2, 3, 4), 15.0, unknown) is None


def test_bfloat16_runs_as_float32_where_there_is_no_product_of_it():
    units = Group("", "", 1.0, (Rate("a", 1.0, 2.0), Rate("b", 9.0, 9.0), Rate("c", 3.0, 5.0)))
    exponentials = Group("", "", 1.0, (Rate("e", 1.0, 4.0),))
    both = Group("", "", 1.0, (Rate("bfloat16", 3.0, 6.0), Rate("float32", 1.0, 2.0)))
    one = Group("", "", 1.0, (Rate("bfloat16", 0.0, 0.0), Rate("float32", 1.0, 2.0)))
    assert roofline.speeds(units, both, exponentials) == Speeds(9.0, 6.0, 4.0)
    assert roofline.speeds(units, one, exponentials) == Speeds(9.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("V", "seconds", "available", "enough"),
    [
        # Two rounds, and one more that warms up: four seconds.
        (8192, 1.333, math.inf, True),
        (8192, 1.334, math.inf, False),
        # 16 KiB for an entry of the vocabulary: 128 MiB, of twice as many.
        (8192, 0.0, 2**28, True),
        (8192, 0.0, 2**28 - 1, False),
        (16384, 0.0, 2**28, False),
    ],
)
def test_a_vocabulary_fits_into_time_and_memory(V, seconds, available, enough):
    assert roofline.fits(V, seconds, available) is enough


@pytest.mark.parametrize(("bound", "V"), [(64, 64), (2048, 2048), (9000, 9000), (32768, 8192)])
def test_the_vocabulary_grows_while_it_fits(bound, V, monkeypatch):
    monkeypatch.setattr(roofline, "TOKENS", 8)
    monkeypatch.setattr(roofline, "HIDDEN", 8)
    monkeypatch.setattr(roofline, "fits", lambda V, seconds, _: seconds > 0 and V <= 8192)
    if bound == 9000:
        monkeypatch.setattr(roofline, "fits", lambda *_: True)
    assert roofline.fitting_case(bound).weight.shape == (V, 8)


def test_available_memory(tmp_path):
    file = tmp_path / "meminfo"
    assert roofline.available_bytes(file) == math.inf
    file.write_text("MemTotal:  9 kB\nMemAvailable:   7 kB\n")
    assert roofline.available_bytes(file) == 7 * 1024


def test_doctor_measures_what_it_says(capsys, monkeypatch):
    monkeypatch.setattr(roofline, "lines", partial(roofline.lines, 0.0, 64))
    assert cli.main(["doctor", "--measure"]) == 0
    printed = capsys.readouterr().out.splitlines()
    count = torch.get_num_threads()
    groups = [
        ("multiply-adds in registers, TFLOP/s", 3),
        ("the library's products, in cache, TFLOP/s", 2),
        ("torch's products, outputs allocated, TFLOP/s", 2),
        ("exponentials, 10^9/s", 1),
        ("memory, bytes read and written, GB/s", 1),
    ]
    columns = 1 if count == 1 else 2
    for title, size in groups:
        at = printed.index(title)
        for line in printed[at + 1 : at + 1 + size]:
            cells = line[28:].split()
            assert len(cells) == columns
            assert all(cell == "-" or 0 < float(cell) < math.inf for cell in cells), line
    at = printed.index(f"each way in ms: N=1024 H=1024 V=64 bfloat16, threads: {count}")
    assert printed[at + 1].endswith("products       exp      rest   of peak")
    for way, line in zip(roofline.WAYS, printed[at + 2 :], strict=False):
        assert line.startswith(f"  {way.title} ")
        nhv, _, _, _, seconds, *parts, _ = line[28:].split()
        assert int(nhv) == way.nhv and float(seconds) > 0
        if parts != ["-", "-", "-"]:
            assert sum(map(float, parts)) == pytest.approx(float(seconds), rel=0.02)


def test_doctor_measures_nothing_unless_it_is_asked(capsys, monkeypatch):
    monkeypatch.setattr(roofline, "lines", lambda: pytest.fail("measured"))
    assert cli.main(["doctor"]) == 0
    assert "multiply-adds" not in capsys.readouterr().out


def test_without_the_library_the_rest_is_measured():
    printed = in_a_child(WITHOUT_LIBRARY + BRIEF, {})
    assert "no rates of the C++ library: the C++ library was not built" in printed
    at = printed.index("torch's products")
    assert float(printed[at:].splitlines()[1][28:].split()[0]) > 0
    ours = next(line for line in printed.splitlines() if line.startswith("  no gradient"))
    assert ours[28:].split()[4] != "-" and ours[28:].split()[5:] == ["-", "-", "-", "-"]


@needs_native
def test_on_a_cpu_without_bfloat16_products():
    printed = in_a_child(BRIEF, {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"})
    at = printed.index("the library's products")
    bfloat16, float32 = printed[at:].splitlines()[1:3]
    assert set(bfloat16[28:].split()) == {"-"} and float(float32[28:].split()[0]) > 0

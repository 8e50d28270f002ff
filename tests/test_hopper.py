"""The forward for sm_90 without one: its code emulated, its barriers tried, its cuts counted."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import gluon_emulator
from hopper_cases import Case, aligned, merged
from interpreter import HERE, child
from rounded_cases import ROUNDINGS, random_head

from fused_rl.kernels import hopper
from fused_rl.kernels.configs import Config, Device
from fused_rl.kernels.linear_logprobs import unit

pytestmark = pytest.mark.skipif(hopper.kernels is None, reason="this triton has no Gluon")
HALF = [torch.float16, torch.bfloat16]
SMALL = Config(16, 16, 16, 4, 3, True)
DEVICE = Device(multiprocessors=3, major=9)


@pytest.fixture
def emulated(monkeypatch):
    """Run with this seed, the kernel is that of hopper_kernels, emulated."""
    real = hopper.kernels._hopper_statistics_kernel

    def install(seed: int = 0, **wrong) -> None:
        kernel = gluon_emulator.Kernel(real, seed, wrong)
        monkeypatch.setattr(hopper.kernels, "_hopper_statistics_kernel", kernel)

    install()
    return install


def check(case: Case, config: Config = SMALL, atol: float = 2e-5, rtol: float = 2e-6) -> None:
    partial = hopper.statistics(*case.head, DEVICE, config)
    ours = merged(partial, unit(case.bias))
    torch.testing.assert_close(ours, case.exact(), atol=atol, rtol=rtol, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_statistics_agree_with_float64(emulated, poisoned, dtype, bias, softcap):
    check(Case(37, 40, 70, dtype, bias=bias, softcap=softcap, spread=4.0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("logits_dtype", ROUNDINGS, ids=str)
def test_rounded_logits(emulated, poisoned, logits_dtype, softcap, bias):
    case = Case(37, 40, 70, bias=bias, softcap=softcap)
    of = random_head(37, 40, 70, torch.bfloat16, logits_dtype)
    case.hidden, case.weight = aligned(of.hidden), aligned(of.weight)
    case.bias = of.bias if bias else None
    case.scale, case.rounding = 0.05, of.rounding
    rounded = case.exact()
    check(case)
    (m, *_, at_label), _ = Kept(case, torch.zeros(37)).form()
    for part, exact in ((m.amax(0), rounded[0]), (at_label.sum(0), rounded[3])):
        torch.testing.assert_close(part * unit(case.bias), exact, atol=2e-5, rtol=2e-6)
    case.rounding = 0
    assert (rounded - case.exact()).abs().max() > 3e-4


@pytest.mark.parametrize("N", [1, 16, 33])
@pytest.mark.parametrize("H", [1, 16, 39, 80])
@pytest.mark.parametrize("V", [1, 8, 16, 17, 130])
def test_sizes_that_no_tile_divides(emulated, poisoned, N, H, V):
    check(Case(N, H, V))


def test_a_nan_poisons_its_row_alone(emulated):
    case = Case(20, 24, 40)
    case.hidden[3, 5] = float("nan")
    ours = merged(hopper.statistics(*case.head, DEVICE, SMALL), unit(None))
    assert ours[1:3].isnan().any(0).nonzero().flatten().tolist() == [3]


def test_entries_at_minus_infinity_have_no_probability(emulated):
    """Whole tiles of them, the first and the last among them, half tiles, and single ones."""
    case = Case(20, 24, 100, bias=True)
    for at in (slice(0, 32), slice(40, 48), slice(50, 51), slice(90, 100)):
        case.bias[at] = float("-inf")
    case.labels[:] = 35
    check(case)


def test_a_row_of_minus_infinity_keeps_no_sum(emulated):
    case = Case(20, 24, 40, bias=True)
    case.bias[:] = float("-inf")
    partial = hopper.statistics(*case.head, DEVICE, SMALL)
    assert partial[:, 0].eq(float("-inf")).all() and partial[:, 1:3].eq(0.0).all()


@pytest.mark.parametrize("spread", [1e9, 1e30])
def test_huge_logits_stay_finite(emulated, spread):
    case = Case(20, 24, 40, spread=spread)
    ours = merged(hopper.statistics(*case.head, DEVICE, SMALL), unit(None))
    top, _, entropy, at_label = case.exact()
    # They lie so far apart that the largest has all the probability.
    assert entropy.eq(0.0).all() and ours[2].eq(0.0).all() and torch.equal(ours[0], ours[1])
    torch.testing.assert_close(ours[0], top, atol=0, rtol=1e-5)
    torch.testing.assert_close(ours[3], at_label, atol=1e-5 * spread, rtol=0)


class Kept:
    """What the storing variant makes of a case, and the memory around E."""

    def __init__(self, case: Case, reference: torch.Tensor, config: Config = SMALL):
        N, self.V = len(case.labels), len(case.weight)
        self.memory = torch.full((N, -(-self.V // 64) * 64), 7.0, dtype=torch.bfloat16)
        self.stored = hopper.Stored(self.memory[:, : self.V], reference)
        self.partial = hopper.parts_of(case.head, DEVICE, config)
        self.case, self.config = case, config

    def form(self, again: torch.Tensor | None = None):
        stored = self.stored._replace(again=again)
        hopper.exponentials(self.case.head, stored, self.partial, DEVICE, self.config)
        return self.partial.double().unbind(1), self.stored.exponentials


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bias", "softcap"), [(False, 0.0), (True, 0.0), (True, 3.0)])
@pytest.mark.parametrize("V", [70, 64, 5])
def test_exponentials_are_two_to_the_logit_less_the_reference(
    emulated, poisoned, dtype, bias, softcap, V
):
    case = Case(37, 40, V, dtype, bias=bias, softcap=softcap, spread=4.0)
    z, of = case.logits(), unit(case.bias)
    kept = Kept(case, (z.median(-1).values / of).float())
    (m, s, t, at_label), e = kept.form()
    exact = (z - kept.stored.reference.double()[:, None] * of).exp()
    assert ((e.double() / exact - 1).abs() <= 2**-8 * 1.01).all()
    assert (kept.memory[:, V:] == 7.0).all()
    moment = (exact * exact.log2()).sum(-1)
    torch.testing.assert_close(s.sum(0), exact.sum(-1), atol=0, rtol=2e-5)
    torch.testing.assert_close(t.sum(0), moment, atol=2e-5 * exact.sum(-1).max(), rtol=2e-5)
    top, *_, label = case.exact()
    torch.testing.assert_close(m.amax(0) * of, top, atol=2e-5, rtol=2e-6)
    torch.testing.assert_close(at_label.sum(0) * of, label, atol=2e-5, rtol=2e-6)


def test_only_the_tiles_that_are_wanted_are_formed_again(emulated):
    case = Case(37, 40, 70)
    kept = Kept(case, torch.zeros(37))
    _, first = kept.form()
    before, partial = first.clone(), kept.partial.clone()
    kept.stored.reference[:] = 1.0
    (_, s, *_), e = kept.form(again=torch.tensor([0, 1, 0], dtype=torch.int32))
    rows = torch.zeros(37, dtype=torch.bool)
    rows[16:32] = True
    assert torch.equal(e[~rows], before[~rows])
    # One unit in the last place of E: it is another sum that is rounded.
    torch.testing.assert_close(e[rows], before[rows] / 2, atol=0, rtol=2**-7)
    assert torch.equal(kept.partial[:, :, ~rows], partial[:, :, ~rows])
    half = partial[:, 1, rows].double() / 2
    torch.testing.assert_close(s[:, rows], half, atol=0, rtol=1e-6)


def test_exponentials_may_be_infinite_and_nan_and_then_say_so(emulated):
    case = Case(20, 24, 40)
    case.hidden[3, 5] = float("nan")
    reference = torch.zeros(20)
    reference[4] = -200.0
    (_, s, *_), e = Kept(case, reference).form()
    assert e.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert e.isinf().all(1).nonzero().flatten().tolist() == [4]
    assert (~s.sum(0).isfinite()).nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_events_confuses_the_barriers(emulated, stages, seed):
    """Odd and even counts of steps and of uses of a buffer; the emulator looks at each access."""
    emulated(1000 * seed)
    for H, V in itertools.product((16, 32, 80), (16, 48, 113)):
        check(Case(16, H, V), SMALL._replace(num_stages=stages))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": lambda count: 1}, "overwritten|deadlock"),
        ({"count": lambda count: 3 if count == 2 else count}, "deadlock"),
        ({"parity": lambda parity: parity ^ 1}, "not arrived|deadlock|overwritten"),
        ({"outstanding": lambda n: n + 1}, "overwritten"),
    ],
)
def test_wrong_barriers_are_noticed(emulated, wrong, message):
    with pytest.raises((AssertionError, RuntimeError), match=message):
        for seed in range(20):
            emulated(seed, **wrong)
            check(Case(16, 80, 113))


def test_parts_that_are_empty_change_nothing(emulated, monkeypatch):
    case = Case(20, 24, 40)
    parts = hopper.Cut(tiles=2, splits=5, columns_per_split=16, group=1)
    monkeypatch.setattr(hopper, "cut", lambda *_: parts)
    partial = hopper.statistics(*case.head, DEVICE, SMALL)
    assert partial[3:, 0].eq(float("-inf")).all() and partial[3:, 1:].eq(0.0).all()
    torch.testing.assert_close(merged(partial, unit(None)), case.exact(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("tiles", [1, 2, 5, 7])
@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_every_tile_meets_every_part_once(emulated, monkeypatch, poisoned, tiles, group):
    """What no program writes is NaN."""
    case = Case(16 * tiles, 16, 48)
    parts = hopper.Cut(tiles=tiles, splits=3, columns_per_split=16, group=min(group, tiles))
    monkeypatch.setattr(hopper, "cut", lambda *_: parts)
    check(case)


@pytest.mark.parametrize("N", [1, 128, 1000, 8192, 100_000])
@pytest.mark.parametrize("V", [1, 256, 32001, 151936])
@pytest.mark.parametrize("H", [64, 4096])
def test_a_cut_covers_the_vocabulary_and_leaves_no_part_empty(N, V, H):
    config = hopper.CONFIGS[9]
    cut = hopper.cut(N, V, H, 132, config)
    assert cut.tiles == math.ceil(N / 128) and cut.columns_per_split % 256 == 0
    assert (cut.splits - 1) * cut.columns_per_split < V <= cut.splits * cut.columns_per_split
    assert 1 <= cut.group <= cut.tiles


@pytest.mark.parametrize("N", [512, 1024, 2048, 8192])
@pytest.mark.parametrize(("H", "V"), [(4096, 151936), (2304, 256128), (2048, 128256)])
def test_a_cut_keeps_94_of_100_multiprocessors_busy(N, H, V):
    cut = hopper.cut(N, V, H, 132, hopper.CONFIGS[9])
    waves = math.ceil(cut.programs / 132)
    spent = waves * 132 * cut.columns_per_split // 256
    assert math.ceil(N / 128) * math.ceil(V / 256) >= 0.94 * spent


def test_it_takes_what_tma_can_describe():
    half = torch.zeros(4, 128, dtype=torch.bfloat16)
    assert hopper.takes(half, half)
    assert hopper.takes(half[:, :100], half[:, :100])
    assert not hopper.takes(half.float(), half.float())
    assert not hopper.takes(half, half.to(torch.float16))
    assert not hopper.takes(half[:, 1:100], half[:, :99])
    assert not hopper.takes(half[:, :32], half[:, :32])


def test_it_takes_nothing_where_triton_has_no_gluon(monkeypatch):
    monkeypatch.setattr(hopper, "kernels", None)
    half = torch.zeros(4, 128, dtype=torch.bfloat16)
    assert not hopper.takes(half, half)


# The installed triton, and those beside it in the environment: folders triton-VERSION.
TRITONS = {"installed": "", **{p.name: str(p) for p in Path(sys.prefix).glob("triton-*")}}


def check_compiled(rows: list[dict]) -> None:
    """All of it in registers and shared memory; TMA loads and stores, asynchronous products."""
    for row in rows:
        counts = row["counts"]
        assert row["stack"] == 0 and not {"LDL", "STL"} & counts.keys(), row
        assert row["shared"] <= row["limit"] and row["highest_register"] < 240, row
        # Two consumers, each with a first step and a loop, of 4 products of 64 x 256 x 16.
        assert counts["HGMMA"] == 16 and counts["UTMALDG"] == 2, row
        assert counts.get("UTMASTG", 0) == (4 if "store" in row["kernel"] else 0), row
        # Four warps finish their products before one thread says that they did.
        assert row["arrivals"] >= 4 and row["alone"] == [], row
    plain = rows[0]["counts"]
    # 128 logits in each thread of two consumers: one exponential each; fused with a product no more
    # than the moment, not the distance from the largest, which its rounding would make infinite.
    assert plain["MUFU"] <= 2 * 128 + 24
    assert plain["FFMA"] <= 2 * 128 + 24 and plain["FADD"] >= 2 * 3 * 128


def compiled(folder: str, cache: Path, *names: str) -> list[dict]:
    script = str(HERE / "hopper_aot.py")
    done = child(script, *names, PYTHONPATH=folder, TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert not folder or all(row["triton"] in folder for row in rows)
    return rows


@pytest.mark.parametrize("folder", TRITONS.values(), ids=TRITONS)
def test_it_compiles_for_sm_90_without_spills(folder, tmp_path):
    names = ("hopper bf16", "hopper bf16 store", "hopper fp16 store again bias softcap")
    rows = compiled(folder, tmp_path, *names)
    assert [row["kernel"] for row in rows] == [*names]
    check_compiled(rows)


@pytest.mark.slow
@pytest.mark.parametrize("folder", TRITONS.values(), ids=TRITONS)
def test_every_option_compiles_for_sm_90_without_spills(folder, tmp_path):
    rows = compiled(folder, tmp_path)
    assert len({row["kernel"] for row in rows}) == len(rows) == 9
    check_compiled(rows)

"""The Gluon kernel for sm_90 on one; skipped where there is none."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from hopper_cases import Case, merged

from fused_rl.kernels import hopper, linear_logprobs
from fused_rl.kernels.configs import Config, Device

HERE = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HERE, reason="needs a CUDA device of compute capability 9"),
    pytest.mark.skipif(hopper.kernels is None, reason="this triton has no Gluon"),
]
HALF = [torch.float16, torch.bfloat16]
CONFIG = hopper.CONFIGS[9]
# The Triton kernel that does the same: proved on an H100 and an H200.
TRITON = Config(128, 256, 64, 8, 3, True)
CLOSE = {"atol": 2e-5, "rtol": 2e-6, "equal_nan": True}


def device() -> Device:
    return Device.of(torch.device("cuda"))


def run(case: Case) -> torch.Tensor:
    assert hopper.takes(case.hidden, case.weight)
    return hopper.statistics(*case.head, device(), CONFIG)


def statistics(case: Case) -> torch.Tensor:
    return merged(run(case), linear_logprobs.unit(case.bias))


def check(case: Case) -> None:
    """Against float64, and against the Triton kernel."""
    ours = statistics(case)
    torch.testing.assert_close(ours, case.exact(), **CLOSE)
    theirs = linear_logprobs.fused_statistics(*case.head, device(), TRITON)
    theirs = merged(theirs, linear_logprobs.unit(case.bias))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_statistics_agree(dtype, bias, softcap):
    check(Case(300, 192, 3001, dtype, bias=bias, softcap=softcap, spread=4.0).to("cuda"))


@pytest.mark.parametrize("N", [1, 63, 128, 129, 1000])
@pytest.mark.parametrize("H", [64, 100, 1024])
@pytest.mark.parametrize("V", [1, 129, 256, 4999])
def test_sizes_that_no_tile_divides(N, H, V):
    check(Case(N, H, V).to("cuda"))


def test_many_parts_in_many_waves_in_groups():
    """Enough tiles of tokens for several groups, and more programs than the device runs at once."""
    case = Case(6000, 4096, 2500).to("cuda")
    parts = hopper.cut(6000, 2500, 4096, device().multiprocessors, CONFIG)
    assert parts.group < parts.tiles and parts.programs > device().multiprocessors
    # Over 4096 products the accumulators of the tensor cores themselves are off by more.
    exact = case.exact()
    of_products = (case.of_products() - exact).abs().amax(1)
    assert ((statistics(case) - exact).abs().amax(1) <= 1.1 * of_products + 1e-6).all()


def test_the_same_bits_each_time():
    case = Case(700, 512, 20_001).to("cuda")
    first = run(case)
    for _ in range(20):
        assert torch.equal(run(case), first)


def test_a_nan_poisons_its_row_alone():
    case = Case(300, 192, 3001)
    case.hidden[77, 5] = float("nan")
    ours = statistics(case.to("cuda"))
    assert ours[1:3].isnan().any(0).nonzero().flatten().tolist() == [77]


def test_entries_at_minus_infinity_have_no_probability():
    case = Case(300, 192, 3001, bias=True)
    for at in (slice(0, 512), slice(640, 768), slice(800, 801), slice(2900, 3001)):
        case.bias[at] = float("-inf")
    case.labels[:] = 600
    check(case.to("cuda"))


@pytest.mark.parametrize("spread", [1e9, 1e30])
def test_huge_logits_stay_finite(spread):
    case = Case(300, 192, 3001, spread=spread)
    ours = statistics(case.to("cuda"))
    top, _, entropy, at_label = case.exact()
    # They lie so far apart that the largest has all the probability.
    assert entropy.eq(0.0).all() and ours[2].eq(0.0).all() and torch.equal(ours[0], ours[1])
    torch.testing.assert_close(ours[0], top, atol=0, rtol=1e-5)
    torch.testing.assert_close(ours[3], at_label, atol=1e-5 * spread, rtol=0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bias", "softcap"), [(False, 0.0), (True, 0.0), (True, 5.0)])
@pytest.mark.parametrize("V", [3001, 2560, 100])
def test_exponentials_are_two_to_the_logit_less_the_reference(dtype, bias, softcap, V):
    case = Case(300, 192, V, dtype, bias=bias, softcap=softcap, spread=4.0).to("cuda")
    z, of = case.logits(), linear_logprobs.unit(case.bias)
    reference = (z.median(-1).values / of).float()
    memory = torch.full((300, -(-V // 64) * 64), 7.0, dtype=torch.bfloat16, device="cuda")
    stored = hopper.Stored(memory[:, :V], reference.cuda())
    partial = hopper.parts_of(case.head, device(), CONFIG)
    hopper.exponentials(case.head, stored, partial, device(), CONFIG)
    m, s, t, at_label = partial.double().cpu().unbind(1)
    exact = (z - reference.double()[:, None] * of).exp()
    e = stored.exponentials.double().cpu()
    # Half a unit in the last place, and what fp32 logits are off by.
    assert ((e / exact - 1).abs() <= 2**-8 * 1.01).all()
    # Stores end with a whole number of 16 bytes: what is beyond V in the last is 0.
    assert (memory[:, V : V + -V % 8] == 0.0).all() and (memory[:, V + -V % 8 :] == 7.0).all()
    moment = (exact * exact.log2()).sum(-1)
    torch.testing.assert_close(s.sum(0), exact.sum(-1), atol=0, rtol=2e-5)
    torch.testing.assert_close(t.sum(0), moment, atol=2e-5 * exact.sum(-1).max(), rtol=2e-5)
    top, *_, label = case.exact()
    torch.testing.assert_close(m.amax(0) * of, top, **CLOSE)
    torch.testing.assert_close(at_label.sum(0) * of, label, **CLOSE)


def test_only_the_tiles_that_are_wanted_are_formed_again():
    case = Case(300, 192, 3001).to("cuda")
    memory = torch.zeros(300, 3008, dtype=torch.bfloat16, device="cuda")
    stored = hopper.Stored(memory[:, :3001], torch.zeros(300, device="cuda"))
    partial = hopper.parts_of(case.head, device(), CONFIG)
    hopper.exponentials(case.head, stored, partial, device(), CONFIG)
    before, sums = memory.clone(), partial.clone()
    stored.reference.fill_(1.0)
    again = stored._replace(again=torch.tensor([0, 1, 0], dtype=torch.int32, device="cuda"))
    hopper.exponentials(case.head, again, partial, device(), CONFIG)
    rows = torch.arange(300, device="cuda") // 128 == 1
    assert torch.equal(memory[~rows], before[~rows])
    assert torch.equal(partial[:, :, ~rows], sums[:, :, ~rows])
    torch.testing.assert_close(memory[rows], before[rows] / 2, atol=0, rtol=2**-7)
    torch.testing.assert_close(partial[:, 1, rows], sums[:, 1, rows] / 2, atol=0, rtol=1e-5)

"""Which kernels a device may run."""

import json
from pathlib import Path

import pytest
import torch
from interpreter import assert_passes

import fused_rl
from fused_rl.kernels import configs
from fused_rl.ops import trust

RESULTS = Path(__file__).parents[1] / "bench" / "results"
PROVEN = [
    pytest.param(config, id=f"sm_{major}0 {config.title}" if major else f"other {config.title}")
    for major, table in configs.CONFIGS.items()
    for config in table
    if config.proof
]
# What took all calls with more than few tokens before there was a proof of another way.
BEFORE = "L2 tiles 4096x2048"


def test_the_first_use_of_a_kernel_in_the_interpreter(tmp_path):
    assert_passes("interpreted_trust.py", tmp_path)


def forwards(config):
    return json.loads((RESULTS / f"{config.proof}.json").read_text())["forwards"]


@pytest.mark.parametrize("config", PROVEN)
def test_a_proof_is_a_result_in_which_that_code_ran(config):
    """By pointers or descriptors, with that epilogue; of other tiles on other architectures."""
    assert not config.exp2 and not config.stores
    ways = {r["way"].split()[0] for r in forwards(config) if "failed" not in r}
    assert config.title.split()[0] in ways


@pytest.mark.parametrize(
    "config", [c for c in configs.CONFIGS[9] if c.proof], ids=lambda c: c.title
)
def test_on_its_own_architecture_it_is_right_and_faster_there(config):
    """At every head and number of tokens that it takes by default."""
    records = [r for r in forwards(config) if "failed" not in r]
    before = {(r["shape"], r["tokens"]): r for r in records if r["way"] == BEFORE}
    mine = [r for r in records if r["way"] == config.title and r["tokens"] <= config.rows]
    assert len(mine) >= 3
    for record in mine:
        shape, tokens = record["shape"], record["tokens"]
        assert record["ms_median"] < before[shape, tokens]["ms_median"]
        # As far from float64 as the vendor's products, from which the tiles are; of few tokens the
        # library sums in shorter parts.
        products = max(r["logprob_error"] for (of, _), r in before.items() if of == shape)
        assert record["logprob_error"] <= 1.1 * products + 1e-6


def test_what_no_gpu_has_run_is_off():
    device = configs.Device(132, 9)
    hidden, weight = torch.empty(700, 64).bfloat16(), torch.empty(99, 64).bfloat16()
    call = (hidden, weight, None, None, None, 1.0, 0.0)
    config = configs.chosen(call, device)
    assert config.proof and config.title == "TMA 128x256x64, 8 warps, 3 stages"
    assert configs.chosen(call, device, stores=True) is None
    everything = device._replace(trusts=lambda config, call: True)
    unproven = configs.chosen(call, everything), configs.chosen(call, everything, stores=True)
    assert not any(c.proof for c in unproven)
    few = (hidden[:9], *call[1:])
    assert configs.chosen(few, device).title == "pointers 64x128x64, 4 warps, 4 stages"
    capped = (*call[:-1], 30.0)
    assert configs.chosen(capped, device).title == "TMA 128x128x64, 8 warps, 4 stages"
    # Rows that no descriptor takes: tiles, but for few tokens.
    odd = hidden[:, :61].contiguous(), weight[:, :61].contiguous()
    assert configs.chosen((*odd, *call[2:]), device) is None
    assert not configs.chosen((odd[0][:99], odd[1], *call[2:]), device).tma
    for dtype in (torch.float32, torch.float64):
        assert configs.chosen((hidden.to(dtype), weight.to(dtype), *call[2:]), device) is None


def test_the_public_switch_sets_both_options():
    fused_rl.trust_kernels(unproven=True, first_use_check=False)
    assert trust.options() == (True, False)
    fused_rl.trust_kernels()
    assert trust.options() == (False, True)


def test_a_first_use_may_wait_where_the_caller_forbids_it(monkeypatch):
    modes, device = ["error"], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    fused_rl.trust_kernels()
    allowed = trust.passes(device, "a kernel", None, lambda: modes.append("compared"))
    assert allowed and modes == ["error", "default", "compared", "error"]
    # Within a graph nothing is compared, and nothing is remembered.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trust.passes(device, "another", None, lambda: modes.append("compared"))
    assert modes[-1] == "error" and [v.kernel for v in trust.verdicts()] == ["a kernel"]
    fused_rl.trust_kernels()

"""Which kernels a device may run."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from decisions import UNPROVEN
from forwards import is_right
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
HOPPER = {c.title: c for c in configs.CONFIGS[9] if c.proof}
# What took all calls with more than few tokens before there was a proof of another way.
BEFORE = "L2 tiles 4096x2048"
STORED = "TMA 128x256x64, 8 warps, 3 stages, stores"
HOPPER_DEVICE = configs.Device(132, 9)


def test_the_first_use_of_a_kernel_in_the_interpreter(tmp_path):
    assert_passes("interpreted_trust.py", tmp_path)


def results(config):
    return json.loads((RESULTS / f"{config.proof}.json").read_text())


def timed_forwards(config):
    return [r for r in results(config)["forwards"] if "failed" not in r]


def call(N, H=64, softcap=0.0, described=True):
    """Of N tokens; rows of 2 (H + 1) bytes are in no tensor descriptor."""
    width = H if described else H + 1
    hidden, weight = (torch.empty(n, width).bfloat16()[:, :H] for n in (N, 99))
    return hidden, weight, None, None, None, 1.0, softcap, 0


def chosen_by_default(N, stores, monkeypatch):
    """Titles of all that sm_90 takes for N tokens: plain or with a softcap, with Gluon or without,
    through descriptors or not.
    """
    found = set()
    for gluon, softcap, described in itertools.product((True, False), (0.0, 9.0), (True, False)):
        monkeypatch.setattr(configs, "_takes_gluon", lambda *_, there=gluon and described: there)
        of = call(N, softcap=softcap, described=described)
        if config := configs.chosen(of, HOPPER_DEVICE, stores=stores):
            found.add(config.title)
    return found


@pytest.mark.parametrize("config", PROVEN)
def test_a_proof_is_a_result_in_which_that_code_ran(config):
    """By pointers, descriptors or Gluon, with that epilogue; of other tiles elsewhere."""
    operands, epilogue = config.title.split()[0], config.title.split(", ")[-1]
    ways = {r["way"] for r in timed_forwards(config)}
    assert any(w.split()[0] == operands and w.endswith(f", {epilogue}") for w in ways)


@pytest.mark.parametrize("title", HOPPER)
def test_on_its_own_architecture_it_is_right_and_faster_there(title, monkeypatch):
    """At every head, and every number of tokens for which it is chosen. What stores exponentials is
    compared with the forward alone, which stores nothing, and so where that is not the launches.
    """
    config = HOPPER[title]
    records = timed_forwards(config)
    before = {(r["shape"], r["tokens"]): r for r in records if r["way"] == BEFORE}
    least = configs.FEW if config.stores else 1
    sizes = {r["tokens"] for r in records if r["tokens"] >= least}
    sizes = {n for n in sizes if title in chosen_by_default(n, config.stores, monkeypatch)}
    mine = [r for r in records if r["way"] == title and r["tokens"] in sizes]
    assert len(mine) >= 3
    for record in mine:
        # As far from float64 as the vendor's products of the same rows are, and a tenth more.
        assert is_right(record)
        assert record["ms_median"] < before[record["shape"], record["tokens"]]["ms_median"]


def test_kept_exponentials_are_right_and_faster_in_every_step_that_was_measured():
    """Of the kernel that stores them, the first in the table; beside logits in float32. Gradients
    that are rounded once to bfloat16 are off by 2e-3: those of exponentials by half as much again.
    """
    (stores, *_) = (c for c in configs.CONFIGS[9] if c.stores)
    records = {
        (r["shape"], r["case"], r["provider"]): r
        for r in results(stores)["records"]
        if r["case"].startswith("GRPO") and r["provider"].startswith("fused_rl")
    }
    kept = {
        key: r
        for key, r in records.items()
        if key[2].endswith(UNPROVEN) and ("policy_loss" in key[2] or "frozen" in key[1])
    }
    assert stores.gluon and len({shape for shape, *_ in kept}) >= 7 and len(kept) >= 25
    for (shape, case, provider), record in kept.items():
        of_logits = records[shape, case, provider.removesuffix(UNPROVEN)]
        assert record["verdict"] == "right" and record["gradient_error"] < 3e-3
        assert record["seconds_median"] < of_logits["seconds_median"]


def test_what_is_chosen_on_sm_90(monkeypatch):
    """Gluon is there where this triton has it."""
    assert configs.chosen(call(700), HOPPER_DEVICE) == configs.HOPPER
    assert configs.chosen(call(700), HOPPER_DEVICE, stores=True).title.startswith("Gluon")
    assert configs.chosen(call(700, softcap=30.0), HOPPER_DEVICE) == configs.HOPPER
    assert configs.chosen(call(configs.FEW), HOPPER_DEVICE).title == configs.WIDE.title
    few = configs.chosen(call(9), HOPPER_DEVICE)
    assert few.title == "pointers 64x128x64, 4 warps, 4 stages, exp2"
    # Rows that no descriptor takes: tiles, but for few tokens.
    assert configs.chosen(call(700, described=False), HOPPER_DEVICE) is None
    assert not configs.chosen(call(99, described=False), HOPPER_DEVICE).tma
    for dtype in (torch.float32, torch.float64):
        hidden, weight, *options = call(700)
        of = (hidden.to(dtype), weight.to(dtype), *options)
        assert configs.chosen(of, HOPPER_DEVICE) is None


def test_what_no_result_has_shown_to_be_right_and_faster_is_off(monkeypatch):
    """Exponentials by narrow tiles, of a head with a softcap where triton has no Gluon."""
    monkeypatch.setattr(configs, "_takes_gluon", lambda *_: False)
    everything = HOPPER_DEVICE._replace(trusts=lambda config, call: True)
    assert configs.chosen(call(700), HOPPER_DEVICE, stores=True).title == STORED
    assert configs.chosen(call(700, softcap=30.0), HOPPER_DEVICE, stores=True) is None
    unproven = configs.chosen(call(700, softcap=30.0), everything, stores=True)
    assert unproven.title == "TMA 128x128x64, 8 warps, 4 stages, stores" and not unproven.proof
    for major in (0, 8, 10):
        device = configs.Device(132, major)
        assert configs.chosen(call(700), device, stores=True) is None


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

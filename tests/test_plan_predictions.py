"""What `fused-rl plan` and the pages say of the time: predictions, and measurements beside them."""

import json
from pathlib import Path

import predictions
import predictions_errors as errors
import predictions_pages as pages
import pytest
import torch
from predictions import cases

from fused_rl import cli
from fused_rl.plan import forecast, measured, steps
from fused_rl.plan import time as model
from fused_rl.plan.devices import CARDS
from fused_rl.plan.memory import plan
from fused_rl.plan.report import about_times

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[1]
HEAD = {"hidden_size": 4096, "vocab_size": 151936}
H200 = CARDS["h200"]


@pytest.mark.parametrize("name", CARDS)
def test_predictions_are_above_the_data_sheet_and_in_order(name):
    card = CARDS[name]
    N, H, V = pages.SHAPE
    for row in pages.rows(name):
        predicted = model.times(card, row.parts)
        flop = sum(part.flop for part in row.parts)
        assert flop / (card.sheet_tflops * 1e9) < predicted.low <= predicted.high, row.way
    flops = {
        case: {sum(p.flop for p in row.parts) for row in pages.rows(name) if row.case == case}
        for case in (pages.FORWARD, pages.STEP, pages.ANY, pages.FROZEN, pages.HALF)
    }
    nhv = N * H * V
    stores = steps.chosen(card, N, stores=True, unproven=True)
    assert flops == {
        pages.FORWARD: {2 * nhv},
        pages.STEP: {6 * nhv},
        pages.ANY: {6 * nhv, 8 * nhv} if stores else {8 * nhv},
        pages.FROZEN: {4 * nhv},
        pages.HALF: {3 * nhv},
    }


def test_the_ways_are_predicted_to_be_faster_one_after_another():
    """On an H200: what was measured there, today's, and E that waits for nothing."""
    found: dict[str, dict[str, float]] = {}
    for row in pages.rows("h200"):
        found.setdefault(row.case, {})[row.way] = model.times(H200, row.parts).middle
    step = [pages.IN_FLOAT32, pages.TODAY, "E, nothing waited for"]
    assert {case: list(ways) for case, ways in found.items()} == {
        pages.FORWARD: [pages.IN_L2, pages.TODAY],
        pages.STEP: step,
        pages.ANY: ["two passes", pages.TODAY],
        pages.FROZEN: step,
        pages.HALF: step,
    }
    for case, ways in found.items():
        assert list(ways.values()) == sorted(ways.values(), reverse=True), case


@pytest.mark.parametrize("name", CARDS)
def test_todays_ways_are_those_that_a_plan_predicts(name):
    planned = plan(HEAD, 8192, device=name)
    today = {
        r.case: model.times(CARDS[name], r.parts) for r in pages.rows(name) if r.way == "today"
    }
    found = forecast.predicted(planned)
    frozen = forecast.predicted(plan(HEAD, 8192, device=name, frozen=True))
    assert today[pages.STEP] == found["linear_policy_loss"]
    assert today[pages.ANY] == found["linear_logprobs"]
    assert today[pages.FROZEN] == frozen["linear_policy_loss"]
    if pages.FORWARD in today:
        assert today[pages.FORWARD] == found["linear_logprobs, no gradient"]


def block(page: str, name: str) -> list[str]:
    text = (ROOT / page).read_text()
    inner = text.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]
    return inner.splitlines()


def test_the_pages_are_what_the_script_writes():
    assert block(predictions.PAGE, "predicted") == pages.predicted()
    assert block(predictions.ERRORS, "errors") == errors.errors(cases())
    assert block(predictions.ERRORS, "unseen") == errors.unseen()
    assert (ROOT / predictions.MODULE).read_text() == pages.measured_module()


def test_pages_say_that_predictions_are_no_measurements():
    assert "Predictions, not measurements" in pages.predicted()[0]
    assert "A prediction is not a\nmeasurement" in (ROOT / predictions.ERRORS).read_text()


def test_the_measurements_of_the_package_are_those_of_the_result():
    """What ran as unproven in the H100's is on by default now."""
    for card, suffix in (("h200", ""), ("h100", ", unproven")):
        (ms,) = (
            r["seconds_median"] * 1e3
            for r in predictions.result(f"{card}-bfloat16")["records"]
            if (r["shape"], r["name"], r["provider"])
            == ("Qwen3-8B", "grpo_step_frozen", f"fused_rl linear_logprobs{suffix}")
        )
        found = measured.MEASURED[card, 8192, 4096, 151936, True]
        assert found["linear_logprobs"] == pytest.approx(ms, abs=0.05)
        assert len(found) == 5
    ours = {"linear_logprobs, no gradient", "linear_logprobs", "linear_policy_loss"}
    assert len(measured.MEASURED) == 20 and all(ours <= {*w} for w in measured.MEASURED.values())


def test_a_plan_for_a_card_has_its_chunks_and_times():
    planned = plan(HEAD, 8192, device="h200")
    # Exponentials take 2 bytes; an A100 has logits of 4 bytes and their gradient of 2.
    assert planned.chunks == [8192] and planned.ways[-2].nhv == 6
    assert plan(HEAD, 8192, device="h100").chunks == [4096] * 2
    of_logits = plan(HEAD, 8192, device="a100")
    assert len(of_logits.chunks) > 4 and of_logits.ways[-2].nhv == 8
    names = [way.name for way in planned.ways]
    assert list(forecast.predicted(planned)) == names
    assert forecast.measured(planned) == measured.MEASURED["h200", 8192, 4096, 151936, False]
    with pytest.raises(ValueError, match=r"device must be one of cpu, cuda, h100, .*, got 'v100'"):
        plan(HEAD, 8192, device="v100")


def test_a_plan_shows_measurements_only_where_they_are_of_that_call():
    for options in ({"chunk_bytes": 2**29}, {"dtype": torch.float16}, {"device": "b200"}):
        assert forecast.measured(plan(HEAD, 8192, **{"device": "h200", **options})) == {}
    assert forecast.measured(plan(HEAD, 4096, device="h200")) == {}
    assert forecast.predicted(plan(HEAD, 8192)) == {}


def test_exponentials_take_a_third_of_the_bytes_of_logits():
    """In chunks of as many tokens; float16 has no room for them. 151936 columns are 2374 x 64."""
    kept, in_half = (
        plan(HEAD, 4096, device="h100", chunk_bytes=2**31, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
    )
    assert kept.chunks == [4096] and len(in_half.chunks) > 1
    of_chunk = kept.ways[-1].phases["chunk"]
    assert of_chunk["logits"] == 2 * 4096 * 151936
    assert of_chunk["operands"] == 2 * 4096 * 4096
    beside = plan(HEAD, max(in_half.chunks), device="h100", chunk_bytes=2**31, dtype=torch.float16)
    of_logits = beside.ways[-1].phases["chunk"]["logits"]
    assert of_logits == 6 * max(in_half.chunks) * 151936
    with_all = kept.ways[-2]
    assert with_all.nhv == 6 and with_all.phases["backward"]["logits"] == of_chunk["logits"]
    less = plan(HEAD, 4096, device="h100", chunk_bytes=2 * 4096 * 151936 - 1)
    assert less.ways[-2].nhv == 8


@pytest.mark.parametrize("shape", ["Qwen3-8B", "Llama-3.1-8B", "DeepSeek-V3"])
def test_a_plan_needs_the_memory_that_was_measured(shape):
    """On an H100, of steps that keep exponentials: within 2 %."""
    for r in predictions.result("h100-bfloat16")["records"]:
        provider, head = r["provider"], (r["shape"], r["name"])
        if head != (shape, "grpo_step") or provider != "fused_rl linear_policy_loss, unproven":
            continue
        config = {"hidden_size": r["hidden"], "vocab_size": r["vocabulary"]}
        way = plan(config, r["tokens"], device="h100").ways[-1]
        assert way.peak == pytest.approx(r["peak_extra_bytes"], rel=0.02)


@pytest.mark.parametrize("frozen", [False, True])
def test_two_passes_are_predicted_where_the_plan_takes_them(frozen):
    planned = plan(HEAD, 8192, device="h200", chunk_bytes=2**27, frozen=frozen)
    found = forecast.predicted(planned)
    same = found["linear_policy_loss"] == found["linear_logprobs"]
    assert same == (planned.ways[-1].nhv == 8) == (not frozen)


def test_what_a_card_cannot_hold_is_named():
    (line,) = (x for x in about_times(plan(HEAD, 65536, device="a100")) if "do not hold" in x)
    assert line == (
        "Beside hidden states and head 80 GB do not hold: eager torch, no gradient, eager torch."
    )
    assert not any("do not hold" in x for x in about_times(plan(HEAD, 8192, device="h200")))


def printed(capsys, tmp_path, *options: str) -> str:
    pytest.importorskip("rich")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(HEAD))
    assert cli.main(["plan", "--model-config", str(config), "--tokens", "8192", *options]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_command_prints_predictions_beside_measurements(capsys, tmp_path):
    out = printed(capsys, tmp_path, "--device", "h200")
    assert "predicted, ms" in out and "measured, ms" in out
    assert "not measurements" in out and "775 TFLOP/s alone, 654 sustained" in out
    assert "commit d709148" in out
    times = forecast.predicted(plan(HEAD, 8192, device="h200"))["linear_policy_loss"]
    assert f"linear_policy_loss │ {times} │ 67.0 │" in out
    assert "commit 50f1677" in printed(capsys, tmp_path, "--device", "h100")


def test_the_command_says_what_it_assumes_and_does_not_know(capsys, tmp_path):
    out = printed(capsys, tmp_path, "--device", "mi300x")
    assert "assumed: 0.79" in out and "No measurement is known" in out
    out = printed(capsys, tmp_path, "--device", "h100", "--dtype", "float32")
    assert "half precisions alone, not for torch.float32" in out
    assert "predicted, ms" not in printed(capsys, tmp_path, "--device", "cuda")


def test_the_command_names_the_cards(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--model-config", "x", "--tokens", "8", "--device", "v100"])
    error = capsys.readouterr().err
    assert "v100" in error and all(name in error for name in CARDS)

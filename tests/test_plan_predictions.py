"""What `fused-rl plan` and the pages say of the time: predictions, and measurements beside them."""

import json
from pathlib import Path

import predictions
import predictions_pages as pages
import pytest
import torch
from predictions import cases

from fused_rl import cli
from fused_rl.plan import forecast, measured
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
    assert flops == {
        pages.FORWARD: {2 * nhv},
        pages.STEP: {6 * nhv},
        pages.ANY: {6 * nhv, 8 * nhv},
        pages.FROZEN: {4 * nhv},
        pages.HALF: {3 * nhv},
    }


def test_the_ways_to_come_are_predicted_to_be_faster():
    """On an H200: the exp2 epilogue, Gluon, E, and E that waits for nothing."""
    found: dict[str, list[float]] = {}
    for row in pages.rows("h200"):
        found.setdefault(row.case, []).append(model.times(H200, row.parts).middle)
    for case, times in found.items():
        assert times == sorted(times, reverse=True) and len(times) >= 3, case


def block(page: str, name: str) -> list[str]:
    text = (ROOT / page).read_text()
    inner = text.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]
    return inner.splitlines()


def test_the_pages_are_what_the_script_writes():
    assert block(predictions.PAGE, "predicted") == pages.predicted()
    assert block(predictions.ERRORS, "errors") == pages.errors(cases())
    assert (ROOT / predictions.MODULE).read_text() == pages.measured_module()


def test_pages_say_that_predictions_are_no_measurements():
    assert "Predictions, not measurements" in pages.predicted()[0]
    assert "A prediction is not a\nmeasurement" in (ROOT / predictions.ERRORS).read_text()


def test_the_measurements_of_the_package_are_those_of_the_result():
    key = ("h200", 8192, 4096, 151936, True)
    (ms,) = (
        r["seconds_median"] * 1e3
        for r in predictions.result("h200")["records"]
        if (r["shape"], r["name"], r["provider"])
        == ("Qwen3-8B", "grpo_step_frozen", "fused_rl linear_logprobs")
    )
    assert measured.MEASURED[key]["linear_logprobs"] == pytest.approx(ms, abs=0.05)
    assert len(measured.MEASURED) == 12 and all(len(w) == 5 for w in measured.MEASURED.values())


def test_a_plan_for_a_card_has_its_chunks_and_times():
    planned = plan(HEAD, 8192, device="h200")
    assert planned.chunks == [2048] * 4
    assert plan(HEAD, 8192, device="a100").chunks != planned.chunks
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


@pytest.mark.parametrize("frozen", [False, True])
def test_two_passes_are_predicted_where_the_plan_takes_them(frozen):
    planned = plan(HEAD, 8192, device="h200", chunk_bytes=2**28, frozen=frozen)
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

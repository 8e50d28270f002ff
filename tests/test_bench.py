"""The benchmark suite: wrong results are called wrong, and noise is not called a change."""

import csv
import importlib.util
import json
import math
import time

import pytest
import torch

from fused_rl import TokenStats, bench, bench_clock, bench_peers, bench_report, cli, grpo
from fused_rl.bench import NO_GRAD, STEP, BenchConfig, Judge, Kind
from fused_rl.bench_peers import PEERS, Case, Peer, batch_of, eager

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

SMALL = ["--tokens", "16", "--hidden", "16", "--vocabulary", "104", "--rounds", "2"]


@pytest.fixture
def case():
    return Case.make(32, 16, 90, torch.bfloat16)


def measured(case, kind, *peers):
    """provider -> record."""
    records = bench.measure(case, kind, peers, rounds=2, tick=lambda: None)
    return {record["provider"]: record for record in records}


def add_peer(monkeypatch, name, stats):
    monkeypatch.setitem(PEERS, name, Peer(name, stats=lambda: stats))


def test_spread_by_hand():
    assert bench_clock.spread([3.0]) == (3.0, 3.0, 3.0)
    assert bench_clock.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_rounds_run_every_case_in_turn():
    ran = []
    cases = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = bench_clock.interleaved(cases, 2, bench_clock.Clock("cpu"))
    assert "".join(ran) == "ababab"
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_the_clock_and_the_peak():
    assert 0.02 <= bench_clock.Clock("cpu")(lambda: time.sleep(0.02)) < 5
    peak = bench_clock.peak_extra_bytes(lambda: torch.ones(2**25), "cpu")
    # Pages that were resident before can be given up meanwhile: a little less is possible.
    assert peak is None or 2**27 - 2**20 <= peak < 2**27 + 2**24


def test_judged_rows_are_spread():
    assert bench.judged_rows(8, 4).tolist() == [0, 2, 4, 6]
    assert bench.judged_rows(3, 4).tolist() == [0, 1, 2]


def test_errors_of_statistics_are_absolute(case):
    exact = eager(case.hidden.double(), case.weight.double(), case.labels)
    rows = torch.arange(32)
    errors = bench.stats_errors(case, (exact[0] + 0.25, exact[1] - 0.5), rows)
    assert errors == pytest.approx([0.25, 0.5], abs=1e-12)
    assert bench.stats_errors(case, (exact[0], None), rows) == pytest.approx([0.0], abs=1e-12)


def test_exact_gradients_are_those_of_autograd(case, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", 10)
    batch = batch_of(case, counted=0.5)
    hidden, weight = (t.double().requires_grad_() for t in (case.hidden, case.weight))
    stats = TokenStats(*eager(hidden, weight, case.labels))
    loss = grpo(beta=bench_peers.BETA)(stats, batch).loss
    expected = torch.autograd.grad(loss, (hidden, weight))
    found = bench.step_gradients(case, batch, torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradient_error_by_hand():
    ones = torch.ones(4)
    assert bench.gradient_error((ones * 1.5, ones), (ones, ones)) == pytest.approx(0.5)
    assert math.isnan(bench.gradient_error((ones, ones * torch.nan), (ones, ones)))


@pytest.mark.parametrize("kind", bench.KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ours_and_the_peers_are_right(kind, dtype):
    peers, _ = bench.usable(("eager", "torch", "liger", "trl"))
    records = measured(Case.make(32, 16, 90, dtype), kind, *peers)
    assert {r["verdict"] for r in records.values()} == {"right"}
    ours = [n for n in records if n.startswith("fused_rl")]
    assert len(ours) == (1 if kind == NO_GRAD else 2)
    if kind == NO_GRAD:
        assert records["fused_rl"]["logprob_error"] < 1e-4
    products = records[bench_report.PRODUCTS]
    assert products["ratio_to_products"] == 1 and products["nhv"] == kind.nhv


@pytest.mark.parametrize("kind", [NO_GRAD, STEP], ids=lambda kind: kind.name)
def test_wrong_results_are_not_timed(kind, case, monkeypatch):
    def shifted(hidden, weight, labels):
        logprobs, entropy = eager(hidden, weight, labels)
        return logprobs * 3, entropy

    def not_a_number(hidden, weight, labels):
        return tuple(t * torch.nan for t in eager(hidden, weight, labels))

    def failing(hidden, weight, labels):
        raise RuntimeError("out of luck\nand more")

    for function in (shifted, not_a_number, failing):
        add_peer(monkeypatch, function.__name__, function)
    records = measured(case, kind, "eager", "shifted", "not_a_number", "failing")
    assert records["eager torch"]["verdict"] == "right"
    for name in ("shifted", "not_a_number"):
        assert records[name]["verdict"] == "wrong"
        assert "seconds_median" not in records[name]
    assert records["failing"]["verdict"] == "failed"
    assert records["failing"]["note"] == "out of luck"


def test_a_wrong_entropy_is_wrong(case):
    judge = Judge(case, NO_GRAD, None)
    logprobs, entropy = eager(case.hidden, case.weight, case.labels)
    assert judge((logprobs, entropy))[1]
    assert not judge((logprobs, entropy + 1))[1]


def test_a_frozen_head_is_judged_by_dhidden(case):
    judge = Judge(case, Kind("", "", 4, frozen=True), batch_of(case))
    assert len(judge.exact) == 1


def test_peers_that_are_not_here(monkeypatch):
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: None)
    assert bench.usable(("eager", "liger")) == (
        ("eager",),
        ["LigerFusedLinearGRPOLoss: liger_kernel, triton is not installed"],
    )
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert bench.usable(("torch",))[0] == ()


def test_a_run_writes_everything(tmp_path, capsys):
    folder = tmp_path / "there"
    options = [*SMALL, "--peers", "eager", "--sweep", "--out", str(folder)]
    assert cli.main(["bench", *options]) == 0
    printed = capsys.readouterr().out
    assert "fused_rl linear_policy_loss" in printed and "N=16 H=16 V=104 bfloat16" in printed
    content = json.loads((folder / "bench.json").read_text())
    assert content["environment"]["torch"] == torch.__version__
    shapes = {(r["tokens"], r["vocabulary"]) for r in content["records"]}
    assert shapes == {(8, 104), (16, 104), (16, 13), (16, 26), (16, 52)}
    for name in ("bench", "linear_logprobs", "grpo_step"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    check_csv(folder / "bench.csv", content)
    result = str(folder / "bench.json")
    assert cli.main(["bench", "compare", result, result]) == 0
    assert "same" in capsys.readouterr().out


def check_csv(path, content):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == bench_report.LIGER_COLUMNS
    ours = [r for r in content["records"] if r["provider"] == "fused_rl"]
    here = [r for r in rows if r["kernel_provider"] == "fused_rl" and r["metric_name"] == "speed"]
    assert [float(r["y_value_50"]) for r in here] == [1e3 * r["seconds_median"] for r in ours]
    assert {(r["x_name"], int(r["x_value"])) for r in here} == {
        *(("N", n) for n in (8, 16)),
        *(("V", v) for v in (13, 26, 52)),
    }
    assert {r["kernel_operation_mode"] for r in rows} == {"forward", "full"}
    assert {r["metric_name"] for r in rows} <= {
        "speed",
        "memory",
        "log-prob error",
        "relative gradient error",
    }


def test_a_run_in_which_ours_is_wrong_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peers, "fused", lambda h, w, y: TokenStats(*eager(h * 2, w, y)))
    config = BenchConfig(tokens=16, hidden=16, vocabulary=100, rounds=1, out=str(tmp_path))
    assert bench.run(config) == 1
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert next(r for r in records if r["provider"] == "fused_rl")["verdict"] == "wrong"


def result(ratio, low=None, high=None, provider="fused_rl", **more):
    record = {"case": "c", "provider": provider, "ratio_to_products": ratio, **more}
    if low is not None:
        record |= {"ratio_p20": low, "ratio_p80": high}
    shape = {"tokens": 1, "hidden": 2, "vocabulary": 3, "dtype": "float32"}
    return {"shape": shape, "records": [record]}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (result(1.0), result(1.04), "same"),
        (result(1.0), result(1.06), "slower"),
        (result(1.0), result(0.94), "faster"),
        (result(1.0, 0.8, 1.2), result(1.2, 1.2, 1.2), "same"),
        (result(1.0, 0.95, 1.05), result(1.2, 1.2, 1.2), "slower"),
        (result(1.0), result(1.0, verdict="wrong"), "wrong"),
        (result(1.0, verdict="failed"), result(1.0), "mended"),
        (result(1.0, verdict="wrong"), result(1.0, verdict="wrong"), "same"),
    ],
)
def test_verdicts(before, after, verdict):
    (change,) = bench_report.compare(before, after)
    assert change["verdict"] == verdict
    assert change["shape"] == (1, 2, 3, "float32")


def test_what_is_new_and_what_is_gone():
    changes = bench_report.compare(result(1.0), result(1.0, provider="other"))
    assert [(c["provider"], c["verdict"]) for c in changes] == [
        ("fused_rl", "gone"),
        ("other", "new"),
    ]


def test_compare_fails_on_our_regressions_alone(tmp_path, capsys):
    files = {}
    for name, content in {
        "a": result(1.0),
        "slow": result(2.0),
        "peer": result(1.0, provider="eager torch"),
        "slow peer": result(2.0, provider="eager torch"),
    }.items():
        files[name] = tmp_path / name
        files[name].write_text(json.dumps(content))

    def compare(a, b):
        return cli.main(["bench", "compare", str(files[a]), str(files[b])])

    assert compare("a", "slow") == 1
    assert "slower" in capsys.readouterr().out
    assert compare("slow", "a") == 0
    assert compare("peer", "slow peer") == 0
    assert cli.main(["bench", "compare", str(tmp_path / "none"), str(files["a"])]) == 2
    assert "none" in capsys.readouterr().err
    assert compare("a", "peer") == 2
    assert "no provider at the same shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tokens", "12"], "tokens must be a multiple of 8, got 12"),
        (["--peers", "eager,nobody"], "got nobody"),
    ],
)
def test_mistakes(options, complaint, capsys):
    assert cli.main(["bench", *options]) == 2
    assert complaint in capsys.readouterr().err


def test_presets_and_options_reach_the_run(monkeypatch):
    configs = []
    monkeypatch.setattr(bench, "run", lambda config: configs.append(config) or 0)
    assert cli.main(["bench", "--preset", "Qwen3-8B", "--peers", "none"]) == 0
    assert cli.main(["bench", "--preset", "Qwen3-8B", "--hidden", "64", "--sweep"]) == 0
    usual = bench_peers.USUAL_PEERS["cpu"]
    assert configs == [
        BenchConfig(hidden=4096, vocabulary=151936, peers=()),
        BenchConfig(hidden=64, vocabulary=151936, peers=usual, sweep=True),
    ]


def test_bench_without_its_extra(capsys, monkeypatch):
    def find_spec(name, original=importlib.util.find_spec):
        return None if name == "rich" else original(name)

    monkeypatch.setattr(cli, "find_spec", find_spec)
    assert cli.main(["bench"]) == 2
    assert 'needs rich: pip install "fused-rl[bench]"' in capsys.readouterr().err

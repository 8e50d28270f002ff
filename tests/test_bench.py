"""The benchmark suite: wrong results are called wrong, and noise is not called a change."""

import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import run as make_bench
import torch

from fused_rl import TokenStats, cli, grpo
from fused_rl.bench import clock, figures, ops, peers, report, rounds, run, tasks
from fused_rl.bench.peers import PEERS, Case, Peer, batch_of, eager
from fused_rl.bench.records import PRODUCTS, on_axis, shape_of
from fused_rl.bench.run import BenchConfig
from fused_rl.bench.tasks import NO_GRAD, STEP, head_task
from fused_rl.system import commands

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
SMALL = ["--tokens", "32", "--hidden", "16", "--vocabulary", "104", "--rounds", "2"]


@pytest.fixture
def case():
    return Case.make(32, 16, 90, torch.bfloat16)


def measured(case, kind, *peers):
    """provider -> record."""
    return by_provider(head_task(case, kind), *peers)


def by_provider(task, *peers):
    records = rounds.measure(task, peers, 2, tick=lambda: None)
    return {record["provider"]: record for record in records}


def add_peer(monkeypatch, name, stats):
    monkeypatch.setitem(PEERS, name, Peer(name, stats=lambda: stats))


def test_spread_by_hand():
    assert clock.spread([3.0]) == (3.0, 3.0, 3.0)
    assert clock.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_rounds_run_every_case_in_turn():
    ran = []
    cases = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = clock.interleaved(cases, 2, clock.Clock("cpu"))
    assert "".join(ran) == "ababab"
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_the_clock_and_the_peak():
    assert 0.02 <= clock.Clock("cpu")(lambda: time.sleep(0.02)) < 5
    # On a CPU a call returns when it is done.
    timing = clock.Clock("cpu").timing(lambda: time.sleep(0.02))
    assert 0.02 <= timing.host == timing.seconds < 5
    rounds = clock.interleaved({"a": lambda: None}, 2, clock.Clock("cpu").timing)
    assert [type(t) for t in rounds["a"]] == [clock.Timing] * 2
    peak = clock.peak_extra_bytes(lambda: torch.ones(2**25), "cpu")
    # Pages that were resident before can be given up meanwhile: a little less is possible.
    assert peak is None or 2**27 - 2**20 <= peak < 2**27 + 2**24


def test_judged_rows_are_spread():
    assert tasks.judged_rows(8, 4).tolist() == [0, 2, 4, 6]
    assert tasks.judged_rows(3, 4).tolist() == [0, 1, 2]


def test_errors_of_statistics_are_absolute(case):
    exact = eager(case.hidden.double(), case.weight.double(), case.labels)
    rows = torch.arange(32)
    errors = tasks.stats_errors(case, (exact[0] + 0.25, exact[1] - 0.5), rows)
    assert errors == pytest.approx([0.25, 0.5], abs=1e-12)
    assert tasks.stats_errors(case, (exact[0], None), rows) == pytest.approx([0.0], abs=1e-12)


def test_exact_gradients_are_those_of_autograd(case, monkeypatch):
    monkeypatch.setattr(tasks, "ROWS", 10)
    batch = batch_of(case, counted=0.5)
    hidden, weight = (t.double().requires_grad_() for t in (case.hidden, case.weight))
    stats = TokenStats(*eager(hidden, weight, case.labels))
    loss = grpo(beta=peers.BETA)(stats, batch).loss
    expected = torch.autograd.grad(loss, (hidden, weight))
    found = tasks.step_gradients(case, batch, torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradient_error_by_hand():
    ones, zeros = torch.ones(4), torch.zeros(4)
    assert tasks.gradient_error((zeros,), (zeros,)) == 0
    assert tasks.gradient_error((ones,), (zeros,)) == 2
    assert tasks.gradient_error((ones * 1.5, ones), (ones, ones)) == pytest.approx(0.5)
    assert math.isnan(tasks.gradient_error((ones, ones * torch.nan), (ones, ones)))


@pytest.mark.parametrize("kind", tasks.KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ours_and_the_peers_are_right(kind, dtype):
    names, _ = tasks.usable(("eager", "torch", "liger", "trl"))
    records = measured(Case.make(32, 16, 90, dtype), kind, *names)
    assert {r["verdict"] for r in records.values()} == {"right"}
    ours = [n for n in records if n.startswith("fused_rl")]
    assert len(ours) == (1 if kind == NO_GRAD else 2)
    if kind == NO_GRAD:
        assert records["fused_rl"]["logprob_error"] < 1e-4
    products = records[PRODUCTS]
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

    def not_for_this_shape(hidden, weight, labels):
        raise AssertionError

    for function in (shifted, not_a_number, failing, not_for_this_shape):
        add_peer(monkeypatch, function.__name__, function)
    names = ("eager", "shifted", "not_a_number", "failing", "not_for_this_shape")
    records = measured(case, kind, *names)
    assert records["eager torch"]["verdict"] == "right"
    for name in ("shifted", "not_a_number"):
        assert records[name]["verdict"] == "wrong"
        assert "seconds_median" not in records[name]
    assert records["failing"]["verdict"] == "failed"
    assert records["failing"]["note"] == "out of luck"
    assert records["not_for_this_shape"]["note"] == "AssertionError"


def test_a_wrong_entropy_is_wrong(case):
    judge = tasks.stats_judge(case)
    logprobs, entropy = eager(case.hidden, case.weight, case.labels)
    assert judge((logprobs, entropy))[1]
    assert not judge((logprobs, entropy + 1))[1]


def test_a_frozen_head_is_judged_by_dhidden_alone(case):
    batch = batch_of(case)
    dhidden, dweight = tasks.step_gradients(case, batch, torch.float64)
    wrong = (None, dhidden, dweight * 2)
    assert tasks.step_judge(case, batch, frozen=True)(wrong) == (0.0, True)
    assert tasks.step_judge(case, batch, frozen=False)(wrong) == (pytest.approx(1), False)


def test_a_peer_without_entropies_can_be_put_under_a_loss(case, monkeypatch):
    add_peer(monkeypatch, "no entropies", lambda *args: (eager(*args)[0], None))
    records = measured(case, STEP, "eager", "no entropies")
    assert records["no entropies"]["verdict"] == "right"
    assert records["no entropies"]["gradient_error"] == records["eager torch"]["gradient_error"]


def test_every_shape_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def doubled(x):
        return x * 2

    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for n in (2, 3):
            x = torch.arange(n)
            assert peers.compiled(doubled)(x).tolist() == [2 * i for i in range(n)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_log_probs_of_logits(trained, dtype, monkeypatch):
    def wrong(logits, labels):
        logprobs, entropy = peers.eager_of_logits(logits, labels)
        return logprobs, entropy + 0.1

    def wrong_slope(logits, labels):
        logprobs, entropy = peers.eager_of_logits(logits, labels)
        return logprobs.detach() + (logprobs - logprobs.detach()) * 1.1, entropy

    for name, way in (("wrong", wrong), ("wrong_slope", wrong_slope)):
        monkeypatch.setitem(ops.LOGITS_PEERS, name, Peer(name, stats=lambda way=way: way))
    task = ops.logits_task(24, 90, dtype, "cpu", trained)
    records = by_provider(task, "eager", "wrong", "wrong_slope")
    assert records["fused_rl"]["verdict"] == records["eager torch"]["verdict"] == "right"
    assert records["fused_rl"]["logprob_error"] < 1e-5
    assert records["wrong"]["verdict"] == "wrong"
    # The value of this one is right.
    assert records["wrong_slope"]["verdict"] == ("wrong" if trained else "right")


def test_kl_of_tokens(monkeypatch):
    def k1(logprobs, ref_logprobs):
        return logprobs - ref_logprobs

    monkeypatch.setitem(ops.KL_PEERS, "k1", Peer("k1", stats=lambda: k1))
    records = by_provider(ops.kl_task(100, "cpu"), "eager", "k1")
    assert records["fused_rl"]["verdict"] == records["eager torch"]["verdict"] == "right"
    assert records["fused_rl"]["kl_error"] < records["eager torch"]["kl_error"] < 1e-6
    assert records["k1"]["verdict"] == "wrong"


# In Triton's interpreter, where float32 is what it computes rightly.
IN_THE_INTERPRETER = """
import dataclasses, torch
from fused_rl.bench import ops, peers, tasks
case = peers.Case.make(16, 16, 104, torch.float32)
for kind in tasks.KINDS[1:]:
    batch = peers.batch_of(case, kind.counted)
    step = peers.liger_from_logits(case, batch, kind.frozen)
    print(tasks.judged(tasks.head_task(case, kind), step)["verdict"])
known = ops.LOGITS_PEERS
known["liger"] = dataclasses.replace(known["liger"], devices=("cpu",))
task = ops.logits_task(16, 104, torch.float32, "cpu", trained=False)
print(tasks.judged(task, task.ways(("liger",))[known["liger"].title])["verdict"])
"""


def test_ligers_triton_peers_are_right():
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    done = child("-c", IN_THE_INTERPRETER, TRITON_INTERPRET="1")
    assert done.stdout.split() == ["right"] * 4, done.stderr


def child(*arguments, **environment):
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_peers_that_are_not_here(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert tasks.usable(("eager", "liger")) == (
        ("eager",),
        ["LigerFusedLinearGRPOLoss: liger_kernel, triton is not installed"],
    )
    assert tasks.usable(("triton", "eager"), "cpu") == (
        ("eager",),
        ["triton_grpo_loss: runs on cuda only"],
    )
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert tasks.usable(("torch",))[0] == ()


def test_points_of_a_sweep():
    config = BenchConfig(tokens=128, hidden=64, vocabulary=4000, sweep=True)
    found = [(p.axis, p.tokens, p.hidden, p.vocabulary) for p in run.points(config)]
    assert found == [
        (None, 128, 64, 4000),
        *(("tokens", n, 64, 4000) for n in (16, 32, 64)),
        *(("vocabulary", 128, 64, v) for v in (500, 1000, 2000)),
        *(("hidden", 128, h, 4000) for h in (8, 16, 32)),
        *(("padded", n, 64, 4000) for n in (32, 64, 128)),
    ]
    shares = [p.kinds[0].counted for p in run.points(config) if p.axis == "padded"]
    assert shares == [1, 0.5, 0.25]
    assert len(run.points(BenchConfig())) == 1


@pytest.mark.parametrize("kind", tasks.KINDS, ids=lambda kind: kind.name)
def test_the_fewest_tokens_are_judged_too(kind):
    """One per sequence: of which half is none."""
    records = measured(Case.make(8, 16, 90, torch.bfloat16), kind, "eager")
    assert {r["verdict"] for r in records.values()} == {"right"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder that a run has written."""
    folder = tmp_path_factory.mktemp("bench") / "there"
    options = [*SMALL, "--peers", "eager,triton", "--sweep", "--out", str(folder)]
    assert cli.main(["bench", *options]) == 0
    return folder


@pytest.fixture
def content(swept):
    return json.loads((swept / "bench.json").read_text())


def test_a_run_writes_everything(swept, content, capsys):
    assert content["environment"]["torch"] == torch.__version__
    assert content["shape"]["peers"] == ["eager"]
    shapes = {(r["tokens"], r["hidden"], r["vocabulary"]) for r in content["records"]}
    assert shapes == {
        *((n, 16, 104) for n in (8, 16, 32)),
        *((32, 8, 104), (32, 16, 13), (32, 16, 26), (32, 16, 52)),
    }
    for name in ("bench", "linear_logprobs", "grpo_step", "padding"):
        assert (swept / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    check_csv(swept / "bench.csv", content)
    padded = [r for r in content["records"] if r.get("axis") == "padded"]
    assert {(r["tokens"], r["counted_tokens"]) for r in padded} == {(8, 8), (16, 8), (32, 8)}
    result = str(swept / "bench.json")
    assert cli.main(["bench", "compare", result, result]) == 0
    assert "same" in capsys.readouterr().out


def test_tables_show_the_shape_asked_for(content, capsys):
    from rich.console import Console

    report.show(Console(width=118), content)
    printed = capsys.readouterr().out
    assert printed.count("N=32 H=16 V=104") == len(tasks.KINDS)
    assert "N=8" not in printed and "padding" not in printed


def check_csv(path, content):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.LIGER_COLUMNS
    ours = [r for r in content["records"] if r["provider"] == "fused_rl"]
    here = [r for r in rows if r["kernel_provider"] == "fused_rl" and r["metric_name"] == "speed"]
    assert [float(r["y_value_50"]) for r in here] == [1e3 * r["seconds_median"] for r in ours]
    assert {(r["x_name"], int(r["x_value"])) for r in here} == {
        *(("N", n) for n in (8, 16, 32)),
        *(("V", v) for v in (13, 26, 52)),
        ("H", 8),
    }
    assert {r["kernel_operation_mode"] for r in rows} == {"forward", "full"}
    assert {r["metric_name"] for r in rows} <= {
        "speed",
        "memory",
        "log-prob error",
        "relative gradient error",
    }


def test_the_shape_asked_for_is_the_end_of_each_curve(content):
    for axis, values in (("tokens", [8, 16, 32]), ("hidden", [8, 16]), ("padded", [8, 16, 32])):
        case = STEP.title if axis != "padded" else run.PADDED_STEP
        points = on_axis(content["records"], case, axis)
        ours = [r for r in points if r["provider"] == "fused_rl linear_policy_loss"]
        assert [r["hidden" if axis == "hidden" else "tokens"] for r in ours] == values


def test_pictures_name_their_lines_and_are_the_same_every_time(content, tmp_path):
    for record in content["records"]:
        # As where nobody can say.
        record["peak_extra_bytes"] = None if record["case"] == NO_GRAD.title else 5 * 2**20
    paths = figures.write_figures(tmp_path, content["records"], "m-", "svg")
    assert [p.name for p in paths] == ["m-linear_logprobs.svg", "m-grpo_step.svg", "m-padding.svg"]
    before = [p.read_bytes() for p in paths]
    figures.write_figures(tmp_path, content["records"], "m-", "svg")
    assert [p.read_bytes() for p in paths] == before
    texts = [
        [t.text for t in ElementTree.parse(p).iter("{http://www.w3.org/2000/svg}text")]
        for p in paths
    ]
    for names in texts:
        ours = [t for t in names if t.startswith("fused_rl")]
        assert ours and "eager torch" in names and "linear" in names
    assert texts[0].count("fused_rl") == 2 and texts[0].count("bare products") == 1
    assert texts[1].count("fused_rl linear_policy_loss") == 3
    assert {"8", "16", "32", "13", "26", "52", "104"} <= set(texts[1])
    assert any("8 tokens are under the loss throughout" in t for t in texts[2])


def test_names_at_the_ends_of_lines_do_not_touch():
    spaced = figures.spaced
    assert spaced({"a": 0.2, "b": 0.9}, 0.1) == {"a": 0.2, "b": 0.9}
    assert spaced({"b": 0.25, "a": 0.2}, 0.1) == pytest.approx({"a": 0.2, "b": 0.3})
    assert spaced({"a": 0.98, "b": 0.97, "c": 0.1}, 0.1) == pytest.approx(
        {"c": 0.1, "b": 0.9, "a": 1.0}
    )


MARKED = "before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbetween\n"
CURVES = "<!-- curves:begin -->\nold\n<!-- curves:end -->\nafter\n"


@pytest.mark.parametrize(
    ("cpu", "cores", "name"),
    [
        ("AMD EPYC", 2, "epyc-2c"),
        ("AMD EPYC 9B45 64-Core Processor", 2, "epyc-9b45-2c"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", 8, "xeon-platinum-8481c-8c"),
    ],
)
def test_machines_have_names(cpu, cores, name):
    assert make_bench.machine({"cpu": cpu, "cores": cores}) == name
    on_gpu = {"cpu": cpu, "cores": cores, "gpu": "NVIDIA H200"}
    assert make_bench.machine(on_gpu) == "h200"


def test_make_bench_writes_results_and_the_page(content, tmp_path, monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(run, "measured", lambda c, _: configs.append(c) or content)
    page = tmp_path / "page.md"
    page.write_text(MARKED + CURVES)
    options = ["--tokens", "32", "--out", str(tmp_path / "results"), "--page", str(page)]
    assert make_bench.main([*options, "--name", "here"]) == 0
    assert configs[0].tokens == 32 and configs[0].sweep
    stem = "results/here-bfloat16"
    for end in (".json", ".csv", "-linear_logprobs.svg", "-grpo_step.svg", "-padding.svg"):
        assert (tmp_path / f"{stem}{end}").stat().st_size > 1000
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert f"]({stem}.json)" in text and f"]({stem}-padding.svg)" in text
    assert text.count("| fused_rl linear_policy_loss |") == 3
    # From the result alone, the same page.
    page.write_text(MARKED + CURVES)
    assert make_bench.main(["--readme", str(tmp_path / f"{stem}.json"), "--page", str(page)]) == 0
    assert page.read_text() == text


def test_make_bench_leaves_a_page_without_marks_alone(content, tmp_path, capsys):
    source = tmp_path / "r.json"
    source.write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    assert make_bench.main(["--readme", str(source), "--page", str(page)]) == 0
    assert page.read_text() == "nothing\n"
    assert "has no <!-- curves:begin -->" in capsys.readouterr().out
    make_bench.replace_block(tmp_path / "none.md", "bench", [])
    assert not (tmp_path / "none.md").exists()


def test_make_bench_says_what_it_cannot_run(capsys):
    assert make_bench.main(["--tokens", "12"]) == 2
    assert "tokens must be a multiple of 8, got 12" in capsys.readouterr().err


def test_make_bench_does_not_publish_wrong_results(content, tmp_path, monkeypatch):
    next(r for r in content["records"] if r["provider"] == "fused_rl")["verdict"] = "wrong"
    monkeypatch.setattr(run, "measured", lambda *_: content)
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    assert make_bench.main(["--out", str(tmp_path), "--page", str(page)]) == 1
    assert page.read_text() == MARKED


# Given to a child process as a plugin: ours is k1, and the peer fails.
SABOTAGE = """
from fused_rl.bench import ops
def failing(p, q):
    raise RuntimeError("out of luck")
ops.fused_kl = lambda p, q: p - q
ops.KL_PEERS["eager"] = ops.Peer("broken", stats=lambda: failing)
"""


def test_files_of_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    names = ("kl", "logits_logprobs", "linear_logprobs")
    result = tmp_path / "b.json"
    options = ["--quick", "-q", "-p", "sabotage", f"--benchmark-json={result}"]
    options += ["-k", "fused_rl or eager or liger", *(f"bench/bench_{name}.py" for name in names)]
    done = child("-c", "import pytest; pytest.main()", *options, PYTHONPATH=str(tmp_path))
    assert "2 failed, 6 passed, 2 skipped" in done.stdout, done.stdout
    assert "fused_rl is wrong: {'kl_error': " in done.stdout
    assert "eager is failed: {'note': 'out of luck'}" in done.stdout
    assert "fused_selective_log_softmax (no entropy): runs on cuda only" in done.stdout
    records = json.loads(result.read_text())["benchmarks"]
    groups = {"no_gradient-16-104", "with_gradient-16-104", "no_gradient-16-16-104"}
    assert {r["group"] for r in records} == groups and len(records) == 6
    for record in records:
        info = record["extra_info"]
        assert info["ratio_to_products"] > 0 and info["error"] < 0.2
        assert info["environment"]["torch"] == torch.__version__


def test_the_folder_is_collected_whole():
    pytest.importorskip("pytest_benchmark")
    done = child("-c", "import pytest; pytest.main()", "bench", "--quick", "--collect-only", "-q")
    for path in (ROOT / "bench").glob("bench_*.py"):
        op = path.stem.removeprefix("bench_")
        assert f"bench/{path.name}::test_{op}[" in done.stdout


def test_a_run_in_which_ours_is_wrong_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "fused", lambda h, w, y: TokenStats(*eager(h * 2, w, y)))
    config = BenchConfig(tokens=16, hidden=16, vocabulary=100, rounds=1, out=str(tmp_path))
    assert run.run(config) == 1
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert next(r for r in records if r["provider"] == "fused_rl")["verdict"] == "wrong"


def stop_at(monkeypatch, kinds, *numbers):
    """Signals reach the process once so many kinds have been measured."""
    begun, work = [], run.WORKS["logprobs"]

    def head_task(case, kind, original=work.task):
        if len(begun) == kinds:
            for number in numbers:
                os.kill(os.getpid(), number)
        begun.append(kind)
        return original(case, kind)

    monkeypatch.setitem(run.WORKS, "logprobs", replace(work, task=head_task))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_run_that_is_stopped_writes_what_was_measured(
    number, status, tmp_path, monkeypatch, capsys
):
    stop_at(monkeypatch, 2, number)

    def save(*args, original=report.write_bars):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(report, "write_bars", save)
    options = [*SMALL, "--peers", "none", "--out", str(tmp_path)]
    assert cli.main(["bench", *options]) == status
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["interrupted"] == status
    assert list(dict.fromkeys(r["case"] for r in content["records"])) == [NO_GRAD.title, STEP.title]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(report.FILES)
    printed = capsys.readouterr()
    assert "fused_rl linear_policy_loss" in printed.out and printed.err == ""


def test_a_run_that_is_stopped_at_once_leaves_an_older_result(tmp_path, monkeypatch):
    (tmp_path / "bench.json").write_text("older")
    stop_at(monkeypatch, 0, signal.SIGTERM)
    assert cli.main(["bench", *SMALL, "--peers", "none", "--out", str(tmp_path)]) == 143
    assert [p.read_text() for p in tmp_path.iterdir()] == ["older"]


@pytest.mark.parametrize("kinds", range(1, 14))
def test_figures_of_a_sweep_that_was_stopped_anywhere(kinds, content, tmp_path, monkeypatch):
    """After the shape asked for, and between the points of every curve."""
    monkeypatch.setattr(figures, "save", lambda figure, path: path.touch())

    def group(record):
        return record["case"], record.get("axis"), *shape_of(record)

    groups = list(dict.fromkeys(map(group, content["records"])))
    chosen = groups[: kinds * len(groups) // 13]
    content["records"] = [r for r in content["records"] if group(r) in chosen]
    for path in report.write(tmp_path, content):
        assert path.exists()


def test_make_bench_that_is_stopped_leaves_page_and_result(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measured", lambda *_: {**content, "interrupted": 143})
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    options = ["--out", str(tmp_path), "--page", str(page), "--name", "here"]
    assert make_bench.main(options) == 143
    assert page.read_text() == MARKED
    written = sorted(p.name for p in tmp_path.iterdir() if p != page)
    assert written == [f"here-bfloat16-interrupted.{suffix}" for suffix in ("csv", "json")]
    monkeypatch.setattr(run, "measured", lambda *_: {**content, "records": [], "interrupted": 130})
    assert make_bench.main(options) == 130


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
    (change,) = report.compare(before, after)
    assert change["verdict"] == verdict
    assert change["shape"] == (1, 2, 3, "float32")


def test_what_is_new_and_what_is_gone():
    changes = report.compare(result(1.0), result(1.0, provider="other"))
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
    "content",
    [
        *({}, [], None, 7, "x", {"shape": {}}, {"shape": [], "records": []}),
        {"shape": {}, "records": [None]},
        {"shape": {}, "records": [{"case": "c"}]},
        {"shape": {}, "records": {}},
        result("1"),
        result(0.0),
        result(math.nan),
        result(math.inf),
        result(10**400),
        result(True),
        result(1.0, "low", "high"),
        result(1.0, provider="\x1b[31mred"),
        result(1.0, provider=None),
        result(1.0, tokens=[1]),
        result(1.0, dtype={}),
        result(1.0, verdict=[]),
        result(None),
    ],
    ids=lambda content: ascii(content)[:40],
)
def test_what_is_no_result_is_a_mistake(content, tmp_path, capsys):
    path = tmp_path / "b.json"
    path.write_text(json.dumps(content))
    (tmp_path / "a.json").write_text(json.dumps(result(1.0)))
    for pair in ((path, tmp_path / "a.json"), (path, path)):
        assert cli.main(["bench", "compare", *map(str, pair)]) == 2
        error = capsys.readouterr().err
        assert f"{path} is no result of fused-rl bench" in error and error.count("\n") == 1


def test_what_a_result_says_is_not_markup(tmp_path, capsys):
    path = tmp_path / "b.json"
    path.write_text(json.dumps(result(1.0, provider="fused_rl [/nothing]")))
    assert cli.main(["bench", "compare", str(path), str(path)]) == 0
    assert "fused_rl [/nothing]" in capsys.readouterr().out


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
    monkeypatch.setattr(run, "run", lambda config: configs.append(config) or 0)
    assert cli.main(["bench", "--preset", "Qwen3-8B", "--peers", "none"]) == 0
    assert cli.main(["bench", "--preset", "Qwen3-8B", "--hidden", "64", "--sweep"]) == 0
    usual = peers.USUAL_PEERS["cpu"]
    assert configs == [
        BenchConfig(hidden=4096, vocabulary=151936, peers=()),
        BenchConfig(hidden=64, vocabulary=151936, peers=usual, sweep=True),
    ]


def test_bench_without_its_extra(capsys, monkeypatch):
    def find_spec(name, original=importlib.util.find_spec):
        return None if name == "rich" else original(name)

    monkeypatch.setattr(commands, "find_spec", find_spec)
    assert cli.main(["bench"]) == 2
    assert 'needs rich: pip install "fused-rl[bench]"' in capsys.readouterr().err

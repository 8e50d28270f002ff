"""The benchmark of two heads: what is wrong is called so; and how right ours are, in numbers."""

import json
from dataclasses import replace

import divergence_errors as errors
import pytest
import run as make_bench
import torch

from fused_rl import cli
from fused_rl.bench import report, rounds, tasks, two_heads
from fused_rl.bench.records import PRODUCTS, error_of
from fused_rl.bench.run import BenchConfig, points
from fused_rl.bench.two_heads import (
    TWO_HEAD_KINDS,
    TWO_HEAD_PEERS,
    TwoHeads,
    eager_divergence,
    two_head_task,
)

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

SMALL = ["--tokens", "32", "--hidden", "16", "--vocabulary", "104", "--rounds", "2"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


def measured(kind, *peers, dtype=torch.bfloat16):
    """provider -> record."""
    task = two_head_task(TwoHeads.make(32, 16, 90, dtype), kind)
    records = rounds.measure(task, peers, 2, tick=lambda: None)
    return {record["provider"]: record for record in records}


@pytest.mark.parametrize("kind", TWO_HEAD_KINDS, ids=lambda kind: kind.title)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ours_and_the_peers_are_right(kind, dtype):
    names, _ = tasks.usable(("eager", "trl", "liger"), "cpu", TWO_HEAD_PEERS)
    records = measured(kind, *names, dtype=dtype)
    assert {r["verdict"] for r in records.values()} == {"right"}
    ours = [r for n, r in records.items() if n.startswith("fused_rl")]
    assert len(ours) == (2 if kind.trains else 1)
    eager = error_of(records["eager torch"])
    budget = 4e-3 if kind.trains else 1e-5
    assert all(error_of(r) < budget for r in ours)
    assert dtype == torch.float32 or all(error_of(r) < eager / 3 for r in ours)
    products = records[PRODUCTS]
    assert products["ratio_to_products"] == 1 and products["nhv"] == kind.nhv


def test_kinds_count_their_products():
    """Logits of both heads, and the student's gradients."""
    found = {k.title: k.nhv for k in TWO_HEAD_KINDS if k.beta == 1}
    assert list(found.values()) == [4, 8, 6]
    assert [k.nhv for k in TWO_HEAD_KINDS if k.beta == 0.5] == [4, 8, 6]


@pytest.mark.parametrize("kind", TWO_HEAD_KINDS[:3], ids=lambda kind: kind.name)
def test_wrong_results_are_not_timed(kind, monkeypatch):
    def scaled(*given):
        return eager_divergence(*given) * 1.5

    peer = two_heads.Peer("scaled", stats=lambda: scaled)
    monkeypatch.setitem(TWO_HEAD_PEERS, "scaled", peer)
    record = measured(kind, "scaled")["scaled"]
    assert record["verdict"] == "wrong" and "seconds_median" not in record


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_exact_gradients_are_those_of_autograd(beta, monkeypatch):
    monkeypatch.setattr(two_heads, "ROWS", 10)
    kind = replace(TWO_HEAD_KINDS[1], beta=beta)
    heads = TwoHeads.make(32, 16, 90, torch.float64)
    hidden, weight = heads.student.leaves()
    s, t = (
        torch.log_softmax(h @ w.T, -1)
        for h, w in ((hidden, weight), (heads.teacher_hidden, heads.teacher_weight))
    )
    m = torch.logaddexp(s, t) - torch.tensor(2.0).log()
    terms = s.exp() * (s - t) if beta == 1 else (s.exp() * (s - m) + t.exp() * (t - m)) / 2
    expected = torch.autograd.grad(terms.sum(-1).mean(), (hidden, weight))
    found = two_heads.exact_gradients(heads, kind, torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_command_and_its_files(tmp_path):
    """A peer that has no divergence is left out, a sweep is of log-probs alone."""
    command = ["bench", "--work", "divergence", *SMALL, "--peers", "eager,torch", "--sweep"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["shape"]["work"] == "divergence" and content["shape"]["peers"] == ["eager"]
    assert {r["case"] for r in content["records"]} == {k.title for k in TWO_HEAD_KINDS}
    assert not [r for r in content["records"] if "axis" in r]
    rows = report.csv_rows(content)
    assert {r["kernel_name"] for r in rows} == {"linear_divergence", "distillation_step"}
    assert {"divergence error", "relative gradient error"} < {r["metric_name"] for r in rows}
    lines = make_bench.table(content, "results/x.json")
    assert "--work divergence --tokens 32 --hidden 16 --vocabulary 104`" in lines[0]
    assert make_bench.block_of(content) == "divergence-104"
    changes = report.compare(content, content)
    assert changes and {c["verdict"] for c in changes} == {"same"}


def test_make_bench_writes_a_result_and_a_block_of_its_own(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- divergence-104:begin -->\n<!-- divergence-104:end -->\n")
    options = ["--work", "divergence", *SMALL, "--peers", "none", "--out", str(tmp_path)]
    assert make_bench.main(["--name", "here", "--page", str(page), *options]) == 0
    assert (tmp_path / "here-bfloat16-divergence-104.json").exists()
    assert "| **divergence, no gradient: reverse KL** (4 NHV) |" in page.read_text()


def test_log_probs_are_the_work_that_is_asked_for_by_default():
    assert points(BenchConfig()) == points(BenchConfig(work="logprobs"))


# How right they are.


def per_token(function, level, beta):
    """Divergences [N] and the gradients of their mean."""
    given = errors.inputs(level)
    found = function(*given, beta)
    return found.detach(), torch.autograd.grad(found.mean(), given[:2])


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("level", errors.LEVELS)
def test_ours_from_bfloat16_beside_eager_with_float32_logits(level, beta):
    """Divergences are no worse, token by token, and right to 1e-3 at 1e-6 nats; gradients have a
    rounding more, that of the logits' gradient to bfloat16, whose products ours are.
    """
    exact = errors.inputs(level, torch.float64)
    value = eager_divergence(*exact, beta)
    gradients = torch.autograd.grad(value.mean(), exact[:2])

    def distances(function):
        found, slopes = per_token(function, level, beta)
        off = (found - value).norm() / value.norm()
        pairs = zip(slopes, gradients, strict=True)
        return [off.item(), *(((a - b).norm() / b.norm()).item() for a, b in pairs)]

    ours, eager = distances(two_heads.fused_divergence), distances(errors.in_float32)
    assert ours[0] < 1e-3 and ours[0] <= eager[0]
    assert all(a < 1.5 * b < 3e-3 for a, b in zip(ours[1:], eager[1:], strict=True))


def test_the_table_of_errors_by_hand():
    record = {"provider": "us", "level": "4", "nats": 4.0, "value_error": 0.1}
    both = [{**record, "divergence": which, "gradient_error": 2e-3} for which in errors.BETAS]
    where = {"trl": "1", "liger": "2", "torch": "3"}
    lines = errors.table({"environment": where, "records": both}, "results/x.json")
    assert lines[2] == lines[6] == "| us | 1e-01, 2e-03 |" and "4 nats" in lines[0]


@pytest.mark.slow
def test_ligers_op_in_the_interpreter():
    """The process that the script starts; at 1e-6 nats, where Liger's chunked loss is lost."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    found = errors.of_the_interpreter()
    assert len(found) == len(errors.LEVELS) * len(errors.BETAS)
    assert all(r["gradient_error"] < 5e-3 for r in found)

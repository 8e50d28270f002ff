"""The benchmark of pairs: everybody's step is the same step, and what is wrong is called so."""

import json

import pytest
import run as make_bench
import torch
from torch.nn.functional import logsigmoid

from fused_rl import cli
from fused_rl.bench import preference, report, rounds, tasks
from fused_rl.bench.preference import (
    PREFERENCE_KINDS,
    PREFERENCE_PEERS,
    Pairs,
    eager_logprobs,
    preference_task,
)
from fused_rl.bench.records import BARE, PRODUCTS, error_of
from fused_rl.bench.run import BenchConfig, points

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

SMALL = ["--tokens", "64", "--hidden", "16", "--vocabulary", "104", "--rounds", "2"]
BY_TITLE = {"argvalues": PREFERENCE_KINDS, "ids": lambda kind: kind.title}


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


def measured(kind, *peers, dtype=torch.bfloat16):
    """provider -> record."""
    task = preference_task(Pairs.make(64, 16, 90, dtype), kind)
    records = rounds.measure(task, peers, 2, tick=lambda: None)
    return {record["provider"]: record for record in records}


@pytest.mark.parametrize("kind", **BY_TITLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ours_and_the_peers_are_right(kind, dtype):
    names, _ = tasks.usable(("eager", "trl", "liger"), "cpu", PREFERENCE_PEERS)
    records = measured(kind, *names, dtype=dtype)
    assert len(records) == len(BARE) + 1 + len(names)
    assert {r["verdict"] for r in records.values()} == {"right"}
    ours = error_of(records["fused_rl linear_preference_loss"])
    if dtype == torch.bfloat16:
        # Rounded where gradients are stored; eager torch's logits are rounded as well.
        assert ours < 4e-3 and ours < error_of(records["eager torch"])
    else:
        assert ours < 1e-5
    products = records[PRODUCTS]
    assert products["ratio_to_products"] == 1 and products["nhv"] == kind.nhv
    assert products["counted_tokens"] == 48


@pytest.mark.parametrize("kind", **BY_TITLE)
def test_everybody_has_the_same_loss_and_gradients(kind):
    """In float64, where they differ by rounding alone; Liger's softmax is float32 in any case."""
    names, _ = tasks.usable(("eager", "trl", "liger"), "cpu", PREFERENCE_PEERS)
    steps = preference.ways(Pairs.make(64, 16, 90, torch.float64), kind, names)
    loss, *gradients = steps.pop("eager torch")()
    assert len(gradients) == (1 if kind.frozen else 2) and len(steps) == len(names)
    for title, step in steps.items():
        found = step()
        bound = 1e-12 if title.startswith("fused_rl") else 1e-5
        assert abs(found[0] - loss) < bound, title
        assert tasks.gradient_error(found[1:], gradients) < bound, title


@pytest.mark.parametrize("kind", **BY_TITLE)
def test_wrong_results_are_not_timed(kind, monkeypatch):
    def scaled(*given):
        return eager_logprobs(*given) * 1.5

    monkeypatch.setitem(PREFERENCE_PEERS, "scaled", preference.Peer("scaled", stats=lambda: scaled))
    record = measured(kind, "scaled")["scaled"]
    assert record["verdict"] == "wrong" and "seconds_median" not in record


@pytest.mark.parametrize("kind", **BY_TITLE)
def test_exact_gradients_are_those_of_the_formula(kind, monkeypatch):
    """In one piece, pair by pair."""
    monkeypatch.setattr(preference, "ROWS", 10)
    monkeypatch.setattr(tasks, "ROWS", 10)
    pairs = Pairs.make(64, 16, 90, torch.float64)

    def sums(hidden, weight):
        logp = torch.log_softmax(hidden @ weight.T, -1).reshape(8, 8, -1)
        own = [logp[s][range(8), pairs.labels[s]] for s in range(8)]
        return [row[kept].sum() for row, kept in zip(own, pairs.mask, strict=True)]

    hidden, weight = pairs.heads.student.leaves()
    own, known = sums(hidden, weight), sums(*pairs.heads.teacher)
    n = pairs.mask.sum(-1)
    loss = 0.0
    for w, r in zip(range(4), range(4, 8), strict=True):
        margin = 0.1 * (own[w] - known[w] - own[r] + known[r])
        if not kind.referenced:
            margin = 2 * own[w] / n[w] - 2 * own[r] / n[r] - 1
        loss = loss - logsigmoid(margin) / 4
    expected = torch.autograd.grad(loss, (hidden, weight))
    found = preference.exact_gradients(pairs, kind, torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_quarter_is_masked_and_answers_are_of_unequal_length():
    mask = preference.answers(8, 256)
    assert mask.sum() == mask.numel() * 3 // 4
    assert not mask[:, :32].any() and mask[:, 32:192].all()
    chosen, rejected = mask.sum(-1).chunk(2)
    assert (chosen != rejected).all() and 0 < (chosen > rejected).sum() < 4


def test_kinds_count_their_products():
    """The policy's logits and gradients, and the reference's logits."""
    assert [k.nhv for k in PREFERENCE_KINDS] == [6 + 2, 4 + 2, 6]


def test_the_command_and_its_files(tmp_path):
    """A peer that has nothing of the kind is left out, a sweep is of log-probs alone."""
    command = ["bench", "--work", "preference", *SMALL, "--peers", "eager,torch", "--sweep"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["shape"]["work"] == "preference" and content["shape"]["peers"] == ["eager"]
    assert {r["case"] for r in content["records"]} == {k.title for k in PREFERENCE_KINDS}
    assert len(points(BenchConfig(work="preference", sweep=True))) == 1
    rows = report.csv_rows(content)
    assert {r["kernel_name"] for r in rows} == {"dpo_step", "simpo_step"}
    assert "relative gradient error" in {r["metric_name"] for r in rows}
    lines = make_bench.table(content, "results/x.json")
    assert "--work preference --tokens 64 --hidden 16 --vocabulary 104`" in lines[0]
    assert lines[-1].endswith(
        "error is the relative error of the gradients against float32 or better."
    )
    changes = report.compare(content, content)
    assert changes and {c["verdict"] for c in changes} == {"same"}


def test_make_bench_writes_a_result_and_a_block_of_its_own(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- preference-104:begin -->\n<!-- preference-104:end -->\n")
    options = ["--work", "preference", *SMALL, "--peers", "none", "--out", str(tmp_path)]
    assert make_bench.main(["--name", "here", "--page", str(page), *options]) == 0
    assert (tmp_path / "here-bfloat16-preference-104.json").exists()
    assert "| **DPO step, head trained** (8 NHV) |" in page.read_text()

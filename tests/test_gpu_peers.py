"""bench/gpu_peers.py where there is no GPU: who is left out and why, and what can run here."""

import sys

import gpu_peers
import pytest
import torch

from fused_rl.bench import peers
from fused_rl.bench.peers import Case, Missing, eager, gradients
from fused_rl.bench.tasks import judged


@pytest.fixture
def case() -> Case:
    return Case.make(16, 8, 50, torch.float32)


@pytest.fixture(autouse=True)
def registered():
    """PEERS is as before then."""
    before = dict(peers.PEERS)
    yield
    peers.PEERS.clear()
    peers.PEERS.update(before)


def test_each_peer_that_is_not_here_says_why():
    names, missing = gpu_peers.found(torch.device("cpu"))
    assert "eager" in names and "compile" not in names
    here = [gpu_peers.PEERS[name].title for name in names]
    for peer in (*gpu_peers.EXTRA.values(), peers.PEERS["cce"], peers.PEERS["quack"]):
        assert (peer.title in here) != any(m.startswith(f"{peer.title}: ") for m in missing)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_peer_that_ends_its_process_is_missing(monkeypatch):
    """With the last thing that it said, or without a word."""
    with pytest.raises(Missing, match=r"^Liger native: .*CUDA"):
        gpu_peers.probe("liger native")
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(Missing, match="Liger native: exit status 1"):
        gpu_peers.probe("liger native")
    monkeypatch.setattr(gpu_peers, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(sys, "executable", "yes")
    with pytest.raises(Missing, match="did not end"):
        gpu_peers.probe("liger native")


def test_trls_head_runs_without_its_trainers(case, monkeypatch):
    """Forward and backward, as eager torch."""
    pytest.importorskip("trl.kernels")
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    stats = gpu_peers.trl_chunked()
    assert not hasattr(sys.modules["trl.trainer.utils"], "__file__")
    results = []
    for of in (stats, eager):
        leaves = case.leaves()
        logprobs, _ = of(*leaves, case.labels)
        results.append(gradients((logprobs * torch.arange(16.0)).sum(), leaves))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_the_sum_is_judged_by_its_gradients(case, monkeypatch):
    """Ours and torch's are right; half of the sum is not. In bfloat16, as it is measured."""
    rounded = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.labels)
    half = peers.Peer("half", stats=lambda: lambda h, w, y: eager(h, w, y)[0].sum() / 2)
    monkeypatch.setitem(gpu_peers.SUMS, "half", half)
    task, missing = gpu_peers.sum_task(rounded)
    assert any(m.startswith("QuACK chunked: ") for m in missing)
    verdicts = {title: judged(task, run) for title, run in task.ways(()).items()}
    assert verdicts.pop("half")["verdict"] == "wrong"
    assert {"fused_rl linear_logprobs", "eager torch"} <= verdicts.keys()
    assert {v["verdict"] for v in verdicts.values()} == {"right"}
    assert task.fields["nhv"] == 6 and task.fields["tokens"] == 16
    exact = gpu_peers.sum_gradients(case, torch.float64)
    leaves = tuple(t.double().detach().requires_grad_() for t in case.leaves())
    expected = torch.autograd.grad(eager(*leaves, case.labels)[0].sum(), leaves)
    for found, other in zip(exact, expected, strict=True):
        torch.testing.assert_close(found.double(), other, atol=1e-5, rtol=1e-5)

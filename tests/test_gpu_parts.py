"""The parts of bench/gpu.py one by one: the ways that are tried, how they are judged, what dies."""

import json
from types import SimpleNamespace

import decisions
import pytest
import torch


def session(tmp_path, parts, chosen=("cases",)) -> dict:
    """What a session keeps of these parts, by name, title and call."""
    from gpu_session import Session

    pytest.importorskip("triton", reason="triton is not installed")
    options = SimpleNamespace(small=True, parts=chosen, rounds=1, budget=1000, commit="c")
    found = Session(torch.device("cpu"), options)
    found.parts = lambda: iter(parts)
    found.run_all(tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == found.content
    return found.content


def test_a_part_that_dies_costs_no_other(tmp_path):
    def dies():
        raise RuntimeError("out of memory")

    ran = []
    parts = [("cases", "a", dies), ("peers", "b", dies), ("cases", "c", lambda: ran.append("c"))]
    content = session(tmp_path, parts)
    assert ran == ["c"] and list(content["seconds"]) == ["a", "b", "c"]
    assert content["failed"] == {"a": "RuntimeError: out of memory"}
    assert content["peers failed"] == {"b": "RuntimeError: out of memory"}


def test_unproven_kernels_are_on_for_their_runs_alone():
    from fused_rl.ops import trust

    seen = []
    peer = {"a peer": lambda: seen.append(("peer", trust.options()))}
    ways = decisions.with_unproven({"fused_rl": lambda: seen.append(trust.options()), **peer})
    assert list(ways) == ["fused_rl", "a peer", "fused_rl, unproven"]
    ways["fused_rl, unproven"]()
    ways["fused_rl"]()
    before = trust.options()
    assert seen == [before._replace(unproven=True), before] and not before.unproven


def test_within_an_ulp_by_hand(monkeypatch):
    from decisions import within_an_ulp as within

    one = torch.ones(100, dtype=torch.bfloat16)
    above = one.clone()
    above[3] = 1 + 2**-7
    assert within(above, one)
    above[3] = 1 + 2**-6
    assert not within(above, one)
    above[3] = torch.nan
    assert not within(above, one)


@pytest.mark.parametrize("major", [0, 8, 9, 10])
def test_every_forward_runs_with_its_own_tile(monkeypatch, major):
    """On a device of any compute capability, those of the kernels' table first, whatever is in it;
    the settings of the library are as before then.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    import forwards

    from fused_rl.kernels import configs
    from fused_rl.kernels import linear_logprobs as kernel

    added = configs.Config(32, 512, 16, 4, 1, False, rows=2)
    table = [*configs.configs(major), added]
    monkeypatch.setitem(configs.CONFIGS, major, table)
    tried, before = [], kernel.chosen

    def statistics(*args):
        tried.append(args[-1])
        raise StopIteration

    monkeypatch.setattr(kernel, "fused_statistics", statistics)
    monkeypatch.setattr(forwards, "WAYS", (forwards.in_registers,))
    case = forwards.Case(torch.zeros(8, 4), torch.zeros(9, 4), torch.zeros(8, dtype=torch.long))
    ways = forwards.forward_ways(case, decisions.LARGE, configs.Device(2, major))
    for run in ways.values():
        with pytest.raises(StopIteration):
            run()
    assert [config.title for config in tried] == list(ways)
    plain = [config for config in table if not config.stores]
    titles = dict.fromkeys(config.title for config in plain)
    assert list(ways)[: len(titles)] == list(titles)
    assert {config[:5] for config in tried} == {c[:5] for c in plain} | set(decisions.LARGE.fused)
    titles = [
        title for title, _ in forwards.stored(case, decisions.LARGE, configs.Device(2, major))
    ]
    assert titles == [config.title for config in table if config.stores]
    assert before == kernel.chosen


def test_a_way_is_an_entry(monkeypatch):
    """WAYS gives titles and calls."""
    pytest.importorskip("triton", reason="triton is not installed")
    import forwards

    from fused_rl.kernels.configs import Device

    def of_mine(case, sizes, device):
        yield "mine", lambda: case.hidden + device.major

    case = forwards.Case(torch.zeros(8, 4), torch.zeros(9, 4), torch.zeros(8, dtype=torch.long))
    monkeypatch.setattr(forwards, "WAYS", (*forwards.WAYS, of_mine))
    ways = forwards.forward_ways(case, decisions.SMALL, Device(2, 8))
    assert list(ways)[-2:] == ["L2 tiles 8x128", "mine"]
    assert ways["mine"]().eq(8).all()


def test_the_products_error_is_that_of_their_logits(monkeypatch):
    """In pieces of tokens; far from float64 where the product is made wrong."""
    pytest.importorskip("triton", reason="triton is not installed")
    import forwards

    from fused_rl.bench.tasks import exact_stats, largest_errors
    from fused_rl.kernels import linear_gradients

    case = forwards.Case.make(16, 8, 60, torch.float32)
    rows = torch.tensor([0, 2, 3, 15])
    monkeypatch.setattr(forwards, "ROWS", 3)
    exact = exact_stats(case, rows)
    found = largest_errors(forwards.stats_of_products(case, rows), exact)
    assert 0 < max(found) < 1e-5
    own = linear_gradients.product
    monkeypatch.setattr(linear_gradients, "product", lambda a, b: own(a, b).bfloat16().float())
    assert min(largest_errors(forwards.stats_of_products(case, rows), exact)) > 1e-4

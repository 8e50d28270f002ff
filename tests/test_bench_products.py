"""The bare products: what they compute, where they write, and what is said beside them."""

import threading
import time
from statistics import median

import pytest
import run as make_bench
import torch

from fused_rl.bench import clock, ops, preference, report, rounds, tasks, two_heads
from fused_rl.bench.clock import Timing
from fused_rl.bench.peers import Case
from fused_rl.bench.products import bare, factors
from fused_rl.bench.records import ALLOCATING, BARE, PRODUCTS, ratio_to_full

pytest.importorskip("rich")

N, H, V = 32, 16, 90


def task_of(kind):
    if isinstance(kind, two_heads.TwoHeadKind):
        return two_heads.two_head_task(two_heads.TwoHeads.make(N, H, V, torch.float32), kind)
    if isinstance(kind, preference.PreferenceKind):
        pairs = preference.Pairs.make(N, H, V, torch.float32)
        return preference.preference_task(pairs, kind)
    return tasks.head_task(Case.make(N, H, V, torch.float32), kind)


KINDS = (*tasks.KINDS, *two_heads.TWO_HEAD_KINDS[:3], *preference.PREFERENCE_KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_every_task_is_judged_by_products_in_memory_that_is_there(kind):
    """As many as its NHV, and right."""
    products = task_of(kind).bare
    assert [*products] == [PRODUCTS, ALLOCATING]
    first = products[PRODUCTS]()
    places = [output.data_ptr() for output in first]
    for output in first:
        output.fill_(torch.nan)
    again = products[PRODUCTS]()
    assert [output.data_ptr() for output in again] == places
    assert len(set(places)) == len(places) == kind.nhv // 2
    assert not any(output.isnan().any() for output in again)
    shapes = [tuple(output.shape) for output in again]
    assert shapes.count((N, V)) == kind.nhv // 2 - shapes.count((N, H)) - shapes.count((V, H))


def test_products_by_hand():
    case = Case.make(N, H, V, torch.bfloat16)
    pairs = factors(case.hidden, case.weight, 6)
    assert sum(2 * len(a) * b.numel() for a, b in pairs) == 6 * N * H * V
    dlogits = pairs[1][0]
    assert dlogits.shape == (N, V) and dlogits.dtype == torch.bfloat16
    expected = (case.hidden @ case.weight.T, dlogits @ case.weight, dlogits.T @ case.hidden)
    for found, exact in zip(bare(pairs)[PRODUCTS](), expected, strict=True):
        assert torch.equal(found, exact)


def test_only_a_cpu_has_products_that_allocate():
    hidden, weight = torch.empty(N, H, device="meta"), torch.empty(V, H, device="meta")
    assert [*bare(factors(hidden, weight, 4))] == [PRODUCTS]


def test_the_copies_are_judged_in_memory_that_is_there_too():
    for task in (ops.logits_task(8, 30, torch.float32, "cpu", False), ops.kl_task(8, "cpu")):
        first, again = task.bare[PRODUCTS](), task.bare[PRODUCTS]()
        assert first.data_ptr() == again.data_ptr() and [*task.bare] == [PRODUCTS]


def test_memory_of_both():
    """64 MiB of logits."""
    pairs = factors(torch.ones(1024, 2), torch.ones(16384, 2), 2)
    both = bare(pairs).values()
    for run in both:
        run()  # once, for what torch's products keep
    into, allocating = (clock.peak_extra_bytes(run, "cpu") for run in both)
    assert into is None or (into < 2**20 and 2**26 - 2**20 <= allocating < 2**26 + 2**24)


def test_both_ratios_and_the_processors_time_by_hand():
    taken = {
        PRODUCTS: [Timing(1.0, 1.0, 2.0), Timing(2.0, 2.0, 4.0), Timing(1.0, 1.0, 2.0)],
        ALLOCATING: [Timing(2.0, 2.0, 3.0)] * 3,
        "us": [Timing(3.0, 3.0, 5.0), Timing(3.0, 3.0, 6.0), Timing(1.0, 1.0, 1.0)],
    }
    found = rounds.compared(taken, "us")
    assert found["ratio_to_products"] == median([3, 1.5, 1]) == 1.5
    assert found["ratio_to_allocating_products"] == median([1.5, 1.5, 0.5]) == 1.5
    assert found["user_seconds_median"] == 5 and found["seconds_median"] == 3
    assert rounds.compared(taken, ALLOCATING)["ratio_to_products"] == 2
    assert rounds.compared(taken, PRODUCTS)["ratio_to_allocating_products"] == 0.5
    on_gpu = {PRODUCTS: [Timing(1.0, 0.1)], "us": [Timing(2.0, 0.1)]}
    assert not {"ratio_to_allocating_products", "user_seconds_median"} & {
        *rounds.compared(on_gpu, "us")
    }


def test_the_time_of_a_processor_is_that_of_all_threads():
    def burn():
        while time.thread_time() < 0.1:
            sum(range(10000))

    def elsewhere():
        thread = threading.Thread(target=burn)
        thread.start()
        thread.join()

    assert clock.Clock("cpu").timing(elsewhere).user > 0.05


def test_every_record_of_a_cpu_has_them():
    task = tasks.head_task(Case.make(N, H, V, torch.bfloat16), tasks.STEP)
    records = [*rounds.measure(task, ("eager",), 2, lambda: None)]
    assert [r["provider"] for r in records[:2]] == [*BARE]
    assert len(records) == 5
    for record in records:
        assert record["ratio_to_products"] > 0 and record["ratio_to_allocating_products"] > 0
        assert record["user_seconds_median"] >= 0 and record["load"] == 0
        assert ("peak_extra_bytes" in record) == (record["provider"] not in BARE)


def record(provider="fused_rl a", ratio=1.0, counted=8, case="c", **more):
    shape = {"tokens": 8, "hidden": 2, "vocabulary": 3, "dtype": "float32"}
    found = {"case": case, "provider": provider, "nhv": 6, "counted_tokens": counted, **shape}
    times = {"seconds_median": 0.25, "seconds_p20": 0.02, "seconds_p80": 0.5}
    return {**found, **times, "verdict": "right", "ratio_to_products": ratio, **more}


def test_half_a_step_over_a_whole_one_by_hand():
    half = record(ratio=0.75, counted=4, case="half")
    others = [record("b", 3.0), record(ratio=4.0, nhv=4), record(ratio=5.0, load=2)]
    whole = record(ratio=1.5)
    assert ratio_to_full([*others, half, whole], half) == 0.5
    assert ratio_to_full([*others, half], half) is None
    assert ratio_to_full([whole], whole) is None
    bare_half = record(PRODUCTS, counted=4)
    assert ratio_to_full([record(PRODUCTS)], bare_half) is None
    assert report.cells_of([whole, half], half)["x full\nstep"] == "0.50"
    assert make_bench.masked([whole, half]) == [
        "half: 0.50 (fused_rl a) of the step with all of them.",
        "",
    ]
    assert make_bench.masked([whole]) == []


def test_cells_by_hand():
    known = {"user_seconds_median": 0.0123, "ratio_to_allocating_products": 0.8}
    found = report.cells_of([], record(gradient_error=1e-3, peak_extra_bytes=3 * 2**20, **known))
    assert [*found.values()] == [
        *("fused_rl a", "250", "20.0..500", "12.3", "1.00", "0.80", "", "3", "1.0e-03")
    ]
    failed = {"case": "c", "provider": "b", "verdict": "failed", "note": "why", "tokens": 8}
    assert [*report.cells_of([], failed).values()] == ["b", "failed", "why", *[""] * 6]


def result(*records):
    shape = {"tokens": 8, "hidden": 2, "vocabulary": 3, "dtype": "float32"}
    environment = {"cores": 2, "cpu": "one", "backend": {"note": "loops"}, "torch": "2"}
    return {"shape": shape, "environment": environment, "records": list(records)}


def test_results_from_before_are_compared_by_the_products_that_they_know():
    """The older ratio is to products that allocate."""
    older = result(record(ratio=1.0))
    same = result(record(ratio=1.5, ratio_to_allocating_products=1.02))
    slower = result(record(ratio=1.5, ratio_to_allocating_products=1.2))
    assert report.compare(older, same)[0]["verdict"] == "same"
    assert report.compare(older, slower)[0]["verdict"] == "slower"
    assert report.compare(slower, older)[0]["verdict"] == "faster"
    assert report.compare(same, slower)[0]["verdict"] == "same"
    both = result(record(PRODUCTS), record(ALLOCATING), record())
    assert [c["provider"] for c in report.compare(both, both)] == ["fused_rl a"]


def test_pages_say_which_products_a_ratio_is_to():
    known = {"user_seconds_median": 0.5, "ratio_to_allocating_products": 0.8}
    error = {"gradient_error": 2e-3, "peak_extra_bytes": 2**20}
    rows = (record(PRODUCTS, 1.0, **known), record(ALLOCATING, 1.2, **known))
    lines = make_bench.table(result(*rows, record(ratio=1.5, **known, **error)), "x.json")
    assert lines[2] == (
        "| | time, ms | user CPU, ms | x bare products | x products that allocate "
        "| extra memory, MiB | error |"
    )
    assert lines[4:7] == [
        "| **c** (6 NHV) | 250 | 500 | 1 | 0.80 | | |",
        "| bare products that allocate | 250 | 500 | 1.20 | 1 | | |",
        "| fused_rl a | 250 | 500 | 1.50 | 0.80 | 1 | 2e-03 |",
    ]
    older = make_bench.table(result(record(PRODUCTS), record(ratio=1.5, **error)), "x.json")
    assert older[2] == "| | time, ms | x products that allocate | extra memory, MiB | error |"
    assert older[4:6] == [
        "| **c** (6 NHV) | 250 | 1 | | |",
        "| fused_rl a | 250 | 1.50 | 1 | 2e-03 |",
    ]

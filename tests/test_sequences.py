"""Sequences: ids, sums, extremes and scans, by hand and against loops."""

import math

import pytest
import torch

from fused_rl.losses.sequences import has_next, segment_min, segment_sum, sequence_ids, suffix_scan

IDS = torch.tensor([0, 0, 0, 2, 2, 4])


def test_ids_by_hand():
    ids, count = sequence_ids(torch.Size([2, 3]), None, torch.device("cpu"))
    assert (ids.tolist(), count) == ([0, 0, 0, 1, 1, 1], 2)
    ids, count = sequence_ids(
        torch.Size([6]), torch.tensor([0, 3, 3, 5, 5, 6, 6]), torch.device("cpu")
    )
    assert (ids.tolist(), count) == (IDS.tolist(), 6)


def test_sums_and_extremes_by_hand_with_sequences_that_have_no_token():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, -32.0])
    assert segment_sum(values, IDS, 6).tolist() == [7, 0, 24, 0, -32, 0]
    assert segment_min(values, IDS, 6).tolist() == [1, math.inf, 8, math.inf, -32, math.inf]
    nothing = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert segment_sum(*nothing, 2).tolist() == [0, 0]
    assert segment_sum(*nothing, 0).tolist() == []


def test_sums_have_gradients_and_compile():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, IDS, 6), values)
    compiled = torch.compile(lambda x: segment_sum(x, IDS, 6), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), segment_sum(values, IDS, 6))


@pytest.mark.parametrize("value", [0.1, -7.3])
def test_a_long_sum_is_rounded_once(value):
    """One float32 sum of 32768 times 0.1 is off by 2.6e-4 of it."""
    values = torch.full((32768 + 5,), value)
    sequence = torch.arange(len(values)) // 32768
    exact = torch.tensor([32768, 5]) * values[0].double()
    assert torch.equal(segment_sum(values, sequence, 2), exact.float())
    assert segment_sum(values.double(), sequence, 2).dtype == torch.float64


def test_nan_stays_with_its_sequence():
    values = torch.ones(6).index_fill(0, torch.tensor([4]), math.nan)
    assert segment_sum(values, IDS, 6).isnan().tolist() == [False, False, True] + [False] * 3
    y = suffix_scan(values, has_next(IDS).float())
    assert y.isnan().tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64, 65])
def test_scan_against_a_loop(n):
    values, decay = torch.randn(2, n, dtype=torch.float64)
    expected, following = torch.zeros(n, dtype=torch.float64), 0.0
    for i in reversed(range(n)):
        last = i + 1 == n
        following = values[i] + (0.0 if last else decay[i] * following)
        expected[i] = following
    if n:
        decay[-1] = 0
    torch.testing.assert_close(suffix_scan(values, decay), expected, atol=1e-13, rtol=1e-12)


def test_has_next_by_hand():
    assert has_next(IDS).tolist() == [True, True, False, True, False, False]
    assert has_next(IDS[:0]).tolist() == []


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"padded tokens must be \[B, T\], got \[6\]"):
        sequence_ids(torch.Size([6]), None, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"packed tokens must be \[N\], got \[2, 3\]"):
        sequence_ids(torch.Size([2, 3]), torch.tensor([0, 6]), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[B \+ 1\] integers, got \[2\]"):
        sequence_ids(torch.Size([6]), torch.tensor([0.0, 6.0]), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"rise from 0 to N = 6, got \[0, 5\]"):
        sequence_ids(torch.Size([6]), torch.tensor([0, 5]), torch.device("cpu"))

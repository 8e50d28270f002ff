"""The pool of ranks: a fault of one ends a case at once, and the next one has a fresh group."""

import time

import pytest
from ranks import RanksError


@pytest.mark.parametrize("world", [2, 4])
def test_answers_come_by_rank(ranks, world):
    expected = world * (world + 1) / 2
    assert ranks(world).run("cases_ranks", "total") == [expected] * world


@pytest.mark.parametrize(
    ("case", "said"),
    [("raises_alone", "labels.3. is 7"), ("hangs", "no answer"), ("dies", "process ended")],
)
def test_a_fault_of_one_rank_ends_the_case_and_spares_the_next(ranks, case, said):
    began = time.monotonic()
    with pytest.raises(RanksError, match=said):
        ranks(2).run("cases_ranks", case, seconds=3)
    assert time.monotonic() - began < 10
    assert ranks(2).run("cases_ranks", "total") == [3.0, 3.0]

"""The operators of a chunk where the chunk's logits are part of a vocabulary."""

import chunk_cases as cases
import pytest
import torch
from interpreter import assert_passes

from fused_rl import ops

WAYS = {"plain": cases.PLAIN}
if not ops.native_missing:
    WAYS |= {"C++": cases.CPP, "C++ of exponentials": cases.CPP_EXPONENTIALS}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def multiplies_bfloat16() -> bool:
    return "bfloat16" in ops.native.cpu_features()


# Summands of dhidden


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_way
def test_a_summand_is_what_is_rounded_otherwise(way, dtype):
    """In the dtype of the logits; dweight and dbias have the same bits."""
    head = cases.random_head(37, 19, 130, dtype, transform=True)
    up = cases.random_upstream(head)
    up.dlogprobs[::5] = up.dentropy[::5] = 0
    whole, summand = (cases.formed(way, head, up, partial=p) for p in (False, True))
    assert summand.dhidden.dtype == head.dtype
    assert whole.dhidden.dtype == ops.waiting_dtype(head.hidden)
    assert torch.equal(summand.dhidden.to(whole.dhidden.dtype), whole.dhidden)
    assert torch.equal(summand.dweight, whole.dweight) and torch.equal(summand.dbias, whole.dbias)


@pytest.mark.parametrize("partial", [False, True])
@each_way
def test_tokens_without_a_gradient_give_zeros_in_that_dtype(way, partial):
    head = cases.random_head(5, 8, 30)
    zeros = ops.Upstream(torch.zeros(5), torch.zeros(5))
    found = cases.formed(way, head, zeros, partial=partial)
    assert found.dhidden.dtype == (torch.float32 if partial else torch.bfloat16)
    assert all((t == 0).all() for t in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@each_way
def test_a_summand_has_no_rounding_of_its_own(way, dtype, entropy):
    """Products of float32 leave nothing else. Those of bfloat16 leave the rounding of the gradient
    of the logits, as large as that of a dhidden in bfloat16: beside that gradient, rounded, the
    product is one in float32.
    """
    head = cases.random_head(50, 64, 1000, dtype)
    up = cases.random_upstream(head, entropy)
    found = cases.formed(way, head, up, partial=True).dhidden
    draw = cases.draw_of(head, up)
    right, rounded = (cases.exact(head, d).dhidden for d in (draw, draw.bfloat16().double()))
    of_result = cases.relative(right.to(dtype), right)
    of_exponentials = way.given == ops.Given(False) and not entropy
    if way is not cases.PLAIN and dtype == torch.bfloat16 and multiplies_bfloat16():
        # One rounding more, of exponentials with two bits more.
        assert cases.relative(found, rounded) < of_result / (8 if of_exponentials else 50)
        assert cases.relative(found, right) < 1.1 * of_result
        handed = cases.formed(way, head, up).dhidden
        assert cases.relative(found, right) < 0.8 * cases.relative(handed, right)
    else:
        assert cases.relative(found, right) < of_result / 50


@each_way
def test_the_sum_of_two_parts_is_rounded_once(way):
    """Of a vocabulary in two halves, products of float32: nearer than two halves that were each
    rounded, and as near as the whole, rounded.
    """
    head = cases.random_head(50, 64, 1000, torch.bfloat16)
    head = head._replace(weight=head.weight.float())
    up = cases.random_upstream(head)
    known, halves = cases.known_of(head), []
    for entries in (slice(0, 500), slice(500, 1000)):
        part, labels = cases.part_of(head, entries)
        found = cases.formed(way, part, up, known=known, labels=labels, partial=True)
        halves.append(found.dhidden)
    right = cases.exact(head, cases.draw_of(head, up)).dhidden
    once = cases.relative((halves[0] + halves[1]).bfloat16(), right)
    each = cases.relative(halves[0].bfloat16() + halves[1].bfloat16(), right)
    best = cases.relative(right.bfloat16(), right)
    assert once < 1.001 * best and each > 1.2 * best
    assert cases.relative(halves[0] + halves[1], right) < best / 1000


# Part of a vocabulary


BUDGET = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
}
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@pytest.mark.parametrize("columns", [1, 3, 64, 70])
@each_dtype
@each_way
def test_dweight_of_its_last_columns(way, dtype, columns):
    """Of more tokens than one step of the walk has, too."""
    for N in (37, 2100):
        head = cases.random_head(N, 83, 130, dtype, transform=True)
        cases.check_last_columns(way, head, columns, BUDGET[dtype])


@pytest.mark.parametrize("transform", [False, True])
@each_dtype
@each_way
def test_parts_of_a_vocabulary_have_the_gradients_of_the_whole(way, dtype, transform):
    head = cases.random_head(37, 19, 130, dtype, transform)
    cases.check_parts(way, head, (1, 3, 63, 63), BUDGET[dtype])


@each_dtype
@each_way
def test_labels_of_other_parts_add_nothing(way, dtype):
    for V in (1, 3, 64, 130):
        head = cases.random_head(37, 19, V, dtype, transform=V != 64)
        cases.check_labels_elsewhere(way, head, BUDGET[dtype])


@pytest.mark.parametrize("below", [30.0, 100.0, 700.0])
@each_dtype
@each_way
def test_a_part_far_below_the_others(way, dtype, below):
    head = cases.random_head(37, 19, 130, dtype, transform=True)
    cases.check_far_below(way, head, below, BUDGET[dtype])


@each_dtype
@each_way
def test_a_part_of_nothing_but_minus_infinity(way, dtype):
    cases.check_nothing_but_minus_infinity(way, dtype)
    cases.check_some_at_minus_infinity(way, dtype, BUDGET[dtype])


@pytest.mark.parametrize("size", [1e4, 1e6, 1e9])
@each_way
def test_large_logits_of_parts_in_float64(way, size):
    """An lse of that size has lost digits: the whole's is not to be mistaken for the part's own,
    which would have them.
    """
    head = cases.random_head(9, 5, 60, torch.float64)
    up = cases.random_upstream(head)
    known, right = cases.known_of(head), cases.exact(head, cases.draw_of(head, up))
    head = head._replace(bias=torch.full((60,), size, dtype=torch.float64))
    lse, digits = known.lse + size, size * torch.finfo(torch.float64).eps
    for entries in (slice(0, 20), slice(20, 60)):
        part, labels = cases.part_of(head, entries)
        of_whole = ops.Known(lse, known.entropy)
        found = cases.formed(way, part, up, known=of_whole, labels=labels)
        assert cases.relative(found.dweight, right.dweight[entries]) < 10 * digits


# The kernels for GPUs


def test_chunks_in_the_interpreter(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    assert_passes("interpreted_chunk.py", tmp_path)

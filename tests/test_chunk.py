"""The operators of a chunk where the chunk's logits are part of a vocabulary."""

import chunk_cases as cases
import pytest
import torch

from fused_rl import ops

WAYS = {"plain": cases.PLAIN, "C++": cases.CPP}
if ops.native_missing:
    del WAYS["C++"]
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def multiplies_bfloat16() -> bool:
    return "bfloat16" in torch.ops.fused_rl.cpu_features().split()


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
    right = cases.exact(head, up).dhidden
    rounded = cases.exact(head, up, drawn=lambda draw: draw.bfloat16().double()).dhidden
    of_result = cases.relative(right.to(dtype), right)
    if way is cases.CPP and dtype == torch.bfloat16 and multiplies_bfloat16():
        assert cases.relative(found, rounded) < of_result / 50
        assert cases.relative(found, right) < 1.1 * of_result
        handed = cases.formed(way, head, up).dhidden
        assert cases.relative(found, right) < 0.8 * cases.relative(handed, right)
    else:
        assert cases.relative(found, right) < of_result / 50

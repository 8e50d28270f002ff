"""The operators of a chunk of part of a vocabulary, in the interpreter; test_chunk.py runs this."""

import chunk_cases as cases
import pytest
import torch
from interpreted_kernels import DEVICE, SMALL, small_and_on_cpu  # noqa: F401 - a fixture

from fused_rl.kernels import configs, exponentials_gradients, linear_gradients
from fused_rl.ops import triton as on_cuda
from fused_rl.ops import triton_chunk as on_cuda_chunk


def on(driver):
    return lambda *records: driver(*records, DEVICE)


WAY = cases.Way(
    on(on_cuda_chunk.linear_logprobs_chunk),
    on(on_cuda_chunk.linear_logprobs_chunk_backward),
    on(on_cuda.linear_logprobs_backward),
)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of exponentials twice that of a gradient in bfloat16: interpreted_exponentials.py says why.
KINDS = {"fp32": (FP32, 5e-6), "fp16": (FP16, 1.5e-3), "bf16": (BF16, 8e-3), "E": (BF16, 1.2e-2)}


@pytest.fixture(params=KINDS)
def kind(request, small_and_on_cpu, monkeypatch):  # noqa: F811
    """A dtype and its budget; with "E" a chunk has exponentials for logits."""
    for name in ("product", "add_product_"):
        monkeypatch.setattr(exponentials_gradients, name, getattr(linear_gradients, name))
    if request.param == "E":
        stores = SMALL._replace(stores=True)
        monkeypatch.setitem(configs.CONFIGS, 0, [stores, SMALL])
    return KINDS[request.param]


def test_exponentials_stand_for_logits_where_they_should(kind):
    """Or the cases below would not be of them."""
    z = WAY.forward(cases.random_head(9, 16, 70, kind[0]), WAY.given).z
    assert z.dtype == (BF16 if kind == KINDS["E"] else FP32)


def test_a_summand_is_what_is_rounded_otherwise(kind):
    head = cases.random_head(17, 19, 70, kind[0], transform=True)
    up = cases.random_upstream(head)
    up.dlogprobs[::3] = up.dentropy[::3] = 0
    whole, summand = (cases.formed(WAY, head, up, partial=p) for p in (False, True))
    assert summand.dhidden.dtype == FP32
    assert whole.dhidden.dtype == (BF16 if kind[0] == BF16 else FP32)
    assert torch.equal(summand.dhidden.to(whole.dhidden.dtype), whole.dhidden)
    assert torch.equal(summand.dweight, whole.dweight) and torch.equal(summand.dbias, whole.dbias)
    draw = cases.draw_of(head, up)
    assert cases.relative(summand.dhidden, cases.exact(head, draw).dhidden) < kind[1]
    if kind == KINDS["bf16"]:
        # Of the product alone, beside the gradient of the logits as it is cut off for it.
        assert cases.relative(summand.dhidden, cases.exact(head, cut_off(draw)).dhidden) < 3e-5


def cut_off(draw):
    """In bfloat16, as the interpreter stores what a GPU would round."""
    return (draw.float().view(torch.int32) & -0x10000).view(FP32).double()


@pytest.mark.parametrize("columns", [1, 8])
def test_dweight_of_its_last_columns(kind, columns):
    head = cases.random_head(9, 19, 70, kind[0], transform=True)
    cases.check_last_columns(WAY, head, columns, kind[1])


@pytest.mark.parametrize("transform", [False, True])
def test_parts_of_a_vocabulary_have_the_gradients_of_the_whole(kind, transform):
    head = cases.random_head(9, 19, 80, kind[0], transform)
    cases.check_parts(WAY, head, (1, 3, 76), kind[1])


@pytest.mark.parametrize("V", [1, 3, 70])
def test_labels_of_other_parts_add_nothing(kind, V):
    head = cases.random_head(9, 19, V, kind[0], transform=True)
    cases.check_labels_elsewhere(WAY, head, kind[1])


@pytest.mark.parametrize("below", [30.0, 700.0])
def test_a_part_far_below_the_others(kind, below):
    head = cases.random_head(9, 7, 70, kind[0], transform=True)
    cases.check_far_below(WAY, head, below, kind[1])


def test_a_part_of_nothing_but_minus_infinity(kind):
    cases.check_nothing_but_minus_infinity(WAY, kind[0])
    cases.check_some_at_minus_infinity(WAY, kind[0], kind[1])

"""Rounded logits in the Triton kernels, interpreted; test_rounded.py runs this file.

Their conversion to bfloat16 is replaced by torch's: the interpreter cuts off, where a GPU rounds.
"""

import pytest
import torch
from interpreted_divergences import several_blocks, small_and_on_cpu  # noqa: F401 fixtures
from interpreted_kernels import DEVICE, FORWARDS, FUSED, LIMITS, take  # noqa: F401 a fixture
from rounded_cases import IGNORED, ROUNDINGS, assert_near, exact, gradients, random_head
from triton import language as tl
from triton.runtime import interpreter

from fused_rl import reference
from fused_rl.kernels import configs, exponentials_gradients, linear_gradients
from fused_rl.ops import Known, Limits, Measure, TwoHeads, Upstream, divergence
from fused_rl.ops import triton as on_cuda
from fused_rl.ops import triton_chunk as on_cuda_chunk
from fused_rl.ops import two_heads_triton as of_two
from fused_rl.ops.chunk import ChunkLogits, Sums
from fused_rl.ops.divergence import TwoNeeds
from fused_rl.ops.divergence_chunk import known_of
from fused_rl.ops.first_use import config_difference, exactly
from fused_rl.ops.record import Given, Needs
from fused_rl.ops.statistics import Asked, linear_statistics
from fused_rl.ops.two_heads import TwoUpstream

BF16, FP32 = torch.bfloat16, torch.float32
LOGITS = pytest.mark.parametrize("logits_dtype", ROUNDINGS, ids=str)
TRANSFORM = pytest.mark.parametrize("transform", [False, True])
EXPONENTIALS = FUSED["pointers"]._replace(stores=True)


@pytest.fixture(autouse=True)
def rounds_to_nearest(several_blocks, monkeypatch):  # noqa: F811
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        near = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(near.view("uint16"), dst_type.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding)
    for name in ("product", "add_product_"):
        monkeypatch.setattr(exponentials_gradients, name, getattr(linear_gradients, name))


def case_of(dtype, logits_dtype, transform, ignored=True):
    head = random_head(37, 24, 130, dtype, logits_dtype, transform=transform)
    labels = head.labels if ignored else head.labels.clamp(min=0)
    return head._replace(labels=labels), torch.randn(2, 37)


def right_of(head, upstream):
    """logprobs, entropy, lse [N], and the gradients, in float64."""
    right, counted = exact(head), head.labels != IGNORED
    logprobs = right.logp().gather(-1, head.labels.clamp(min=0)[:, None])[:, 0]
    found = (logprobs, right.entropy(), torch.logsumexp(right.logits, -1))
    found = [t.where(counted, 0.0) for t in found]
    value = (found[0] * upstream[0]).sum() + (found[1] * upstream[1]).sum()
    return [t.detach() for t in found], gradients(value, right.leaves)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@LOGITS
@TRANSFORM
@pytest.mark.parametrize("way", FORWARDS)
def test_statistics(way, transform, logits_dtype, dtype, take):  # noqa: F811
    take(way)
    head, upstream = case_of(dtype, logits_dtype, transform)
    stats = on_cuda.linear_logprobs(head, LIMITS, DEVICE)
    for ours, true in zip(stats, right_of(head, upstream)[0], strict=False):
        assert_near(ours, true, 3e-6)


@LOGITS
@TRANSFORM
def test_gradients_in_two_passes_and_in_one(transform, logits_dtype):
    head, upstream = case_of(FP32, logits_dtype, transform, ignored=False)
    stats, right = right_of(head, upstream)
    known = Known(stats[2], stats[1].float())
    needs, limits = Needs(True, True, transform), Limits(IGNORED, 2**15)
    args = (Upstream(*upstream), head, limits, known, needs)
    found = on_cuda.linear_logprobs_backward(*args, DEVICE)
    *of_chunk, z = on_cuda_chunk.linear_logprobs_chunk(head, Given(True), DEVICE)
    for ours, true in zip(of_chunk, stats, strict=False):
        assert_near(ours, true, 3e-6)
    sums = Sums(torch.empty(130, 24), torch.empty(130 if transform else 0), False)
    args = (ChunkLogits(z), Upstream(*upstream), head, Known(of_chunk[2], of_chunk[1]), sums)
    dhidden = on_cuda_chunk.linear_logprobs_chunk_backward(*args, DEVICE)
    for ours in (found, (dhidden, *sums[:2])):
        for mine, true in zip(ours, right, strict=False):
            assert_near(mine, true, 1e-5)


@LOGITS
@TRANSFORM
def test_exponentials_in_the_place_of_logits(transform, logits_dtype, monkeypatch):
    monkeypatch.setitem(configs.CONFIGS, 0, [EXPONENTIALS])
    head, upstream = case_of(BF16, logits_dtype, transform, ignored=False)
    stats, right = right_of(head, upstream)
    *found, z = on_cuda_chunk.linear_logprobs_chunk(head, Given(True), DEVICE)
    assert z.dtype == BF16
    for ours, true in zip(found, stats, strict=False):
        assert_near(ours, true, 3e-6)
    sums = Sums(torch.empty(130, 24), torch.empty(130 if transform else 0), False)
    args = (ChunkLogits(z), Upstream(*upstream), head, Known(found[2], found[1]), sums)
    dhidden = on_cuda_chunk.linear_logprobs_chunk_backward(*args, DEVICE)
    for mine, true in zip((dhidden, *sums[:2]), right, strict=False):
        assert_near(mine, true, 1.2e-2)


@LOGITS
@TRANSFORM
def test_what_else_is_asked_of_the_logits(transform, logits_dtype):
    head, _ = case_of(FP32, logits_dtype, transform)
    asked = Asked(True, True, 0)
    right = linear_statistics.plain(exactly(head), asked, LIMITS)
    for ours, true in zip(on_cuda.linear_statistics(head, asked, LIMITS, DEVICE), right,
                          strict=True):  # fmt: skip
        if true.numel():
            assert_near(ours, true, 1e-5)


@pytest.mark.parametrize("chunk_bytes", [2**15, 2**20])
def test_two_heads_that_round_each_on_its_own(chunk_bytes):
    student = random_head(20, 24, 130, FP32, BF16)
    teacher = random_head(20, 16, 130, FP32, torch.float16, transform=False)
    heads = TwoHeads.of(student, teacher._replace(labels=student.labels))
    measure, limits = Measure(reference.JSD, 0.3, 1.0), Limits(IGNORED, chunk_bytes)
    right = divergence.linear_divergence.plain(exactly(heads), measure, limits)
    for ours, true in zip(of_two.linear_divergence(heads, measure, limits, DEVICE), right,
                          strict=True):  # fmt: skip
        assert_near(ours, true, 1e-5)
    upstream = TwoUpstream(*torch.randn(5, 20))
    known, needs = known_of(right), TwoNeeds(True, True, True, True, True, False)
    args = (exactly(upstream), exactly(heads), measure, limits, known, needs)
    exact_ones = divergence.linear_divergence_backward.plain(*args)
    lse = {"lse": known.lse, "teacher_lse": known.teacher_lse}
    known = type(known)(*(t.float() for t in known))._replace(**lse)
    args = (upstream, heads, measure, limits, known, needs, DEVICE)
    for ours, true in zip(of_two.linear_divergence_backward(*args), exact_ones, strict=True):
        if true.numel():
            assert_near(ours, true, 2e-5)
    # Each matters, and is known to: without the rounding of either nothing of this fits.
    for name in ("rounding", "teacher_rounding"):
        other = divergence.linear_divergence.plain(
            exactly(heads._replace(**{name: 0})), measure, limits
        )
        away = (other.divergence - right.divergence).abs().max()
        assert away > 5e-5 * right.divergence.max()


@LOGITS
@TRANSFORM
def test_the_first_use_sees_whether_a_configuration_rounds(logits_dtype, transform, monkeypatch):
    head, _ = case_of(BF16, logits_dtype, transform)
    for config in (*FUSED.values(), EXPONENTIALS):
        assert config_difference(config, tuple(head), DEVICE) is None

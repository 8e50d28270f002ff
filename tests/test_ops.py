"""The operators as torch sees them: opcheck, torch.compile, autograd in all its uses."""

import importlib
import itertools
import pkgutil

import oracle
import pytest
import torch
from oracle import EVERYTHING, FLOATS, IGNORED
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fused_rl import (
    KL,
    LMHead,
    TokenBatch,
    dapo,
    grpo,
    kl_penalty,
    linear_logprobs,
    linear_policy_loss,
    linear_top_logprobs,
    logprobs_from_logits,
    ops,
    reference,
)
from fused_rl.ops import (
    adapted,
    chunk,
    divergence,
    divergence_chunk,
    frozen,
    linear,
    logits,
    stored,
    terms,
)
from fused_rl.ops.kl import kl, kl_backward
from fused_rl.ops.record import Operator

WAYS = ["trained", "frozen", "one_pass", "from_logits"]


# opcheck


SAMPLES = {}


def samples_of(operator):
    """The function below yields arguments of an operator, in a row, for a dtype."""

    def register(samples):
        SAMPLES[operator] = samples
        return samples

    return register


def _linear_args(dtype, bias=True):
    case = oracle.random_case(7, 6, 11, dtype, **{**EVERYTHING, "bias": bias})
    case.labels[2] = IGNORED
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = case.temperature.to(wide)
    return (case.hidden, case.weight, case.bias, case.labels, temperature, 0.7, 3.0, 1)


def _require_grad(args, count):
    leaves = (t if t is None else t.detach().requires_grad_() for t in args[:count])
    return (*leaves, *args[count:])


@samples_of(linear.linear_logprobs)
def _of_linear_logprobs(dtype):
    yield (*_linear_args(dtype), IGNORED, 2**20)
    yield (*_require_grad(_linear_args(dtype), 3), IGNORED, 2**20)
    yield (*_require_grad(_linear_args(dtype, bias=False), 2), IGNORED, 2**20)


@samples_of(linear.linear_logprobs_backward)
def _of_linear_logprobs_backward(dtype):
    args = (*_linear_args(dtype), IGNORED, 2**20)
    _, entropy, lse, _ = linear.linear_logprobs.op(*args)
    for needs in itertools.product([False, True], repeat=3):
        yield (torch.randn_like(entropy), torch.randn_like(entropy), *args, lse, entropy, *needs)


@samples_of(frozen.linear_logprobs_frozen)
def _of_linear_logprobs_frozen(dtype):
    yield (*_require_grad(_linear_args(dtype), 1), IGNORED, 2**20)
    yield (*_require_grad(_linear_args(dtype, bias=False), 1), IGNORED, 100)


@samples_of(frozen.linear_logprobs_frozen_backward)
def _of_linear_logprobs_frozen_backward(dtype):
    args = (*_linear_args(dtype), IGNORED, 2**20)
    _, entropy, lse, _, unit = frozen.linear_logprobs_frozen.op(*args)
    g = torch.randn_like(entropy)
    for dentropy in (torch.randn_like(entropy), torch.zeros_like(entropy)):
        for has_dentropy in (True, False):
            yield (g, dentropy, *args, lse, entropy, unit, has_dentropy)


def _adapted_args(dtype, bias=True):
    hidden, weight, *rest = _linear_args(dtype, bias)
    up = weight[:, -2:].to(dtype if dtype == torch.float64 else torch.float32)
    wide = hidden.to(up.dtype)
    return (wide, up, *rest, hidden, weight)


@samples_of(adapted.linear_logprobs_adapted)
def _of_linear_logprobs_adapted(dtype):
    yield (*_require_grad(_adapted_args(dtype), 3), IGNORED, 2**20)
    yield (*_require_grad(_adapted_args(dtype, bias=False), 2), IGNORED, 100)


@samples_of(adapted.linear_logprobs_adapted_backward)
def _of_linear_logprobs_adapted_backward(dtype):
    up = torch.randn(2, 7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for needs in itertools.product([False, True], repeat=3):
        for chunk_bytes, has_dentropy in ((2**20, True), (100, False)):
            args = (*up, *_adapted_args(dtype), IGNORED, chunk_bytes)
            yield (*args, has_dentropy, *needs)


def _chunk_args(dtype):
    args = list(_linear_args(dtype))
    args[3] = args[3].clamp(min=0)
    return tuple(args)


@samples_of(chunk.linear_logprobs_chunk)
def _of_linear_logprobs_chunk(dtype):
    args = _chunk_args(dtype)
    yield (*args, True)
    yield (*args, False)
    # Without a softcap.
    yield (*args[:-2], 0.0, 1, False)


@samples_of(chunk.linear_logprobs_chunk_backward)
def _of_linear_logprobs_chunk_backward(dtype):
    args = _chunk_args(dtype)
    _, entropy, lse, _, z = chunk.linear_logprobs_chunk.op(*args, True)
    up = (torch.randn_like(entropy), torch.randn_like(entropy))
    for accumulate, partial in ((False, False), (True, False), (True, True)):
        sums = (torch.zeros(11, 6, dtype=lse.dtype), torch.zeros(11, dtype=lse.dtype))
        yield (z, *up, *args, lse, entropy, *sums, accumulate, partial)


@samples_of(chunk.linear_logprobs_chunk_unit)
def _of_linear_logprobs_chunk_unit(dtype):
    args = _chunk_args(dtype)
    _, entropy, lse, _, z = chunk.linear_logprobs_chunk.op(*args, True)
    yield (z, *args, lse, entropy)


@samples_of(stored.linear_logprobs_stored)
def _of_linear_logprobs_stored(dtype):
    # All of them count: how many do is no shape that is known before.
    yield (*_require_grad(_chunk_args(dtype), 3), IGNORED, 2**20)


@samples_of(stored.linear_logprobs_stored_backward)
def _of_linear_logprobs_stored_backward(dtype):
    args = (*_chunk_args(dtype), IGNORED, 2**20)
    _, entropy, lse, _, rows, z = stored.linear_logprobs_stored.op(*args)
    up = (torch.randn_like(entropy), torch.randn_like(entropy))
    for needs in itertools.product([False, True], repeat=3):
        yield (*up, *args, lse, entropy, rows, z, True, *needs)


def _two_args(dtype):
    hidden, weight, bias, labels, temperature, *options = _linear_args(dtype)
    other = oracle.random_case(7, 4, 11, dtype, **{**EVERYTHING, "bias": True})
    of_teacher = (other.hidden, other.weight, other.bias)
    heads = (hidden, weight, bias, *of_teacher, labels, temperature, temperature + 0.5)
    return (*heads, *options, 1.3, 0.0, 2)


# The measures: kind, parameter, factor.
MEASURES = [(1, 0.0, 1.0), (2, 0.0, 1.0), (3, 0.3, 1.0), (4, 2.0, 2.0), (5, 0.0, 1.0)]
LIMITS = (IGNORED, 2**20)


@samples_of(divergence.linear_divergence)
def _of_linear_divergence(dtype):
    for measure in MEASURES:
        yield (*_two_args(dtype), *measure, *LIMITS)
    yield (*_require_grad(_two_args(dtype), 6), *MEASURES[0], *LIMITS)
    yield (*_require_grad(_two_args(dtype), 3), *MEASURES[2], IGNORED, 100)


def _known(stats):
    _, _, entropy, lse, _, of_teacher, teacher_lse, slope, teacher_slope = stats
    return (lse, entropy, teacher_lse, of_teacher, slope, teacher_slope)


@samples_of(divergence.linear_divergence_backward)
def _of_linear_divergence_backward(dtype):
    for measure in MEASURES:
        args = (*_two_args(dtype), *measure, *LIMITS)
        stats = divergence.linear_divergence.op(*args)
        for needs in ([True] * 6, [True, False] * 3, [False] * 5 + [True]):
            yield (*torch.randn_like(stats[0].expand(5, -1)), *args, *_known(stats), *needs)


def _two_chunk_args(dtype):
    args = list(_two_args(dtype))
    args[6] = args[6].clamp(min=0)
    return tuple(args)


@samples_of(divergence_chunk.linear_divergence_chunk)
def _of_linear_divergence_chunk(dtype):
    for measure in MEASURES:
        yield (*_two_chunk_args(dtype), *measure)


@samples_of(divergence_chunk.linear_divergence_chunk_backward)
def _of_linear_divergence_chunk_backward(dtype):
    args = (*_two_chunk_args(dtype), *MEASURES[2])
    *stats, z = divergence_chunk.linear_divergence_chunk.op(*args)
    up = torch.randn_like(stats[0].expand(3, -1))
    for accumulate, partial in ((False, False), (True, False), (True, True)):
        sums = (torch.zeros(11, 6, dtype=z.dtype), torch.zeros(11, dtype=z.dtype))
        yield (z, *up, *args, *_known(stats), *sums, accumulate, partial)


@samples_of(divergence_chunk.linear_divergence_frozen)
def _of_linear_divergence_frozen(dtype):
    yield (*_require_grad(_two_args(dtype), 1), *MEASURES[0], *LIMITS)
    yield (*_require_grad(_two_args(dtype), 1), *MEASURES[3], IGNORED, 100)


@samples_of(divergence_chunk.linear_divergence_frozen_backward)
def _of_linear_divergence_frozen_backward(dtype):
    args = (*_two_args(dtype), *MEASURES[0], *LIMITS)
    *stats, unit = divergence_chunk.linear_divergence_frozen.op(*args)
    up = torch.randn_like(stats[0].expand(3, -1))
    for given in ((True, True), (False, False)):
        yield (*up, *args, *_known(stats), unit, *given)


def _logits_args(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.tensor([0, 10, IGNORED, 4])
    return torch.randn(4, 11).to(dtype), labels, torch.ones(4, dtype=wide), IGNORED


@samples_of(logits.logits_logprobs)
def _of_logits_logprobs(dtype):
    yield _logits_args(dtype)
    yield _require_grad(_logits_args(dtype), 1)


@samples_of(logits.logits_logprobs_backward)
def _of_logits_logprobs_backward(dtype):
    args = _logits_args(dtype)
    _, entropy, lse = logits.logits_logprobs.op(*args)
    yield (torch.randn_like(entropy), torch.randn_like(entropy), *args, lse, entropy)


@samples_of(kl)
def _of_kl(dtype):
    if dtype in (torch.float32, torch.float64):
        for value, slope in itertools.product(KL, KL):
            yield (torch.randn(5, dtype=dtype, requires_grad=True), value.value, slope.value)


@samples_of(kl_backward)
def _of_kl_backward(dtype):
    if dtype in (torch.float32, torch.float64):
        yield (torch.randn(5, dtype=dtype), torch.randn(5, dtype=dtype))


@samples_of(terms.divergence_terms)
def _of_divergence_terms(dtype):
    if dtype in (torch.float32, torch.float64):
        for kind in range(reference.REVERSE, reference.TOTAL_VARIATION + 1):
            pair = (torch.randn(5, 3, dtype=dtype, requires_grad=True) for _ in range(2))
            yield (*pair, kind, 0.3, 2.0)


@samples_of(terms.divergence_terms_backward)
def _of_divergence_terms_backward(dtype):
    if dtype in (torch.float32, torch.float64):
        up, *pair, slope, teacher_slope = (torch.randn(5, 3, dtype=dtype) for _ in range(5))
        yield (up, *pair, reference.JSD, 0.3, 1.0, slope, teacher_slope)


STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")


# Their own files check them.
ELSEWHERE = {
    "linear_kept_logprobs",
    "linear_kept_logprobs_backward",
    "linear_filtered_logprobs",
    "linear_filtered_logprobs_backward",
    "linear_logits_at",
    "linear_logits_at_backward",
    "linear_logprobs_at",
    "linear_logprobs_at_backward",
    "linear_statistics",
    "linear_statistics_backward",
    "linear_statistics_frozen",
    "linear_statistics_frozen_backward",
    "linear_statistics_stored",
    "linear_statistics_stored_backward",
}


def test_every_op_is_among_those_checked_here():
    modules = (
        importlib.import_module(f"fused_rl.ops.{module.name}")
        for module in pkgutil.iter_modules(ops.__path__)
    )
    defined = {v for m in modules for v in vars(m).values() if isinstance(v, Operator)}
    assert {op.__name__ for op in defined} == {op.__name__ for op in SAMPLES} | ELSEWHERE


every_op = pytest.mark.parametrize("op", SAMPLES, ids=lambda op: op.__name__)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_op
def test_opcheck(op, dtype):
    for args in SAMPLES[op](dtype):
        torch.library.opcheck(op.op, args, test_utils=STATIC)


@pytest.mark.parametrize(
    "op",
    [
        *(linear.linear_logprobs, frozen.linear_logprobs_frozen, logits.logits_logprobs, kl),
        adapted.linear_logprobs_adapted,
        *(divergence.linear_divergence, divergence_chunk.linear_divergence_frozen),
    ],
    ids=lambda op: op.__name__,
)
def test_opcheck_of_gradients_under_aot_dispatch(op):
    for args in list(SAMPLES[op](torch.float32))[-2:]:
        torch.library.opcheck(op.op, args, test_utils="test_aot_dispatch_dynamic")


# torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _tokens(N):
    return torch.randn(N, 6), torch.randint(11, (N,)), torch.randn(N)


def _assert_compiled_equals_eager(function, leaves_of, backend, compilations=1):
    """function(*leaves, *rest) for several numbers of tokens."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for N in (5, 12, 40, 33):
        leaves, rest = leaves_of(N)
        results = []
        for call in (function, compiled):
            mine = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
            out = call(*mine, *rest)
            out.backward()
            results.append((out.detach(), *(t.grad for t in mine)))
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            assert a is None or oracle.relative_error(a, b) < 1e-6
    assert counter.frame_count == compilations


def _linear_loss(hidden, weight, bias, labels, g):
    head = LMHead(weight, bias, 0.7, 3.0)
    logprobs, entropy = linear_logprobs(hidden, head, labels, temperature=0.9)
    return (logprobs * g).sum() - 0.1 * entropy.sum()


def _linear_leaves(trained):
    def leaves(N):
        hidden, labels, g = _tokens(N)
        head = (torch.randn(11, 6, requires_grad=trained), torch.randn(11, requires_grad=trained))
        return (hidden.requires_grad_(), *head), (labels, g)

    return leaves


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_compiled_linear_logprobs_equals_eager_and_compiles_once_for_any_n(trained, dynamo):
    _assert_compiled_equals_eager(_linear_loss, _linear_leaves(trained), "aot_eager")


def test_compiled_by_inductor_linear_logprobs_equals_eager(dynamo):
    _assert_compiled_equals_eager(_linear_loss, _linear_leaves(True), "inductor")


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_compiled_linear_top_logprobs_equals_eager_and_compiles_once_for_any_n(trained, dynamo):
    def loss(hidden, weight, bias, labels, g):
        head = LMHead(weight, bias, 0.7, 3.0)
        logprobs, entropy, top = linear_top_logprobs(hidden, head, labels, temperature=0.9)
        is_top = logprobs == top
        # Less than 0 for every other entry, so that both branches have their share.
        return (logprobs * g.where(is_top, logprobs - top)).sum() - 0.1 * entropy.sum()

    _assert_compiled_equals_eager(loss, _linear_leaves(trained), "aot_eager")


def test_compiled_logprobs_from_logits_equals_eager_and_compiles_once_for_any_n(dynamo):
    def loss(logits, labels, g):
        logprobs, entropy = logprobs_from_logits(logits, labels, temperature=0.9)
        return (logprobs * g).sum() - 0.1 * entropy.sum()

    def leaves(N):
        _, labels, g = _tokens(N)
        return (torch.randn(N, 11, requires_grad=True),), (labels, g)

    _assert_compiled_equals_eager(loss, leaves, "aot_eager")


def test_compiled_kl_penalty_equals_eager_and_compiles_once_for_any_n(dynamo):
    def loss(logprobs, ref_logprobs):
        return kl_penalty(logprobs, ref_logprobs, value=KL.K3, grad=KL.K2).sum()

    def leaves(N):
        return (torch.randn(N, requires_grad=True),), (torch.randn(N),)

    _assert_compiled_equals_eager(loss, leaves, "aot_eager")


@pytest.mark.parametrize("way", ["from stats", "linear_policy_loss"])
def test_compiled_grpo_equals_eager_and_does_not_compile_for_every_n(way, dynamo):
    loss = grpo(beta=0.1, entropy_coef=0.01)

    def value(hidden, weight, batch):
        if way == "linear_policy_loss":
            return linear_policy_loss(hidden, weight, batch, loss).loss
        stats = linear_logprobs(hidden, weight, batch.labels)
        return loss(stats, batch).loss

    def leaves(N):
        hidden, labels, g = _tokens(N)
        batch = TokenBatch.packed(
            labels,
            torch.tensor([0, 2, N]),
            g,
            old_logprobs=-2.4 + torch.randn(N),
            ref_logprobs=-2.4 + torch.randn(N),
        )
        return (hidden.requires_grad_(), torch.randn(11, 6, requires_grad=True)), (batch,)

    # The sizes that a batch carries are plain numbers: they are taken as variable at their first
    # change.
    _assert_compiled_equals_eager(value, leaves, "aot_eager", compilations=2)


def test_compiled_without_gradients_equals_eager(dynamo):
    def stats(hidden, weight, labels):
        with torch.no_grad():
            return linear_logprobs(hidden, weight, labels).logprobs

    hidden, labels, _ = _tokens(9)
    weight = torch.randn(11, 6)
    compiled = torch.compile(stats, fullgraph=True, backend="aot_eager")
    oracle.assert_same_bits(compiled(hidden, weight, labels), stats(hidden, weight, labels))


def test_a_wrong_label_raises_out_of_a_compiled_function_too(dynamo):
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"labels\[1\] is 11, outside the vocabulary"):
        compiled(torch.randn(2, 6), torch.randn(11, 6), torch.tensor([0, 11]))


def test_export_with_a_dynamic_number_of_tokens():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(11, 6))

        def forward(self, hidden, labels):
            return linear_logprobs(hidden, self.weight, labels).logprobs

    module = Module()
    N = torch.export.Dim("N", min=2, max=1000)
    hidden, labels, _ = _tokens(9)
    exported = torch.export.export(module, (hidden, labels), dynamic_shapes=({0: N}, {0: N}))
    hidden, labels, _ = _tokens(33)
    got, right = exported.module()(hidden, labels), module(hidden, labels)
    oracle.assert_same_bits(got.detach(), right.detach())


@pytest.mark.parametrize("way", ["trained", "frozen", "from_logits"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fake_tensors_have_the_shapes_dtypes_and_strides_of_the_real_ones(dtype, way):
    def run(leaves, labels):
        stats = _stats(way, leaves, labels)
        loss = stats.logprobs.sum() + stats.entropy.sum()
        grads = torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])
        return [(t.shape, t.dtype, t.stride()) for t in (*stats, *grads)]

    leaves, labels = _leaves(way, dtype, transposed=True)
    real = run(leaves, labels)
    mode = FakeTensorMode()
    fakes, of_labels = [mode.from_tensor(t.detach()) for t in leaves], mode.from_tensor(labels)
    with mode:
        for fake, leaf in zip(fakes, leaves, strict=True):
            fake.requires_grad_(leaf.requires_grad)
        fake = run(fakes, of_labels)
    assert fake == real


# Autograd: one function for all ways, so that each case below is asked of each


def _leaves(way, dtype=torch.float64, transposed=False):
    labels = torch.randint(11, (2, 5))
    labels[1, 0] = IGNORED
    if way == "from_logits":
        return [torch.randn(2, 5, 11).to(dtype).requires_grad_()], labels
    hidden = torch.randn(2, 5, 6).to(dtype)
    weight = torch.randn(11, 6).to(dtype)
    if transposed:
        hidden, weight = (
            hidden.transpose(0, 1).contiguous().transpose(0, 1),
            weight.T.contiguous().T,
        )
    trained = way != "frozen"
    bias = torch.randn(11).to(dtype).requires_grad_(trained)
    return [hidden.requires_grad_(), weight.requires_grad_(trained), bias], labels


def _stats(way, leaves, labels):
    if way == "from_logits":
        return logprobs_from_logits(leaves[0], labels, temperature=0.8)
    return linear_logprobs(leaves[0], LMHead(*leaves[1:], 0.7, 3.0), labels, temperature=0.8)


def _loss(way, leaves, labels):
    """A scalar that depends on log-probs and entropies."""
    if way == "one_pass":
        old = torch.linspace(-3, -2, labels.numel(), dtype=torch.float64).reshape(labels.shape)
        batch = TokenBatch.padded(
            labels, labels != IGNORED, torch.ones(2, dtype=torch.float64), old_logprobs=old
        )
        loss, head = grpo(entropy_coef=0.1, clip_high=5.0), LMHead(*leaves[1:], 0.7, 3.0)
        return linear_policy_loss(leaves[0], head, batch, loss, temperature=0.8).loss
    logprobs, entropy = _stats(way, leaves, labels)
    weights = torch.linspace(-1, 2, labels.numel(), dtype=logprobs.dtype).reshape(labels.shape)
    return (logprobs * weights).sum() + 0.1 * (entropy * weights.flip(0)).sum()


def _grads(way, leaves, labels, **options):
    wanted = [t for t in leaves if t.requires_grad]
    return torch.autograd.grad(_loss(way, leaves, labels), wanted, **options)


def _assert_close(mine, right, factor=1.0):
    for a, b in zip(mine, right, strict=True):
        assert oracle.relative_error(a, b * factor) < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_inputs_are_never_mutated(way):
    leaves, labels = _leaves(way)
    before = [t.detach().clone() for t in (*leaves, labels)]
    versions = [t._version for t in (*leaves, labels)]
    _grads(way, leaves, labels)
    for now, then in zip((*leaves, labels), before, strict=True):
        oracle.assert_same_bits(now.detach(), then)
    assert [t._version for t in (*leaves, labels)] == versions


@pytest.mark.parametrize("way", WAYS)
def test_upstream_gradients_are_never_mutated(way):
    leaves, labels = _leaves(way)
    loss = _loss(way, leaves, labels)
    upstream = torch.tensor(3.0, dtype=loss.dtype)
    loss.backward(upstream)
    assert float(upstream) == 3.0


@pytest.mark.parametrize("way", WAYS)
def test_retain_graph_twice_gives_the_same_gradient_twice(way):
    leaves, labels = _leaves(way)
    wanted = [t for t in leaves if t.requires_grad]
    loss = _loss(way, leaves, labels)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    first = [t.clone() for t in first]
    second = torch.autograd.grad(loss, wanted)
    for a, b in zip(first, second, strict=True):
        oracle.assert_same_bits(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_backward_twice_into_grad_adds_up(way):
    leaves, labels = _leaves(way)
    right = _grads(way, leaves, labels)
    loss = _loss(way, leaves, labels)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    (loss * 3).backward()
    _assert_close([t.grad for t in leaves if t.requires_grad], right, 5.0)


@pytest.mark.parametrize("way", WAYS)
def test_three_times_the_loss_then_the_plain_loss(way):
    leaves, labels = _leaves(way)
    wanted = [t for t in leaves if t.requires_grad]
    right = _grads(way, leaves, labels)
    loss = _loss(way, leaves, labels)
    _assert_close(torch.autograd.grad(loss * 3, wanted, retain_graph=True), right, 3.0)
    _assert_close(torch.autograd.grad(loss, wanted), right)


@pytest.mark.parametrize("way", ["trained", "frozen", "from_logits"])
def test_two_losses_that_share_the_op(way):
    leaves, labels = _leaves(way)
    wanted = [t for t in leaves if t.requires_grad]
    logprobs, entropy = _stats(way, leaves, labels)
    one, two = logprobs.sum(), (logprobs**2 + entropy).sum()
    together = torch.autograd.grad(one + two, wanted, retain_graph=True)
    first = torch.autograd.grad(one, wanted, retain_graph=True)
    second = torch.autograd.grad(two, wanted)
    _assert_close([a + b for a, b in zip(first, second, strict=True)], together)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_two_steps_add_up_in_grad(way):
    leaves, labels = _leaves(way)
    right = _grads(way, leaves, labels)
    _loss(way, leaves, labels).backward()
    _loss(way, leaves, labels).backward()
    _assert_close([t.grad for t in leaves if t.requires_grad], right, 2.0)


def test_two_micro_batches_give_the_gradient_of_one_large_batch():
    case = oracle.random_case(40, 6, 11, torch.float64)
    whole = oracle.policy_batch(case, (4, 10), masked=2)
    loss = dapo(num_tokens=int(whole.num_tokens), beta=0.1, entropy_coef=0.01)
    hidden = case.hidden.reshape(4, 10, 6)

    def gradient(parts):
        weight = case.weight.clone().requires_grad_()
        for rows in parts:
            of = (t.reshape(4, 10)[rows] for t in (whole.labels, whole.loss_mask, whole.advantages))
            old, ref = (t.reshape(4, 10)[rows] for t in (whole.old_logprobs, whole.ref_logprobs))
            batch = TokenBatch.padded(*of, old_logprobs=old, ref_logprobs=ref)
            linear_policy_loss(hidden[rows], weight, batch, loss).loss.backward()
        return weight.grad

    assert oracle.relative_error(gradient([[0, 1, 2], [3]]), gradient([[0, 1, 2, 3]])) < 1e-13


@pytest.mark.parametrize("way", WAYS)
def test_double_backward_raises(way):
    leaves, labels = _leaves(way)
    with pytest.raises(RuntimeError):
        grads = _grads(way, leaves, labels, create_graph=True)
        sum((g**2).sum() for g in grads).backward()


@pytest.mark.parametrize("value", KL)
def test_double_backward_through_kl_raises_or_is_right(value):
    logprobs = torch.tensor([-0.3, 0.4, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.zeros(3, dtype=torch.float64)

    def second(estimate):
        (grad,) = torch.autograd.grad((estimate**2).sum(), logprobs, create_graph=True)
        return torch.autograd.grad(grad.sum(), logprobs)[0]

    formula = {
        KL.K1: lambda d: d,
        KL.K2: lambda d: d * d / 2,
        KL.K3: lambda d: torch.expm1(-d) + d,
        KL.ABS: torch.abs,
    }[value]
    try:
        got = second(kl_penalty(logprobs, reference, value=value))
    except RuntimeError:
        return
    assert oracle.relative_error(got, second(formula(logprobs - reference))) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_checkpoint(way, reentrant):
    leaves, labels = _leaves(way)
    right = _grads(way, leaves, labels)

    def loss(*tensors):
        return _loss(way, tensors, labels)

    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    _assert_close([t.grad for t in leaves if t.requires_grad], right)


@pytest.mark.parametrize("way", WAYS)
def test_saved_tensors_hooks_may_move_what_is_saved(way):
    leaves, labels = _leaves(way)
    right = _grads(way, leaves, labels)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.numpy(force=True).copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        loss = _loss(way, leaves, labels)
    assert packed
    wanted = [t for t in leaves if t.requires_grad]
    _assert_close(torch.autograd.grad(loss, wanted), right)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("way", ["trained", "one_pass"])
def test_only_what_requires_a_gradient_gets_one(way, needs):
    leaves, labels = _leaves(way)
    right = _grads(way, leaves, labels)
    some = [t.detach().requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
    _loss(way, some, labels).backward()
    for leaf, need, exact in zip(some, needs, right, strict=True):
        assert (leaf.grad is not None) == need
        assert not need or oracle.relative_error(leaf.grad, exact) < 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_without_gradients_the_same_values_and_no_graph(way, mode):
    leaves, labels = _leaves(way)
    right = _loss(way, leaves, labels).detach()
    with mode():
        loss = _loss(way, leaves, labels)
    assert not loss.requires_grad
    assert oracle.relative_error(loss, right) < 1e-14


def test_tensors_born_in_inference_mode():
    with torch.inference_mode():
        hidden, labels, _ = _tokens(9)
        weight = torch.randn(11, 6)
        inside = linear_logprobs(hidden, weight, labels).logprobs.clone()
    outside = linear_logprobs(hidden.clone(), weight.clone(), labels.clone()).logprobs
    oracle.assert_same_bits(inside, outside)


@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("way", ["trained", "frozen"])
def test_an_input_changed_in_place_before_backward_is_an_error(way, which):
    leaves, labels = _leaves(way)
    # Not leaves: those may not be changed in place while they require gradients.
    inputs = [leaves[0] * 1, leaves[1] * 1, leaves[2]]
    loss = _loss(way, inputs, labels)
    with torch.no_grad():
        inputs[0 if which == "hidden" else 1].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_step_before_backward_is_an_error():
    hidden, labels, _ = _tokens(9)
    weight = torch.nn.Parameter(torch.randn(11, 6))
    loss = linear_logprobs(hidden, weight, labels).logprobs.sum()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_changed_in_place_before_backward_are_an_error():
    logits = torch.randn(4, 11, requires_grad=True) * 1
    loss = logprobs_from_logits(logits, torch.tensor([0, 1, 2, 3])).logprobs.sum()
    with torch.no_grad():
        logits.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("way", ["trained", "frozen", "one_pass"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_in_its_dtype_and_returns_float32(dtype, way):
    leaves, labels = _leaves(way, torch.float32)
    with torch.autocast("cpu", dtype):
        loss = _loss(way, leaves, labels)
        if way != "one_pass":
            stats = _stats(way, leaves, labels)
            assert stats.logprobs.dtype == stats.entropy.dtype == torch.float32
    grads = torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])
    assert all(g.dtype == torch.float32 for g in grads)
    cast = [t.detach().to(dtype) for t in leaves[:2]] + [leaves[2].detach()]
    for mine, leaf in zip(cast, leaves, strict=True):
        mine.requires_grad_(leaf.requires_grad)
    by_hand = _loss(way, cast, labels)
    right = torch.autograd.grad(by_hand, [t for t in cast if t.requires_grad])
    oracle.assert_same_bits(loss.detach(), by_hand.detach())
    for mine, other in zip(grads, right, strict=True):
        oracle.assert_same_bits(mine, other.float())


@pytest.mark.parametrize("way", ["trained", "frozen", "one_pass"])
def test_autocast_leaves_float64_alone(way):
    leaves, labels = _leaves(way, torch.float64)
    right = _loss(way, leaves, labels).detach()
    with torch.autocast("cpu", torch.bfloat16):
        oracle.assert_same_bits(_loss(way, leaves, labels).detach(), right)


@pytest.mark.parametrize("way", ["trained", "frozen", "one_pass"])
def test_a_hidden_in_bf16_and_a_weight_in_float32_under_autocast(way):
    leaves, labels = _leaves(way, torch.float32)
    mixed = [leaves[0].detach().bfloat16().requires_grad_(), *leaves[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        loss, right = _loss(way, mixed, labels), _loss(way, leaves, labels)
    oracle.assert_same_bits(loss.detach(), right.detach())


def test_backward_inside_autocast_gives_what_it_gives_outside():
    leaves, labels = _leaves("trained", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outside = _loss("trained", leaves, labels)
        inside = _grads("trained", leaves, labels)
    for mine, right in zip(inside, torch.autograd.grad(outside, leaves), strict=True):
        oracle.assert_same_bits(mine, right)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_flow_on_into_what_the_inputs_came_from(way):
    leaves, labels = _leaves(way)
    right = _grads(way, leaves, labels)
    _loss(way, [t * 2 / 2 for t in leaves], labels).backward()
    _assert_close([t.grad for t in leaves if t.requires_grad], right)


def test_one_weight_as_embedding_and_as_head():
    tied = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    tokens, labels = torch.randint(11, (9,)), torch.randint(11, (9,))
    linear_logprobs(torch.tanh(tied[tokens]), tied, labels).logprobs.sum().backward()
    (right,) = torch.autograd.grad(
        torch.log_softmax(torch.tanh(tied[tokens]) @ tied.T, -1)[torch.arange(9), labels].sum(),
        tied,
    )
    assert oracle.relative_error(tied.grad, right) < 1e-13

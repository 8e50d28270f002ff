"""The drop-in for Liger against liger-kernel itself: signatures, values, gradients, metrics.

Its Triton kernels run in interpreted_liger.py, in a process of their own.
"""

import inspect
import textwrap

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, and liger-kernel needs it")
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

from interpreter import assert_passes
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as TheirLoss
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction as TheirFunction
from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as TheirCrossEntropy
from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyTPFunction as TheirSplit
from liger_kernel.transformers import functional
from liger_kernel.transformers import grpo_loss as their_triton
from parity import ITEMS, LENGTH, LOSS_TYPES
from test_liger_parity import COMBINATIONS, KLS, Problem, naive, relative

from fused_rl.integrations import liger
from fused_rl.integrations.liger import (
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearScaledCrossEntropyFunction,
    fused_selective_log_softmax,
    liger_fused_linear_grpo,
    triton_grpo_loss,
)

TOLERANCE = 1e-4

Output = tuple[Tensor, tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Everything here is small: more of them would only wait for each other."""
    torch.set_num_threads(1)


def parameters(function) -> list[tuple[str, object]]:
    """Names and defaults, in order."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.name != "ctx"]


PAIRS = {
    "module": (LigerFusedLinearGRPOLoss, TheirLoss),
    "forward": (LigerFusedLinearGRPOLoss.forward, TheirLoss.forward),
    "triton_grpo_loss": (triton_grpo_loss, their_triton.triton_grpo_loss),
    "fused_selective_log_softmax": (
        fused_selective_log_softmax,
        their_triton.fused_selective_log_softmax,
    ),
    "apply": (LigerFusedLinearGRPOFunction.apply, TheirFunction.forward),
    "scaled cross-entropy": (
        LigerFusedLinearScaledCrossEntropyFunction.apply,
        TheirCrossEntropy.apply,
    ),
    "split cross-entropy": (
        liger.LigerFusedLinearScaledCrossEntropyTPFunction.apply,
        TheirSplit.apply,
    ),
    "split cross-entropy, function": (
        liger.liger_fused_linear_scaled_cross_entropy_tp,
        functional.liger_fused_linear_scaled_cross_entropy_tp,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_signatures_and_defaults(name):
    ours, theirs = PAIRS[name]
    assert parameters(ours) == parameters(theirs)
    assert name != "apply" or len(parameters(ours)) == 31


def test_the_attributes_of_the_module():
    ours, theirs = (
        {n: v for n, v in vars(cls()).items() if not n.startswith("_")}
        for cls in (LigerFusedLinearGRPOLoss, TheirLoss)
    )
    assert ours == theirs


# From hidden states.


def arguments(problem: Problem) -> list:
    mask = problem.mask.to(problem.weight.dtype)
    return [problem.hidden, problem.weight, problem.labels, mask, problem.advantages]


def call(cls, problem: Problem, inputs: dict | None = None, **options) -> Output:
    """The loss of a module of class cls, of the problem and further inputs of forward."""
    defaults = {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28, "compiled": False}
    defaults |= {"max_completion_length": LENGTH, "temperature": problem.temperature}
    given = {
        "bias": problem.bias,
        "ref_per_token_logps": problem.ref,
        "old_per_token_logps": problem.old,
        "num_items_in_batch": ITEMS,
    }
    return cls(**(defaults | options))(*arguments(problem), **(given | (inputs or {})))


def both(problem: Problem, inputs: dict | None = None, **options) -> list[Output]:
    return [call(c, problem, inputs, **options) for c in (LigerFusedLinearGRPOLoss, TheirLoss)]


def assert_same(problem: Problem, ours: Output, theirs: Output) -> None:
    """In value, in the gradients of hidden, weight and bias, in metrics and their order."""
    assert relative(ours[0], theirs[0]) < TOLERANCE
    for pair in zip(problem.gradients(ours[0]), problem.gradients(theirs[0]), strict=True):
        assert relative(*pair) < TOLERANCE
    assert type(ours[1]) is type(theirs[1])
    for metric, expected in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(metric, expected, atol=1e-6, rtol=TOLERANCE)
        assert not metric.requires_grad


@pytest.mark.parametrize(("loss_type", "level", "kl", "delta", "bias", "temperature"), COMBINATIONS)
def test_every_option(loss_type, level, kl, delta, bias, temperature):
    beta, corrected = KLS[kl]
    problem = Problem(bias, temperature)
    pair = both(
        problem,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        use_bias_correction_kl=corrected,
        delta=delta,
    )
    assert_same(problem, *pair)
    assert len(pair[0][1]) == (2 if beta else 1)


CHOICES = {
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 0.6, "sapo_temperature_neg": 1.7},
    "vespo": {
        "loss_type": "vespo",
        "vespo_k_pos": 1.0,
        "vespo_lambda_pos": 0.5,
        "vespo_k_neg": 1.5,
        "vespo_lambda_neg": 0.7,
    },
    "delta below the clip": {"loss_type": "dapo", "delta": 1.1},
    "narrow bounds of sequences": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon_low": 0.05,
        "epsilon_high": 0.1,
    },
    "wide bounds": {"loss_type": "bnpo", "epsilon_low": 0.5, "epsilon_high": 0.6},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_numbers_that_are_not_the_defaults(choice):
    problem = Problem()
    assert_same(problem, *both(problem, beta=0.1, **CHOICES[choice]))


@pytest.mark.parametrize("shape", [(6, 7), (6, 1), (6,)])
@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "luspo"])
def test_importance_weights_of_the_rollout(loss_type, shape):
    problem = Problem()
    weights = torch.rand(shape) + 0.5
    if shape == (6, 7):
        weights = weights.where(problem.mask, 1.0)
    assert_same(problem, *both(problem, {"vllm_is_ratio": weights}, loss_type=loss_type, beta=0.04))


def test_importance_weights_of_vespo_do_not_touch_the_kl():
    problem = Problem()
    weights = (torch.rand(6, 7) + 0.5).where(problem.mask, 1.0)
    options = {"loss_type": "vespo", "beta": 0.3, "use_bias_correction_kl": True}
    assert_same(problem, *both(problem, {"vllm_is_ratio": weights}, **options))


@pytest.mark.parametrize("count", [None, 0, 55, torch.tensor(55)])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "grpo"])
def test_counts_of_the_step(loss_type, count):
    problem = Problem()
    assert_same(problem, *both(problem, {"num_items_in_batch": count}, loss_type=loss_type))


@pytest.mark.parametrize("count", [None, 55])
def test_counts_of_several_processes(count):
    """A process group that pretends to be two."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        problem = Problem()
        assert_same(problem, *both(problem, {"num_items_in_batch": count}, loss_type="dapo"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_without_old_log_probs_every_ratio_is_1(loss_type):
    problem = Problem()
    inputs = {"old_per_token_logps": None}
    assert_same(problem, *both(problem, inputs, loss_type=loss_type, beta=0.04))


def test_a_reference_of_hidden_states():
    problem = Problem()
    inputs = {
        "ref_per_token_logps": None,
        "ref_input": torch.randn_like(problem.hidden),
        "ref_weight": problem.weight.detach() + 0.1 * torch.randn_like(problem.weight),
        "ref_bias": torch.randn_like(problem.bias),
    }
    assert_same(problem, *both(problem, inputs, beta=0.04))
    inputs["ref_bias"] = None
    assert_same(problem, *both(problem, inputs, beta=0.04))


def test_without_a_reference_model_the_kl_is_0():
    problem = Problem()
    ours, theirs = both(problem, use_ref_model=False, beta=0.04)
    assert_same(problem, ours, theirs)
    assert ours[1][0].item() == 0


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_kinds_of_masks(kind):
    problem = Problem()
    args = arguments(problem)
    args[3] = problem.mask.to(kind)
    loss_fn = LigerFusedLinearGRPOLoss(use_ref_model=False, beta=0.0)
    loss, metrics = loss_fn(*args, bias=problem.bias, old_per_token_logps=problem.old)
    inputs = {"num_items_in_batch": None}
    assert_same(problem, (loss, metrics), call(TheirLoss, problem, inputs, epsilon_high=0.2))


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_not_trained_gets_no_gradient(frozen):
    problem = Problem(bias=False)
    getattr(problem, frozen).requires_grad_(False)
    trained = [t for t in problem.leaves if t.requires_grad]
    gradients = [torch.autograd.grad(loss, trained) for loss, _ in both(problem)]
    assert relative(gradients[0][0], gradients[1][0]) < TOLERANCE


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_a_gradient_from_above_scales(chunk_size):
    problem = Problem()
    (ours, metrics), (theirs, expected) = both(problem, chunk_size=chunk_size)
    assert_same(problem, (-3 * ours, metrics), (-3 * theirs, expected))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo"])
def test_bf16_is_nearer_to_float64_than_theirs(loss_type):
    problem = Problem(dtype=torch.bfloat16)
    exact = problem.double()
    truth, _ = call(LigerFusedLinearGRPOLoss, exact, loss_type=loss_type, beta=0.04)
    expected = [truth, *exact.gradients(truth)]
    ours, theirs = (
        [relative(*pair) for pair in zip([loss, *problem.gradients(loss)], expected, strict=True)]
        for loss, _ in both(problem, loss_type=loss_type, beta=0.04)
    )
    assert all(x < y for x, y in zip(ours, theirs, strict=True))
    assert max(ours) < 2**-8


def test_apply_takes_31_positional_arguments():
    problem = Problem()
    rest = [problem.bias, problem.ref, problem.old, None, None, None, 0.04, 0.2, 0.28, "grpo", 11]
    rest += ["sequence", 1.0, 1.05, 0.8, False, True, 1, None, None, True, 2.0, 3.0, 3.0, 2.0, 40]
    ours, theirs = (
        function.apply(*arguments(problem), *rest)
        for function in (LigerFusedLinearGRPOFunction, TheirFunction)
    )
    assert len(arguments(problem) + rest) == 31
    assert_same(problem, ours, theirs)


# Where Liger's formula is not what its name says. `naive` is the formula, in float64.


@pytest.mark.parametrize(
    ("level", "beta", "off"),
    [("token", 0.0, 0.2126), ("token", 1.0, 0.2312), ("sequence", 1.0, 0.0456)],
)
def test_luspo_of_theirs_counts_padding(level, beta, off):
    """Mean over columns, times the length, without the mask; ours is the mean over sequences of
    sums over counted tokens.
    """
    problem = Problem()
    options = {"loss_type": "luspo", "importance_sampling_level": level, "beta": beta}
    ours, wrong = both(problem, **options)
    truth = naive(problem, beta, level == "sequence")
    assert relative(ours[0], truth) < 1e-6
    assert relative(wrong[0], truth) == pytest.approx(off, rel=1e-3)


def test_a_masked_log_prob_may_hold_anything():
    """In theirs inf * 0 makes the loss NaN."""
    problem = Problem()
    clean, _ = call(LigerFusedLinearGRPOLoss, problem, loss_type="grpo", beta=0.04)
    problem.ref = problem.ref.masked_fill(~problem.mask, 500.0)
    ours, theirs = both(problem, loss_type="grpo", beta=0.04)
    assert torch.equal(ours[0], clean) and theirs[0].isnan()


def test_advantages_per_token():
    """Theirs are right in chunks of one sequence, by chance, and off in chunks of two."""
    problem = Problem()
    problem.advantages = torch.randn(6, 7)
    ours, theirs = both(problem, chunk_size=1)
    assert_same(problem, ours, theirs)
    ours, theirs = both(problem, chunk_size=2)
    assert relative(theirs[0], ours[0]) > 0.1


def test_weights_of_vespo_at_padding():
    """Theirs sums their logs over all columns; in ours what is masked does not count."""
    problem = Problem()
    weights = torch.rand(6, 7) + 0.5
    right, _ = call(
        TheirLoss, problem, {"vllm_is_ratio": weights.where(problem.mask, 1.0)}, loss_type="vespo"
    )
    inputs = {"vllm_is_ratio": weights.where(problem.mask, 1.5)}
    ours, wrong = both(problem, inputs, loss_type="vespo")
    assert relative(ours[0], right) < TOLERANCE
    assert relative(wrong[0], right) > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_of_two_references_the_given_log_probs_are_taken_with_a_warning(beta):
    """As theirs says too; the values are those of ref_per_token_logps alone."""
    problem = Problem()
    values = {}
    for Loss in (LigerFusedLinearGRPOLoss, TheirLoss):
        loss_fn = Loss(beta=beta, temperature=problem.temperature, compiled=False)
        given = (problem.hidden, problem.weight, problem.labels, problem.mask, problem.advantages)
        references = {"ref_per_token_logps": problem.ref, "bias": problem.bias}
        alone = loss_fn(*given, **references)[0]
        other = {"ref_input": problem.hidden.detach(), "ref_weight": 0 * problem.weight.detach()}
        with pytest.warns(UserWarning, match=r"Using ref_per_token_logps"):
            values[Loss] = loss_fn(*given, **references, **other)[0]
        assert torch.equal(values[Loss], alone)
    torch.testing.assert_close(*values.values(), rtol=1e-4, atol=1e-5)


def test_temperatures_of_sapo_are_checked_where_they_are_used():
    """An older caller's positional arguments put a False there; the module checks as Liger's."""
    problem = Problem()
    given = (problem.hidden, problem.weight, problem.labels, problem.mask, problem.advantages)
    options = {"use_ref_model": False, "beta": 0.0, "sapo_temperature_neg": False}
    loss, _ = liger_fused_linear_grpo(*given, loss_type="grpo", temperature=True, **options)
    named, _ = liger_fused_linear_grpo(*given, loss_type="grpo", use_ref_model=False, beta=0.0)
    assert torch.equal(loss, named)
    with pytest.raises(ValueError, match="sapo_temperature_neg must be positive, got False"):
        liger_fused_linear_grpo(*given, loss_type="sapo", **options)
    for Loss in (LigerFusedLinearGRPOLoss, TheirLoss):
        with pytest.raises(ValueError, match="sapo_temperature_neg must be positive, got 0"):
            Loss(loss_type="grpo", sapo_temperature_neg=0)


def test_the_functional_name_is_the_function():
    assert liger_fused_linear_grpo is LigerFusedLinearGRPOFunction.apply


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scaled_cross_entropy(temperature, ignore_index):
    """nll, entropy and the gradients of both, beside theirs; ignored tokens are 0."""
    target = torch.randint(0, 11, (21,))
    target[::4] = ignore_index
    hidden = torch.randn(21, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    coefficients = torch.randn(2, 21)
    found = []
    for function in (LigerFusedLinearScaledCrossEntropyFunction, TheirCrossEntropy):
        options = (temperature, ignore_index, 2, True)
        both = function.apply(hidden, weight, target, *options)
        gradients = torch.autograd.grad(both, (hidden, weight), tuple(coefficients))
        found.append((*both, *gradients))
        alone = function.apply(hidden, weight, target, temperature, ignore_index)
        assert torch.equal(alone, both[0])
        assert not both[0][target == ignore_index].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("with_group", [False, True])
def test_scaled_cross_entropy_of_a_split_vocabulary(ranks, with_group):
    for differences in ranks(2).run("cases_doors", "of_liger", with_group=with_group):
        assert max(differences) < 1e-12


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_scaled_cross_entropy_with_selected_ids(count, return_entropy, ignore_index):
    """Every output and the gradients of all, beside theirs; ids stand in any order and twice."""
    ids = torch.tensor([10, 3, 0, 3, 7])[:count]
    target = torch.randint(0, 11, (21,))
    target[::4] = ignore_index
    hidden = torch.randn(21, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    found = []
    for function in (LigerFusedLinearScaledCrossEntropyFunction, TheirCrossEntropy):
        every = function.apply(hidden, weight, target, 0.7, ignore_index, 1, return_entropy, ids)
        assert [t.shape for t in every] == [(21,)] * (1 + return_entropy) + [(21, count)]
        assert not any(t[target == ignore_index].any() for t in every)
        slopes = [torch.linspace(-1, 1, t.numel()).reshape(t.shape) for t in every]
        found.append((*every, *torch.autograd.grad(every, (hidden, weight), slopes)))
    torch.testing.assert_close(*found)


def test_selected_ids_in_float64_and_compiled():
    function = LigerFusedLinearScaledCrossEntropyFunction
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64) for n in (6, 11))
    target, ids = torch.tensor([0, 10, -100, 4, 4, 1]), torch.tensor([4, 0])
    given = (hidden, weight, target, 0.7, -100, 1, True, ids)
    logp = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    counted = target != -100
    expected = (
        -logp.gather(1, target.where(counted, 0)[:, None])[:, 0] * counted,
        -(logp.exp() * logp).sum(-1) * counted,
        logp[:, ids] * counted[:, None],
    )
    torch.testing.assert_close(function.apply(*given), expected)
    compiled = torch.compile(function.apply, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0], "selected_token_ids must be an int64 or int32 tensor, got list"),
        (torch.tensor([0.0]), "selected_token_ids must be an int64 or int32 tensor"),
        (torch.tensor([[0]]), r"selected_token_ids must have shape \[K\], got \[1, 1\]"),
        (
            torch.tensor([0, -100]),
            r"selected_token_ids must be in \[0, 11\), got -100 at index \[1\]",
        ),
        (torch.tensor([11]), r"selected_token_ids must be in \[0, 11\), got 11 at index \[0\]"),
    ],
)
def test_selected_ids_that_are_none(ids, message):
    given = (torch.randn(3, 8), torch.randn(11, 8), torch.tensor([0, -100, 1]))
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearScaledCrossEntropyFunction.apply(*given, selected_token_ids=ids)


def test_a_target_beside_selected_ids_that_is_none():
    given = (torch.randn(2, 8), torch.randn(11, 8), torch.tensor([0, 12]))
    with pytest.raises(ValueError, match=r"target must be in \[0, 11\), got 12 at index \[1\]"):
        LigerFusedLinearScaledCrossEntropyFunction.apply(
            *given, selected_token_ids=torch.tensor([1])
        )


def test_a_label_outside_the_vocabulary():
    """Theirs has the log-prob -lse; ours is an error."""
    problem = Problem()
    problem.labels[0, 0] = 1000
    assert call(TheirLoss, problem)[0].isfinite()
    with pytest.raises(ValueError, match="label"):
        call(LigerFusedLinearGRPOLoss, problem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, bnpo, .* got 'ppo'"),
        ({"importance_sampling_level": "word"}, "must be 'token' or 'sequence', got 'word'"),
        (
            {"loss_type": "cispo", "importance_sampling_level": "sequence"},
            "Sequence-level importance sampling is not supported: loss_type 'cispo' has .*'token'",
        ),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "needs max_completion_length"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be positive, got 0.0"),
        ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg must be positive, got -1.0"),
        ({"delta": 0.0}, "delta must be positive, got 0.0"),
        ({"delta": 2.0, "loss_type": "sapo"}, "delta bounds no ratio of loss_type 'sapo', got 2.0"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        call(LigerFusedLinearGRPOLoss, Problem(), **options)


def test_inputs_that_do_not_fit():
    problem = Problem()
    with pytest.raises(ValueError, match="use_ref_model needs ref_per_token_logps, or ref_input"):
        call(LigerFusedLinearGRPOLoss, problem, {"ref_per_token_logps": None}, beta=0.04)
    with pytest.raises(ValueError, match=r"vllm_is_ratio must be \[6, 7\], \[6, 1\] or \[6\]"):
        call(LigerFusedLinearGRPOLoss, problem, {"vllm_is_ratio": torch.ones(7)})


# From logits.


class Logits:
    """Six sequences of a Problem, as logits [6, 8, V] that give them their log-probs."""

    def __init__(self, temperature: float = 0.9):
        problem = Problem(temperature=temperature)
        self.problem, self.temperature, self.mask = problem, temperature, problem.mask.int()
        with torch.no_grad():
            z = problem.hidden @ problem.weight.T + problem.bias
            z = torch.cat([z, torch.randn(6, 1, z.shape[-1])], dim=1)
        self.logits = z.requires_grad_()

    def call(self, function, weights: Tensor | None = None, mask: bool = True, **options):
        p = self.problem
        return function(
            self.logits,
            p.old,
            p.ref,
            p.labels,
            p.advantages,
            self.mask.contiguous() if mask else None,
            **{
                "temperature": self.temperature,
                "inplace": False,
                "max_completion_length": LENGTH,
                "vllm_is_ratio": weights,
                "num_items_in_batch": ITEMS,
                **options,
            },
        )

    def both(self, *args, **options) -> list:
        functions = (triton_grpo_loss, their_triton.triton_grpo_loss)
        return [self.call(function, *args, **options) for function in functions]

    def gradient(self, loss: Tensor, upstream: Tensor | None = None) -> Tensor:
        return torch.autograd.grad(loss, self.logits, upstream, retain_graph=True)[0]


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_logits_in_the_interpreter(which, tmp_path):
    """The Triton kernels of both, in interpreted_liger.py."""
    assert_passes("interpreted_liger.py", tmp_path, "-m", which)


def test_logits_are_not_written_to_and_the_last_column_is_not_read():
    problem = Logits()
    before = problem.logits.detach().clone()
    loss, _ = problem.call(triton_grpo_loss, reduce=True, inplace=True)
    gradient = problem.gradient(loss)
    assert torch.equal(problem.logits, before) and not gradient[:, -1].any()
    with torch.no_grad():
        problem.logits[:, -1] = torch.nan
        again, _ = problem.call(triton_grpo_loss, reduce=True)
    assert torch.equal(again, loss)


def test_gradients_from_logits_and_from_hidden_states_are_the_same():
    problem = Logits()
    p = problem.problem
    loss, metrics = problem.call(triton_grpo_loss, reduce=True, eps_high=0.28, loss_type="grpo")
    of_hidden, expected = call(LigerFusedLinearGRPOLoss, p, loss_type="grpo", beta=0.04)
    torch.testing.assert_close(loss, of_hidden)
    torch.testing.assert_close(tuple(metrics), expected)
    through = problem.gradient(loss)[:, :-1] @ p.weight
    torch.testing.assert_close(through, p.gradients(of_hidden)[0], atol=1e-6, rtol=1e-4)


def test_beta_needs_a_reference():
    problem = Logits()
    problem.problem.ref = None
    with pytest.raises(ValueError, match=r"beta is 0.04, but ref_logp is None"):
        problem.call(triton_grpo_loss, beta=0.04)


def test_no_tokens_at_all():
    logits = torch.randn(2, 1, 5)
    ids = torch.ones(2, 4, dtype=torch.int64)
    assert fused_selective_log_softmax(logits, ids).shape == (2, 0)


def test_the_usage_in_the_docstring_runs():
    lines = inspect.getdoc(liger).split("changes:\n\n")[1].split("\nSignatures")[0]
    problem = Problem(bias=False)
    head = torch.nn.Linear(16, 37, bias=False)
    names = {
        "hidden": problem.hidden,
        "lm_head": head,
        "completion_ids": problem.labels,
        "completion_mask": problem.mask,
        "advantages": problem.advantages,
        "ref_logprobs": problem.ref,
        "old_logprobs": problem.old,
    }
    exec(textwrap.dedent(lines), names)
    assert head.weight.grad.any() and len(names["metrics"]) == 2

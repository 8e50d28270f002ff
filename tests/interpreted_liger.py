"""The drop-in for Liger's Triton kernels, from logits, beside those kernels, interpreted.

test_integration_liger.py runs this file in a process of its own: TRITON_INTERPRET must be set
before anyone imports triton.
"""

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from liger_kernel.transformers import grpo_loss as their_triton
from parity import CLIPPED, LEVELS, LOSS_TYPES
from test_integration_liger import CHOICES, TOLERANCE, Logits
from test_liger_parity import KLS, naive, relative

from fused_rl.integrations.liger import fused_selective_log_softmax, triton_grpo_loss


def assert_same_logits(problem: Logits, ours, theirs) -> None:
    """Loss, gradient and metrics; or three numbers per token, and the gradient of the first."""
    per_token = ours[0].dim() == 2
    upstream = torch.rand_like(ours[0]) + 0.5 if per_token else None
    assert relative(ours[0], theirs[0]) < TOLERANCE
    pair = [problem.gradient(loss, upstream) for loss in (ours[0], theirs[0])]
    assert relative(*pair) < TOLERANCE
    rest = [output[1:] if per_token else output[1] for output in (ours, theirs)]
    assert type(rest[0]) is type(rest[1])
    for metric, expected in zip(*rest, strict=True):
        if expected is None:
            assert metric is None
            continue
        assert metric.dtype == expected.dtype
        torch.testing.assert_close(metric, expected, atol=1e-6, rtol=TOLERANCE)


# (kl, delta, reduce) of the quick ones.
QUICK = (("corrected KL", None, True), ("KL", None, False), ("no KL", 1.5, True))
OF_LOGITS = [
    (c if c[2:] in QUICK else pytest.param(*c, marks=pytest.mark.slow))
    for c in itertools.product(LOSS_TYPES, LEVELS, KLS, (None, 1.5), (False, True))
    if (c[1] == "token" or c[0] in CLIPPED)
    and (c[3] is None or c[0] in CLIPPED)
    and not (c[0] == "luspo" and c[4])
]


@pytest.mark.parametrize(("loss_type", "level", "kl", "delta", "reduce"), OF_LOGITS)
def test_every_option_of_logits(loss_type, level, kl, delta, reduce):
    beta, corrected = KLS[kl]
    problem = Logits()
    options = {"loss_type": loss_type, "importance_sampling_level": level, "delta": delta}
    options |= {"beta": beta, "use_bias_correction_kl": corrected, "reduce": reduce}
    assert_same_logits(problem, *problem.both(**options))


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("choice", [c for c in CHOICES if c != "delta below the clip"])
def test_numbers_of_logits_that_are_not_the_defaults(choice, reduce):
    names = {"epsilon_low": "eps_low", "epsilon_high": "eps_high"}
    options = {names.get(name, name): value for name, value in CHOICES[choice].items()}
    problem = Logits()
    assert_same_logits(problem, *problem.both(beta=0.1, reduce=reduce, **options))


@pytest.mark.parametrize("shape", [(6, 7), (6, 1), (6,)])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "vespo"])
def test_importance_weights_of_logits(loss_type, shape):
    problem = Logits()
    weights = torch.rand(shape) + 0.5
    if shape == (6, 7):
        weights = weights.where(problem.problem.mask, 1.0)
    assert_same_logits(problem, *problem.both(weights, loss_type=loss_type, reduce=True))
    assert_same_logits(problem, *problem.both(weights, loss_type=loss_type))


@pytest.mark.parametrize("options", [{"max_completion_length": None}, {"num_items_in_batch": None}])
@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_counts_of_logits(loss_type, options):
    problem = Logits()
    pair = problem.both(mask=False, loss_type=loss_type, reduce=True, **options)
    assert_same_logits(problem, *pair)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_defaults_of_logits(temperature):
    problem = Logits(temperature)
    problem.problem.old = None
    assert_same_logits(problem, *problem.both(beta=0.0))


@pytest.mark.parametrize("wide", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_selective_log_softmax(wide, masked):
    """Of ids and a mask that have the prompt in front."""
    problem = Logits()
    ids = torch.cat([torch.zeros(6, wide, dtype=torch.int64), problem.problem.labels], dim=1)
    mask = torch.cat([torch.ones(6, wide, dtype=torch.int32), problem.mask], dim=1)
    args = (problem.logits, ids, 0.7, mask if masked else None)
    ours, theirs = (
        function(*args)
        for function in (fused_selective_log_softmax, their_triton.fused_selective_log_softmax)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not ours.requires_grad
    assert not masked or not ours[~problem.problem.mask].any()


def test_luspo_of_logits_weighs_sequences_by_their_length_twice():
    """With uneven lengths n: theirs is mean_i n_i^2 / L of s A, ours and the formula mean_i n_i."""
    problem = Logits(1.0)
    options = {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0}
    ours, theirs = problem.both(reduce=True, eps_high=0.28, **options)
    truth = naive(problem.problem, by_sequence=True)
    assert relative(ours[0], truth) < 1e-5
    assert relative(theirs[0], truth) == pytest.approx(0.4378, rel=1e-3)


def test_the_gradient_of_luspo_of_logits_is_of_other_sequences():
    """Theirs reads the upstream gradient [B, 1] as if it were [B, L]: a token at l has that of the
    sequence l rows below, here half of its own, elsewhere whatever lies behind it in memory.
    """
    logits = torch.randn(3, 3, 11, requires_grad=True)
    ids, mask = torch.randint(0, 11, (3, 2)), torch.tensor([[1, 1], [1, 1], [1, 0]]).int()
    args = (logits, None, None, ids, torch.ones(3), mask)
    options = {"beta": 0.0, "loss_type": "luspo", "reduce": True, "inplace": False}
    ours, theirs = (
        torch.autograd.grad(function(*args, **options)[0], logits)[0]
        for function in (triton_grpo_loss, their_triton.triton_grpo_loss)
    )
    logp = torch.log_softmax(logits / 0.9, -1)[:, :-1].gather(-1, ids[..., None])[..., 0]
    (truth,) = torch.autograd.grad(-(logp * mask).sum() / 3, logits)
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(theirs[0], truth[0])
    torch.testing.assert_close(theirs[1, 1], truth[1, 1] / 2)


def test_the_kl_per_token_has_a_gradient():
    """In theirs it requires one and has none: 0, silently."""
    problem = Logits()
    (_, ours, _), (_, theirs, _) = problem.both(beta=0.04)
    assert ours.requires_grad and theirs.requires_grad
    assert problem.gradient(ours.sum()).any()
    assert not problem.gradient(theirs.sum()).any()


@pytest.mark.parametrize("level", LEVELS)
def test_a_delta_of_logits_below_the_clip(level):
    """By hand, r = 1.2, A = -1, delta = 1.1, clip at 1.4: the loss is r, and so is its derivative.
    Theirs is 0: it takes r, beyond delta, for a constant, though the other branch is the minimum.
    """
    logits = torch.randn(1, 2, 5, requires_grad=True)
    ids = torch.tensor([[3]])
    logp = torch.log_softmax(logits, -1)[:, :1, 3]
    args = (logits, logp.detach() - torch.tensor(1.2).log(), None, ids, torch.tensor([-1.0]))
    options = {"temperature": 1.0, "beta": 0.0, "delta": 1.1, "reduce": True, "inplace": False}
    (truth,) = torch.autograd.grad(1.2 * logp.sum(), logits)
    for function, factor in ((triton_grpo_loss, 1.0), (their_triton.triton_grpo_loss, 0.0)):
        loss, _ = function(*args, importance_sampling_level=level, **options)
        assert loss.item() == pytest.approx(1.2)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], factor * truth)

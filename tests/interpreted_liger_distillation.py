"""Liger's ops of divergences, whose kernels are Triton's, interpreted, beside ours.

test_liger_distillation.py runs this file in a process of its own: TRITON_INTERPRET must be set
before anyone imports triton.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from test_liger_distillation import BETAS, KL, OP, PAIRS, N, Pair, V, relative

from fused_rl.integrations import liger


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_op(beta, labels, temperature):
    """Without a gradient from above, and with one of -3."""
    pair = Pair(bias=False)
    given = (pair.hidden, pair.weight, *pair.teacher, pair.labels if labels else None)
    ours, theirs = (c(beta, temperature=temperature)(*given) for c in PAIRS[OP])
    pair.assert_same(ours, theirs)
    # Last: theirs leave their gradients scaled.
    found = (torch.autograd.grad(x, pair.leaves, torch.tensor(-3.0)) for x in (ours, theirs))
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("labels", [False, True])
def test_kl_to_given_probabilities(reduction, labels):
    pair = Pair(bias=False)
    target = torch.softmax(torch.randn(N, V).masked_fill(torch.rand(N, V) < 0.2, -1e4), -1)
    given = (pair.hidden, pair.weight, target, pair.labels if labels else None)
    ours, theirs = (c(reduction, temperature=0.7)(*given) for c in PAIRS[KL])
    pair.assert_same(ours, theirs)


def test_a_padded_vocabulary_of_the_teacher():
    """Theirs reads the first V of the teacher's probabilities, which do not sum to 1 any more."""
    pair = Pair(bias=False)
    wide = torch.cat([pair.teacher[1], torch.zeros(3, pair.teacher[1].shape[1])]).detach()
    given = (pair.hidden, pair.weight, pair.teacher[0])
    with pytest.raises(ValueError, match=r"give weight\[:37\]"):
        liger.LigerFusedLinearJSD()(*given, wide, None)
    s = torch.log_softmax(pair.hidden @ pair.weight.T, -1)
    t = torch.log_softmax(pair.teacher[0] @ wide.T, -1)[:, :V]
    kl = (t.exp() * (t - s)).sum(-1).mean()
    theirs = PAIRS[OP][1](0.0)(*given, wide, None)
    assert relative(theirs, kl) < 1e-5
    right = liger.LigerFusedLinearJSD(0.0)(*given, wide[:V], None)
    assert relative(theirs, right) > 0.03

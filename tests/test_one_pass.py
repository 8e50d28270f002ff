"""linear_policy_loss: how it scales the gradients that wait in it.

What it computes is compared with two passes in test_losses.py.
"""

import pytest
import torch

from fused_rl import one_pass


def test_scaling_by_one_leaves_gradients_alone_on_a_cpu():
    held = [torch.randn(3, 2), torch.randn(3, dtype=torch.float64)]
    before = [g.clone() for g in held]
    versions = [g._version for g in held]
    one_pass.scale_(held, torch.tensor(1.0))
    assert [g._version for g in held] == versions
    one_pass.scale_(held, torch.tensor(0.5))
    assert all(torch.equal(g, b / 2) for g, b in zip(held, before, strict=True))


def test_elsewhere_the_scale_is_not_read_by_the_host():
    """A meta tensor has no value: to ask for it is an error."""
    dloss = torch.ones((), device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(dloss == 1)
    held = [torch.empty(3, 2, dtype=torch.bfloat16, device="meta")]
    one_pass.scale_(held, dloss)
    assert held[0]._version == 1 and held[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_with_one_changes_no_bit(dtype):
    """What CUDA computes instead of asking; with the smallest and largest numbers."""
    info = torch.finfo(dtype)
    values = [info.smallest_normal, info.max, -info.max, -0.0, torch.inf, info.eps]
    gradient = torch.cat([torch.randn(1000), torch.tensor(values)]).to(dtype)
    before = gradient.clone()
    gradient.mul_(torch.tensor(1.0))
    assert torch.equal(gradient, before)
    assert torch.equal(gradient.signbit(), before.signbit())

"""A plugin for pytest: our functions in the place of verl's, before its tests are imported."""

import torch
from swap import swap
from verl.trainer.ppo import core_algos

from fused_rl.integrations import verl
from fused_rl.integrations.verl.losses import mean_of
from fused_rl.losses.batch import TokenBatch


def agg_loss(loss_mat, loss_mask, loss_agg_mode, **counts):
    """verl's function by our means."""
    mask = loss_mask.bool()
    labels = torch.zeros_like(mask, dtype=torch.int64)
    batch = TokenBatch.padded(labels, mask, torch.zeros_like(loss_mat))
    weights = mean_of(loss_agg_mode, mask, **counts)(batch).reshape(mask.shape)
    return (weights * loss_mat.where(mask, 0.0)).sum()


verl.patch()
swap("verl", core_algos.agg_loss, agg_loss)
swap("verl", core_algos.kl_penalty, verl.kl_penalty)
for name, ours in verl.policy_losses.items():
    swap("verl", core_algos.POLICY_LOSS_REGISTRY[name], ours)
    core_algos.POLICY_LOSS_REGISTRY[name] = ours

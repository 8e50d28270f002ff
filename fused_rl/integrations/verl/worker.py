"""Importing this module patches verl in the process that imports it; nothing else here does.

verl's actors live in processes of their own, which a patch() in the driver does not reach. verl
imports what its configuration names, in each of them, before it builds the model:

    actor_rollout_ref.model.external_lib=fused_rl.integrations.verl.worker
    actor_rollout_ref.actor.policy_loss.loss_mode=fused_vanilla

The first line is enough for the head (with actor_rollout_ref.model.use_fused_kernels=True); the
second chooses a loss. The environment variable VERL_USE_EXTERNAL_MODULES of verl, with the same
name in it, does it for every process that imports verl.
"""

from fused_rl.integrations.verl.patching import patch

patch()

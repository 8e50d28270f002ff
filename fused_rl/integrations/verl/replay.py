"""Importing this module does what `worker` does, and has verl's FSDP engine replay sampling masks.

    actor_rollout_ref.model.external_lib=fused_rl.integrations.verl.replay
    actor_rollout_ref.model.use_fused_kernels=True

A rollout with top-k, top-p or min-p samples from a part of the vocabulary, and reports log-probs
of that part (rollout.logprobs_mode=processed_logprobs). Where its agent loop puts what was left
into the extra_fields of its outputs as "sampling_mask", the actor's and the reference's log-probs
are renormalised over the same sets: what has to be there is said by kept.sets_of. A batch without
them is what it was; one whose log-probs could not be renormalised is an error.
"""

from verl.workers.engine.fsdp.transformer_impl import (
    FSDPEngineWithLMHead,
    FSDPEngineWithValueHead,
)

from fused_rl.integrations.verl.kept import replay
from fused_rl.integrations.verl.patching import patch

patch()
# A critic, which inherits the step, has no vocabulary: it keeps verl's.
FSDPEngineWithValueHead.forward_step = FSDPEngineWithLMHead.forward_step
replay(FSDPEngineWithLMHead)

"""verl's names on our functions; and those of OpenRLHF and prime-rl, which have a seam like it.

```python
from fused_rl.integrations import verl

logprobs, entropy = verl.linear_cross_entropy(hidden, weight, labels, 0.7)
logprobs = logprobs.view_as(labels)
kl = verl.kl_penalty(logprobs, ref_logprobs, "k3+")
pg_loss, metrics = verl.policy_losses["vanilla"](
    old_logprobs, logprobs, advantages, response_mask, "token-mean", config
)
```

With verl installed, `patch()` puts our head in the place of both of its fused ones and adds our
losses to its registry as "fused_vanilla", "fused_gspo" and so on; `unpatch()` takes all of it back.
Nothing of verl is imported before. verl's workers are processes of their own: what its
configuration has to say so that they are patched is in `fused_rl.integrations.verl.worker`.

What differs from verl, on purpose: logits and entropies are float32 throughout; k3 keeps its value
and its gradient where log(ref / policy) exceeds 2.6, where verl's clamp at 10 has neither, up to
a log-ratio of 20; a log-ratio beyond 20 keeps its gradient, and GSPO's beyond 10 its value too; a
batch without a counted token has loss 0, not NaN; a masked token may be anything; a NaN among old
log-probs or rollout weights is a token of ratio 1 or weight 1. kl_penalty "full", which verl names
and does not have, is the exact KL of logits [B, T, V]; another name that is none is a ValueError,
where verl raises NotImplementedError.

A rollout's sampling masks are replayed: `kept_sets` holds the sets that log-probs are renormalised
over, and `fused_rl.integrations.verl.replay` has verl's FSDP engine take them from its batches.

A vocabulary that is split over tensor-parallel ranks works by verl's contract: a dist_process_group
to linear_cross_entropy, labels of the whole vocabulary, as many rows on every rank, and a gradient
of the hidden states that is this rank's summand. It was run on two and four processes, without
Megatron and without verl's worker.

Signatures, means and metrics are those of verl 0.9.1: verl/utils/kernel/linear_cross_entropy.py,
verl/utils/experimental/torch_functional.py and verl/trainer/ppo/core_algos.py. The tests run verl's
own functions beside ours, its forwards on a small model, and a Ray worker; no training job was run.
openrlhf/models/utils.py and prime_rl/trainer/models/layers/lm_head.py were not run.
"""

from fused_rl.integrations.verl.heads import (
    FusedLinearForPPO,
    FusedOutputLinear,
    linear_cross_entropy,
    log_probs_from_logits,
)
from fused_rl.integrations.verl.kept import kept_sets
from fused_rl.integrations.verl.kl_penalties import kl_penalty
from fused_rl.integrations.verl.losses import (
    PolicyLossFn,
    policy_loss_fn,
    policy_losses,
)
from fused_rl.integrations.verl.patching import patch, unpatch

__all__ = [
    "FusedLinearForPPO",
    "FusedOutputLinear",
    "PolicyLossFn",
    "kept_sets",
    "kl_penalty",
    "linear_cross_entropy",
    "log_probs_from_logits",
    "patch",
    "policy_loss_fn",
    "policy_losses",
    "unpatch",
]

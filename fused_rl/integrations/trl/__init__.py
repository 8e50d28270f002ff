"""TRL's trainers on our head: one line to get in, one line to get out.

```python
from fused_rl.integrations.trl import patched

with patched():
    trainer.train()
```

`patch()` and `unpatch()` do the same without a block. They replace the one function that TRL's
fused language-model head calls, `_ChunkedLogProbFunction`, wherever TRL holds it; what is put back
is the object itself. Which trainers call it is TRL's choice:

    TRL 1.15, 1.16     GRPO, RLOO, KTO, DPO, SFT, asynchronous GRPO
    TRL 1.14           DPO, KTO and GRPO with use_liger_kernel=True; asynchronous GRPO
    TRL 1.12, 1.13     asynchronous GRPO

Policy and reference are always computed by one head: TRL's rounds logits to bfloat16 where ours
does not, and between the two equal weights would differ by some 3e-3 nats per token. So two things
stay with TRL's own function, as a whole: models whose head ZeRO-3 has sharded, which TRL gathers
again in its backward pass; and a DPO or KTO trainer with precompute_ref_log_probs=True, since its
reference log-probs may be from before patch(), or from a file. All other calls are ours. What only
DPO and KTO ask for, `log_sum_sq_probs` (use_weighting) and the `mean_logits` of a model with a
softcap (Gemma 2), takes a second pass over the weight, without gradient and in float32.

`is_top1`, from which SFT and DPO take their token accuracy, compares float32 logits, where TRL's
function compares those it rounded to the dtype of the model; and tokens that tie are all the most
likely one, of which TRL's function counts the first.

`FusedGRPOTrainer` is TRL's GRPOTrainer with any of our losses, formed with its gradients in one
pass, inside the model's forward:

```python
import fused_rl
from fused_rl.integrations.trl import FusedGRPOTrainer

trainer = FusedGRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=config,
    train_dataset=dataset,
    processing_class=tokenizer,
    policy_loss=fused_rl.dapo(),
)
trainer.train()
```
"""

from typing import Any

from fused_rl.integrations.trl.grpo import FusedLoss, fused_grpo_trainer
from fused_rl.integrations.trl.patching import patch, patched, unpatch

__all__ = ["FusedLoss", "patch", "patched", "unpatch"]


def __getattr__(name: str) -> Any:
    """FusedGRPOTrainer, built when it is first asked for: only then is TRL imported."""
    if name == "FusedGRPOTrainer":
        return fused_grpo_trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""TRL's trainers on our head: one line to get in, one line to get out.

```python
from fused_rl.integrations.trl import patched

with patched():
    trainer.train()
```

`patch()` and `unpatch()` do the same without a block. They replace the function that TRL's fused
language-model head calls, `_ChunkedLogProbFunction`, and that of its distillation,
`ChunkedDivergenceFunction`, wherever TRL holds them; what is put back are the objects themselves.
Which trainers call them is TRL's choice:

    TRL 1.16           DistillationTrainer; GKDTrainer by way of its compute_loss, see below
    TRL 1.15, 1.16     GRPO, RLOO, KTO, DPO, SFT, asynchronous GRPO
    TRL 1.14           DPO, KTO and GRPO with use_liger_kernel=True; asynchronous GRPO
    TRL 1.12, 1.13     asynchronous GRPO

Policy and reference are always computed by one head: TRL's rounds logits to bfloat16 where ours
does not, and between the two equal weights would differ by some 3e-3 nats per token. So a DPO or
KTO trainer with precompute_ref_log_probs=True stays with TRL's own function, as a whole, since its
reference log-probs may be from before patch(), or from a file. All other calls are ours. What only
DPO and KTO ask for, `log_sum_sq_probs` (use_weighting) and `mean_logits`, comes out of the same
pass over the weight, and changes no bit of the log-probs.

On several processes, with TRL 1.16 and accelerate 1.15: two of them took three steps of GRPO, with
accumulation, a reference model and tied embeddings, under DDP, FSDP2, and ZeRO-2 and ZeRO-3 of
DeepSpeed 0.19, on CPUs. TRL's trainer, the same patched, and FusedGRPOTrainer gave the same steps
to 1e-5 of a weight's step. Where the head is an FSDP2 unit of its own, as it is where accelerate
wraps every Linear, TRL's own gradient of the head is of each rank's tokens alone; ours is that of
all (integrations/trl/gathered.py). Neither FSDP1 nor a GPU was tried.

`is_top1`, from which SFT and DPO take their token accuracy, compares float32 logits, where TRL's
function compares those it rounded to the dtype of the model. Of tokens that tie the first is the
most likely one, as in TRL; on a GPU each of them is, unless the pass forms other statistics, too.

Divergences, JSD(beta) with the two KLs at its ends, are sums of terms that do not cancel: of 2e-7
nats TRL's is off by a third to a half, ours by 2e-4 of it. The entropy has no gradient, nor has the
teacher, as in TRL. What differs:

    vocabularies of different sizes   a ValueError: TRL's function cuts a larger teacher to the
                                      student's vocabulary in silence. Its trainers refuse such
                                      pairs, but by what their configs say
    entries that neither can sample   (logits of -inf) add nothing; TRL's are NaN
    a head that ZeRO-3 has sharded    on either side: TRL's own function

The experimental GKDTrainer of TRL 1.16 forms the logits of both models. Where its module is
imported before patch(), its `compute_loss` forms the same loss from hidden states. TRL's own stays
where outputs are asked for with the loss, where ZeRO-3 has sharded a head, and in subclasses with
another `generalized_jsd_loss`. LMHead.from_model asks the teacher once what it does to its logits.

The experimental CPOTrainer, whose losses are CPO, SimPO, IPO, hinge and AlphaPO, and ORPOTrainer
form the logits of both sides, [2 B, T, V]. Where their modules are imported before patch(), their
`concatenated_forward` is ours: one call of linear_logprobs, inside the model's, gives the log-probs
of completions and the NLL, of the chosen completions in CPO, with their prompts in ORPO. Masked
tokens cost nothing. The model is asked once what it does to its logits, and one that does more than
an LMHead can is a ValueError. What differs:

    log-probs of a bfloat16 model     float32; TRL's are bfloat16, some 0.2 % off; of 151,936
                                      entries ORPO's NLL was 12.13 nats, and 12.27 in float32
    logits/chosen, logits/rejected    the same means over all columns, by the mean of the weight's
                                      rows; with a softcap a second pass over all columns
    the logits that are returned      their means over the vocabulary, [B, T]

TRL's own stays for encoder-decoders, with router logits, in subclasses with another
`get_batch_logps`, where a label is not the token of the input, and where ZeRO-3 or tensor
parallelism has sharded the head. On two processes, with accumulation and with tied embeddings, ours
took TRL's steps under DDP and FSDP2.

Whoever forms the log-probs, TRL's AlphaPO of sums (loss_type="sigmoid" with alpha) takes a power of
exp(sum) in float32. With alpha=0.3 its gradient is infinite for a completion below -68 nats, its
loss below -104; after one such step all weights were NaN, while a loss of 0.0 was logged.
fused_rl.preference.alphapo is of means, and bounded. TRL 1.16 has no BCOTrainer: that loss is
fused_rl.preference.bco, or, for pairs and without its shift, loss_type="bco_pair" of DPOTrainer.

`FusedGRPOTrainer` is TRL's GRPOTrainer with its loss formed in one pass with its gradients, inside
the model's forward: the one that GRPOConfig describes, or any of ours. `FusedRLOOTrainer` is its
RLOOTrainer. FusedLoss says what each option of their configs does:

```python
import fused_rl
from fused_rl.integrations.trl import FusedGRPOTrainer

trainer = FusedGRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=config,
    train_dataset=dataset,
    processing_class=tokenizer,
    policy_loss=fused_rl.dapo(),  # without it: the loss of config
)
trainer.train()
```

Without policy_loss its steps and all that it logs are TRL's, for every loss_type and option of
TRL 1.16. What differs:

    a log-ratio beyond +-20 nats      its exp is held there
    a log-prob where no token counts  is not looked at; TRL's loss is NaN where its ratio overflows

An asynchronous trainer is left to patch(): AsyncGRPOTrainer calls the model and forms its loss in
one method, of tokens that several completions of a tree share. There is no seam between the two,
and the loss of a state that is shared is known only when all of its completions are.
"""

from typing import Any

from fused_rl.integrations.trl.grpo import FusedLoss, fused_grpo_trainer, fused_rloo_trainer
from fused_rl.integrations.trl.patching import patch, patched, unpatch

__all__ = ["FusedLoss", "patch", "patched", "unpatch"]


_TRAINERS = {
    "FusedGRPOTrainer": fused_grpo_trainer,
    "FusedRLOOTrainer": fused_rloo_trainer,
}


def __getattr__(name: str) -> Any:
    """A trainer, built when it is first asked for: only then is TRL imported."""
    if name in _TRAINERS:
        return _TRAINERS[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

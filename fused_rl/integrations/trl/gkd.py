"""GKD's loss from hidden states, where TRL's own takes it from both models' logits, [B, T, V] each.

The student's hidden states are had within its forward, by the head that TRL's trainers give it:
what wraps the model sees the divergences where the log-probs of the labels would be.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_rl.integrations.trl.divergence import same_vocabulary
from fused_rl.integrations.trl.logprobs import in_head
from fused_rl.kl.divergences import Divergence
from fused_rl.linear.divergence import linear_divergence
from fused_rl.linear.head import LMHead
from fused_rl.models.parts import backbone
from fused_rl.stats import IGNORE_INDEX

# What GKDTrainer.compute_loss takes in TRL 1.16.
NAMES = ("self", "model", "inputs", "return_outputs", "num_items_in_batch")


def compute_loss_of(owner: type, theirs: Callable) -> Callable:
    """GKDTrainer.compute_loss without logits. Theirs stays where logits are asked for, where ZeRO-3
    has sharded a head, and where a subclass has a divergence of its own.
    """
    formula = owner.generalized_jsd_loss

    @functools.wraps(theirs)
    def compute_loss(
        self: Any,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        models = [self.accelerator.unwrap_model(m) for m in (model, self.teacher_model)]
        sharded = any(hasattr(m.get_output_embeddings().weight, "ds_id") for m in models)
        if return_outputs or sharded or type(self).generalized_jsd_loss is not formula:
            return theirs(self, model, inputs, return_outputs, num_items_in_batch)
        total, count = _divergences(model, models[1], inputs, self.beta)
        if num_items_in_batch is None:
            return total / count.clamp(min=1)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    return compute_loss


def _divergences(
    model: Any, teacher: Any, inputs: dict[str, Any], beta: float
) -> tuple[Tensor, Tensor]:
    """The sum of the divergences of all tokens with a label, and their number.

    Temperature is 1, as it is in TRL's: GKDConfig's is that of sampling.
    """
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    counted = inputs["labels"][:, 1:] != IGNORE_INDEX
    teacher.eval()
    with torch.no_grad():
        of_teacher = backbone(teacher)(**given, use_cache=False).last_hidden_state[:, :-1]
    teacher_head = LMHead.from_model(teacher).detached()

    def divergences(hidden: Tensor, head: LMHead, temperature: float) -> Tensor:
        # Of all tokens, or of those that count, by the device.
        some = len(hidden) != counted.numel()
        rows = of_teacher[counted] if some else of_teacher.flatten(0, 1)
        labels = None if some else torch.where(counted, 0, IGNORE_INDEX).flatten()
        same_vocabulary(head, teacher_head)
        chosen = {"divergence": Divergence.JSD(beta), "temperature": temperature}
        return linear_divergence(hidden, head, rows, teacher_head, labels, **chosen).divergence

    reset = in_head.set(divergences)
    try:
        output = model(**given, labels=inputs["labels"], fused_lm_head=True)
    finally:
        in_head.reset(reset)
    return output.log_probs.sum(), counted.sum()

"""Log-probabilities and entropies from a transformers causal language model, without logits.

    from fused_rl.integrations.transformers import logprobs, patched

    masks = {"attention_mask": attention_mask, "completion_mask": completion_mask}
    stats = logprobs(model, input_ids, **masks)
    with patched(model):
        same = model(input_ids=input_ids, **masks, return_logprobs=True)
        tokens = model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=4)

Hidden states come from model.base_model, the head from LMHead.from_model: weight, bias, scale and
softcap. `logprobs` is enough for a model that is called itself. A model inside a wrapper whose
forward does something (DistributedDataParallel) is patched before it is wrapped, so that the
wrapper's forward is the one that runs.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rl import LMHead, TokenStats, linear_logprobs
from fused_rl.checks import is_labels, require, same_shape
from fused_rl.logprobs import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["logprobs", "patch_model", "patched", "unpatch_model"]


def logprobs(
    model: "PreTrainedModel",
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    completion_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    **inputs: Any,
) -> TokenStats:
    """Log-probabilities of tokens and entropies of the distributions they were drawn from.

    The hidden state at t predicts the token at t + 1, so column t of the result is that of the
    token in column t + 1: the result is [B, T - 1]. With a completion_mask of K < T columns it is
    [B, K], column by column that of the last K tokens.

    0, without gradient and at no cost in the head, are tokens that are masked, whose label is -100,
    and, of a [B, T] attention_mask, padding and the first token after it.

    Args:
        model: a causal language model of transformers, in whatever mode and under whatever
            torch.autocast it is to run.
        input_ids: [B, T] int64.
        labels: [B, T], int64 or int32, not shifted; -100 is ignored; None: input_ids.
        attention_mask: [B, T] 0/1, padding left or right, and position_ids are then formed from
            it unless given; or any other that the model takes, which is handed on as it is.
        completion_mask: [B, K] bool or 0/1, K <= T, of the last K tokens: those that are wanted.
        temperature: a number, or a tensor that broadcasts to the result; positive.
        inputs: further arguments of the base model, such as position_ids.

    Raises:
        ValueError: shapes and dtypes that do not fit; as LMHead.from_model and linear_logprobs.
    """
    is_labels(input_ids)
    require(input_ids.dim() == 2, lambda: f"input_ids must be [B, T], got {list(input_ids.shape)}")
    require(
        "logits_to_keep" not in inputs,
        lambda: "logits_to_keep is of logits: give a completion_mask [B, K] of the last K tokens",
    )
    labels = input_ids if labels is None else labels
    is_labels(labels)
    same_shape("labels", labels, "input_ids", input_ids)
    targets = labels[:, 1:]
    if attention_mask is not None and attention_mask.dim() == 2:
        same_shape("attention_mask", attention_mask, "input_ids", input_ids)
        there = attention_mask != 0
        targets = targets.where(there[:, 1:] & there[:, :-1], IGNORE_INDEX)
        if "position_ids" in inspect.signature(model.base_model.forward).parameters:
            inputs.setdefault("position_ids", (there.cumsum(-1) - 1).clamp(min=0))
    if completion_mask is not None:
        targets = _completion(targets, completion_mask)
    hidden = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        return_dict=True,
        **inputs,
    ).last_hidden_state
    head = LMHead.from_model(model)
    K = targets.shape[1]
    # The last state predicts nothing that is there; it is ignored, not cut off by a copy.
    targets = pad(targets, (0, 1), value=IGNORE_INDEX)
    if isinstance(temperature, Tensor) and temperature.shape[-1:] == (K,):
        temperature = pad(temperature, (0, 1), value=1.0)
    stats = linear_logprobs(hidden[:, -K - 1 :], head, targets, temperature=temperature)
    return TokenStats(*(t[:, :-1] for t in stats))


def _completion(targets: Tensor, mask: Tensor) -> Tensor:
    """The targets [B, T - 1] of the mask's columns, ignored where it is 0."""
    B, T = targets.shape[0], targets.shape[1] + 1
    require(
        mask.dim() == 2 and mask.shape[0] == B and 0 < mask.shape[1] <= T,
        lambda: f"completion_mask must be [{B}, K] with 0 < K <= {T}, got {list(mask.shape)}",
    )
    if mask.shape[1] == T:
        mask = mask[:, 1:]
    return targets[:, T - 1 - mask.shape[1] :].where(mask != 0, IGNORE_INDEX)


def patch_model(model: "PreTrainedModel") -> "PreTrainedModel":
    """Teach this model's forward `return_logprobs`; the model itself is returned.

    model(input_ids=..., return_logprobs=True, ...) takes the arguments of `logprobs` and returns
    what it returns. Without return_logprobs, in generate for one, the forward is the one from
    before. A model that is patched already stays as it is. A deep copy is patched too.
    """
    if _is_patched(model):
        return model
    own = vars(model).get("forward")

    @functools.wraps(type(model).forward)
    def forward(self, *args, return_logprobs: bool = False, **inputs):
        if return_logprobs:
            return _named(self, *args, **inputs)
        if own is not None:
            return own(*args, **inputs)
        return type(self).forward(self, *args, **inputs)

    forward.fused_rl_own = own
    model.forward = MethodType(forward, model)
    return model


def unpatch_model(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model as it was before patch_model, its forward the very object from before.

    Raises:
        ValueError: a model that is not patched, or whose forward someone else replaced since.
    """
    require(_is_patched(model), lambda: f"this {type(model).__name__} is not patched")
    own = vars(model)["forward"].__func__.fused_rl_own
    if own is None:
        del model.forward
    else:
        model.forward = own
    return model


@contextmanager
def patched(model: "PreTrainedModel") -> Iterator["PreTrainedModel"]:
    """`with patched(model):` patches, and unpatches unless the model was patched before."""
    before = _is_patched(model)
    patch_model(model)
    try:
        yield model
    finally:
        if not before:
            unpatch_model(model)


def _is_patched(model: torch.nn.Module) -> bool:
    function = getattr(vars(model).get("forward"), "__func__", None)
    return hasattr(function, "fused_rl_own")


def _named(model, input_ids, *, labels=None, **inputs) -> TokenStats:
    """logprobs, with labels by name: a model's second argument is its attention_mask."""
    return logprobs(model, input_ids, labels, **inputs)

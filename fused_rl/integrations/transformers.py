"""Log-probabilities and entropies from a transformers causal language model, without logits.

    from fused_rl.integrations.transformers import logprobs, patched

    masks = {"attention_mask": attention_mask, "completion_mask": completion_mask}
    stats = logprobs(model, input_ids, **masks)
    with patched(model):
        same = model(input_ids=input_ids, **masks, return_logprobs=True)
        tokens = model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=4)

Hidden states come from `backbone(model)`, the head from LMHead.from_model, which asks the model
once whether the two give its own logits; `ask=False` leaves that out. A PeftModel is taken for the
model inside it with its adapters, and a forward of the model that turns autocast on (accelerate's
mixed precision) is followed.

`logprobs` is enough for a model that is called itself. A model inside a wrapper whose forward does
something (DistributedDataParallel, FSDP) is patched before it is wrapped, so that the wrapper's
forward is the one that runs; `logprobs` refuses the wrapper. A patched model is pickled, saved,
copied and sent to other processes as one.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rl import LMHead, TokenStats, linear_logprobs
from fused_rl.checks import is_labels, require, same_shape
from fused_rl.models import asked, parts
from fused_rl.models.parts import backbone
from fused_rl.models.sharded import gathers
from fused_rl.one_pass.through import through
from fused_rl.stats import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["backbone", "logprobs", "patch_model", "patched", "unpatch_model"]


def logprobs(
    model: "PreTrainedModel",
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    completion_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ask: bool = True,
    **inputs: Any,
) -> TokenStats:
    """Log-probabilities of tokens and entropies of the distributions they were drawn from.

    The hidden state at t predicts the token at t + 1, so column t of the result is that of the
    token in column t + 1: the result is [B, T - 1]. With a completion_mask of K < T columns it is
    [B, K], column by column that of the last K tokens.

    0, without gradient and at no cost in the head, are tokens that are masked, whose label is -100,
    of a [B, T] attention_mask, padding and the first token after it, and the first token of a
    document in a packed row: one whose position_ids do not rise, or at which cu_seq_lens_q or
    seq_idx begin another.

    Args:
        model: a causal language model of transformers, in whatever mode and under whatever
            torch.autocast it is to run, or a PeftModel of one.
        input_ids: [B, T] int64.
        labels: [B, T], int64 or int32, not shifted; -100 is ignored; None: input_ids.
        attention_mask: [B, T] 0/1, padding left or right; or any other that the model takes, which
            is handed on as it is. position_ids are formed from the former as `generate` does,
            unless they are given, or the model forms its own: where its inputs are more than text,
            or it has a rule for several axes.
        completion_mask: [B, K] bool or 0/1, K <= T, of the last K tokens: those that are wanted.
        temperature: a number, or a tensor that broadcasts to the result; positive.
        ask: as for LMHead.from_model.
        inputs: further arguments of the base model, such as position_ids or pixel_values.
            use_cache and return_dict, which trainers pass, are of no consequence.

    Raises:
        ValueError: shapes and dtypes that do not fit; as LMHead.from_model and linear_logprobs.
    """
    return _logprobs(
        *(model, input_ids, labels),
        within=False,
        attention_mask=attention_mask,
        completion_mask=completion_mask,
        temperature=temperature,
        ask=ask,
        **inputs,
    )


def _logprobs(
    model: Any,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    within: bool,
    attention_mask: Tensor | None = None,
    completion_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ask: bool = True,
    **inputs: Any,
) -> TokenStats:
    """logprobs; `within` the model's own forward or beside it."""
    require(
        input_ids is not None,
        lambda: "input_ids are the tokens that are scored: inputs_embeds alone do not name them",
    )
    is_labels(input_ids)
    require(input_ids.dim() == 2, lambda: f"input_ids must be [B, T], got {list(input_ids.shape)}")
    require(
        "logits_to_keep" not in inputs,
        lambda: "logits_to_keep is of logits: give a completion_mask [B, K] of the last K tokens",
    )
    labels = input_ids if labels is None else labels
    is_labels(labels)
    same_shape("labels", labels, "input_ids", input_ids)
    # First, so that a model that is refused is so before it runs.
    if not within:
        parts.output_layer(parts.unwrap(model))
    answer = asked.answer(model, ask=ask, within=within)
    model = parts.unwrap(model)
    body = backbone(model)
    inputs = {**inputs, "use_cache": False, "return_dict": True}
    targets = labels[:, 1:]
    for first in _first_of_documents(input_ids, inputs):
        targets = targets.where(~first, IGNORE_INDEX)
    if attention_mask is not None and attention_mask.dim() == 2:
        same_shape("attention_mask", attention_mask, "input_ids", input_ids)
        there = attention_mask != 0
        targets = targets.where(there[:, 1:] & there[:, :-1], IGNORE_INDEX)
        if inputs.get("position_ids") is None and not _forms_positions(model, body, inputs):
            inputs["position_ids"] = (there.cumsum(-1) - 1).clamp(min=0)
    if completion_mask is not None:
        targets = _completion(targets, completion_mask)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    layer, K = model.get_output_embeddings(), targets.shape[1]
    # The last state predicts nothing that is there; it is ignored, not cut off by a copy.
    targets = pad(targets, (0, 1), value=IGNORE_INDEX)
    if isinstance(temperature, Tensor) and temperature.shape[-1:] == (K,):
        temperature = pad(temperature, (0, 1), value=1.0)

    def formed(linear: torch.nn.Linear, hidden: Tensor) -> TokenStats:
        head = LMHead.of_layer(answer.recipe, linear)
        stats = linear_logprobs(hidden, head, targets, temperature=temperature)
        # No views: FSDP2 hooks its backward pass onto what a forward returns, which views may lose.
        return TokenStats(*(t[:, :-1].clone() for t in stats))

    with answer.around(input_ids.device):
        hidden = body(**asked.accepted(body, inputs)).last_hidden_state
        hidden = hidden[:, -K - 1 :]
        # A unit of its own is gathered by its own call alone.
        return through(layer, formed, hidden) if gathers(layer) else formed(layer, hidden)


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


def _forms_positions(model: Any, body: torch.nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the model itself knows better than to count the tokens of the attention_mask."""
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return True
    if any(hasattr(body, rule) for rule in ("get_rope_index", "compute_3d_position_ids")):
        return True
    # Only media are floating point, or come in lists: images, sound.
    return any(
        isinstance(value, (list, tuple))
        or (isinstance(value, Tensor) and value.is_floating_point())
        for value in inputs.values()
    )


def _first_of_documents(input_ids: Tensor, inputs: dict[str, Any]) -> Iterator[Tensor]:
    """[B or 1, T - 1] bool each: tokens 1, 2, ... with which a document of a packed row begins."""
    positions = inputs.get("position_ids")
    if positions is not None and positions.dim() == 3 and len(positions) != 4:
        # Within an image the axes of rotary positions may fall; 0 on all of them is a beginning.
        yield positions[:, :, 1:].amax(0) == 0
    elif positions is not None:
        # Of four, the first is that of the text.
        positions = positions[0] if positions.dim() == 3 else positions
        yield positions[..., 1:] <= positions[..., :-1]
    if inputs.get("seq_idx") is not None:
        yield inputs["seq_idx"][..., 1:] != inputs["seq_idx"][..., :-1]
    if inputs.get("cu_seq_lens_q") is not None:
        columns = torch.arange(1, input_ids.shape[1], device=input_ids.device)
        yield torch.isin(columns, inputs["cu_seq_lens_q"])[None]


class _Forward:
    """The forward of a patched model: its own, and log-probs where they are asked for.

    An object and not a method, which pickle would restore as the method of its class.
    """

    def __init__(self, model: "PreTrainedModel", own: Any, ask: bool) -> None:
        self.model = model
        self.fused_rl_own = own
        self.ask = ask

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)

    @property
    def _own(self) -> Any:
        own = self.fused_rl_own
        return type(self.model).forward.__get__(self.model) if own is None else own

    def __call__(self, *args: Any, return_logprobs: bool = False, **inputs: Any) -> Any:
        # accelerate binds what it finds as a method, when it unwraps a model.
        if args and args[0] is self.model:
            args = args[1:]
        if return_logprobs:
            return self._named(*args, **inputs)
        return self._own(*args, **inputs)

    def _named(
        self, input_ids: Tensor | None = None, *, labels: Tensor | None = None, **inputs: Any
    ) -> TokenStats:
        """logprobs, with labels by name: a model's second argument is its attention_mask."""
        inputs.setdefault("ask", self.ask)
        return _logprobs(self.model, input_ids, labels, within=True, **inputs)


def patch_model(model: "PreTrainedModel", *, ask: bool = True) -> "PreTrainedModel":
    """Teach this model's forward `return_logprobs`; the model itself is returned.

    model(input_ids=..., return_logprobs=True, ...) takes the arguments of `logprobs` and returns
    what it returns. Without return_logprobs, in generate for one, the forward is the one from
    before. A model that is patched already stays as it is. A copy is patched too, and what comes
    out of pickle or torch.load, for which fused_rl must be installed.

    Args:
        model: a causal language model of transformers, or the one inside a PeftModel; not a wrapper
            such as DistributedDataParallel, inside which a patched model belongs.
        ask: as for LMHead.from_model.

    Raises:
        ValueError: a wrapper.
    """
    model_inside = parts.unwrap(model)
    if not _is_patched(model_inside):
        own = vars(model_inside).get("forward")
        model_inside.forward = _Forward(model_inside, own, ask)
    return model


def unpatch_model(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model as it was before patch_model, its forward the very object from before.

    Raises:
        ValueError: a model that is not patched, or whose forward someone else replaced since.
    """
    inside = parts.unwrap(model)
    require(_is_patched(inside), lambda: f"this {type(inside).__name__} is not patched")
    own = asked.own_forward(inside)
    if own is None:
        del inside.forward
    else:
        inside.forward = own
    return model


@contextmanager
def patched(model: "PreTrainedModel", *, ask: bool = True) -> Iterator["PreTrainedModel"]:
    """`with patched(model):` patches, and unpatches unless the model was patched before."""
    before = _is_patched(parts.unwrap(model))
    patch_model(model, ask=ask)
    try:
        yield model
    finally:
        if not before:
            unpatch_model(model)


def _is_patched(model: torch.nn.Module) -> bool:
    forward = vars(model).get("forward")
    return isinstance(getattr(forward, "__func__", forward), _Forward)

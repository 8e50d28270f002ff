"""CPO's and ORPO's log-probs from hidden states, where TRL's own take them from [2 B, T, V] logits.

    logps[s] = sum_t log p(labels[s, t])       the completion's; a mean where the loss asks for it
    nll      = -mean log p(likelihood[s, t])   over the chosen: CPO's completions, with their
                                               prompts in ORPO

Both are of one call of linear_logprobs, inside the model's own call, so that what wraps the model
does for these outputs what it does for logits. The labels of the two agree wherever both count.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fused_rl.integrations.trl.logprobs import mean_of_logits
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import linear_logprobs
from fused_rl.models import asked, parts, sharded
from fused_rl.one_pass.through import exact, in_place_of_forward, through
from fused_rl.stats import IGNORE_INDEX

# What concatenated_forward of both takes in TRL 1.16.
NAMES = ("self", "model", "batch")


@dataclass(frozen=True)
class _Kind:
    """What the two trainers do not share.

    likelihood: (trainer, TRL's concatenated batch) -> labels [2 B, T] of the NLL; None: no NLL.
    average: whether the log-prob of a completion is a mean over its tokens.
    padding: the trainer's attribute with the id of padding.
    unscored: the last columns of logits that are no part of the logged mean.
    """

    likelihood: Callable[[Any, dict[str, Tensor]], Tensor | None]
    average: Callable[[Any], bool]
    padding: str
    unscored: int


_CPO = _Kind(
    likelihood=lambda self, given: None if self.cpo_alpha == 0 else given["concatenated_labels"],
    average=lambda self: self.loss_type in ("ipo", "simpo"),
    padding="pad_token_id",
    unscored=0,
)
_ORPO = _Kind(
    likelihood=lambda self, given: given["concatenated_input_ids"].where(
        given["concatenated_attention_mask"] == 1, IGNORE_INDEX
    ),
    average=lambda self: True,
    padding="padding_value",
    unscored=1,
)


def _forward_of(kind: _Kind, owner: type, theirs: Callable) -> Callable:
    """A trainer's concatenated_forward without logits: in their places are [B, T] means over the
    vocabulary, whose mean is that of the logits.

    Theirs stays for encoder-decoders, with the load-balancing loss of experts, in subclasses with
    another get_batch_logps, for labels of completions that are not the tokens of the input, and for
    heads in shards of ZeRO-3 or of tensor parallelism.
    """
    formula = owner.get_batch_logps

    @functools.wraps(theirs)
    def concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple:
        other = type(self).get_batch_logps is not formula
        if other or self.is_encoder_decoder or self.aux_loss_enabled or _is_theirs(model):
            return theirs(self, model, batch)
        given = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=getattr(self, kind.padding),
            device=self.accelerator.device,
        )
        n, labels = len(batch["chosen_labels"]), given["concatenated_labels"]
        likelihood = kind.likelihood(self, given)
        scored = labels if likelihood is None else _both(labels, likelihood, n)
        if scored is None:
            return theirs(self, model, batch)
        logprobs, means = _logprobs(model, given, scored[:, 1:])
        means = means[:, : means.shape[1] - kind.unscored]
        logps = _of_sequences(logprobs, labels[:, 1:], kind.average(self))
        nll = torch.zeros((), device=self.accelerator.device)
        if likelihood is not None:
            counted = likelihood[:n, 1:] != IGNORE_INDEX
            nll = -logprobs[:n].where(counted, 0.0).sum() / counted.sum()
        return logps[:n], logps[n:], means[:n], means[n:], nll

    return concatenated_forward


cpo_of = functools.partial(_forward_of, _CPO)
orpo_of = functools.partial(_forward_of, _ORPO)


def _is_theirs(model: Any) -> bool:
    """Whether the head is in shards that are not gathered here."""
    inner = parts.unwrap(sharded.inside(model))
    layer = parts.output_linear(inner)
    return hasattr(layer.weight, "ds_id") or sharded.is_tensor_parallel(inner, layer)


def _both(labels: Tensor, likelihood: Tensor, n: int) -> Tensor | None:
    """[2 B, T]: the labels, and those that the NLL of the first n rows counts beside them.

    None: at some place the two are different tokens.
    """
    counted = likelihood[:n] != IGNORE_INDEX
    of_chosen = likelihood[:n].where(counted, labels[:n])
    if ((labels[:n] != IGNORE_INDEX) & (labels[:n] != of_chosen)).any():
        return None
    return torch.cat([of_chosen, labels[n:]])


def _of_sequences(logprobs: Tensor, labels: Tensor, average: bool) -> Tensor:
    """[S]: sums, or means, of the log-probs [S, T] that have a label."""
    counted = labels != IGNORE_INDEX
    total = logprobs.where(counted, 0.0).sum(-1)
    return total / counted.sum(-1) if average else total


def _logprobs(model: Any, given: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """([S, T - 1] log-probs of the labels, [S, T] means of logits) of TRL's concatenated batch."""
    answer = asked.answer(model)
    inner = parts.unwrap(sharded.inside(model))
    layer, linear = inner.get_output_embeddings(), parts.output_linear(inner)
    body = parts.backbone(inner)
    # The last state predicts nothing that is there; it is ignored, not cut off by a copy.
    targets, formed = pad(labels, (0, 1), value=IGNORE_INDEX), []

    def of_states(linear: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor]:
        parts.is_gathered(inner, linear)
        head = LMHead.of_layer(answer.recipe, linear)
        # Not a view: FSDP2 hooks its backward pass onto what a forward returns.
        logprobs = linear_logprobs(hidden, head, targets).logprobs[:, :-1].clone()
        formed.extend((logprobs, mean_of_logits(hidden, head)))
        return logprobs, formed[1]

    def forward(**inputs: Any) -> tuple[Tensor, Tensor]:
        inputs = {name: value for name, value in inputs.items() if value is not None}
        with answer.around(linear.weight.device):
            hidden = body(**asked.accepted(body, inputs)).last_hidden_state
            if sharded.gathers(layer):
                return through(layer, of_states, hidden)
            return of_states(linear, hidden)

    names = ("input_ids", "attention_mask")
    with in_place_of_forward(inner, forward):
        outputs = model(**{name: given[f"concatenated_{name}"] for name in names}, use_cache=False)
    return exact(outputs[0], formed[0]), formed[1]

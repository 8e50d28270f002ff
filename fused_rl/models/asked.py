"""A language model is asked, once, what it does to its hidden states; its config is a hint.

    1  the model's own forward on a few tokens                               -> its logits
    2  again, with wide numbers where its output layer's product would be    -> scale, softcap, ...
    3  its backbone alone, and the product of its output layer               -> our logits

Where the weights are in shards, only the model's own forward gathers them: in the third place are
then the hidden states and the product that it had in the first.

Our logits must be the model's. The second pass shows what the logits of a fresh model are too small
to show: a softcap bends numbers of 30000. Parameters that are read between the hidden states and
the logits are noted, because a norm or a bias may be there that changes nothing yet.

Afterwards nothing of the model is different: training flags, attributes, buffers, the generators of
random numbers. No gradient is formed, and compiled parts run eagerly.
"""

from __future__ import annotations

import ctypes
import inspect
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.functional import linear

from fused_rl.models import adapters, parts, recipes, sharded
from fused_rl.models.placed import is_placed, whole
from fused_rl.models.recipes import Recipe
from fused_rl.models.watched import Reads, Seen, at_least_float, undisturbed, watched

_SHAPE = (2, 5)  # of the tokens: few, and more than one of everything


@dataclass(frozen=True)
class Answer:
    """What a model does to its hidden states, and the autocast that its own forward turns on."""

    recipe: Recipe
    autocast: torch.dtype | None = None

    def around(self, device: torch.device) -> AbstractContextManager:
        """The context in which the model's own forward runs its backbone."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


_asking = threading.RLock()
_answers: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Answer]] = weakref.WeakKeyDictionary()


def answer(model: Any, *, ask: bool = True, within: bool = False) -> Answer:
    """What the model says, from memory unless something that it depends on has changed.

    Args:
        model: as models.unwrap takes it; or in an engine's wrapper, whose forward is then the one
            that runs. Where weights are sharded, every rank asks.
        ask: False believes the config's names.
        within: whether this is called inside the model's own forward, around which its hooks are.

    Raises:
        ValueError: as models.unwrap and models.output_linear; a model whose logits no scale,
            softcap, cut or mask of its output layer's product gives, or that cannot be asked.
    """
    inner, model = parts.unwrap(sharded.inside(model)), sharded.runs(model)
    parts.output_linear(inner)
    if not ask:
        return Answer(parts.described(inner))
    if torch.compiler.is_compiling():
        # The number makes the compiled code that of this model alone.
        *recipe, autocast = _remembered_constant(id(model), within)
        return Answer(Recipe(*recipe), autocast)
    return _remembered(model, within)


def _remembered(model: Any, within: bool) -> Answer:
    inner = parts.unwrap(sharded.inside(model))
    layer = parts.output_linear(inner)
    if layer.weight.is_meta or isinstance(layer.weight, FakeTensor):
        return Answer(parts.described(inner))
    state = _depends_on(inner, layer)
    known = _answers.get(model)
    if known is not None and known[0] == state:
        return known[1]
    with _asking:
        # Hooks of another thread's question would be a change.
        state = _depends_on(inner, layer)
        known = _answers.get(model)
        if known is None or known[0] != state:
            known = (state, _ask(model, inner, layer, within))
            _answers[model] = known
    return known[1]


def _remembered_constant(identity: int, within: bool) -> tuple:
    """The numbers of _remembered, called while a graph is traced, and constants in it.

    identity: the id of a model that the caller holds; torch 2.11 takes no module for a constant.
    """
    known = _remembered(ctypes.cast(identity, ctypes.py_object).value, within)
    return *astuple(known.recipe), known.autocast


# What torch.compiler.assume_constant_result sets; to call it would import triton.
_remembered_constant._dynamo_marked_constant = True


def _depends_on(inner: Any, layer: nn.Linear) -> tuple:
    """What an answer depends on: quickly made, quickly compared, and no reference to the model."""
    config = inner.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    modules = {layer: None, adapters.base_of(layer): None, inner: None}
    forwards = (vars(layer).get("forward"), own_forward(inner), type(inner).forward)
    return (
        weakref.ref(layer),
        *(_size(layer), layer.bias is None, *adapters.state_of(layer)),
        *(tuple(m._forward_hooks) for m in modules),
        *(tuple(m._forward_pre_hooks) for m in modules),
        *(id(forward) for forward in forwards),
        *(_numbers(thing) for thing in (config, text, inner)),
    )


def _size(layer: nn.Linear) -> tuple[int, int]:
    """[V, H], of a weight that is in shards too."""
    if sharded.is_here(layer.weight):
        return tuple(layer.weight.shape)
    return layer.out_features, layer.in_features


def _numbers(thing: object) -> tuple:
    return tuple(item for item in vars(thing).items() if type(item[1]) in (int, float))


def own_forward(inner: Any) -> Any:
    """The forward that the instance has in place of its class's, beneath a patch of ours."""
    forward = vars(inner).get("forward")
    function = getattr(forward, "__func__", forward)
    return getattr(function, "fused_rl_own", forward)


def accepted(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those inputs that the module's forward has a name for, or all where it takes any."""
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def _ask(model: Any, inner: Any, layer: nn.Linear, within: bool) -> Answer:
    name, device = type(inner).__name__, layer.weight.device
    # Beside the model's own forward its backbone has weights only where nobody shards them.
    weights = layer.weight, _embeddings(inner, layer)
    alone = sharded.is_tensor_parallel(inner, layer) or all(map(sharded.is_here, weights))
    body, hint = parts.backbone(inner), parts.described(inner)
    inputs = {"input_ids": _tokens(inner, layer), "use_cache": False, "return_dict": True}
    reads = Reads(model, layer)

    def own(put: Tensor | None = None) -> Seen:
        run = model.forward if within or sharded.in_forward(model) else model._call_impl
        with reads, watched(layer, body, reads, put) as seen:
            output = run(**accepted(inner, inputs))
        seen.logits = whole(output.logits if hasattr(output, "logits") else output[0])
        return seen

    try:
        with undisturbed(model, device):
            plain = own()
            wide = own(recipes.wide_numbers(plain.product)) if plain.calls == 1 else None
            with Answer(hint, plain.autocast).around(device):
                hidden = whole(plain.hidden)
                if alone:
                    hidden = whole(body(**accepted(body, inputs)).last_hidden_state)
                recipe, proved = _recipe(layer, wide, hidden, hint)
                y = plain.product
                if alone:
                    y = (recipe.before * hidden).to(layer.weight.dtype)
                    added = [adapter.product(y) for adapter in adapters.adapters_of(layer)]
                    y = sum(added, product(y, layer.weight, adapters.bias_of(layer)))
            gap, allowed = recipes.difference(recipe.logits(at_least_float(y)), plain.logits)
    except Exception as error:
        raise ValueError(
            f"{name} was asked for the logits of a few tokens, and raised "
            f"{type(error).__name__}: {error}. ask=False believes its config instead"
        ) from error
    if reads.found or not proved or gap > allowed:
        raise ValueError(
            f"the logits of {parts.name_of(inner)} are not those of its output embeddings and its "
            f"config, {recipe}: log-probabilities of a few tokens differ by up to {gap:.3g} nats"
            + ("" if proved else ", and more where the product of its output embeddings is large")
            + (f"; it also reads {', '.join(sorted(reads.found))}" if reads.found else "")
            + ". Use its own logits with logprobs_from_logits; or ask=False, if it is the model "
            "that is wrong"
        )
    return Answer(recipe, plain.autocast)


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias; of a tensor-parallel weight the columns of all ranks."""
    if not is_placed(weight):
        return linear(hidden, weight, bias)
    from torch.distributed.tensor import DTensor, Replicate

    of_all = DTensor.from_local(hidden, weight.device_mesh, [Replicate()])
    return linear(of_all, weight, bias).full_tensor()


def _recipe(
    layer: nn.Linear, wide: Seen | None, hidden: Tensor, hint: Recipe
) -> tuple[Recipe, bool]:
    """The recipe that the wide numbers show, or the hint; and whether they prove it."""
    if wide is None:
        return hint, True
    before = recipes.factor(hidden if wide.hidden is None else whole(wide.hidden), wide.into)
    shown = recipes.found(wide.product, wide.logits)
    if before is None or shown is None:
        return hint, False
    exact = torch.finfo(wide.into.dtype).eps < 1e-5
    shown = recipes.like(
        replace(shown, before=before), hint, _size(layer)[0], 1e-5 if exact else 1e-2
    )
    # What a hook does need not be what it does tomorrow: with one there, only the config's recipe.
    if sharded.has_hooks(layer) and shown != hint:
        return hint, False
    return shown, recipes.agrees(shown, wide.product, wide.logits)


def _embeddings(inner: Any, layer: nn.Linear) -> Tensor:
    """The input embeddings' weight; the output layer's where they have none."""
    return getattr(inner.get_input_embeddings(), "weight", layer.weight)


def _tokens(inner: Any, layer: nn.Linear) -> Tensor:
    """Some ids from within the vocabulary, none of them special."""
    embeddings, V = inner.get_input_embeddings(), _size(layer)[0]
    if sharded.is_here(_embeddings(inner, layer)):
        known = [_embeddings(inner, layer).shape[0], V]
    else:
        known = [getattr(embeddings, "num_embeddings", V), V]
    size, special = min(known), _special(inner.config)
    ids = [i for i in (*range(size // 3, size), *range(size // 3)) if i not in special]
    wanted = _SHAPE[0] * _SHAPE[1]
    ids = (ids or [0]) * wanted
    return torch.tensor(ids[:wanted], device=layer.weight.device).reshape(_SHAPE)


def _special(config: Any) -> set[int]:
    """Every number in a config, and in the configs inside it, that may be the id of a token."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found |= _special(value)
        elif "token" in name or name.endswith(("_id", "_ids", "_index")):
            values = value if isinstance(value, (list, tuple)) else [value]
            found |= {v for v in values if type(v) is int}
    return found

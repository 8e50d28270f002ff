"""Users' mistakes: whatever a public name is given in place of a number, a tensor or a choice, the
answer is a ValueError that names the option. The signatures say what there is to get wrong."""

import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from types import NoneType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from by_name import public
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_rl
from fused_rl import LMHead, TokenBatch
from fused_rl.diagnosis import Thresholds
from fused_rl.integrations.layers import LinearLogProbs
from fused_rl.losses import named
from fused_rl.preference import PreferenceBatch

B, T, H, V = 2, 2, 3, 5
LABELS = torch.tensor([[0, 1], [2, 3]])
MASK = torch.ones(B, T, dtype=torch.bool)
LOGPROBS = torch.full((B, T), -1.0)
BATCH = TokenBatch.padded(
    LABELS, MASK, torch.ones(B), old_logprobs=LOGPROBS, rollout_logprobs=LOGPROBS
)
PAIR = PreferenceBatch.padded(LABELS, MASK)


class Model(torch.nn.Module):
    """What is asked of a language model: an embedding and a head."""

    config = SimpleNamespace(model_type="none")

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Backbone()
        self.head = torch.nn.Linear(H, V)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        hidden = self.base_model(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.base_model.embeddings

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


class Backbone(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(V, H)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embeddings(input_ids))


# What is right, by the name of the parameter; a callable's own where the same name means another
# thing.
RIGHT: dict[str, Any] = {
    "hidden": torch.ones(B, T, H),
    "head": LMHead(torch.ones(V, H)),
    "model": Model(),
    "teacher_hidden": torch.ones(B, T, H + 1),
    "teacher_head": LMHead(torch.ones(V, H + 1)),
    "weight": torch.ones(V, H),
    "labels": LABELS,
    "logits": torch.ones(B, T, V),
    "ids": torch.stack([LABELS, LABELS + 1], -1),
    "kept": torch.arange(V).repeat(B * T),
    "cu_kept": torch.arange(B * T + 1) * V,
    "masks": [[[0], [1]], [[2], [3]]],
    "generated": MASK,
    "batch": BATCH,
    "loss": fused_rl.grpo(),
    "logprobs": LOGPROBS,
    "ref_logprobs": LOGPROBS,
    "rollout_logprobs": LOGPROBS,
    "teacher_logprobs": LOGPROBS,
    "entropy": -LOGPROBS,
    "loss_mask": MASK,
    "advantages": torch.ones(B),
    "values": LOGPROBS,
    "old_values": LOGPROBS,
    "returns": LOGPROBS,
    "rewards": torch.tensor([1.0, 0.0]),
    "lengths": torch.tensor([3.0, 4.0]),
    "correct": torch.tensor([True, False]),
    "group_size": 2,
    "k": 2,
    "beta": 0.1,
    "target": 0.1,
    "start": 0.1,
    "end": 0.2,
    "steps": 3,
    "tau": 0.5,
    "length": 4,
    "rollout_tokens": torch.tensor([2, 2]),
    "num_rollouts": 2,
    "delta": 0.1,
    "max_length": 4,
    "cache": 2,
    "history": [],
    "rows": torch.tensor([0]),
    "keep": MASK,
    "log_ratio": torch.zeros(B * T),
    "level": fused_rl.Level.PRODUCT,
    "n": 1,
    "kind": 1,
    "logprobs_at": torch.full((B, T, 2), -1.0),
    "score": fused_rl.scores.LogProb(),
    "link": fused_rl.links.Logistic(),
    "alpha": 0.5,
    "derivative": fused_rl.scores.ForwardKL(),
    "parts": ((1.0, fused_rl.preference.dpo()),),
}
OWN: dict[str, dict[str, Any]] = {
    "topk_divergence": {"teacher_logprobs": torch.full((B, T, 2), -1.0)},
    "fit_reward_curve": {"kl": [1.0, 2.0, 3.0, 4.0], "gold_rewards": [1.0, 2.0, 2.0, 1.0]},
    "merged": {"parts": [fused_rl.rewards.Moments.of(LOGPROBS)]},
    "discounted_returns": {"rewards": LOGPROBS},
    "gae": {"rewards": LOGPROBS},
    "reinforce_plus_plus_advantages": {"rewards": LOGPROBS},
    "packed": {"labels": LABELS[0], "cu_seqlens": torch.tensor([0, 1, 2])},
    "with_weights": {"weights": LOGPROBS},
    "sequence_sum": {"values": LOGPROBS.reshape(-1)},
    "update": {"kl": 0.1},
    "linear_preference_loss": {"batch": PAIR, "loss": fused_rl.preference.cpo()},
    "packed answers": {"labels": LABELS[0], "cu_seqlens": torch.tensor([0, 1, 2])},
}
# Where infinity means that there is no bound, and where less than 0 means something.
UNBOUNDED = {
    "low",
    "high",
    "clip_low",
    "clip_high",
    "ratio_min",
    "ratio_max",
    "cov_low",
    "cov_high",
}
UNBOUNDED |= {"clip", "clamp_min", "highest", "lowest", "kl_peak", "kl update"}
UNBOUNDED |= {"delta off_policy_sequence_mask"} | {f"{n} Thresholds" for n in vars(Thresholds())}
SIGNED = {"ignore_index", "scale", "entropy_coef", "cov_low", "cov_high", "ratio_min", "clamp_min"}
SIGNED |= {
    "seed",
    "parameter",
    "baseline",
    "length_correlation",
    *("alpha Alpha", "alpha AlphaMeanLogProb", "alpha alphapo", "gamma simpo", "gamma alphapo"),
    *("margin", "point", "shift", "target Regression", "target Squared"),
    "delta off_policy_sequence_mask",
    "kl update",
}

# A head that is a tensor is called a weight.
ALSO = {"head": "(head|weight)", "teacher_head": "teacher_(head|weight)"}


def callables() -> dict[str, Callable]:
    """Everything that a user calls, by its last name."""
    outputs = (Enum, tuple)
    things = public()
    del things["TokenBatch"], things["PreferenceBatch"]
    methods = {
        "packed": TokenBatch.packed,
        "packed answers": PreferenceBatch.packed,
        "padded answers": PreferenceBatch.padded,
        "with_reference": PAIR.with_reference,
        "padded": TokenBatch.padded,
        "with_weights": BATCH.with_weights,
        "with_mask": BATCH.with_mask,
        "with_kept": BATCH.with_kept,
        "at_level": BATCH.at_level,
        "of": fused_rl.rewards.Moments.of,
        "merged": fused_rl.rewards.Moments.merged,
        "update": fused_rl.schedules.AdaptiveBeta(0.1, 0.1).update,
    }
    kept = {n: t for n, t in things.items() if not (inspect.isclass(t) and issubclass(t, outputs))}
    return kept | methods


class Option(NamedTuple):
    callable: str
    name: str
    kinds: frozenset[type]  # what its annotation admits

    def __str__(self) -> str:
        return f"{self.callable}({self.name})"


def options() -> Iterator[Option]:
    for name, thing in callables().items():
        owner = thing.__init__ if inspect.isclass(thing) else thing
        hints = typing.get_type_hints(owner) if not inspect.isbuiltin(owner) else {}
        for parameter in inspect.signature(thing).parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                terms = typing.get_type_hints(named.Terms)
                yield from (Option(name, term, _kinds(of)) for term, of in terms.items())
            else:
                yield Option(name, parameter.name, _kinds(hints[parameter.name]))


def _kinds(hint: Any) -> frozenset[type]:
    parts = typing.get_args(hint) if isinstance(hint, typing.types.UnionType) else (hint,)
    parts = typing.get_args(hint) if typing.get_origin(hint) is typing.Union else parts
    return frozenset(typing.get_origin(part) or part for part in parts)


def given(name: str, thing: Callable) -> dict[str, Any]:
    """Right arguments for all parameters that have no default."""
    needed = [
        parameter.name
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    return {option: OWN.get(name, {}).get(option, RIGHT.get(option)) for option in needed}


def wrong(option: Option) -> Iterator[Any]:
    """What is none of the option's kinds."""
    name, kinds = option.name, option.kinds
    own = f"{name} {option.callable}"
    yield "text"
    if NoneType not in kinds:
        yield None
    if kinds & {int, float}:
        yield from ("0.1", True, float("nan"), [1.0], {}, 1j, torch.ones(7))
        if Tensor not in kinds and option.callable != "update":
            yield torch.ones(())
        if not {name, own} & SIGNED:
            yield -1
        if not {name, own} & UNBOUNDED:
            yield float("inf")
        if float not in kinds:
            yield from (1.5, 2**80)
    elif Tensor in kinds:
        dense = torch.ones(B, T)
        yield from (3.0, [1.0], dense.to_sparse(), dense.to_sparse_csr(), dense.to_mkldnn())
        yield torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
        if LMHead not in kinds:
            yield torch.ones(B, T, dtype=torch.complex64)
    elif bool not in kinds:
        yield 3


CASES = [
    option for option in options() if not option.kinds & {str, bool} and option.name != "history"
]


@pytest.mark.parametrize("name", callables())
def test_the_right_arguments_are_right(name):
    """Else the errors below would prove nothing."""
    thing = callables()[name]
    assert thing(**given(name, thing)) is not None


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("option", CASES, ids=str)
def test_a_wrong_value_is_a_value_error_that_names_the_option(option):
    thing = callables()[option.callable]
    arguments = given(option.callable, thing)
    for value in wrong(option):
        with pytest.raises(ValueError, match=rf"\b{ALSO.get(option.name, option.name)}\b"):
            pytest.fail(f"{value!r} gave {thing(**{**arguments, option.name: value})}")


MISTAKES = {
    "a beta where the count goes": (
        lambda: fused_rl.grpo(num_sequences=0.04),
        "num_sequences must be 0, or 1 or more, got 0.04: it is the count of the whole step; a "
        "weight of the KL goes by its name, beta=0.04",
    ),
    "a beta where the length goes": (
        lambda: fused_rl.dr_grpo(0.04),
        "length must be at least 1, got 0.04",
    ),
    "a length of 0": (lambda: fused_rl.dr_grpo(0), "length must be at least 1, got 0"),
    "bounds on the wrong side": (
        lambda: fused_rl.surrogates.Clip(low=-0.2, high=-0.5),
        "low (clip_low) must be at least 0, got -0.2",
    ),
    "a loss that was not called": (
        lambda: fused_rl.linear_policy_loss(RIGHT["hidden"], RIGHT["head"], BATCH, fused_rl.grpo),
        "loss must be a loss, got the function that makes one: give grpo(...)",
    ),
    "a batch of another kind": (
        lambda: fused_rl.linear_policy_loss(RIGHT["hidden"], RIGHT["head"], {}, fused_rl.grpo()),
        "batch must be a TokenBatch (TokenBatch.padded, TokenBatch.packed), got {}",
    ),
    "a class where its object goes": (
        lambda: fused_rl.PolicyLoss(surrogate=fused_rl.surrogates.Clip),
        "surrogate must be a function or an object like Clip(), got <class "
        "'fused_rl.losses.surrogates.Clip'>",
    ),
    "a weight of the KL for the KL": (
        lambda: fused_rl.PolicyLoss(kl=0.1),
        "kl must be a function or an object like KLPenalty(0.1), got 0.1",
    ),
    "a name for an estimator": (
        lambda: fused_rl.grpo(kl="k3"),
        "kl (value) must be a KL (KL.K1, KL.K2, KL.K3, KL.ABS), got 'k3'",
    ),
    "a name for a level": (
        lambda: fused_rl.mismatch.truncated_weights(BATCH, level="sequence"),
        "level must be a Level (Level.TOKEN, Level.PRODUCT, Level.GEOMETRIC), got 'sequence'",
    ),
    "groups of several sizes": (
        lambda: fused_rl.advantages.group_mean_advantages(torch.ones(5), torch.tensor([2, 3])),
        "group_size must be a 64-bit integer, or [B] integers that say which group each of rewards "
        "[5] is of, got a tensor [2] of torch.int64",
    ),
    "bytes in floating point": (
        lambda: fused_rl.linear_policy_loss(
            RIGHT["hidden"], RIGHT["head"], BATCH, fused_rl.grpo(), chunk_bytes=1e6
        ),
        "chunk_bytes must be a 64-bit integer, got 1000000.0",
    ),
    "a sparse head": (
        lambda: LMHead(torch.ones(V, H).to_sparse()),
        "weight must be strided, got torch.sparse_coo: give to_dense() of it",
    ),
    "labels for temperatures": (
        lambda: fused_rl.linear_logprobs(
            RIGHT["hidden"], RIGHT["head"], LABELS, temperature=LABELS
        ),
        "temperature must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "a mask for labels": (
        lambda: fused_rl.linear_logprobs(RIGHT["hidden"], RIGHT["head"], MASK),
        "labels must be an int64 or int32 tensor, got torch.bool",
    ),
    "a layer of another kind": (
        lambda: fused_rl.linear_logprobs(RIGHT["hidden"], torch.nn.Bilinear(2, 3, 4), LABELS),
        "head must be an LMHead, a weight [V, H] or a torch.nn.Linear, got "
        "torch.nn.modules.linear.Bilinear",
    ),
    "a list for the layer's states": (
        lambda: LinearLogProbs.forward(torch.nn.Linear(H, V), [1.0], LABELS),
        "hidden must be a torch.Tensor, got list",
    ),
    "packed without values": (
        lambda: TokenBatch.packed(
            LABELS[0].to("meta"), torch.tensor([0, 2]).to("meta"), torch.ones(1, device="meta")
        ),
        "packed sequences need the values of cu_seqlens, and a meta tensor has none: pad",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_says_what_to_do(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_linear_layer_is_a_head():
    layer, hidden = torch.nn.Linear(H, V), torch.randn(B, T, H)
    expected = fused_rl.linear_logprobs(hidden, LMHead(layer.weight, layer.bias), LABELS).logprobs
    logprobs = fused_rl.linear_logprobs(hidden, layer, LABELS).logprobs
    assert torch.equal(logprobs, expected)
    logprobs.sum().backward()
    assert layer.weight.grad.norm() > 0 and layer.bias.grad.norm() > 0


def doubled(module: torch.nn.Linear, hook: str) -> torch.nn.Linear:
    """A layer whose output is not that of its weight."""
    if hook == "forward":
        module.forward = lambda x: 2 * torch.nn.Linear.forward(module, x)
    elif hook == "pre-hook":
        module.register_forward_pre_hook(lambda _, args: tuple(2 * x for x in args))
    else:
        module.register_forward_hook(lambda _, args, output: 2 * output)
    return module


@pytest.mark.parametrize("hook", ["hook", "pre-hook", "forward"])
def test_a_linear_layer_with_hooks_is_none(hook):
    layer = doubled(torch.nn.Linear(H, V), hook)
    with pytest.raises(ValueError, match="forward hooks or a forward of its own"):
        fused_rl.linear_logprobs(torch.ones(B, T, H), layer, LABELS)


def test_numbers_of_numpy_are_numbers():
    loss = fused_rl.grpo(num_sequences=np.int64(4), clip_low=np.float32(0.25), beta=np.float64(0.5))
    assert (loss.mean.num_sequences, loss.surrogate.low, loss.kl.beta) == (4, 0.25, 0.5)
    stats = fused_rl.linear_logprobs(
        *(RIGHT["hidden"], RIGHT["head"], LABELS),
        temperature=np.float32(2),
        chunk_bytes=np.int64(8),
    )
    torch.testing.assert_close(stats.logprobs, torch.full((B, T), -math.log(V)))


@pytest.mark.parametrize("name", named.NAMES)
def test_a_loss_can_be_made_where_torch_compile_traces(name):
    """Checks of numbers are not what ends a graph."""
    needed = given(name, named.NAMES[name])
    torch._dynamo.reset()

    def made(x: Tensor, low: float) -> Tensor:
        loss = named.NAMES[name](**needed, beta=low)
        return x + loss.kl.beta

    compiled = torch.compile(made, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(()), 0.25) == 0.25


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "FakeTensorMode"])
@pytest.mark.parametrize("name", ["linear_logprobs", "linear_top_logprobs", "linear_kept_logprobs"])
def test_without_values_there_are_shapes(name, fake):
    with FakeTensorMode() if fake else torch.device("meta"):
        hidden, weight = torch.ones(B, T, H, requires_grad=True), torch.ones(V, H)
        weight.requires_grad_()
        labels = torch.zeros(B, T, dtype=torch.int64)
        sets = (torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))
        more = sets if "kept" in name else ()
        stats = getattr(fused_rl, name)(hidden, weight, labels, *more)
        assert {(s.shape, s.device.type) for s in stats} == {(labels.shape, labels.device.type)}
        gradients = torch.autograd.grad(stats[0].sum(), (hidden, weight))
        assert [g.shape for g in gradients] == [hidden.shape, weight.shape]
        alone = torch.autograd.grad(
            fused_rl.logprobs_from_logits(hidden, labels).logprobs.sum(), hidden
        )
        assert alone[0].shape == hidden.shape


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "FakeTensorMode"])
def test_a_policy_loss_without_values(fake):
    with FakeTensorMode() if fake else torch.device("meta"):
        hidden, weight = torch.ones(B, T, H, requires_grad=True), torch.ones(V, H)
        advantages = fused_rl.advantages.group_zscore_advantages(torch.ones(B), 2)
        labels, mask = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T, dtype=torch.bool)
        batch = TokenBatch.padded(labels, mask, advantages, ref_logprobs=torch.zeros(B, T))
        for loss in (fused_rl.grpo(beta=0.1), fused_rl.gspo()):
            output = fused_rl.linear_policy_loss(hidden, weight, batch, loss)
            (gradient,) = torch.autograd.grad(output.loss, hidden)
            assert gradient.shape == hidden.shape and gradient.device == hidden.device

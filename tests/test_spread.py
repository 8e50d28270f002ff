"""Heads whose vocabulary is spread over ranks, against the whole head on one rank."""

import pytest
import torch
from cases_spread import Problem, cut

from fused_rl import linear_logprobs, ops
from fused_rl.parallel import merge, spread
from fused_rl.parallel.states import Hidden

FLOAT64, FLOAT32 = 1e-12, 3e-6
WORLDS = pytest.mark.parametrize("world", [2, 4])
HIDDEN = ["REPLICATED", "SEQUENCE_SHARDED", "PARTIAL"]
# A case costs a tenth of a second: what differs in code has one, not every combination.
ANY_LOSS = [
    {},
    {"uneven": True},
    {"V": 9, "uneven": True},
    {"softcap": 3.0, "bias": False},
    {"trained": False},
    {"trained": False, "with_entropy": False},
    {"trained": False, "uneven": True, "softcap": 3.0},
]
KNOWN_LOSS = [
    {},
    {"uneven": True, "softcap": 3.0},
    {"trained": False, "chunk": 97 * 8 * 7},
    {"loss": "dapo", "V": 1003},
    {"loss": "function"},
]


def named(options):
    return ", ".join(f"{k} {v}" for k, v in options.items()) or "plain"


def largest(found):
    """Of all ranks: the largest difference of values, and of gradients."""
    return [max(column) for column in zip(*found, strict=True)]


@WORLDS
@pytest.mark.parametrize("options", ANY_LOSS, ids=named)
def test_two_passes(ranks, world, options):
    values, gradients = largest(ranks(world).run("cases_spread", "two_passes", **options))
    assert values <= FLOAT64 and gradients <= FLOAT64


@WORLDS
@pytest.mark.parametrize("options", KNOWN_LOSS, ids=named)
def test_policy_losses(ranks, world, options):
    values, gradients = largest(ranks(world).run("cases_spread", "policy_loss", **options))
    assert values <= FLOAT64 and gradients <= FLOAT64


@WORLDS
@pytest.mark.parametrize("loss", ["grpo", "function"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_states_as_they_lie(ranks, world, hidden, loss):
    options = {"hidden": hidden, "loss": loss, "chunk": 97 * 8 * 20}
    values, gradients = largest(ranks(world).run("cases_spread", "policy_loss", **options))
    assert values <= FLOAT64 and gradients <= FLOAT64


@WORLDS
@pytest.mark.parametrize(
    "options", [{}, {"only_kept": True, "uneven": True}, {"softcap": 3.0, "bias": False}], ids=named
)
def test_kept_sets(ranks, world, options):
    """Sets that lie on several ranks, on one, or on none but the label's."""
    values, gradients = largest(ranks(world).run("cases_spread", "kept_sets", **options))
    assert values <= FLOAT64 and gradients <= FLOAT64


@WORLDS
@pytest.mark.parametrize(
    "options",
    [
        *({"loss": loss, "trained": t} for loss in ("grpo", "entropy") for t in (True, False)),
        {"loss": "function", "uneven": True, "softcap": 3.0},
        *({"loss": "entropy", "hidden": hidden} for hidden in HIDDEN),
    ],
    ids=named,
)
def test_policy_losses_of_kept_sets(ranks, world, options):
    values, gradients = largest(
        ranks(world).run("cases_spread", "policy_loss", kept=True, **options)
    )
    assert values <= FLOAT64 and gradients <= FLOAT64


@pytest.mark.parametrize("case", ["two_passes", "policy_loss"])
def test_float32(ranks, case):
    values, gradients = largest(ranks(4).run("cases_spread", case, dtype="float32", V=1003))
    assert values <= FLOAT32 and gradients <= FLOAT32


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits(ranks, world, dtype):
    """The same on all ranks, run to run, and for a token alone, in a batch and elsewhere in it."""
    assert ranks(world).run("cases_spread_bits", "bits", dtype=dtype) == [(True,) * 4] * world


@WORLDS
def test_the_most_likely_token_is_known(ranks, world):
    assert ranks(world).run("cases_spread_bits", "most_likely") == [(True, True)] * world


@WORLDS
def test_extremes(ranks, world):
    """A NaN poisons its row alone; a part at -inf has no mass; logits may be of 1e30."""
    for poisoned, *differences in ranks(world).run("cases_spread_bits", "extremes"):
        assert poisoned == [5] and max(differences) <= FLOAT64


def test_a_wrong_label_is_an_error_on_every_rank(ranks):
    said = ranks(4).run("cases_spread_bits", "labels_are_checked_on_every_rank")
    assert (
        said == ["labels[3] is 97, outside the vocabulary [0, 97) and not ignore_index (-100)"] * 4
    )


def test_a_batch_without_counted_tokens(ranks):
    assert ranks(4).run("cases_spread_bits", "masked_altogether") == [0.0] * 4


@pytest.mark.parametrize(
    ("hidden", "of_dhidden", "of_hidden"), [("REPLICATED", 6, 0), ("SEQUENCE_SHARDED", 4, 2)]
)
def test_traffic(ranks, hidden, of_dhidden, of_hidden):
    """Bytes that a rank receives: 32 from each per token, 4 + 2 per number of dhidden."""
    for world in (2, 4):
        found = ranks(world).run("cases_spread_bits", "traffic", hidden=hidden)
        assert found == [(32 * world, of_dhidden, of_hidden)] * world


def test_the_sum_of_a_chunk_travels_while_the_next_is_formed(ranks):
    turns = ["formed", "sent", "formed", "sent", "summed", "formed", "sent", "summed", "summed"]
    assert ranks(2).run("cases_spread_bits", "order") == [turns] * 2


SAID = {
    "linear_divergence": "linear_divergence needs the whole vocabulary on one rank, and this "
    "head's is spread over 2",
    "a reference": "linear_policy_loss with a reference needs the whole vocabulary on one rank",
    "linear_logprobs_at": "needs the whole vocabulary on one rank",
    "linear_statistics": "linear_statistics needs the whole vocabulary on one rank",
    "logits": "logits needs the whole vocabulary on one rank",
    "grad_filter": "grad_filter is for heads on one rank, got 0.001 and a group",
    "torch.func": "has no torch.func transforms",
    "create_graph": "linear_logprobs has no second derivative",
    "start alone": "start is 3, and vocabulary must be given beside it",
    "start without a group": "start and vocabulary need a group, whose ranks share the rows",
    "hidden without a group": "hidden need a group, whose ranks share the rows",
    "a mesh": "group must be a torch.distributed.ProcessGroup (of a mesh: its get_group())",
    "labels of a part": "hidden must be [*labels.shape, D], got hidden [12, 16] and labels [24]",
    "a DTensor for a head that is here": "hidden is a DTensor ((Replicate(),))",
}


def test_what_a_spread_head_is_not_for_is_said_on_every_rank(ranks):
    first, second = ranks(2).run("cases_spread_bits", "refusals")
    assert first == second and first.keys() == SAID.keys()
    for name, expected in SAID.items():
        assert expected in first[name]


@pytest.mark.parametrize("options", [{}, {"compile_it": True}], ids=named)
def test_an_ignore_index_that_is_an_entry(ranks, options):
    found = ranks(2).run("cases_spread_bits", "ignored_as_zero", 90, **options)
    values, gradients = largest(found)
    assert values <= FLOAT64 and gradients <= FLOAT64


@pytest.mark.parametrize("options", [{}, {"trained": False}], ids=named)
def test_torch_compile(ranks, options):
    found = ranks(2).run("cases_spread_bits", "compiled", 90, **options)
    values, gradients = largest(found)
    assert values <= FLOAT64 and gradients <= FLOAT64


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["SEQUENCE_SHARDED", "PARTIAL"])
def test_torch_compile_by_inductor(ranks, hidden):
    options = {"backend": "inductor", "hidden": hidden}
    values, _ = largest(ranks(2).run("cases_spread_bits", "compiled", 300, **options))
    assert values <= FLOAT64


def errors(dtype, world):
    """Of dhidden of one rank and of `world`, whose summands are added up here, in order."""
    problem = Problem.drawn(N=64, H=64, V=4096, dtype=dtype, bias=False)
    problem.weight *= 2
    problem.labels = problem.labels.where(problem.labels >= 0, 0)
    a, b = torch.linspace(-1, 1, 64), torch.linspace(1, 0, 64) / 8
    of_one = problem.hidden.clone().requires_grad_()
    exact = problem.hidden.double().requires_grad_()
    for leaf, weight in ((of_one, problem.weight), (exact, problem.weight.double())):
        stats = linear_logprobs(leaf, weight.clone().requires_grad_(), problem.labels)
        (a * stats.logprobs + b * stats.entropy).sum().backward()
    ones = torch.ones(64)
    heads, parts = [], []
    for rank in range(world):
        rows = cut(4096, rank, world)
        how = spread.Spread(None, rows.start, 4096, Hidden.REPLICATED)
        head = ops.Head(problem.hidden, problem.weight[rows], None, problem.labels, ones, 1.0, 0.0)
        part = spread.formed(head, how)
        parts.append(merge.of_part(part.stats, how.owns(head.labels, len(head.weight))))
        heads.append((part.z, head, how))
    stats = merge.merged(torch.stack(parts), ones.bool(), torch.float32)
    known, none = ops.Known(stats.lse, stats.entropy), torch.empty(0)
    total = torch.zeros(64, 64)
    for z, head, how in heads:
        sums = ops.Sums(none, none.clone(), False)
        total += spread.backward(z, ops.Upstream(a, b), head, known, sums, how)
    size = exact.grad.norm()
    return [
        ((g.double() - exact.grad).norm() / size).item() for g in (of_one.grad, total.to(dtype))
    ]


@pytest.mark.parametrize("world", [2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_ranks_err_no_more_than_one(world, dtype):
    """Summands are rounded once, after their sum."""
    of_one, of_many = errors(dtype, world)
    assert of_many <= 1.05 * of_one


@pytest.mark.slow
def test_the_work_is_divided(ranks):
    """CPU seconds of a rank. What grows with the vocabulary is divided; the loss is not, and the
    collectives come on top: 4 ms each of 124 at this size. Four ranks on two cores share caches.
    """

    def seconds(world, V):
        return sum(ranks(world).run("cases_spread_bits", "cpu_seconds", 120, V=V)) / world

    whole = {n: seconds(n, 32768) for n in (1, 2, 4)}
    divided = {n: whole[n] - seconds(n, 64) for n in whole}
    assert divided[1] >= 1.8 * divided[2] and divided[1] >= 3.2 * divided[4]
    assert whole[1] >= 1.7 * whole[2] and whole[1] >= 2.6 * whole[4]

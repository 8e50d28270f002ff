"""Cases of counts: a step whose sequences, or parts of them, are spread over ranks."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from by_name import loss_of

import fused_rl
from fused_rl import LMHead, TokenBatch, across, linear_policy_loss, mismatch

B, T, H, V = 6, 8, 5, 11
GIVEN = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "weights")


def step():
    """Leaves (hidden [B, T, H], weight [V, H]), and what a batch of all is made of, by name.

    The last sequence has no counted token, the first ones have few: ranks differ.
    """
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [normal(B, T, H), normal(V, H)]
    mask = torch.rand(B, T, generator=generator) < torch.linspace(0.3, 1.0, B)[:, None]
    mask[-1] = False
    given = {name: -normal(B, T).abs() for name in GIVEN}
    given["weights"] = normal(B, T).exp()
    labels = torch.randint(0, V, (B, T), generator=generator)
    return leaves, {"labels": labels, "loss_mask": mask, "advantages": normal(B), **given}


def part(named, rows, columns=slice(None)):
    """The batch of those sequences, of their tokens in those columns."""
    cut = {n: t[rows][:, columns] if t.dim() == 2 else t[rows] for n, t in named.items()}
    return TokenBatch.padded(cut.pop("labels"), cut.pop("loss_mask"), cut.pop("advantages"), **cut)


def result(leaves, batch, loss, rows=slice(None), columns=slice(None)):
    """The loss, its metrics and the gradients of all leaves, from some tokens."""
    hidden, weight = (leaf.clone().requires_grad_() for leaf in leaves)
    output = linear_policy_loss(hidden[rows][:, columns], LMHead(weight), batch, loss)
    output.loss.backward()
    return output.loss.detach(), output.metrics, [hidden.grad, weight.grad]


def averaged(tensors):
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensors


def distance(found, expected):
    """The largest relative error, inf where one is NaN or the expected is nothing."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def errors(names, batch, rows, columns=slice(None)):
    """By loss: how far the averages over ranks of loss, gradients and metrics are from the step's.

    Of metrics those that are means.
    """
    leaves, named = step()
    found = {}
    for name in names:
        loss = replace(loss_of(name, beta=0.1), entropy_coef=0.1)
        value, metrics, gradients = result(leaves, part(named, slice(None)), loss)
        here, own, parts = result(leaves, batch, loss, rows, columns)
        means = [key for key in metrics if key != "ratio_max" and metrics[key] != 0]
        of_ranks = averaged([here, *parts, *(own[key] for key in means)])
        found[name] = distance(of_ranks, [value, *gradients, *(metrics[key] for key in means)])
    return found


def sequences_of(rank, world):
    """Unequal shares: the first rank has one sequence, the last the rest."""
    bounds = [0, *range(1, world), B]
    return slice(bounds[rank], bounds[rank + 1])


def whole_sequences(rank, world, names):
    rows = sequences_of(rank, world)
    return errors(names, across(part(step()[1], rows)), rows)


def counts(rank, world):
    """Of the batch, of across of it, and of across of that."""
    batch = part(step()[1], sequences_of(rank, world))
    once = across(batch)
    twice = across(once)
    return [(float(b.num_tokens), float(b.num_sequences)) for b in (batch, once, twice)]


def columns_of(rank, size):
    """A piece of the beginning and one of the end, as balanced context parallelism cuts them."""
    pieces = torch.arange(T).tensor_split(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def grid(rank, world, size):
    """Sequences over world / size, columns over size ranks: (rows, columns, context)."""
    groups = [dist.new_group(list(range(i, i + size))) for i in range(0, world, size)]
    data, place = divmod(rank, size)
    rows = slice(None) if world == size else sequences_of(data, world // size)
    return rows, columns_of(place, size), groups[data]


def split_sequences(rank, world, names, size=2):
    rows, columns, context = grid(rank, world, size)
    batch = across(part(step()[1], rows, columns), context=context)
    return errors(names, batch, rows, columns)


def split_and_packed(rank, world):
    """The first rank holds nothing of sequence 1, the second nothing of sequence 0."""
    leaves, named = step()
    loss = fused_rl.gspo()
    expected = result(leaves, part(named, slice(2)), loss, slice(2))
    own = torch.arange(T) if rank == 0 else torch.arange(T, 2 * T)
    flat = {n: named[n][:2].reshape(-1)[own] for n in ("labels", "loss_mask", *GIVEN)}
    ends = torch.tensor([0, T, T] if rank == 0 else [0, 0, T])
    batch = TokenBatch.packed(flat.pop("labels"), ends, named["advantages"][:2], **flat)
    batch = across(batch, context=dist.group.WORLD)
    hidden, weight = (leaf.clone().requires_grad_() for leaf in leaves)
    output = linear_policy_loss(hidden[:2].reshape(-1, H)[own], LMHead(weight), batch, loss)
    output.loss.backward()
    found = averaged([output.loss.detach(), hidden.grad, weight.grad])
    return distance(found, [expected[0], *expected[2]])


def masks(rank, world):
    """Which masks of whole sequences differ from those of the step, at this rank's tokens."""
    _, named = step()
    rows, columns, context = grid(rank, world, world)
    whole = part(named, rows)
    batch = across(part(named, rows, columns), context=context)
    formed = {
        "veto": lambda b: mismatch.veto_mask(b, floor=0.3),
        "band": lambda b: mismatch.acceptance_mask(b, low=0.8, high=1.3),
        "left behind": lambda b: mismatch.off_policy_sequence_mask(b.ref_logprobs, b, delta=0.0),
    }
    found = {}
    for name, mask in formed.items():
        expected = mask(whole)
        assert 0 < expected.sum() < expected.numel(), name
        found[name] = torch.equal(mask(batch), expected.reshape(B, T)[:, columns].reshape(-1))
    return found


def compiled(rank, world, backend):
    """How far the compiled loss of split sequences, and its gradient, are from the eager one."""
    _, named = step()
    rows, columns, context = grid(rank, world, world)
    batch = across(part(named, rows, columns), context=context)
    loss = fused_rl.gspo()

    def value(logprobs):
        return loss(fused_rl.TokenStats(logprobs, -logprobs), batch).loss

    torch._dynamo.reset()
    results = []
    for function in (value, torch.compile(value, fullgraph=True, backend=backend)):
        logprobs = (-named["weights"][:, columns]).requires_grad_()
        formed = function(logprobs)
        formed.backward()
        results.append([formed.detach(), logprobs.grad])
    return distance(results[1], results[0])


def unequal_parts(rank, world):
    _, named = step()
    try:
        across(part(named, slice(2 + rank)), context=dist.group.WORLD)
    except ValueError as error:
        return str(error)

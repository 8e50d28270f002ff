"""Cases of preference losses: a step's pairs, or parts of sequences, over ranks; spread heads."""

import copy

import cases_shards
import torch
import torch.distributed as dist
from by_name import preference_loss
from cases_counts import averaged, distance
from test_preference import JUDGED, RANKED, UNPAIRED, WITHOUT_REFERENCE, V, given
from torch.nn.parallel import DistributedDataParallel as DDP

import fused_rl
from fused_rl import LMHead, linear_preference_loss
from fused_rl.preference import PreferenceBatch


def made(name, rows, columns=slice(None)):
    """What the loss is of: (hidden, weight, batch, reference), of some sequences, some columns."""
    hidden, weight, labels, mask, (ref_hidden, ref_weight) = given()
    cut = [t[rows][:, columns] for t in (labels, mask)]
    judged = {n: t[rows] for n, t in JUDGED.items()} if name in UNPAIRED else {}
    reference = ref_hidden[rows][:, columns], ref_weight
    batch = PreferenceBatch.padded(*cut, **judged)
    return hidden, weight, batch, None if name in WITHOUT_REFERENCE else reference


def whole(name):
    """[loss, margin, accuracy, dhidden, dweight] of one process."""
    hidden, weight, batch, reference = made(name, slice(None))
    loss = preference_loss(name)
    out = linear_preference_loss(hidden, weight, batch, loss, reference=reference)
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    return [out.loss.detach(), out.metrics["margin"], out.metrics["nll"], *gradients]


def part(name, rows, columns=slice(None), context=None):
    hidden, weight, batch, reference = made(name, rows, columns)
    batch = fused_rl.across(batch, context=context)
    loss = preference_loss(name)
    states = hidden[rows][:, columns]
    out = linear_preference_loss(states, weight, batch, loss, reference=reference)
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    return averaged([out.loss.detach(), out.metrics["margin"], out.metrics["nll"], *gradients])


def shares(rank, world, names):
    """Pairs over ranks, unequally: the last rank has none where there are three."""
    # Whole pairs; of single answers, the mismatched ones at the last rank that has any.
    of = {2: [[0, 1, 3, 4], [2, 5]], 3: [[0, 1, 3, 4], [2, 5], []]}[world][rank]
    found = {}
    for name in names:
        if name not in RANKED:
            found[name] = distance(part(name, torch.tensor(of).long()), whole(name))
    return found


def split(rank, world, names):
    """The tokens of each sequence over ranks."""
    columns = slice(0, 4) if rank == 0 else slice(4, None)
    found = {}
    for name in names:
        if name != "ld_dpo":
            found[name] = distance(
                part(name, slice(None), columns, context=dist.group.WORLD), whole(name)
            )
    return found


def spread(rank, world, names):
    """The vocabulary over ranks: every rank makes the call."""
    cut = slice(0, 9) if rank == 0 else slice(9, None)
    found = {}
    for name in names:
        hidden, weight, batch, reference = made(name, slice(None))
        rows = weight.detach()[cut].requires_grad_()
        head = LMHead(rows, group=dist.group.WORLD, start=cut.start, vocabulary=V)
        out = linear_preference_loss(
            *(hidden, head, batch, preference_loss(name)), reference=reference
        )
        dhidden, drows = torch.autograd.grad(out.loss, (hidden, rows))
        loss, _, _, expected, dweight = whole(name)
        found[name] = distance([out.loss.detach(), dhidden, drows], [loss, expected, dweight[cut]])
    return found


def engine(rank, world, which):
    """DPO's step by a model in shards, a pair on each rank, beside one process with both."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, cases_shards.V, (2 * world, 7), generator=generator)
    mask = torch.rand(2 * world, 6, generator=generator) < 0.7
    ref = -torch.rand(2 * world, 6, generator=generator)
    loss = preference_loss("rpo")

    def batch(rows):
        return PreferenceBatch.padded(ids[rows, 1:], mask[rows], ref_logprobs=ref[rows])

    alone = cases_shards.build()
    model = copy.deepcopy(alone)
    hidden = alone.model(ids).last_hidden_state[:, :-1]
    head = LMHead.from_model(alone)
    expected = linear_preference_loss(hidden, head, batch(slice(None)), loss).loss
    expected.backward()
    outer = cases_shards.shard(model, "own") if which == "fsdp2" else DDP(model)
    rows = torch.tensor([rank, rank + world])
    shared = fused_rl.across(batch(rows))
    for _ in range(2):
        model.zero_grad()
        states = cases_shards.states(outer, ids[rows])
        args = states, shared.tokens, loss.of(shared)
        value = fused_rl.model_policy_loss(outer, *args).loss
        value.backward()
    found = cases_shards.gradients(model)
    error = cases_shards.distance(found, cases_shards.gradients(alone))
    return max(error, ((cases_shards.mean(value) - expected) / expected).abs().item())

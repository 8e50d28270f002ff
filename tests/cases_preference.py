"""Cases of preference losses: a step's pairs, or parts of sequences, over ranks; spread heads."""

import torch
import torch.distributed as dist
from by_name import preference_loss
from cases_counts import averaged, distance
from test_preference import JUDGED, RANKED, UNPAIRED, WITHOUT_REFERENCE, V, given

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

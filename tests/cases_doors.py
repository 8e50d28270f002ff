"""Cases of others' signatures for a vocabulary that is split over ranks; the oracle is one rank."""

from typing import Any

import torch
import torch.distributed as dist
from cases_spread import relative
from torch import Tensor

from fused_rl import linear_logprobs
from fused_rl.integrations import liger, verl

H, ROWS, N = 8, 6, 10


def drawn(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, the whole weight, labels of which none is ignored, this rank's leaves."""
    g = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, H, generator=g).double() for n in (N, ROWS * world))
    labels = torch.randint(0, ROWS * world, (N,), generator=g)
    own = weight[rank * ROWS : (rank + 1) * ROWS].clone().requires_grad_()
    return hidden.requires_grad_(), weight.requires_grad_(), labels, hidden.detach().clone(), own


def objective(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """Each token by a weight of its own."""
    at = torch.linspace(-1, 1, N, dtype=torch.float64)
    return (at * logprobs + at.square() * entropy).sum()


def differences(rank: int, world: int, call: Any, *, adds_up: bool) -> list[float]:
    """Of log-probs, entropies, dhidden and dweight, from those of the whole head.

    call: (hidden [N, H], weight [V_r, H], labels [N]) -> (logprobs, entropy).
    adds_up: the gradient of hidden is a summand, which the caller adds up.
    """
    hidden, weight, labels, own_hidden, own = drawn(rank, world)
    exact = linear_logprobs(hidden, weight, labels, temperature=0.7)
    objective(*exact).backward()
    own_hidden.requires_grad_()
    found = call(own_hidden, own, labels)
    objective(*found).backward()
    dhidden = own_hidden.grad
    if adds_up:
        assert relative(dhidden, hidden.grad) > 0.1
        dist.all_reduce(dhidden)
    return [
        *(relative(a, b) for a, b in zip(found, exact, strict=True)),
        relative(dhidden, hidden.grad),
        relative(own.grad, weight.grad[rank * ROWS : (rank + 1) * ROWS]),
    ]


def of_verl(rank: int, world: int) -> list[float]:
    """Megatron's shapes: states [T, 1, H], labels [1, T]."""

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        given = (hidden[:, None], weight, labels[None], 0.7, "none", dist.group.WORLD)
        return verl.linear_cross_entropy(*given)

    return differences(rank, world, call, adds_up=True)


def of_verl_outside(rank: int, world: int) -> str:
    """What a label outside is said to be, by a rank that gets there."""
    *_, labels, hidden, weight = drawn(rank, world)
    labels[3] = ROWS * world
    try:
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "none", dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


def of_verl_kept(rank: int, world: int) -> list[float]:
    """Log-probs renormalised over kept sets; the fifth is the whole vocabulary."""
    hidden, weight, labels, own_hidden, own = drawn(rank, world)
    sets = [torch.tensor(sorted({int(i), n, 11 - n})) for n, i in enumerate(labels)]
    sets[4] = torch.tensor([-1])
    given = torch.cat(sets), torch.tensor([0, *map(len, sets)]).cumsum(0)
    with verl.kept_sets(*given):
        exact = verl.linear_cross_entropy(hidden, weight, labels, 0.7)
    objective(*exact).backward()
    own_hidden.requires_grad_()
    with verl.kept_sets(*given):
        found = verl.linear_cross_entropy(
            own_hidden[:, None], own, labels[None], 0.7, "none", dist.group.WORLD
        )
    objective(*found).backward()
    dhidden = own_hidden.grad
    dist.all_reduce(dhidden)
    return [
        *(relative(a, b) for a, b in zip(found, exact, strict=True)),
        relative(dhidden, hidden.grad),
        relative(own.grad, weight.grad[rank * ROWS : (rank + 1) * ROWS]),
    ]


def of_liger(rank: int, world: int, *, with_group: bool) -> list[float]:
    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        function = liger.LigerFusedLinearScaledCrossEntropyTPFunction
        group = dist.new_group(list(range(world))) if with_group else None
        nll = function.apply(hidden, weight, labels, group, 0.7)
        given = (hidden, weight, labels, group, 0.7, -100, 1, True)
        again, entropy = liger.liger_fused_linear_scaled_cross_entropy_tp(*given)
        assert torch.equal(nll, again)
        return -again, entropy

    return differences(rank, world, call, adds_up=False)

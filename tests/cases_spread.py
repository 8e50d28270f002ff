"""Cases of heads whose vocabulary is spread over ranks; the oracle is the whole head."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fused_rl import (
    LMHead,
    LossOutput,
    TokenBatch,
    dapo,
    grpo,
    linear_kept_logprobs,
    linear_logprobs,
    linear_policy_loss,
)
from fused_rl.parallel.states import Hidden

GROUP = dist.group.WORLD


def cut(V, rank, world, uneven=False):
    """This rank's rows."""
    sizes = [len(c) for c in torch.arange(V).tensor_split(world)]
    if uneven:
        # All but the first have little, the last has nothing.
        sizes = [V - (world - 2), *[1] * (world - 2), 0] if world > 2 else [V, 0]
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    temperature: Tensor
    softcap: float | None

    @classmethod
    def drawn(cls, N=23, H=16, V=97, dtype=torch.float64, bias=True, softcap=None, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        labels = torch.randint(0, V, (N,), generator=g)
        labels[1::6] = -100
        return cls(
            draw(N, H).to(dtype),
            (draw(V, H) / 2).to(dtype),
            draw(V).to(dtype) if bias else None,
            labels,
            torch.rand(N, generator=g, dtype=torch.float64) + 0.5,
            softcap,
        )

    def leaves(self, rows=slice(None), trained=True):
        given = (self.hidden, self.weight[rows], None if self.bias is None else self.bias[rows])
        needs = (True, trained, trained)
        return [
            None if t is None else t.clone().requires_grad_(n)
            for t, n in zip(given, needs, strict=True)
        ]


def part(problem, rank, world, uneven=False, hidden=Hidden.REPLICATED, trained=True):
    """This rank's hidden states, weight, bias, and head."""
    V = len(problem.weight)
    rows = cut(V, rank, world, uneven)
    h, w, b = problem.leaves(rows, trained)
    options = {"group": dist.group.WORLD, "start": rows.start, "vocabulary": V, "hidden": hidden}
    return rows, (h, w, b), LMHead(w, b, softcap=problem.softcap, **options)


def relative(found, exact):
    """The largest difference over the largest number; inf where one is NaN."""
    if exact.numel() == 0:
        return 0.0
    gap = (found.double() - exact.double()).abs().max()
    size = exact.double().abs().max().clamp(min=1e-300)
    return torch.inf if gap.isnan() else (gap / size).item()


def upstream(N):
    g = torch.Generator().manual_seed(5)
    return torch.randn(2, N, generator=g, dtype=torch.float64)


def objective(stats, with_entropy=True):
    a, b = upstream(len(stats.logprobs))
    total = (a * stats.logprobs).sum()
    return total + (b * stats.entropy).sum() if with_entropy else total


def two_passes(rank, world, dtype="float64", uneven=False, trained=True, with_entropy=True, **of):
    """The largest relative differences of values and of gradients from those of the whole head."""
    problem = Problem.drawn(dtype=getattr(torch, dtype), **of)
    h0, w0, b0 = problem.leaves(trained=trained)
    whole = LMHead(w0, b0, softcap=problem.softcap)
    options = {"temperature": problem.temperature, "chunk_bytes": 8 * 97 * 8}
    exact = linear_logprobs(h0, whole, problem.labels, **options)
    objective(exact, with_entropy).backward()
    rows, (h, w, b), head = part(problem, rank, world, uneven, trained=trained)
    stats = linear_logprobs(h, head, problem.labels, **options)
    objective(stats, with_entropy).backward()
    values = max(relative(x, y) for x, y in zip(stats, exact, strict=True))
    gradients = [relative(h.grad, h0.grad)]
    if trained:
        gradients.append(relative(w.grad, w0.grad[rows]))
        gradients += [relative(b.grad, b0.grad[rows])] if b is not None else []
    return values, max(gradients)


def batch_of(problem, refs=True):
    """Of sequences of several lengths, packed."""
    g = torch.Generator().manual_seed(3)
    N = len(problem.labels)
    draw = lambda: torch.randn(N, generator=g, dtype=torch.float64)  # noqa: E731
    labels = problem.labels.clone()
    mask = labels != -100
    cu_seqlens = torch.tensor([0, N // 3, N // 2, N])
    old = -1 - draw().abs() + (draw() > 0) * 2.0
    return TokenBatch.packed(
        *(labels, cu_seqlens, draw()),
        loss_mask=mask,
        old_logprobs=old,
        ref_logprobs=old + draw() / 9 if refs else None,
    )


LOSSES = {
    "grpo": lambda: grpo(beta=0.1),
    # Not separable: two passes.
    "function": lambda: (
        lambda stats, batch: LossOutput(
            (stats.logprobs * batch.advantages * stats.entropy).mean(), {}
        )
    ),
    "dapo": lambda: dapo(),
    "entropy": lambda: dapo(entropy_coef=0.1),
}


def policy_loss(rank, world, dtype="float64", loss="grpo", chunk=None, uneven=False, **of):
    """The largest relative differences of the loss and of the gradients."""
    trained, hidden = of.pop("trained", True), Hidden[of.pop("hidden", "REPLICATED")]
    kept = of.pop("kept", False)
    problem = Problem.drawn(N=24, dtype=getattr(torch, dtype), **of)
    h0, w0, b0 = problem.leaves(trained=trained)
    batch, formed = batch_of(problem), LOSSES[loss]()
    if kept:
        batch = batch.with_kept(*drawn_sets(problem))
    options = {"temperature": problem.temperature, "chunk_bytes": chunk}
    whole = LMHead(w0, b0, softcap=problem.softcap)
    exact = linear_policy_loss(h0, whole, batch, formed, **options).loss
    (3 * exact).backward()
    rows, (h, w, b), head = part(problem, rank, world, uneven, hidden, trained)
    mine = slice(None)
    if hidden is Hidden.SEQUENCE_SHARDED:
        mine = slice(rank * 24 // world, (rank + 1) * 24 // world)
        h = h.detach()[mine].requires_grad_()
    found = linear_policy_loss(h, head, batch, formed, **options).loss
    (3 * found).backward()
    gradient = h.grad
    if hidden is Hidden.PARTIAL:
        gradient = h.grad.clone()
        dist.all_reduce(gradient)
    gradients = [relative(gradient, h0.grad[mine])]
    if trained:
        gradients.append(relative(w.grad, w0.grad[rows]))
        gradients += [relative(b.grad, b0.grad[rows])] if b is not None else []
    return relative(found, exact), max(gradients)


def drawn_sets(problem):
    """Kept sets of up to 12 entries, of one token the whole vocabulary."""
    V, g = len(problem.weight), torch.Generator().manual_seed(9)
    sets = []
    for label in problem.labels.tolist():
        entries = torch.randperm(V, generator=g)[: int(torch.randint(1, 12, (), generator=g))]
        entries = entries[entries != label]
        sets.append(torch.cat([entries, torch.tensor([label])]) if label >= 0 else entries * 1000)
    sets[3] = torch.tensor([-1])
    return torch.cat(sets), torch.tensor([0, *map(len, sets)]).cumsum(0)


def kept_sets(rank, world, uneven=False, only_kept=False, **of):
    """The largest relative differences of the three statistics and of the gradients."""
    problem = Problem.drawn(N=24, **of)
    options = {"temperature": problem.temperature, "chunk_bytes": 97 * 8 * 7}

    def total(stats):
        a, b = upstream(24)
        kept = (torch.linspace(-1, 2, 24) * stats.kept_logprobs).sum()
        return kept if only_kept else kept + (a * stats.logprobs + b * stats.entropy).sum()

    h0, w0, b0 = problem.leaves()
    given = (problem.labels, *drawn_sets(problem))
    whole = LMHead(w0, b0, softcap=problem.softcap)
    exact = linear_kept_logprobs(h0, whole, *given, **options)
    total(exact).backward()
    rows, (h, w, b), head = part(problem, rank, world, uneven)
    found = linear_kept_logprobs(h, head, *given, **options)
    total(found).backward()
    gradients = [relative(h.grad, h0.grad), relative(w.grad, w0.grad[rows])]
    gradients += [relative(b.grad, b0.grad[rows])] if b is not None else []
    return max(map(relative, found, exact)), max(gradients)

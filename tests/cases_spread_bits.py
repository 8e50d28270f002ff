"""Cases of a spread head: its bits, its traffic, its errors, what torch.compile makes of it."""

import time

import torch
import torch.distributed as dist
from cases_spread import Problem, batch_of, cut, objective, part, relative, upstream
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from fused_rl import (
    Divergence,
    LMHead,
    grpo,
    linear_divergence,
    linear_logprobs,
    linear_logprobs_at,
    linear_policy_loss,
    linear_statistics,
    linear_top_logprobs,
)
from fused_rl.parallel import collectives
from fused_rl.parallel.states import Hidden


def same_everywhere(tensor):
    """Whether every rank has these bits."""
    mine = tensor.detach().contiguous().view(torch.uint8).flatten()
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    return all(torch.equal(mine, t) for t in all_of_them)


def results(problem, rank, world, rows=slice(None), **options):
    """Statistics and dhidden of some of the tokens."""
    of = Problem(
        *(problem.hidden[rows], problem.weight, problem.bias, problem.labels[rows]),
        *(problem.temperature[rows], problem.softcap),
    )
    _, (h, *_), head = part(of, rank, world)
    top = linear_top_logprobs(h, head, of.labels, temperature=of.temperature, **options)
    weights = torch.linspace(0.5, 2, len(problem.labels), dtype=torch.float64)[rows]
    ((top.logprobs + top.entropy) * weights).sum().backward()
    return [*(t.detach() for t in top), h.grad]


def bits(rank, world, dtype="float32"):
    """Of all ranks, of a second run, of a token alone and of one in another place."""
    problem = Problem.drawn(N=40, V=1003, dtype=getattr(torch, dtype))
    found, again = (results(problem, rank, world) for _ in range(2))
    everywhere = all(map(same_everywhere, found))
    repeated = all(map(torch.equal, found, again))
    alone = all(
        torch.equal(a[n : n + 1], b)
        for n in (0, 3, 17, 39)
        for a, b in zip(found, results(problem, rank, world, slice(n, n + 1)), strict=True)
    )
    turned = results(problem, rank, world, torch.arange(40).flip(0))
    moved = all(torch.equal(a, b.flip(0)) for a, b in zip(found, turned, strict=True))
    return everywhere, repeated, alone, moved


def most_likely(rank, world):
    """Which tokens are the most likely ones, by one rank and by all: and top >= logprob."""
    problem = Problem.drawn(N=200, V=7, bias=False, dtype=torch.float32)
    whole = linear_top_logprobs(problem.hidden, problem.weight, problem.labels)
    _, (h, *_), head = part(problem, rank, world)
    found = linear_top_logprobs(h, head, problem.labels)
    flags = [s.logprobs == s.top_logprobs for s in (whole, found)]
    return torch.equal(*flags), bool((found.top_logprobs >= found.logprobs).all())


def extremes(rank, world):
    """A NaN row alone; a part that is all at -inf; logits of 1e30; labels at the edges of parts."""
    problem = Problem.drawn(N=24, V=64)
    problem.hidden[5, 0] = torch.nan
    starts = [cut(64, r, world).start for r in range(world)]
    problem.labels[6 : 6 + world] = torch.tensor(starts)
    problem.labels[12 : 12 + world] = torch.tensor(
        [cut(64, r, world).stop - 1 for r in range(world)]
    )
    # The second rank's part cannot be sampled.
    problem.bias[cut(64, 1, world)] = -torch.inf
    problem.labels[5] = problem.labels[6 + 1] = problem.labels[12 + 1] = 0
    inside = problem.labels.where(problem.labels >= 0, 0)
    ruled_out = (inside >= starts[1]) & (inside < cut(64, 1, world).stop)
    problem.labels[ruled_out] = -100
    h0, w0, b0 = problem.leaves()
    exact = linear_logprobs(h0, LMHead(w0, b0), problem.labels)
    objective(exact).backward()
    _, (h, *_), head = part(problem, rank, world)
    found = linear_logprobs(h, head, problem.labels)
    objective(found).backward()
    poisoned = found.logprobs.isnan().nonzero().flatten().tolist()
    sound = [n for n in range(24) if n != 5]
    values = max(relative(x[sound], y[sound]) for x, y in zip(found, exact, strict=True))
    gradient = relative(h.grad[sound], h0.grad[sound])
    problem = Problem.drawn(N=6, V=64, bias=False)
    problem.hidden *= 1e30
    exact = linear_logprobs(problem.hidden, problem.weight, problem.labels)
    _, (h, *_), head = part(problem, rank, world)
    huge = linear_logprobs(h, head, problem.labels)
    return poisoned, values, gradient, max(map(relative, huge, exact))


def labels_are_checked_on_every_rank(rank, world):
    problem = Problem.drawn(V=97)
    problem.labels[3] = 97
    _, (h, *_), head = part(problem, rank, world)
    try:
        linear_logprobs(h, head, problem.labels)
    except ValueError as error:
        return str(error)


def masked_altogether(rank, world):
    """No token counts: zeros, attached, and the same collectives on every rank."""
    problem = Problem.drawn(N=24)
    problem.labels[:] = -100
    found = []
    for hidden in Hidden:
        _, (h, w, _), head = part(problem, rank, world, hidden=hidden)
        if hidden is Hidden.SEQUENCE_SHARDED:
            h = h.detach()[: 24 // world].requires_grad_()
        linear_logprobs(h, head, problem.labels).logprobs.sum().backward()
        found += [h.grad.abs().sum().item(), w.grad.abs().sum().item()]
        h.grad = w.grad = None
        linear_policy_loss(h, head, batch_of(problem), grpo(beta=0.1)).loss.backward()
        found += [h.grad.abs().sum().item(), w.grad.abs().sum().item()]
    return sum(found)


def traffic(rank, world, hidden="REPLICATED", dtype="bfloat16"):
    """Bytes received: per token of statistics, per number of dhidden."""
    from fused_rl.parallel import spread, sums

    received = {"statistics": 0, "dhidden": 0}

    def counted(function, default):
        def run(x, group):
            out = function(x, group)
            name = "statistics" if out.dtype == torch.float64 else default
            received[name] += out.numel() * out.element_size()
            return out

        return run

    gather, exchange = collectives.all_gathered, collectives.exchanged
    spread.all_gathered, sums.all_gathered, sums.exchanged = (
        counted(gather, "hidden"),
        counted(gather, "dhidden"),
        counted(exchange, "dhidden"),
    )
    received["hidden"] = 0
    try:
        N, H = 48, 32
        problem = Problem.drawn(N=N, H=H, V=97, dtype=getattr(torch, dtype))
        problem.labels = problem.labels.where(problem.labels >= 0, 1)
        how = Hidden[hidden]
        _, (h, *_), head = part(problem, rank, world, hidden=how)
        if how is Hidden.SEQUENCE_SHARDED:
            h = h.detach()[: N // world].requires_grad_()
        linear_policy_loss(h, head, batch_of(problem), grpo(beta=0.1)).loss.backward()
        return (
            received["statistics"] / N,
            received["dhidden"] / (N * H),
            received["hidden"] / (N * H),
        )
    finally:
        spread.all_gathered = sums.all_gathered = gather
        sums.exchanged = exchange


def ignored_as_zero(rank, world, compile_it=False):
    """The ignore_index is 0, an entry of the first part and the first row of every other."""
    problem = Problem.drawn(N=24)
    problem.labels = problem.labels.where(problem.labels >= 0, 0)
    starts = [cut(97, r, world).start for r in range(world)]
    problem.labels[:world] = torch.tensor(starts)
    h0, w0, b0 = problem.leaves()
    exact = linear_logprobs(h0, LMHead(w0, b0), problem.labels, ignore_index=0)
    objective(exact).backward()
    rows, (h, w, b), head = part(problem, rank, world)

    def step(h, labels):
        return linear_logprobs(h, head, labels, ignore_index=0)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compile_it else step
    found = run(h, problem.labels)
    objective(found).backward()
    gradients = [(h.grad, h0.grad), (w.grad, w0.grad[rows]), (b.grad, b0.grad[rows])]
    return max(map(relative, found, exact)), max(relative(*pair) for pair in gradients)


def compiled(rank, world, backend="aot_eager", trained=True, hidden="REPLICATED"):
    """Without a break, the same numbers."""
    problem = Problem.drawn(N=24)
    h0, w0, b0 = problem.leaves(trained=trained)
    exact = linear_logprobs(h0, LMHead(w0, b0), problem.labels)
    objective(exact).backward()
    how = Hidden[hidden]
    rows, (h, w, b), head = part(problem, rank, world, hidden=how, trained=trained)
    mine = slice(None)
    if how is Hidden.SEQUENCE_SHARDED:
        mine = slice(rank * 24 // world, (rank + 1) * 24 // world)
        h = h.detach()[mine].requires_grad_()
    group, start = head.group, head.start
    a, c = upstream(24)

    @torch.compile(fullgraph=True, backend=backend)
    def step(h, w, b, labels):
        head = LMHead(w, b, group=group, start=start, vocabulary=97, hidden=how)
        stats = linear_logprobs(h, head, labels)
        return (a * stats.logprobs + c * stats.entropy).sum(), stats

    total, stats = step(h, w, b, problem.labels)
    total.backward()
    values = max(map(relative, stats, exact))
    gradients = [relative(h.grad, h0.grad[mine])]
    gradients += [relative(w.grad, w0.grad[rows])] if trained else []
    return values, max(gradients)


def cpu_seconds(rank, world, N=512, H=512, V=32768):
    """Of a step of linear_policy_loss in bfloat16 on one thread, the least of five."""
    problem = Problem.drawn(N=N, H=H, V=V, dtype=torch.bfloat16, bias=False)
    _, (h, *_), head = part(problem, rank, world)
    if world == 1:
        head = LMHead(head.weight)
    batch, taken = batch_of(problem), []
    for _ in range(6):
        dist.barrier()
        began = time.process_time()
        linear_policy_loss(h, head, batch, grpo(beta=0.1)).loss.backward()
        taken.append(time.process_time() - began)
    return min(taken[1:])


def refusals(rank, world):
    """What a spread head is not for, and options of a group that do not fit: what is said."""
    problem = Problem.drawn(N=24)
    _, (h, w, _), head = part(problem, rank, world)
    here = LMHead(problem.weight)
    given = {"group": dist.group.WORLD}
    mesh = init_device_mesh("cpu", (world,))
    calls = {
        "linear_divergence": lambda: linear_divergence(
            h, head, problem.hidden, here, problem.labels, divergence=Divergence.REVERSE
        ),
        "a reference": lambda: linear_policy_loss(
            h, head, batch_of(problem, refs=False), grpo(), reference=(problem.hidden, here)
        ),
        "linear_logprobs_at": lambda: linear_logprobs_at(h, head, problem.labels[:, None]),
        "linear_statistics": lambda: linear_statistics(h, head, problem.labels, top=2),
        "logits": lambda: head.logits(h),
        "grad_filter": lambda: linear_logprobs(h, head, problem.labels, grad_filter=1e-3),
        "torch.func": lambda: torch.func.grad(
            lambda x: linear_logprobs(x, head, problem.labels).logprobs.sum()
        )(h),
        "create_graph": lambda: torch.autograd.grad(
            linear_logprobs(h, head, problem.labels).logprobs.sum(), h, create_graph=True
        ),
        "start alone": lambda: LMHead(w, start=3, **given),
        "start without a group": lambda: LMHead(w, start=3, vocabulary=97),
        "hidden without a group": lambda: LMHead(w, hidden=Hidden.PARTIAL),
        "a mesh": lambda: LMHead(w, group=mesh),
        "labels of a part": lambda: linear_logprobs(h[: 24 // world], head, problem.labels),
        "a DTensor for a head that is here": lambda: linear_logprobs(
            distribute_tensor(problem.hidden, mesh, [Replicate()]), here, problem.labels
        ),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = "nothing"
        except (ValueError, NotImplementedError) as error:
            said[name] = str(error)
    return said


def order(rank, world):
    """What is done when, in a step of three chunks."""
    from fused_rl.parallel import spread, sums

    done = []

    def noted(name, function):
        def run(*args):
            done.append(name)
            return function(*args)

        return run

    kept = spread.formed, sums.sent, sums.sum_of
    spread.formed, sums.sent, sums.sum_of = (
        noted(name, function)
        for name, function in zip(("formed", "sent", "summed"), kept, strict=True)
    )
    try:
        problem = Problem.drawn(N=48)
        problem.labels = problem.labels.where(problem.labels >= 0, 1)
        _, (h, *_), head = part(problem, rank, world, trained=False)
        size = -(-97 // world) * 8 * 16
        linear_policy_loss(h, head, batch_of(problem), grpo(), chunk_bytes=size).loss.backward()
    finally:
        spread.formed, sums.sent, sums.sum_of = kept
    return done

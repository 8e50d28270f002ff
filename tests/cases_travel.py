"""Cases of tokens that travel; the oracle is the whole head, rank by rank."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from cases_spread import LOSSES, Problem, batch_of, cut, relative

from fused_rl import (
    LMHead,
    LossOutput,
    TokenBatch,
    grpo,
    linear_kept_logprobs,
    linear_logprobs,
    linear_policy_loss,
    linear_top_logprobs,
)
from fused_rl.ops import chunks
from fused_rl.parallel.states import Hidden

# Tokens of each rank: of 4, one has none.
COUNTS = {2: (17, 6), 3: (9, 4, 11), 4: (13, 0, 7, 3)}
# Of three tokens of each rank in a turn, so that ranks run out at different turns.
SMALL = 97 * 8 * 3


def not_separable(stats, batch):
    """Of a rank without tokens, too, a number. Its terms have one sign: nothing cancels."""
    return LossOutput((stats.logprobs * stats.entropy * batch.advantages.abs()).sum(), {})


def owned(problem, rank, counts):
    """The problem of one rank's tokens."""
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    of_tokens = (problem.labels[rows], problem.temperature[rows])
    of_head = (problem.weight, problem.bias)
    return Problem(problem.hidden[rows], *of_head, *of_tokens, problem.softcap)


def here(problem, mine, rank, world, uneven=False, trained=True):
    """This rank's rows, leaves and head."""
    V, (h, *_) = len(problem.weight), mine.leaves()
    rows = cut(V, rank, world, uneven)
    _, w, b = problem.leaves(rows, trained)
    options = {"group": dist.group.WORLD, "start": rows.start, "vocabulary": V}
    options |= {"softcap": problem.softcap, "hidden": Hidden.OWN_TOKENS}
    return rows, (h, w, b), LMHead(w, b, **options)


def compared(step, rank, world, counts=None, uneven=False, trained=True, repeats=1, **of):
    """The largest relative differences of what `step` gives, and of the gradients.

    step: (hidden, head, problem) -> (scalar, tensors): what is differentiated, what is compared.
    """
    of["dtype"] = getattr(torch, of.get("dtype", "float64"))
    counts = counts or COUNTS[world]
    problem = Problem.drawn(N=sum(counts), **of)
    _, w0, b0 = problem.leaves(trained=trained)
    whole, exact = LMHead(w0, b0, softcap=problem.softcap), []
    for other in range(world):
        theirs = owned(problem, other, counts)
        h0 = theirs.leaves()[0]
        total, found = step(h0, whole, theirs)
        total.backward()
        exact.append((h0.grad, found))
    mine = owned(problem, rank, counts)
    rows, (h, w, b), head = here(problem, mine, rank, world, uneven, trained)
    total, found = step(h, head, mine)
    for _ in range(repeats):
        # From the second time on, one pass forms its gradients again.
        total.backward(retain_graph=True)
    dhidden, values = exact[rank]
    gradients = [relative(h.grad, repeats * dhidden)]
    if trained:
        # The mean over ranks.
        gradients.append(relative(w.grad, repeats * w0.grad[rows] / world))
        gradients += [] if b is None else [relative(b.grad, repeats * b0.grad[rows] / world)]
    return max(map(relative, found, values)), max(gradients)


def two_passes(rank, world, chunk=SMALL, with_entropy=True, **options):
    def step(hidden, head, problem):
        stats = linear_logprobs(
            hidden, head, problem.labels, temperature=problem.temperature, chunk_bytes=chunk
        )
        weights = torch.linspace(-1, 2, len(problem.labels), dtype=torch.float64)
        total = (weights * stats.logprobs).sum()
        total = total + ((1 - weights) * stats.entropy).sum() if with_entropy else total
        return total, stats

    return compared(step, rank, world, **options)


def policy_loss(rank, world, loss="grpo", chunk=None, always_one_pass=False, **options):
    formed = not_separable if loss == "function" else LOSSES[loss]()

    def step(hidden, head, problem):
        batch = batch_of(problem)
        given = {"temperature": problem.temperature, "chunk_bytes": chunk}
        found = linear_policy_loss(hidden, head, batch, formed, **given)
        return 3 * found.loss, [found.loss, *found.metrics.values()]

    with one_pass_pays(always_one_pass):
        return compared(step, rank, world, **options)


@contextmanager
def one_pass_pays(always):
    """As on GPUs, where a dweight is added up over chunks."""
    before = chunks.ONE_PASS_TOKENS
    chunks.ONE_PASS_TOKENS = {"cpu": 1} if always else before
    try:
        yield
    finally:
        chunks.ONE_PASS_TOKENS = before


def results(problem, counts, rank, world):
    """Statistics and gradients of this rank's tokens."""
    mine = owned(problem, rank, counts)
    _, (h, w, b), head = here(problem, mine, rank, world)
    top = linear_top_logprobs(h, head, mine.labels, chunk_bytes=1003 * 4 * 3)
    (top.logprobs + top.entropy).sum().backward()
    return [*(t.detach() for t in top), h.grad], [w.grad, b.grad]


def bits(rank, world, dtype="float32"):
    """Of a second run; of the tokens when they are on other ranks, in other numbers."""
    problem = Problem.drawn(N=24, V=1003, dtype=getattr(torch, dtype))
    (found, heads), (again, heads_again) = (
        results(problem, COUNTS[world], rank, world) for _ in range(2)
    )
    repeated = all(map(torch.equal, [*found, *heads], [*again, *heads_again]))
    moved, _ = results(problem, (sum(COUNTS[world]), *[0] * (world - 1)), rank, world)
    mine, alike = slice(sum(COUNTS[world][:rank]), sum(COUNTS[world][: rank + 1])), []
    for there, at_home in zip(moved, found, strict=True):
        whole = (
            there.contiguous()
            if rank == 0
            else there.new_empty(sum(COUNTS[world]), *there.shape[1:])
        )
        dist.broadcast(whole, 0)
        alike.append(torch.equal(whole[mine], at_home))
    return repeated, all(alike)


def rounding(rank, world):
    """The errors of this rank's dhidden and dweight in bfloat16, over those of one process."""
    counts = [16] * world
    problem = Problem.drawn(N=sum(counts), H=64, V=1003, dtype=torch.bfloat16, bias=False)
    weights = torch.linspace(0.5, 2, 16, dtype=torch.float64)

    def gradients(head, hidden, theirs):
        stats = linear_logprobs(hidden, head, theirs.labels, temperature=theirs.temperature)
        (weights * (stats.logprobs + stats.entropy)).sum().backward()
        return hidden.grad.double()

    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        w0 = problem.weight.to(dtype, copy=True).requires_grad_()
        dhidden = [
            gradients(LMHead(w0), theirs.hidden.to(dtype, copy=True).requires_grad_(), theirs)
            for theirs in (owned(problem, other, counts) for other in range(world))
        ]
        found[dtype] = (dhidden[rank], w0.grad.double() / world)
    mine = owned(problem, rank, counts)
    rows, (h, w, _), head = here(problem, mine, rank, world)
    dhidden = gradients(head, h, mine)
    exact, alone = found[torch.float64], found[torch.bfloat16]
    error = lambda a, b: (a - b).norm().item()  # noqa: E731
    return (
        error(dhidden, exact[0]) / error(alone[0], exact[0]),
        error(w.grad.double(), exact[1][rows]) / error(alone[1][rows], exact[1][rows]),
    )


def traffic(rank, world, two=False, dtype="bfloat16"):
    """Bytes that a rank receives per token, what the gradients need in the two passes included."""
    from fused_rl.parallel import visits

    received = [0]

    def counted(function):
        def run(x, group):
            out = function(x, group)
            received[0] += out.numel() * out.element_size()
            return out

        return run

    before = visits.all_gathered, visits.exchanged
    visits.all_gathered, visits.exchanged = map(counted, before)
    try:
        counts = [16] * world
        problem = Problem.drawn(N=sum(counts), H=32, dtype=getattr(torch, dtype))
        problem.labels = problem.labels.where(problem.labels >= 0, 1)
        mine = owned(problem, rank, counts)
        _, (h, *_), head = here(problem, mine, rank, world)
        loss = not_separable if two else grpo(beta=0.1)
        linear_policy_loss(h, head, batch_of(mine), loss).loss.backward()
        return received[0]
    finally:
        visits.all_gathered, visits.exchanged = before


def errors(rank, world):
    """What every rank says of an argument that is wrong on the last one alone, and then again."""
    problem, said = Problem.drawn(N=12 * world), []
    mine = owned(problem, rank, [12] * world)
    last = rank == world - 1
    label = mine.labels.clone()
    label[3] = 97 if last else 0
    temperature = mine.temperature.clone()
    temperature[0] = -1 if last else 1
    _, (h, *_), head = here(problem, mine, rank, world)
    wrong_width = h[:, : 15 if last else 16]
    one = (torch.tensor([0, 12]), torch.ones(1))
    batch = TokenBatch.packed(label, *one, loss_mask=label != -100)
    calls = [
        lambda: linear_logprobs(h, head, label),
        lambda: linear_policy_loss(h, head, batch, grpo()),
        lambda: linear_logprobs(h, head, mine.labels, temperature=temperature),
        lambda: linear_logprobs(wrong_width, head, mine.labels),
        lambda: linear_policy_loss(wrong_width, head, batch, grpo()),
        lambda: linear_logprobs(h.detach() if last else h, head, mine.labels),
        lambda: linear_kept_logprobs(h, head, *[mine.labels] * 3),
        lambda: linear_policy_loss(h, head, batch.with_kept(label, torch.arange(13)), grpo()),
    ]
    for call in calls:
        try:
            call()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    linear_logprobs(h, head, mine.labels).logprobs.sum().backward()
    return said


def nothing_counts(rank, world):
    """No token of any rank: zeros, attached."""
    found = []
    problem = Problem.drawn(N=4 * world)
    problem.labels[:] = -100
    mine = owned(problem, rank, [4] * world)
    for trained in (True, False):
        _, (h, w, _), head = here(problem, mine, rank, world, trained=trained)
        linear_logprobs(h, head, mine.labels).logprobs.sum().backward()
        linear_policy_loss(h, head, batch_of(mine), grpo(beta=0.1)).loss.backward()
        found += [h.grad.abs().sum().item(), w.grad.abs().sum().item() if trained else 0.0]
    return sum(found)

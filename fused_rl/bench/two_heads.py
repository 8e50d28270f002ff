"""Tasks of two heads: the divergence of a student from a teacher, and steps that learn from it.

A peer's function is (hidden, weight, teacher's hidden, teacher's weight, beta) -> JSD(beta) per
token, [N]; Liger's losses are whole steps. beta = 1 is KL(student, teacher).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl import Divergence, LossOutput, TokenBatch, linear_divergence
from fused_rl.bench.peers import ROWS, Case, Peer, compiled, gradients
from fused_rl.bench.products import Pair, bare, factors
from fused_rl.bench.tasks import (
    EXACT_WORK,
    GATE,
    Judge,
    Kind,
    Task,
    dtype_name,
    gradient_error,
    judged_rows,
)
from fused_rl.one_pass.policy_loss import linear_policy_loss
from fused_rl.stats import DivergenceStats

PerToken = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class TwoHeadKind(Kind):
    """nhv: logits of both heads are 4, the gradients of hidden and weight 2 each."""

    beta: float = 1.0
    trains: bool = True


def _kinds() -> tuple[TwoHeadKind, ...]:
    found = []
    for beta, which in ((1.0, "reverse KL"), (0.5, "JSD(0.5)")):
        title, name = f"divergence, no gradient: {which}", "linear_divergence"
        found.append(TwoHeadKind(title, name, 4, beta=beta, trains=False))
        title = f"distillation step, head trained: {which}"
        found.append(TwoHeadKind(title, "distillation_step", 8, beta=beta))
        title = f"distillation step, head frozen: {which}"
        found.append(TwoHeadKind(title, "distillation_step_frozen", 6, frozen=True, beta=beta))
    return tuple(found)


TWO_HEAD_KINDS = _kinds()


@dataclass
class TwoHeads:
    """A student's case, and a teacher's of the same shape that is the student's and noise."""

    student: Case
    teacher_hidden: Tensor  # [N, H]
    teacher_weight: Tensor  # [V, H]

    @classmethod
    def make(cls, N: int, H: int, V: int, dtype: torch.dtype, device: str = "cpu") -> TwoHeads:
        """The same numbers on every device; the divergences are of some tenths of a nat."""
        student = Case.make(N, H, V, dtype, device)
        noise = torch.Generator().manual_seed(1)
        found = []
        for values in (student.hidden, student.weight):
            spread = 0.15 * values.float().std().item()
            more = torch.randn(values.shape, generator=noise) * spread
            found.append((values.float() + more.to(device)).to(dtype))
        return cls(student, *found)

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        return self.teacher_hidden, self.teacher_weight


def eager_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, beta: float
) -> Tensor:
    """Logits in the dtype of the model, softmax in float32, the definition."""
    logits = F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    s, t = (F.log_softmax(z.to(wide), dim=-1) for z in logits)
    if beta == 1:
        return (s.exp() * (s - t)).sum(-1)
    m = torch.log((1 - beta) * s.exp() + beta * t.exp())
    return ((1 - beta) * s.exp() * (s - m) + beta * t.exp() * (t - m)).sum(-1)


def fused_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, beta: float
) -> Tensor:
    """Ours, for any loss."""
    chosen = {"divergence": Divergence.JSD(beta)}
    return linear_divergence(hidden, weight, teacher_hidden, teacher_weight, **chosen).divergence


def trl_divergence() -> PerToken:
    """The autograd function under TRL's DistillationTrainer, from 1.16 on."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(hidden: Tensor, weight: Tensor, *teacher: Tensor | float) -> Tensor:
        teacher_hidden, teacher_weight, beta = teacher
        sides = (hidden, weight, None, teacher_hidden, teacher_weight, None)
        return ChunkedDivergenceFunction.apply(*sides, beta)[0]

    return run


def liger_chunked(heads: TwoHeads, kind: TwoHeadKind) -> Step:
    """Liger's chunked loss, of the soft part alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": kind.beta}
    loss_fn = LigerFusedLinearJSDLoss(compiled=False, **options)
    return _whole(lambda h, w: loss_fn(h, w, *heads.teacher, heads.student.labels), heads, kind)


def liger_op(heads: TwoHeads, kind: TwoHeadKind) -> Step:
    """Liger's op, whose kernel is Triton's."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss_fn = LigerFusedLinearJSD(kind.beta, accum_dtype=torch.float32)
    return _whole(lambda h, w: loss_fn(h, w, *heads.teacher, None), heads, kind)


def _whole(loss: Callable[[Tensor, Tensor], Tensor], heads: TwoHeads, kind: TwoHeadKind) -> Step:
    def run() -> tuple[Tensor, ...]:
        leaves = heads.student.leaves(kind.frozen)
        return gradients(loss(*leaves), leaves)

    return run


TWO_HEAD_PEERS = {
    "eager": Peer("eager torch", stats=lambda: eager_divergence),
    "compile": Peer("torch.compile", stats=lambda: compiled(eager_divergence)),
    "trl": Peer("TRL ChunkedDivergenceFunction", needs=("trl",), stats=trl_divergence),
    "liger": Peer("LigerFusedLinearJSDLoss", needs=("liger_kernel", "triton"), step=liger_chunked),
    "triton": Peer(
        "LigerFusedLinearJSD",
        needs=("liger_kernel", "triton"),
        step=liger_op,
        devices=("cuda",),
    ),
}


@dataclass(frozen=True)
class MeanDivergence:
    """The mean of the divergences of `tokens` tokens, as a loss of linear_policy_loss."""

    divergence: Divergence
    tokens: int
    token_separable = True

    def __call__(self, stats: DivergenceStats, batch: TokenBatch) -> LossOutput:
        return LossOutput(stats.divergence.sum() / self.tokens, {})


def ways(heads: TwoHeads, kind: TwoHeadKind, peers: tuple[str, ...]) -> dict[str, Step]:
    """title -> a call: divergences [N] without gradient; or the mean of them, dhidden and, unless
    frozen, dweight.
    """
    device = heads.student.hidden.device.type
    chosen = [p for name, p in TWO_HEAD_PEERS.items() if name in peers]
    functions = {p.title: p.load(device) for p in chosen if p.stats}
    if not kind.trains:
        functions = {"fused_rl": fused_divergence, **functions}
        return {title: partial(values, heads, kind, f) for title, f in functions.items()}
    functions = {"fused_rl linear_divergence": fused_divergence, **functions}
    found = {"fused_rl linear_policy_loss": one_pass(heads, kind)}
    found |= {title: partial(through, heads, kind, f) for title, f in functions.items()}
    for peer in (p for p in chosen if p.step):
        peer.check(device)
        found[peer.title] = peer.step(heads, kind)
    return found


@torch.no_grad()
def values(heads: TwoHeads, kind: TwoHeadKind, function: PerToken) -> tuple[Tensor]:
    """Divergences [N]."""
    student = heads.student
    return (function(student.hidden, student.weight, *heads.teacher, kind.beta),)


def through(heads: TwoHeads, kind: TwoHeadKind, function: PerToken) -> tuple[Tensor, ...]:
    """The mean and its gradients."""
    leaves = heads.student.leaves(kind.frozen)
    return gradients(function(*leaves, *heads.teacher, kind.beta).mean(), leaves)


def one_pass(heads: TwoHeads, kind: TwoHeadKind) -> Step:
    """Ours, whose loss is known in the forward pass."""
    labels = heads.student.labels[None]
    batch = TokenBatch.padded(labels, torch.ones_like(labels, dtype=torch.bool), labels.float())
    loss = MeanDivergence(Divergence.JSD(kind.beta), labels.numel())

    def run() -> tuple[Tensor, ...]:
        hidden, weight = heads.student.leaves(kind.frozen)
        teacher = heads.teacher_hidden[None], heads.teacher_weight
        output = linear_policy_loss(hidden[None], weight, batch, loss, reference=teacher)
        return gradients(output.loss, (hidden, weight))

    return run


def two_head_task(heads: TwoHeads, kind: TwoHeadKind) -> Task:
    """A kind of work of two heads."""
    case = heads.student
    (N, H), V = case.hidden.shape, case.weight.shape[0]
    fields = {"case": kind.title, "name": kind.name, "nhv": kind.nhv}
    fields |= {"tokens": N, "hidden": H, "vocabulary": V, "dtype": dtype_name(case.hidden)}
    judge = step_judge(heads, kind) if kind.trains else values_judge(heads, kind)
    error = "gradient_error" if kind.trains else "divergence_error"
    products = bare(factors_of_both(heads, kind.nhv))
    return Task(fields, case.hidden.device, partial(ways, heads, kind), products, judge, error)


def factors_of_both(heads: TwoHeads, nhv: int) -> list[Pair]:
    """Of both heads' logits, and of the student's gradients."""
    student = heads.student.hidden, heads.student.weight
    return factors(*heads.teacher, 2) + factors(*student, nhv - 2)


def values_judge(heads: TwoHeads, kind: TwoHeadKind) -> Judge:
    """Of divergences: the largest error in nats against float64, beside eager torch's own."""
    rows = judged_rows(len(heads.student.labels)).to(heads.student.hidden.device)
    here = heads.student.hidden[rows], heads.student.weight
    teacher = heads.teacher_hidden[rows], heads.teacher_weight
    given = (*here, *teacher)
    exact = eager_divergence(*(t.double() for t in given), kind.beta)

    def error(found: Tensor) -> list[float]:
        return [(found.double() - exact).abs().max().item()]

    of_eager = error(eager_divergence(*given, kind.beta))
    return Judge(lambda result: error(result[0][rows]), [GATE * e for e in of_eager])


def step_judge(heads: TwoHeads, kind: TwoHeadKind) -> Judge:
    """Of dhidden and, unless frozen, dweight, against eager torch's own error."""
    case = heads.student
    small = len(case.labels) * case.weight.numel() <= EXACT_WORK
    dtype = case.hidden.dtype
    widest = torch.float64 if small or dtype == torch.float32 else torch.float32
    count = 1 if kind.frozen else 2
    exact = exact_gradients(heads, kind, widest)[:count]
    of_eager = gradient_error(exact_gradients(heads, kind, dtype), exact)
    return Judge(lambda result: [gradient_error(result[1:], exact)], [GATE * of_eager])


def exact_gradients(
    heads: TwoHeads, kind: TwoHeadKind, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dhidden and dweight of the mean in plain torch, in chunks of tokens, in the dtype given."""
    given = (heads.student.hidden, heads.student.weight, *heads.teacher)
    hidden, weight, teacher_hidden, teacher_weight = (t.to(dtype) for t in given)
    dhidden = torch.zeros_like(hidden)
    dweight = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
    N = len(hidden)
    for i in torch.arange(N, device=hidden.device).split(ROWS):
        h, w = hidden[i].requires_grad_(), weight.detach().requires_grad_()
        loss = eager_divergence(h, w, teacher_hidden[i], teacher_weight, kind.beta).sum() / N
        dhidden[i], dw = torch.autograd.grad(loss, (h, w))
        dweight += dw
    return dhidden, dweight

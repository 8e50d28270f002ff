"""Tasks of pairs: one DPO or SimPO step of the head, with a reference's pass where there is one.

Sequences are of equal padded length, the first half chosen over the second; a quarter of the tokens
are prompts or padding, masked for everybody. A peer's function is (hidden, weight, labels) ->
log-probs [N], and is put under the same loss, in plain torch; Liger's losses are whole steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl import linear_preference_loss, preference
from fused_rl.bench.packages import trl_chunked
from fused_rl.bench.peers import ROWS, SEQUENCES, Peer, compiled, gradients
from fused_rl.bench.products import bare, factors
from fused_rl.bench.tasks import (
    EXACT_WORK,
    GATE,
    Judge,
    Kind,
    Task,
    chunk_gradients,
    dtype_name,
    gradient_error,
)
from fused_rl.bench.two_heads import TwoHeads, factors_of_both

# What everybody's losses are given.
DPO_BETA = 0.1
SIMPO_BETA, GAMMA = 2.0, 1.0

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class PreferenceKind(Kind):
    """nhv: the policy's logits, dhidden and dweight are 2 each, the reference's logits 2."""

    referenced: bool = True


PREFERENCE_KINDS = (
    PreferenceKind("DPO step, head trained", "dpo_step", 8),
    PreferenceKind("DPO step, head frozen", "dpo_step_frozen", 6, frozen=True),
    PreferenceKind("SimPO step, head trained", "simpo_step", 6, referenced=False),
)


@dataclass
class Pairs:
    """A policy's case and a reference's of the same shape; mask: [S, T], True in answers."""

    heads: TwoHeads
    mask: Tensor

    @classmethod
    def make(cls, N: int, H: int, V: int, dtype: torch.dtype, device: str = "cpu") -> Pairs:
        """The same numbers on every device."""
        mask = answers(SEQUENCES, N // SEQUENCES)
        return cls(TwoHeads.make(N, H, V, dtype, device), mask.to(device))

    @property
    def labels(self) -> Tensor:
        """[S, T]"""
        return self.heads.student.labels.reshape(self.mask.shape)

    def shaped(self, hidden: Tensor) -> Tensor:
        """[S, T, H]"""
        return hidden.reshape(*self.mask.shape, -1)


def answers(S: int, T: int) -> Tensor:
    """[S, T] bool: T / 8 tokens of prompt come first, and 0 to T / 4 of padding last, another
    number in every sequence.
    """
    order = 3 * torch.arange(S) % S
    padding = (order * T / (4 * (S - 1))).round()
    at = torch.arange(T)
    return (at >= T // 8) & (at < T - padding[:, None])


def eager_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits in the dtype of the model, log_softmax in float32, and gather."""
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits.to(wide), dim=-1).gather(-1, labels[:, None])[:, 0]


def pair_loss(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor) -> Tensor:
    """DPO beside a reference, SimPO without one, from log-probs [N]."""
    counted = mask.to(logprobs.dtype)
    if ref_logprobs is None:
        sums = (logprobs.reshape(mask.shape) * counted).sum(-1)
        scores, margin = SIMPO_BETA * sums / counted.sum(-1), GAMMA
    else:
        ratios = (logprobs - ref_logprobs).reshape(mask.shape)
        scores, margin = DPO_BETA * (ratios * counted).sum(-1), 0.0
    chosen, rejected = scores.chunk(2)
    return -F.logsigmoid(chosen - rejected - margin).mean()


def trl_logprobs() -> LogProbs:
    """TRL's function of the head, of log-probs alone."""
    function = trl_chunked(outputs=())
    return lambda *given: function(*given)[0]


def liger(pairs: Pairs, kind: PreferenceKind) -> Step:
    """The step by Liger's chunked losses, which take masked labels as -100."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearSimPOLoss

    options = {"compute_nll_loss": False, "compiled": False}
    target = pairs.labels.masked_fill(~pairs.mask, -100)
    if kind.referenced:
        hidden, weight = pairs.heads.teacher
        loss_fn = LigerFusedLinearDPOLoss(beta=DPO_BETA, **options)
        more = {"ref_input": pairs.shaped(hidden), "ref_weight": weight}
    else:
        loss_fn, more = LigerFusedLinearSimPOLoss(beta=SIMPO_BETA, gamma=GAMMA, **options), {}

    def run() -> tuple[Tensor, ...]:
        leaves = hidden, weight = pairs.heads.student.leaves(kind.frozen)
        loss, _ = loss_fn(weight, pairs.shaped(hidden), target, **more)
        return gradients(loss, leaves)

    return run


PREFERENCE_PEERS = {
    "eager": Peer("eager torch", stats=lambda: eager_logprobs),
    "compile": Peer("torch.compile", stats=lambda: compiled(eager_logprobs)),
    "trl": Peer("TRL ChunkedLogProbFunction", needs=("trl",), stats=trl_logprobs),
    "liger": Peer("Liger's chunked loss", needs=("liger_kernel", "triton"), step=liger),
}


def ways(pairs: Pairs, kind: PreferenceKind, peers: tuple[str, ...]) -> dict[str, Step]:
    """title -> a step that returns the loss, dhidden and, unless frozen, dweight."""
    device = pairs.mask.device.type
    found = {"fused_rl linear_preference_loss": fused(pairs, kind)}
    for peer in (p for name, p in PREFERENCE_PEERS.items() if name in peers):
        peer.check(device)
        through = partial(step, pairs, kind)
        found[peer.title] = (
            peer.step(pairs, kind) if peer.step else partial(through, peer.load(device))
        )
    return found


def fused(pairs: Pairs, kind: PreferenceKind) -> Step:
    """Ours."""
    batch = preference.PreferenceBatch.padded(pairs.labels, pairs.mask)
    loss, reference = preference.simpo(SIMPO_BETA, gamma=GAMMA), None
    if kind.referenced:
        hidden, weight = pairs.heads.teacher
        loss, reference = preference.dpo(DPO_BETA), (pairs.shaped(hidden), weight)

    def run() -> tuple[Tensor, ...]:
        leaves = hidden, weight = pairs.heads.student.leaves(kind.frozen)
        given = pairs.shaped(hidden), weight, batch, loss
        return gradients(linear_preference_loss(*given, reference=reference).loss, leaves)

    return run


def step(pairs: Pairs, kind: PreferenceKind, function: LogProbs) -> tuple[Tensor, ...]:
    """The step through log-probs of all tokens; the masked ones' count for nothing."""
    leaves = pairs.heads.student.leaves(kind.frozen)
    labels, known = pairs.heads.student.labels, None
    if kind.referenced:
        with torch.no_grad():
            known = function(*pairs.heads.teacher, labels)
    return gradients(pair_loss(function(*leaves, labels), known, pairs.mask), leaves)


def preference_task(pairs: Pairs, kind: PreferenceKind) -> Task:
    """A kind of step from pairs."""
    case = pairs.heads.student
    (N, H), V = case.hidden.shape, case.weight.shape[0]
    fields = {"case": kind.title, "name": kind.name, "nhv": kind.nhv}
    fields |= {"tokens": N, "hidden": H, "vocabulary": V, "dtype": dtype_name(case.hidden)}
    fields["counted_tokens"] = int(pairs.mask.sum())
    if kind.referenced:
        products = bare(factors_of_both(pairs.heads, kind.nhv))
    else:
        products = bare(factors(case.hidden, case.weight, kind.nhv))
    judge = step_judge(pairs, kind)
    return Task(
        fields, pairs.mask.device, partial(ways, pairs, kind), products, judge, "gradient_error"
    )


def step_judge(pairs: Pairs, kind: PreferenceKind) -> Judge:
    """Of dhidden and, unless frozen, dweight, against eager torch's own error."""
    case = pairs.heads.student
    small = len(case.labels) * case.weight.numel() <= EXACT_WORK
    dtype = case.hidden.dtype
    widest = torch.float64 if small or dtype == torch.float32 else torch.float32
    exact = exact_gradients(pairs, kind, widest)[: 1 if kind.frozen else 2]
    of_eager = gradient_error(exact_gradients(pairs, kind, dtype), exact)
    return Judge(lambda result: [gradient_error(result[1:], exact)], [GATE * of_eager])


def exact_gradients(
    pairs: Pairs, kind: PreferenceKind, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dhidden and dweight of the step in plain torch, in chunks of tokens, in the dtype given."""
    case = pairs.heads.student
    hidden, weight = case.hidden.to(dtype), case.weight.to(dtype)

    @torch.no_grad()
    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        chunks = zip(hidden.split(ROWS), case.labels.split(ROWS), strict=True)
        return torch.cat([eager_logprobs(h, weight, labels) for h, labels in chunks])

    known = logprobs(*(t.to(dtype) for t in pairs.heads.teacher)) if kind.referenced else None
    own = logprobs(hidden, weight).requires_grad_()
    (dlogprobs,) = torch.autograd.grad(pair_loss(own, known, pairs.mask), own)
    return chunk_gradients(hidden, weight, case.labels, dlogprobs)

"""Tasks of the two ops without a product: log-probs from logits, and KL from log-probs.

Memory bounds them, so the bare work is a copy: of the logits, or of both log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fused_rl import KL, kl_penalty, logprobs_from_logits, reference
from fused_rl.bench.packages import liger_selective
from fused_rl.bench.peers import Peer, compiled, eager_of_logits
from fused_rl.bench.records import PRODUCTS
from fused_rl.bench.tasks import GATE, Judge, Task, dtype_name, gradient_error, judged_rows

Way = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

LOGITS_PEERS = {
    "eager": Peer("eager torch", stats=lambda: eager_of_logits),
    "compile": Peer("torch.compile", stats=lambda: compiled(eager_of_logits)),
    "liger": Peer(
        "fused_selective_log_softmax (no entropy)",
        needs=("liger_kernel", "triton"),
        stats=liger_selective,
        trains=False,
        devices=("cuda",),
    ),
}


@dataclass
class Logits:
    """Logits with a standard deviation of 4, and the upstream gradient of their log-probs."""

    logits: Tensor  # [N + 1, V]: one row more than labels, as Liger's kernel takes them
    labels: Tensor  # [N]
    upstream: Tensor  # [N]

    @classmethod
    def make(cls, N: int, V: int, dtype: torch.dtype, device: str) -> Logits:
        """The same numbers on every device."""
        noise = torch.Generator().manual_seed(0)
        logits = (torch.randn(N + 1, V, generator=noise) * 4).to(device, dtype)
        labels = torch.randint(0, V, (N,), generator=noise).to(device)
        return cls(logits, labels, torch.randn(N, generator=noise).to(device))

    def select(self, rows: Tensor, dtype: torch.dtype | None = None) -> Logits:
        """Those tokens, and the row at the end."""
        end = self.logits.new_full((1,), len(self.labels), dtype=torch.int64)
        logits = self.logits[torch.cat([rows, end])].to(dtype or self.logits.dtype)
        return Logits(logits, self.labels[rows], self.upstream[rows])

    def stats(self, way: Way) -> tuple[Tensor, Tensor | None]:
        """logprobs and entropy, without gradient."""
        with torch.no_grad():
            return way(self.logits[:-1], self.labels)[:2]

    def stats_and_gradient(self, way: Way) -> tuple[Tensor | None, ...]:
        """logprobs, entropy, dlogits."""
        leaf = self.logits[:-1].detach().requires_grad_()
        logprobs, entropy = way(leaf, self.labels)[:2]
        (dlogits,) = torch.autograd.grad(logprobs, leaf, self.upstream.to(logprobs.dtype))
        return logprobs.detach(), entropy.detach(), dlogits


def copy(source: Tensor) -> dict[str, Callable[[], object]]:
    """The bare work, into memory that is there."""
    return {PRODUCTS: partial(torch.ones_like(source).copy_, source)}


def of_reference(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return reference.logits_logprobs(logits, labels, torch.ones_like(logits[:, 0]))[:2]


def logits_task(N: int, V: int, dtype: torch.dtype, device: str, trained: bool) -> Task:
    """Log-probs and entropies of logits [N, V]; trained: and the gradient of the logits."""
    case = Logits.make(N, V, dtype, device)
    run = Logits.stats_and_gradient if trained else Logits.stats
    rows = judged_rows(N).to(device)
    exact = run(case.select(rows, torch.float64), of_reference)

    def errors(result: tuple[Tensor | None, ...]) -> list[float]:
        pairs = [(a, b) for a, b in zip(result[:2], exact[:2], strict=True) if a is not None]
        found = [(a.double() - b).abs().max().item() for a, b in pairs]
        return [
            *found,
            *(gradient_error((a,), (b,)) for a, b in zip(result[2:], exact[2:], strict=True)),
        ]

    def of_rows(result: tuple[Tensor | None, ...]) -> list[float]:
        return errors(tuple(None if t is None else t[rows] for t in result))

    def ways(peers: tuple[str, ...]) -> dict[str, Callable[[], tuple]]:
        found = {"fused_rl": partial(run, case, logprobs_from_logits)}
        for title, way in loaded(LOGITS_PEERS, peers, device, trained):
            found[title] = partial(run, case, way)
            if title == LOGITS_PEERS["liger"].title:
                found[title] = partial(way, case.logits[None], case.labels)
        return found

    limits = [GATE * e for e in errors(run(case.select(rows), eager_of_logits))]
    fields = {
        "case": "log-probs of logits" + (", with gradient" if trained else ", no gradient"),
        "name": "logits_logprobs",
        **{"tokens": N, "vocabulary": V, "dtype": dtype_name(case.logits)},
    }
    judge = Judge(of_rows, limits)
    return Task(fields, case.logits.device, ways, copy(case.logits[:-1]), judge, "logprob_error")


def loaded(
    registry: dict[str, Peer], peers: tuple[str, ...], device: str, trained: bool
) -> list[tuple[str, Way]]:
    """title and function of the peers that can do it; Missing, if one is not here."""
    chosen = [registry[name] for name in peers]
    return [(p.title, p.load(device)) for p in chosen if p.trains or not trained]


def eager_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 as trainers write it."""
    d = ref_logprobs - logprobs
    return torch.exp(d) - d - 1


def fused_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Ours: value and derivative in one pass."""
    return kl_penalty(logprobs, ref_logprobs, value=KL.K3)


KL_PEERS = {
    "eager": Peer("eager torch", stats=lambda: eager_kl),
    "compile": Peer("torch.compile", stats=lambda: compiled(eager_kl)),
}


def kl_task(N: int, device: str) -> Task:
    """k3 of N tokens in float32, and its gradient."""
    noise = torch.Generator().manual_seed(0)
    logprobs = -5 * torch.rand(N, generator=noise)
    ref_logprobs = (logprobs + 0.1 * torch.randn(N, generator=noise)).to(device)
    logprobs, upstream = logprobs.to(device), torch.randn(N, generator=noise).to(device)

    def run(way: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = logprobs.detach().requires_grad_()
        penalty = way(leaf, ref_logprobs)
        return penalty.detach(), *torch.autograd.grad(penalty, leaf, upstream)

    d = logprobs.double() - ref_logprobs.double()
    exact = reference.kl(d, reference.K3), upstream * reference.kl_slope(d, reference.K3)

    def errors(result: tuple[Tensor, ...]) -> list[float]:
        return [(a - b).abs().max().item() for a, b in zip(result, exact, strict=True)]

    def ways(peers: tuple[str, ...]) -> dict[str, Callable[[], tuple]]:
        chosen = [("fused_rl", fused_kl), *loaded(KL_PEERS, peers, device, trained=True)]
        return {title: partial(run, way) for title, way in chosen}

    fields = {"case": "k3, with gradient", "name": "kl", "tokens": N, "dtype": "float32"}
    judge = Judge(errors, [GATE * e for e in errors(run(eager_kl))])
    both = torch.stack([logprobs, ref_logprobs])
    return Task(fields, both.device, ways, copy(both), judge, "kl_error")

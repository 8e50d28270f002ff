"""What the benchmark runs: inputs, the bare products, our ways, and the peers beside them.

Most providers are a function (hidden, weight, labels) -> (logprobs, entropy or None); under a loss
it is a training step too. Liger's is a whole step, and has no other use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl.advantages import group_zscore_advantages
from fused_rl.batch import TokenBatch
from fused_rl.logprobs import TokenStats, linear_logprobs
from fused_rl.losses import linear_policy_loss
from fused_rl.named import grpo

# Heads by the name of their model: H, V.
PRESETS = {
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen3-0.6B": (1024, 151936),
    "Qwen3-8B": (4096, 151936),
    "Llama-3.2-1B": (2048, 128256),
    "Llama-3.1-8B": (4096, 128256),
    "Gemma-2-2B": (2304, 256000),
    "DeepSeek-V3": (7168, 129280),
}
SEQUENCES = 8
BETA = 0.04
ROWS = 256  # of logits, where a whole [N, V] is not wanted
TRL_WORDS = 32768  # of the vocabulary at a time, as TRL's trainers ask for

Stats = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
Step = Callable[[], tuple[Tensor, ...]]


@dataclass
class Case:
    """Inputs of one shape; logits have a standard deviation of about 4."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]

    @classmethod
    def make(cls, N: int, H: int, V: int, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same numbers on every device."""
        noise = torch.Generator().manual_seed(0)
        hidden = (torch.randn(N, H, generator=noise) * 4 / H**0.5).to(device, dtype)
        weight = torch.randn(V, H, generator=noise).to(device, dtype)
        return cls(hidden, weight, torch.randint(0, V, (N,), generator=noise).to(device))

    def leaves(self, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """hidden and weight; both want a gradient, or hidden alone."""
        weight = self.weight.detach()
        return self.hidden.detach().requires_grad_(), weight.requires_grad_(not frozen)


def products(case: Case, nhv: int) -> Callable[[], None]:
    """The bare matrix products: 2 NHV for the logits, 2 for dhidden, 2 for dweight."""
    hidden, weight = case.hidden, case.weight
    dlogits = None
    if nhv > 2:
        shape = (hidden.shape[0], weight.shape[0])
        dlogits = torch.randn(shape, dtype=hidden.dtype, device=hidden.device)

    def run() -> None:
        hidden @ weight.T
        if nhv >= 4:
            dlogits @ weight
        if nhv >= 6:
            dlogits.T @ hidden

    return run


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What most trainers do: logits in the dtype of the model, softmax in float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp = F.log_softmax(F.linear(hidden, weight).to(wide), dim=-1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> TokenStats:
    """Ours, for any loss."""
    return linear_logprobs(hidden, weight, labels)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor):
    """torch's own; log-probs in the dtype of hidden, no entropy."""
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none"), None


def compiled() -> Stats:
    """eager, through torch.compile; compiled at its first call."""
    return torch.compile(eager, dynamic=False)


def trl_chunked() -> Stats:
    """The autograd function under TRL's trainers, from 1.16 on."""
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        options = (None, labels, 1.0, TRL_WORDS, None, 1.0, ("entropy",))
        return ChunkedLogProbFunction.apply(hidden, weight, *options)[:2]

    return run


class Missing(Exception):
    """A peer that is not to be had here, and why."""


@dataclass(frozen=True)
class Peer:
    """title: its name in tables. needs: what must be installed. stats: loads its function, where
    it has one. trains: whether that can be put under a loss.
    """

    title: str
    needs: tuple[str, ...] = ()
    stats: Callable[[], Stats] | None = None
    trains: bool = True

    def load(self) -> Stats:
        """stats(), or Missing."""
        self.check()
        try:
            return self.stats()
        except (ImportError, AttributeError) as error:
            raise Missing(f"{self.title}: {error}") from error

    def check(self) -> None:
        """Missing, if a package that it needs is not installed."""
        if absent := [name for name in self.needs if find_spec(name) is None]:
            raise Missing(f"{self.title}: {', '.join(absent)} is not installed")


def _of_torch() -> Stats:
    if not hasattr(F, "linear_cross_entropy"):
        raise Missing(f"F.linear_cross_entropy: not in torch {torch.__version__}")
    return torch_linear_cross_entropy


PEERS = {
    "eager": Peer("eager torch", stats=lambda: eager),
    "compile": Peer("torch.compile", stats=compiled),
    "torch": Peer("F.linear_cross_entropy (no entropy)", stats=_of_torch, trains=False),
    "liger": Peer("LigerFusedLinearGRPOLoss", needs=("liger_kernel", "triton")),
    "trl": Peer("TRL chunked", needs=("trl",), stats=trl_chunked),
}
# torch.compile takes minutes on a cpu.
USUAL_PEERS = {"cpu": ("eager", "torch", "liger", "trl"), "cuda": tuple(PEERS)}


def no_grad(case: Case, peers: tuple[str, ...]) -> dict[str, Callable]:
    """title -> a call that returns log-probs and entropies."""
    args = (case.hidden, case.weight, case.labels)
    chosen = {"fused_rl": fused}
    chosen |= {PEERS[p].title: PEERS[p].load() for p in peers if PEERS[p].stats}
    return {title: torch.no_grad()(lambda f=f: f(*args)) for title, f in chosen.items()}


def batch_of(case: Case, counted: float = 1.0) -> TokenBatch:
    """Eight sequences, slightly off-policy; the last (1 - counted) of each is masked."""
    shape = (SEQUENCES, case.hidden.shape[0] // SEQUENCES)
    with torch.no_grad():
        pieces = zip(case.hidden.split(ROWS), case.labels.split(ROWS), strict=True)
        now = torch.cat([eager(h, case.weight, y)[0] for h, y in pieces]).reshape(shape)
    noise = torch.Generator().manual_seed(1)
    # All but the labels is float32, so that every dtype of the head sees the same batch.
    near = [now.cpu().float() + 0.05 * torch.randn(shape, generator=noise) for _ in range(2)]
    mask = torch.arange(shape[1]).expand(shape) < round(counted * shape[1])
    advantages = group_zscore_advantages(torch.rand(SEQUENCES, generator=noise), SEQUENCES)
    device = case.hidden.device
    return TokenBatch.padded(
        case.labels.reshape(shape),
        mask.to(device),
        advantages.to(device),
        old_logprobs=near[0].to(device),
        ref_logprobs=near[1].to(device),
    )


def gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The loss, and its gradients for the leaves that want one."""
    wanted = [t for t in leaves if t.requires_grad]
    return (value.detach(), *torch.autograd.grad(value, wanted))


def steps(case: Case, batch: TokenBatch, peers: tuple[str, ...], frozen: bool) -> dict[str, Step]:
    """title -> a GRPO step that returns the loss, dhidden and, unless frozen, dweight."""
    loss = grpo(beta=BETA)

    def one_pass() -> tuple[Tensor, ...]:
        hidden, weight = case.leaves(frozen)
        shaped = hidden.reshape(*batch.shape, -1)
        output = linear_policy_loss(shaped, weight, batch, loss)
        return gradients(output.loss, (hidden, weight))

    def through(stats: Stats) -> tuple[Tensor, ...]:
        hidden, weight = case.leaves(frozen)
        here = TokenStats(*stats(hidden, weight, batch.labels))
        return gradients(loss(here, batch).loss, (hidden, weight))

    # Ours are told which tokens count; the peers' functions know no mask, and get them all.
    chosen = {
        "fused_rl linear_policy_loss": one_pass,
        "fused_rl linear_logprobs": lambda: through(fused),
    }
    for peer in (PEERS[name] for name in peers):
        if peer.stats and peer.trains:
            stats = peer.load()
            chosen[peer.title] = lambda f=stats: through(lambda h, w, _: f(h, w, case.labels))
    if "liger" in peers:
        PEERS["liger"].check()
        chosen[PEERS["liger"].title] = liger(case, batch, frozen)
    return chosen


def liger(case: Case, batch: TokenBatch, frozen: bool) -> Step:
    """The same step by Liger's chunked loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=BETA, compiled=False, use_ref_model=True, loss_type="grpo", temperature=1.0
    )
    shape = batch.shape
    mask = batch.loss_mask.reshape(shape).float()

    def run() -> tuple[Tensor, ...]:
        hidden, weight = case.leaves(frozen)
        value, _ = module(
            hidden.reshape(*shape, -1),
            weight,
            case.labels.reshape(shape),
            mask,
            batch.advantages.reshape(shape)[:, 0],
            ref_per_token_logps=batch.ref_logprobs.reshape(shape),
            old_per_token_logps=batch.old_logprobs.reshape(shape),
        )
        return gradients(value, (hidden, weight))

    return run

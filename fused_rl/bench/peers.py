"""What the benchmark runs: inputs, our ways, and the peers beside them.

Most providers are a function (hidden, weight, labels) -> (logprobs, entropy or None); under a loss
it is a training step too. Liger's losses are whole steps, and have no other use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl.bench.packages import Stats, cut_cross_entropy, quack, trl_chunked
from fused_rl.linear.logprobs import linear_logprobs
from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.named import grpo
from fused_rl.one_pass.policy_loss import linear_policy_loss
from fused_rl.rollouts.advantages import group_zscore_advantages
from fused_rl.stats import TokenStats

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
CLIP = 0.2  # of grpo(), for peers whose own default is another

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


def eager_of_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax in float32, and gather."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = F.log_softmax(logits.to(wide), dim=-1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What most trainers do: logits in the dtype of the model, softmax in float32."""
    return eager_of_logits(F.linear(hidden, weight), labels)


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> TokenStats:
    """Ours, for any loss."""
    return linear_logprobs(hidden, weight, labels)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor):
    """torch's own; log-probs in the dtype of hidden, no entropy."""
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none"), None


def compiled(function: Callable = eager) -> Callable:
    """The function through torch.compile; compiled at its first call."""
    # A shape is a graph, and after eight graphs of one function dynamo would run it uncompiled.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


class Missing(Exception):
    """A peer that is not to be had here, and why."""


@dataclass(frozen=True)
class Peer:
    """title: its name in tables. needs: what must be installed. stats: loads its function, where
    it has one. step: makes its step of (case, batch, frozen), where it is a whole one. trains:
    whether its function can be put under a loss. devices: where it runs.
    """

    title: str
    needs: tuple[str, ...] = ()
    stats: Callable[[], Stats] | None = None
    step: Callable[[Case, TokenBatch, bool], Step] | None = None
    trains: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")

    def load(self, device: str = "cpu") -> Stats:
        """stats(), or Missing."""
        self.check(device)
        try:
            return self.stats()
        except (ImportError, AttributeError) as error:
            raise Missing(f"{self.title}: {error}") from error

    def check(self, device: str = "cpu") -> None:
        """Missing, if it does not run on the device, or a package that it needs is not there."""
        if device not in self.devices:
            raise Missing(f"{self.title}: runs on {', '.join(self.devices)} only")
        if absent := [name for name in self.needs if find_spec(name) is None]:
            raise Missing(f"{self.title}: {', '.join(absent)} is not installed")


def _of_torch() -> Stats:
    if not hasattr(F, "linear_cross_entropy"):
        raise Missing(f"F.linear_cross_entropy: not in torch {torch.__version__}")
    return torch_linear_cross_entropy


def no_grad(case: Case, peers: tuple[str, ...]) -> dict[str, Callable]:
    """title -> a call that returns log-probs and entropies."""
    args = (case.hidden, case.weight, case.labels)
    chosen = {"fused_rl": fused}
    device = case.hidden.device.type
    chosen |= {PEERS[p].title: PEERS[p].load(device) for p in peers if PEERS[p].stats}
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
        logprobs, entropy = stats(hidden, weight, batch.labels)
        # The loss has no entropy bonus: where a peer forms no entropies, zeros do.
        here = TokenStats(logprobs, torch.zeros_like(logprobs) if entropy is None else entropy)
        return gradients(loss(here, batch).loss, (hidden, weight))

    # Ours are told which tokens count; the peers' functions know no mask, and get them all.
    chosen = {
        "fused_rl linear_policy_loss": one_pass,
        "fused_rl linear_logprobs": lambda: through(fused),
    }
    device = case.hidden.device.type
    for peer in (PEERS[name] for name in peers):
        if peer.step:
            peer.check(device)
            chosen[peer.title] = peer.step(case, batch, frozen)
        elif peer.trains:
            stats = peer.load(device)
            chosen[peer.title] = lambda f=stats: through(lambda h, w, _: f(h, w, case.labels))
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


def liger_from_logits(case: Case, batch: TokenBatch, frozen: bool) -> Step:
    """The same step by Liger's Triton loss of the logits, which wants one position over labels."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def of(tensor: Tensor) -> Tensor:
        return tensor.reshape(batch.shape)

    settings = {"temperature": 1.0, "beta": BETA, "eps_low": CLIP, "eps_high": CLIP}
    known = (of(batch.old_logprobs), of(batch.ref_logprobs), of(case.labels))
    rest = (of(batch.advantages)[:, 0].contiguous(), of(batch.loss_mask).int())

    def run() -> tuple[Tensor, ...]:
        hidden, weight = case.leaves(frozen)
        logits = F.linear(F.pad(hidden.reshape(*batch.shape, -1), (0, 0, 0, 1)), weight)
        value, _ = triton_grpo_loss(
            logits, *known, *rest, loss_type="grpo", reduce=True, **settings
        )
        return gradients(value, (hidden, weight))

    return run


PEERS = {
    "eager": Peer("eager torch", stats=lambda: eager),
    "compile": Peer("torch.compile", stats=compiled),
    "torch": Peer("F.linear_cross_entropy (no entropy)", stats=_of_torch, trains=False),
    "liger": Peer("LigerFusedLinearGRPOLoss", needs=("liger_kernel", "triton"), step=liger),
    "triton": Peer(
        "triton_grpo_loss",
        needs=("liger_kernel", "triton"),
        step=liger_from_logits,
        devices=("cuda",),
    ),
    "trl": Peer("TRL chunked", needs=("trl",), stats=trl_chunked),
    "cce": Peer(
        "cut-cross-entropy (no entropy)",
        needs=("cut_cross_entropy", "triton"),
        stats=cut_cross_entropy,
        devices=("cuda",),
    ),
    "quack": Peer("QuACK (no entropy)", needs=("quack",), stats=quack, devices=("cuda",)),
}
USUAL_PEERS = {
    device: tuple(name for name, peer in PEERS.items() if device in peer.devices)
    for device in ("cpu", "cuda")
}

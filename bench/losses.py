"""A GRPO step at the head: loss, dhidden and dweight, ours beside the peers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from linear_logprobs import Case, eager
from torch import Tensor

import fused_rl
from fused_rl import TokenBatch, TokenStats

SEQUENCES = 8
BETA = 0.04


def batch_of(case: Case, counted: float = 1.0) -> TokenBatch:
    """Eight sequences, slightly off-policy; the last (1 - counted) of each is masked."""
    shape = (SEQUENCES, case.hidden.shape[0] // SEQUENCES)
    old = fused_rl.linear_logprobs(case.hidden, case.weight, case.labels).logprobs.reshape(shape)
    mask = torch.arange(shape[1]).expand(shape) < round(counted * shape[1])
    noise = torch.Generator().manual_seed(1)
    return TokenBatch.padded(
        case.labels.reshape(shape),
        mask,
        fused_rl.group_zscore_advantages(torch.rand(SEQUENCES, generator=noise), SEQUENCES),
        old_logprobs=old + 0.05 * torch.randn(shape, generator=noise),
        ref_logprobs=old + 0.05 * torch.randn(shape, generator=noise),
    )


def steps(
    case: Case, counted: float = 1.0, frozen: bool = False
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """name -> a step that returns the loss and the gradients."""
    batch = batch_of(case, counted)
    loss = fused_rl.grpo(beta=BETA)

    def gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wanted = [t for t in leaves if t.requires_grad]
        return (value.detach(), *torch.autograd.grad(value, wanted))

    def one_pass() -> tuple[Tensor, ...]:
        hidden, weight = case.leaves(frozen)
        shaped = hidden.reshape(*batch.shape, -1)
        return gradients(
            fused_rl.linear_policy_loss(shaped, weight, batch, loss).loss, (hidden, weight)
        )

    def autograd() -> tuple[Tensor, ...]:
        hidden, weight = case.leaves(frozen)
        stats = fused_rl.linear_logprobs(hidden, weight, batch.labels)
        return gradients(loss(stats, batch).loss, (hidden, weight))

    def plain() -> tuple[Tensor, ...]:
        hidden, weight = case.leaves(frozen)
        stats = TokenStats(*eager(hidden, weight, case.labels))
        return gradients(loss(stats, batch).loss, (hidden, weight))

    providers = {
        "fused_rl linear_policy_loss": one_pass,
        "fused_rl linear_logprobs": autograd,
        "eager torch": plain,
    }
    if find_spec("liger_kernel") and find_spec("triton"):
        providers["LigerFusedLinearGRPOLoss"] = _liger(case, batch, frozen, gradients)
    return providers


def _liger(case: Case, batch: TokenBatch, frozen: bool, gradients) -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=BETA, compiled=False, use_ref_model=True, loss_type="grpo", temperature=1.0
    )
    shape = batch.shape
    mask = batch.loss_mask.reshape(shape)

    def run() -> tuple[Tensor, ...]:
        hidden, weight = case.leaves(frozen)
        value, _ = module(
            hidden.reshape(*shape, -1),
            weight,
            case.labels.reshape(shape),
            mask.float(),
            batch.advantages.reshape(shape)[:, 0],
            ref_per_token_logps=batch.ref_logprobs.reshape(shape),
            old_per_token_logps=batch.old_logprobs.reshape(shape),
        )
        return gradients(value, (hidden, weight))

    return run

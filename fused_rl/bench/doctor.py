"""What `fused-rl doctor` says: which kernels run here, and whether they are right.

On a GPU each operator runs once, which compares its kernels with plain torch as any first use does.
"""

from __future__ import annotations

import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch

import fused_rl
from fused_rl.ops import trust


def report() -> list[str]:
    """The lines."""
    with warnings.catch_warnings():
        # What is wrong stands in a line of its own.
        warnings.simplefilter("ignore", RuntimeWarning)
        tried = used_once(torch.device("cuda")) if torch.cuda.is_available() else []
    lines = []
    for backend in fused_rl.backends():
        lines += [f"{backend.device:<14}{backend.kernel}", f"{'':<14}{backend.note}"]
    for verdict in tried:
        lines.append(f"{'':<14}{verdict.kernel}: {verdict.error or 'right'}")
    lines += [f"{'fused_rl':<14}{fused_rl.__version__}", f"{'torch':<14}{torch.__version__}"]
    lines += [f"{name:<14}{installed_version(name)}" for name in ("triton", "transformers")]
    lines.append(f"{'python':<14}{platform.python_version()}")
    lines.append(f"{'threads':<14}{torch.get_num_threads()}")
    return lines


def used_once(device: torch.device) -> list[trust.Verdict]:
    """Runs each operator on a small case in bfloat16; what their first uses have shown."""
    noise = torch.Generator(device).manual_seed(0)
    where = {"generator": noise, "device": device}
    weight = torch.randn(640, 64, **where).bfloat16()
    labels = torch.randint(0, 640, (4, 16), **where)
    mask = torch.ones(4, 16, dtype=torch.bool, device=device)
    batch = fused_rl.TokenBatch.padded(labels, mask, torch.ones(4, device=device))
    for trained in (False, True):
        hidden = torch.randn(4, 16, 64, **where).bfloat16().requires_grad_()
        head = weight.clone().requires_grad_(trained)
        fused_rl.linear_logprobs(hidden, head, labels).logprobs.sum().backward()
        fused_rl.linear_policy_loss(hidden, head, batch, fused_rl.grpo()).loss.backward()
    logits = torch.randn(64, 640, **where).requires_grad_()
    stats = fused_rl.logprobs_from_logits(logits, labels.flatten())
    stats.logprobs.sum().backward()
    fused_rl.kl_penalty(stats.logprobs.detach(), torch.zeros_like(stats.logprobs))
    return trust.verdicts()


def installed_version(name: str) -> str:
    """The version of a distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

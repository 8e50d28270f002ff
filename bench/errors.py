"""Whether the ops are right on a device, before anything is timed: against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from decisions import UNPROVEN, unproven

import fused_rl
from fused_rl.bench.records import Record

LOGPROB_ERROR = 5e-5
# Relative error that gradients may have: a rounding or two to the dtype.
BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# N, H, V: few tokens and many take different ways through the forward pass.
CHECKED = {"few tokens": (40, 96, 5003), "many tokens": (520, 40, 300)}


def correctness(device: torch.device) -> tuple[Record, dict[str, str]]:
    """dtype, size -> errors of logprobs, entropy (largest) and dhidden, dweight, dbias (relative);
    of logprobs, entropy and dlogits for rows of logits; of a divergence, an entropy and gradients
    for two heads. And what was over its budget or raised, by name: a wrong case is a result, and
    the others are still to be seen.
    """
    found: Record = {}
    wrong: dict[str, str] = {}
    for dtype, budget in BUDGET.items():
        short = str(dtype).removeprefix("torch.")
        found[short] = {}
        for name, run in _checks(dtype, device).items():
            try:
                of = run()
            except Exception as failure:
                wrong[f"{short}, {name}"] = f"{type(failure).__name__}: {failure}"[:400]
                continue
            found[short][name] = of
            # Written so that NaN is wrong.
            if not (all(e <= LOGPROB_ERROR for e in of[:2]) and all(e <= budget for e in of[2:])):
                wrong[f"{short}, {name}"] = f"errors {of}"
    return found, wrong


def _checks(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], list[float]]]:
    """By name; each runs with the kernels that are off by default, too."""
    found = {n: partial(head_errors, (dtype, dtype), device, *s) for n, s in CHECKED.items()}
    if dtype == torch.bfloat16:
        mixed = (dtype, torch.float32)
        found["float32 head"] = partial(head_errors, mixed, device, *CHECKED["many tokens"])
    # In float32, and for logits, they are the same kernels.
    others = {} if dtype == torch.float32 else found
    found |= {name + UNPROVEN: unproven(run) for name, run in others.items()}
    found |= {"two heads": partial(divergence_errors, dtype, device)}
    return found | {"logits": partial(logits_errors, dtype, device)}


def head_errors(
    dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, N: int, H: int, V: int
) -> list[float]:
    """dtypes: of hidden states and weight."""
    torch.manual_seed(0)
    of_hidden, of_weight = dtypes
    inputs = [torch.randn(N, H).to(of_hidden), torch.randn(V, H).to(of_weight), torch.randn(V)]
    labels = torch.randint(0, V, (N,)).where(torch.rand(N) < 0.8, -100)
    temperature = torch.rand(N, dtype=torch.float64) + 0.5

    def stats(leaves: list[torch.Tensor]) -> fused_rl.TokenStats:
        head = fused_rl.LMHead(leaves[1], leaves[2], scale=0.7, softcap=5.0)
        t = temperature.to(leaves[0].device, torch.promote_types(leaves[0].dtype, torch.float32))
        here = labels.to(leaves[0].device)
        return fused_rl.linear_logprobs(leaves[0], head, here, temperature=t)

    return errors_of(stats, inputs, device)


def divergence_errors(dtype: torch.dtype, device: torch.device) -> list[float]:
    """Of a divergence and the teacher's entropy, and of their gradients on both sides."""
    torch.manual_seed(2)
    N, H, V = 10, 40, 5003
    inputs = [(torch.randn(n, H) / s).to(dtype) for n, s in ((N, 4), (V, 1), (N, 4), (V, 1))]
    labels = torch.randint(0, V, (N,)).where(torch.rand(N) < 0.8, -100)

    def stats(leaves: list[torch.Tensor]) -> fused_rl.TokenStats:
        hidden, weight, teacher_hidden, teacher_weight = leaves
        of = fused_rl.Divergence.JSD(0.3)
        heads = (hidden, weight, teacher_hidden, teacher_weight)
        found = fused_rl.linear_divergence(*heads, labels.to(hidden.device), divergence=of)
        return fused_rl.TokenStats(found.divergence, found.teacher_entropy)

    return errors_of(stats, inputs, device)


def logits_errors(dtype: torch.dtype, device: torch.device) -> list[float]:
    torch.manual_seed(1)
    logits, labels = (torch.randn(20, 5003) * 4).to(dtype), torch.randint(0, 5003, (20,))
    return errors_of(
        lambda leaves: fused_rl.logprobs_from_logits(leaves[0], labels.to(leaves[0].device)),
        [logits],
        device,
    )


def errors_of(stats: Callable, inputs: list[torch.Tensor], device: torch.device) -> list[float]:
    """Of stats(inputs) and the gradients of a random sum of it, against the same in float64."""
    weights = None
    results = []
    for where, dtype in (("cpu", torch.float64), (device, None)):
        leaves = [t.to(where, dtype or t.dtype).requires_grad_() for t in inputs]
        found = stats(leaves)
        if weights is None:
            weights = torch.randn(2, len(found.logprobs), dtype=torch.float64)
        up = [w.to(where, found.logprobs.dtype) for w in weights]
        objective = (found.logprobs * up[0]).sum() + (found.entropy * up[1]).sum()
        grads = torch.autograd.grad(objective, leaves)
        results.append([t.detach().double().cpu() for t in (*found, *grads)])
    exact, ours = results
    errors = [(a - b).abs().max().item() for a, b in zip(ours[:2], exact[:2], strict=True)]
    pairs = zip(ours[2:], exact[2:], strict=True)
    return errors + [((a - b).norm() / b.norm()).item() for a, b in pairs]

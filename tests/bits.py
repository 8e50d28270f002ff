"""One hash per case of what the core computes: run it on two commits and compare.

    python tests/bits.py > before.txt      # then, on the other commit
    python tests/bits.py | diff before.txt -

Values and gradients of linear_logprobs, linear_top_logprobs, linear_kept_logprobs,
linear_logprobs_at, linear_policy_loss, logprobs_from_logits and kl_penalty, over dtypes, heads,
masks, chunks and ways, on this CPU. Equal lines are equal bits. Not a test: other CPUs and torches
round otherwise.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

import fused_rl

N, H, V = 45, 40, 1100
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def digest(*tensors: Tensor | None) -> str:
    sha = hashlib.sha256()
    for t in tensors:
        if t is not None:
            sha.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def heads(dtype: torch.dtype, trained: bool) -> Iterator[tuple[str, fused_rl.LMHead]]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype) / 4
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype)
    for name, options in {
        "plain": {},
        "bias": {"bias": bias},
        "capped": {"bias": bias, "scale": 0.7, "softcap": 3.0},
    }.items():
        leaves = {"weight": weight, **{k: v for k, v in options.items() if k == "bias"}}
        leaves = {k: v.clone().requires_grad_(trained) for k, v in leaves.items()}
        rest = {k: v for k, v in options.items() if k != "bias"}
        yield name, fused_rl.LMHead(**leaves, **rest)


def tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::4] = -100
    temperature = torch.rand(N, generator=generator) + 0.5
    return hidden.requires_grad_(), labels, temperature


def gradients(outputs: tuple[Tensor, ...], hidden: Tensor, head: fused_rl.LMHead) -> list[Tensor]:
    leaves = [t for t in (hidden, head.weight, head.bias) if t is not None and t.requires_grad]
    generator = torch.Generator().manual_seed(3)
    ups = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    return list(torch.autograd.grad(outputs, leaves, ups))


def kept_sets(labels: Tensor) -> tuple[Tensor, Tensor]:
    rows = [sorted({int(y) % V, *range(n % 7, 40 + n, 3)}) for n, y in enumerate(labels.tolist())]
    sizes = torch.tensor([0, *map(len, rows)])
    return torch.tensor(list(itertools.chain(*rows))), sizes.cumsum(0)


def batch(labels: Tensor) -> fused_rl.TokenBatch:
    generator = torch.Generator().manual_seed(4)
    shape = (5, N // 5)
    old, ref = (-6 - torch.rand(shape, generator=generator) for _ in range(2))
    advantages = torch.randn(shape[0], generator=generator)
    mask = (labels != -100).view(shape)
    return fused_rl.TokenBatch.padded(
        labels.view(shape), mask, advantages, old_logprobs=old, ref_logprobs=ref
    )


LOSSES = {
    "grpo": lambda: fused_rl.grpo(beta=0.1, entropy_coef=0.01),
    "dapo": lambda: fused_rl.dapo(),
    "cispo": lambda: fused_rl.cispo(),
    "gspo": lambda: fused_rl.gspo(beta=0.1, kl=fused_rl.KL.K2),
    "rloo": lambda: fused_rl.rloo(),
}


def cases() -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    for dtype, trained in itertools.product(DTYPES, (True, False)):
        for head_name, head in heads(dtype, trained):
            name = f"{str(dtype)[6:]} {head_name} {'trained' if trained else 'frozen'}"
            hidden, labels, temperature = tokens(dtype)
            for chunk_bytes, filter_ in ((None, None), (4 * V * 16, None), (None, 1e-3)):
                options = {"temperature": temperature, "chunk_bytes": chunk_bytes}
                stats = fused_rl.linear_top_logprobs(
                    hidden, head, labels, grad_filter=filter_, **options
                )
                grads = gradients(stats[:2], hidden, head)
                yield f"{name} linear {chunk_bytes} {filter_}", (*stats, *grads)
            with torch.no_grad():
                stats = fused_rl.linear_logprobs(hidden, head, labels, temperature=temperature)
            yield f"{name} no gradient", tuple(stats)
            sets = kept_sets(labels)
            stats = fused_rl.linear_kept_logprobs(hidden, head, labels, *sets, temperature=0.8)
            yield f"{name} kept", (*stats, *gradients(tuple(stats), hidden, head))
            ids = torch.stack([labels, (labels + 7).clamp(0, V - 1)], -1)
            stats = fused_rl.linear_logprobs_at(hidden, head, ids, temperature=temperature)
            yield f"{name} at", (*stats, *gradients(tuple(stats), hidden, head))
            logits = fused_rl.linear.linear_logits_at(hidden, head, ids, temperature=temperature)
            yield f"{name} logits at", (logits, *gradients((logits,), hidden, head))
            of = batch(labels)
            for loss_name, chunk_bytes in itertools.product(LOSSES, (None, 4 * V * 16)):
                output = fused_rl.linear_policy_loss(
                    hidden.view(5, N // 5, H),
                    *(head, of, LOSSES[loss_name]()),
                    temperature=0.9,
                    chunk_bytes=chunk_bytes,
                )
                grads = gradients((output.loss,), hidden, head)
                yield f"{name} {loss_name} {chunk_bytes}", (output.loss, *grads)
                metrics = tuple(output.metrics[k] for k in sorted(output.metrics))
                yield f"{name} {loss_name} {chunk_bytes} metrics", metrics
    for dtype in DTYPES:
        hidden, labels, temperature = tokens(dtype)
        logits = (hidden.detach().repeat(1, 30) * 2).requires_grad_()
        labels = labels.where(labels < 0, labels % logits.shape[1])
        stats = fused_rl.logprobs_from_logits(logits, labels, temperature=temperature)
        yield f"{str(dtype)[6:]} logits", (*stats, *torch.autograd.grad(sum(stats).sum(), logits))
        for value, grad in itertools.product(fused_rl.KL, fused_rl.KL):
            p = (hidden[:, 0].detach() * 3).requires_grad_()
            penalty = fused_rl.kl_penalty(p, hidden[:, 1].detach(), value=value, grad=grad)
            slope = torch.autograd.grad(penalty.sum(), p)
            yield f"{str(dtype)[6:]} {value.name} {grad.name}", (penalty, *slope)


if __name__ == "__main__":
    for name, tensors in cases():
        print(digest(*tensors), name)

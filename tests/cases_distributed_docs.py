"""A block of docs/distributed.md on a rank, and its gradients beside those of one process."""

import os

import torch
import torch.distributed as dist
from cases_spread import relative
from cases_tensor_parallel import model_of, saved
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import fused_rl


def rollouts(sequences=4, T=8, V=97):
    """Of the whole step: what ranks with tokens of their own have is a share of it."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (sequences, T), generator=g)
    mask = torch.rand(sequences, T, generator=g) > 0.3
    mask[-1] = False
    advantages = torch.randn(sequences, generator=g, dtype=torch.float64)
    old = -torch.rand(sequences, T, generator=g, dtype=torch.float64) * 4
    return ids, mask, advantages, old


def batch_of(ids, mask, advantages, old):
    # The state at t predicts the token at t + 1.
    return fused_rl.TokenBatch.padded(ids.roll(-1, 1), mask, advantages, old_logprobs=old)


def of_one_process(model, formed):
    """The gradients of the whole step."""
    given = rollouts()
    hidden = model.model(given[0]).last_hidden_state
    head = fused_rl.LMHead.from_model(model)
    fused_rl.linear_policy_loss(hidden, head, batch_of(*given), formed).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def plain(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(rank, world, source, share, loss="dapo"):
    """The largest relative difference of a gradient; share: whether ranks have different tokens."""
    exact = of_one_process(model_of(), getattr(fused_rl, loss)())
    given = rollouts()
    if share:
        per_rank = len(given[0]) // world
        given = [t[rank * per_rank : (rank + 1) * per_rank] for t in given]
    model = model_of()
    names = {
        "model": model,
        "ids": given[0],
        "batch": batch_of(*given),
        **dict(zip(("mask", "advantages", "old_logprobs"), given[1:], strict=True)),
        "folder": saved(model, rank) if "folder" in source else None,
        "torch": torch,
        "dist": dist,
        "fused_rl": fused_rl,
    }
    # What torchrun sets, and transformers reads.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    exec(compile(source, "docs/distributed.md", "exec"), names)
    if "tp_plan" in source:
        assert isinstance(names["model"].lm_head.weight, DTensor)
    if isinstance(names.get("policy"), FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(
            names["policy"], with_grads=True, writeback=False
        ):
            return largest(names, exact, rank)
    return largest(names, exact, rank)


def largest(names, exact, rank):
    differences = []
    for name, p in names["model"].named_parameters():
        key = name.replace("_fsdp_wrapped_module.", "")
        if p.grad is None:
            assert "rows" in names and key == "lm_head.weight", key
            start = rank * len(names["rows"])
            expected = exact[key][start : start + len(names["rows"])]
            differences.append(relative(names["rows"].grad[: len(expected)], expected))
        else:
            differences.append(relative(plain(p.grad), exact[key]))
    assert len(differences) == len(exact)
    return max(differences)


def log_probs(rank, world, source):
    """The largest relative difference of a statistic that the block has named `stats`."""
    model, ids = model_of(), rollouts()[0]
    labels = ids.roll(-1, 1)
    head = fused_rl.LMHead.from_model(model)
    exact = fused_rl.linear_logprobs(model.model(ids).last_hidden_state, head, labels)
    names = {"model": model, "ids": ids, "torch": torch, "dist": dist, "fused_rl": fused_rl}
    exec(compile(source, "docs/distributed.md", "exec"), names)
    return max(relative(a.T, b) for a, b in zip(names["stats"], exact, strict=True))

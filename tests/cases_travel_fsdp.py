"""Tokens that travel to the head of a model whose other layers are FSDP2's."""

import torch
import torch.distributed as dist
from cases_spread import relative
from cases_tensor_parallel import compared, model_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard, distribute_tensor

from fused_rl import (
    LMHead,
    TokenBatch,
    across,
    dapo,
    linear_policy_loss,
    model_policy_loss,
)
from fused_rl.parallel.states import Hidden

B, T = 4, 8


def tokens(V):
    """Of the whole step; the sequences of the second half count a few tokens only."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) > 0.2
    mask[B // 2 :, 2:] = False
    return ids, mask, torch.randn(B, generator=g, dtype=torch.float64)


def batch_of(ids, mask, advantages):
    return TokenBatch.padded(ids.roll(-1, 1), mask, advantages)


def sharded(model, mesh, root):
    """The model as FSDP2 has it, the head beside it: whole rows, a part of them on each rank."""
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if root == "backbone":
        fully_shard(model.model, mesh=mesh)
    else:
        fully_shard(model, mesh=mesh, ignored_params={model.lm_head.weight})
    return model


def loss_of(model, mesh, ids, batch):
    hidden = model.model(ids).last_hidden_state
    options = {"group": mesh.get_group(), "hidden": Hidden.OWN_TOKENS}
    head = LMHead(model.lm_head.weight, **options)
    return linear_policy_loss(hidden, head, batch, dapo()).loss


def fsdp2(rank, world, root="backbone", micro_batches=1, V=97):
    """The largest relative difference of a gradient from that of one process with all tokens."""
    model = model_of(V=V)
    ids, mask, advantages = tokens(V)
    hidden = model.model(ids).last_hidden_state
    whole = LMHead(model.lm_head.weight)
    exact = linear_policy_loss(hidden, whole, batch_of(ids, mask, advantages), dapo()).loss
    exact.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (world,))
    model = sharded(model_of(V=V), mesh, root)
    run = loss_of
    if root == "model":
        type(model).loss_by_the_head = lambda self, *args: loss_of(self, *args)
        register_fsdp_forward_method(model, "loss_by_the_head")
        run = lambda model, *args: model.loss_by_the_head(*args)  # noqa: E731
    mine = slice(rank * B // world, (rank + 1) * B // world)
    whole_batch = across(batch_of(*(t[mine] for t in (ids, mask, advantages))))
    counts = {n: getattr(whole_batch, n) for n in ("num_tokens", "num_sequences")}
    total = 0.0
    for part in torch.arange(B)[mine].chunk(micro_batches):
        batch = batch_of(*(t[part] for t in (ids, mask, advantages)))
        for name, count in counts.items():
            object.__setattr__(batch, name, count)
        loss = run(model, mesh, ids[part], batch)
        loss.backward()
        total += loss.detach() / world
    dist.all_reduce(total)
    assert model.lm_head.weight.grad.placements == (Shard(0),)
    # The optimizer's side: one norm over the head and the rest.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf).full_tensor()
    exact_norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    differences = compared(model, gradients), relative(norm, exact_norm)
    return relative(total, exact), max(differences)


def by_the_model(rank, world, root):
    """What the doors say that would take the head for gathered, or for tensor-parallel."""
    mesh, said = init_device_mesh("cpu", (world,)), []
    model = sharded(model_of(), mesh, root)
    ids, mask, advantages = (t[: 1 + rank] for t in tokens(97))
    hidden, batch = torch.ones(1 + rank, T, 32).double(), batch_of(ids, mask, advantages)
    for call in (
        lambda: LMHead.from_model(model, ask=False),
        lambda: model_policy_loss(model, hidden, batch, dapo(), ask=False),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said

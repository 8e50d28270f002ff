"""Cases of tensor-parallel models: transformers' plan, torch's, and DTensors given by hand."""

import os
import tempfile

import torch
import torch.distributed as dist
from cases_spread import relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fused_rl import LMHead, TokenBatch, dapo, linear_policy_loss


def model_of(tied=False, V=97, softcap=None, dtype=torch.float64):
    from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": V}
    sizes |= {"tie_word_embeddings": tied}
    torch.manual_seed(0)
    if softcap:
        config = Gemma2Config(final_logit_softcapping=softcap, head_dim=8, **sizes)
        return Gemma2ForCausalLM(config).to(dtype)
    return Qwen2ForCausalLM(Qwen2Config(**sizes)).to(dtype)


def tokens(V=97, B=2, T=8):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) > 0.2
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    # The state at t predicts the token at t + 1.
    return ids, TokenBatch.padded(ids.roll(-1, 1), mask, advantages)


def step(model, hidden, batch):
    output = linear_policy_loss(hidden, LMHead.from_model(model), batch, dapo())
    output.loss.backward()
    return output.loss


def alone(**options):
    """The loss and gradients of the model on one rank."""
    model = model_of(**options)
    ids, batch = tokens(model.config.vocab_size)
    loss = step(model, model.model(ids).last_hidden_state, batch)
    return model, loss, {n: p.grad for n, p in model.named_parameters()}


def compared(model, exact):
    """The largest relative difference of a gradient."""
    found = {n: p.grad for n, p in model.named_parameters()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
    assert whole.keys() == exact.keys()
    return max(relative(whole[n], g) for n, g in exact.items())


def saved(model, rank):
    """A folder that every rank can read."""
    where = [tempfile.mkdtemp()] if rank == 0 else [None]
    dist.broadcast_object_list(where)
    if rank == 0:
        model.save_pretrained(where[0])
    dist.barrier()
    return where[0]


def transformers_plan(rank, world, **options):
    """tp_plan="auto", asked for its logits."""
    from transformers import AutoModelForCausalLM

    model, loss, exact = alone(**options)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    options = {"tp_plan": "auto", "dtype": torch.float64}
    parallel = AutoModelForCausalLM.from_pretrained(saved(model, rank), **options)
    assert len(LMHead.from_model(parallel).weight) < model.config.vocab_size
    ids, batch = tokens(model.config.vocab_size)
    found = step(parallel, parallel.model(ids).last_hidden_state, batch)
    return relative(found, loss), compared(parallel, exact)


def torch_plan(rank, world, sequence=False, V=97):
    """A head by ColwiseParallel; hidden states replicated, or cut along the sequence."""
    _, loss, exact = alone(V=V)
    parallel = model_of(V=V)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    plan = {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    parallelize_module(parallel, mesh, plan)
    ids, batch = tokens(V)
    hidden = parallel.model(ids).last_hidden_state
    if sequence:
        hidden = DTensor.from_local(hidden, mesh, [Replicate()]).redistribute(placements=[Shard(1)])
    found = step(parallel, hidden, batch)
    return relative(found, loss), compared(parallel, exact)


def placed_by_hand(rank, world):
    """DTensors of weight, bias and hidden states, given with their group; wrong ones refused."""
    mesh = init_device_mesh("cpu", (world,))
    g = torch.Generator().manual_seed(0)
    weight, bias, hidden = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((97, 16), (97,), (4, 6, 16))
    )
    labels = torch.randint(0, 97, (4, 6), generator=g)
    batch = TokenBatch.padded(labels, torch.ones(4, 6, dtype=torch.bool), torch.randn(4))
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    exact = linear_policy_loss(leaves[0], LMHead(*leaves[1:]), batch, dapo())
    exact.loss.backward()
    w, b = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (weight, bias))
    head = LMHead(w, b, group=mesh.get_group())
    differences = []
    for placement in (Replicate(), Shard(0), Shard(1)):
        if isinstance(placement, Shard) and hidden.shape[placement.dim] % world:
            continue
        h = distribute_tensor(hidden, mesh, [placement]).requires_grad_()
        w.grad = b.grad = None
        head = LMHead(w, b, group=mesh.get_group())
        found = linear_policy_loss(h, head, batch, dapo())
        found.loss.backward()
        grads = [t.grad.full_tensor() for t in (h, w, b)]
        differences += [relative(a, t.grad) for a, t in zip(grads, leaves, strict=True)]
        differences.append(relative(found.loss, exact.loss))
    said = []
    for make in (
        lambda: LMHead(w),
        lambda: LMHead(distribute_tensor(weight, mesh, [Replicate()]), group=mesh.get_group()),
        lambda: linear_policy_loss(
            distribute_tensor(hidden, mesh, [Shard(2)]), head, batch, dapo()
        ),
    ):
        try:
            make()
        except ValueError as error:
            said.append(str(error))
    return max(differences), said

"""Cases of heads that are not here: each a ValueError on every rank, or the right answer."""

import torch
from cases_shards import (
    LOSS,
    Inside,
    backwards,
    build,
    distance,
    gradients,
    one_process,
    shard,
    share,
    states,
    stepped,
    tokens,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

from fused_rl import (
    LMHead,
    across,
    linear_logprobs,
    linear_policy_loss,
    model_policy_loss,
)


def said(call):
    """What the ValueError says; what comes instead of one."""
    try:
        return f"no error, but {call()}"
    except ValueError as error:
        return str(error)


def own_unit(rank, world):
    """A head that is an FSDP2 unit of its own, read by hand in every way that comes to mind."""
    model = shard(build(), "own", reshard=True)
    ids, batch = tokens(share(rank, world))
    hidden, labels = states(model, ids).detach(), batch.labels.reshape(batch.shape).clamp(min=0)
    layer = model.lm_head
    found = {
        "the weight": said(lambda: LMHead(layer.weight)),
        "the layer": said(lambda: linear_logprobs(hidden, layer, labels)),
        "the model": said(lambda: LMHead.from_model(model)),
        "full_tensor": said(lambda: LMHead(layer.weight.full_tensor())),
        "cast": said(lambda: LMHead(layer.weight.full_tensor().double()[:50])),
        "to_local": said(lambda: linear_logprobs(hidden, layer.weight.to_local(), labels * 0)),
    }
    layer.unshard()
    stale, right = LMHead(layer.weight), linear_logprobs(hidden, layer, labels).logprobs
    layer.reshard()
    found["stale"] = said(lambda: linear_logprobs(hidden, stale, labels))
    with torch.no_grad():
        gathered = linear_logprobs(hidden, layer.weight.full_tensor(), labels).logprobs
    return found, torch.equal(gathered, right)


def first_generation(rank, world, unit, original):
    """FSDP1, beside its forward."""
    model = build()
    policy = CustomPolicy(lambda m: unit == "own" and m is model.lm_head)
    options = {"use_orig_params": original, "device_id": torch.device("cpu")}
    outer = FSDP1(model, auto_wrap_policy=policy, **options)
    ids, _ = tokens(share(rank, world))
    states(outer, ids)
    return {
        "the model": said(lambda: LMHead.from_model(model, ask=False)),
        "the wrapper": said(lambda: LMHead.from_model(outer)),
        "the layer": said(lambda: LMHead.of(model.lm_head)),
    }


def averaged_by_hand(rank, world, placement):
    """full_tensor() with the placement of its gradient said: the error of the head's gradient."""
    model = build()
    _, expected = one_process(model)
    shard(model, "own", reshard=True)
    ids, batch = tokens(share(rank, world))
    said = {"avg": Partial("avg"), "same": Replicate()}[placement]
    weight = model.lm_head.weight.full_tensor(grad_placements=[said])
    linear_policy_loss(states(model, ids), weight, across(batch), LOSS).loss.backward()
    return distance(gradients(model), expected)


def nobody_gathers(rank, world):
    """The model given, and the module around it that is sharded not."""
    model = build()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(Inside(model), reshard_after_forward=True)
    _, batch = tokens(share(rank, world))
    hidden = torch.zeros(*batch.shape, model.config.hidden_size)
    return said(lambda: model_policy_loss(model, hidden, batch, LOSS))


def wrapped(rank, world):
    return said(lambda: LMHead.from_model(DDP(build())))


def tensor_parallel(rank, world, shards, unit):
    """Two ranks of a group share the vocabulary; the groups, if there are two, the tokens, and
    every weight by FSDP2. The error of loss and gradients.
    """
    model = build()
    expected = one_process(model)
    mesh = init_device_mesh("cpu", (shards, world // shards), mesh_dim_names=("data", "rows"))
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate(), use_local_output=True)}
    parallelize_module(model, mesh["rows"], plan)
    if shards > 1:
        shard(model, unit, reshard=True, mesh=mesh["data"])
    ids, batch = tokens(share(rank // (world // shards), shards))
    batch = across(batch, mesh["data"].get_group())

    def run():
        return backwards(model_policy_loss(model, states(model, ids), batch, LOSS).loss)

    return stepped(model, run, expected, steps=1)

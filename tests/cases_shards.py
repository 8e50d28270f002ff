"""Cases of models whose weights engines keep in shards: gradients beside those of one process."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import fused_rl
from fused_rl import LMHead, TokenBatch, across, linear_policy_loss, model_policy_loss
from fused_rl.one_pass.through import through

V, H, B, T = 97, 32, 4, 7


@cache
def _config():
    import transformers

    return transformers.Qwen2Config(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        attn_implementation="eager",
    )


def build(tied=False, frozen=False, halved=False, dtype=torch.float32):
    """halved: its logits are half of what its head gives, and nothing in its config says so."""
    from transformers import Qwen2ForCausalLM

    class Halved(Qwen2ForCausalLM):
        def forward(self, *args, **inputs):
            output = super().forward(*args, **inputs)
            output.logits = output.logits * 0.5
            return output

    torch.manual_seed(3)
    config = copy.deepcopy(_config())
    config.tie_word_embeddings = tied
    model = (Halved if halved else Qwen2ForCausalLM)(config).eval().to(dtype)
    model.lm_head.weight.requires_grad_(not frozen)
    return model


def tokens(rows, empty=()):
    """Ids [n, T] of some of the step's sequences, and the batch; `empty` ones count nothing."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T - 1, generator=generator) < torch.linspace(0.3, 1.0, B)[:, None]
    mask[list(empty)] = False
    advantages = torch.randn(B, generator=generator)
    old = -torch.rand(B, T - 1, generator=generator)
    return ids[rows], TokenBatch.padded(
        ids[rows, 1:], mask[rows], advantages[rows], old_logprobs=old[rows]
    )


LOSS = fused_rl.grpo(entropy_coef=0.1)


def one_process(model, empty=(), loss=LOSS):
    """The loss and the gradients of all parameters, of the whole step."""
    model = copy.deepcopy(model)
    ids, batch = tokens(slice(None), empty)
    hidden = model.model(ids).last_hidden_state[:, :-1]
    output = linear_policy_loss(hidden, LMHead.from_model(model), batch, loss)
    output.loss.backward()
    return output.loss.detach(), gradients(model)


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def distance(found, expected):
    """The largest relative error of a gradient, inf where one is missing or NaN."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, gradient in expected.items():
        if found[name] is None:
            return math.inf
        error = ((found[name] - gradient).norm() / gradient.norm()).item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def mean(value):
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def share(rank, world):
    return slice(rank * B // world, (rank + 1) * B // world)


def states(model, ids):
    """Hidden states from the model's own forward."""
    return model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1][:, :-1]


def shard(model, unit, reshard=None, **options):
    """FSDP2: every layer, and the head in a unit of its own, with the norm, or with the model."""
    if reshard is not None:
        options["reshard_after_forward"] = reshard
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if unit == "own":
        fully_shard(model.lm_head, **options)
    if unit == "pair":
        fully_shard([model.model.norm, model.lm_head], **options)
    return fully_shard(model, **options)


def policy_loss(self, ids, batch):
    """A method of a model: inside its forward, hidden states come from its backbone."""
    hidden = self.model(ids).last_hidden_state[:, :-1]
    return model_policy_loss(self, hidden, batch, LOSS).loss


def stepped(model, run, expected, found=gradients, steps=2, worst=3e-6):
    """Steps of run(), which does the backward pass; the error of loss and gradients.

    Two steps, so that what one leaves behind is seen.
    """
    value, wanted = expected
    for _ in range(steps):
        model.zero_grad()
        loss = run()
        error = distance(found(model), wanted)
        assert error < worst, error
    return max(error, ((mean(loss) - value) / value).abs().item())


def backwards(loss):
    loss.backward()
    return loss


def fsdp2(
    rank,
    world,
    unit,
    reshard=None,
    inside=False,
    tied=False,
    frozen=False,
    halved=False,
    empty=(),
    mesh=(),
):
    """mesh: copies, and the shards of each: hybrid sharding."""
    model = build(tied, frozen, halved)
    expected = one_process(model, empty)
    mesh = mesh or (world,)
    names = ("copies", "shards")[-len(mesh) :]
    mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
    shard(model, unit, reshard, mesh=mesh)
    type(model).policy_loss = policy_loss
    register_fsdp_forward_method(model, "policy_loss")
    ids, batch = tokens(share(rank, world), empty)
    batch = across(batch)

    def run():
        if inside:
            return backwards(model.policy_loss(ids, batch))
        return backwards(model_policy_loss(model, states(model, ids), batch, LOSS).loss)

    return stepped(model, run, expected)


def fsdp1(rank, world, unit, original=True, inside=False):
    """`inside` the forward of a module of one's own around the model; else after FSDP1's."""
    model = build()
    expected = one_process(model)
    head, layer = model.lm_head, type(model.model.layers[0])
    policy = CustomPolicy(lambda m: isinstance(m, layer) or (unit == "own" and m is head))
    options = {"use_orig_params": original, "device_id": torch.device("cpu")}
    outer = FSDP1(Inside(model) if inside else model, auto_wrap_policy=policy, **options)
    ids, batch = tokens(share(rank, world))
    batch = across(batch)

    def run():
        if inside:
            return backwards(outer(ids, batch))
        return backwards(model_policy_loss(outer, states(outer, ids), batch, LOSS).loss)

    def found(outer):
        """By a step of 1 from parameters that are 0."""
        grads = [p.grad for p in outer.parameters()]
        for parameter, gradient in zip(outer.parameters(), grads, strict=True):
            parameter.data = gradient if gradient is not None else torch.zeros_like(parameter.data)
        with FSDP1.summon_full_params(outer, writeback=False):
            names = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in outer.named_parameters()}
            return {
                n.removeprefix(
                    "model.",
                )
                if inside
                else n: p.detach().clone()
                for n, p in names.items()
            }

    return stepped(outer, run, expected, found, steps=1)


class Inside(torch.nn.Module):
    """A module of a user around a model, whose forward is the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, batch):
        return policy_loss(self.model, ids, batch)


def ddp(rank, world, where, **options):
    """After DDP's forward, after the backbone's alone, which DDP hears nothing of, or inside."""
    model = build()
    expected = one_process(model)
    outer = DDP(Inside(model) if where == "inside" else model, **options)
    ids, batch = tokens(share(rank, world))
    batch = across(batch)

    def run():
        if where == "inside":
            return backwards(outer(ids, batch))
        if where == "after":
            hidden = states(outer, ids)
        else:
            hidden = model.model(ids).last_hidden_state[:, :-1]
        return backwards(model_policy_loss(outer, hidden, batch, LOSS).loss)

    return stepped(model, run, expected)


def micro_batches(rank, world, engine, unit="own", reduce=None, reshard=None):
    """Two of them, synchronised at the second: together they are the step."""
    model = build()
    expected = one_process(model)
    if engine == "fsdp2":
        policy = MixedPrecisionPolicy(reduce_dtype=reduce)
        outer = shard(model, unit, reshard, mp_policy=policy)
    else:
        outer = DDP(model)
    rows, size = share(rank, world), B // world // 2
    whole = across(tokens(rows)[1])
    counts = {"num_tokens": whole.num_tokens, "num_sequences": whole.num_sequences}

    def run():
        total = 0.0
        for i in range(2):
            ids, batch = tokens(slice(rows.start + i * size, rows.start + (i + 1) * size))
            quiet = nullcontext()
            if engine == "fsdp2":
                outer.set_requires_gradient_sync(i == 1)
            elif i == 0:
                quiet = outer.no_sync()
            with quiet:
                args = (states(outer, ids), replace(batch, **counts), LOSS)
                total = total + backwards(model_policy_loss(outer, *args).loss).detach()
        return total

    return stepped(model, run, expected)


def half_precision(rank, world, unit, output):
    """bfloat16 parameters, float32 sums: the error beside that of bfloat16 on one process, and the
    dtype of the loss, whatever that of the model's outputs.
    """
    model = build()
    _, exact = one_process(model)
    alone = one_process(build(dtype=torch.bfloat16))[1]
    own = distance({n: g.float() for n, g in alone.items()}, exact)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output)
    shard(model, unit, mp_policy=policy)
    ids, batch = tokens(share(rank, world))
    loss = model_policy_loss(model, states(model, ids), across(batch), LOSS).loss
    loss.backward()
    return distance(gradients(model), exact) / own, str(loss.dtype)


def float64(rank, world, unit):
    model = build(dtype=torch.float64)
    expected = one_process(model)
    shard(model, unit)
    ids, batch = tokens(share(rank, world))
    batch = across(batch)

    def run():
        return backwards(model_policy_loss(model, states(model, ids), batch, LOSS).loss)

    return stepped(model, run, expected, worst=1e-12)


def patched_model(rank, world, unit):
    """Log-probs from a patched model's own forward, and a loss of them."""
    from fused_rl.integrations.transformers import patch_model

    model = build()
    expected = one_process(model)
    patch_model(model)
    shard(model, unit)
    ids, batch = tokens(share(rank, world))
    batch = across(batch)
    return stepped(
        model, lambda: backwards(LOSS(model(ids, return_logprobs=True), batch).loss), expected
    )


def evaluated(rank, world, unit):
    """Without gradients, twice: the loss, and whether the weight is in shards again."""
    model = build()
    value, _ = one_process(model)
    shard(model, unit, reshard=True)
    ids, batch = tokens(share(rank, world))
    with torch.no_grad():
        for _ in range(2):
            loss = model_policy_loss(model, states(model, ids), across(batch), LOSS).loss
    sharded = isinstance(model.lm_head.weight, DTensor)
    return ((mean(loss) - value) / value).abs().item(), sharded


def two_calls(rank, world, unit, inside=False, loss=LOSS):
    """Two policy losses of one forward, of a sequence each, and one backward pass."""
    model = build()
    expected = one_process(model, loss=loss)
    shard(model, unit, reshard=True)

    def summed(self, ids, counts):
        hidden = self.model(ids).last_hidden_state[:, :-1] if inside else states(self, ids)
        total = 0.0
        for i in range(len(ids)):
            row = share(rank, world).start + i
            batch = replace(tokens(slice(row, row + 1))[1], **counts)
            total = total + model_policy_loss(self, hidden[i : i + 1], batch, loss).loss
        return total

    if inside:
        type(model).summed = summed
        register_fsdp_forward_method(model, "summed")
    ids, batch = tokens(share(rank, world))
    whole = across(batch)
    counts = {"num_tokens": whole.num_tokens, "num_sequences": whole.num_sequences}
    run = (lambda: model.summed(ids, counts)) if inside else (lambda: summed(model, ids, counts))
    return stepped(model, lambda: backwards(run()), expected)


def another_function(rank, world, unit):
    """Log-probs of the head alone, through its call."""
    model = build()
    expected = one_process(model)
    shard(model, unit, reshard=True)
    ids, batch = tokens(share(rank, world))
    labels, batch = batch.labels.reshape(batch.shape), across(batch)

    def scored(layer, hidden):
        return tuple(t.clone() for t in fused_rl.linear_logprobs(hidden, layer.weight, labels))

    def run():
        stats = through(model.lm_head, scored, states(model, ids))
        return backwards(LOSS(fused_rl.TokenStats(*stats), batch).loss)

    return stepped(model, run, expected)

"""Cases of DeepSpeed, whose processes are then of no use for others."""

import os
import sys

import torch
from cases_shards import (
    LOSS,
    Inside,
    build,
    one_process,
    share,
    states,
    stepped,
    tokens,
)

from fused_rl import across, model_policy_loss


def engine_of(model, stage, rank, world):
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511, "DS_ACCELERATOR": "cpu"}
    os.environ.update({name: str(value) for name, value in said.items()})
    import deepspeed

    # An extension that would be compiled; gloo does without.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"config": config, "dist_init_required": False}
    return deepspeed.initialize(model=model, optimizer=optimizer, **options)[0]


def zero(rank, world, stage, where, empty=(), tied=False):
    """After the engine's forward, after the backbone's alone, or inside the engine's."""
    model = build(tied=tied, halved=True)
    expected = one_process(model, empty)
    engine = engine_of(Inside(model) if where == "inside" else model, stage, rank, world)
    from deepspeed.utils import safe_get_full_grad

    ids, batch = tokens(share(rank, world), empty)
    batch, found = across(batch), {}

    def run():
        if where == "inside":
            loss = engine(ids, batch)
        elif where == "after":
            loss = model_policy_loss(engine, states(engine, ids), batch, LOSS).loss
        else:
            hidden = model.model(ids).last_hidden_state[:, :-1]
            loss = model_policy_loss(engine, hidden, batch, LOSS).loss
        engine.backward(loss)
        found.update({n: safe_get_full_grad(p) for n, p in model.named_parameters()})
        engine.step()
        return loss

    return stepped(model, run, expected, lambda _: found)

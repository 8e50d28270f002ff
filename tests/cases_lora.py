"""Cases of a head with LoRA on ranks that have tokens of their own, beside one process."""

import torch
from cases_shards import (
    DDP,
    FSDP1,
    LOSS,
    backwards,
    build,
    model_policy_loss,
    one_process,
    shard,
    share,
    states,
    stepped,
    tokens,
)

from fused_rl import LMHead, across


def with_adapters(**options):
    """On the head, and on the layers beneath it."""
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head", "q_proj", "down_proj"])
    model = peft.inject_adapter_in_model(config, build(**options))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def trained(rank, world, engine, unit="own", reshard=None):
    model = with_adapters()
    expected = one_process(model)
    assert any("lm_head.lora_B" in name for name in expected[1])
    outer = model
    if engine == "fsdp2":
        shard(model, unit, reshard)
    elif engine == "fsdp1":
        outer = FSDP1(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        outer = DDP(model)
    ids, batch = tokens(share(rank, world))
    batch = across(batch)

    def run():
        return backwards(model_policy_loss(outer, states(outer, ids), batch, LOSS).loss)

    if engine == "fsdp1":
        return stepped(outer, run, expected, _of_fsdp1, steps=1)
    return stepped(model, run, expected)


def _of_fsdp1(outer):
    """The gradients of its flat parameters, by a step of 1 from 0."""
    grads = {n: p.grad for n, p in outer.named_parameters() if p.requires_grad}
    for name, parameter in outer.named_parameters():
        if name in grads:
            gradient = grads[name]
            parameter.data = gradient if gradient is not None else torch.zeros_like(parameter)
    with FSDP1.summon_full_params(outer, writeback=False):
        named = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in outer.named_parameters()}
        return {n: p.detach().clone() for n, p in named.items() if p.requires_grad}


def refused(rank, world):
    """What is said of a head whose rows are spread over ranks, and of factors in shards."""
    from torch import distributed as dist

    model = with_adapters()
    (adapter,) = LMHead.from_model(model).adapters
    weight, said = model.lm_head.weight.detach(), []
    rows = slice(rank * 49, rank * 49 + 49)
    shard(model, "root", reshard=True)
    layer = model.lm_head
    for form in (
        lambda: LMHead(
            weight[rows],
            group=dist.group.WORLD,
            start=rank * 49,
            vocabulary=97,
            adapters=(adapter.of_rows(rows),),
        ),
        lambda: LMHead.from_model(model),
        lambda: LMHead.of(layer),
    ):
        try:
            form()
        except ValueError as error:
            said.append(str(error))
    return said

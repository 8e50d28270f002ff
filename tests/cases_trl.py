"""TRL's trainers under accelerate, on ranks: what each way of a step makes of the same weights.

accelerate takes FSDP and DeepSpeed for things of accelerators, and on a CPU gives DDP in silence.
`ranks_of` lets it see a rank per accelerator, in the processes of these cases alone.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from tiny_models import word_tokenizer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

import fused_rl
from fused_rl.integrations import trl as integration
from fused_rl.integrations.trl.divergence import NAMES, FusedDivergence
from fused_rl.integrations.trl.gathered import averaged
from fused_rl.integrations.trl.logprobs import FusedHead

V, T = 23, 7
LOGGED = ("loss", "grad_norm", "reward", "entropy")
# Options of a trainer's config.
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {"use_cpu": True},
    # accelerate makes a unit of the last norm and the head.
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
    # The head is a unit of its own, which is sharded where TRL reads its weight.
    "fsdp2_own_unit": {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Linear"]},
    },
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}
_ZERO = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@contextmanager
def ranks_of(kind: str, rank: int, world: int) -> Iterator[None]:
    """What a launcher says, and an accelerate that does not look for the accelerator."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500, "HF_HUB_OFFLINE": 1}
    if "deepspeed" in KINDS[kind]:
        said |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    backend = staticmethod(lambda *_: ("gloo", DistributedType.MULTI_GPU))
    device = lambda self: setattr(self, "device", torch.device("cpu"))  # noqa: E731 - a method
    seen = {"_prepare_backend": backend, "set_device": device} if kind != "ddp" else {}
    with (
        mock.patch.dict(os.environ, {name: str(value) for name, value in said.items()}),
        mock.patch.multiple(PartialState, **seen) if seen else nullcontext(),
    ):
        if "deepspeed" in KINDS[kind]:
            import deepspeed  # noqa: F401

            # An extension that would be compiled; gloo does without.
            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def reward(completions: list[str], **_: object) -> list[float]:
    """The share of the first five words."""
    words = [c.split() for c in completions]
    return [sum(w in ("w0", "w1", "w2", "w3", "w4") for w in ws) / T for ws in words]


def trainer_of(name: str, way: str, paths: list[str], **options: Any) -> Any:
    """A trainer of the model in paths[0]; the teacher is that of paths[1]."""
    import trl
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    defaults = {
        "output_dir": os.path.join(paths[0], "out"),
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "log_level": "error",
        "per_device_train_batch_size": 4,
        "max_completion_length": T,
        "temperature": 0.7,
        "learning_rate": 1e-2,
    }
    prompts = [f"w{i} w{i + 5} w{i + 9}"[: None if i % 2 else 5] for i in range(8)]
    given = {
        "model": paths[0],
        "processing_class": word_tokenizer(V),
        "train_dataset": Dataset.from_dict({"prompt": prompts}),
    }
    if name == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        del defaults["max_completion_length"]
        tokenizer = given["processing_class"]
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        answers = [f"w{i + 2} w3 w{i}"[: None if i % 3 else 5] for i in range(8)]
        said = [
            [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
            for p, a in zip(prompts, answers, strict=True)
        ]
        given["train_dataset"] = Dataset.from_dict({"messages": said})
        args = GKDConfig(max_length=20, max_new_tokens=T, lmbda=0.5, **(defaults | options))
        trainer = GKDTrainer(**given, teacher_model=paths[1], args=args)
    elif name in ("CPO", "ORPO"):
        trainer = _of_pairs(name, given, {**defaults, "max_length": 20} | options)
    elif name == "distillation":
        args = trl.DistillationConfig(**(defaults | options))
        trainer = trl.DistillationTrainer(**given, teacher_model=paths[1], args=args)
    else:
        args = trl.GRPOConfig(**(defaults | {"num_generations": 4} | options))
        given |= {"reward_funcs": reward, "args": args}
        if way == "config":
            trainer = integration.FusedGRPOTrainer(**given)
        elif way == "fused":
            beta = options.get("beta", 0.0)
            kl = fused_rl.KLPenalty(beta, importance=fused_rl.Level.TOKEN) if beta else None
            loss = dataclasses.replace(fused_rl.dapo(clip_high=0.2), kl=kl)
            trainer = integration.FusedGRPOTrainer(**given, policy_loss=loss)
        else:
            trainer = trl.GRPOTrainer(**given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _of_pairs(name: str, given: dict[str, Any], options: dict[str, Any]) -> Any:
    """A CPOTrainer or an ORPOTrainer, of a model that is loaded already."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.experimental import cpo, orpo

    del options["max_completion_length"], options["temperature"]
    pairs = {
        "prompt": given["train_dataset"]["prompt"],
        "chosen": [" w3 w4 w5 w6 w7"[: 3 + 3 * (i % 5)] for i in range(8)],
        "rejected": [" w7 w2 w8 w9 w2"[: 3 + 3 * (2 * i % 5)] for i in range(8)],
    }
    module = {"CPO": cpo, "ORPO": orpo}[name]
    given = {**given, "train_dataset": Dataset.from_dict(pairs)}
    # Config first: ZeRO-3 shards a model as it is loaded.
    given["args"] = getattr(module, f"{name}Config")(**options)
    given["model"] = AutoModelForCausalLM.from_pretrained(given["model"])
    return getattr(module, f"{name}Trainer")(**given)


def whole(weight: Tensor) -> Tensor:
    """A parameter, whatever has sharded it."""
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach().full_tensor() if isinstance(weight, DTensor) else weight.detach().clone()


def steps(
    rank: int,
    world: int,
    *,
    kind: str,
    way: str,
    paths: list[str],
    trainer: str = "grpo",
    count: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Steps of a trainer by one way, "trl", "patched", "fused" or "config" (fused, with the loss of
    its config): what was logged, and the head.
    """
    options |= KINDS[kind]
    if "deepspeed" in options:
        options["deepspeed"] = _ZERO | options["deepspeed"]
    with ranks_of(kind, rank, world):
        made = trainer_of(trainer, way, paths, max_steps=count, **options)
        with integration.patched() if way == "patched" else nullcontext():
            made.train()
        head = made.accelerator.unwrap_model(made.model).get_output_embeddings()
        log = made.state.log_history
        return {
            "logged": {name: [e[name] for e in log if name in e] for name in LOGGED},
            "head": whole(head.weight).flatten().tolist(),
            "wrapper": type(made.model_wrapped).__name__,
        }


def of_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """A loss by what stands for TRL's function of log-probs."""
    names = ("hidden", "weight", "bias", "targets", "temperature", "chunk_size")
    logprobs, entropy = FusedHead(None, names).apply(hidden, weight, bias, targets, 0.7, 8)
    return (0.1 * entropy - logprobs).sum()


def of_divergence(hidden: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Tensor:
    """A loss by what stands for TRL's function of divergences, from a teacher that is sharper."""
    teacher = (hidden.detach(), 2 * weight.detach(), bias.detach())
    return FusedDivergence(None, NAMES).apply(hidden, weight, bias, *teacher, 0.5)[0].sum()


def own_unit(
    rank: int, world: int, *, mesh: list[int], cast: bool = False, alike: bool = False
) -> list[float]:
    """A head that is sharded where TRL reads it: the distance of its gradients from the mean over
    ranks of those of the whole head, as a share of that mean; of log-probs, and of divergences,
    after two micro-batches.

    cast: the gathered weight is cast, as TRL's distillation does.
    alike: all ranks have the same tokens, as in tensor parallelism.
    """
    H, rows, N = 6, 9, 5
    distances = []
    for of in (of_log_probs, of_divergence):
        torch.manual_seed(7)
        dtype = torch.float32 if cast else torch.float64
        layer = torch.nn.Linear(H, rows, dtype=dtype)
        values = [t.detach().double() for t in (layer.weight, layer.bias)]
        names = ("replicate", "shard")[-len(mesh) :]
        fully_shard(layer, mesh=init_device_mesh("cpu", tuple(mesh), mesh_dim_names=names))
        means = [torch.zeros_like(t) for t in values]
        for micro in range(2):
            seeds = [10 * micro + (0 if alike else r) for r in range(world)]
            data = [torch.Generator().manual_seed(seed) for seed in seeds]
            inputs = [
                (torch.randn(N, H, generator=g).double(), torch.randint(rows, (N,), generator=g))
                for g in data
            ]
            gathered = [t.full_tensor().double() for t in (layer.weight, layer.bias)]
            assert all(torch.equal(a, b) for a, b in zip(gathered, values, strict=True))
            of(inputs[rank][0], *gathered, inputs[rank][1]).backward()
            for hidden, targets in inputs:
                leaves = [t.clone().requires_grad_() for t in values]
                of(hidden, *leaves, targets).backward()
                means = [m + t.grad / world for m, t in zip(means, leaves, strict=True)]
        for parameter, mean in zip((layer.weight, layer.bias), means, strict=True):
            error = parameter.grad.full_tensor().double() - mean
            distances.append((error.norm() / mean.norm()).item())
    return distances


def left_alone(rank: int, world: int) -> list[bool]:
    """Whether weights whose gradients are right already are returned themselves."""
    layer = torch.nn.Linear(6, 9)
    fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
    layer.unshard()
    gathered_by_fsdp = layer.weight
    layer.reshard()
    with torch.no_grad():
        not_trained = layer.weight.full_tensor()
    said = layer.weight.full_tensor(grad_placements=[Partial("avg")])
    plain = torch.randn(9, 6, requires_grad=True)
    weights = (gathered_by_fsdp, not_trained, said, plain, 2 * plain)
    return [averaged(weight) is weight for weight in weights]


def scaled(rank: int, world: int) -> str:
    """What is said of a weight that was gathered, and then became another one."""
    layer = torch.nn.Linear(6, 9, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
    weight = 2 * layer.weight.full_tensor()
    hidden, targets = torch.randn(5, 6), torch.randint(9, (5,))
    try:
        of_log_probs(hidden, weight, None, targets)
    except ValueError as error:
        return str(error)
    return "nothing"

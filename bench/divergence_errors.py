"""Errors of divergences from bfloat16 states, ours and the peers', as the teacher comes nearer.

    python bench/divergence_errors.py --out bench/results/divergence-errors.json
    python bench/divergence_errors.py --readme bench/results/divergence-errors.json
                                                        measures nothing: the table of the page

Of 256 tokens, H = 256 and V = 4000: the relative error of the mean divergence, and of its gradients
by norm, the larger of dhidden and dweight, against float64 of the same bfloat16 numbers. Liger's op
runs in Triton's interpreter, in a process of its own, with products in float32, as on CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from run import PAGE, replace_block
from torch import Tensor

from fused_rl.bench.peers import gradients
from fused_rl.bench.records import Content, Record
from fused_rl.bench.tasks import environment, gradient_error
from fused_rl.bench.two_heads import (
    TWO_HEAD_PEERS,
    PerToken,
    eager_divergence,
    fused_divergence,
)
from fused_rl.system.outputs import try_folder, write_json

N, H, V = 256, 256, 4000
# About the reverse KL in nats -> the noise of the teacher's states, and the share that has some.
LEVELS = {"4": (1.1, 1.0), "0.04": (0.1, 1.0), "1e-3": (0.0155, 1.0), "1e-6": (0.0022, 0.05)}
BETAS = {"reverse KL": 1.0, "JSD(0.5)": 0.5}
OURS = "fused_rl"
OP = "LigerFusedLinearJSD"

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
# Of the four inputs, the first two of which want gradients, and beta -> the mean [].
Mean = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def main() -> int:
    """0; the table, the result, or what a process of Liger's op found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/divergence-errors.json"))
    parser.add_argument("--readme", type=Path, metavar="RESULT.json")
    parser.add_argument("--op", action="store_true", help="Liger's op alone, as JSON")
    arguments = parser.parse_args()
    if arguments.op:
        print(json.dumps(list(records({OP: liger_op()}))))
        return 0
    if arguments.readme:
        link = os.path.relpath(arguments.readme.resolve(), PAGE.resolve().parent)
        content = json.loads(arguments.readme.read_text())
        replace_block(PAGE, "divergence-errors", table(content, link))
        return 0
    try_folder(arguments.out.parent, arguments.out.name)
    found = [*records(providers()), *of_the_interpreter()]
    shape = {"tokens": N, "hidden": H, "vocabulary": V, "dtype": "bfloat16"}
    content = {"environment": environment(), "shape": shape, "records": found}
    write_json(arguments.out, content)
    print("\n".join(table(content, arguments.out.name)))
    return 0


def inputs(level: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """hidden and weight of the student and of the teacher, whose head is the student's."""
    noise, share = LEVELS[level]
    drawn = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=drawn).bfloat16()
    weight = (torch.randn(V, H, generator=drawn) * 3 / H**0.5).bfloat16()
    moved = noise * torch.randn(N, H, generator=drawn)
    moved = moved.where(torch.rand(N, H, generator=drawn) < share, 0.0)
    teacher = (hidden.float() + moved).bfloat16()
    leaves = (hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
    return (*leaves, teacher.to(dtype), weight.detach().to(dtype))


def providers() -> dict[str, Mean]:
    """All but Liger's op."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def chunked(hidden: Tensor, weight: Tensor, *rest: Tensor | float) -> Tensor:
        teacher_hidden, teacher_weight, beta = rest
        loss_fn = LigerFusedLinearJSDLoss(0.0, 1.0, beta, compiled=False)
        labels = torch.zeros(len(hidden), dtype=torch.int64)
        return loss_fn(hidden, weight, teacher_hidden, teacher_weight, labels)

    trl, eager = (TWO_HEAD_PEERS[name] for name in ("trl", "eager"))
    return {
        OURS: mean_of(fused_divergence),
        "eager torch, float32 logits": mean_of(in_float32),
        eager.title: mean_of(eager.load()),
        trl.title: mean_of(trl.load()),
        "LigerFusedLinearJSDLoss": chunked,
    }


def in_float32(*given: Tensor | float) -> Tensor:
    *tensors, beta = given
    return eager_divergence(*(t.float() for t in tensors), beta)


def mean_of(function: PerToken) -> Mean:
    return lambda *given: function(*given).mean()


def liger_op() -> Mean:
    """With its products as they are on CUDA: in float32."""
    from liger_kernel.ops import fused_linear_jsd
    from liger_kernel.transformers import LigerFusedLinearJSD

    fused_linear_jsd._project_to_float32 = lambda x, w: x.float() @ w.float().t()

    def run(*given: Tensor | float) -> Tensor:
        *tensors, beta = given
        return LigerFusedLinearJSD(beta, accum_dtype=torch.float32)(*tensors, None)

    return run


def of_the_interpreter() -> list[Record]:
    command = [sys.executable, __file__, "--op"]
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return json.loads(done.stdout.splitlines()[-1])


def records(chosen: dict[str, Mean]) -> Iterator[Record]:
    """One of every provider, divergence and level."""
    for which, beta in BETAS.items():
        for level in LEVELS:
            exact = found_of(mean_of(eager_divergence), inputs(level, torch.float64), beta)
            for provider, function in chosen.items():
                value, *slopes = found_of(function, inputs(level), beta)
                yield {
                    "provider": provider,
                    "divergence": which,
                    "level": level,
                    "nats": exact[0].item(),
                    "value_error": abs(value.item() / exact[0].item() - 1),
                    "gradient_error": gradient_error(tuple(slopes), exact[1:]),
                }


def found_of(function: Mean, given: Inputs, beta: float) -> tuple[Tensor, ...]:
    """The mean, dhidden and dweight."""
    return gradients(function(*given, beta), given[:2])


def table(content: Content, link: str) -> list[str]:
    """The lines of the page."""
    found = content["records"]
    lines = []
    for which in BETAS:
        here = [r for r in found if r["divergence"] == which]
        nats = list(dict.fromkeys(f"{r['nats']:.1g} nats" for r in here))
        lines += [
            f"| {which}: errors of value, gradients | " + " | ".join(nats) + " |",
            "|---|" + "---|" * len(nats),
        ]
        for provider in dict.fromkeys(r["provider"] for r in here):
            row = [r for r in here if r["provider"] == provider]
            cells = (f"{r['value_error']:.0e}, {r['gradient_error']:.0e}" for r in row)
            lines.append(f"| {provider} | " + " | ".join(cells) + " |")
        lines.append("")
    where = content["environment"]
    return [
        *lines,
        f"From bfloat16 states and heads, N = {N}, H = {H}, V = {V}, against float64 of the same "
        f"numbers; TRL {where['trl']}, liger-kernel {where['liger']}, torch {where['torch']}: "
        f"[{Path(link).name}]({link}), by `python bench/divergence_errors.py`. Values are means "
        "over the tokens. Gradients of 2e-3 are right but for bfloat16: rounded once where all "
        "products are float32, twice where those of the gradients are bfloat16. "
        "LigerFusedLinearJSD ran in Triton's interpreter with logits in float32, as on CUDA from "
        "sm_80 on; elsewhere it rounds them to bfloat16.",
    ]


if __name__ == "__main__":
    sys.exit(main())

"""Peers that only a GPU has a use for, beside those of fused_rl.bench.peers.

    python bench/gpu_peers.py NAME    tries one at a small size: the exit status says whether it ran

Those of EXTRA have a function per token and join every case. Those of SUMS know the sum over the
tokens alone: they have a case of their own, where linear_logprobs stands for us. A peer that might
take the process with it is tried in another one first.
"""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from shapes import FIRST, SHAPES
from torch import Tensor

from fused_rl.bench.packages import Stats
from fused_rl.bench.peers import (
    PEERS,
    ROWS,
    USUAL_PEERS,
    Case,
    Missing,
    Peer,
    eager,
    fused,
    gradients,
)
from fused_rl.bench.products import bare, factors
from fused_rl.bench.tasks import GATE, Judge, Kind, Task, dtype_name, gradient_error, usable

PROBE_SECONDS = 60
# Tried in a process of its own: it loads libraries that take memory of the whole machine.
PROBED = ("liger native",)
SUM = Kind("sum of log-probs, head trained", "sum_of_logprobs", 6)
Sum = Callable[[Tensor, Tensor, Tensor], Tensor]


def liger_scaled() -> Stats:
    """Liger's log-probs and entropies: CuTe kernels on Hopper, or else torch in chunks."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = Function.apply(hidden, weight, labels, 1.0, -100, 1, True)[:2]
        return -nll, entropy

    return run


def liger_native() -> Stats:
    """Liger's tensor-parallel function on one GPU, whose CUTLASS kernels a package of its own has.

    That wants a process group of torch, and the largest sizes once and for all.
    """
    import torch.distributed as dist
    from liger_kernel.ops.configure import FusedLinearCrossEntropyConfig, configure
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyTPFunction as Function,
    )

    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    sizes = (max(of) for of in zip(*(SHAPES[name] for name in FIRST), strict=True))
    if not configure(flsce=FusedLinearCrossEntropyConfig(*sizes)):
        raise Missing("Liger native: its kernels do not support this device")

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = Function.apply(hidden, weight, labels, dist.group.WORLD, return_entropy=True)
        return -nll, entropy

    return run


def trl_chunked() -> Stats:
    """TRL's chunked Triton head. Where what TRL's trainers import is missing, its backward pass
    gets a context that does nothing from a stand-in, as it would there on a single GPU.
    """
    try:
        import trl.trainer.utils  # noqa: F401 - the backward pass imports it
    except ImportError:
        found = types.ModuleType("trl.trainer.utils")
        found.maybe_gather_lm_head_ctx = lambda *_: nullcontext()
        sys.modules["trl.trainer.utils"] = found
    from fused_rl.bench.packages import trl_chunked as of_kernels

    return of_kernels()


def trl_of_logits() -> Stats:
    """TRL's Triton kernel of given logits, which are formed here in the dtype of the model."""
    from trl.kernels import selective_log_softmax_and_entropy

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax_and_entropy(F.linear(hidden, weight), labels)

    return run


def verl() -> Stats:
    """verl's fused Triton kernel."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden, weight, labels, 1.0, "none")

    return run


def quack_forward() -> Stats:
    """QuACK's product with the log-sum-exp in its epilogue: its losses without gradient."""
    from quack.epilogue.library import lse_target_epi

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        found = lse_target_epi(hidden, weight.mT, store_d=False, target=labels, tuned=False)
        return found["target_logit"] - found["lse"], None

    return run


def quack_sum() -> Sum:
    """QuACK's chunked loss, which chooses its scaled-exp kernels where they serve."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w, y: -chunked_linear_cross_entropy(h, w, y, reduction="sum")


def liger_sum() -> Sum:
    """Liger's fused linear cross entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda h, w, y: -liger_fused_linear_cross_entropy(h, w, y, reduction="sum")


def cut_sum() -> Sum:
    """cut-cross-entropy with its defaults."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="sum")


def torch_sum() -> Sum:
    """torch's own."""
    torch_ce = F.linear_cross_entropy
    return lambda h, w, y: -torch_ce(h, w, y, reduction="sum")


LIGER = ("liger_kernel", "triton")
EXTRA = {
    "liger scaled": Peer("Liger scaled CE", needs=LIGER, stats=liger_scaled, devices=("cuda",)),
    "liger native": Peer(
        "Liger native",
        needs=(*LIGER, "liger_cute_kernels", "tvm_ffi"),
        stats=liger_native,
        devices=("cuda",),
    ),
    "trl": Peer("TRL chunked", needs=("trl",), stats=trl_chunked),
    "trl logits": Peer(
        "TRL selective_log_softmax_and_entropy",
        needs=("trl", "triton"),
        stats=trl_of_logits,
        devices=("cuda",),
    ),
    "verl": Peer("verl", needs=("verl", "triton"), stats=verl, devices=("cuda",)),
    "quack forward": Peer(
        "QuACK lse epilogue (no entropy)",
        needs=("quack",),
        stats=quack_forward,
        trains=False,
        devices=("cuda",),
    ),
}
SUMS = {
    "quack": Peer("QuACK chunked", needs=("quack",), stats=quack_sum, devices=("cuda",)),
    "liger": Peer("Liger FLCE", needs=LIGER, stats=liger_sum, devices=("cuda",)),
    "cce": Peer(
        "cut-cross-entropy", needs=("cut_cross_entropy",), stats=cut_sum, devices=("cuda",)
    ),
    "torch": Peer("F.linear_cross_entropy", stats=torch_sum),
}


def found(device: torch.device) -> tuple[tuple[str, ...], list[str]]:
    """The peers that are to be had here, which PEERS then has too, and why the others are not."""
    PEERS.update(EXTRA)
    asked = dict.fromkeys((*USUAL_PEERS["cuda"], *EXTRA))
    names, missing = usable(tuple(name for name in asked if name not in PROBED), device.type)
    if device.type == "cpu":
        missing.append("torch.compile: only on a GPU")
        names = tuple(name for name in names if name != "compile")
    for name in PROBED:
        try:
            EXTRA[name].check(device.type)
            probe(name)
            names += (name,)
        except Missing as reason:
            missing.append(str(reason))
    return names, missing


def probe(name: str) -> None:
    """Missing, if a process of its own does not get through `main` with it."""
    command = [sys.executable, __file__, name]
    title = EXTRA[name].title
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise Missing(f"{title}: did not end within {PROBE_SECONDS} s") from late
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Missing(f"{title}: {last[:200]}")


def sum_task(case: Case) -> tuple[Task, list[str]]:
    """The gradients of the sum of all log-probs, and why some of the peers are not here."""
    chosen: dict[str, Sum] = {
        "fused_rl linear_logprobs": lambda h, w, y: fused(h, w, y).logprobs.sum(),
        "eager torch": lambda h, w, y: eager(h, w, y)[0].sum(),
    }
    missing = []
    device = case.hidden.device
    for peer in SUMS.values():
        try:
            chosen[peer.title] = peer.load(device.type)
        except Missing as reason:
            missing.append(str(reason))

    def run(of: Sum) -> tuple[Tensor, ...]:
        leaves = case.leaves()
        return gradients(of(*leaves, case.labels), leaves)

    exact = sum_gradients(case, torch.float32)
    limit = GATE * gradient_error(sum_gradients(case, case.hidden.dtype), exact)
    fields = {"case": SUM.title, "name": SUM.name, "nhv": SUM.nhv}
    fields |= dict(zip(("tokens", "hidden"), case.hidden.shape, strict=True))
    fields |= {"vocabulary": len(case.weight), "dtype": dtype_name(case.hidden)}
    task = Task(
        fields,
        device,
        lambda _: {title: partial(run, of) for title, of in chosen.items()},
        bare(factors(case.hidden, case.weight, SUM.nhv)),
        Judge(lambda result: [gradient_error(result[1:], exact)], [limit]),
        "gradient_error",
    )
    return task, missing


def sum_gradients(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dhidden and dweight in plain torch, in chunks of tokens, in the dtype given."""
    hidden, weight = case.hidden.to(dtype), case.weight.to(dtype)
    dhidden = torch.empty_like(hidden)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    for i in torch.arange(len(hidden), device=hidden.device).split(ROWS):
        h, w = hidden[i].requires_grad_(), weight.detach().requires_grad_()
        total = eager(h, w, case.labels[i])[0].sum()
        dhidden[i], of_rows = torch.autograd.grad(total, (h, w))
        dweight += of_rows
    return dhidden, dweight


def main(name: str) -> int:
    """A forward and a backward pass at a small size; what is wrong raises, or ends the process."""
    device = torch.device("cuda")
    case = Case.make(256, 512, 4096, torch.bfloat16, "cuda")
    hidden, weight = case.leaves()
    logprobs, _ = EXTRA[name].load(device.type)(hidden, weight, case.labels)
    gradients(logprobs.sum(), (hidden, weight))
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""Whether the forward in Gluon ends on this GPU, and is right: its warps wait for each other.

    python bench/gpu_probe.py

gpu_all.py runs it in a process of its own with a limit, before anything else may meet the kernel.
Exit status 1 where it is wrong; without a GPU that has it, or a triton, 0.
"""

from __future__ import annotations

import sys

import torch


def main() -> int:
    found = faults() if torch.cuda.is_available() else {}
    for title, fault in found.items():
        print(f"{title}: {fault or 'right'}")
    if not found:
        print("no GPU, or triton, that has it")
    return int(any(found.values()))


def faults() -> dict[str, str | None]:
    """title -> what is wrong, or None; on a small case, and on one of many parts."""
    from fused_rl.kernels import configs, hopper
    from fused_rl.ops.first_use import config_difference, exactly, formed, wrong
    from fused_rl.ops.linear import linear_logprobs
    from fused_rl.ops.record import Head, Limits

    place = configs.Device.of(torch.device("cuda"))
    noise = torch.Generator("cuda").manual_seed(0)
    where = {"generator": noise, "device": "cuda"}
    hidden = torch.randn(700, 2048, **where).bfloat16() / 32
    weight = torch.randn(30011, 2048, **where).bfloat16()
    labels = torch.randint(0, len(weight), (700,), **where)
    head = Head(hidden, weight, None, labels, torch.ones(700, device="cuda"), 1.0, 0.0)
    found = {}
    for config in configs.configs(place.major):
        if not config.gluon or not hopper.takes(hidden, weight):
            continue
        fault = config_difference(config, tuple(head), place)
        if fault is None:
            ours = formed(head, config, place)
            exact = linear_logprobs.plain(exactly(head), Limits(-100, 2**29))
            fault = wrong(ours, exact, torch.bfloat16)
        found[config.title] = fault
    return found


if __name__ == "__main__":
    sys.exit(main())

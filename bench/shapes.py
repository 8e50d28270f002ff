"""Where bench/gpu.py measures: heads of models, tokens, and inputs made on the device."""

from __future__ import annotations

import functools

import torch

from fused_rl.bench.peers import PRESETS, Case

TOKENS = {"Llama-3.2-1B": 16384}
USUAL_TOKENS = 8192
# Measured first, and beside the peers; of the others, ours alone.
FIRST = ("Qwen3-8B", "Gemma-2-2B", "Llama-3.2-1B")
# N, H, V.
SHAPES = {
    name: (TOKENS.get(name, USUAL_TOKENS), *PRESETS[name])
    for name in dict.fromkeys((*FIRST, *PRESETS))
}
SMALL = {"small": (16, 32, 200)}


@functools.lru_cache(maxsize=1)
def make_case(N: int, H: int, V: int, device: torch.device, dtype=torch.bfloat16) -> Case:
    """As Case.make, with numbers from the device's own generator: a CPU's would take too long."""
    noise = torch.Generator(device).manual_seed(0)
    where = {"generator": noise, "device": device}
    hidden = (torch.randn(N, H, **where) * 4 / H**0.5).to(dtype)
    weight = torch.randn(V, H, **where).to(dtype)
    return Case(hidden, weight, torch.randint(0, V, (N,), **where))

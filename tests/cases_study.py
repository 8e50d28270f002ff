"""Cases of the study's workers: what other processes run has to be found by its name there."""

import torch


def drawn(seed: int) -> float:
    return float(torch.rand((), generator=torch.Generator().manual_seed(seed)))


def doubled(case: int) -> int:
    assert torch.get_num_threads() == 1
    return 2 * case


def refused(case: int) -> int:
    raise ValueError(f"no case {case}")

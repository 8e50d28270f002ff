"""Cases of the pool itself."""

import os
import time

import torch
import torch.distributed as dist


def total(rank, world):
    one = torch.tensor(float(rank + 1))
    dist.all_reduce(one)
    return one.item()


def raises_alone(rank, world):
    if rank == 0:
        raise ValueError("labels[3] is 7")
    total(rank, world)


def hangs(rank, world):
    if rank == 1:
        time.sleep(100)
    total(rank, world)


def dies(rank, world):
    if rank == 1:
        os._exit(7)
    total(rank, world)

"""The mean of a token's logits over the vocabulary, which trainers log, without the logits."""

from dataclasses import replace

import torch
from torch import Tensor

from fused_rl.linear.head import LMHead
from fused_rl.reference import acc_dtype


@torch.no_grad()
def mean_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """[...]: of hidden [..., H], at temperature 1, by the mean of the weight's rows; float32, or
    float64 for float64 hidden.

    A head with a softcap has no such mean: its logits are no linear function of hidden. Adapters
    have no dropout here, which has no share in a mean. The rounding of a logits_dtype is left out.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = acc_dtype(hidden)
        mean = hidden.to(dtype) @ head.weight.mean(0, dtype=dtype)
        for adapter in head.adapters:
            u = replace(adapter, dropout=0.0).states(hidden).to(dtype)
            mean = mean + u @ adapter.up.mean(0, dtype=dtype)
    return head.scale * (mean if head.bias is None else mean + head.bias.mean(dtype=dtype))

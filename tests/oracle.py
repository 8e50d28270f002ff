"""The judge: a case, what the maths makes of it in float64, what plain torch makes of it in the
dtype of the case, and what we make of it.

Correctness is an error budget: our error against float64 may not exceed that of plain torch in the
same dtype by more than a few roundings of a float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl import LMHead, TokenBatch, linear_logprobs, ops, reference

IGNORED = -100
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|, as vectors.

    |value| where exact is 0; and nobody asks for the digits of what is smaller than 1e-20.
    """
    value, exact = value.detach().double(), exact.detach().double()
    norm = float(exact.norm())
    return float((value - exact).norm()) / (max(norm, 1e-20) if norm else 1.0)


def assert_no_worse(
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    summed_in: torch.dtype | None = None,
    roundings: int = 0,
) -> None:
    """error(ours) <= error(eager torch, same dtype) + a few roundings of the accumulator.

    Over a handful of elements the comparison is a matter of luck. There `roundings` grants what a
    product in the dtype of the case cannot avoid: its operand and its result are rounded to it.
    """
    assert ours.shape == exact.shape
    summed_in = summed_in or (torch.float64 if ours.dtype == torch.float64 else torch.float32)
    # The float64 judge is itself only as good as its own sums.
    slack = 1e-13 if summed_in == torch.float64 else 4 * torch.finfo(torch.float32).eps
    budget = max(relative_error(eager, exact), roundings * torch.finfo(ours.dtype).eps / 2)
    mine = relative_error(ours, exact)
    assert mine <= budget + slack, f"error {mine:.3e}, budget {budget:.3e}"


def assert_same_bits(a: Tensor | None, b: Tensor | None) -> None:
    """Equal to the last bit; a NaN equals a NaN."""
    if a is None or b is None:
        assert a is b
        return
    assert a.dtype == b.dtype
    assert torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))


@dataclass(frozen=True)
class Case:
    """hidden [N, H], weight [V, H], bias [V] or None, labels [N], temperature [N]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    temperature: Tensor
    scale: float = 1.0
    softcap: float | None = None

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias, self.scale, self.softcap)

    def rows(self, rows: Tensor) -> Case:
        """The case of some of the tokens."""
        names = ("hidden", "labels", "temperature")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


class Result(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    dhidden: Tensor
    dweight: Tensor | None
    dbias: Tensor | None


def random_case(
    N: int,
    H: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    weight_dtype: torch.dtype | None = None,
    logit_std: float = 1.0,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: bool = False,
    ignored: int = 0,
) -> Case:
    """Logits of about the given standard deviation; the first `ignored` tokens do not count."""
    of_weight = weight_dtype or dtype
    labels = torch.randint(V, (N,))
    labels[:ignored] = IGNORED
    return Case(
        torch.randn(N, H, dtype=torch.float64).to(dtype),
        (torch.randn(V, H, dtype=torch.float64) * (logit_std / (H**0.5 * scale))).to(of_weight),
        torch.randn(V, dtype=torch.float64).to(of_weight) if bias else None,
        labels,
        (0.5 + torch.rand(N) * 1.5 if temperature else torch.ones(N)),
        scale,
        softcap,
    )


EVERYTHING = dict(bias=True, scale=0.7, softcap=3.0, temperature=True)


def random_upstream(N: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)


def exact(case: Case, dlogprobs: Tensor, dentropy: Tensor) -> Result:
    """float64, by reference.py and autograd."""

    def stats(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = (case.labels != IGNORED).nonzero()[:, 0]
        logprobs, entropy, *_ = reference.linear_logprobs(
            hidden[rows],
            weight,
            bias,
            case.labels[rows],
            case.temperature[rows].double(),
            case.scale,
            case.softcap or 0.0,
        )
        empty = hidden.new_zeros(len(case.labels))
        return empty.index_put((rows,), logprobs), empty.index_put((rows,), entropy)

    wide = replace(
        case,
        hidden=case.hidden.double(),
        weight=case.weight.double(),
        bias=None if case.bias is None else case.bias.double(),
    )
    return _differentiated(stats, wide, dlogprobs, dentropy)


def eager(case: Case, dlogprobs: Tensor, dentropy: Tensor) -> Result:
    """What one writes by hand: F.linear in the dtype of the case, then float32 log_softmax."""

    def stats(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        z = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        z = z * case.scale
        if case.softcap:
            z = torch.tanh(z / case.softcap) * case.softcap
        return eager_statistics(z, case.labels, case.temperature)

    return _differentiated(stats, case, dlogprobs, dentropy)


def eager_statistics(z: Tensor, labels: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from logits [N, V], in float32 (float64 for float64 logits)."""
    wide = z if z.dtype == torch.float64 else z.float()
    logp = torch.log_softmax(wide / temperature.to(wide.dtype)[:, None], dim=-1)
    counted = labels != IGNORED
    logprobs = logp.gather(-1, labels.where(counted, 0)[:, None])[:, 0]
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    return logprobs.where(counted, 0.0), entropy.where(counted, 0.0)


def ours(
    case: Case, dlogprobs: Tensor, dentropy: Tensor, frozen: bool = False, **options: object
) -> Result:
    """linear_logprobs; with a frozen head the gradients of weight and bias are None."""

    def stats(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        head = LMHead(weight, bias, case.scale, case.softcap)
        return linear_logprobs(hidden, head, case.labels, temperature=case.temperature, **options)

    return _differentiated(stats, case, dlogprobs, dentropy, trained=not frozen)


def _differentiated(
    stats: Callable, case: Case, dlogprobs: Tensor, dentropy: Tensor, trained: bool = True
) -> Result:
    hidden = case.hidden.detach().requires_grad_()
    weight, bias = (
        None if t is None else t.detach().requires_grad_(trained) for t in (case.weight, case.bias)
    )
    logprobs, entropy = stats(hidden, weight, bias)
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    upstream = (dlogprobs.to(logprobs.dtype), dentropy.to(entropy.dtype))
    grads = list(torch.autograd.grad((logprobs, entropy), leaves, upstream))
    grads += [None] * (3 - len(grads))
    return Result(logprobs.detach(), entropy.detach(), *grads)


def assert_result_no_worse(
    ours: Result, eager: Result, exact: Result, *, roundings: int = 0
) -> None:
    """Values and gradients; gradients that were not asked for are skipped.

    roundings: granted to the gradients, see assert_no_worse.
    """
    for name, mine, theirs, right in zip(Result._fields, ours, eager, exact, strict=True):
        if mine is None:
            continue
        granted = roundings if name.startswith("d") else 0
        try:
            assert_no_worse(mine, theirs, right, summed_in=ours.logprobs.dtype, roundings=granted)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def policy_batch(case: Case, shape: tuple[int, int] | None = None, masked: int = 0) -> TokenBatch:
    """A batch with ratios and KLs that lie well away from the kinks of the clipped surrogate.

    The first `masked` tokens of each sequence do not count.
    """
    shape = shape or (1, len(case.labels))
    zeros = torch.zeros(len(case.labels))
    logprobs = exact(case, zeros, zeros).logprobs.reshape(shape)
    # exp of these: 0.61, 0.90, 1.11, 1.65, with bounds at 0.8 and 1.2.
    steps = torch.tensor([-0.5, -0.1, 0.1, 0.5], dtype=torch.float64)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, :masked] = False
    return TokenBatch.padded(
        case.labels.reshape(shape),
        mask,
        torch.randn(shape, dtype=torch.float64),
        old_logprobs=logprobs - steps[torch.randint(4, shape)],
        ref_logprobs=logprobs - torch.randn(shape, dtype=torch.float64),
    )


def assert_equal_rows(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """The same bits where the products come from a microkernel; a matrix library, which serves
    where there is none, may round differently with the number of tokens."""
    if dtype in microkernels():
        assert_same_bits(a, b)
    else:
        assert a.dtype == b.dtype
        assert relative_error(a, b) <= 32 * torch.finfo(a.dtype).eps


def microkernels() -> set[torch.dtype]:
    """The dtypes of hidden and weight whose products a microkernel forms on this machine."""
    if ops.native_missing:
        return set()
    names = torch.ops.fused_rl.cpu_features().split()
    # float16 runs as float32, and so does bfloat16 on a CPU that does not multiply it.
    of_float32 = {torch.float32, torch.float16, torch.bfloat16} if "float32" in names else set()
    return of_float32 | ({torch.bfloat16} if "bfloat16" in names else set())

"""What a head needs and costs, before anything runs: `fused-rl plan`.

    peak = max over the phases of a way of the sum of what is alive in it

Sizes are those of the code: logits in the accumulator dtype, for all tokens (eager torch) or for
one chunk, and on a card that keeps them exponentials in bfloat16 in their place; dweight in the
dtype of the head, or in float32 while chunks add to it; dhidden in float32 until it is handed over;
the operands that a pass lays out for its products. Every token counts, and hidden states and
weight, which are there already, are left out. On a CPU the C++ kernels are assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl import ops
from fused_rl.ops import chunk_sizes, native, one_pass_pays, round_up
from fused_rl.plan.config import head_shape, size
from fused_rl.plan.devices import CARDS
from fused_rl.plan.steps import chosen
from fused_rl.reference import acc_dtype

# Of the one pass; a plan with more is a slip of the pen, and its list would fill the memory.
MOST_CHUNKS = 2**20

# The C++ kernels' tiles: rows of a super-block of the vocabulary, for each of which a token has a
# softmax of three numbers, and of a block of it; tokens in one product over it, with a trained head
# and with a frozen one; columns of a panel; steps in flight.
SUPER_BLOCK, BLOCK, PASS_TOKENS, FROZEN_TOKENS, PANEL, STEPS = 1024, 256, 2048, 1024, 64, 3
# What they keep for the next call, at most.
KEPT_BYTES = 2**28
# Slabs on CUDA, at most.
SLABS = 64

Parts = dict[str, int]
DEVICES = ("cpu", "cuda", *CARDS)


class Way(NamedTuple):
    """nhv: cost in multiples of N H V. phases: name -> part -> bytes alive in it."""

    name: str
    nhv: int
    flop: int
    phases: dict[str, Parts]

    @property
    def phase(self) -> str:
        """The one that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.phases[self.phase].values())


class Plan(NamedTuple):
    """A head's ways; chunk_bytes, and the tokens of the chunks that it allows in the one pass.

    device: one of DEVICES.
    """

    tokens: int
    hidden: int
    vocabulary: int
    chunk_bytes: int
    chunks: list[int]
    ways: list[Way]
    device: str
    dtype: torch.dtype
    frozen: bool


class Sizes(NamedTuple):
    """N, H, V; bytes of a number: of the model, of an accumulator, of an operand of a product, and
    of a gradient that waits for the loss's scale. device: its type. kept: whether exponentials in
    bfloat16 stand for logits.
    """

    N: int
    H: int
    V: int
    w: int
    acc: int
    op: int
    waiting: int
    device: str
    kept: bool

    def way(self, name: str, nhv: int, **phases: Parts) -> Way:
        return Way(name, nhv, nhv * self.N * self.H * self.V, phases)


def plan(
    config: Mapping[str, Any],
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    frozen: bool = False,
    chunk_bytes: int | None = None,
    device: str = "cpu",
    alone: bool = True,
) -> Plan:
    """Bytes and FLOP of the head, in eager torch and in each of our ways: of a head without softcap
    and a loss without an entropy bonus.

    Args:
        config: of a transformers model, as in config.json.
        tokens: N of one call, all of them under the loss.
        dtype: of hidden states and weight.
        frozen: whether the head is not trained.
        chunk_bytes: as in linear_policy_loss; None for the default.
        device: "cpu"; "cuda", whose chunks are fitted to its multiprocessors if there is one here;
            or a card that CARDS knows, to whose multiprocessors they are fitted wherever this runs.
        alone: False for a part of a vocabulary that is spread over ranks: on a CPU, too, its chunks
            have logits in the one pass, and no exponentials.

    Raises:
        ValueError: another device; a config without sizes; a size that is no number of a head;
            tokens, or chunk_bytes, that are not positive or beyond counting; chunk_bytes that are
            too few for so many tokens.
    """
    H, V = head_shape(config)
    size("tokens", tokens)
    if chunk_bytes is not None and not 0 < chunk_bytes < 2**48:
        raise ValueError(f"chunk_bytes must be positive and less than 2**48, got {chunk_bytes}")
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    hidden, weight = _stand_ins(tokens, H, V, dtype, _kind(device))
    scratch = chunk_bytes or own_bytes(device)
    given = ops.Given(not alone)
    most = min(tokens, _chunk_tokens(hidden, weight, given, scratch, device))
    if tokens > MOST_CHUNKS * most:
        raise ValueError(
            f"chunk_bytes must allow chunks of more than {most} of {tokens} tokens, got {scratch}"
        )
    sizes = chunk_sizes(tokens, most)
    s = sizes_of(tokens, H, V, dtype, device)
    s = s._replace(kept=s.kept or (alone and _on_cpu_in_half(s)))
    any_loss = _frozen(s, most) if frozen else _any_loss(s, most, scratch)
    pays = one_pass_pays(tokens, most, torch.device(s.device), not frozen)
    loss = one_pass(s, sizes, frozen) if pays else _two_passes(s, "linear_policy_loss", scratch)
    if frozen and s.device == "cpu":
        loss = _frozen(s, most, "linear_policy_loss")
    ways = [_eager_no_grad(s), _no_grad(s), _eager(s, frozen), any_loss, loss]
    return Plan(tokens, H, V, scratch, sizes, ways, device, dtype, frozen)


def sizes_of(tokens: int, H: int, V: int, dtype: torch.dtype, device: str) -> Sizes:
    """Of that many tokens at a head [V, H]; device: one of DEVICES."""
    kind = _kind(device)
    return Sizes(
        *(tokens, H, V, dtype.itemsize, acc_dtype(*_stand_ins(1, 1, 1, dtype, kind)).itemsize),
        op=_operand_bytes(dtype, kind),
        waiting=4 if dtype == torch.float16 else dtype.itemsize,
        device=kind,
        kept=keeps_exponentials(device, dtype, tokens),
    )


def own_bytes(device: str) -> int:
    """The bound on scratch of a device, or of a card that CARDS knows."""
    if device in CARDS:
        return ops.card_bytes(CARDS[device].memory_gb * 2**30)
    return ops.scratch_bytes(torch.device(device), None)


def keeps_exponentials(device: str, dtype: torch.dtype, tokens: int) -> bool:
    """Whether a chunk on a card that CARDS knows has them in the place of logits."""
    known = device in CARDS and ops.HAS_TRITON and dtype == torch.bfloat16
    return known and chosen(CARDS[device], tokens, stores=True) is not None


def _chunk_tokens(
    hidden: Tensor, weight: Tensor, given: ops.Given, scratch: int, device: str
) -> int:
    """ops.tokens_of_chunk, as it would be on a card that CARDS knows."""
    if device not in CARDS or not ops.HAS_TRITON:
        head = ops.Head(hidden, weight, None, hidden[:, 0], hidden[:, 0], 1.0, 0.0)
        return ops.tokens_of_chunk(head, given, scratch)
    from fused_rl.kernels import linear_gradients

    kept = keeps_exponentials(device, hidden.dtype, len(hidden))
    per_logit = 2 if kept else linear_gradients.bytes_per_logit(hidden.element_size())
    count = CARDS[device].multiprocessors
    return linear_gradients.chunk_tokens(*weight.shape, per_logit, scratch, count)


def _kind(device: str) -> str:
    return "cuda" if device in CARDS else device


def _stand_ins(N: int, H: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """hidden and weight of these shapes that hold one number."""
    there = device != "cuda" or torch.cuda.is_available()
    number = torch.zeros((), dtype=dtype, device=device if there else "cpu")
    return number.expand(N, H), number.expand(V, H)


def _on_cpu_in_half(s: Sizes) -> bool:
    """Where a chunk has exponentials for logits, without an entropy and a softcap."""
    return s.device == "cpu" and s.w == s.op == 2


def _operand_bytes(dtype: torch.dtype, device: str) -> int:
    """Of a number in a product: bfloat16 needs a CPU that multiplies it."""
    if device == "cpu" and dtype.itemsize == 2:
        return 2 if dtype == torch.bfloat16 and "bfloat16" in native.cpu_features() else 4
    return dtype.itemsize


def _eager_no_grad(s: Sizes) -> Way:
    # log p, p and their product.
    return s.way("eager torch, no gradient", 2, entropy={"logits": 3 * s.N * s.V * s.acc})


def _eager(s: Sizes, frozen: bool) -> Way:
    dweight = 0 if frozen else s.V * s.H * s.w
    of_products = {"logits": s.N * s.V * (s.acc + s.w), "dweight": dweight}
    return s.way(
        "eager torch",
        4 if frozen else 6,
        # log p, its gradient, and that of the logits.
        softmax={"logits": 3 * s.N * s.V * s.acc},
        products={**of_products, "dhidden": s.N * s.H * s.w},
    )


def _no_grad(s: Sizes) -> Way:
    packed = s.N * s.H * s.op if s.device == "cpu" else 0
    return s.way("linear_logprobs, no gradient", 2, forward={"operands": packed + _softmaxes(s)})


def _softmaxes(s: Sizes) -> int:
    """Partial ones, of three numbers."""
    parts = -(-s.V // SUPER_BLOCK) if s.device == "cpu" else SLABS
    return 3 * parts * s.N * s.acc


def _pass_operands(s: Sizes, n: int, *, dweight: bool, recompute: bool) -> int:
    """Bytes that a backward pass over n tokens lays out, beside gradients and stored logits."""
    if s.device != "cpu":
        # Hidden states times a factor for each token.
        return n * s.H * s.w if s.kept and dweight and not recompute else 0
    n, rows, columns = round_up(n, 32), min(SUPER_BLOCK, s.V), round_up(s.H, PANEL)
    most = PASS_TOKENS if dweight else FROZEN_TOKENS
    at_once = min(n, most)
    chunks = -(-n // most)
    steps = min(STEPS, chunks * -(-s.V // SUPER_BLOCK))
    draws = at_once * rows * s.op * (2 if dweight else 1)
    weights = rows * columns * s.op * (2 if recompute and s.op == 2 else 1)
    of_weight = n * columns * s.op + (rows * columns * s.acc if chunks > 1 else 0)
    return steps * (draws + weights) + dweight * of_weight + recompute * n * s.H * s.op


def _pass_dhidden(s: Sizes, n: int) -> int:
    """Sums of dhidden, and on a CPU what they are put together in."""
    return n * s.H * (s.acc + (s.w if s.device == "cpu" else 0))


def _kept_between_calls(s: Sizes, before: Parts) -> Parts:
    """What the C++ kernels give back of a phase and nobody else has yet."""
    if s.device != "cpu":
        return {}
    return {"operands": min(KEPT_BYTES, before["logits"] + before["operands"])}


def _chunk_logits(s: Sizes, n: int) -> int:
    """The logits of a chunk; on CUDA their gradient stands beside them in half precision. Or
    exponentials, whose rows begin at multiples of 128 bytes; on a CPU each block has a reference.
    """
    if s.kept and s.device == "cpu":
        return round_up(n, 32) * (2 * s.V + 4 * -(-s.V // BLOCK))
    if s.kept:
        return 2 * n * round_up(s.V, 64)
    beside = s.w if s.device != "cpu" and s.w < s.acc else 0
    return round_up(n, 32) * s.V * (s.acc + beside)


def _any_loss(s: Sizes, most: int, scratch: int) -> Way:
    """One pass where exponentials of all tokens fit; most: tokens of a chunk."""
    kept = _chunk_logits(s, s.N)
    fits = most >= s.N if s.device == "cpu" else kept <= scratch
    if not s.kept or not fits:
        return _two_passes(s, "linear_logprobs", scratch)
    return s.way(
        "linear_logprobs",
        6,
        backward={
            "logits": kept,
            "dweight": s.V * s.H * s.w,
            "dhidden": _pass_dhidden(s, s.N),
            "operands": _pass_operands(s, s.N, dweight=True, recompute=False),
        },
    )


def _two_passes(s: Sizes, name: str, scratch: int) -> Way:
    # The kernels of a CPU keep a super-block of logit gradients, those of CUDA fill the scratch
    # with logits, which are formed again.
    s = s._replace(kept=False)
    logits = min(scratch, _chunk_logits(s, s.N)) if s.device != "cpu" else 0
    return s.way(
        name,
        8,
        backward={
            "logits": logits,
            "dweight": s.V * s.H * s.w,
            "dhidden": _pass_dhidden(s, s.N),
            "operands": _pass_operands(s, s.N, dweight=True, recompute=True),
        },
    )


def one_pass(s: Sizes, sizes: list[int], frozen: bool) -> Way:
    """linear_policy_loss in chunks of these numbers of tokens."""
    n, several = max(sizes), len(sizes) > 1
    elements = 0 if frozen else s.V * s.H
    phases = {
        "chunk": {
            "logits": _chunk_logits(s, n),
            "dweight": elements * (s.acc if several else s.waiting),
            "dhidden": s.N * s.H * s.waiting + _pass_dhidden(s, n),
            "operands": _pass_operands(s, n, dweight=not frozen, recompute=False),
        }
    }
    kept = _kept_between_calls(s, phases["chunk"])
    if several and s.waiting < s.acc:
        phases["narrow"] = {
            "dweight": elements * (s.acc + s.waiting),
            "dhidden": s.N * s.H * s.waiting,
            **kept,
        }
    if s.w < s.waiting:
        both = s.waiting + s.w
        phases["hand over"] = {"dweight": elements * both, "dhidden": s.N * s.H * both, **kept}
    return s.way("linear_policy_loss", 4 if frozen else 6, **phases)


def _frozen(s: Sizes, n: int, name: str = "linear_logprobs") -> Way:
    # The kernels of a CPU hold no logits: their two products are in one walk over all tokens.
    walk = s.device == "cpu"
    n = s.N if walk else n
    # In float64: of the steps in flight, of their blocks, and of the sums before and after.
    references = (STEPS * (1 + SUPER_BLOCK // BLOCK) + 2) * s.N * 8
    return s.way(
        name,
        4,
        forward={
            "logits": 0 if walk else _chunk_logits(s, n),
            "dhidden": _pass_dhidden(s, n) + (0 if walk else s.N * s.H * s.w),
            "operands": _pass_operands(s, n, dweight=False, recompute=walk)
            + (_softmaxes(s) + references if walk else n * s.H * s.w),
        },
        backward={"dhidden": s.N * s.H * (2 * s.w if walk else s.w + 2 * s.acc)},
    )

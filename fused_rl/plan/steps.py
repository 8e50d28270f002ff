"""What a call is made of: the parts of each way, whose times time.py knows.

`one_pass`, `frozen` and `two_passes` have logits in float32; `stored` keeps E = 2^(z - r) in
bfloat16 in their place, one reference r per token, so that its backward pass is two products and no
pass over rows:

    dhidden = -c (E W)      dweight = -E^T (c h)

`chosen` says whether a card does that today. Half precisions only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from fused_rl.kernels.configs import Config, configs
from fused_rl.plan.devices import Card
from fused_rl.plan.time import (
    GRADIENT,
    ROW_BLOCK,
    STATISTICS,
    Part,
    Tile,
    ceil,
    cut,
    elementwise,
    fused_forward,
    product,
    row_pass,
    start,
    tiled_forward,
)

# Fitted on `chunks` of few tokens: seconds that the host takes for a chunk of the one pass, most
# of them for the loss and its derivative; and of the device at the chunk's synchronisation.
CHUNK_HOST, CHUNK_GAP = 4.0e-3, 0.85e-3
# Bytes per logit that eager torch moves outside products: to float32 6, log_softmax 16 (it reads
# a row three times), exp 8, times log p 12, sum 4. Backward: zeros for gather 4, log_softmax 20, to
# the half precision 6.
EAGER_FORWARD, EAGER_BACKWARD = 46, 30

# Instructions per logit of an epilogue, counted in the machine code for sm_90, without E and with
# it: Triton's, and the warp-specialised one.
TRITON, GLUON = (11.4, 11.8), (8.7, 9.4)
# The main loop of the warp-specialised forward, in the library's; its epilogue does not overlap.
GLUON_LOOP = 1.0
# Tokens and logits of a tile in L2, at most: kernels/linear_logprobs.py.
TILE_ROWS, TILE_LOGITS = 2048, 2**24


def tile(config: Config) -> Tile:
    """A configuration of the kernels' table."""
    bytes_ = 2 if config.stores else 0
    if config.gluon:
        # Two consumers of so many warps.
        m, n, k, warps, stages, tma = config[:6]
        cost = GLUON[config.stores]
        return Tile(m, n, k, 2 * warps, stages, tma, cost, GLUON_LOOP, bytes_)
    return Tile(*config[:6], TRITON[config.stores], stored=bytes_)


def chosen(card: Card, N: int, *, stores: bool = False, unproven: bool = False) -> Config | None:
    """The first configuration for the card's architecture that takes N tokens of a head without
    bias, where triton has Gluon. None: tiles in L2, or logits for E.

    Args:
        stores: those that keep E.
        unproven: also those that no result has shown right and faster.
    """
    table = (c for c in configs(card.major) if c.rows >= N and c.stores == stores)
    return next((c for c in table if c.proof or unproven), None)


def no_gradient(card: Card, N: int, H: int, V: int) -> list[Part]:
    """The forward that the library takes."""
    config = chosen(card, N)
    if config is None:
        return tiled_forward(card, N, H, V, tile_sides(N))
    return fused_forward(card, N, H, V, tile(config))


def tile_sides(N: int, rows: int = TILE_ROWS, logits: int = TILE_LOGITS) -> tuple[int, int]:
    """Tokens and columns of a tile in L2, of so many tokens and logits at most."""
    rows = ceil(N, ceil(N, rows))
    return rows, max(1, logits // (rows * ROW_BLOCK)) * ROW_BLOCK


def products(card: Card, N: int, H: int, V: int, nhv: int) -> list[Part]:
    """The bare matrix products of a step, in the half precision."""
    parts = [product(card, "logits", N, V, H, width=2)]
    if nhv >= 4:
        parts.append(product(card, "dhidden", N, H, V, width=2))
    if nhv >= 6:
        parts.append(product(card, "dweight", V, H, N, width=2))
    return [*parts, start()]


def eager(card: Card, N: int, H: int, V: int, nhv: int) -> list[Part]:
    """Logits in the half precision, log_softmax in float32; nhv = 2: no gradient."""
    bytes_ = EAGER_FORWARD + (EAGER_BACKWARD if nhv > 2 else 0)
    return [*products(card, N, H, V, nhv), elementwise(card, "elementwise", bytes_ * N * V)]


def one_pass(card: Card, sizes: Sequence[int], H: int, V: int, *, trained: bool) -> list[Part]:
    """linear_policy_loss, in chunks of these numbers of tokens whose logits are in float32."""
    parts = _chunks(sizes, lambda n, i: _chunk(card, n, H, V, trained, i, len(sizes)), CHUNK_HOST)
    return [*parts, *(_handed_over(card, H, V, len(sizes)) if trained else ())]


def frozen(card: Card, sizes: Sequence[int], H: int, V: int, *, stored: bool = False) -> list[Part]:
    """linear_logprobs of a head that is not trained: its gradient is formed in the forward.

    stored: whether chunks keep E.
    """
    of_chunk = _stored_chunk if stored else _chunk
    count = len(sizes)
    parts = _chunks(sizes, lambda n, i: of_chunk(card, n, H, V, False, i, count), 0.0)
    scaled = elementwise(card, "dhidden scaled", sum(sizes) * H * 16)
    return [*parts, scaled, Part("waiting for the host", 0, CHUNK_HOST)]


def stored(
    card: Card, sizes: Sequence[int], H: int, V: int, *, trained: bool, waits: bool = True
) -> list[Part]:
    """`one_pass` that keeps E of a chunk; of all tokens, for any loss, where there is one chunk.

    Proven or not. waits: whether the device waits at a chunk's synchronisation, as it does today.
    """
    count = len(sizes)
    parts = _chunks(
        sizes,
        lambda n, i: _stored_chunk(card, n, H, V, trained, i, count),
        CHUNK_HOST if waits else 0.0,
    )
    parts = [p for p in parts if waits or p.name != "synchronisation"]
    return [*parts, *(_handed_over(card, H, V, count) if trained else ())]


def _chunks(
    sizes: Sequence[int], of_chunk: Callable[[int, int], list[Part]], host: float
) -> list[Part]:
    """of_chunk(tokens, index) of each, its synchronisation, and the host where that is slower."""
    parts: list[Part] = []
    # The first writes dweight, all others add to it.
    for n, i, count in [(sizes[0], 0, 1), *((n, 1, c) for n, c in Counter(sizes[1:]).items())]:
        chunk = [*of_chunk(n, i), Part("synchronisation", 0, CHUNK_GAP)]
        waited = max(0.0, host - sum(part.seconds for part in chunk))
        parts += [part * count for part in (*chunk, Part("waiting for the host", 0, waited))]
    return parts


def _chunk(
    card: Card, n: int, H: int, V: int, trained: bool, index: int, chunks: int
) -> list[Part]:
    return [
        product(card, "logits", n, V, H, width=4),
        row_pass(card, "statistics", n * V, STATISTICS, 4),
        row_pass(card, "gradient", n * V, GRADIENT, 6),
        product(card, "dhidden", n, H, V, width=4),
        *([_dweight(card, n, H, V, index, chunks)] if trained else ()),
    ]


def _stored_chunk(
    card: Card, n: int, H: int, V: int, trained: bool, index: int, chunks: int
) -> list[Part]:
    way = tile(chosen(card, n, stores=True, unproven=True))
    return [
        *fused_forward(card, n, H, V, way),
        product(card, "dhidden", n, H, V, width=4),
        *([_dweight(card, n, H, V, index, chunks)] if trained else ()),
    ]


def _dweight(card: Card, n: int, H: int, V: int, index: int, chunks: int) -> Part:
    """That of a chunk: rounded at once if it is the only one, else summed in fp32."""
    width = 2 if chunks == 1 else 4
    return product(card, "dweight", V, H, n, width=width, added=index > 0)


def _handed_over(card: Card, H: int, V: int, chunks: int) -> list[Part]:
    """dweight to its dtype, if it was summed, and times the upstream gradient of the loss."""
    return [elementwise(card, "dweight handed over", V * H * ((6 if chunks > 1 else 0) + 4))]


def two_passes(
    card: Card, N: int, H: int, V: int, chunk_bytes: int, forward: Sequence[Part] = ()
) -> list[Part]:
    """linear_logprobs under a loss: the backward pass forms the logits again, in blocks of the
    vocabulary for all tokens. forward: that of the library, unless given.
    """
    parts = list(forward or no_gradient(card, N, H, V))
    for n, count in cut(V, max(128, chunk_bytes // (N * 6) // 128 * 128)):
        block = [
            product(card, "logits again", N, n, H, width=4),
            row_pass(card, "gradient", N * n, GRADIENT, 6),
            product(card, "dhidden", N, H, n, width=4, added=True),
            product(card, "dweight", n, H, N, width=2),
        ]
        parts += [part * count for part in block]
    return [*parts, Part("waiting for the host", 0, CHUNK_HOST)]

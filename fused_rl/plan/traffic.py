"""Bytes that a rank receives for a head that R ranks share: arithmetic, not a measurement.

A collective is counted by what it gives a rank, the rank's own part among it:

    all-gather to S bytes          S
    all-to-all of S bytes          S
    reduce-scatter of S bytes      S      R parts of S / R, which are added up
    all-reduce of S bytes          2 S    a reduce-scatter and an all-gather

Parts are equal, so that of each (R - 1) / R come from other ranks. With w and g bytes of a number
of the weight and of its gradient, s of a summand of dhidden, and T active tokens of all ranks:

    weight gathered a times, its gradient reduced b times    V H (a w + b g)
    tokens sent instead                                      T (H (w + s) + 76)
    as much at T =                                           V H (a w + b g) / (H (w + s) + 76)

With a = b = 1 and s = 4 that is T = 2 V / 3 in bfloat16, and T = V where the gradient is reduced in
float32, or all is float32: a little less, by the 76.
"""

from __future__ import annotations

# lse, entropy, the label's log-prob, the top one: float64.
STATISTICS = 4 * 8
# Summands of dhidden, unless the head's accumulators are wider.
SUMMAND = 4
# Of a token whose hidden state is sent: label, temperature, its statistics there and, with their
# gradients, back.
TOKEN = 8 + 4 + 2 * STATISTICS


def from_others(received: int, world: int) -> int:
    """What crosses between ranks of what a rank is given."""
    return received * (world - 1) // world


def in_equal_parts(count: int, world: int) -> int:
    """Rows or tokens with those that make the ranks' parts equal."""
    return -(-count // world) * world


def weight_bytes(V: int, H: int, world: int, width: int) -> int:
    """Of the weight's gather, or of the reduce-scatter of its gradient; width: of a number."""
    return in_equal_parts(V, world) * H * width


def statistics_bytes(tokens: int, world: int) -> int:
    """Of the statistics of `tokens` tokens from each rank's part of the vocabulary."""
    return STATISTICS * world * tokens


def hidden_bytes(tokens: int, H: int, width: int) -> int:
    """Of the gather of hidden states; tokens: those of all ranks."""
    return tokens * H * width


def summed_bytes(tokens: int, H: int, world: int, summand: int = SUMMAND) -> int:
    """Of the all-to-all after which a rank adds up dhidden of its share of the tokens."""
    return in_equal_parts(tokens, world) * H * summand


def dhidden_bytes(tokens: int, H: int, world: int, width: int, summand: int = SUMMAND) -> int:
    """Of the ordered sum of dhidden that every rank gets whole: 6 per number in half precision."""
    whole = hidden_bytes(in_equal_parts(tokens, world), H, width)
    return summed_bytes(tokens, H, world, summand) + whole


def travel_bytes(tokens: int, H: int, width: int, summand: int = SUMMAND) -> int:
    """Of all that a step with tokens that travel moves; tokens: those of all ranks."""
    return tokens * (H * (width + summand) + TOKEN)


def break_even(moved: int, H: int, width: int, summand: int = SUMMAND) -> int:
    """The tokens of all ranks that travel for no more than that many bytes.

    Args:
        moved: what gathers of the weight and reductions of its gradient give a rank.
    """
    return moved // travel_bytes(1, H, width, summand)

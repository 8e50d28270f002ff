"""The operators. Which kernel runs is torch's dispatcher's choice: nothing else knows of devices.

record.py says how one is written, and each family has its file. What has no kernel for the device
at hand runs in plain torch. The kernels for CPUs (csrc/) are registered by the library that
native.py loads, those for CUDA (kernels/) in triton.py, triton_chunk.py and two_heads_triton.py.
"""

from fused_rl.ops import triton, triton_chunk, trust, two_heads_triton
from fused_rl.ops.adapted import AdaptedHead, linear_logprobs_adapted
from fused_rl.ops.at import AtHead, linear_logits_at, linear_logprobs_at
from fused_rl.ops.autocast import autocasts, in_full
from fused_rl.ops.checkout import find_kernels
from fused_rl.ops.chunk import (
    ChunkLogits,
    Sums,
    exponentials_fit,
    linear_logprobs_chunk,
    linear_logprobs_chunk_backward,
    tokens_of_chunk,
)
from fused_rl.ops.chunks import (
    HAS_TRITON,
    ONE_PASS_TOKENS,
    card_bytes,
    check_tokens,
    chunk_sizes,
    chunk_tokens,
    one_pass_pays,
    round_up,
    scratch_bytes,
    waiting_dtype,
)
from fused_rl.ops.divergence import linear_divergence, pair_rows
from fused_rl.ops.divergence_chunk import (
    StudentUpstream,
    known_of,
    linear_divergence_chunk,
    linear_divergence_chunk_backward,
    linear_divergence_frozen,
)
from fused_rl.ops.filtered import FILTER_ROWS, Filter, linear_filtered_logprobs
from fused_rl.ops.frozen import linear_logprobs_frozen, walks_once
from fused_rl.ops.kept import KeptHead, add_to_chunk, linear_kept_logprobs, renormalised
from fused_rl.ops.kept_sets import Sets, check_kept
from fused_rl.ops.kl import Deviation, kl
from fused_rl.ops.linear import linear_logprobs, linear_logprobs_backward
from fused_rl.ops.logits import Rows, logits_logprobs
from fused_rl.ops.native import empty, native_missing, release_memory
from fused_rl.ops.record import Given, Head, Known, Limits, Needs, Statistics, Upstream
from fused_rl.ops.statistics import (
    Asked,
    linear_statistics,
    linear_statistics_frozen,
    linear_statistics_stored,
)
from fused_rl.ops.stored import linear_logprobs_stored
from fused_rl.ops.terms import LogPair, divergence_terms
from fused_rl.ops.triton_chunk import fits_in_half
from fused_rl.ops.two_heads import Measure, TwoHeads, TwoStatistics

__all__ = [
    "FILTER_ROWS",
    "HAS_TRITON",
    "ONE_PASS_TOKENS",
    "AdaptedHead",
    "Asked",
    "AtHead",
    "ChunkLogits",
    "Deviation",
    "Filter",
    "Given",
    "Head",
    "KeptHead",
    "Known",
    "Limits",
    "LogPair",
    "Measure",
    "Needs",
    "Rows",
    "Sets",
    "Statistics",
    "StudentUpstream",
    "Sums",
    "TwoHeads",
    "TwoStatistics",
    "Upstream",
    "add_to_chunk",
    "autocasts",
    "card_bytes",
    "check_kept",
    "check_tokens",
    "chunk_sizes",
    "chunk_tokens",
    "divergence_terms",
    "empty",
    "exponentials_fit",
    "fits_in_half",
    "in_full",
    "kl",
    "known_of",
    "linear_divergence",
    "linear_divergence_chunk",
    "linear_divergence_chunk_backward",
    "linear_divergence_frozen",
    "linear_filtered_logprobs",
    "linear_kept_logprobs",
    "linear_logits_at",
    "linear_logprobs",
    "linear_logprobs_adapted",
    "linear_logprobs_at",
    "linear_logprobs_backward",
    "linear_logprobs_chunk",
    "linear_logprobs_chunk_backward",
    "linear_logprobs_frozen",
    "linear_logprobs_stored",
    "linear_statistics",
    "linear_statistics_frozen",
    "linear_statistics_stored",
    "logits_logprobs",
    "native_missing",
    "one_pass_pays",
    "pair_rows",
    "release_memory",
    "renormalised",
    "round_up",
    "scratch_bytes",
    "tokens_of_chunk",
    "triton",
    "triton_chunk",
    "trust",
    "two_heads_triton",
    "waiting_dtype",
    "walks_once",
]

find_kernels()

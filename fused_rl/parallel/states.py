"""What a rank of a vocabulary-parallel head is given of the hidden states."""

from enum import Enum


class Hidden(Enum):
    """How hidden states lie on the ranks that share a head's vocabulary.

    REPLICATED: every rank has all of them, and gets their whole gradient. Tensor parallelism.
    SEQUENCE_SHARDED: every rank has its part of the first dimension, in the order of ranks, and
        gets the gradient of that part; labels are those of all tokens, on every rank. Sequence
        parallelism, as Megatron and torch's SequenceParallel have it.
    PARTIAL: as REPLICATED, but the gradient is this rank's summand, and the caller adds the ranks'
        up: what follows a gather whose backward pass sums, and verl's contract.
    """

    REPLICATED = "replicated"
    SEQUENCE_SHARDED = "sequence sharded"
    PARTIAL = "partial"

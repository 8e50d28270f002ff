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
    OWN_TOKENS: every rank has tokens, labels and a batch of its own, as many as it likes, perhaps
        none, and gets the statistics, the loss and the whole gradient of those; the tokens travel
        to the rows. Data parallelism, with a head that is sharded and never gathered. Gradients of
        weight and bias are divided by the number of ranks, as engines average gradients. Every rank
        makes the same calls and backward passes, one without tokens too, and scales its loss by the
        same number before its backward pass.
    """

    REPLICATED = "replicated"
    SEQUENCE_SHARDED = "sequence sharded"
    PARTIAL = "partial"
    OWN_TOKENS = "own tokens"

"""Heads whose vocabulary is spread over the ranks of a group; torch.distributed is all it needs.

Rank r has the rows of weight from start_r on. With z the logits of a token,

    lse       = log sum_r exp lse_r         w_r = exp(lse_r - lse), the mass of its part
    logprob   = logprob_r + log w_r         of the rank that has the label
    entropy   = sum_r w_r (entropy_r - log w_r)
    top       = max_r (top_r + log w_r)
    dhidden   = sum_r dhidden_r             dweight, dbias: each rank's own

merge.py has the first four, sums.py the fifth, spread.py what calls the operators in between.
"""

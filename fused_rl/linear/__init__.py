"""From hidden states and heads to numbers per token, as users see it: the expensive half's door.

What most need of it is at the top, `fused_rl.linear_logprobs`; the rest is here.
"""

from fused_rl.linear.at import AtStats, linear_logits_at

__all__ = ["AtStats", "linear_logits_at"]

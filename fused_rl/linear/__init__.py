"""From hidden states and heads to numbers per token, as users see it: the expensive half's door.

What most need of it is at the top, `fused_rl.linear_logprobs`; the rest is here.
"""

from fused_rl.linear.at import AtStats, linear_logits_at
from fused_rl.linear.kept import KeptStats
from fused_rl.linear.rounding import rounding_differences
from fused_rl.linear.statistics import LogitStats, Statistic
from fused_rl.stats import TopStats

__all__ = [
    "AtStats",
    "KeptStats",
    "LogitStats",
    "Statistic",
    "TopStats",
    "linear_logits_at",
    "rounding_differences",
]

"""From hidden states and heads to numbers per token, as users see it: the expensive half's door."""

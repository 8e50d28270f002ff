"""A transformers model, asked what it does between hidden states and logits."""

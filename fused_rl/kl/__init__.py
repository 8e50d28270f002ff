"""Divergences of a policy from a reference, and what estimates the KL from log-probs of samples."""

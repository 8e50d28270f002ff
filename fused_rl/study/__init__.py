"""What each KL does, computed by this library and drawn: `fused-rl study`, for docs/kl.md. And what
a rollout's log-probs say of it: `fused-rl mismatch`.
"""
